"""Losses of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602) and its successors.

One loss, three rules for what counts as a hard position: `deviation` (ReContrast, section 3.4; upstream's
``utils.global_cosine_hm``), `hardest` (Dinomaly, https://arxiv.org/abs/2405.14325) and `power` (INP-Former,
https://arxiv.org/abs/2503.02424). All of it follows from the three sums of `recontrast.ops.cosine_sums`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from recontrast import ops
from recontrast.mining import Rule, deviation, hardest, power
from recontrast.ops import cosine, cosine_sums
from recontrast.runtime.collectives import gather_shares, resolve_shares

Features = Tensor | Sequence[Tensor]


def point_distance(teacher: Tensor, student: Tensor) -> Tensor:
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


def point_distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`point_distance` of each pair; the features of all are read at once.

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
    shares = resolve_shares(len(students[0]), students[0].device, shares)
    for t, s in zip(teachers, students, strict=True):
        sums = cosine_sums(t, s)  # (3, N, H, W)
        with torch.no_grad():
            points = 1 - cosine(sums)  # (N, H, W)
            weight = rule(points, gather_shares(points, shares))  # (N, H, W)
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
    shares = resolve_shares(len(pairs[0][0]), pairs[0][0].device, shares)
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
    shares = resolve_shares(len(pairs[0][0]), pairs[0][0].device, shares)
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
