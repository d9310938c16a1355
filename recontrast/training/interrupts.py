"""Deferral of Ctrl-C, SIGTERM and SIGHUP to the end of a training step, so that no checkpoint holds half a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recontrast.runtime.termination import SIGNALS, interrupt


@contextmanager
def defer_interrupts(is_single_process: bool = True) -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C, SIGTERM or SIGHUP, so that the current step is completed; the second acts at once.

    Only default handlers and those of `recontrast.runtime.termination` are replaced, and only in the main thread; they
    are restored when the block ends. SIGHUP is sent when a terminal or a connection closes.

    Args:
        is_single_process: Whether SIGTERM and SIGHUP are held back as well. With several processes they are not:
            torchrun sends them to all processes when one has failed, and none could complete a step without the failed
            one.

    Yields:
        A function that returns whether an interrupt has arrived.
    """
    defaults: dict[int, tuple[Any, ...]] = {signal.SIGINT: (signal.default_int_handler,)}
    if is_single_process:
        defaults |= {number: (signal.SIG_DFL, interrupt) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        defaults = {}
    former = {number: signal.getsignal(number) for number in defaults}
    replaced = [number for number, handlers in defaults.items() if former[number] in handlers]
    arrived = threading.Event()

    def record_interrupt(number: int, frame: Any) -> None:
        if arrived.is_set():
            signal.default_int_handler(number, frame)
        arrived.set()

    for number in replaced:
        signal.signal(number, record_interrupt)
    try:
        yield arrived.is_set
    finally:
        for number in replaced:
            signal.signal(number, former[number])
