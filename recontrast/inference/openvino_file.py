"""OpenVINO files, checked before OpenVINO reads them: the network as XML, with its weights in a .bin file beside it."""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from recontrast.data.exact_read import read_exactly
from recontrast.data.regular_file import open_regular, read_bytes
from recontrast.inference.file_checks import (
    CHECKSUM_KEY,
    KEY,
    ForeignFileError,
    check_checksum,
    parse_description,
)

WEIGHTS_KEY = "recontrast_weights"  # metadata key of the SHA-256 of the .bin file
CHECKSUM_PREFIX = f'<{CHECKSUM_KEY} value="'.encode()
LARGEST_XML = 2**28  # bytes
_WITH_BODY = ("body", "then_body", "else_body", "port_map", "back_edges")  # parts of loops and branches


def read_openvino(path: Path) -> tuple[bytes, NDArray[np.uint8], dict[str, Any]]:
    """Read an OpenVINO file that `recontrast export` wrote.

    Args:
        path: Path of the .xml file.

    Returns:
        The content of the .xml file, that of the .bin file, (bytes,) uint8, and the description. Both are in memory:
        nothing that happens to the files changes a network that runs, and Windows replaces them meanwhile.

    Raises:
        ForeignFileError: If the file has no valid description, or has operators of extensions, loops or branches.
        ValueError: If a file is damaged, or the .bin file holds other weights than those that were exported.
        OSError: If a file cannot be read.
    """
    content = read_bytes(path, "an OpenVINO network", LARGEST_XML)
    metadata, reason = _scan(content)
    description = parse_description(path, metadata.get(KEY))
    check_checksum(content, CHECKSUM_PREFIX, description)
    if reason is not None:
        raise ForeignFileError(f"{path}: wanted a file that recontrast export wrote, got one with {reason}")
    weights_path = path.with_suffix(".bin")
    with open_regular(weights_path, "the weights of an OpenVINO network") as file:
        size = file.seek(0, 2)
        weights = np.frombuffer(read_exactly(file, size, 0), np.uint8) if size else np.zeros(0, np.uint8)
    if hashlib.sha256(weights.data).hexdigest() != metadata.get(WEIGHTS_KEY):
        raise ValueError(f"{weights_path} holds other weights than it was exported with")
    return content, weights, description


def get_core() -> Any:
    """Return the ``openvino.Core`` of this process, which is kept until the process ends.

    Each core replaces the alternate signal stack of its thread, and at its end brings back the one that it found. If
    cores end in another order than the reverse of their beginnings, that one may belong to a core that has ended: the
    next signal, a Ctrl-C or SIGTERM, then crashes the process (openvinotoolkit/openvino, pull request 11894).

    Raises:
        ImportError: If OpenVINO is not installed.
    """
    return _create_core(os.getpid())


@functools.cache
def _create_core(process: int) -> Any:
    """Create a core for a process; a fork needs one of its own, because the threads of the first one have gone."""
    import openvino

    return openvino.Core()


def _scan(content: bytes) -> tuple[dict[str, str], str | None]:
    """Return the metadata of a network, and what it holds that `recontrast export` never writes."""
    metadata: dict[str, str] = {}
    reasons: list[str] = []
    open_elements: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if open_elements == ["net", "rt_info"] and "value" in attributes:
            metadata[name] = attributes["value"]
        if not open_elements and name != "net":
            reasons.append(f"the element {name[:40]!r}")
        if name == "layer" and not re.fullmatch(r"opset\d+", attributes.get("version", "")):
            reasons.append(f"operators of the set {attributes.get('version', '')[:40]!r}")
        if name in _WITH_BODY:
            reasons.append("loops or branches")
        open_elements.append(name)

    def end(name: str) -> None:
        open_elements.pop()

    def refuse(*_: Any) -> None:
        raise ValueError("a document type")  # stops the parser before an entity is expanded

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as error:
        raise ValueError(f"the file is cut off or damaged ({error})") from error
    return metadata, reasons[0] if reasons else None
