"""Ctrl-C as a flag: long loops call `check_interrupt`, so that no library is interrupted in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

EXIT_CODE = 130
_NOTICE = b"\nsculpt: interrupted: ends after the step under way; press Ctrl-C again to end at once\n"
_asked = threading.Event()
_deferring = threading.Event()


def check_interrupt() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed within `deferred_interrupts`."""
    if _asked.is_set():
        raise KeyboardInterrupt


def defers_interrupts() -> bool:
    """Whether Ctrl-C sets a flag, instead of raising KeyboardInterrupt wherever the program is."""
    return _deferring.is_set()


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within it the first Ctrl-C sets the flag of `check_interrupt`; the second ends the process at once, with exit code 130.

    Without effect outside of the main thread, and where Ctrl-C has a handler that is not Python's own.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    # Python's handlers wait for long calls such as a compilation. The bytes in the pipe do not.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="sculpt-interrupts", daemon=True)
    _asked.clear()
    _deferring.set()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda number, frame: _asked.set())
    watcher.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)
        _deferring.clear()
        _asked.clear()


def _watch(reader: int) -> None:
    interrupts = 0
    while received := os.read(reader, 1):
        if received[0] != signal.SIGINT:
            continue
        interrupts += 1
        if interrupts > 1:
            os._exit(EXIT_CODE)
        _asked.set()
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)
