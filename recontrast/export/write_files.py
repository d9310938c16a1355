"""Writing of exported files with their descriptions and checksums."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from recontrast.data.names import escape_bytes
from recontrast.export.openvino_graph import replace_argmin
from recontrast.inference import onnx_file, openvino_file
from recontrast.inference.file_checks import CHECKSUM_KEY, KEY, NO_CHECKSUM, compute_sha256, write_checksum


def write_onnx(model: Any, path: Path, description: str) -> None:
    """Write an ONNX model.

    Args:
        model: ``onnx.ModelProto``; its metadata is changed.
        path: Path of the file.
        description: Description as JSON.
    """
    for node in model.graph.node:  # where it was computed: paths of this machine, and a megabyte
        del node.metadata_props[:]
    others = [entry for entry in model.metadata_props if entry.key not in (KEY, CHECKSUM_KEY)]
    entries = {**{entry.key: entry.value for entry in others}, KEY: description, CHECKSUM_KEY: NO_CHECKSUM}
    del model.metadata_props[:]
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    write_checksum(path, onnx_file.CHECKSUM_PREFIX)


def write_openvino(model: Any, path: Path, description: str, *, half: bool = False) -> None:
    """Write an OpenVINO model as .xml and .bin file, which are tied to each other.

    Args:
        model: ``openvino.Model``; its metadata is changed.
        path: Path of the .xml file.
        description: Description as JSON.
        half: Whether weights are stored in float16; computations stay in float32.
    """
    import openvino

    model.set_rt_info(description, KEY)
    openvino.save_model(model, path, compress_to_fp16=half)
    model.set_rt_info(compute_sha256(path.with_suffix(".bin")), openvino_file.WEIGHTS_KEY)
    model.set_rt_info(NO_CHECKSUM, CHECKSUM_KEY)
    openvino.save_model(model, path, compress_to_fp16=half)
    write_checksum(path, openvino_file.CHECKSUM_PREFIX)


def write_pt2(program: torch.export.ExportedProgram, path: Path, description: str) -> None:
    """Write a program of `torch.export`; the archive has its own checksums.

    Args:
        program: Program.
        path: Path of the file.
        description: Description as JSON.
    """
    with ExitStack() as stack:  # PyTorch ends the process if it opens a path that is not UTF-8
        is_utf8 = str(path) == escape_bytes(str(path))
        target = path if is_utf8 else stack.enter_context(open(path, "wb"))
        torch.export.save(program, target, extra_files={f"{KEY}.json": description})


def write_onnx_model(model: Any, kind: str, path: Path, description: str, *, half: bool = False) -> None:
    """Write an ONNX model as a file for ONNX Runtime or OpenVINO.

    Args:
        model: ``onnx.ModelProto``.
        kind: Format, "onnx" or "openvino".
        path: Path of the file.
        description: Description as JSON.
        half: Whether the weights of an OpenVINO file are stored in float16.
    """
    if kind == "onnx":
        write_onnx(model, path, description)
        return
    # `openvino.convert_model` would do the same, but reports each call over the network, and waits for it.
    converted = openvino_file.get_core().read_model(model.SerializeToString())
    replace_argmin(converted)
    write_openvino(converted, path, description, half=half)
