"""Operators ``torch.ops.recontrast.*``: schemas, shape rules, gradients and dispatch.

All kernels are registered with PyTorch here. `recontrast.backend` selects the kernel of each device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recontrast import backend, reference
from recontrast import mined_loss as mined_loss_op
from recontrast import norm_act as norm_act_op
from recontrast.backend import BACKEND, WHY
from recontrast.norm_act import norm_act
from recontrast.op_checks import DTYPES, check_features, dtype_name, refuse_forward_mode, refuse_gradient
from recontrast.reference import (
    ACTIVATIONS,
    EPS,
    compute_maximum,
    cosine,
    group_dtype,
    sum_dtype,
    void_unless_finite,
)

__all__ = [
    "ACTIVATIONS",
    "BACKEND",
    "DTYPES",
    "EPS",
    "WHY",
    "anomaly_map",
    "anomaly_map_inside",
    "compute_maximum",
    "cosine",
    "cosine_sums",
    "cosine_sums_group",
    "has_kernel",
    "mined_cosine",
    "norm_act",
    "void_unless_finite",
]

SCHEMAS = {
    "cosine_sums": "(Tensor x, Tensor y) -> Tensor",
    "cosine_sums_backward": "(Tensor grad, Tensor x, Tensor y) -> Tensor",
    "cosine_sums_group": "(Tensor[] x, Tensor[] y) -> Tensor",
    "cosine_sums_group_backward": "(Tensor grad, Tensor[] x, Tensor[] y) -> Tensor[]",
    "anomaly_map": "(Tensor[] distances, Tensor[] rows, Tensor[] cols, float scale) -> (Tensor, Tensor)",
    "anomaly_map_inside": "(Tensor[] distances, Tensor[] rows, Tensor[] cols, Tensor[] factors, float scale)"
    " -> (Tensor, Tensor)",
    **mined_loss_op.SCHEMAS,
    **norm_act_op.SCHEMAS,
}
KERNEL_MODULES = {  # operator -> module of recontrast.kernels that implements it
    "cosine_sums": "cosine_sums",
    "cosine_sums_backward": "cosine_sums",
    "cosine_sums_group": "cosine_sums",
    "cosine_sums_group_backward": "cosine_sums",
    "mined_loss": "mined_loss",
    "mined_loss_backward": "mined_loss",
    "mined_loss_inside": "mined_loss",
    "mined_loss_inside_backward": "mined_loss",
    "anomaly_map": "anomaly_map",
    "anomaly_map_inside": "anomaly_map",
    "norm_act": "norm_act",
    "norm_act_backward": "norm_act",
}
for _name, _schema in SCHEMAS.items():
    if _name not in (*mined_loss_op.SCHEMAS, *norm_act_op.SCHEMAS):
        torch.library.define(f"recontrast::{_name}", _schema)


def cosine_sums(x: Tensor, y: Tensor) -> Tensor:
    """Compute `reference.cosine_sums` in one pass over the features; differentiable in both.

    Args:
        x: Features (N, C, H, W), floating point, any strides.
        y: Features (N, C, H, W), floating point, any strides. The dtype can differ from that of ``x`` (autocast).

    Returns:
        Sums (3, N, H, W): <x, y>, <x, x> and <y, y> over the C channels, float32 (float64 if one of the inputs is).

    Raises:
        ValueError: If the shapes, devices or dtypes do not match.
        RuntimeError: In forward-mode differentiation.
    """
    check_features("cosine_sums", x, y)
    return torch.ops.recontrast.cosine_sums(x, y)


def cosine_sums_group(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Compute `reference.cosine_sums_group`, the sums of many pairs in one call; differentiable in all inputs.

    Args:
        x: Features of each pair, (N_i, C_i, H_i, W_i), floating point, any strides.
        y: Features of each pair, in the shapes of ``x``.

    Returns:
        Flat tensor with the (3, N_i, H_i, W_i) sums of each pair in turn, float32 (float64 if one of the inputs is).

    Raises:
        ValueError: If the lists differ in length, or the shapes, devices or dtypes do not match.
        RuntimeError: In forward-mode differentiation.
    """
    if not 0 < len(x) == len(y):
        raise ValueError(f"cosine_sums_group: x and y: wanted lists of one length > 0, got {len(x)} and {len(y)}")
    for a, b in zip(x, y, strict=True):
        check_features("cosine_sums_group", a, b)
        if a.device != x[0].device:
            raise ValueError(f"cosine_sums_group: x and y: wanted all pairs on {x[0].device}, got one on {a.device}")
    return torch.ops.recontrast.cosine_sums_group(list(x), list(y))


