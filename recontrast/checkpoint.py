"""Checkpoints: a single file from which training resumes or prediction starts.

A checkpoint is first written to a temporary file and renamed once it is complete and on disk, so a run that is killed
leaves the last complete checkpoint. It is read with ``weights_only=True``, so no code in the file is executed. The
reference implementation saves no checkpoints.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import recontrast
from recontrast.calibration.conformal import Calibration
from recontrast.data.atomic import replace_file
from recontrast.data.locks import lock_checkpoint
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model, resolve_device

FORMAT = 1  # increased when a field is renamed, removed, or changes its meaning
_KEY = "recontrast_checkpoint"  # key of the format; no other file saved by PyTorch has it


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
    content["recipe"] = checkpoint.recipe.to_dict()
    content["calibration"] = None if checkpoint.calibration is None else checkpoint.calibration.to_dict()
    torch.save({_KEY: FORMAT, **content}, file)


def load(path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> Checkpoint:
    """Load a checkpoint from a file. `save` is the inverse.

    Args:
        path: Path of the checkpoint.
        device: Device of the tensors.
        mapped: Whether to map the file into memory, so that a tensor on the CPU is read when it is first used. The file
            must then not be changed in place while the checkpoint is in use; `save` replaces it instead.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of this package, has another format version, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: wanted a checkpoint file, got {'a folder' if path.is_dir() else 'no such file'}"
        )
    with path.open("rb") as file:
        return read(file, path, device, mapped=mapped)


