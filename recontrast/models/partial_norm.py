"""BatchNorm that never divides by a batch variance near zero (ReContrast, appendix E)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Moments = Callable[[Tensor], tuple[Tensor, Tensor, int | Tensor]]


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean (C,), biased variance (C,) and number of values of each channel of x (N, C, H, W)."""
    n = x.numel() // x.shape[1]
    if n < 2:
        raise ValueError(f"PartialNorm2d: x: wanted more than 1 value for each channel, got {tuple(x.shape)}")
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var, n


class PartialNorm2d(nn.Module):
    """BatchNorm that never divides by a batch variance near zero (upstream models/partialnormv2.py, `PartialNorm2D`).

    In training, a channel whose batch variance does not exceed min(pretrained running variance, ``var_thresh``) is
    divided by that minimum instead: rarely active channels vanish in batches of one category, and the paper names them
    as a cause of its loss spikes. In eval mode it is BatchNorm. The minimum is a buffer, so a checkpoint holds it
    (upstream takes it at the first forward and keeps it outside the state).

    Args:
        norm: the BatchNorm2d to replace: its parameters, statistics, mode and (timm's) activation are taken over.
        var_thresh: upper bound of the minimum; 5e-4 in the paper's recipes.
        eps: None keeps the one of ``norm``.
    """

    running_mean: Tensor
    running_var: Tensor
    min_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, var_thresh: float = 5e-4, eps: float | None = None) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            raise ValueError("PartialNorm2d: norm: wanted affine parameters and running statistics, got one without")
        self.eps = norm.eps if eps is None else eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("min_var", norm.running_var.clamp(max=var_thresh))
        after = (getattr(norm, "drop", None), getattr(norm, "act", None))  # of timm's BatchNormAct2d
        self.after = nn.Sequential(*(m for m in after if m is not None))
        self.moments: Moments = batch_moments  # replaced where a batch is spread over processes
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W): statistics in float32 at least, result in the dtype of x."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return self.after(nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, n = self.moments(wide)  # divides by the biased variance,
        unbiased = var.detach() * (n / (n - 1))  # compares and keeps the unbiased one, as upstream
        active = unbiased > self.min_var
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(torch.where(active, unbiased, self.min_var).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(torch.where(active, var, self.min_var) + self.eps)
        y = (wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return self.after(y.to(x.dtype))


def convert_partial_norm(module: nn.Module, *, var_thresh: float = 5e-4, eps: float | None = None) -> nn.Module:
    """Replace every BatchNorm2d of ``module`` by `PartialNorm2d`, in place.

    Args:
        module: holds its pretrained statistics already: the minima come from them.
        var_thresh: see `PartialNorm2d`.
        eps: None keeps each layer's own; upstream gives 1e-6 to the trained encoder and leaves the frozen one.

    Returns:
        ``module``, or its replacement where it is itself a BatchNorm2d.
    """
    if isinstance(module, nn.BatchNorm2d):
        return PartialNorm2d(module, var_thresh, eps)
    for name, child in module.named_children():
        setattr(module, name, convert_partial_norm(child, var_thresh=var_thresh, eps=eps))
    return module
