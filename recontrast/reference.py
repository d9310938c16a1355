"""The oracle: every kernel in this package, written in plain PyTorch.

Nothing here is fast; everything here is obviously right. The functions serve
three readers: the tests compare each kernel with them, the dispatcher falls
back to them where no kernel is built, and a person reads them to learn what a
kernel computes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

EPS = 1e-8
"""Least norm of a vector of features in a cosine: that of torch.nn.CosineSimilarity, as upstream's numbers have it."""
RULES = ("deviation", "hardest", "power")  # that `mined_loss` knows; what they mean: recontrast/loss.py


def sum_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype in which features are summed: float64 if one of them is, else float32."""
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def group_dtype(x: Sequence[Tensor], y: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a group of pairs is summed."""
    wide = any(t.dtype == torch.float64 for t in (*x, *y))
    return torch.float64 if wide else torch.float32


def cosine(sums: Tensor) -> Tensor:
    """Cosine from the sums of `cosine_sums`, as torch.nn.CosineSimilarity forms it; norms below `EPS` count as `EPS`.

    Args:
        sums: <x, y>, <x, x> and <y, y>, (3, ...), floating point.

    Returns:
        In [-1, 1] but for rounding: flat or (N, H, W), what ``sums`` is without its first axis, in the same dtype.
    """
    xy, xx, yy = sums
    return xy / (xx.clamp_min(EPS**2).sqrt() * yy.clamp_min(EPS**2).sqrt())


def cosine_sums(x: Tensor, y: Tensor) -> Tensor:
    """Sums over the channels, from which any cosine of ``x`` and ``y`` follows.

    Args:
        x: features, (N, C, H, W), floating point.
        y: features, (N, C, H, W), floating point; may differ from ``x`` in dtype (autocast).

    Returns:
        (3, N, H, W): <x, y>, <x, x> and <y, y> over the C channels, in float32
        (float64 if one of the inputs is).
    """
    dtype = sum_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    return torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)])


def cosine_sums_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of `cosine_sums` with respect to ``y``.

    Positions at which both weights are zero get zero; in channels_last their features are not read.

    Args:
        grad: gradient of the sums, (3, N, H, W).
        x: features, (N, C, H, W).
        y: features, (N, C, H, W).

    Returns:
        (N, C, H, W), in y's dtype and memory layout.
    """
    g_xy, _, g_yy = grad.unsqueeze(2)  # each (N, 1, H, W)
    gradient = torch.where((g_xy == 0) & (g_yy == 0), 0.0, g_xy * x + 2 * g_yy * y)
    return torch.empty_like(y).copy_(gradient)


def cosine_sums_group(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """`cosine_sums` of many pairs, one after the other.

    Args:
        x: features of each pair, (N_i, C_i, H_i, W_i).
        y: features of each pair, as ``x``.

    Returns:
        Flat: the (3, N_i, H_i, W_i) of each pair in turn, in float32 (float64 if one of the inputs is).
    """
    dtype = group_dtype(x, y)
    return torch.cat([cosine_sums(a.to(dtype), b.to(dtype)).flatten() for a, b in zip(x, y, strict=True)])


def cosine_sums_group_backward(grad: Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of `cosine_sums_group` with respect to each ``y``: see `cosine_sums_backward`."""
    parts = split_pairs(grad, [t.shape[0] for t in y], [t.shape[2] * t.shape[3] for t in y])
    return [
        cosine_sums_backward(part.reshape(3, b.shape[0], *b.shape[2:]), a, b)
        for part, a, b in zip(parts, x, y, strict=True)
    ]


