"""Requests and responses, as the routes of the service see them."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

_TEXTS = {400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large", 429: "Too Many Requests"}


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: Status code of the response, from 400.
        text: One sentence.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, dict(headers or {})

    def to_response(self) -> "Response":
        """Return the response, whose body is JSON with the sentence as ``error``."""
        return json_response({"error": self.text}, self.status, self.headers)


@dataclass(frozen=True)
class Response:
    """A response.

    Attributes:
        body: Its body.
        kind: Media type of the body.
        status: Status code.
        headers: Further headers.
    """

    body: bytes
    kind: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Build a response of JSON; NaN is refused, which JSON does not know."""
    body = json.dumps(content, allow_nan=False, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    return Response(body, "application/json", status, dict(headers or {}))


class Request:
    """A request whose headers have been read.

    Args:
        method: Method, such as "POST".
        target: Path and query as the client sent them.
        headers: Headers; names are in lower case.
        read_body: Function that reads the body, see `read`.
        is_connected: Function that returns whether the client still waits.

    Attributes:
        path: Path without the query, decoded.
        query: Parameters of the query.

    Raises:
        RequestError: If the target is no path, or a parameter occurs twice.
    """

    def __init__(
        self, method: str, target: str, headers: Mapping[str, str], read_body: Callable[[], Awaitable[bytes]],
        is_connected: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.method, self.headers, self.is_connected = method, headers, is_connected
        self._read_body = read_body
        if not target.startswith("/"):
            raise RequestError(400, "target: wanted a path that starts with /, got another")
        parts = urlsplit("http://host" + target)
        self.path = unquote(parts.path, errors="replace")
        pairs = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=20, errors="replace")
        self.query = dict(pairs)
        if len(self.query) < len(pairs):
            raise RequestError(400, "query: wanted each parameter once, got one of them again")

    async def read(self) -> bytes:
        """Read the body.

        Raises:
            RequestError: If it is too large or too slow.
        """
        return await self._read_body()


def describe_status(status: int) -> str:
    """Return the reason phrase of a status code."""
    from http import HTTPStatus

    return _TEXTS.get(status) or HTTPStatus(status).phrase
