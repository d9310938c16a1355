"""DICOM files of one frame, read by pydicom, an optional dependency (extra ``dicom``).

The rules are those of the standard (DICOM PS3.3, https://dicom.nema.org): stored values are rescaled by slope and
intercept (C.11.1), the window of the file maps them to grey (C.11.2), and MONOCHROME1 is inverted (C.7.6.3.1.2).
"""

import math
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data.samples import FULL_SCALE_KEY, WINDOW_KEY, SampleError, scale_to_eight_bits

_WANTED = "a DICOM image of one frame, grey or RGB"
_GREY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_META, _SYNTAX = 0x0002, 0x00020010  # group of the meta information, and the transfer syntax in it


def read_header(file: IO[bytes]) -> Any:
    """Read and check the attributes of a DICOM file.

    Args:
        file: DICOM file, at its start.

    Returns:
        A ``pydicom.Dataset`` without pixels.

    Raises:
        SampleError: If pydicom is not installed, or the file has no pixels, several frames, or pixels that are not
            grey or RGB of at most 16 bits.
        Exception: Any exception of pydicom, if the file is damaged.
    """
    pydicom = _import_pydicom()
    _check_syntax(pydicom, file)
    file.seek(0)
    data = pydicom.dcmread(file, stop_before_pixels=True)
    if not data.get("Rows") or not data.get("Columns"):
        raise SampleError(f"one without pixels (modality {data.get('Modality') or 'unknown'})", _WANTED)
    if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
        raise SampleError(f"one of {frames} frames", _WANTED)
    kind, allocated = data.get("PhotometricInterpretation"), data.get("BitsAllocated")
    if kind not in _GREY + _COLOUR:
        raise SampleError(f"one of {kind or 'unknown'} pixels", _WANTED)
    if allocated not in ((8, 16) if kind in _GREY else (8,)):
        raise SampleError(f"one of {allocated} bits allocated for a {kind} sample", _WANTED)
    bits = count_bits(data)
    if not 1 <= bits <= allocated or data.get("HighBit", bits - 1) != bits - 1:
        raise SampleError(f"one of {bits} bits in {allocated}, the highest {data.get('HighBit')}", _WANTED)
    if data.get("ModalityLUTSequence"):
        raise SampleError("one with a modality lookup table", _WANTED)
    _read_rescale(data)
    return data


def count_bits(data: Any) -> int:
    """Return the number of bits of a stored value."""
    return int(data.get("BitsStored") or data.get("BitsAllocated") or 0)


def read_samples(file: IO[bytes], data: Any) -> NDArray[Any]:
    """Decode the rescaled values, for a window.

    Args:
        file: DICOM file.
        data: Its header.

    Returns:
        (H, W) int32 or float32: values after slope and intercept; those of MONOCHROME1 are inverted within the range of
        their bits before. uint8 for colour, and for 8 bits that are not rescaled.

    Raises:
        SampleError: If pydicom cannot decompress the pixels.
        Exception: Any exception of pydicom, if the file is damaged.
    """
    values = _read_stored(file, data)
    if values.ndim == 3:
        return values
    if data.PhotometricInterpretation == "MONOCHROME1":
        low, high = _compute_range(data)
        values = low + high - values
    slope, intercept = _read_rescale(data)
    if (slope, intercept) == (1, 0) and count_bits(data) <= 8:
        return values.astype(np.uint8)
    if slope == 1 and intercept == round(intercept) and abs(intercept) < 2**30:
        return values + np.int32(intercept)
    return (values * slope + intercept).astype(np.float32)


def read_picture(file: IO[bytes], data: Any) -> Image.Image:
    """Decode the image in 8 bits by the window in the file; without one, by the range of its bits.

    Args:
        file: DICOM file.
        data: Its header.

    Returns:
        Image of mode "L" or "RGB", or "I;16" with its full scale in ``info``. The window that was used is there too.

    Raises:
        SampleError: If pydicom cannot decompress the pixels, the window has another function than LINEAR, or a lookup
            table takes its place.
        Exception: Any exception of pydicom, if the file is damaged.
    """
    values = _read_stored(file, data)
    if values.ndim == 3:
        return Image.fromarray(values.astype(np.uint8))
    is_inverted = data.PhotometricInterpretation == "MONOCHROME1"
    window = _read_window(data)
    if window is None:
        low, high = _compute_range(data)
        shifted = (high - values if is_inverted else values - low).astype(np.uint16)
        if count_bits(data) <= 8:
            return Image.fromarray(scale_to_eight_bits(shifted, high - low))
        image = Image.fromarray(shifted)
        image.info[FULL_SCALE_KEY] = high - low
        return image
    slope, intercept = _read_rescale(data)
    scaled = np.clip((values * slope + intercept - window[0]) / (window[1] - window[0]), 0, 1)
    levels = np.rint(255 * (1 - scaled if is_inverted else scaled)).astype(np.uint8)
    image = Image.fromarray(levels)
    image.info[WINDOW_KEY] = window
    return image