def mined_loss(
    sums: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    alpha: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Global cosine distance of all pairs, and what its mined gradient needs.

    Args:
        sums: of `cosine_sums_group`.
        images: N of each pair.
        points: P = H * W of each pair.
        rule: one of `RULES`.
        parameter: alpha of "deviation", fraction of "hardest", exponent of "power".
        alpha: 0-dim tensor that takes the place of ``parameter`` in "deviation"; may change from call to call.
        factor: weight of the easy points ("power" has none).

    Returns:
        loss: scalar: the sum over the pairs of the mean over images of ``1 - cosine`` of the whole map.
        state: flat, for each pair: its threshold (a point with a smaller distance is easy; for "power" the mean
            distance), then the derivative of the loss by the three sums of each image, (3, N).
    """
    losses, state = [], []
    for part in split_pairs(sums, images, points):  # (3, N, P)
        whole = part.sum(2)
        xy, xx, yy = whole
        inverse = 1 / (xx.clamp_min(EPS**2).sqrt() * yy.clamp_min(EPS**2).sqrt())
        losses.append((1 - xy * inverse).mean())
        slope = torch.stack([-inverse, *(torch.where(s < EPS**2, 0, xy * inverse / (2 * s)) for s in (xx, yy))])
        state += [_threshold(1 - cosine(part), rule, parameter, alpha).reshape(1), slope.flatten() / whole.shape[1]]
    return torch.stack(losses).sum(), torch.cat(state)


def mined_loss_backward(
    grad: Tensor,
    sums: Tensor,
    state: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    factor: float,
) -> Tensor:
    """Gradient of `mined_loss` with respect to ``sums``, each point's multiplied by the weight that the rule gives it.

    Args:
        grad: gradient of the loss, a scalar.
        sums: as in `mined_loss`.
        state: of `mined_loss`.
        images: as in `mined_loss`.
        points: as in `mined_loss`.
        rule: as in `mined_loss`.
        parameter: as in `mined_loss`.
        factor: as in `mined_loss`.

    Returns:
        As ``sums``.
    """
    gradients, at = [], 0
    for part, n in zip(split_pairs(sums, images, points), images, strict=True):
        d, threshold = 1 - cosine(part), state[at]
        slope = state[at + 1 : at + 1 + 3 * n].reshape(3, n, 1)
        if rule == "power":
            some = threshold > 0
            weight = torch.where(some, (d.clamp_min(0) / torch.where(some, threshold, 1.0)) ** parameter, 1.0)
        else:
            weight = torch.ones_like(d).masked_fill_(d < threshold, factor)
        gradients.append((grad * weight * slope).flatten())
        at += 1 + 3 * n
    return torch.cat(gradients)


def split_pairs(flat: Tensor, images: Sequence[int], points: Sequence[int]) -> Iterator[Tensor]:
    """The (3, N, P) of each pair, out of a flat tensor as `cosine_sums_group` gives it."""
    sizes = [3 * n * p for n, p in zip(images, points, strict=True)]
    for part, n, p in zip(flat.split(sizes), images, points, strict=True):
        yield part.view(3, n, p)


def _threshold(d: Tensor, rule: str, parameter: float, alpha: Tensor | None) -> Tensor:
    if rule == "power":
        return d.clamp_min(0).mean()
    if rule == "hardest":
        k = max(int(d.numel() * parameter), 1)
        return d.flatten().topk(k, sorted=False).values.amin() if d.numel() else d.new_tensor(-torch.inf)
    if d.numel() < 2:  # one point has no deviation, and is not below itself
        return d.new_tensor(-torch.inf)
    return d.mean() + (parameter if alpha is None else alpha.to(d)) * d.std()


def anomaly_map(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Upsampled, summed and blurred anomaly map, and its maximum.

    Upsampling and blur are linear and separable, so that each level i needs one matrix per axis.

    Args:
        distances: point distances of the pairs, (N, h_i, w_i), floating point.
        rows: upsample-and-blur matrix of the vertical axis for each pair, (H, h_i).
        cols: the same for the horizontal axis, (W, w_i).
        scale: factor on the sum: 1, or 1 / pairs for the mean.

    Returns:
        maps: ``scale * sum_i rows_i @ distances_i @ cols_i^T``, (N, H, W), in the dtype of ``rows``.
        maximum: the largest value of each map, (N,).
    """
    maps = torch.stack([r @ d.to(r.dtype) @ c.mT for d, r, c in zip(distances, rows, cols, strict=True)]).sum(0) * scale
    return maps, maps.amax(dim=(1, 2)) if maps.numel() else maps.new_zeros(maps.shape[0])
