"""Point distances ``1 - cos`` between features of a teacher and a student, from which anomaly maps are computed."""

import math
from collections.abc import Sequence

from torch import Tensor

from recontrast import ops
from recontrast.ops import cosine, cosine_sums


def point_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the point distances ``1 - cos`` over the channels, from which the anomaly map is computed.

    Args:
        teacher: Features (N, C, H, W), floating point.
        student: Features in the shape of ``teacher``.

    Returns:
        Distances (N, H, W) in [0, 2], float32 (float64 if one of the features is).

    Raises:
        ValueError: If the shapes, devices or dtypes do not match.
    """
    return 1 - cosine(cosine_sums(teacher, student))


def point_distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Compute the `point_distance` of each pair with a single operator call.

    Args:
        pairs: (teacher, student) features, (N, C, H, W) each.

    Returns:
        Distances (N, H, W) of each pair, float32 (float64 if one of the features is). Empty if there are no pairs.

    Raises:
        ValueError: If the shapes, devices or dtypes do not match.
    """
    teachers, students = [t for t, _ in pairs], [s for _, s in pairs]
    if not pairs:
        return []
    sums = ops.cosine_sums_group(teachers, students)
    shapes = [(3, s.shape[0], *s.shape[2:]) for s in students]
    parts = sums.split([math.prod(shape) for shape in shapes])
    return [1 - cosine(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]