def _import_pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        got = "none of version 3 installed: pip install 'recontrast[dicom]'"
        raise SampleError(got, "the package pydicom to read DICOM") from None
    return pydicom


def _check_syntax(pydicom: Any, file: IO[bytes]) -> None:
    """Refuse a data set that is deflated: a small file can inflate to any size before its header is known.

    The meta information is read as `pydicom.dcmread` reads it, so that both find the same transfer syntax.
    """
    tags = []

    def is_past(tag: int, *_: Any) -> bool:
        tags.append(tag)
        return tag >> 16 != _META

    file.seek(132)
    meta = pydicom.filereader.read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=is_past)
    if tags.count(_SYNTAX) > 1:
        raise SampleError("one of several transfer syntaxes", _WANTED)
    for element in meta:  # of an unknown kind: an error here, where dcmread would read all again in another way
        if element.tag == _SYNTAX and "1.2.840.10008.1.2.1.99" in str(element.value):
            raise SampleError("a deflated data set", _WANTED)


def _read_stored(file: IO[bytes], data: Any) -> NDArray[Any]:
    """Decode the stored values: (H, W) int32, or (H, W, 3) uint8."""
    pydicom = _import_pydicom()
    file.seek(0)
    whole = pydicom.dcmread(file)
    if "PixelData" not in whole:
        raise SampleError("one without pixels", _WANTED)
    syntax = whole.file_meta.TransferSyntaxUID
    try:
        values = np.asarray(pydicom.pixels.pixel_array(whole))
    except MemoryError:
        raise
    except Exception as error:
        if not syntax.is_compressed:
            raise
        raise SampleError(f"pixels compressed as {syntax.name} that pydicom cannot decompress here", _WANTED) from error
    if values.shape[:2] != (data.Rows, data.Columns) or values.shape[2:] not in ((), (3,)):
        raise ValueError(f"pixels of shape {values.shape}")
    if values.ndim == 3:
        return values
    unused = 8 * values.dtype.itemsize - count_bits(data)  # they may hold an overlay
    return (values << unused >> unused).astype(np.int32)


def _compute_range(data: Any) -> tuple[int, int]:
    """Return the lowest and the highest value that the stored bits can hold."""
    bits, is_signed = count_bits(data), bool(data.get("PixelRepresentation"))
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)


def _read_rescale(data: Any) -> tuple[float, float]:
    """Return the slope and the intercept; 1 and 0 if the file has none."""
    stored = (_read_first(data.get(name)) for name in ("RescaleSlope", "RescaleIntercept"))
    slope, intercept = (default if value is None else value for value, default in zip(stored, (1.0, 0.0), strict=True))
    if not slope or not math.isfinite(slope) or not math.isfinite(intercept):
        raise SampleError(f"one of slope {slope:g} and intercept {intercept:g}", _WANTED)
    return slope, intercept


def _read_window(data: Any) -> tuple[float, float] | None:
    """Return the rescaled values that become black and white by the first window in the file; None if it has none."""
    center, width = (_read_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        if data.get("VOILUTSequence"):  # beside a window it is another view of the same image
            raise SampleError("one with a VOI lookup table in place of a window: train with --window", _WANTED)
        return None
    function = data.get("VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT") or not math.isfinite(center) or not 0 < width < math.inf:
        got = f"one with a window of {function}, center {center:g} and width {width:g}: train with --window"
        raise SampleError(got, _WANTED)
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-3)  # a width of 1 is a step
    return center - width / 2, center + width / 2


def _read_first(value: Any) -> float | None:
    """Return the first of several numbers, or the only one."""
    if value is None or isinstance(value, str):
        return None if not value else float(value)
    try:
        return float(value)
    except TypeError:
        return float(value[0]) if len(value) else None
