"""PIL's antialiased bilinear resize as two matrix products, to the bit, from whole numbers and stock operators alone.

Pillow weights pixels by a triangle as wide as the scale (no narrower than 2 pixels), rounds each weight to a multiple
of 2**-22, adds in whole numbers and rounds to 8 bits, after the horizontal and again after the vertical pass (Pillow,
src/libImaging/Resample.c). The stock resize of ONNX and OpenVINO does none of it, and float32 does not hold such sums.
Here a weight is the ratio n / S of two whole numbers, whose 22 binary digits come from long division in int32, which
every runtime computes as such (OpenVINO turns int64 into int32 and float64 into float32). It is split into two digits,
hi * 2**11 + lo with lo from -1024 to 1023, and a pixel into 128 + p: these, and sums up to 2**24, are exact in float32
and in TF32.

Pillow divides in float64. The two agree because n * 2**22 / S is never half-way between two whole numbers where
S < 2**23, and else at least 1 / (2 S) away. `max_exact_length` says up to which size all of this holds.
"""

import math

import torch
from torch import Tensor, nn

DIGIT = 2048  # 2**11: two digits are the 22 bits of a weight in Pillow, 32 - 8 of a pixel - 2
STEPS = (64, 64, 32, 32)  # powers of 2 that make 2**22; a remainder times 64 is an int32 while S < 2**25
MAX_REDUCTION = 60  # times smaller: with more, the sum of lo * p might pass 2**24


def max_exact_length(out: int) -> int:
    """Pixels of the longest axis that becomes one of ``out`` exactly as with Pillow: 15,360 for 256."""
    return min(MAX_REDUCTION * out, math.isqrt(2**22 * out))


def compute_coefficients(length: int, out: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Weights of the pixels of an axis for each pixel of the result, in units of 2**-22.

    Args:
        length: pixels of the axis.
        out: pixels of the result.
        device: where to compute.

    Returns:
        digits: (2 out, length), float32 whole numbers: hi of all rows, then lo; a weight is ``hi * DIGIT + lo``.
        offset: (out, 2), float32: what the sums of hi * p and lo * p lack for p + 128, and for the rounding.
    """
    at = torch.arange(out, dtype=torch.int32, device=device).unsqueeze(1)
    pixel = torch.arange(length, dtype=torch.int32, device=device).unsqueeze(0)
    size = torch.full((1, 1), length, dtype=torch.int32, device=device)
    # Distance of two centres and half the width of the triangle, both in 1 / (2 out) of a pixel.
    distance = ((2 * pixel + 1) * out - (2 * at + 1) * size).abs()
    remainder = (2 * size.clamp(min=out) - distance).clamp(min=0)
    total = remainder.sum(1, keepdim=True, dtype=torch.int32)
    weight = torch.zeros_like(remainder)
    for step in STEPS:
        dividend = remainder * step
        quotient = (dividend.float() / total.float()).to(torch.int32)  # at most 64: off by 1 at most, and mended
        rest = dividend - quotient * total
        mend = (rest >= total).to(torch.int32) - (rest < 0).to(torch.int32)
        weight = weight * step + quotient + mend
        remainder = rest - mend * total
    weight = weight + (2 * remainder >= total).to(torch.int32)
    whole = weight.float()  # at most 2**22
    hi = torch.floor((whole + DIGIT // 2) / DIGIT)
    lo = whole - hi * DIGIT
    low = 128 * lo.sum(1)
    carry = torch.floor(low / DIGIT)
    return torch.cat([hi, lo]), torch.stack([128 * hi.sum(1) + DIGIT // 2 + carry, low - carry * DIGIT], 1)


def _levels(high: Tensor, low: Tensor) -> Tensor:
    """``(high * DIGIT + low) >> 22``, clipped to 8 bits."""
    return torch.floor((high + torch.floor(low / DIGIT)) / DIGIT).clamp(0, 255)


def _across(pixels: Tensor, digits: Tensor, offset: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 3, H, out), whole numbers from 0 to 255, with the coefficients of the horizontal axis."""
    sums, out = (pixels - 128) @ digits.mT, offset.shape[0]
    return _levels(sums[..., :out] + offset[:, 0], sums[..., out:] + offset[:, 1])


def _down(pixels: Tensor, digits: Tensor, offset: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 3, out, W), whole numbers from 0 to 255, with the coefficients of the vertical axis."""
    sums, out = digits @ (pixels - 128), offset.shape[0]
    return _levels(sums[..., :out, :] + offset[:, :1], sums[..., out:, :] + offset[:, 1:])


class PillowResize(nn.Module):
    """Images of any size to ``out``, as `recontrast.data.images.read_image` has it.

    Args:
        out: height and width in pixels.
    """

    def __init__(self, out: tuple[int, int]) -> None:
        super().__init__()
        self.out = out

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 to (N, 3, *out) float32 whole numbers from 0 to 255."""
        (height, width), where = self.out, images.device
        high, wide = images.shape[1:3]
        across = _across(images.permute(0, 3, 1, 2).float(), *compute_coefficients(wide, width, where))
        return _down(across, *compute_coefficients(high, height, where))
