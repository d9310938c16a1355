"""Pillow's antialiased bilinear resize as two matrix products of standard operators, bit-identical to Pillow.

Pillow weights pixels by a triangle as wide as the scale (at least 2 pixels), rounds each weight to a multiple of
2**-22, adds integers and rounds to 8 bits, first in the horizontal and then in the vertical pass (Pillow,
src/libImaging/Resample.c). The resize operators of ONNX and OpenVINO round differently, and float32
cannot represent such sums.

Here, a weight is the ratio n / S of two integers. Its 22 binary digits come from long division in int32, which every
runtime computes exactly (OpenVINO converts int64 to int32 and float64 to float32). The weight is split into two digits,
hi * 2**11 + lo with lo from -1024 to 1023, and a pixel into 128 + p. These numbers, and sums up to 2**24, are exact in
float32 and in TF32.

Pillow divides in float64. Both results agree, because n * 2**22 / S is never exactly half-way between two integers for
S < 2**23, but at least 1 / (2 S) away from it. `recontrast.data.exact_length` has the size up to which this holds.
"""

import torch
from torch import Tensor, nn

DIGIT = 2048  # 2**11: two digits hold the 22 bits of a weight in Pillow (32 bits, less 8 for a pixel and 2 to spare)
STEPS = (64, 64, 32, 32)  # factors of 2**22; a remainder times 64 fits into an int32 while S < 2**25


def compute_coefficients(length: int, out: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Compute the interpolation weights of an axis, in units of 2**-22.

    Args:
        length: Length of the axis, in pixels.
        out: Length of the resized axis, in pixels.
        device: Device of the result.

    Returns:
        digits: (2 out, length) float32, integers: hi of all rows, then lo of all rows; a weight is
            ``hi * DIGIT + lo``.
        offset: (out, 2) float32: constants added to the sums of hi * p and of lo * p, to account for the 128 in 128 + p
            and for rounding.
    """
    remainder = _compute_triangles(length, out, device)
    total = remainder.sum(1, keepdim=True, dtype=torch.int32)
    weight = torch.zeros_like(remainder)
    for step in STEPS:
        dividend = remainder * step
        quotient = (dividend.float() / total.float()).to(torch.int32)  # at most 64; off by at most 1, corrected below
        rest = dividend - quotient * total
        correction = (rest >= total).to(torch.int32) - (rest < 0).to(torch.int32)
        weight = weight * step + quotient + correction
        remainder = rest - correction * total
    weight = weight + (2 * remainder >= total).to(torch.int32)
    whole = weight.float()  # at most 2**22
    hi = torch.floor((whole + DIGIT // 2) / DIGIT)
    lo = whole - hi * DIGIT
    low = 128 * lo.sum(1)
    carry = torch.floor(low / DIGIT)
    return torch.cat([hi, lo]), torch.stack([128 * hi.sum(1) + DIGIT // 2 + carry, low - carry * DIGIT], 1)


def _compute_triangles(length: int, out: int, device: torch.device | None) -> Tensor:
    """Compute how much of each pixel goes into each resized pixel, (out, length) int32, up to a factor for each row."""
    at = torch.arange(out, dtype=torch.int32, device=device).unsqueeze(1)
    pixel = torch.arange(length, dtype=torch.int32, device=device).unsqueeze(0)
    size = torch.full((1, 1), length, dtype=torch.int32, device=device)
    # Distance between pixel centres, and half the width of the triangle, both in units of 1 / (2 out) pixels.
    distance = ((2 * pixel + 1) * out - (2 * at + 1) * size).abs()
    return (2 * size.clamp(min=out) - distance).clamp(min=0)


def _round_to_levels(high: Tensor, low: Tensor) -> Tensor:
    """Return ``(high * DIGIT + low) >> 22``, clipped to 8 bits."""
    return torch.floor((high + torch.floor(low / DIGIT)) / DIGIT).clamp(0, 255)


def _resize_width(pixels: Tensor, digits: Tensor, offset: Tensor) -> Tensor:
    """Resize (N, 3, H, W) to (N, 3, H, out), integers from 0 to 255, with the coefficients of the horizontal axis."""
    sums, out = (pixels - 128) @ digits.mT, offset.shape[0]
    return _round_to_levels(sums[..., :out] + offset[:, 0], sums[..., out:] + offset[:, 1])


def _resize_height(pixels: Tensor, digits: Tensor, offset: Tensor) -> Tensor:
    """Resize (N, 3, H, W) to (N, 3, out, W), integers from 0 to 255, with the coefficients of the vertical axis."""
    sums, out = digits @ (pixels - 128), offset.shape[0]
    return _round_to_levels(sums[..., :out, :] + offset[:, :1], sums[..., out:, :] + offset[:, 1:])


def _compute_weights(length: int, out: int, device: torch.device) -> Tensor:
    """Compute the interpolation weights of an axis, (out, length) float32."""
    weight = _compute_triangles(length, out, device).float()
    return weight / weight.sum(1, keepdim=True)


class _Resize(nn.Module):
    """A resize to ``out`` by weights along both axes, which are computed once if all images have the ``size``."""

    def __init__(self, out: tuple[int, int], size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.out, self.is_fixed = out, size is not None
        if size is not None:
            for axis, (length, resized) in enumerate(zip(size, out, strict=True)):
                for part, values in enumerate(self._weigh(length, resized, torch.device("cpu"))):
                    self.register_buffer(f"axis{axis}_{part}", values, persistent=False)

    def _weigh(self, length: int, out: int, device: torch.device) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _weigh_axis(self, axis: int, images: Tensor) -> list[Tensor]:
        if self.is_fixed:
            return [values for name, values in self.named_buffers() if name.startswith(f"axis{axis}_")]
        return list(self._weigh(images.shape[1 + axis], self.out[axis], images.device))


class FloatResize(_Resize):
    """Resize float images to ``out`` as `recontrast.data.images.read_image` does with a window, but for rounding.

    Args:
        out: Height and width of the result, in pixels.
        size: Height and width of all images, for which the weights are computed once; None for images of any size.
    """

    def _weigh(self, length: int, out: int, device: torch.device) -> tuple[Tensor, ...]:
        return (_compute_weights(length, out, device),)

    def forward(self, images: Tensor) -> Tensor:
        """Resize images.

        Args:
            images: (N, H, W, 3) float32 in [0, 1].

        Returns:
            (N, 3, *out) float32 in [0, 1].
        """
        (rows,), (columns,) = self._weigh_axis(0, images), self._weigh_axis(1, images)
        return (rows @ (images.permute(0, 3, 1, 2) @ columns.mT)).clamp(0, 1)


class PillowResize(_Resize):
    """Resize images to ``out``, bit-identical to `recontrast.data.images.read_image`.

    Args:
        out: Height and width of the result, in pixels.
        size: Height and width of all images, for which the weights are computed once; None for images of any size.
    """

    def _weigh(self, length: int, out: int, device: torch.device) -> tuple[Tensor, ...]:
        return compute_coefficients(length, out, device)

    def forward(self, images: Tensor) -> Tensor:
        """Resize images.

        Args:
            images: (N, H, W, 3) uint8.

        Returns:
            (N, 3, *out) float32, integers from 0 to 255.
        """
        rows, columns = self._weigh_axis(0, images), self._weigh_axis(1, images)
        pixels = images.float().permute(0, 3, 1, 2)  # in this order: TensorRT takes no bytes but as input of a graph
        return _resize_height(_resize_width(pixels, *columns), *rows)
