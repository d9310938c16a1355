"""Shapes, dtypes and memory layouts that every operator is tested on."""

import torch

from recontrast import reference
from recontrast.anomaly_map import build_blur_matrix, build_upsampling_matrix

# A layer of the model, the smallest size, odd sizes, more positions and more channels than a block, a single row.
SHAPES = [(2, 64, 16, 16), (1, 1, 1, 1), (3, 5, 7, 13), (1, 70, 65, 67), (2, 4100, 2, 3), (2, 3, 1, 9)]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


ROUNDING = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}  # relative


LAYOUTS = {
    "nchw": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch slice": lambda t: torch.cat([t, t]).chunk(2)[1],
    "channel slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "channel slice, channels_last": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
    "broadcast over the batch": lambda t: t[:1].expand(t.shape),
}


def relative_error(result, expected):
    """Norm of the difference, divided by the norm of ``expected``."""
    return ((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def make_anomaly_map_arguments(sizes, out, images, device, blur="reflect", dtype=torch.float32):
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


# Images and points of each pair: as in a model, a single point, odd numbers, more than a block, and none.
GROUPS = {
    "levels": ([4, 4, 4], [256, 64, 16]),
    "one point": ([1], [1]),
    "odd": ([3, 1, 2], [91, 1, 1300]),
    "many": ([2, 40], [5003, 7]),
    "empty": ([0, 2, 3], [4, 0, 5]),
}


def make_features(shapes, dtype=torch.float32, device="cpu", layout="nchw", other=None, **kwargs):
    """Make lists of teachers and students, whose similarity differs between positions."""
    x = [torch.randn(shape, device=device) for shape in shapes]
    y = [t + torch.randn_like(t) * (3 * torch.rand_like(t[:, :1])) for t in x]
    lists = [[LAYOUTS[layout](t.to(d)) for t in ts] for ts, d in ((x, dtype), (y, other or dtype))]
    return [[t.requires_grad_() for t in ts] for ts in lists] if kwargs else lists


def make_sums(images, points, dtype, device):
    """Make flat sums of random features with 8 channels, in ``dtype`` and in float64."""
    parts = []
    for n, p in zip(images, points, strict=True):
        x = torch.randn(n, 8, p, 1, dtype=torch.float64)
        y = x + torch.randn_like(x) * 2 * torch.rand(n, 1, p, 1, dtype=torch.float64)
        parts.append(reference.cosine_sums(x, y).flatten())
    sums = torch.cat(parts).to(device, dtype)
    return sums, sums.double()


def make_inside(images, points, shared, device, share=0.6):
    """Make the flat mask of a random region, in which one image has no point inside and one has all."""
    sizes = [p if shared else n * p for n, p in zip(images, points, strict=True)]
    inside = torch.rand(sum(sizes), device=device) < share
    if not shared and images[0] > 1:
        inside[: points[0]] = False
        inside[points[0] : 2 * points[0]] = True
    return inside


def find_far_points(sums, state, images, points, band):
    """Return a flat mask of the points whose distance differs from the threshold by more than ``band``."""
    far, offset = [], 0
    for part, n in zip(reference.split_pairs(sums, images, points), images, strict=True):
        keep = (1 - reference.cosine(part) - state[offset]).abs() > band
        far.append(keep.expand_as(part).flatten())
        offset += 1 + 3 * n
    return torch.cat(far)
