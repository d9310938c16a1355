"""Hard mining: rules that weight the gradient of each position of a feature map by its distance.

`deviation` is the rule of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3.4),
`hardest` that of Dinomaly (https://arxiv.org/abs/2405.14325), and `power` that of INP-Former
(https://arxiv.org/abs/2503.02424).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

# Maps point distances of this process (N, H, W) and of all processes (any shape) to gradient weights (N, H, W).
Rule = Callable[[Tensor, Tensor], Tensor]


def _check_number(argument: str, value: object, wanted: str = "a number", is_valid: bool = True) -> None:
    if not isinstance(value, Real) or value != value or not is_valid:
        raise ValueError(f"{argument}: wanted {wanted}, got {value!r}")


@dataclass(frozen=True)
class deviation:
    """Weight ``factor`` if the distance is below ``mean + alpha * std``, otherwise 1 (ReContrast).

    The standard deviation is unbiased, and the comparison is strict. Section 3.4 of the paper
    (https://arxiv.org/abs/2306.02602); upstream's ``global_cosine_hm``, utils.py.

    Attributes:
        alpha: Number of standard deviations above the mean. A 0-dim tensor can be on the device and change in place.
        factor: Weight of the easy positions.

    Raises:
        ValueError: If ``alpha`` or ``factor`` is not a number.
    """

    alpha: float | Tensor
    factor: float = 0.0

    def __post_init__(self) -> None:
        """Check both arguments without reading the value of a tensor, which would wait for the device."""
        if not isinstance(self.alpha, Tensor):
            _check_number("deviation: alpha", self.alpha, "a number or a 0-dim tensor")
        elif self.alpha.is_complex():
            raise ValueError(f"deviation: alpha: wanted a real number, got a tensor of {self.alpha.dtype}")
        elif self.alpha.dim():
            raise ValueError(
                f"deviation: alpha: wanted a number or a 0-dim tensor, got a tensor of shape {tuple(self.alpha.shape)}"
            )
        _check_number("deviation: factor", self.factor)

    def __call__(self, distances: Tensor, all_distances: Tensor) -> Tensor:
        """Compute the gradient weights of point distances.

        Args:
            distances: Distances of this process, (N, H, W), float32 or float64.
            all_distances: Distances of all processes, of any shape, for the mean and the standard deviation.

        Returns:
            Weights (N, H, W), in the dtype of ``distances``. All are 1 if there are fewer than two distances.
        """
        if all_distances.numel() < 2:  # a single point has no standard deviation
            return torch.ones_like(distances)
        threshold = all_distances.mean() + self.alpha * all_distances.std()
        return torch.ones_like(distances).masked_fill_(distances < threshold, self.factor)


@dataclass(frozen=True)
class hardest:
    """Weight 1 for the ``fraction`` of largest distances (at least one), otherwise ``factor`` (Dinomaly).

    Guo et al., https://arxiv.org/abs/2405.14325; ``global_cosine_hm_percent`` of its code, where p is 1 - fraction.

    Attributes:
        fraction: Share of the positions with weight 1, in (0, 1].
        factor: Weight of the other positions.

    Raises:
        ValueError: If ``fraction`` is not in (0, 1], or ``factor`` is not a number.
    """

    fraction: float
    factor: float = 0.0

    def __post_init__(self) -> None:
        """Check both arguments."""
        _check_number("hardest: fraction", self.fraction)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"hardest: fraction: wanted a number in (0, 1], got {self.fraction}")
        _check_number("hardest: factor", self.factor)

    def __call__(self, distances: Tensor, all_distances: Tensor) -> Tensor:
        """Compute the gradient weights of point distances.

        Args:
            distances: Distances of this process, (N, H, W), float32 or float64.
            all_distances: Distances of all processes, of any shape, for the threshold.

        Returns:
            Weights (N, H, W), in the dtype of ``distances``. All are 1 if there are no distances.
        """
        if all_distances.numel() == 0:
            return torch.ones_like(distances)
        k = max(int(all_distances.numel() * self.fraction), 1)
        threshold = all_distances.flatten().topk(k, sorted=False).values.amin()
        return torch.ones_like(distances).masked_fill_(distances < threshold, self.factor)


@dataclass(frozen=True)
class power:
    """Weight ``(distance / mean) ** exponent`` (INP-Former).

    Rounding can make a distance negative; it counts as zero. Luo et al., https://arxiv.org/abs/2503.02424;
    ``global_cosine_hm_adaptive`` of its code.

    Attributes:
        exponent: At least 0. With 0 all weights are 1. INP-Former uses 3.

    Raises:
        ValueError: If ``exponent`` is not a finite number of at least 0.
    """

    exponent: float

    def __post_init__(self) -> None:
        """Check the exponent."""
        wanted = "a finite number of at least 0"
        _check_number("power: exponent", self.exponent, wanted)
        _check_number("power: exponent", self.exponent, wanted, 0 <= self.exponent < math.inf)

    def __call__(self, distances: Tensor, all_distances: Tensor) -> Tensor:
        """Compute the gradient weights of point distances.

        Args:
            distances: Distances of this process, (N, H, W), float32 or float64.
            all_distances: Distances of all processes, of any shape, for the mean.

        Returns:
            Weights (N, H, W), in the dtype of ``distances``. All are 1 if the mean is zero.
        """
        mean = all_distances.clamp_min(0).mean()
        is_positive = mean > 0
        relative = distances.clamp_min(0) / torch.where(is_positive, mean, 1.0)
        return torch.where(is_positive, relative**self.exponent, 1.0)


def alpha_at(step: int, steps: int, ramp: float = 0.1, start: float = -3.0, end: float = 1.0) -> float:
    """Compute alpha of `deviation` at a training step: a linear ramp, then constant.

    Upstream's ``train``, recontrast_mvtec.py.

    Args:
        step: Training step, counted from 0.
        steps: Number of steps of the whole run, at least 1.
        ramp: Share of the steps in the ramp, in [0, 1].
        start: Alpha at step 0.
        end: Alpha from step ``ramp * steps`` on.

    Returns:
        Alpha, in standard deviations.

    Raises:
        ValueError: If ``steps`` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"alpha_at: steps: wanted at least 1, got {steps}")
    if step >= steps * ramp:
        return end
    return start + (end - start) * step / (steps * ramp)
