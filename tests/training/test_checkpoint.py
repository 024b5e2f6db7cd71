"""Checkpoints: exact, atomic, tied to their run, honest about damage."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.training import checkpoint
from sculpt.training.checkpoint import Checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Holder:
    """A pytree node of one's own."""

    weights: Any
    nothing: Any


def a_tree(offset: float = 0.0) -> Any:
    weights = {
        "kernel": jnp.arange(6.0).reshape(2, 3) + offset,
        "half": jnp.ones(3, jnp.bfloat16) + jnp.bfloat16(offset),
        "mask": jnp.array([True, False]),
        "none left": jnp.zeros((0, 4)),
    }
    host = {"seconds": np.array([1.5 + offset, np.nan]), "count": np.int64(2**40), "plain": 3}
    return Holder(weights, None), host, jax.random.key(int(offset) + 5), jnp.int32(7)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def step_folder(directory: Path, step: int) -> Path:
    return directory / "steps" / str(step)


def test_a_round_trip_is_exact_in_values_dtypes_and_kinds(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    keeper = Checkpoints(tmp_path / "run", "mine")
    assert keeper.restore_latest(a_tree()) is None
    assert keeper.latest() is None
    keeper.save(3, a_tree(2.0))
    keeper.close()
    again = Checkpoints(tmp_path / "run", "mine")
    found = again.restore_latest(a_tree())
    assert found is not None
    assert found[0] == 3
    assert_same(found[1], a_tree(2.0))
    assert again.latest() == step_folder(tmp_path / "run", 3)
    assert again.directory == tmp_path / "run"
    again.close()
    assert capfd.readouterr().err == "", "Orbax's log reaches the user"


def test_the_latest_step_wins_and_the_last_few_are_kept(tmp_path: Path) -> None:
    keeper = Checkpoints(tmp_path, "mine", keep=2)
    for step in (1, 2, 5):
        keeper.save(step, {"x": jnp.float32(step)})
    found = keeper.restore_latest({"x": jnp.float32(0)})
    assert found is not None
    assert (found[0], float(found[1]["x"])) == (5, 5.0)
    assert not step_folder(tmp_path, 1).exists()
    assert step_folder(tmp_path, 2).exists()
    with pytest.raises(ValueError, match="step 5 is not above the last one, 5"):
        keeper.save(5, {"x": jnp.float32(9)})


def test_what_was_saved_does_not_follow_later_changes(tmp_path: Path) -> None:
    keeper, array = Checkpoints(tmp_path, "mine"), np.zeros(3)
    keeper.save(1, {"x": array})
    array += 1
    found = keeper.restore_latest({"x": array})
    assert found is not None
    np.testing.assert_array_equal(found[1]["x"], np.zeros(3))


def test_another_run_s_directory_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run", "mine").save(1, {"x": jnp.float32(1)})
    with pytest.raises(ValueError, match=r"run holds checkpoints of another run .* name another directory"):
        Checkpoints(tmp_path / "run", "yours")


def test_a_directory_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no checkpoints"):
        Checkpoints(tmp_path, "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_owner_file_is_an_error(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "mine")
    (tmp_path / "run.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        Checkpoints(tmp_path, "mine")


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, "mine", keep=0)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "deleted"])
def test_any_damaged_file_is_noticed_or_harmless(tmp_path: Path, damage: Any) -> None:
    tree = {"x": jax.random.normal(jax.random.key(0), (40, 50)), "n": jnp.int32(3)}
    Checkpoints(tmp_path / "whole", "mine").save(4, tree)
    files = [
        p.relative_to(step_folder(tmp_path / "whole", 4))
        for p in step_folder(tmp_path / "whole", 4).rglob("*")
        if p.is_file()
    ]
    messages = []
    files.append(Path("../../records/4.json"))
    for number, name in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        damage(step_folder(copy, 4) / name)
        try:
            found = Checkpoints(copy, "mine").restore_latest(tree)
        except ValueError as error:
            messages.append((str(step_folder(copy, 4)), str(error)))
        else:
            # Without its marker of completeness, or its record, a step does not count.
            assert found is None
            assert damage is Path.unlink
    assert len(messages) >= len(files) - 2
    for folder, message in messages:
        assert folder in message
        assert "delete that folder to go back to the step before" in message


def test_a_template_of_another_shape_is_an_error(tmp_path: Path) -> None:
    keeper = Checkpoints(tmp_path, "mine")
    keeper.save(1, {"x": jnp.zeros((2, 3))})
    for template in ({"x": jnp.zeros((3, 2))}, {"x": jnp.zeros((2, 3)), "y": jnp.zeros(1)}):
        with pytest.raises(ValueError, match="cannot be read"):
            keeper.restore_latest(template)


SAVE_FOR_EVER = """
import sys
import numpy as np
from sculpt.training.checkpoint import Checkpoints
keeper = Checkpoints(sys.argv[1], "mine")
for step in range(1, 100000):
    keeper.save(step, {"x": np.full(200_000, step, np.float32), "step": np.int32(step)})
    print(step, flush=True)
"""


def test_a_kill_in_mid_save_leaves_the_last_complete_step(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    saved = [int(child.stdout.readline()) for _ in range(3)]
    # The name of a step under way shows that a save is being written right now.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any("tmp" in p.name for p in (tmp_path / "steps").iterdir()):
        pass
    os.kill(child.pid, signal.SIGKILL)
    saved += [int(line) for line in child.stdout.read().split()]
    child.wait()
    child.stdout.close()
    keeper = Checkpoints(tmp_path, "mine")
    found = keeper.restore_latest({"x": np.zeros(200_000, np.float32), "step": np.int32(0)})
    assert found is not None
    step, tree = found
    assert step >= saved[-1]
    assert int(tree["step"]) == step
    assert (tree["x"] == step).all()
    keeper.save(step + 1, tree)


def test_an_interrupt_waits_for_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Checkpoints(tmp_path / "run", "mine")
    kinds = checkpoint._kinds

    def interrupted(leaves: list[np.ndarray]) -> list[str]:
        signal.raise_signal(signal.SIGINT)
        return kinds(leaves)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_kinds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keeper.save(1, {"a": jnp.arange(3)})
    found = keeper.restore_latest({"a": jnp.zeros(3, jnp.int32)})
    keeper.close()
    assert found is not None and found[0] == 1
    np.testing.assert_array_equal(found[1]["a"], jnp.arange(3))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
