"""Losses of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602) and its successors.

One loss, three rules for what counts as a hard position: `deviation` (ReContrast, section 3.4; upstream's
``utils.global_cosine_hm``), `hardest` (Dinomaly, https://arxiv.org/abs/2405.14325) and `power` (INP-Former,
https://arxiv.org/abs/2503.02424). All of it follows from the three sums of `recontrast.ops.cosine_sums`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from recontrast import ops
from recontrast.ops import cosine, cosine_sums

# A rule maps point distances of this process (N, H, W) and of all of them (any shape) to gradient weights (N, H, W).
Rule = Callable[[Tensor, Tensor], Tensor]
Features = Tensor | Sequence[Tensor]


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


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Point distances ``1 - cos`` over the channels, which the anomaly map is made of.

    Args:
        teacher: (N, C, H, W), floating point.
        student: as ``teacher``, in shape.

    Returns:
        (N, H, W) in [0, 2], float32 (float64 if one of the features is).

    Raises:
        ValueError: shapes, devices or dtypes that do not go together.
    """
    return 1 - cosine(cosine_sums(teacher, student))


def distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`distance` of each pair; the features of all are read at once.

    Args:
        pairs: (teacher, student), (N, C, H, W) each.

    Returns:
        (N, H, W) of each pair, float32 (float64 if one of the features is); no pair, no distance.

    Raises:
        ValueError: features that do not go together.
    """
    teachers, students = [t for t, _ in pairs], [s for _, s in pairs]
    if not pairs:
        return []
    sums = ops.cosine_sums_group(teachers, students)
    shapes = [(3, s.shape[0], *s.shape[2:]) for s in students]
    parts = sums.split([math.prod(shape) for shape in shapes])
    return [1 - cosine(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]


def of_all(part: Tensor, shares: Sequence[int] | None) -> Tensor:
    """The parts of all processes, one behind the other, on each of them.

    Args:
        part: (n, ...), n being this process's share; on a device that the backend knows.
        shares: n of each process; None: there is one.

    Returns:
        (sum of n, ...), in the dtype of ``part``.
    """
    if shares is None:
        return part
    padded = part.new_zeros(max(shares), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([whole[:n] for whole, n in zip(parts, shares, strict=True)])


def _shares(images: int, device: torch.device, given: Sequence[int] | None) -> Sequence[int] | None:
    """Images of each process: as given, or asked for (one small collective and, on CUDA, a wait); None if alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if given is not None:
        return given
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], images))
    return [int(count) for count in counts]


def _mean(values: Tensor, shares: Sequence[int] | None) -> Tensor:
    """Mean over all of (N, ...); over several processes, the part of it whose mean over processes is that mean."""
    if shares is None:
        return values.mean()
    return values.sum() * (len(shares) / (sum(shares) * (values[0].numel() if len(values) else 1)))


def _pairs(op: str, teacher: Features, student: Features) -> list[tuple[Tensor, Tensor]]:
    if isinstance(teacher, Tensor) and isinstance(student, Tensor):
        return [(teacher, student)]
    if isinstance(teacher, Tensor) or isinstance(student, Tensor):
        raise ValueError(f"{op}: teacher and student must both be tensors or both be lists, got one of each")
    if not 0 < len(teacher) == len(student):
        raise ValueError(f"{op}: wanted as many teachers as students, got {len(teacher)} and {len(student)}")
    return list(zip(teacher, student, strict=True))


def _sums(teacher: Tensor, student: Tensor, stop_gradient: bool) -> Tensor:
    return cosine_sums(teacher.detach() if stop_gradient else teacher, student)


def _global_distance(sums: Tensor, shares: Sequence[int] | None) -> Tensor:
    return _mean(1 - cosine(sums.sum(dim=(-2, -1))), shares)


def hard_mined_cosine(
    teacher: Features,
    student: Features,
    rule: Rule,
    *,
    stop_gradient: bool = True,
    shares: Sequence[int] | None = None,
) -> Tensor:
    """Global cosine distance whose gradient favours the hard positions (section 3.4 of the paper).

    The value is the mean over images of ``1 - cos(teacher, student)``, each image's
    feature map taken as one long vector. In the gradient each position is multiplied
    by the weight that ``rule`` gives its own (channel-wise) distance. Where torch.distributed is initialised, the rule
    sees the distances of all processes, and a process's loss counts by its share of the images: the mean over
    processes, which DistributedDataParallel takes, does not depend on how a batch is split.

    Args:
        teacher: (N, C, H, W), floating point, or a list of such, one for each level.
        student: as ``teacher``, in shape.
        rule: `deviation`, `hardest`, `power`, or any `Rule`.
        stop_gradient: take the teacher as constant; otherwise its gradient is weighted as the student's is.
        shares: images of each process; None asks the others, which on a GPU waits for them.

    Returns:
        Scalar, float32 (float64 for float64 features); for lists the sum over the levels.

    Raises:
        ValueError: shapes, dtypes or lists that do not go together.
    """
    pairs = _pairs("hard_mined_cosine", teacher, student)
    teachers, students = [t.detach() if stop_gradient else t for t, _ in pairs], [s for _, s in pairs]
    fused = _arguments(rule, students[0].device)
    if fused is not None:
        return ops.mined_cosine(teachers, students, *fused)
    losses = []
    shares = _shares(len(students[0]), students[0].device, shares)
    for t, s in zip(teachers, students, strict=True):
        sums = cosine_sums(t, s)  # (3, N, H, W)
        with torch.no_grad():
            points = 1 - cosine(sums)  # (N, H, W)
            weight = rule(points, of_all(points, shares))  # (N, H, W)
        sums = sums.detach() + weight * (sums - sums.detach())  # the same value; the gradient weighted
        losses.append(_global_distance(sums, shares))
    return torch.stack(losses).sum()


