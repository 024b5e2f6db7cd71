"""Every network equals its PyTorch twins. Runs where the extra `parity` is installed: `pip install 'autosculpt[parity]'`."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

from benchmarks.parity import Twin, random_difference, twins


def named(twin: Twin) -> str:
    return f"{twin.name}-{twin.naming}"


@pytest.mark.slow
@pytest.mark.parametrize("twin", [*twins()], ids=named)
def test_logits_equal_those_of_the_twin(twin: Twin) -> None:
    for library in {"huggingface": "transformers", "torchvision": "torchvision"}.items():
        if twin.naming.startswith(library[0]):
            pytest.importorskip(library[1], exc_type=ImportError)
    apart, largest = random_difference(twin)
    assert apart <= 1e-4 * max(1.0, largest)
