"""Position embeddings and prefix tokens in weight files of vision transformers."""

import math
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

_PREFIX_TOKENS = ("cls_token", "reg_token", "dist_token")


def fit_position_embeddings(state: dict[str, Tensor], extractor: Any, name: str, source: str) -> dict[str, Tensor]:
    """Resample the position embeddings of a weight file to the grid of a vision transformer.

    The method is that of timm's models (`checkpoint_filter_fn` of timm.models.vision_transformer): bicubic, with
    antialiasing. A file without position embeddings, or with those of the model's grid, is not changed.

    Args:
        state: Tensors of the file by name.
        extractor: timm model, vision transformer or not.
        name: Name of the backbone, for the message.
        source: Name of the file, for the message.

    Returns:
        The tensors, with resampled position embeddings.

    Raises:
        ValueError: If class or register tokens differ in number, or the position embeddings are not those of a square
            grid with as many prefix tokens.
    """
    if not hasattr(extractor, "num_prefix_tokens"):
        return state
    for key in _PREFIX_TOKENS:
        own, given = getattr(extractor, key, None), state.get(key)
        shapes = [None if t is None else tuple(t.shape) for t in (own, given)]
        if shapes[0] != shapes[1]:
            wanted, got = ("none" if shape is None else f"one of shape {shape}" for shape in shapes)
            raise ValueError(f"weights {source}: {key}: wanted {wanted} for backbone {name!r}, got {got}")
    target, given = getattr(extractor, "pos_embed", None), state.get("pos_embed")
    if target is None or given is None or given.shape == target.shape:
        return state
    prefix = 0 if extractor.no_embed_class else extractor.num_prefix_tokens
    side = math.isqrt(max(given.shape[1] - prefix, 0)) if given.ndim == 3 else 0
    if side == 0 or given.shape[0] != 1 or given.shape[2] != target.shape[2] or side**2 != given.shape[1] - prefix:
        wanted = f"pos_embed of shape {tuple(target.shape)} or of another square grid for backbone {name!r}"
        raise ValueError(f"weights {source}: wanted {wanted}, got one of shape {tuple(given.shape)}")
    grid = list(extractor.patch_embed.grid_size)
    return {**state, "pos_embed": resample_abs_pos_embed(given, grid, [side, side], num_prefix_tokens=prefix)}
