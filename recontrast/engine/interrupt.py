"""Ctrl-C between two steps: what is saved then is a state that an unbroken run passes through."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C, so that the step it falls into is completed; yields whether it came."""
    default = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield lambda: False  # the program around us has a way of its own
        return
    came = threading.Event()

    def note(number: int, frame: Any) -> None:
        if came.is_set():
            default(number, frame)  # the second does not wait
        came.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, default)
