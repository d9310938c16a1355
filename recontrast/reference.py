"""Reference implementation of every kernel in plain PyTorch.

Clarity comes before speed. The tests compare each kernel with these functions, the operators use them where no kernel
is available, and they document what the kernels compute.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

EPS = 1e-8
"""Minimum norm of a feature vector in a cosine, as in torch.nn.CosineSimilarity, which upstream uses."""
ACTIVATIONS = ("none", "relu", "gelu")
"""Activations of `norm_act`."""
RULES = ("deviation", "hardest", "power")  # of `mined_loss`; see recontrast/mining.py


def sum_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype of sums of two tensors: float64 if one of them is, otherwise float32."""
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def group_dtype(x: Sequence[Tensor], y: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of sums of a group of pairs: float64 if one of the tensors is, otherwise float32."""
    wide = any(t.dtype == torch.float64 for t in (*x, *y))
    return torch.float64 if wide else torch.float32


def cosine(sums: Tensor) -> Tensor:
    """Compute the cosine from `cosine_sums` as torch.nn.CosineSimilarity does; norms below `EPS` count as `EPS`.

    A sum of squares that overflows to infinity makes the cosine NaN: its value is not known. In float32 this begins
    with features of about 1e19.

    Args:
        sums: <x, y>, <x, x> and <y, y>, (3, ...), floating point.

    Returns:
        Cosine in [-1, 1] (up to rounding), flat or (N, H, W): the shape of ``sums`` without its first axis, in the same
        dtype. NaN where a sum is NaN or infinite.
    """
    return sums[0] / multiply_norms(sums)


def multiply_norms(sums: Tensor) -> Tensor:
    """Compute the product of the norms of x and y, each at least `EPS`; NaN where a sum of squares is infinite.

    Args:
        sums: <x, y>, <x, x> and <y, y>, (3, ...), floating point.

    Returns:
        Products in the shape of ``sums`` without its first axis, in the same dtype.
    """
    x_norm, y_norm = sums[1:].clamp_min(EPS**2).sqrt()
    product = x_norm * y_norm
    return torch.where(product < torch.inf, product, torch.nan)


def cosine_sums(x: Tensor, y: Tensor) -> Tensor:
    """Compute the three sums over the channels from which the cosine of ``x`` and ``y`` follows.

    Args:
        x: Features (N, C, H, W), floating point.
        y: Features (N, C, H, W), floating point. The dtype can differ from that of ``x`` (autocast).

    Returns:
        Sums (3, N, H, W): <x, y>, <x, x> and <y, y> over the C channels, float32 (float64 if one of the inputs is).
    """
    dtype = sum_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    return torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)])


def cosine_sums_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Compute the gradient of `cosine_sums` with respect to ``y``.

    Positions whose gradients of <x, y> and <y, y> are zero get zero. In channels_last their features are not read.

    Args:
        grad: Gradient of the sums, (3, N, H, W).
        x: Features (N, C, H, W).
        y: Features (N, C, H, W).

    Returns:
        Gradient (N, C, H, W), in the dtype and memory layout of ``y``.
    """
    g_xy, _, g_yy = grad.unsqueeze(2)  # each (N, 1, H, W)
    gradient = torch.where((g_xy == 0) & (g_yy == 0), 0.0, g_xy * x + 2 * g_yy * y)
    return torch.empty_like(y).copy_(gradient)


def cosine_sums_group(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Compute `cosine_sums` of many pairs.

    Args:
        x: Features of each pair, (N_i, C_i, H_i, W_i).
        y: Features of each pair, in the shapes of ``x``.

    Returns:
        Flat tensor with the (3, N_i, H_i, W_i) sums of each pair in turn, float32 (float64 if one of the inputs is).
    """
    dtype = group_dtype(x, y)
    return torch.cat([cosine_sums(a.to(dtype), b.to(dtype)).flatten() for a, b in zip(x, y, strict=True)])


def cosine_sums_group_backward(grad: Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """Compute the gradient of `cosine_sums_group` with respect to each ``y``, see `cosine_sums_backward`."""
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
    """Compute the global cosine distance of all pairs, and the values that its mined gradient needs.

    Args:
        sums: Result of `cosine_sums_group`.
        images: Number of images N of each pair.
        points: Number of points P = H * W of each pair.
        rule: One of `RULES`.
        parameter: Alpha of "deviation", fraction of "hardest", or exponent of "power".
        alpha: 0-dim tensor that replaces ``parameter`` in "deviation" and can change between calls.
        factor: Weight of the easy points (not used by "power").

    Returns:
        loss: Scalar, the sum over the pairs of the mean over images of ``1 - cosine`` of the whole map.
        state: Flat tensor with, for each pair, its threshold (points with a smaller distance are easy; for "power" the
            mean distance), then the derivatives of the loss with respect to the three sums of each image, (3, N).
    """
    return _combine_pairs(split_pairs(sums, images, points), [None] * len(images), rule, parameter, alpha)


def mined_loss_inside(
    sums: Tensor,
    inside: Tensor,
    shared: bool,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    alpha: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Compute `mined_loss` of the points inside a region of interest: what the others hold has no effect.

    The cosine of an image is that of its points inside as one vector, and the rule sees their distances alone. An image
    without points inside adds 0 to the loss, and counts as an image.

    Args:
        sums: Result of `cosine_sums_group`.
        inside: Flat bool tensor, whether each point is inside: P points of each pair that all its images share, or
            N * P points.
        shared: Whether the images of a pair share their points.
        images: Number of images N of each pair.
        points: Number of points P = H * W of each pair.
        rule: One of `RULES`.
        parameter: Alpha of "deviation", fraction of "hardest", or exponent of "power".
        alpha: 0-dim tensor that replaces ``parameter`` in "deviation" and can change between calls.
        factor: Weight of the easy points (not used by "power").

    Returns:
        loss: Scalar, see `mined_loss`.
        state: Flat tensor, see `mined_loss`.
    """
    masks = list(split_inside(inside, shared, images, points))
    parts = (torch.where(mask, part, 0) for part, mask in zip(split_pairs(sums, images, points), masks, strict=True))
    return _combine_pairs(parts, masks, rule, parameter, alpha)


def _combine_pairs(
    parts: Iterable[Tensor], masks: Sequence[Tensor | None], rule: str, parameter: float, alpha: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute loss and state from the sums (3, N, P) of each pair, which are 0 outside its mask (N, P)."""
    losses, state = [], []
    for part, mask in zip(parts, masks, strict=True):
        whole = part.sum(2)
        xy, xx, yy = whole
        inverse = 1 / multiply_norms(whole)
        loss, d = 1 - xy * inverse, 1 - cosine(part)
        slope = torch.stack([-inverse, *(torch.where(s < EPS**2, 0, xy * inverse / (2 * s)) for s in (xx, yy))])
        if mask is not None:
            has_points = mask.any(dim=1)
            loss, slope, d = torch.where(has_points, loss, 0), torch.where(has_points, slope, 0), d[mask]
        losses.append(loss.mean())
        threshold = _compute_threshold(d, rule, parameter, alpha)
        state += [threshold.reshape(1), slope.flatten() / whole.shape[1]]
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
    """Compute the gradient of `mined_loss` with respect to ``sums``, with each point weighted by the rule.

    Args:
        grad: Gradient of the loss, a scalar.
        sums: Result of `cosine_sums_group`.
        state: State from `mined_loss`.
        images: Number of images of each pair.
        points: Number of points of each pair.
        rule: One of `RULES`.
        parameter: Exponent of "power", not used by the other rules.
        factor: Weight of the easy points.

    Returns:
        Gradient in the shape of ``sums``.
    """
    return _compute_gradients(grad, sums, [None] * len(images), state, images, points, rule, parameter, factor)


def mined_loss_inside_backward(
    grad: Tensor,
    sums: Tensor,
    inside: Tensor,
    shared: bool,
    state: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    factor: float,
) -> Tensor:
    """Compute the gradient of `mined_loss_inside` with respect to ``sums``: as `mined_loss_backward`, 0 outside.

    Args:
        grad: Gradient of the loss, a scalar.
        sums: Result of `cosine_sums_group`.
        inside: Flat bool tensor, see `mined_loss_inside`.
        shared: Whether the images of a pair share their points.
        state: State from `mined_loss_inside`.
        images: Number of images of each pair.
        points: Number of points of each pair.
        rule: One of `RULES`.
        parameter: Exponent of "power", not used by the other rules.
        factor: Weight of the easy points.

    Returns:
        Gradient in the shape of ``sums``.
    """
    masks = list(split_inside(inside, shared, images, points))
    return _compute_gradients(grad, sums, masks, state, images, points, rule, parameter, factor)


def _compute_gradients(
    grad: Tensor,
    sums: Tensor,
    masks: Sequence[Tensor | None],
    state: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    factor: float,
) -> Tensor:
    """Compute the gradient of the sums, 0 outside the mask (N, P) of each pair."""
    gradients, offset = [], 0
    for part, mask, n in zip(split_pairs(sums, images, points), masks, images, strict=True):
        d, threshold = 1 - cosine(part), state[offset]
        slope = state[offset + 1 : offset + 1 + 3 * n].reshape(3, n, 1)
        if rule == "power":
            is_positive = threshold > 0
            relative = d.clamp_min(0) / torch.where(is_positive, threshold, 1.0)
            weight = torch.where(is_positive, relative**parameter, 1.0)
        else:
            weight = torch.ones_like(d).masked_fill_(d < threshold, factor)
        gradient = grad * weight * slope
        gradients.append((gradient if mask is None else torch.where(mask, gradient, 0)).flatten())
        offset += 1 + 3 * n
    return torch.cat(gradients)


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute BatchNorm, an optional residual add and an activation, in float32 (float64 for float64 features).

    With a residual, the norm is rounded to the dtype of the features before the add, as by three layers of PyTorch, so
    that a network keeps its scores in bfloat16.

    Args:
        x: Features (N, C, H, W), floating point.
        residual: Features to add before the activation, in the shape and dtype of ``x``; None adds nothing.
        weight: Scale of each channel (C,); None is 1.
        bias: Offset of each channel (C,); None is 0.
        mean: Mean of each channel (C,); None takes mean and variance of the batch.
        var: Biased variance of each channel (C,); None where ``mean`` is None.
        act: One of `ACTIVATIONS`.
        eps: Constant added to the variance.

    Returns:
        y: ``act((x - mean) / sqrt(var + eps) * weight + bias + residual)``, in the shape, dtype and layout of ``x``.
        moments: The mean and the biased variance that were used, (2, C), float32 or float64.
    """
    wide = x.to(sum_dtype(x, x))
    if mean is None or var is None:
        moments = wide.new_zeros(2, x.shape[1])
        if x.numel():
            moments = torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0)[::-1])
    else:
        moments = torch.stack([mean.to(wide), var.to(wide)])
    y = _normalise(wide, residual, weight, bias, moments, eps)
    y = y.relu() if act == "relu" else torch.nn.functional.gelu(y) if act == "gelu" else y
    return torch.empty_like(x).copy_(y), moments


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    training: bool,
    act: str,
    eps: float,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `norm_act`.

    Args:
        grad: Gradient of y, (N, C, H, W).
        x: Features (N, C, H, W).
        kept: With a residual, the output y for "relu" and the residual for "gelu"; otherwise None.
        weight: Scale of each channel (C,), or None.
        bias: Offset of each channel (C,), or None.
        moments: Moments from `norm_act`, (2, C).
        training: Whether the moments are those of the batch, and have a gradient in x too.
        act: One of `ACTIVATIONS`.
        eps: Constant added to the variance.
        wants_x: Whether the gradient in x is needed.

    Returns:
        grad_x: Gradient in x, in its dtype and layout; empty if it is not needed.
        grad_residual: Gradient in the residual; empty unless ``kept`` is given and ``act`` is not "none".
        sums: Gradients in bias and weight, (2, C), in the dtype of ``moments``.
    """
    wide, g = x.to(moments), grad.to(moments)
    if act == "relu":
        gate = _normalise(wide, None, weight, bias, moments, eps) if kept is None else kept
        g = torch.where(gate <= 0, 0.0, g)
    elif act == "gelu":
        g = torch.ops.aten.gelu_backward(g, _normalise(wide, kept, weight, bias, moments, eps))
    unit = _normalise(wide, None, None, None, moments, eps)
    sums = torch.stack([g.sum((0, 2, 3)), (g * unit).sum((0, 2, 3))])
    grad_x, grad_residual = x.new_empty(0), x.new_empty(0)
    if kept is not None and act != "none":
        grad_residual = torch.empty_like(x).copy_(g)
    if wants_x:
        if training:
            by_bias, by_weight = sums[:, :, None, None] / max(x.numel() // max(x.shape[1], 1), 1)
            g = g - by_bias - unit * by_weight
        scale = (moments[1] + eps).rsqrt() * (1 if weight is None else weight.to(moments))
        grad_x = torch.empty_like(x).copy_(g * scale[:, None, None])
    return grad_x, grad_residual, sums


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, moments: Tensor, eps: float
) -> Tensor:
    """Compute the input of the activation, in the dtype of ``x``."""
    scale = (moments[1] + eps).rsqrt() * (1 if weight is None else weight.to(x))
    y = (x - moments[0, :, None, None]) * scale[:, None, None]
    y = y if bias is None else y + bias.to(x)[:, None, None]
    return y if residual is None else y.to(residual.dtype) + residual.to(y)


def split_pairs(flat: Tensor, images: Sequence[int], points: Sequence[int]) -> Iterator[Tensor]:
    """Yield the (3, N, P) sums of each pair from a flat tensor of `cosine_sums_group`."""
    sizes = [3 * n * p for n, p in zip(images, points, strict=True)]
    for part, n, p in zip(flat.split(sizes), images, points, strict=True):
        yield part.view(3, n, p)


def split_inside(inside: Tensor, shared: bool, images: Sequence[int], points: Sequence[int]) -> Iterator[Tensor]:
    """Yield the mask (N, P) of each pair from the flat one of `mined_loss_inside`."""
    sizes = [p if shared else n * p for n, p in zip(images, points, strict=True)]
    for part, n, p in zip(inside.split(sizes), images, points, strict=True):
        yield part.view(1 if shared else n, p).expand(n, p)


def _compute_threshold(d: Tensor, rule: str, parameter: float, alpha: Tensor | None) -> Tensor:
    if rule == "power":
        return d.clamp_min(0).mean()
    if rule == "hardest":
        k = max(int(d.numel() * parameter), 1)
        # NaN counts as the largest, as in the kernels: the smallest of the k would be NaN.
        return d.flatten().topk(k).values[-1] if d.numel() else d.new_tensor(-torch.inf)
    if d.numel() < 2:  # a single point has no standard deviation
        return d.new_tensor(-torch.inf)
    return d.mean() + (parameter if alpha is None else alpha.to(d)) * d.std()


def anomaly_map(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the upsampled, summed and blurred anomaly map, and its maximum.

    Upsampling and blur are linear and separable, so that each pair i needs one matrix per axis.

    Args:
        distances: Point distances of each pair, (N, h_i, w_i), floating point.
        rows: Upsample-and-blur matrix of the vertical axis for each pair, (H, h_i).
        cols: Upsample-and-blur matrix of the horizontal axis for each pair, (W, w_i).
        scale: Factor on the sum: 1, or 1 / pairs for the mean.

    Returns:
        maps: ``scale * sum_i rows_i @ distances_i @ cols_i^T``, (N, H, W), in the dtype of ``rows``.
        maximum: Largest value of each map, (N,); NaN if a value is NaN or infinite.
    """
    maps = torch.stack([r @ d.to(r.dtype) @ c.mT for d, r, c in zip(distances, rows, cols, strict=True)]).sum(0) * scale
    return maps, compute_maximum(maps)


def anomaly_map_inside(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], factors: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `anomaly_map` in a region of interest, whose pixels renormalise each pair by factors of their own.

    Args:
        distances: Point distances of each pair, (N, h_i, w_i), floating point; 0 outside.
        rows: Upsample-and-blur matrix of the vertical axis for each pair, (H, h_i).
        cols: Upsample-and-blur matrix of the horizontal axis for each pair, (W, w_i).
        factors: Factors of the pixels for each pair, (N, H, W), or (1, H, W) for all images. A pixel whose first factor
            is 0 is outside.
        scale: Factor on the sum.

    Returns:
        maps: ``scale * sum_i factors_i * (rows_i @ distances_i @ cols_i^T)``, (N, H, W), and 0 outside, in the dtype of
            ``rows``.
        maximum: Largest value inside of each map, (N,): NaN if a value inside is NaN or infinite, 0 without pixels
            inside.
    """
    parts = []
    for d, r, c, f in zip(distances, rows, cols, factors, strict=True):
        # Products with 0 spread NaN and infinity, so that points which reach no pixel inside are left out.
        reach = (r != 0).to(r.dtype).mT @ (factors[0] != 0).to(r.dtype) @ (c != 0).to(r.dtype)
        parts.append(f * (r @ torch.where(reach > 0, d.to(r.dtype), 0) @ c.mT))
    maps = torch.stack(parts).sum(0) * scale
    inside = (factors[0] != 0).expand(maps.shape)
    maps = torch.where(inside, maps, 0)
    if not maps.numel():
        return maps, maps.new_zeros(maps.shape[0])
    highest = torch.where(inside, maps, -torch.inf).amax(dim=(1, 2))
    return maps, void_unless_finite(torch.where(inside.flatten(1).any(1), highest, 0), maps)


def compute_maximum(maps: Tensor) -> Tensor:
    """Compute the largest value of each map.

    Args:
        maps: Anomaly maps (N, H, W), floating point.

    Returns:
        Maxima (N,), in the same dtype: NaN if a value is NaN or infinite, 0 for maps without pixels.
    """
    if not maps.numel():
        return maps.new_zeros(maps.shape[0])
    return void_unless_finite(maps.amax(dim=(1, 2)), maps)


def void_unless_finite(scores: Tensor, maps: Tensor) -> Tensor:
    """Replace the score of each map that holds a NaN or an infinity by NaN.

    Args:
        scores: Scores (N,), floating point.
        maps: Anomaly maps (N, H, W), floating point.

    Returns:
        Scores (N,), in the same dtype.
    """
    return torch.where(torch.isfinite(maps).flatten(1).all(dim=1), scores, torch.nan)
