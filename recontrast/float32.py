"""Precision of float32 convolutions and matrix products on devices that have TF32, with the API of any torch.

TF32 keeps 10 bits of the mantissa and runs on the tensor cores of NVIDIA GPUs since Ampere; on other devices the
settings have no effect. They apply to all threads of the process.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# torch 2.9 replaced allow_tf32 by fp32_precision; reading the old setting after writing the new one is an error.
_HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_ATTRIBUTE = "fp32_precision" if _HAS_FP32_PRECISION else "allow_tf32"
_FULL, _TF32 = ("ieee", "tf32") if _HAS_FP32_PRECISION else (False, True)
_Backend = Any  # torch has no type for these objects


def _convolutions() -> _Backend:
    return torch.backends.cudnn.conv if _HAS_FP32_PRECISION else torch.backends.cudnn  # type: ignore[attr-defined]


def _matrix_products() -> Sequence[_Backend]:
    products = [torch.backends.cuda.matmul]
    if _HAS_FP32_PRECISION:
        products.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return products


@contextmanager
def convolution_precision(tf32: bool) -> Iterator[None]:
    """Set the precision of float32 convolutions within a block, and restore the previous setting afterwards.

    Matrix products are not affected (full float32 by default), nor are the cosine sums, the loss and the anomaly map.

    Args:
        tf32: Whether to use TF32 instead of full float32.
    """
    with _set([_convolutions()], _TF32 if tf32 else _FULL):
        yield


@contextmanager
def full_matrix_products() -> Iterator[None]:
    """Use full float32 for matrix products within a block; do nothing while a function is compiled."""
    if torch.compiler.is_compiling():
        yield
        return
    if not _HAS_FP32_PRECISION:  # allow_tf32 would turn "medium" into "high"
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    with _set(_matrix_products(), _FULL):
        yield


def describe_precision() -> str:
    """Describe the present settings of CUDA: "convolutions TF32, matrix products full"."""
    kinds = {"convolutions": _convolutions(), "matrix products": _matrix_products()[0]}
    return ", ".join(
        f"{name} {'TF32' if getattr(kind, _ATTRIBUTE) == _TF32 else 'full'}" for name, kind in kinds.items()
    )


@contextmanager
def _set(backends: Sequence[_Backend], value: str | bool) -> Iterator[None]:
    before = [getattr(backend, _ATTRIBUTE) for backend in backends]
    for backend in backends:
        setattr(backend, _ATTRIBUTE, value)
    try:
        yield
    finally:
        for backend, previous in zip(backends, before, strict=True):
            setattr(backend, _ATTRIBUTE, previous)
