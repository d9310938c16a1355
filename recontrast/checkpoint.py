"""Checkpoints: one file from which training goes on, or prediction starts, with nothing else at hand.

The reference saves none. A file is written beside its name and renamed when it is complete and on the disk, so that
a run killed at any moment leaves the last whole one. It is read with ``weights_only=True``: no code in it runs.
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
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model, resolve_device

FORMAT = 1  # raised when a field is renamed, removed, or changes its meaning
_KEY = "recontrast_checkpoint"  # under it the format: tells our files from any other that torch saved


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        step: optimiser steps done.
        category: what it was trained on.
        recipe: that it was trained with.
        model_config: constructor arguments of `ReContrast`, the backbone's name among them.
        preprocessing: size and crop in pixels as (height, width) or none; mean and std of the three channels.
        images: of training: how many, and the digest of their pixels.
        model: all weights by name, the frozen encoder's too.
        optimisers: their states; empty where only prediction follows.
        rng: states of random generators, and the place in the epoch; empty likewise.
        version: of the package that wrote it.
        calibration: of these very weights, or None.
    """

    step: int  # optimiser steps done
    category: str  # what it was trained on
    recipe: Recipe
    model_config: dict[str, Any]  # constructor arguments of `ReContrast`, the backbone's name among them
    preprocessing: dict[str, Any]  # size and crop as (height, width) or none; mean and std of the three channels
    images: dict[str, Any]  # of training: see `recontrast.data.fingerprint.describe_images`
    model: dict[str, Tensor] = field(default_factory=dict, repr=False)  # all weights, the frozen encoder's too
    optimisers: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rng: dict[str, Any] = field(default_factory=dict, repr=False)  # states of random generators, place in the epoch
    version: str = field(default_factory=lambda: recontrast.__version__)  # of the package that wrote it
    calibration: Calibration | None = None  # of these very weights


