"""Whether the hub of pretrained weights can be reached, found out in seconds."""

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

SECONDS = 4.0  # for one try to reach the hub, with the look-up of its name
TRIES = 2
_FILES = ("model.safetensors", "pytorch_model.bin")


class UnreachableError(OSError):
    """The hub does not answer."""


def is_cached(repository: str) -> bool:
    """Return whether the weights of a model are in the cache of the hub's client.

    Args:
        repository: Name of the model on the hub, such as "timm/resnet18.a1_in1k".

    Returns:
        True also if the client is told to work offline: it then fails at once.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    cached = (try_to_load_from_cache(repository, name) for name in _FILES)
    return any(isinstance(path, str) and Path(path).is_file() for path in cached)


def check_reachable() -> None:
    """Check that the hub answers, with a retry.

    Raises:
        UnreachableError: If it does not answer within `TRIES` times `SECONDS`.
    """
    reason: str | None = None
    for _ in range(TRIES):
        reason = _try_to_reach(constants.ENDPOINT)
        if reason is None:
            return
    raise UnreachableError(f"{constants.ENDPOINT} does not answer: {reason}")


def _try_to_reach(url: str) -> str | None:
    """Return None if a server answers, whatever its answer is; else the reason. Proxies of the environment are used."""
    reasons: list[str | None] = []

    def request() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
                reasons.append(None)
        except (urllib.error.HTTPError, http.client.HTTPException):
            reasons.append(None)
        except (OSError, ValueError) as error:
            cause = getattr(error, "reason", error)
            is_answer = isinstance(cause, ssl.SSLError)  # the hub's client may know other certificates
            reasons.append(None if is_answer else str(cause) or type(cause).__name__)

    thread = threading.Thread(target=request, daemon=True)  # the look-up of a name has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    return reasons[0] if reasons else f"no answer in {SECONDS:g} s"
