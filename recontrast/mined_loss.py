"""Operators ``mined_loss`` and ``mined_loss_inside``: schemas, checks, shape rules and gradients.

The first takes all points, the second those inside a region of interest. `recontrast.ops` registers their kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recontrast.op_checks import dtype_name, refuse_gradient
from recontrast.reference import RULES

SCHEMAS = {
    "mined_loss": "(Tensor sums, int[] images, int[] points, str rule, float parameter, Tensor? alpha, float factor)"
    " -> (Tensor, Tensor)",
    "mined_loss_backward": "(Tensor grad, Tensor sums, Tensor state, int[] images, int[] points, str rule,"
    " float parameter, float factor) -> Tensor",
    "mined_loss_inside": "(Tensor sums, Tensor inside, bool shared, int[] images, int[] points, str rule,"
    " float parameter, Tensor? alpha, float factor) -> (Tensor, Tensor)",
    "mined_loss_inside_backward": "(Tensor grad, Tensor sums, Tensor inside, bool shared, Tensor state, int[] images,"
    " int[] points, str rule, float parameter, float factor) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"recontrast::{_name}", _schema)


def check_rule(op: str, rule: str, alpha: Tensor | None) -> None:
    """Raise ValueError unless a mining rule is one that the kernels know, and its alpha one number.

    Args:
        op: Name of the operator.
        rule: One of `RULES`.
        alpha: Tensor with one number, floating point, or None.

    Raises:
        ValueError: If it is not.
    """
    if rule not in RULES:
        raise ValueError(f"{op}: rule: wanted one of {', '.join(RULES)}, got {rule!r}")
    if alpha is not None and not (alpha.is_floating_point() and alpha.numel() == 1):
        got = f"{dtype_name(alpha.dtype)} {tuple(alpha.shape)}"
        raise ValueError(f"{op}: alpha: wanted one floating-point number, got {got}")


def mined_loss(
    sums: Tensor,
    shapes: Sequence[tuple[int, ...]],
    rule: str,
    parameter: float,
    alpha: Tensor | None,
    factor: float,
    inside: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute `reference.mined_loss` from the sums of all pairs, or with ``inside`` `reference.mined_loss_inside`.

    Args:
        sums: Result of `recontrast.ops.cosine_sums_group`, flat.
        shapes: Shape (N_i, C_i, H_i, W_i) of the features of each pair.
        rule: One of `RULES`.
        parameter: Alpha of "deviation", fraction of "hardest", or exponent of "power".
        alpha: Tensor with one number, floating point; it replaces ``parameter`` in "deviation".
        factor: Weight of the easy points.
        inside: Mask of each pair, see `flatten_inside`. None: all points are inside.

    Returns:
        Scalar, in the dtype of ``sums``.

    Raises:
        ValueError: If the masks do not match.
    """
    if alpha is not None and alpha.dtype not in (torch.float32, torch.float64):  # the dtypes that the kernels read
        alpha = alpha.float()
    images, points = [shape[0] for shape in shapes], [shape[2] * shape[3] for shape in shapes]
    operators = torch.ops.recontrast
    if inside is None:
        return operators.mined_loss(sums, images, points, rule, parameter, alpha, factor)[0]
    flat, shared = flatten_inside("mined_cosine", inside, shapes, sums.device)
    return operators.mined_loss_inside(sums, flat, shared, images, points, rule, parameter, alpha, factor)[0]


def flatten_inside(
    op: str, inside: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Tensor, bool]:
    """Join the masks of all pairs, as `reference.mined_loss_inside` takes them.

    Args:
        op: Name of the operator, for error messages.
        inside: Mask of each pair, (N_i, H_i, W_i), or (1, H_i, W_i) for all its images, bool.
        shapes: Shape (N_i, C_i, H_i, W_i) of the features of each pair.
        device: Device of the features.

    Returns:
        Flat mask, and whether the images of each pair share their points.

    Raises:
        ValueError: If shapes, dtypes or devices do not match.
    """
    if len(inside) != len(shapes):
        raise ValueError(f"{op}: inside: wanted one mask for each of {len(shapes)} pairs, got {len(inside)}")
    for mask, (n, _, h, w) in zip(inside, shapes, strict=True):
        if mask.dtype != torch.bool or mask.device != device or tuple(mask.shape) not in ((n, h, w), (1, h, w)):
            wanted = f"bool {(n, h, w)} or {(1, h, w)} on {device}"
            got = f"{dtype_name(mask.dtype)} {tuple(mask.shape)} on {mask.device}"
            raise ValueError(f"{op}: inside: wanted {wanted}, got {got}")
    shared = all(mask.shape[0] == 1 for mask in inside)
    masks = inside if shared else [m.expand(shape[0], -1, -1) for m, shape in zip(inside, shapes, strict=True)]
    return torch.cat([mask.reshape(-1) for mask in masks]), shared


@torch.library.register_fake("recontrast::mined_loss")
def _(sums, images, points, rule, parameter, alpha, factor):
    return sums.new_empty(()), sums.new_empty(len(images) + 3 * sum(images))


@torch.library.register_fake("recontrast::mined_loss_backward")
def _(grad, sums, state, images, points, rule, parameter, factor):
    return torch.empty_like(sums)


@torch.library.register_fake("recontrast::mined_loss_inside")
def _(sums, inside, shared, images, points, rule, parameter, alpha, factor):
    return sums.new_empty(()), sums.new_empty(len(images) + 3 * sum(images))


@torch.library.register_fake("recontrast::mined_loss_inside_backward")
def _(grad, sums, inside, shared, state, images, points, rule, parameter, factor):
    return torch.empty_like(sums)


def _setup_mined(ctx, inputs, output):
    sums, ctx.images, ctx.points, ctx.rule, ctx.parameter, _, ctx.factor = inputs
    ctx.save_for_backward(sums, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_mined(ctx, grad, _):
    sums, state = ctx.saved_tensors
    arguments = ctx.images, ctx.points, ctx.rule, ctx.parameter, ctx.factor
    grad_sums = torch.ops.recontrast.mined_loss_backward(grad, sums, state, *arguments)
    return grad_sums, None, None, None, None, None, None


def _setup_mined_inside(ctx, inputs, output):
    sums, inside, ctx.shared, ctx.images, ctx.points, ctx.rule, ctx.parameter, _, ctx.factor = inputs
    ctx.save_for_backward(sums, inside, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_mined_inside(ctx, grad, _):
    sums, inside, state = ctx.saved_tensors
    arguments = ctx.images, ctx.points, ctx.rule, ctx.parameter, ctx.factor
    backward = torch.ops.recontrast.mined_loss_inside_backward
    grad_sums = backward(grad, sums, inside, ctx.shared, state, *arguments)
    return grad_sums, None, None, None, None, None, None, None, None


for _operator in ("mined_loss_backward", "mined_loss_inside_backward"):
    refuse_gradient(_operator, "the losses can be differentiated once, not twice")
torch.library.register_autograd("recontrast::mined_loss", _backward_mined, setup_context=_setup_mined)
torch.library.register_autograd(
    "recontrast::mined_loss_inside", _backward_mined_inside, setup_context=_setup_mined_inside
)
