"""SIGTERM and SIGHUP as interrupts: a command that is told to end removes its temporary files, as after Ctrl-C."""

import os
import signal
import threading
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