def read(file: IO[bytes], path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> Checkpoint:
    """Read a checkpoint from an open file. `write` is the inverse.

    Args:
        file: Binary file, open for reading, at any position.
        path: Path of the file, for error messages and for mapping.
        device: Device of the tensors.
        mapped: Whether to map the file into memory, see `load`.

    Returns:
        The checkpoint.

    Raises:
        ValueError: If the file is not a checkpoint of this package, has another format version, or is damaged.
    """
    size = file.seek(0, 2)
    damaged = f"{path}: the checkpoint is cut off or damaged ({size:,} bytes)"
    is_archive = zipfile.is_zipfile(file)  # torch.save writes zip archives; torch.load would unpickle anything else
    file.seek(0)
    if not is_archive:
        raise ValueError(
            damaged if file.read(2) == b"PK" else f"{path}: wanted a recontrast checkpoint, got a file of another kind"
        )
    try:
        content = torch.load(str(path) if mapped else file, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: wanted a recontrast checkpoint, got a PyTorch file with other content") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(damaged) from error
    if not isinstance(content, dict) or _KEY not in content:
        raise ValueError(f"{path}: wanted a recontrast checkpoint, got a PyTorch file with other content")
    if (file_format := content.pop(_KEY)) != FORMAT:
        raise ValueError(
            f"{path}: wanted a checkpoint of format {FORMAT}, got format {file_format}, "
            f"written by recontrast {content.get('version', 'of unknown version')}"
        )
    content.setdefault("calibration", None)  # files of older versions lack it
    if missing := [f.name for f in fields(Checkpoint) if f.name not in content]:
        raise ValueError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    try:
        content["recipe"] = Recipe.from_dict(content["recipe"])
        if content["calibration"] is not None:
            content["calibration"] = Calibration.from_dict(content["calibration"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(**{f.name: content[f.name] for f in fields(Checkpoint)})


def build(checkpoint: Checkpoint, path: str | Path) -> ReContrast:
    """Build the model of a checkpoint.

    Args:
        checkpoint: Checkpoint with its weights.
        path: Path of the checkpoint, for error messages.

    Returns:
        The model on the CPU, in training mode.

    Raises:
        ValueError: If this version cannot build the model, or the weights do not fit.
    """
    model = _build_random(checkpoint, path)
    restore(model, checkpoint, path)
    return model


def _build_random(checkpoint: Checkpoint, path: str | Path) -> ReContrast:
    """Build the model of a checkpoint with random weights."""
    try:
        return ReContrast(**{**checkpoint.model_config, "weights": "random"})
    except TypeError as error:
        raise ValueError(
            f"{path}: wanted a model that recontrast {recontrast.__version__} can build, got one of "
            f"{checkpoint.version} ({error})"
        ) from error


def _build_from_mapped(checkpoint: Checkpoint, path: str | Path) -> ReContrast:
    """Build the model of a mapped checkpoint without initialising it and with its weights in memory only once."""
    with torch.device("meta"):
        model = _build_random(checkpoint, path)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    # Copies, because the file may change while the model is in use.
    weights = {name: value.to(dtypes.get(name, value.dtype), copy=True) for name, value in checkpoint.model.items()}
    restore(model, replace(checkpoint, model=weights), path, assign=True)
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):  # a buffer outside the state dict
        return build(replace(checkpoint, model=weights), path)
    return model


def write_calibration(path: str | Path, calibration: Calibration) -> Path:
    """Store a calibration in a checkpoint. On failure the file is unchanged.

    Args:
        path: Path of the checkpoint, which is replaced.
        calibration: Calibration of its weights.

    Returns:
        The path.

    Raises:
        ValueError: If the file is not a valid checkpoint, or the calibration belongs to other weights.
        OSError: If the file cannot be read or written.
    """
    with lock_checkpoint(path):
        checkpoint = replace(load(path), calibration=calibration)
        check_calibration(checkpoint, path)
        return save(path, checkpoint)


def check_calibration(checkpoint: Checkpoint, path: str | Path) -> None:
    """Raise an error if the calibration of a checkpoint belongs to other weights or another recipe.

    Args:
        checkpoint: Checkpoint with its weights.
        path: Path of the checkpoint, for the error message.

    Raises:
        ValueError: If the digest in the calibration differs from that of the weights and the recipe.
    """
    if checkpoint.calibration is None:
        return
    wanted, got = digest(checkpoint.model, checkpoint.recipe), checkpoint.calibration.weights
    if got != wanted:
        raise ValueError(
            f"{path}: wanted a calibration of these weights and this recipe ({wanted[:12]}), got one of others "
            f"({got[:12]}): run recontrast calibrate {path} --good DIR"
        )


def restore(model: ReContrast, checkpoint: Checkpoint, path: str | Path, *, assign: bool = False) -> None:
    """Load the weights and the normalisation of a checkpoint into a model.

    Args:
        model: Model, changed in place.
        checkpoint: Checkpoint with its weights.
        path: Path of the checkpoint, for the error message.
        assign: Whether the model takes over the tensors of the checkpoint instead of copying them.

    Raises:
        ValueError: If the weights do not fit.
    """
    try:
        model.load_state_dict(checkpoint.model, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights do not fit the model of its configuration: {reason}") from error
    model.mean, model.std = (tuple(checkpoint.preprocessing[name]) for name in ("mean", "std"))


def load_model(
    path: str | Path, device: str | torch.device | None = None, *, calibrated: bool = True
) -> tuple[ReContrast, Recipe, Checkpoint]:
    """Load a trained model for prediction.

    Args:
        path: Path of the checkpoint.
        device: Device of the model; None selects the GPU if there is one.
        calibrated: Whether to check and return the stored calibration. False leaves it out unchecked.

    Returns:
        The model in eval mode, its recipe, and the checkpoint without its tensors.

    Raises:
        ValueError: If the file is not a valid checkpoint, its calibration belongs to other weights, or there is no such
            device.
        FileNotFoundError: If there is no such file.
    """
    resolved = resolve_device(device)
    checkpoint = load(path, mapped=True)  # the optimiser states are never read from disk
    if calibrated:
        check_calibration(checkpoint, path)
    else:
        checkpoint = replace(checkpoint, calibration=None)
    model = _build_from_mapped(checkpoint, path)
    move_model(model, resolved, checkpoint.recipe.channels_last)
    return model.eval(), checkpoint.recipe, replace(checkpoint, model={}, optimisers=[], rng={})


def _count_bytes(value: Any) -> int:
    """Count the bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0


# Recipe fields that scores depend on, besides the weights and the image.
SCORE_FIELDS = ("bits", "size", "crop", "blur", "reduce", "score", "views", "tile")


def digest(weights: Mapping[str, Tensor], recipe: Recipe) -> str:
    """Compute the SHA-256 of everything that scores depend on: the weights and some fields of the recipe.

    Args:
        weights: Tensors by name, of any shape and dtype, on any device.
        recipe: Recipe, whose fields `SCORE_FIELDS` are included.

    Returns:
        64 hexadecimal digits.
    """
    values = recipe.to_dict()
    # Unset fields are left out, so that a field added by a later version does not change the digest while it is unset.
    fields_set = {key: values[key] for key in SCORE_FIELDS if values.get(key) is not None}
    sha256 = hashlib.sha256(repr(sorted(fields_set.items())).encode())
    for name, value in sorted(weights.items()):
        plain = value.detach().cpu().contiguous()
        sha256.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        sha256.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
