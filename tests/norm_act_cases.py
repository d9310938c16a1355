"""Arguments of norm_act for the tests of every backend, and a float64 restatement of its results by autograd."""

import torch
import torch.nn.functional as F
from op_cases import LAYOUTS, relative_error

# Beside the residual and the activation: whether the moments are those of the batch.
VARIANTS = [
    (act, has_residual, training)
    for act in ("none", "relu", "gelu")
    for has_residual in (False, True)
    for training in (True, False)
]
# As in a model; odd sizes; more positions and more channels than a tile; few positions; one channel.
SHAPES = [(2, 64, 8, 8), (3, 5, 7, 13), (1, 40, 65, 67), (2, 1030, 2, 3), (5, 3, 1, 1), (2, 1, 9, 11)]


def make_arguments(shape, dtype, layout="nchw", *, has_residual=False, training=True, device="cpu"):
    """Return x, residual, weight, bias, mean and var; the mean of some channels is larger than their deviation."""
    channels = shape[1]
    offset = torch.randn(channels) * torch.tensor([0.0, 1.0, 3.0]).repeat(channels)[:channels]
    x = torch.randn(shape) * (0.1 + torch.rand(channels, 1, 1)) + offset[:, None, None]
    residual = torch.randn(shape) if has_residual else None
    x, residual = (None if t is None else LAYOUTS[layout](t.to(dtype)).to(device) for t in (x, residual))
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(channels, dtype=parameter, device=device) for _ in range(2))
    statistics = (offset.to(parameter), torch.rand(channels, dtype=parameter) + 0.1)
    mean, var = (None, None) if training else (t.to(device) for t in statistics)
    return x, residual, weight, bias, mean, var


def restate(x, residual, weight, bias, mean, var, act, grad, eps=1e-5):
    """Compute y and all gradients with the layers of PyTorch in float64, in the roundings of x's dtype that count."""
    leaves = [None if t is None else t.detach().double().cpu().requires_grad_() for t in (x, residual, weight, bias)]
    wide, wide_residual, w, b = leaves
    fixed = [None if t is None else t.double().cpu() for t in (mean, var)]
    y = F.batch_norm(wide, *fixed, w, b, training=mean is None, eps=eps)
    if wide_residual is not None:
        y = y + (y.detach().to(x.dtype).double() - y.detach()) + wide_residual
    y = F.relu(y) if act == "relu" else F.gelu(y) if act == "gelu" else y
    y.backward(grad.double().cpu())
    return y.detach(), [None if t is None else t.grad for t in leaves]


def far_from_zero(x, residual, weight, bias, mean, var, band):
    """Return where ReLU's input is farther than ``band`` from zero; elsewhere rounding decides on the gradient."""
    fixed = [None if t is None else t.double().cpu() for t in (mean, var)]
    y = F.batch_norm(x.detach().double().cpu(), *fixed, weight.double().cpu(), bias.double().cpu(), mean is None)
    return (y if residual is None else y + residual.detach().double().cpu()).abs() > band


def run_kernels(ops, arguments, act, grad, wants_x=True):
    """Run forward and backward of the kernels in ``ops``; y, moments and the results of the backward pass."""
    x, residual, weight, bias, mean, _ = arguments
    y, moments = ops.norm_act(*arguments, act, 1e-5)
    kept = None if residual is None or act == "none" else y if act == "relu" else residual
    inputs = (grad, x, kept, weight, bias, moments, mean is None, act, 1e-5, wants_x)
    return y, moments, *ops.norm_act_backward(*inputs)


def check_kernels(results, arguments, act, grad, tolerance):
    """Compare the results of `run_kernels` with `restate`; ``grad`` is zero where rounding decides on ReLU."""
    y, moments, grad_x, grad_residual, sums = (t.cpu() for t in results)
    x, residual = arguments[:2]
    expected, (wide_x, wide_residual, *parameters) = restate(*arguments, act, grad)
    assert y.dtype == grad_x.dtype == x.dtype and y.stride() == grad_x.stride() == torch.empty_like(x).stride()
    assert relative_error(y, expected) < tolerance
    assert relative_error(grad_x, wide_x) < 2 * tolerance
    for ours, theirs in zip(sums.flip(0), parameters, strict=True):
        assert relative_error(ours, theirs) < 10 * tolerance  # sums may cancel
    if residual is not None and act != "none":
        assert grad_residual.dtype == x.dtype and grad_residual.stride() == torch.empty_like(x).stride()
        assert relative_error(grad_residual, wide_residual) < 2 * tolerance
    if arguments[4] is None:
        wide = x.detach().double().cpu()
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        assert relative_error(moments[1], var) < max(tolerance, 1e-5 if moments.dtype == torch.float32 else 0)
        assert ((moments[0] - mean).abs() <= 1e-5 * var.sqrt() + 3e-7 * mean.abs() + 1e-7).all()


def make_gradient(arguments, act, tolerance):
    """Make a gradient of y, zero where a rounding error decides on the sign of ReLU's input."""
    grad = torch.randn_like(arguments[0])
    if act != "relu":
        return grad
    return grad * far_from_zero(*arguments, 10 * tolerance).to(grad)
