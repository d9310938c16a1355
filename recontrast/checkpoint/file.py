"""Files of checkpoints: what they hold, how they are written, and how they are read and checked.

A file is an archive as `torch.save` writes it. Each tensor is protected twice: by the CRC-32 of the archive, which
files of all versions have, and by a checksum beside the fields, which finds a tensor that was changed and saved again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

import recontrast
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint.checksums import compute_checksum, iterate_tensors
from recontrast.checkpoint.fields import check_fields, find_not_finite, parse_calibration, parse_recipe
from recontrast.checkpoint.unpickle import ForeignPickleError, unpickle
from recontrast.data.archive import Archive, DamagedArchiveError
from recontrast.data.atomic import replace_file
from recontrast.data.regular_file import open_regular
from recontrast.data.system import IS_WINDOWS
from recontrast.recipes.describe import describe_value
from recontrast.recipes.recipe import Recipe

FORMAT = 1
"""Format version of the files, increased when a field is renamed, removed, or changes its meaning."""
_KEY = "recontrast_checkpoint"  # key of the format; no other file saved by PyTorch has it
_CHECKSUMS = "checksums"  # key of the CRC-32 of each tensor, by name; files of older versions lack it
_TENSOR_FIELDS = ("model", "optimisers", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        step: Number of optimiser steps done.
        category: Name of the category that the model was trained on.
        recipe: Recipe of the training.
        model_config: Constructor arguments of `ReContrast`, including the name of the backbone.
        preprocessing: Size and crop in pixels as (height, width), or None; mean and standard deviation of the channels.
        images: Description of the training images, see `recontrast.data.fingerprint.describe_images`.
        model: All weights by name, including those of the frozen encoder.
        optimisers: States of the optimisers; empty if the checkpoint is only for prediction.
        rng: States of the random generators and the position in the epoch; empty if only for prediction.
        version: Version of this package that wrote the file.
        calibration: Calibration of exactly these weights, or None.
    """

    step: int
    category: str
    recipe: Recipe
    model_config: dict[str, Any]
    preprocessing: dict[str, Any]
    images: dict[str, Any]
    model: dict[str, Tensor] = field(default_factory=dict, repr=False)
    optimisers: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rng: dict[str, Any] = field(default_factory=dict, repr=False)
    version: str = field(default_factory=lambda: recontrast.__version__)
    calibration: Calibration | None = None


def save(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Save a checkpoint to a file. The file is either complete or unchanged.

    Args:
        path: Path of the file to write or replace; its folder is created if necessary.
        checkpoint: Checkpoint with tensors on any device.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written. The message gives the bytes needed and the bytes free.
    """
    path = Path(path)
    with replace_file(path, size=_count_bytes(checkpoint.model) + _count_bytes(checkpoint.optimisers)) as file:
        write(file, checkpoint)
    return path


def write(file: IO[bytes], checkpoint: Checkpoint) -> None:
    """Write a checkpoint to an open file. `read` is the inverse.

    Args:
        file: Binary file, open for writing.
        checkpoint: Checkpoint with tensors on any device.
    """
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    tensors = [pair for name in _TENSOR_FIELDS for pair in iterate_tensors(content[name], name)]
    content["recipe"] = checkpoint.recipe.to_dict()
    content["calibration"] = None if checkpoint.calibration is None else checkpoint.calibration.to_dict()
    content[_CHECKSUMS] = {name: compute_checksum(tensor) for name, tensor in tensors}
    has_crc32 = get_crc32_options()
    set_crc32_options(True)  # without it, nothing would protect the fields that are not tensors
    try:
        torch.save({_KEY: FORMAT, **content}, file)
    finally:
        set_crc32_options(has_crc32)


def load(path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> Checkpoint:
    """Load a checkpoint from a file. `save` is the inverse.

    Args:
        path: Path of the checkpoint.
        device: Device of the tensors.
        mapped: Whether to map the file into memory, so that a tensor on the CPU is read when it is first used. The
            states of the optimisers are then left out. The file must not be changed in place while the checkpoint is in
            use; `save` replaces it instead.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of this package, has another format version, or is damaged, or if a
            field is invalid or a weight is not finite.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path}: wanted a checkpoint file, got a folder")
    with open_regular(path, "a checkpoint file") as file:
        return read(file, path, device, mapped=mapped)


