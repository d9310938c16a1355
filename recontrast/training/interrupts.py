"""Ctrl-C or an end asked for between two steps: what is saved then is a state that an unbroken run passes through."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def defer_interrupts(alone: bool = True) -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM, so that the step it falls into is completed; yields whether it came.

    Args:
        alone: False: of several processes, whose launcher ends all of them by SIGTERM when one has failed: none would
            come to the next step.
    """
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if alone:
        usual[signal.SIGTERM] = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread():
        usual = {}
    held = [number for number, handler in usual.items() if signal.getsignal(number) is handler]  # else: not ours
    came = threading.Event()

    def note(number: int, frame: Any) -> None:
        if came.is_set():
            signal.default_int_handler(number, frame)  # the second does not wait
        came.set()

    for number in held:
        signal.signal(number, note)
    try:
        yield came.is_set
    finally:
        for number in held:
            signal.signal(number, usual[number])
