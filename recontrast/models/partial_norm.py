"""BatchNorm with a lower bound on the batch variance, for channels that are rarely active.

It belongs to the "stable" recipes of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602,
appendix E; upstream models/partialnormv2.py, `PartialNorm2D`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recontrast.models.replacement import replace_modules

Moments = Callable[[Tensor], tuple[Tensor, Tensor, int | Tensor]]


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Compute mean (C,), biased variance (C,) and number of values of each channel of x (N, C, H, W).

    Raises:
        ValueError: If a channel has fewer than 2 values.
    """
    n = x.numel() // x.shape[1]
    if n < 2:
        raise ValueError(f"PartialNorm2d: x: wanted more than 1 value for each channel, got {tuple(x.shape)}")
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var, n


class PartialNorm2d(nn.Module):
    """BatchNorm that does not divide by a batch variance near zero (upstream models/partialnormv2.py, `PartialNorm2D`).

    Each channel has a minimum variance, min(pretrained running variance, ``var_thresh``). In training, a channel whose
    batch variance does not exceed it is normalised with the minimum instead. Batches of a single category leave some
    channels almost inactive, which the paper names as a cause of loss spikes. In eval mode the layer equals
    BatchNorm. The minimum is a buffer and is stored in checkpoints. Upstream computes it in the first forward pass and
    does not store it.

    Args:
        norm: Layer to replace. Its parameters, statistics, mode and (in timm) activation are used.
        var_thresh: Upper bound of the minimum variance. The paper's recipes use 5e-4.
        eps: Value added to the variance. None uses the one of ``norm``.

    Raises:
        ValueError: If ``norm`` has no affine parameters or no running statistics.
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
        after = (getattr(norm, "drop", None), getattr(norm, "act", None))  # timm's BatchNormAct2d has both
        self.after = nn.Sequential(*(m for m in after if m is not None))
        self.moments: Moments = batch_moments  # replaced where a batch is distributed over processes
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W); statistics are at least float32, the result has the dtype of x."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return self.after(nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, n = self.moments(wide)
        # As upstream: the biased variance normalises, the unbiased one is compared and stored.
        unbiased = var.detach() * (n / (n - 1))
        active = unbiased > self.min_var
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(torch.where(active, unbiased, self.min_var).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(torch.where(active, var, self.min_var) + self.eps)
        y = (wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return self.after(y.to(x.dtype))


def convert_partial_norm(module: nn.Module, *, var_thresh: float = 5e-4, eps: float | None = None) -> nn.Module:
    """Replace every BatchNorm2d of ``module`` by `PartialNorm2d`, in place.

    Args:
        module: Module with pretrained statistics, from which the minimum variances are computed.
        var_thresh: Upper bound of the minimum variances, see `PartialNorm2d`.
        eps: Value added to the variances. None keeps the one of each layer. Upstream uses 1e-6 for the trained encoder
            and does not change it in the frozen one.

    Returns:
        ``module``, or its replacement if it is a BatchNorm2d itself.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    return replace_modules(module, {norm: PartialNorm2d(norm, var_thresh, eps) for norm in norms})