def read(file: IO[bytes], path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> Checkpoint:
    """Read a checkpoint from an open file. `write` is the inverse.

    Args:
        file: Binary file, open for reading, at any position.
        path: Path of the file, for error messages.
        device: Device of the tensors.
        mapped: Whether to map the file into memory, see `load`.

    Returns:
        The checkpoint.

    Raises:
        ValueError: If the file is not a checkpoint of this package, has another format version, or is damaged, or if a
            field is invalid or a weight is not finite.
    """
    size = file.seek(0, 2)
    file.seek(0)
    if (start := file.read(4)) != b"PK\3\4"[: len(start)] or len(start) < 2:
        raise ValueError(f"{path}: wanted a recontrast checkpoint, got a file of another kind")
    try:
        mapped = mapped and not IS_WINDOWS  # which would then neither replace nor remove the file
        archive = Archive(cast(BinaryIO, file), mapped=mapped)
        content, sources = unpickle(archive, device, verify=not mapped)
        if not isinstance(content, dict) or _KEY not in content:
            raise ForeignPickleError("no checkpoint")
        if mapped and isinstance(content.get("optimisers"), list):
            content["optimisers"] = []
        values = _check_content(content)
        names = ("model",) if mapped else _TENSOR_FIELDS
        tensors = [pair for name in names for pair in iterate_tensors(values[name], name)]
        if mapped:
            archive.verify({sources[id(tensor)] for _, tensor in tensors})
        _check_checksums(content.get(_CHECKSUMS), tensors, archive, sources)
    except ForeignPickleError as error:
        raise ValueError(f"{path}: wanted a recontrast checkpoint, got a PyTorch file with other content") from error
    except DamagedArchiveError as error:
        raise ValueError(f"{path}: the checkpoint is cut off or damaged ({size:,} bytes): {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (name := find_not_finite(values["model"])) is not None:
        raise ValueError(f"{path}: wanted finite weights, got NaN or infinity in {name}")
    return Checkpoint(**values)


def _check_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a checkpoint, checked, with recipe and calibration as objects."""
    if type(file_format := content[_KEY]) is not int or file_format != FORMAT:
        version = describe_value(content.get("version", "of unknown version")).strip("'")
        raise ValueError(
            f"wanted a checkpoint of format {FORMAT}, got format {describe_value(file_format)}, written by recontrast "
            f"{version}"
        )
    values = {"calibration": None, **content}  # files of older versions lack it
    if missing := [f.name for f in fields(Checkpoint) if f.name not in values]:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
    check_fields(values)
    values["recipe"] = parse_recipe(values["recipe"])
    values["calibration"] = parse_calibration(values["calibration"])
    return {f.name: values[f.name] for f in fields(Checkpoint)}


def _check_checksums(
    checksums: Any, tensors: Iterable[tuple[str, Tensor]], archive: Archive, sources: Mapping[int, str]
) -> None:
    """Raise DamagedArchiveError if a tensor differs from its checksum; files of older versions have no checksums.

    Args:
        checksums: Stored CRC-32 of each tensor, by name; None if the file has none.
        tensors: Names and tensors, whose members of the archive were verified.
        archive: Archive of the tensors.
        sources: Name of the member of each tensor, by the ``id`` of the tensor.
    """
    if checksums is None:
        return
    if not isinstance(checksums, dict):
        raise DamagedArchiveError("its checksums are missing")
    for name, tensor in tensors:
        member = archive.members[sources[id(tensor)]]
        # The verified checksum of the member, if the tensor is all of it, saves reading the bytes again.
        actual = member.crc32 if member.size == tensor.nbytes else compute_checksum(tensor)
        if checksums.get(name) != actual:
            raise DamagedArchiveError(f"{name} differs from its checksum")


def _count_bytes(value: Any) -> int:
    """Count the bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0
