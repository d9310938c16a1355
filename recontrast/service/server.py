"""HTTP server: listens, serves each connection in a task, and stops without losing an accepted request."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from recontrast.service.connection import ByteAccount, Connection, Handle
from recontrast.service.limits import Limits
from recontrast.service.messages import RequestError

BACKLOG = 128


def bind(host: str, port: int) -> list[socket.socket]:
    """Open the sockets of a server. Clients can connect when the server starts to listen.

    Args:
        host: Name or address of an interface.
        port: Port; 0 chooses a free one.

    Returns:
        Sockets, one for each address of the host.

    Raises:
        OSError: If the host is unknown or the port is in use.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            if sockets and port == 0:  # two addresses would get two ports
                break
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.setblocking(False)
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise OSError(f"--host, --port: cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sockets


class Server:
    """HTTP server on an event loop.

    Args:
        sockets: Sockets of `bind`, which listen.
        handle: Function that answers a request.
        limits: Limits of the service.
        report: Function that is called with unexpected exceptions.

    Attributes:
        account: Bytes of all bodies in memory.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], handle: Handle, limits: Limits, report: Callable[[BaseException], None]
    ) -> None:
        self._sockets, self._handle, self._limits, self._report = sockets, handle, limits, report
        self.account = ByteAccount(limits.total_bytes)
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, and then until every accepted request is answered.

        Args:
            stop: Event that ends the server.
        """
        self._stopping: asyncio.Task[Any] = asyncio.ensure_future(stop.wait())
        accepting = [asyncio.ensure_future(self._accept(listener)) for listener in self._sockets]
        try:
            await stop.wait()
        finally:
            for task in accepting:
                task.cancel()
            await asyncio.gather(*accepting, return_exceptions=True)
            for listener in self._sockets:
                self._accept_waiting(listener)
                listener.close()
            while self._connections:
                await asyncio.wait(set(self._connections))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, _ = await loop.sock_accept(listener)
            except OSError:  # no file descriptor is free, or the client has gone
                await asyncio.sleep(0.1)
                continue
            self._start(connected)

    def _accept_waiting(self, listener: socket.socket) -> None:
        """Accept the clients that have connected while no one looked."""
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:  # none is left
                return
            self._start(connected)

    def _start(self, connected: socket.socket) -> None:
        task = asyncio.ensure_future(self._serve(connected))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        try:
            reader, writer = await asyncio.open_connection(sock=connected)
        except OSError:
            connected.close()
            return
        connection = Connection(reader, writer, self._handle, self._limits, self.account, self._stopping, self._report)
        if len(self._connections) > self._limits.connections:
            text = f"connections: wanted at most {self._limits.connections}, got more: try again later"
            await connection.refuse(RequestError(503, text, {"Retry-After": "1"}))
        else:
            await connection.serve()
