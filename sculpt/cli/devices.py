"""JAX settings of the command line: devices, and the cache of compiled programs."""

from __future__ import annotations

import contextlib
import os
import sys

from sculpt.cache import cache_folder

_CACHE_OPTION = "jax_compilation_cache_dir"
_MOST_CPU_DEVICES = 16


def use_compilation_cache() -> None:
    """Compiled programs are kept between runs, in `$SCULPT_CACHE_DIR` or `~/.cache/sculpt`."""
    import jax

    if getattr(jax.config, _CACHE_OPTION) is None:
        jax.config.update(_CACHE_OPTION, str(cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def make_a_device_of_every_core() -> None:
    """Where JAX runs on the CPU and is not told otherwise: they score policies faster than one device with as many threads.

    Not for commands that measure latency: calls that are over in milliseconds take longer once programs ran on two devices.
    """
    import jax

    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices == -1 and not told:  # type: ignore[attr-defined]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Too late where a program that calls `main` has used JAX before.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CPU_DEVICES))


def require_device() -> None:
    """Raises ValueError where the device that JAX is told to use is absent, which JAX may say with an empty assertion."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"no device for JAX_PLATFORMS={jax.config.jax_platforms or ''}: set it to cpu, or to what is here "  # type: ignore[attr-defined]
            f"({str(error) or 'JAX found none'})"
        ) from error


def wait_for_devices() -> None:
    """Python must not end under a program that is still running."""
    jax = sys.modules.get("jax")
    for array in jax.live_arrays() if jax is not None else ():
        with contextlib.suppress(RuntimeError):
            array.block_until_ready()
