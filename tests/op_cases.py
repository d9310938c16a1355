"""Shapes, dtypes and memory layouts that every operator is tested on."""

import torch

from recontrast import reference
from recontrast.anomaly_map import build_blur_matrix, build_upsampling_matrix

# A layer of the model, the smallest, odd everything, more channels and positions than a block, one row.
SHAPES = [(2, 64, 16, 16), (1, 1, 1, 1), (3, 5, 7, 13), (1, 70, 65, 67), (2, 4100, 2, 3), (2, 3, 1, 9)]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of a result


LAYOUTS = {
    "nchw": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "half of a batch": lambda t: torch.cat([t, t]).chunk(2)[1],
    "some channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "some channels, channels_last": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
    "shared by the batch": lambda t: t[:1].expand(t.shape),
}


def error(ours, expected):
    """Norm of the difference over the norm of what is expected."""
    return ((ours.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def anomaly_map_arguments(sizes, out, images, device, blur="reflect", dtype=torch.float32):
    rows = [(build_blur_matrix(out[0], blur) @ build_upsampling_matrix(out[0], h)).to(device, dtype) for h, _ in sizes]
    cols = [(build_blur_matrix(out[1], blur) @ build_upsampling_matrix(out[1], w)).to(device, dtype) for _, w in sizes]
    distances = [torch.rand(images, *size, device=device, dtype=dtype) for size in sizes * 2]
    return distances, rows * 2, cols * 2


RULES = [  # rule, parameter, factor
    ("deviation", -3.0, 0.0),
    ("deviation", 0.5, 0.3),
    ("deviation", 1.0, 0.0),
    ("hardest", 0.1, 0.1),
    ("hardest", 1.0, 0.0),
    ("hardest", 1e-9, 0.0),
    ("power", 3.0, 1.0),
    ("power", 0.5, 1.0),
]


# images and points of each pair: a model's, single ones, odd ones, more than a block's, none
GROUPS = {
    "levels": ([4, 4, 4], [256, 64, 16]),
    "one point": ([1], [1]),
    "odd": ([3, 1, 2], [91, 1, 1300]),
    "many": ([2, 40], [5003, 7]),
    "nothing": ([0, 2, 3], [4, 0, 5]),
}


def features(shapes, dtype=torch.float32, device="cpu", layout="nchw", other=None, **kwargs):
    """Lists of teachers and students; students that resemble them here more, there less."""
    x = [torch.randn(shape, device=device) for shape in shapes]
    y = [t + torch.randn_like(t) * (3 * torch.rand_like(t[:, :1])) for t in x]
    lists = [[LAYOUTS[layout](t.to(d)) for t in ts] for ts, d in ((x, dtype), (y, other or dtype))]
    return [[t.requires_grad_() for t in ts] for ts in lists] if kwargs else lists


def random_sums(images, points, dtype, device):
    """Flat sums of random features of 8 channels, float64 beside ``dtype``."""
    parts = []
    for n, p in zip(images, points, strict=True):
        x = torch.randn(n, 8, p, 1, dtype=torch.float64)
        y = x + torch.randn_like(x) * 2 * torch.rand(n, 1, p, 1, dtype=torch.float64)
        parts.append(reference.cosine_sums(x, y).flatten())
    sums = torch.cat(parts).to(device, dtype)
    return sums, sums.double()


def far_points(sums, state, images, points, band):
    """Flat mask of the points that are not so near their threshold that rounding decides."""
    far, at = [], 0
    for part, n in zip(reference.split_pairs(sums, images, points), images, strict=True):
        keep = (1 - reference.cosine(part) - state[at]).abs() > band
        far.append(keep.expand_as(part).flatten())
        at += 1 + 3 * n
    return torch.cat(far)
