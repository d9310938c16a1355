"""What every operator checks before it runs, and the errors of derivatives that it does not have."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of features that the operators accept."""


def check_features(op: str, x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless x and y are features that the kernels accept as a pair.

    Args:
        op: Name of the operator.
        x: Features (N, C, H, W).
        y: Features in the shape of ``x``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
        RuntimeError: In forward-mode differentiation.
    """
    if x.dim() != 4:
        raise ValueError(f"{op}: x: wanted (N, C, H, W), got {tuple(x.shape)}")
    if x.shape != y.shape:
        raise ValueError(f"{op}: y: wanted the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if x.dtype not in DTYPES or y.dtype not in DTYPES:
        dtypes = f"{dtype_name(x.dtype)} and {dtype_name(y.dtype)}"
        raise ValueError(f"{op}: x and y: wanted float16, bfloat16, float32 or float64, got {dtypes}")
    if x.device != y.device:
        raise ValueError(f"{op}: y: wanted the device of x, {x.device}, got {y.device}")
    refuse_forward_mode(op, x, y)


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise an error in forward-mode differentiation: PyTorch would drop the tangents, as if they were zero.

    Args:
        op: Name of the operator.
        tensors: Its arguments.

    Raises:
        RuntimeError: If one of them has a tangent.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"recontrast::{op} has no forward-mode derivative: use backward mode")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def refuse_gradient(name: str, advice: str) -> None:
    """Register an error as the gradient of an operator; without it, its gradient would silently be zero.

    Args:
        name: Name of the operator.
        advice: What to use instead.
    """

    def backward(ctx, *grads):
        raise RuntimeError(f"recontrast::{name} has no gradient: {advice}")

    torch.library.register_autograd(f"recontrast::{name}", backward)
