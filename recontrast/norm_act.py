"""Operator ``norm_act``: schemas, checks, shape rules and gradient; `recontrast.ops` registers its kernels."""

import torch
from torch import Tensor

from recontrast.op_checks import DTYPES, check_features, dtype_name, refuse_gradient
from recontrast.reference import ACTIVATIONS, sum_dtype

SCHEMAS = {
    "norm_act": "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, str act,"
    " float eps) -> (Tensor, Tensor)",
    "norm_act_backward": "(Tensor grad, Tensor x, Tensor? kept, Tensor? weight, Tensor? bias, Tensor moments,"
    " bool training, str act, float eps, bool wants_x) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"recontrast::{_name}", _schema)


def norm_act(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    act: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.norm_act`, BatchNorm with residual add and activation, in one operator.

    Differentiable in ``x``, ``residual``, ``weight`` and ``bias``.

    Args:
        x: Features (N, C, H, W), floating point, any strides.
        residual: Features to add before the activation, in the shape and dtype of ``x``.
        weight: Scale of each channel (C,), floating point.
        bias: Offset of each channel (C,), floating point.
        mean: Mean of each channel (C,), a constant. None takes mean and variance of the batch.
        var: Variance of each channel (C,), a constant.
        act: "none", "relu" or "gelu".
        eps: Constant added to the variance.

    Returns:
        y: Features in the shape, dtype and layout of ``x``.
        moments: Mean and biased variance that were used, (2, C), float32 (float64 for float64 features); constants.

    Raises:
        ValueError: If shapes, devices or dtypes do not match, the activation is unknown, or the batch has a single
            value for each channel and ``mean`` is None.
        RuntimeError: In forward-mode differentiation.
    """
    check_features("norm_act", x, x if residual is None else residual)
    channels = {
        name: t for name, t in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var)) if t is not None
    }
    for name, t in channels.items():
        if t.shape != x.shape[1:2] or t.dtype not in DTYPES or t.device != x.device:
            got = f"{dtype_name(t.dtype)} {tuple(t.shape)} on {t.device}"
            raise ValueError(f"norm_act: {name}: wanted floating-point ({x.shape[1]},) on {x.device}, got {got}")
    if residual is not None and residual.dtype != x.dtype:
        dtypes = f"{dtype_name(x.dtype)}, got {dtype_name(residual.dtype)}"
        raise ValueError(f"norm_act: residual: wanted the dtype of x, {dtypes}")
    if (mean is None) != (var is None) or any(t.requires_grad for t in (mean, var) if t is not None):
        raise ValueError("norm_act: mean and var: wanted both or none, without gradients")
    if act not in ACTIVATIONS:
        raise ValueError(f"norm_act: act: wanted one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if mean is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:  # the words of torch.nn.functional.batch_norm
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    return torch.ops.recontrast.norm_act(x, residual, weight, bias, mean, var, act, eps)


@torch.library.register_fake("recontrast::norm_act")
def _(x, residual, weight, bias, mean, var, act, eps):
    return torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=sum_dtype(x, x))


@torch.library.register_fake("recontrast::norm_act_backward")
def _(grad, x, kept, weight, bias, moments, training, act, eps, wants_x):
    has_residual = kept is not None and act != "none"
    grads = [torch.empty_like(x) if wanted else x.new_empty(0) for wanted in (wants_x, has_residual)]
    return *grads, torch.empty_like(moments)


def _setup_norm_act(ctx, inputs, output):
    x, residual, weight, bias, mean, _, ctx.act, ctx.eps = inputs
    y, moments = output
    ctx.training, ctx.has_residual = mean is None, residual is not None
    kept = None if residual is None or ctx.act == "none" else y if ctx.act == "relu" else residual
    ctx.save_for_backward(x, kept, weight, bias, moments)
    ctx.mark_non_differentiable(moments)


def _backward_norm_act(ctx, grad, _):
    x, kept, weight, bias, moments = ctx.saved_tensors
    wants_x, wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:4]
    grad_x, grad_residual, sums = torch.ops.recontrast.norm_act_backward(
        grad, x, kept, weight, bias, moments, ctx.training, ctx.act, ctx.eps, wants_x
    )
    grad_residual = grad if kept is None else grad_residual
    return (
        grad_x if wants_x else None,
        grad_residual if ctx.has_residual and wants_residual else None,
        sums[1].to(weight.dtype) if wants_weight else None,
        sums[0].to(bias.dtype) if wants_bias else None,
        *(None,) * 4,
    )


refuse_gradient("norm_act_backward", "norm_act can be differentiated once, not twice")
torch.library.register_autograd("recontrast::norm_act", _backward_norm_act, setup_context=_setup_norm_act)
