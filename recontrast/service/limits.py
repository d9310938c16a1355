"""Limits of the service: what one request, and all of them together, may take."""

import math
from dataclasses import dataclass, fields

HEAD_BYTES = 1 << 14  # of the request line and the headers
LINGER_BYTES = 1 << 28  # of a refused body that are read and dropped, so that the client gets the answer
LINGER_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """Limits of the service.

    Attributes:
        body_bytes: Largest body of a request, in bytes.
        pixels: Largest number of pixels of an image, or of all views of a part together.
        queue: Largest number of images that wait or are scored at one time.
        connections: Largest number of open connections.
        idle_seconds: How long a connection may wait for its next request.
        head_seconds: How long the headers of a request may take, from their first byte.
        body_seconds: How long the body of a request may take.
        write_seconds: How long a client may take no byte of its answer.

    Raises:
        ValueError: If a limit is not positive.
    """

    body_bytes: int = 32 * 2**20
    pixels: int = 50_000_000
    queue: int = 64
    connections: int = 256
    idle_seconds: float = 60.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name}: wanted a number above 0, got {value}")

    @property
    def total_bytes(self) -> int:
        """Largest number of bytes of all bodies in memory together."""
        return max(8 * self.body_bytes, 2**28)
