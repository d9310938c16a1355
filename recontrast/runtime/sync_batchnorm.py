"""BatchNorm over the images of all processes, on CPU and GPU."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recontrast.models.partial_norm import PartialNorm2d


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes. What one of them adds reaches the losses of all, so its gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Add up ``x``, of one shape everywhere."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        """Add up the gradients."""
        total = grad[0].clone()
        dist.all_reduce(total)
        return total


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of each channel over all processes.

    Args:
        x: (N, C, H, W); N may differ, and be zero, from process to process.

    Returns:
        Mean (C,), variance (C,), and the number of values a channel has (scalar), all on x's device.
    """
    count = x.new_tensor(x.numel() // x.shape[1])
    dist.all_reduce(count)
    mean = _AllReduceSum.apply(x.sum(dim=(0, 2, 3))) / count
    centred = x - mean[:, None, None]
    return mean, _AllReduceSum.apply((centred * centred).sum(dim=(0, 2, 3))) / count, count


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of all processes; torch's SyncBatchNorm refuses the CPU.

    Takes over parameters, statistics, mode and (timm's) activation of ``norm``.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        after = (getattr(norm, "drop", None), getattr(norm, "act", None))  # of timm's BatchNormAct2d
        self.after = nn.Sequential(*(m for m in after if m is not None))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W): statistics in float32 at least, result in the dtype of x."""
        if not self.training:
            return self.after(super().forward(x))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = global_moments(wide)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = var.detach() * (count / (count - 1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), rate)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        y = (wide - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return self.after(y.to(x.dtype))


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Let every BatchNorm2d and `PartialNorm2d` of ``module`` see the batches of all processes, in place.

    Names of parameters and buffers stay, and with them checkpoints. Doing it twice does no harm.

    Returns:
        ``module``, or its replacement where it is itself a BatchNorm2d.
    """
    if isinstance(module, PartialNorm2d):
        module.moments = global_moments
    elif isinstance(module, nn.BatchNorm2d) and not isinstance(module, GlobalBatchNorm2d):
        return GlobalBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
    return module
