"""One HTTP/1.1 connection: requests are parsed by h11, with limits on time and bytes at every step."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import h11

from recontrast.service.limits import HEAD_BYTES, LINGER_BYTES, LINGER_SECONDS, Limits
from recontrast.service.messages import Request, RequestError, Response, describe_status

CHUNK = 1 << 16  # bytes read at a time
STOP_SECONDS = 0.25  # after the order to stop, a request that is already on its way is still accepted
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}

Handle = Callable[[Request], Awaitable[Response]]


class ByteAccount:
    """Bytes of all bodies in memory.

    Args:
        limit: Largest number of bytes.

    Attributes:
        used: Number of bytes in memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def add(self, count: int) -> None:
        """Add bytes.

        Raises:
            RequestError: If there would be more than the limit.
        """
        if self.used + count > self.limit:
            raise RequestError(429, "body: wanted memory for it, got none free: try again later", {"Retry-After": "1"})
        self.used += count


class Connection:
    """A connection of a client.

    Args:
        reader: Bytes from the client.
        writer: Bytes to the client.
        handle: Function that answers a request.
        limits: Limits of the service.
        account: Bytes of all bodies in memory.
        stopping: Task that ends when the service is to stop.
        report: Function that is called with an unexpected exception of ``handle``.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handle: Handle, limits: Limits,
        account: ByteAccount, stopping: "asyncio.Task[Any]", report: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._reader, self._writer, self._handle, self._limits = reader, writer, handle, limits
        self._account, self._stopping, self._report = account, stopping, report
        self._protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._held = 0  # bytes of the body of this request in the account

    async def serve(self) -> None:
        """Answer requests until the client or the service ends the connection."""
        try:
            while await self._serve_one():
                self._protocol.start_next_cycle()
            if self._protocol.their_state in (h11.SEND_BODY, h11.ERROR):
                await self._linger()
        except (OSError, asyncio.TimeoutError, h11.ProtocolError):  # the client has gone, or takes no answer
            pass
        finally:
            self._release()
            await self._close()

    async def refuse(self, error: RequestError) -> None:
        """Send an error in place of serving the connection, without waiting for a request."""
        with suppress(OSError, asyncio.TimeoutError, h11.ProtocolError):
            await self._send(error.to_response(), "GET")
            await self._linger()
        await self._close()

    async def _serve_one(self) -> bool:
        """Answer one request; return whether another one can follow on the connection."""
        method = "GET"
        try:
            head = await self._read_head()
            if head is None:
                return False
            method = head.method.decode("ascii")
            response = await self._answer(head)
        except RequestError as error:
            response = error.to_response()
        except h11.RemoteProtocolError as error:
            if self._protocol.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                return False
            response = RequestError(error.error_status_hint, f"request: wanted HTTP/1.1, got {error}").to_response()
        finally:
            self._release()
        await self._send(response, method)
        return self._protocol.our_state is h11.DONE and self._protocol.their_state is h11.DONE

    async def _answer(self, head: h11.Request) -> Response:
        headers: dict[str, str] = {}
        for name, value in head.headers:
            key = name.decode("ascii").lower()
            headers[key] = f"{headers[key]}, {value.decode('latin-1')}" if key in headers else value.decode("latin-1")
        method, target = head.method.decode("ascii"), head.target.decode("latin-1")
        declared = headers.get("content-length")
        if declared is not None and int(declared) > self._limits.body_bytes:
            raise self._refuse_size(f"{int(declared):,}")
        request = Request(method, target, headers, self._read_body, lambda: not self._writer.transport.is_closing())
        try:
            return await self._handle(request)
        except (RequestError, h11.RemoteProtocolError, OSError, asyncio.CancelledError):
            raise
        except Exception as error:
            self._report(error)
            return RequestError(500, "service: wanted an answer, got an internal error").to_response()

    async def _read_head(self) -> h11.Request | None:
        """Read the headers of the next request; None if there is none."""
        deadline: float | None = None
        if self._protocol.trailing_data[0]:
            deadline = time.monotonic() + self._limits.head_seconds
        while True:
            event = self._protocol.next_event()
            if isinstance(event, h11.Request):
                return event
            if event is not h11.NEED_DATA:  # closed, or paused
                return None
            if deadline is None:
                data = await self._wait_for_request()
                deadline = time.monotonic() + self._limits.head_seconds
            else:
                data = await self._receive(deadline, "headers", self._limits.head_seconds)
            if data is None:
                return None
            self._protocol.receive_data(data)

    async def _wait_for_request(self) -> bytes | None:
        """Wait for the first bytes of a request; None if none come."""
        reading = asyncio.ensure_future(self._reader.read(CHUNK))
        try:
            waiting = {reading, self._stopping}
            await asyncio.wait(waiting, timeout=self._limits.idle_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and self._stopping.done():
                await asyncio.wait({reading}, timeout=STOP_SECONDS)
            return reading.result() if reading.done() else None
        finally:
            reading.cancel()

    async def _receive(self, deadline: float, part: str, seconds: float) -> bytes:
        try:
            return await asyncio.wait_for(self._reader.read(CHUNK), max(deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            raise RequestError(408, f"{part}: wanted them within {seconds:g} s, got a part of them") from None

    async def _read_body(self) -> bytes:
        parts: list[bytes] = []
        deadline = time.monotonic() + self._limits.body_seconds
        while True:
            event = self._protocol.next_event()
            if isinstance(event, h11.EndOfMessage):
                return b"".join(parts)
            if isinstance(event, h11.Data):
                data = bytes(event.data)
                if self._held + len(data) > self._limits.body_bytes:
                    raise self._refuse_size("more")
                self._account.add(len(data))
                self._held += len(data)
                parts.append(data)
            elif event is h11.NEED_DATA:
                if self._protocol.they_are_waiting_for_100_continue:
                    await self._write(self._protocol.send(h11.InformationalResponse(status_code=100, headers=[])))
                self._protocol.receive_data(await self._receive(deadline, "body", self._limits.body_seconds))
            else:
                raise ConnectionError("the client has gone")

    def _refuse_size(self, got: str) -> RequestError:
        return RequestError(413, f"body: wanted at most {self._limits.body_bytes:,} bytes, got {got}")

    def _release(self) -> None:
        self._account.used -= self._held
        self._held = 0

    async def _send(self, response: Response, method: str) -> None:
        headers = {"Content-Type": response.kind, "Content-Length": str(len(response.body))}
        headers |= {**_HEADERS, **response.headers}
        if self._stopping.done() or self._protocol.their_state is not h11.DONE:
            headers["Connection"] = "close"
        head = h11.Response(
            status_code=response.status,
            headers=[(name.encode("ascii"), value.encode("latin-1", "replace")) for name, value in headers.items()],
            reason=describe_status(response.status).encode(),
        )
        content = self._protocol.send(head) or b""
        if method != "HEAD":
            content += self._protocol.send(h11.Data(data=response.body)) or b""
        await self._write(content + (self._protocol.send(h11.EndOfMessage()) or b""))

    async def _write(self, content: bytes | None) -> None:
        """Write in pieces, so that a slow client has the time limit for each of them."""
        for start in range(0, len(content or b""), CHUNK):
            self._writer.write((content or b"")[start : start + CHUNK])
            await asyncio.wait_for(self._writer.drain(), self._limits.write_seconds)

    async def _linger(self) -> None:
        """Read and drop what the client still sends: closing at once would discard the answer on its way."""
        left = LINGER_BYTES
        deadline = time.monotonic() + (1.0 if self._stopping.done() else LINGER_SECONDS)
        if self._writer.can_write_eof():
            self._writer.write_eof()
        while left > 0 and (seconds := deadline - time.monotonic()) > 0:
            data = await asyncio.wait_for(self._reader.read(CHUNK), min(seconds, 2.0))
            if not data:
                return
            left -= len(data)

    async def _close(self) -> None:
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), self._limits.write_seconds)
        except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
            self._writer.transport.abort()
