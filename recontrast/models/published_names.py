"""Tensor names in the weight files that the authors of a vision transformer publish, renamed to those of timm."""

import contextlib
import io
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

REGISTERS = ("register_tokens", "storage_tokens")  # DINOv2, DINOv3
# A file with one of these has other names than timm's: DINOv2 and MAE, DINOv3, CLIP, and CLIP around a model of timm.
MARKS = ("mask_token", *REGISTERS, "visual.class_embedding", "visual.trunk.patch_embed.proj.weight")
PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")


def rename_published(
    state: dict[str, Tensor], extractor: nn.Module, model: Any, name: str, source: str
) -> dict[str, Tensor]:
    """Rename the tensors of a file of the authors of DINOv2, DINOv3, CLIP or MAE, by timm's ``checkpoint_filter_fn``.

    Args:
        state: Tensors of the file by name.
        extractor: timm model that the weights are for.
        model: The whole model of timm, of which only names and shapes are read.
        name: Name of the backbone, for the message.
        source: Name of the file, for the message.

    Returns:
        The tensors by timm's names; files with timm's names, and files for models that are not transformers, unchanged.

    Raises:
        ValueError: If timm cannot convert the file, or if it has another patch size or number of register tokens, which
            timm would change without a word.
    """
    convert = getattr(sys.modules[type(extractor).__module__], "checkpoint_filter_fn", None)
    if convert is None or not hasattr(extractor, "num_prefix_tokens") or not any(mark in state for mark in MARKS):
        return state
    patches, registers = model.patch_embed.proj.weight, getattr(model, "reg_token", None)
    _check_shape(state, PATCHES, patches, "patch_embed.proj.weight", name, source)
    _check_shape(state, (*REGISTERS, "visual.trunk.reg_token"), registers, "reg_token", name, source)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what a model lacks
            return dict(convert(dict(state), model))
    except Exception as error:  # of many types, for tensors of other shapes than the names promise
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"weights {source}: wanted weights of backbone {name!r}, got a file that timm cannot convert: {reason}"
        ) from error


def _check_shape(
    state: Mapping[str, Tensor], keys: tuple[str, ...], own: Tensor | None, label: str, name: str, source: str
) -> None:
    """Raise ValueError if none of ``keys`` in a file has the shape of the model's own tensor."""
    given = next((state[key] for key in keys if key in state), None)
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (own, given)]
    if shapes[0] != shapes[1]:
        wanted, got = ("none" if shape is None else f"one of shape {shape}" for shape in shapes)
        raise ValueError(f"weights {source}: {label}: wanted {wanted} for backbone {name!r}, got {got}")
