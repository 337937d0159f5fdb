"""Signals that wait until a shift or an update of the weights is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Schedulers and people end or pause a program with these, where the platform has them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals wait for the end of the block: Ctrl-C raises between any two operations.

    Python runs signal handlers in its main thread, and lets only that one set them.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = ((number, signal.getsignal(number)) for number in SIGNALS)
        handlers = {number: handler for number, handler in found if callable(handler)}
    arrived: list[tuple[int, Any]] = []
    try:
        for number in handlers:
            signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handlers[number](number, frame)