def mined_cosine(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    rule: str,
    parameter: float,
    alpha: Tensor | None = None,
    factor: float = 0.0,
    inside: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute `reference.mined_loss` of pairs of features; forward and backward each read the features once.

    With ``inside``, it computes `reference.mined_loss_inside`.

    Args:
        x: Features of each pair, (N_i, C_i, H_i, W_i), floating point.
        y: Features of each pair, in the shapes of ``x``.
        rule: One of `recontrast.reference.RULES`.
        parameter: Alpha of "deviation", fraction of "hardest", or exponent of "power".
        alpha: Tensor with one number, floating point, on the features' device. It replaces ``parameter`` in
            "deviation".
        factor: Weight of the easy points.
        inside: Whether each point is inside the region of interest: for each pair (N_i, H_i, W_i), or (1, H_i, W_i) for
            all its images, bool, on the features' device. None: all points are.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: If the rule is unknown, the features do not match, ``alpha`` is not one floating-point number, or
            the masks do not match.
        RuntimeError: In forward-mode differentiation.
    """
    mined_loss_op.check_rule("mined_cosine", rule, alpha)
    sums = cosine_sums_group(x, y)
    return mined_loss_op.mined_loss(sums, [tuple(t.shape) for t in y], rule, parameter, alpha, factor, inside)


def has_kernel(op: str, device: torch.device) -> bool:
    """Return whether an operator has a kernel of its own on a device.

    Without one it runs its oracle: there is none where PyTorch is the backend, or the library is older than the
    operator.

    Args:
        op: Name of an operator in ``torch.ops.recontrast``.
        device: Device of the tensors.

    Returns:
        Whether a native or Triton kernel is registered.
    """
    return (op, device.type) in _KERNELS


def anomaly_map(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute `reference.anomaly_map` in one pass, without a map per pair; not differentiable.

    Args:
        distances: Point distances of each pair, (N, h_i, w_i), float32.
        rows: Upsample-and-blur matrix of the vertical axis for each pair, (H, h_i), float32. Kernels rely on it being
            banded.
        cols: Upsample-and-blur matrix of the horizontal axis for each pair, (W, w_i), float32. Pairs with the same
            matrices (the same tensors) are added up first.
        scale: Factor on the sum.

    Returns:
        maps: Anomaly maps (N, H, W), float32.
        maximum: Largest value of each map, (N,), float32; NaN if a value of the map is NaN or infinite.

    Raises:
        ValueError: If the lists differ in length, or the shapes or dtypes do not match.
        RuntimeError: In forward-mode differentiation.
    """
    _check_map_arguments("anomaly_map", distances, rows, cols)
    return torch.ops.recontrast.anomaly_map(list(distances), list(rows), list(cols), scale)


def anomaly_map_inside(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], factors: Sequence[Tensor],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `reference.anomaly_map_inside`, the map in a region of interest, in one pass; not differentiable.

    Args:
        distances: Point distances of each pair, (N, h_i, w_i), float32; 0 outside.
        rows: Matrix of the vertical axis for each pair, (H, h_i), float32, see `anomaly_map`.
        cols: Matrix of the horizontal axis for each pair, (W, w_i), float32.
        factors: Factors of the pixels for each pair, (N, H, W) or (1, H, W), float32, all of one shape. A pixel whose
            first factor is 0 is outside.
        scale: Factor on the sum.

    Returns:
        maps: Anomaly maps (N, H, W), float32, 0 outside.
        maximum: Largest value inside of each map, (N,), float32; NaN if a value inside is NaN or infinite.

    Raises:
        ValueError: If the lists differ in length, or the shapes or dtypes do not match.
        RuntimeError: In forward-mode differentiation.
    """
    _check_map_arguments("anomaly_map_inside", distances, rows, cols)
    shape = (distances[0].shape[0], rows[0].shape[0], cols[0].shape[0])
    if len(factors) != len(distances):
        raise ValueError(f"anomaly_map_inside: factors: wanted {len(distances)}, one for each pair, got {len(factors)}")
    for i, factor in enumerate(factors):
        fits = factor.shape == factors[0].shape and tuple(factor.shape) in (shape, (1, *shape[1:]))
        if not fits or factor.dtype != torch.float32:
            wanted = f"float32 {shape} or {(1, *shape[1:])}, as the others"
            got = f"{dtype_name(factor.dtype)} {tuple(factor.shape)}"
            raise ValueError(f"anomaly_map_inside: factors[{i}]: wanted {wanted}, got {got}")
    return torch.ops.recontrast.anomaly_map_inside(list(distances), list(rows), list(cols), list(factors), scale)


def _check_map_arguments(op: str, distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor]) -> None:
    """Raise ValueError if the pairs of an anomaly map do not fit each other."""
    if not 0 < len(distances) == len(rows) == len(cols):
        lengths = f"{len(distances)}, {len(rows)} and {len(cols)}"
        raise ValueError(f"{op}: distances, rows and cols: wanted lists of one length > 0, got {lengths}")
    out = (rows[0].shape[0], cols[0].shape[0])
    for i, (d, r, c) in enumerate(zip(distances, rows, cols, strict=True)):
        if d.dim() != 3 or d.shape[0] != distances[0].shape[0]:
            wanted = f"({distances[0].shape[0]}, h, w)"
            raise ValueError(f"{op}: distances[{i}]: wanted {wanted}, got {tuple(d.shape)}")
        if r.shape != (out[0], d.shape[1]) or c.shape != (out[1], d.shape[2]):
            wanted = f"({out[0]}, {d.shape[1]}) and ({out[1]}, {d.shape[2]})"
            got = f"{tuple(r.shape)} and {tuple(c.shape)}"
            raise ValueError(f"{op}: rows[{i}] and cols[{i}]: wanted {wanted}, got {got}")
        if any(t.dtype != torch.float32 for t in (d, r, c)):
            dtypes = f"{dtype_name(d.dtype)}, {dtype_name(r.dtype)} and {dtype_name(c.dtype)}"
            raise ValueError(f"{op}: pair {i}: wanted float32, got {dtypes}")
    refuse_forward_mode(op, *distances)


# ---- shapes (torch.compile, torch.export) -----------------------------------


@torch.library.register_fake("recontrast::cosine_sums")
def _(x, y):
    n, _, h, w = x.shape
    return x.new_empty(3, n, h, w, dtype=sum_dtype(x, y))


@torch.library.register_fake("recontrast::cosine_sums_backward")
def _(grad, x, y):
    return torch.empty_like(y)


@torch.library.register_fake("recontrast::cosine_sums_group")
def _(x, y):
    return x[0].new_empty(sum(3 * t.shape[0] * t.shape[2] * t.shape[3] for t in x), dtype=group_dtype(x, y))


@torch.library.register_fake("recontrast::cosine_sums_group_backward")
def _(grad, x, y):
    return [torch.empty_like(t) for t in y]


@torch.library.register_fake("recontrast::anomaly_map_inside")
def _(distances, rows, cols, factors, scale):
    n = distances[0].shape[0]
    return rows[0].new_empty(n, rows[0].shape[0], cols[0].shape[0]), rows[0].new_empty(n)


@torch.library.register_fake("recontrast::anomaly_map")
def _(distances, rows, cols, scale):
    n = distances[0].shape[0]
    return rows[0].new_empty(n, rows[0].shape[0], cols[0].shape[0]), rows[0].new_empty(n)


# ---- gradient ----------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, y = ctx.saved_tensors
    backward = torch.ops.recontrast.cosine_sums_backward
    # By symmetry, the gradient in x is the gradient in y with x and y, and the two squares, swapped.
    grad_x = backward(torch.stack([grad[0], grad[2], grad[1]]), y, x) if ctx.needs_input_grad[0] else None
    grad_y = backward(grad, x, y) if ctx.needs_input_grad[1] else None
    return grad_x, grad_y


def _setup_group(ctx, inputs, output):
    x, y = inputs
    ctx.save_for_backward(*x, *y)


def _backward_group(ctx, grad):
    pairs = len(ctx.saved_tensors) // 2
    x, y = list(ctx.saved_tensors[:pairs]), list(ctx.saved_tensors[pairs:])
    backward = torch.ops.recontrast.cosine_sums_group_backward
    grad_x = grad_y = [None] * pairs
    if any(ctx.needs_input_grad[0]):  # swapped as above
        sizes = [3 * t.shape[0] * t.shape[2] * t.shape[3] for t in y]
        swapped = [part.view(3, -1)[[0, 2, 1]].flatten() for part in grad.split(sizes)]
        grad_x = backward(torch.cat(swapped), y, x)
    if any(ctx.needs_input_grad[1]):
        grad_y = backward(grad, x, y)
    return grad_x, grad_y


for _operator in ("cosine_sums_backward", "cosine_sums_group_backward"):
    refuse_gradient(_operator, "the losses can be differentiated once, not twice")
for _operator in ("anomaly_map", "anomaly_map_inside"):
    refuse_gradient(_operator, 'AnomalyMap(method="matmul") is differentiable')
torch.library.register_autograd("recontrast::cosine_sums", _backward, setup_context=_setup_context)
torch.library.register_autograd("recontrast::cosine_sums_group", _backward_group, setup_context=_setup_group)


# ---- kernels -----------------------------------------------------------------


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes in the dtypes of its arguments, as compiled kernels do under autocast."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]  # all are on one device
        with torch.autocast(first.device.type, enabled=False):
            return function(*arguments)

    return run


for _name in SCHEMAS:
    _oracle = _without_autocast(getattr(reference, _name))
    torch.library.impl(f"recontrast::{_name}", "CompositeExplicitAutograd", _oracle)
backend.choose("cpu", KERNEL_MODULES)
if torch.cuda.is_available():
    backend.choose("cuda", KERNEL_MODULES)
else:
    WHY["cuda"] = "no CUDA device"
_KERNELS = {
    (name, device)
    for name in SCHEMAS
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"recontrast::{name}", key)
}
