"""BatchNorm with statistics over the images of all processes, on CPU and GPU."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recontrast.models.partial_norm import PartialNorm2d
from recontrast.models.replacement import replace_modules


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes. Each summand affects the losses of all processes, so its gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Sum ``x``, which has the same shape in all processes."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        """Sum the gradients."""
        total = grad[0].clone()
        dist.all_reduce(total)
        return total


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean and the biased variance of each channel over all processes.

    Args:
        x: Features of this process, (N, C, H, W); N may differ between processes and may be 0.

    Returns:
        Mean (C,), variance (C,) and number of values per channel (scalar), in x's dtype and on x's device.
    """
    count = x.new_tensor(x.numel() // x.shape[1])
    dist.all_reduce(count)
    mean = _AllReduceSum.apply(x.sum(dim=(0, 2, 3))) / count
    centred = x - mean[:, None, None]
    return mean, _AllReduceSum.apply((centred * centred).sum(dim=(0, 2, 3))) / count, count


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with training statistics over all processes; unlike torch's SyncBatchNorm it also runs on the CPU.

    Args:
        norm: BatchNorm whose parameters, statistics, mode and, for timm's BatchNormAct2d, activation are taken over.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        drop_and_act = (getattr(norm, "drop", None), getattr(norm, "act", None))  # only timm's BatchNormAct2d has them
        self.after = nn.Sequential(*(m for m in drop_and_act if m is not None))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (N, C, H, W), with statistics in float32 or wider; the result has the dtype of ``x``."""
        if not self.training:
            return self.after(super().forward(x))
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = global_moments(x_wide)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = var.detach() * (count / (count - 1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        y = (x_wide - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return self.after(y.to(x.dtype))


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Convert every BatchNorm2d and `PartialNorm2d` of a module to statistics over all processes.

    The names of parameters and buffers do not change, so checkpoints still fit. A second conversion has no effect.

    Args:
        module: Module, changed in place.

    Returns:
        ``module``, or its replacement if it is a BatchNorm2d itself.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for part in module.modules():
        if isinstance(part, PartialNorm2d):
            part.moments = global_moments
        elif isinstance(part, nn.BatchNorm2d) and not isinstance(part, GlobalBatchNorm2d):
            replacements[part] = GlobalBatchNorm2d(part)
    return replace_modules(module, replacements)
