"""Ctrl-C, SIGTERM and SIGHUP: a command that is told to end removes its temporary files, or finishes its work."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def interrupt_on_termination() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP, in the main thread of a single process.

    Handlers of other programs stay, and so does an ignored SIGHUP (``nohup``). Several processes under torchrun keep
    the default: one that waits for a failed one could not handle the signal.
    """
    if threading.current_thread() is not threading.main_thread() or os.environ.get("WORLD_SIZE", "1") != "1":
        return
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt; the handler of SIGTERM and SIGHUP."""
    raise KeyboardInterrupt


@contextmanager
def handle_signals(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Call a function on Ctrl-C, SIGTERM and SIGHUP while the block runs.

    Ignored signals stay ignored. Python allows handlers in the main thread alone: in another, nothing is changed.

    Args:
        handle: Function that gets the number of the signal and the frame that it interrupts.
    """
    is_main = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGINT, *SIGNALS) if is_main and signal.getsignal(n) != signal.SIG_IGN]
    former = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
