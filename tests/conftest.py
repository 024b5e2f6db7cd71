"""What every test runs under: CPU, strict numerics, a compilation cache; and the fixtures that several files share."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most tests run many tiny programs once: not optimised, they compile in two thirds of the time. Processes that tests start
# do as they do, for the same bits. For what is optimised nevertheless LLVM's first level takes 15 % less time than the third,
# and computes as fast.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

# Each worker of pytest-xdist keeps to its share of the cores: two one-threaded programs do a quarter more than two that
# fight over both cores. Before jax is imported, whose thread pools are as large as the cores it sees.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if _WORKER and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if len(_cores) >= _workers:
        # Workers that take the place of one that died are numbered on.
        os.sched_setaffinity(0, _cores[int(_WORKER.removeprefix("gw")) % _workers :: _workers])

# A shell that starts the tests in the background has them ignore interrupts, which some of them send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

if TYPE_CHECKING:
    from sculpt.data.splits import Splits
    from sculpt.model import Model

REPOSITORY = Path(__file__).resolve().parent.parent

# Sharding is tested on eight devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`fast("a", "b")` names the cases of a parametrised test that are in the fast tier; all others are slow."""
    known: dict[str, set[str]] = {}
    asked: dict[str, set[str]] = {}
    for item in items:
        if mark := item.get_closest_marker("fast"):
            test, _, case = item.nodeid.partition("[")
            known.setdefault(test, set()).add(case.removesuffix("]"))
            asked[test] = set(mark.args)
            if case.removesuffix("]") not in mark.args:
                item.add_marker(pytest.mark.slow)
    # Where tests are picked by name, not all of their cases are here.
    picked = any("::" in argument for argument in config.args)
    for test, cases in asked.items():
        if not picked and not cases <= known[test]:
            raise pytest.UsageError(f"{test} has no cases {sorted(cases - known[test])}")


@pytest.fixture(scope="module", autouse=True)
def _optimised(request: pytest.FixtureRequest) -> Iterator[None]:
    """The mark `optimised` of a module asks for the compiler's work."""
    with optimised() if request.node.get_closest_marker("optimised") else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """For programs that compute longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


_calls = itertools.count(1)


def let_compiled_programs_go() -> None:
    """Each compiled program holds some memory maps; Linux ends a process that reaches 65,530 of them. Looks every 25th time."""
    maps = Path("/proc/self/maps")
    if next(_calls) % 25 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _programs_of_the_test() -> Iterator[None]:
    yield
    let_compiled_programs_go()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and pretrained weights; tests that need it are skipped where it is absent."""
    named = os.environ.get("SCULPT_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"no test data at {folder}: set SCULPT_TEST_DATA to the folder that holds cifar10/ and weights/"
        )
    return folder


@pytest.fixture(scope="session")
def trained_digits(request: pytest.FixtureRequest) -> tuple[Model, Splits]:
    """A ResNet-8 trained on digits, and those splits. Trained once, then read back from pytest's cache."""
    import sculpt

    splits = sculpt.load_data("digits")
    model = untrained_digits()
    assert request.config.cache is not None
    file = request.config.cache.mkdir("trained_digits") / "resnet8-1.safetensors"
    if not file.exists():
        config = sculpt.FinetuneConfig(epochs=8, learning_rate=0.05, batch_size=64)
        with optimised():
            model = sculpt.train(model, splits, config, jax.random.key(0))
        sculpt.save_params({"params": model.params, "state": model.state}, file)
    arrays = sculpt.load_params(file, {"params": model.params, "state": model.state})
    return model.replace(params=arrays["params"], state=arrays["state"]), splits


def untrained_digits(seed: int = 0) -> Model:
    """A freshly initialised ResNet-8 for 8x8 digits."""
    import sculpt

    module = sculpt.nets.create("resnet8", num_classes=10)
    variables = jax.jit(module.init)(jax.random.key(seed), jax.numpy.zeros((1, 8, 8, 1)))
    return sculpt.from_linen(module, variables)
