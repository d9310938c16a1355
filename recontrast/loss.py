"""Losses of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602) and related methods.

`hard_mined_cosine` is the loss of ReContrast (section 3.4; upstream's ``utils.global_cosine_hm``). The rules of
`recontrast.mining` also give the losses of Dinomaly and INP-Former. All losses are computed from the three sums of
`recontrast.ops.cosine_sums`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from recontrast import ops
from recontrast.distances import point_distance, point_distances
from recontrast.mined_loss import flatten_inside
from recontrast.mining import Rule, deviation, hardest, power
from recontrast.ops import cosine, cosine_sums
from recontrast.runtime.collectives import gather_shares, resolve_shares

__all__ = [
    "global_cosine", "hard_mined_cosine", "pairs_loss", "point_cosine", "point_distance", "point_distances",
]  # fmt: skip
Features = Tensor | Sequence[Tensor]
Masks = Tensor | Sequence[Tensor]


def compute_mean(values: Tensor, shares: Sequence[int] | None) -> Tensor:
    """Compute the mean over (N, ...), scaled so that the mean over processes equals the mean over all their values.

    Args:
        values: Values of the images of this process, (N, ...).
        shares: Number of images of each process; None for a single process.

    Returns:
        Scalar, in the dtype of ``values``.
    """
    if shares is None:
        return values.mean()
    return values.sum() * (len(shares) / (sum(shares) * (values[0].numel() if len(values) else 1)))


def compute_mean_inside(values: Tensor, mask: Tensor | None, shares: Sequence[int] | None) -> Tensor:
    """Compute the mean over the points inside, scaled so that the mean over processes is that over all their points.

    Args:
        values: Values of the images of this process, (N, H, W).
        mask: Whether each point is inside, (N, H, W) or (1, H, W), bool; None: all are.
        shares: Number of images of each process; None for a single process.

    Returns:
        Scalar, in the dtype of ``values``; 0 without points inside.
    """
    if mask is None:
        return compute_mean(values, shares)
    inside = mask.expand(values.shape)
    shares = resolve_shares(len(values), values.device, shares)  # also of one process, which has no group to gather in
    count = gather_shares(inside.flatten(1).sum(1), shares).sum().clamp_min(1)
    return torch.where(inside, values, 0).sum() * (1 if shares is None else len(shares)) / count


def _build_pairs(op: str, teacher: Features, student: Features) -> list[tuple[Tensor, Tensor]]:
    if isinstance(teacher, Tensor) and isinstance(student, Tensor):
        return [(teacher, student)]
    if isinstance(teacher, Tensor) or isinstance(student, Tensor):
        raise ValueError(f"{op}: teacher and student must both be tensors or both be lists, got one of each")
    if not 0 < len(teacher) == len(student):
        raise ValueError(f"{op}: wanted as many teachers as students, got {len(teacher)} and {len(student)}")
    return list(zip(teacher, student, strict=True))


def _compute_sums(teacher: Tensor, student: Tensor, stop_gradient: bool) -> Tensor:
    return cosine_sums(teacher.detach() if stop_gradient else teacher, student)


def _compute_global_distance(sums: Tensor, mask: Tensor | None, shares: Sequence[int] | None) -> Tensor:
    """Compute the mean distance of the whole images, from sums that are 0 outside ``mask``."""
    distances = 1 - cosine(sums.sum(dim=(-2, -1)))
    if mask is not None:  # an image without points inside has no distance
        distances = torch.where(mask.flatten(1).any(1), distances, 0)
    return compute_mean(distances, shares)


def _list_masks(op: str, inside: Masks | None, pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor | None]:
    """Return the mask of each pair, None where all points are inside; raise ValueError for one that does not fit."""
    if inside is None:
        return [None] * len(pairs)
    masks = [inside] if isinstance(inside, Tensor) else list(inside)
    flatten_inside(op, masks, [tuple(student.shape) for _, student in pairs], pairs[0][1].device)
    return masks


def _select_inside(sums: Tensor, mask: Tensor | None) -> Tensor:
    return sums if mask is None else torch.where(mask, sums, 0)


def hard_mined_cosine(
    teacher: Features,
    student: Features,
    rule: Rule,
    *,
    stop_gradient: bool = True,
    shares: Sequence[int] | None = None,
    inside: Masks | None = None,
) -> Tensor:
    """Compute the global cosine distance with hard mining in the gradient (section 3.4 of the paper).

    The value is the mean over images of ``1 - cos(teacher, student)``, where each feature map is one long vector. In
    the gradient, each position is multiplied by the weight that ``rule`` computes from the point distances.

    If torch.distributed is initialised, the rule sees the distances of all processes, and the loss of a process is
    weighted by its share of the images. The mean over processes, which DistributedDataParallel computes, therefore does
    not depend on how a batch is divided.

    Args:
        teacher: Features (N, C, H, W), floating point, or a list with one tensor per level.
        student: Features in the shape of ``teacher``.
        rule: Mining rule: `deviation`, `hardest`, `power`, or any `Rule`.
        stop_gradient: Whether to treat the teacher as constant. Otherwise its gradient is weighted like the student's.
        shares: Number of images of each process. None gathers them, which synchronises with the GPU.
        inside: Whether each point is inside the region of interest: (N, H, W), or (1, H, W) for all images, bool, or a
            list with one mask per level. Other points take no gradient and no part in any mean or rule. None: all
            points are inside.

    Returns:
        Scalar, float32 (float64 for float64 features), summed over the levels of a list.

    Raises:
        ValueError: If the shapes, dtypes or lists do not match.
    """
    pairs = _build_pairs("hard_mined_cosine", teacher, student)
    masks = _list_masks("hard_mined_cosine", inside, pairs)
    teachers, students = [t.detach() if stop_gradient else t for t, _ in pairs], [s for _, s in pairs]
    fused = _find_fused_arguments(rule, students[0].device)
    if fused is not None:
        return ops.mined_cosine(teachers, students, *fused, None if inside is None else masks)  # type: ignore[arg-type]
    losses = []
    shares = resolve_shares(len(students[0]), students[0].device, shares)
    for t, s, mask in zip(teachers, students, masks, strict=True):
        sums = _select_inside(cosine_sums(t, s), mask)  # (3, N, H, W)
        with torch.no_grad():
            points = 1 - cosine(sums)  # (N, H, W)
            everywhere = gather_shares(points, shares)
            if mask is not None:  # as bytes: not every backend gathers bool
                everywhere = everywhere[gather_shares(mask.expand(points.shape).byte(), shares) != 0]
            weight = rule(points, everywhere)  # (N, H, W)
        sums = sums.detach() + weight * (sums - sums.detach())  # same value, weighted gradient
        losses.append(_compute_global_distance(sums, mask, shares))
    return torch.stack(losses).sum()


def _find_fused_arguments(rule: Rule, device: torch.device) -> tuple[str, float, Tensor | None, float] | None:
    """Return the arguments of `ops.mined_cosine` for ``rule``, or None if the kernels cannot be used.

    The kernels implement the rules of `recontrast.mining` for a single process.
    """
    if dist.is_available() and dist.is_initialized():
        return None
    if type(rule) is deviation and isinstance(rule.alpha, Tensor):
        is_usable = rule.alpha.dim() == 0 and rule.alpha.device == device and rule.alpha.is_floating_point()
        return ("deviation", 0.0, rule.alpha.detach(), rule.factor) if is_usable else None
    if type(rule) is deviation:
        return "deviation", float(rule.alpha), None, rule.factor
    if type(rule) is hardest:
        return "hardest", rule.fraction, None, rule.factor
    if type(rule) is power:
        return "power", rule.exponent, None, 1.0
    return None


def global_cosine(
    teacher: Features, student: Features, *, stop_gradient: bool = True, shares: Sequence[int] | None = None,
    inside: Masks | None = None,
) -> Tensor:  # fmt: skip
    """Compute the global cosine distance without mining: `hard_mined_cosine` with all weights 1.

    Configuration B of the paper's Table 6; upstream's ``global_cosine``, utils.py.

    Args:
        teacher: Features (N, C, H, W), floating point, or a list with one tensor per level.
        student: Features in the shape of ``teacher``.
        stop_gradient: Whether to treat the teacher as constant.
        shares: Number of images of each process, see `hard_mined_cosine`.
        inside: Whether each point is inside the region of interest, see `hard_mined_cosine`.

    Returns:
        Scalar, float32 (float64 for float64 features), summed over the levels of a list.

    Raises:
        ValueError: If the shapes, dtypes or lists do not match.
    """
    pairs = _build_pairs("global_cosine", teacher, student)
    masks = _list_masks("global_cosine", inside, pairs)
    shares = resolve_shares(len(pairs[0][0]), pairs[0][0].device, shares)
    return torch.stack([
        _compute_global_distance(_select_inside(_compute_sums(t, s, stop_gradient), mask), mask, shares)
        for (t, s), mask in zip(pairs, masks, strict=True)
    ]).sum()  # fmt: skip


def point_cosine(
    teacher: Features, student: Features, *, stop_gradient: bool = True, shares: Sequence[int] | None = None,
    inside: Masks | None = None,
) -> Tensor:  # fmt: skip
    """Compute the mean point distance, the loss of RD4AD (https://arxiv.org/abs/2201.10703, equation 2).

    Args:
        teacher: Features (N, C, H, W), floating point, or a list with one tensor per level.
        student: Features in the shape of ``teacher``.
        stop_gradient: Whether to treat the teacher as constant.
        shares: Number of images of each process, see `hard_mined_cosine`.
        inside: Whether each point is inside the region of interest, see `hard_mined_cosine`.

    Returns:
        Scalar, float32 (float64 for float64 features), summed over the levels of a list.

    Raises:
        ValueError: If the shapes, dtypes or lists do not match.
    """
    pairs = _build_pairs("point_cosine", teacher, student)
    masks = _list_masks("point_cosine", inside, pairs)
    shares = resolve_shares(len(pairs[0][0]), pairs[0][0].device, shares)
    return torch.stack([
        compute_mean_inside(1 - cosine(_select_inside(_compute_sums(t, s, stop_gradient), mask)), mask, shares)
        for (t, s), mask in zip(pairs, masks, strict=True)
    ]).sum()  # fmt: skip


def pairs_loss(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rule: Rule | None,
    *,
    form: Literal["global", "point"] = "global",
    groups: int = 2,
    stop_gradient: bool = True,
    shares: Sequence[int] | None = None,
    inside: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute the loss of all pairs: summed over levels, averaged over groups (equation 5 of the paper).

    Without a rule, it computes the losses of the paper's ablation.

    Args:
        pairs: At least one (teacher, student) pair of `recontrast.ReContrast`, (N, C, H, W) each, group by group.
        rule: Mining rule, see `hard_mined_cosine`. None disables mining.
        form: "global" compares whole feature maps, "point" averages over positions and has no mining.
        groups: Number of groups: 2, or 1 for a model with a single encoder.
        stop_gradient: Whether to treat the teachers as constant, see `hard_mined_cosine`.
        shares: Number of images of each process, see `hard_mined_cosine`.
        inside: Whether each point is inside the region of interest, one mask for each pair, see `hard_mined_cosine`.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: If there are no pairs, the features do not match, ``form`` is unknown, or "point" has a rule.
    """
    if not pairs:
        raise ValueError("pairs_loss: pairs: wanted at least one, got none")
    if form not in ("global", "point"):
        raise ValueError(f"pairs_loss: form: wanted 'global' or 'point', got {form!r}")
    teachers, students = zip(*pairs, strict=True)
    if rule is None:
        compute = {"global": global_cosine, "point": point_cosine}[form]
        return compute(teachers, students, stop_gradient=stop_gradient, shares=shares, inside=inside) / groups
    if form != "global":
        raise ValueError(f"pairs_loss: rule: wanted none where form is {form!r}, got {rule}")
    loss = hard_mined_cosine(teachers, students, rule, stop_gradient=stop_gradient, shares=shares, inside=inside)
    return loss / groups