def save(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` to ``path``, whole or not at all.

    Args:
        path: file to write or to replace; its folder is made if need be.
        checkpoint: tensors may be on any device.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written, with the bytes wanted and the bytes free; a former file stays.
    """
    path = Path(path)
    with replace_file(path, size=_bytes(checkpoint.model) + _bytes(checkpoint.optimisers)) as file:
        write(file, checkpoint)
    return path


def write(file: IO[bytes], checkpoint: Checkpoint) -> None:
    """Write a checkpoint where `read` can read it.

    Args:
        file: open for writing bytes.
        checkpoint: tensors may be on any device.
    """
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content["recipe"] = checkpoint.recipe.to_dict()
    content["calibration"] = None if checkpoint.calibration is None else checkpoint.calibration.to_dict()
    torch.save({_KEY: FORMAT, **content}, file)


def load(path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> Checkpoint:
    """Read what `save` wrote.

    Args:
        path: checkpoint file.
        device: where its tensors go.
        mapped: leave them on the CPU, each read from the file when it is used. Not for a file that is written in place
            and not replaced.

    Returns:
        All that the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, of another format, cut off or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: wanted a checkpoint file, there is {'a folder' if path.is_dir() else 'none'}")
    with path.open("rb") as file:
        return read(file, path, device, mapped=mapped)


def read(file: IO[bytes], path: str | Path, device: str | torch.device = "cpu", *, mapped: bool = False) -> Checkpoint:
    """Read what `write` wrote.

    Args:
        file: open for reading bytes, at any place.
        path: what errors name, and the file where it is ``mapped``.
        device: where its tensors go.
        mapped: as in `load`.

    Returns:
        All that the file holds.

    Raises:
        ValueError: it is none of ours, of another format, cut off or damaged.
    """
    size = file.seek(0, 2)
    damaged = f"{path}: the checkpoint is cut off or damaged ({size:,} bytes)"
    whole = zipfile.is_zipfile(file)  # torch.save writes zip archives; anything else would reach a pickle reader
    file.seek(0)
    if not whole:
        raise ValueError(
            damaged if file.read(2) == b"PK" else f"{path}: wanted a recontrast checkpoint, got a file of another kind"
        )
    try:
        content = torch.load(str(path) if mapped else file, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: wanted a recontrast checkpoint, got a file that holds other things") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(damaged) from error
    if not isinstance(content, dict) or _KEY not in content:
        raise ValueError(f"{path}: wanted a recontrast checkpoint, got a file that holds other things")
    if (found := content.pop(_KEY)) != FORMAT:
        raise ValueError(
            f"{path}: wanted a checkpoint of format {FORMAT}, got format {found}, "
            f"written by recontrast {content.get('version', 'of unknown version')}"
        )
    content.setdefault("calibration", None)  # files of before there was one
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
    """The model that a checkpoint holds.

    Args:
        checkpoint: with its weights.
        path: what errors name.

    Returns:
        The model on the CPU, in training mode.

    Raises:
        ValueError: this version cannot build it, or the weights do not fit.
    """
    model = _made(checkpoint, path)
    restore(model, checkpoint, path)
    return model


def _made(checkpoint: Checkpoint, path: str | Path) -> ReContrast:
    """Of random weights."""
    try:
        return ReContrast(**{**checkpoint.model_config, "weights": "random"})
    except TypeError as error:
        raise ValueError(
            f"{path}: wanted a model that recontrast {recontrast.__version__} can build, got one of "
            f"{checkpoint.version} ({error})"
        ) from error


def _taken(checkpoint: Checkpoint, path: str | Path) -> ReContrast:
    """As `build`, of the tensors of a mapped ``checkpoint``: no weights are drawn, and none are in memory twice."""
    with torch.device("meta"):
        model = _made(checkpoint, path)
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    # A copy each, no view of the file: somebody may write into it while the model is in use.
    weights = {name: value.to(kinds.get(name, value.dtype), copy=True) for name, value in checkpoint.model.items()}
    restore(model, replace(checkpoint, model=weights), path, assign=True)
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):  # a buffer that no state holds
        return build(replace(checkpoint, model=weights), path)
    return model


def write_calibration(path: str | Path, calibration: Calibration) -> Path:
    """Put a calibration into a checkpoint; all else stays, and so does the file if that fails.

    Args:
        path: checkpoint file, replaced.
        calibration: of its weights.

    Returns:
        The path.

    Raises:
        ValueError: no checkpoint, a damaged one, or a calibration of other weights.
        OSError: the file cannot be read or written.
    """
    found = replace(load(path), calibration=calibration)
    check_calibration(found, path)
    return save(path, found)


def check_calibration(checkpoint: Checkpoint, path: str | Path) -> None:
    """Refuse a calibration of other weights, or of another way to score.

    Args:
        checkpoint: with its weights.
        path: what the error names.

    Raises:
        ValueError: it has such a one.
    """
    wanted = checkpoint.calibration.weights if checkpoint.calibration is not None else None
    if wanted is not None and wanted != (got := digest(checkpoint.model, checkpoint.recipe)):
        raise ValueError(
            f"{path}: wanted a calibration of these weights and this recipe ({got[:12]}), got one of others "
            f"({wanted[:12]}): run recontrast calibrate {path} --good DIR"
        )


def restore(model: ReContrast, checkpoint: Checkpoint, path: str | Path, *, assign: bool = False) -> None:
    """Give a model the weights of a checkpoint, and its normalisation.

    Args:
        model: changed in place.
        checkpoint: with its weights.
        path: what the error names.
        assign: hand the tensors over; else they are copied.

    Raises:
        ValueError: the weights do not fit.
    """
    try:
        model.load_state_dict(checkpoint.model, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights do not fit the model that its configuration says: {reason}") from error
    model.mean, model.std = (tuple(checkpoint.preprocessing[name]) for name in ("mean", "std"))


def load_model(
    path: str | Path, device: str | torch.device | None = None, *, calibrated: bool = True
) -> tuple[ReContrast, Recipe, Checkpoint]:
    """A trained model ready to predict.

    Args:
        path: checkpoint file.
        device: where the model goes; None: the GPU where there is one.
        calibrated: False: leave out the calibration, whatever it is of.

    Returns:
        The model in eval mode, its recipe, and the rest of the checkpoint without its tensors.

    Raises:
        ValueError: the file is none of ours, is damaged, or holds a calibration of other weights; no such device.
        FileNotFoundError: there is no such file.
    """
    where = resolve_device(device)
    checkpoint = load(path, mapped=True)  # states of optimisers are not read at all
    if calibrated:
        check_calibration(checkpoint, path)
    else:
        checkpoint = replace(checkpoint, calibration=None)
    model = _taken(checkpoint, path)
    move_model(model, where, checkpoint.recipe.channels_last)
    return model.eval(), checkpoint.recipe, replace(checkpoint, model={}, optimisers=[], rng={})


def _bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts and lists: nearly all of a checkpoint."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


# What a score depends on besides the weights and the image: another value, other scores.
SCORE_FIELDS = ("size", "crop", "blur", "reduce", "score", "views", "tile")


def digest(weights: Mapping[str, Tensor], recipe: Recipe) -> str:
    """SHA-256 of all weights and of what of the recipe decides a score.

    Args:
        weights: tensors by name, of any shape and dtype, on any device.
        recipe: its fields `SCORE_FIELDS` count.

    Returns:
        64 hexadecimal digits.
    """
    values = recipe.to_dict()
    # Unset fields are left out: those that a later version adds with "off" as default change nothing.
    said = {key: values[key] for key in SCORE_FIELDS if values.get(key) is not None}
    total = hashlib.sha256(repr(sorted(said.items())).encode())
    for name, value in sorted(weights.items()):
        plain = value.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
