"""Device and library versions, recorded beside every measured number."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
from typing import Any

import jax

from sculpt.arguments import is_whole

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that numbers depend on; "absent" for what is not installed."""
    found = {"sculpt": version("autosculpt"), "python": platform.python_version()}
    return found | {name: version(name) for name in _PACKAGES}


def version(package: str) -> str:
    """Version of a package; "absent" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def device_name(platform_name: str | None = None) -> str:
    """A device in words, such as "cpu (x86_64, 2 cores)" or "gpu (NVIDIA H200)": the default one, or that of a platform."""
    device = jax.devices(platform_name)[0]
    if device.platform == "cpu":
        return f"cpu ({platform.machine()}, {cores()} cores)"
    return f"{device.platform} ({device.device_kind})"


def cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: Any) -> None:
    """Raises ValueError unless it is a number of cores that this process may use."""
    if not is_whole(threads, 1) or threads > cores():
        raise ValueError(
            f"threads must be a whole number from 1 to {cores()}, the cores that this process may use, got {threads!r}"
        )


def required(module: str, extra: str) -> Any:
    """An optional package.

    Raises:
      ValueError: if it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs the package {module}: pip install 'autosculpt[{extra}]'") from error
