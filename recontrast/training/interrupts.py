"""Deferral of Ctrl-C and SIGTERM to the end of a training step, so that the checkpoint never holds half a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def defer_interrupts(is_single_process: bool = True) -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM, so that the current step is completed; the second acts at once.

    Only default handlers are replaced, and only in the main thread; they are restored when the block ends.

    Args:
        is_single_process: Whether SIGTERM is held back as well. With several processes it is not: torchrun sends it to
            all of them when one has failed, and none could complete a step without the failed one.

    Yields:
        A function that returns whether an interrupt has arrived.
    """
    default_handlers: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if is_single_process:
        default_handlers[signal.SIGTERM] = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread():
        default_handlers = {}
    replaced = [number for number, handler in default_handlers.items() if signal.getsignal(number) is handler]
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
            signal.signal(number, default_handlers[number])
