"""Models of checkpoints: built, restored, loaded for prediction, and calibrated."""

from dataclasses import replace
from pathlib import Path

import torch

import recontrast
from recontrast.architectures import get_architecture
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint.checksums import digest
from recontrast.checkpoint.fields import find_not_finite
from recontrast.checkpoint.file import Checkpoint, load, save
from recontrast.data.locks import lock_checkpoint
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model, resolve_device


def build(checkpoint: Checkpoint, path: str | Path) -> Network:
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


def _build_random(checkpoint: Checkpoint, path: str | Path) -> Network:
    """Build the model of a checkpoint with random weights."""
    try:
        network = get_architecture(checkpoint.recipe).network
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        return network(**{**checkpoint.model_config, "weights": "random"})
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{path}: wanted a model that recontrast {recontrast.__version__} can build, got one of "
            f"{checkpoint.version} ({reason})"
        ) from error


def _build_from_mapped(checkpoint: Checkpoint, path: str | Path) -> Network:
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


def restore(model: Network, checkpoint: Checkpoint, path: str | Path, *, assign: bool = False) -> None:
    """Load the weights and the normalisation of a checkpoint into a model.

    Args:
        model: Model, changed in place.
        checkpoint: Checkpoint with its weights.
        path: Path of the checkpoint, for the error message.
        assign: Whether the model takes over the tensors of the checkpoint instead of copying them.

    Raises:
        ValueError: If the weights do not fit, or one of them is not finite.
    """
    if (name := find_not_finite(checkpoint.model)) is not None:
        raise ValueError(f"{path}: wanted finite weights, got NaN or infinity in {name}")
    try:
        model.load_state_dict(checkpoint.model, assign=assign)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights do not fit the model of its configuration: {reason}") from error
    model.mean, model.std = (tuple(checkpoint.preprocessing[name]) for name in ("mean", "std"))


def load_model(
    path: str | Path, device: str | torch.device | None = None, *, calibrated: bool = True
) -> tuple[Network, Recipe, Checkpoint]:
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
