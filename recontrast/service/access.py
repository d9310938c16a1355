"""Who may use the service: the token, and protection against pages of other origins in the user's browser."""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from recontrast.service.messages import Request, RequestError

LEAST_TOKEN = 16  # characters


def is_loopback(host: str) -> bool:
    """Return whether an address or name can only be reached from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token(token: str | None, host: str) -> None:
    """Check the token of a service before it starts.

    Args:
        token: Token, or None.
        host: Interface on which the service listens.

    Raises:
        ValueError: If the token is too short, or missing although other machines can reach the service.
    """
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--token: wanted a token for a service that other machines reach ({host}), got none: set it, or "
            "RECONTRAST_TOKEN in the environment, or leave --host at 127.0.0.1"
        )
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable()):
        got = f"{len(token)} or others"
        raise ValueError(f"--token: wanted at least {LEAST_TOKEN} printable ASCII characters, got {got}")


def check_access(request: Request, token: str | None) -> None:
    """Refuse a request without the token.

    Args:
        request: The request.
        token: Token of the service; None if it has none and only this machine reaches it.

    Raises:
        RequestError: If the token is missing or wrong.
    """
    if token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Digests have one length, so that the time of the comparison tells nothing.
    wanted, got = (hashlib.sha256(text.encode("latin-1", "replace")).digest() for text in (token, given.strip()))
    if not hmac.compare_digest(wanted, got) or kind.lower() != "bearer":
        text = "Authorization: wanted Bearer and the token of this service, got another or none"
        raise RequestError(401, text, {"WWW-Authenticate": 'Bearer realm="recontrast"'})


def check_origin(request: Request, token: str | None) -> None:
    """Refuse requests that a page of another origin makes in the user's browser.

    A service without a token answers only to the names of this machine: another name that leads to 127.0.0.1 would give
    its owner's pages access (DNS rebinding).

    Args:
        request: The request.
        token: Token of the service, or None.

    Raises:
        RequestError: If the host or the origin is another.
    """
    host = request.headers.get("host", "")
    if token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        wanted = "localhost or a loopback address for a service without a token"
        raise RequestError(403, f"Host: wanted {wanted}, got another")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise RequestError(403, "Origin: wanted a page of this service, got one of another origin")
