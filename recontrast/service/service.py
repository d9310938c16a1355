"""The running service: its threads, from the first socket to the last answer."""

import asyncio
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

from recontrast.service.application import Application
from recontrast.service.batches import BatchThread
from recontrast.service.detectors import ReloadThread, ServedDetector
from recontrast.service.limits import Limits
from recontrast.service.server import BACKLOG, Server
from recontrast.service.uploads import start_decoders


class Service:
    """A service that runs in threads of its own: one for HTTP, one for inference, some that decode.

    Args:
        detectors: Detectors by name.
        sockets: Sockets of `recontrast.service.server.bind`.
        limits: Limits of the service.
        token: Token that requests must bring, or None.
        batch: Largest number of images in a batch.
        window: Longest time that an image waits for others in a batch, in seconds.
        workers: Number of threads that decode images.
        reload_seconds: Time between two looks at the files of the detectors; 0 looks never.
        on_event: Function that is told in a sentence what happens.

    Attributes:
        application: The routes and counters.
        port: Port of the first socket.
    """

    def __init__(
        self, detectors: Mapping[str, ServedDetector], sockets: Sequence[socket.socket], limits: Limits | None = None,
        *, token: str | None = None, batch: int = 8, window: float = 0.005, workers: int = 2,
        reload_seconds: float = 2.0, on_event: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        for listener in sockets:
            listener.listen(BACKLOG)
        self.port: int = sockets[0].getsockname()[1]
        self._on_event = on_event
        limits = limits or Limits()
        self._pool = start_decoders(workers)
        self._batches = BatchThread(batch, window, self._report)
        self.application = Application(detectors, self._batches, self._pool, limits, token)
        self._server = Server(sockets, self.application.handle, limits, self._report)
        self.application.count_connections = lambda: self._server.connections
        self._reloads = ReloadThread(list(detectors.values()), reload_seconds) if reload_seconds else None
        self._ready, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="recontrast-http", daemon=True)
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Order the service to stop, without waiting; accepted requests are answered. May be called from a handler."""
        self.application.is_stopping = True
        if not self._stopped.is_set():
            try:
                self._loop.call_soon_threadsafe(self._stop.set)
            except RuntimeError:  # the loop has ended
                pass

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the service has stopped.

        Args:
            seconds: Longest time to wait; None waits as long as it takes.

        Returns:
            Whether it has stopped.
        """
        return self._stopped.wait(seconds)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._report(error)
        finally:
            self._ready.set()
            if self._reloads is not None:
                self._reloads.close()
            self._batches.close()
            self._pool.shutdown()
            counters = self.application.counters
            self._on_event(f"stopped: {counters.accepted} images accepted, {counters.answered} answered")
            self._stopped.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._server.run(self._stop)

    def _report(self, error: BaseException) -> None:
        """Report an unexpected error, with the place where it was raised."""
        where = traceback.extract_tb(error.__traceback__)[-1:]
        place = f" ({where[0].filename.rpartition('/')[2]}:{where[0].lineno})" if where else ""
        self._on_event(f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:500]}{place}")
