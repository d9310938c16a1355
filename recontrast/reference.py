"""The oracle: every kernel in this package, written in plain PyTorch.

Nothing here is fast; everything here is obviously right. The functions serve
three readers: the tests compare each kernel with them, the dispatcher falls
back to them where no kernel is built, and a person reads them to learn what a
kernel computes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype in which features are summed: float64 if one of them is, else float32."""
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


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
