"""Operators ``torch.ops.recontrast.*``: schema, shape rule, gradient, kernels.

The one place where a kernel meets PyTorch. For each device the first kernel of `ORDER` that is there is used:
compiled C++/CUDA (``csrc/``), then Triton (``kernels/``), then the oracle (``reference.py``).
"""

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from recontrast import reference
from recontrast.reference import sum_dtype

SCHEMAS = {
    "cosine_sums": "(Tensor x, Tensor y) -> Tensor",
    "cosine_sums_backward": "(Tensor grad, Tensor x, Tensor y) -> Tensor",
    "anomaly_map": "(Tensor[] distances, Tensor[] rows, Tensor[] cols, float scale) -> (Tensor, Tensor)",
}
ROOM = {"cosine_sums": "cosine", "cosine_sums_backward": "cosine", "anomaly_map": "map"}  # file of kernels/
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"recontrast::{_name}", _schema)


def cosine_sums(x: Tensor, y: Tensor) -> Tensor:
    """Like `reference.cosine_sums`, in one pass over the features, in place; differentiable in both.

    Args:
        x: features, (N, C, H, W), floating point, any strides.
        y: features, (N, C, H, W), floating point, any strides; its dtype may be another one (autocast).

    Returns:
        (3, N, H, W): <x, y>, <x, x> and <y, y> over the C channels, in float32 (float64 if one of the inputs is).

    Raises:
        ValueError: shapes, devices or dtypes that do not go together.
    """
    if x.dim() != 4:
        raise ValueError(f"cosine_sums: x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.shape != y.shape:
        raise ValueError(f"cosine_sums: x {tuple(x.shape)} and y {tuple(y.shape)} differ")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"cosine_sums: x and y must be floating point, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"cosine_sums: x is on {x.device} and y on {y.device}")
    return torch.ops.recontrast.cosine_sums(x, y)


def anomaly_map(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Like `reference.anomaly_map`, in one pass: no map of a single pair is written; not differentiable.

    Args:
        distances: point distances of the pairs, (N, h_i, w_i), float32.
        rows: upsample-and-blur matrix of the vertical axis for each pair, (H, h_i), float32; mostly zero off a band.
        cols: the same for the horizontal axis, (W, w_i), float32. Pairs that name the same matrices are added first.
        scale: factor on the sum.

    Returns:
        maps: (N, H, W), float32.
        maximum: the largest value of each map, (N,), float32.

    Raises:
        ValueError: lists of different lengths, or shapes or dtypes that do not fit.
    """
    if not 0 < len(distances) == len(rows) == len(cols):
        lengths = f"{len(distances)}, {len(rows)} and {len(cols)}"
        raise ValueError(f"anomaly_map: distances, rows and cols must be lists of one length > 0, got {lengths}")
    out = (rows[0].shape[0], cols[0].shape[0])
    for i, (d, r, c) in enumerate(zip(distances, rows, cols, strict=True)):
        if d.dim() != 3 or d.shape[0] != distances[0].shape[0]:
            wanted = f"({distances[0].shape[0]}, h, w)"
            raise ValueError(f"anomaly_map: distances[{i}] must be {wanted}, got {tuple(d.shape)}")
        if r.shape != (out[0], d.shape[1]) or c.shape != (out[1], d.shape[2]):
            wanted = f"({out[0]}, {d.shape[1]}) and ({out[1]}, {d.shape[2]})"
            got = f"{tuple(r.shape)} and {tuple(c.shape)}"
            raise ValueError(f"anomaly_map: rows[{i}] and cols[{i}] must be {wanted}, got {got}")
        if any(t.dtype != torch.float32 for t in (d, r, c)):
            raise ValueError(f"anomaly_map: pair {i} must be float32, got {d.dtype}, {r.dtype} and {c.dtype}")
    return torch.ops.recontrast.anomaly_map(list(distances), list(rows), list(cols), scale)


# ---- shapes (torch.compile, torch.export) -----------------------------------


@torch.library.register_fake("recontrast::cosine_sums")
def _(x, y):
    n, _, h, w = x.shape
    return x.new_empty(3, n, h, w, dtype=sum_dtype(x, y))


@torch.library.register_fake("recontrast::cosine_sums_backward")
def _(grad, x, y):
    return torch.empty_like(y)


@torch.library.register_fake("recontrast::anomaly_map")
def _(distances, rows, cols, scale):
    n = distances[0].shape[0]
    return rows[0].new_empty(n, rows[0].shape[0], cols[0].shape[0]), rows[0].new_empty(n)


# ---- gradient ----------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, y = ctx.saved_tensors
    backward = torch.ops.recontrast.cosine_sums_backward
    # <x, y> is symmetric: swap the roles (and the two squares) to differentiate in x.
    grad_x = backward(torch.stack([grad[0], grad[2], grad[1]]), y, x) if ctx.needs_input_grad[0] else None
    grad_y = backward(grad, x, y) if ctx.needs_input_grad[1] else None
    return grad_x, grad_y


torch.library.register_autograd("recontrast::cosine_sums", _backward, setup_context=_setup_context)


# ---- kernels -----------------------------------------------------------------

ORDER = {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")}  # the first that is there runs
BACKEND = {"cpu": "torch", "cuda": "torch"}  # what each device runs
WHY: dict[str, str] = {}  # device -> why it does not run the first of its order

for _name in SCHEMAS:
    torch.library.impl(f"recontrast::{_name}", "CompositeExplicitAutograd", getattr(reference, _name))


def _native(device: str) -> str | None:
    """Register the compiled kernels of ``device``, or say why there are none."""
    library = Path(__file__).with_name(f"_{device}.so")
    if not library.exists():
        return f"{library.name} was not built (pip install -e . builds it; CUDA needs nvcc)"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built for another platform or for a newer torch
        return f"{library.name} does not load: {error.__cause__ or error}"
    return None


def _triton(device: str) -> str | None:
    """Register the Triton kernels for ``device``, or say why there are none."""
    try:
        for name, room in ROOM.items():
            kernels = importlib.import_module(f"recontrast.kernels.{room}")
            torch.library.impl(f"recontrast::{name}", device, getattr(kernels, name))
    except ImportError as error:
        return f"no Triton: {error}"
    return None


def _choose(device: str) -> None:
    reasons = []
    for backend in ORDER[device]:
        missing = {"native": _native, "triton": _triton, "torch": lambda _: None}[backend](device)
        if missing is None:
            BACKEND[device] = backend
            break
        reasons.append(missing)
    if reasons:
        WHY[device] = "; ".join(reasons)
        warnings.warn(f"recontrast runs {BACKEND[device]} kernels on {device}: {WHY[device]}", stacklevel=3)


_choose("cpu")
if torch.cuda.is_available():
    _choose("cuda")
else:
    WHY["cuda"] = "no CUDA device"
