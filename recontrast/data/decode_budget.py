"""Bound the memory of images that are decoded at the same time by several threads of a process."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

BYTES_IN_FLIGHT = 1 << 30
"""Memory of the images that a process decodes at the same time, in bytes. A larger image is decoded alone."""


class ByteBudget:
    """A number of bytes that threads share; a thread waits until its bytes are free.

    Args:
        limit: Number of bytes. A thread that needs more waits until no other thread holds any.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget all reservations, as in a child process, which has none of the threads that hold them."""
        self._used = 0
        self._turn = threading.Lock()  # threads are served in order, so that a large image is not overtaken for ever
        self._free = threading.Condition()
        self._thread = threading.local()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold bytes within a ``with`` block; a block inside it, of the same thread, holds no more.

        Args:
            size: Number of bytes.
        """
        if getattr(self._thread, "is_inside", False):
            yield
            return
        with self._turn, self._free:
            self._free.wait_for(lambda: not self._used or self._used + size <= self.limit)
            self._used += size
        self._thread.is_inside = True
        try:
            yield
        finally:
            self._thread.is_inside = False
            with self._free:
                self._used -= size
                self._free.notify_all()


BUDGET = ByteBudget(BYTES_IN_FLIGHT)
"""Budget of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUDGET.reset)