def _arguments(rule: Rule, device: torch.device) -> tuple[str, float, Tensor | None, float] | None:
    """What `ops.mined_cosine` takes for ``rule``; None where its kernels do not know it, or see one process of many."""
    if dist.is_available() and dist.is_initialized():
        return None
    if type(rule) is deviation and isinstance(rule.alpha, Tensor):
        usable = rule.alpha.dim() == 0 and rule.alpha.device == device and rule.alpha.is_floating_point()
        return ("deviation", 0.0, rule.alpha.detach(), rule.factor) if usable else None
    if type(rule) is deviation:
        return "deviation", float(rule.alpha), None, rule.factor
    if type(rule) is hardest:
        return "hardest", rule.fraction, None, rule.factor
    if type(rule) is power:
        return "power", rule.exponent, None, 1.0
    return None


def global_cosine(
    teacher: Features, student: Features, *, stop_gradient: bool = True, shares: Sequence[int] | None = None
) -> Tensor:
    """Global cosine distance without mining: `hard_mined_cosine` with every weight 1.

    Configuration B of the paper's Table 6; upstream's ``global_cosine``, utils.py.

    Args:
        teacher: (N, C, H, W), floating point, or a list of such.
        student: as ``teacher``, in shape.
        stop_gradient: take the teacher as constant.
        shares: as in `hard_mined_cosine`.

    Returns:
        Scalar, float32 (float64 for float64 features); for lists the sum over the levels.

    Raises:
        ValueError: shapes, dtypes or lists that do not go together.
    """
    pairs = _pairs("global_cosine", teacher, student)
    shares = _shares(len(pairs[0][0]), pairs[0][0].device, shares)
    return torch.stack([_global_distance(_sums(t, s, stop_gradient), shares) for t, s in pairs]).sum()


def point_cosine(
    teacher: Features, student: Features, *, stop_gradient: bool = True, shares: Sequence[int] | None = None
) -> Tensor:
    """Mean point distance, the region loss of RD4AD's paper (https://arxiv.org/abs/2201.10703, equation 2).

    Args:
        teacher: (N, C, H, W), floating point, or a list of such.
        student: as ``teacher``, in shape.
        stop_gradient: take the teacher as constant.
        shares: as in `hard_mined_cosine`.

    Returns:
        Scalar, float32 (float64 for float64 features); for lists the sum over the levels.

    Raises:
        ValueError: shapes, dtypes or lists that do not go together.
    """
    pairs = _pairs("point_cosine", teacher, student)
    shares = _shares(len(pairs[0][0]), pairs[0][0].device, shares)
    return torch.stack([_mean(1 - cosine(_sums(t, s, stop_gradient)), shares) for t, s in pairs]).sum()


def pairs_loss(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rule: Rule | None,
    *,
    form: Literal["global", "point"] = "global",
    groups: int = 2,
    stop_gradient: bool = True,
    shares: Sequence[int] | None = None,
) -> Tensor:
    """The paper's loss of all pairs: levels summed, the mean of the groups (equation 5), and that of its ablation.

    Args:
        pairs: (teacher, student) of `recontrast.ReContrast`, (N, C, H, W) each, group by group; at least one.
        rule: as in `hard_mined_cosine`; None: no mining, `global_cosine` or `point_cosine`.
        form: distance of a pair: of the whole map, or the mean over points, which has no mining.
        groups: 2, or 1 for the pairs of one encoder.
        stop_gradient: as in `hard_mined_cosine`.
        shares: as in `hard_mined_cosine`.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: no pairs, features that do not go together, a form that is none, or a rule for the form "point".
    """
    if not pairs:
        raise ValueError("pairs_loss: pairs: wanted at least one, got none")
    if form not in ("global", "point"):
        raise ValueError(f"pairs_loss: form: wanted 'global' or 'point', got {form!r}")
    teachers, students = zip(*pairs, strict=True)
    if rule is None:
        plain = {"global": global_cosine, "point": point_cosine}[form]
        return plain(teachers, students, stop_gradient=stop_gradient, shares=shares) / groups
    if form != "global":
        raise ValueError(f"pairs_loss: rule: wanted none where form is {form!r}, got {rule}")
    return hard_mined_cosine(teachers, students, rule, stop_gradient=stop_gradient, shares=shares) / groups
