"""The shape of the code base: imports run one way, modules stay small, importing costs nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sculpt

REPOSITORY = Path(__file__).resolve().parent.parent
ORDER = (
    *(
        "digest",
        "files",
        "interrupts",
        "rows",
        "arguments",
        "cache",
        "calling",
        "task",
        "trees",
        "environment",
    ),
    *("model", "inputs", "ir", "tracing", "pruning", "repair", "scoring", "data", "training", "agents"),
    *("export", "latency", "report", "pipeline", "cli", "__main__"),
)
"""Each of these may import only itself and what stands before it."""
FOLDERS = {"agents": REPOSITORY / "agents", "nets": REPOSITORY / "nets"}


def modules() -> dict[str, Path]:
    """Name below `sculpt` (such as "tracing.axes") -> file, for every module of the library."""
    found = {}
    for path in sorted((REPOSITORY / "sculpt").rglob("*.py")):
        found[".".join(path.relative_to(REPOSITORY / "sculpt").with_suffix("").parts)] = path
    for folder, root in FOLDERS.items():
        for path in sorted(root.rglob("*.py")):
            found[".".join((folder, *path.relative_to(root).with_suffix("").parts))] = path
    return found


def imports(path: Path) -> list[str]:
    """Every module that a file imports, at any depth, those for type checking included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.append(node.module)
            if node.module == "sculpt":
                names += [f"sculpt.{alias.name}" for alias in node.names]
    return names


MODULES = modules()


def test_imports_run_one_way() -> None:
    wrong = []
    for name, path in MODULES.items():
        layer = name.split(".")[0]
        if layer == "__init__":
            continue  # the public face names everything
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] != "sculpt" or len(parts) < 2:
                continue
            if layer == "nets":
                allowed = parts[1] in ("nets", "arguments", "files")
            elif parts[1] == "nets":
                allowed = layer in ("pipeline", "cli")
            else:
                allowed = parts[1] not in ORDER or ORDER.index(parts[1]) <= ORDER.index(layer)
            if not allowed:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_every_module_has_a_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in MODULES} <= {*ORDER, "nets", "__init__"}


def _imported_modules(path: Path) -> Iterator[tuple[str, ast.ImportFrom]]:
    """Modules of the library that a file imports from when it is imported itself: name in `MODULES`, and the statement."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sculpt."):
            assert node.module is not None
            name = node.module.removeprefix("sculpt.")
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                yield (inner if inner in MODULES else name), node


def test_no_two_modules_import_each_other() -> None:
    """Not by any way round, faces of packages aside, which name what is in them."""
    arrows = {
        name: {to for to, _ in _imported_modules(path) if to in MODULES} for name, path in MODULES.items()
    }
    left = {name: to for name, to in arrows.items() if not name.endswith("__init__")}
    while free := {name for name, to in left.items() if not to & left.keys()}:
        left = {name: to for name, to in left.items() if name not in free}
    assert not left, f"a circle among {sorted(left)}"


def test_names_with_an_underscore_stay_in_their_module() -> None:
    wrong = [
        f"{name}: {alias.name} of {node.module}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sculpt")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not wrong


def test_no_module_is_named_like_something_in_it() -> None:
    wrong = []
    for name, path in MODULES.items():
        defined = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        if name.rsplit(".", 1)[-1] in defined:
            wrong.append(name)
    assert not wrong


@pytest.mark.slow
def test_no_bare_agents_or_nets() -> None:
    files = [
        *MODULES.values(),
        *(REPOSITORY / "tests").rglob("*.py"),
        *(REPOSITORY / "benchmarks").rglob("*.py"),
    ]
    wrong = [f"{file}: {name}" for file in files for name in imports(file) if name.split(".")[0] in FOLDERS]
    assert not wrong


def test_modules_stay_small() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n >= 600} == {}


def test_the_packages_are_relative_links() -> None:
    for folder in FOLDERS:
        link = REPOSITORY / "sculpt" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder


IMPORT = """
import time, warnings, sys
import jax
warnings.simplefilter("error")
start = time.perf_counter()
import sculpt
seconds = time.perf_counter() - start
heavy = {"flax", "optax", "rlax", "jraph", "matplotlib", "orbax", "tensorflow_datasets", "pyarrow", "onnx", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
print(seconds)
"""


def test_importing_is_quick_silent_and_touches_no_device() -> None:
    # Whoever touched a device would find that there is no such platform.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert float(done.stdout) < 1.5


@pytest.mark.parametrize("name", sorted(sculpt.__all__))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(sculpt, name) is not None
    assert name in dir(sculpt)


def test_the_public_face_lists_each_name_once() -> None:
    tree = ast.parse((REPOSITORY / "sculpt" / "__init__.py").read_text())
    typed = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed - {"annotations", "Any", "TYPE_CHECKING"} == set(sculpt.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        getattr(sculpt, "prune_everything")  # noqa: B009
