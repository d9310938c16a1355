"""Rules for hard points: which positions of a feature map keep their gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

# A rule maps point distances of this process (N, H, W) and of all of them (any shape) to gradient weights (N, H, W).
Rule = Callable[[Tensor, Tensor], Tensor]


def _number(argument: str, value: object, wanted: str = "a number", holds: bool = True) -> None:
    if not isinstance(value, Real) or value != value or not holds:
        raise ValueError(f"{argument}: wanted {wanted}, got {value!r}")


@dataclass(frozen=True)
class deviation:
    """Weight ``factor`` where the distance is below ``mean + alpha * std`` (unbiased, strict), else 1: ReContrast.

    Section 3.4 of the paper (https://arxiv.org/abs/2306.02602); upstream's ``global_cosine_hm``, utils.py.

    Attributes:
        alpha: standard deviations above the mean; a number or a 0-dim tensor, which may live on the device and be
            changed in place.
        factor: weight of the easy positions.

    Raises:
        ValueError: alpha or factor is no number.
    """

    alpha: float | Tensor
    factor: float = 0.0

    def __post_init__(self) -> None:
        """Check both; a tensor may only be read on its device."""
        if not isinstance(self.alpha, Tensor):
            _number("deviation: alpha", self.alpha, "a number or a 0-dim tensor")
        elif self.alpha.dim():
            raise ValueError(
                f"deviation: alpha: wanted a number or a 0-dim tensor, got a tensor of shape {tuple(self.alpha.shape)}"
            )
        _number("deviation: factor", self.factor)

    def __call__(self, d: Tensor, everyone: Tensor) -> Tensor:
        """Weights of point distances.

        Args:
            d: distances of this process, (N, H, W), float32 or float64.
            everyone: those of all processes, of any shape; their mean and deviation is taken.

        Returns:
            (N, H, W), in the dtype of ``d``: ones where there are fewer than two of ``everyone``.
        """
        if everyone.numel() < 2:  # one point has no deviation, and is not below itself
            return torch.ones_like(d)
        return torch.ones_like(d).masked_fill_(d < everyone.mean() + self.alpha * everyone.std(), self.factor)


@dataclass(frozen=True)
class hardest:
    """Weight ``factor`` for all but the ``fraction`` of largest distances (at least one), else 1: Dinomaly.

    Guo et al., https://arxiv.org/abs/2405.14325; ``global_cosine_hm_percent`` of its code, where p is 1 - fraction.

    Attributes:
        fraction: share of the positions that keep their gradient, in (0, 1].
        factor: weight of the others.

    Raises:
        ValueError: a fraction outside of (0, 1], or a factor that is no number.
    """

    fraction: float
    factor: float = 0.0

    def __post_init__(self) -> None:
        """Check both."""
        _number("hardest: fraction", self.fraction)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"hardest: fraction must lie in (0, 1], got {self.fraction}")
        _number("hardest: factor", self.factor)

    def __call__(self, d: Tensor, everyone: Tensor) -> Tensor:
        """Weights of point distances.

        Args:
            d: distances of this process, (N, H, W), float32 or float64.
            everyone: those of all processes, of any shape; their largest share is taken.

        Returns:
            (N, H, W), in the dtype of ``d``: ones where ``everyone`` is empty.
        """
        if everyone.numel() == 0:
            return torch.ones_like(d)
        k = max(int(everyone.numel() * self.fraction), 1)
        least = everyone.flatten().topk(k, sorted=False).values.amin()
        return torch.ones_like(d).masked_fill_(d < least, self.factor)


@dataclass(frozen=True)
class power:
    """Weight ``(distance / mean) ** exponent``; distances below zero, which rounding makes, count as zero: INP-Former.

    Luo et al., https://arxiv.org/abs/2503.02424; ``global_cosine_hm_adaptive`` of its code.

    Attributes:
        exponent: at least 0, which weights all positions alike; 3 is INP-Former's.

    Raises:
        ValueError: the exponent is no finite number of at least 0.
    """

    exponent: float

    def __post_init__(self) -> None:
        """Check the exponent."""
        wanted = "a finite number of at least 0"
        _number("power: exponent", self.exponent, wanted)
        _number("power: exponent", self.exponent, wanted, 0 <= self.exponent < math.inf)

    def __call__(self, d: Tensor, everyone: Tensor) -> Tensor:
        """Weights of point distances.

        Args:
            d: distances of this process, (N, H, W), float32 or float64.
            everyone: those of all processes, of any shape; their mean is taken.

        Returns:
            (N, H, W), in the dtype of ``d``: ones where the mean is zero.
        """
        mean = everyone.clamp_min(0).mean()
        some = mean > 0
        relative = d.clamp_min(0) / torch.where(some, mean, 1.0)
        return torch.where(some, relative**self.exponent, 1.0)


def alpha_at(step: int, steps: int, ramp: float = 0.1, start: float = -3.0, end: float = 1.0) -> float:
    """Alpha of `deviation` at ``step``: linear over the first ``ramp`` of ``steps``, then flat.

    Upstream's ``train``, recontrast_mvtec.py.

    Args:
        step: from 0.
        steps: of the whole run, at least 1.
        ramp: share of the steps that the ramp takes, in [0, 1].
        start: alpha at step 0.
        end: alpha from step ``ramp * steps`` on.

    Returns:
        Alpha, in standard deviations.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"alpha_at: steps: wanted at least 1, got {steps}")
    if step >= steps * ramp:
        return end
    return start + (end - start) * step / (steps * ramp)
