"""DICOM files, written here by pydicom: rescaled, inverted and windowed as the standard says, or refused by name."""

import struct
import sys
import zlib

import numpy as np
import pytest
from command_line import fails, works

from recontrast.data import notices
from recontrast.data.bit_depth import detect_bits
from recontrast.data.encoded_image import EncodedImage
from recontrast.data.images import image_size, read_image
from recontrast.data.in_memory import read_given
from recontrast.data.window import find_window

pydicom = pytest.importorskip("pydicom", minversion="3")
RANDOM = np.random.default_rng(20)
WANTED = "wanted a DICOM image of one frame, grey or RGB, got "


@pytest.fixture(autouse=True)
def new_process():
    notices.forget_warnings()
    yield
    notices.forget_warnings()


def write(path, values, bits=12, *, kind="MONOCHROME2", syntax=None, **attributes):
    """Write stored values (H, W), or (H, W, 3) of RGB, as a DICOM file with further attributes."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    data.Modality, data.PhotometricInterpretation = "CT", kind
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 3 if values.ndim == 3 else 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * values.dtype.itemsize, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = values.tobytes()
    for name, value in attributes.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def draw(bits=12, shape=(21, 34), dtype=np.uint16):
    low = -(1 << bits - 1) if np.dtype(dtype).kind == "i" else 0
    return RANDOM.integers(low, low + (1 << bits), shape, dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, -1024), (0.37, -5.5), (-2, 7)])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_rescaled_values_in_a_window(tmp_path, dtype, slope, intercept, kind):
    values = draw(12, dtype=dtype)
    path = write(tmp_path / "a.dcm", values, kind=kind, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=40,
                 WindowWidth=400)  # fmt: skip
    stored = values.astype(float)
    if kind == "MONOCHROME1":
        stored = (4095 if dtype == np.uint16 else -1) - stored
    rescaled = slope * stored + intercept
    low, high = np.quantile(rescaled, (0.1, 0.8))
    for source in (path, EncodedImage(path.read_bytes())):
        pixels = read_image(source, window=(low, high))
        assert pixels.dtype == np.float32 and image_size(source) == (21, 34)
        assert np.abs(pixels - np.clip((rescaled - low) / (high - low), 0, 1)[:, :, None]).max() < 2e-6


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", None])
def test_the_window_in_the_file_gives_8_bits(tmp_path, function):
    """Compared with pydicom's own window, and said once."""
    from pydicom.pixels import apply_windowing

    values = draw(12)
    attributes = {} if function is None else {"VOILUTFunction": function}
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        path = write(tmp_path / f"{kind}.dcm", values, kind=kind, RescaleSlope=1, RescaleIntercept=-1000,
                     WindowCenter=[300, 5], WindowWidth=[900, 6], **attributes)  # fmt: skip
        levels = apply_windowing(values.astype(float) - 1000, pydicom.dcmread(path)) + 1000  # from 0 to 4095
        wanted = (levels if kind == "MONOCHROME2" else 4095 - levels) * 255 / 4095
        if kind == "MONOCHROME2":
            with pytest.warns(notices.ImageWarning, match=r"\.dcm: is scaled to 8 bits by the window in the file, -1"):
                pixels = read_image(path)
        else:
            pixels = read_image(path)
        assert pixels.dtype == np.uint8 and np.abs(pixels - wanted[:, :, None]).max() <= 0.5 + 1e-6


def test_files_without_a_window_are_scaled_by_their_bits(tmp_path):
    for bits, dtype in ((12, np.uint16), (12, np.int16), (10, np.uint16), (8, np.uint8), (6, np.uint8)):
        values = draw(bits, dtype=dtype)
        low = -(1 << bits - 1) if dtype == np.int16 else 0
        wanted = (values.astype(int) - low) * 255 / ((1 << bits) - 1)
        for kind, levels in (("MONOCHROME2", wanted), ("MONOCHROME1", 255 - wanted)):
            path = write(tmp_path / "a.dcm", values, bits, kind=kind)
            assert np.abs(read_image(path) - levels[:, :, None]).max() <= 0.5
            assert detect_bits([path]) is None  # the file says how many


def test_colour_compression_and_unused_bits(tmp_path):
    colour = draw(8, (12, 15, 3), np.uint8)
    assert np.array_equal(read_image(write(tmp_path / "c.dcm", colour, 8, kind="RGB")), colour)
    values = draw(12)
    path = write(tmp_path / "a.dcm", values)
    packed = pydicom.dcmread(path)
    packed.compress(pydicom.uid.RLELossless)
    packed.save_as(tmp_path / "rle.dcm")
    overlay = write(tmp_path / "overlay.dcm", values | np.uint16(1 << 14))

    wanted = read_image(path, window=(0, 4095))
    for other in (tmp_path / "rle.dcm", overlay):
        assert np.array_equal(read_image(other, window=(0, 4095)), wanted)
    assert find_window([path], read_given) == tuple(
        float(v) for v in np.percentile(values, (0.1, 99.9), method="nearest")
    )


CASES = {
    "frames": ({"NumberOfFrames": 2}, "one of 2 frames"),
    "palette": ({"kind": "PALETTE COLOR"}, "one of PALETTE COLOR pixels"),
    "bits": ({"BitsStored": 17}, "one of 17 bits in 16, the highest 11"),
    "shifted": ({"HighBit": 15}, "one of 12 bits in 16, the highest 15"),
    "wide": ({"BitsAllocated": 32}, "one of 32 bits allocated for a MONOCHROME2 sample"),
    "slope": ({"RescaleSlope": 0, "RescaleIntercept": 3}, "one of slope 0 and intercept 3"),
    "sigmoid": (
        {"WindowCenter": 1, "WindowWidth": 2, "VOILUTFunction": "SIGMOID"},
        "one with a window of SIGMOID, center 1 and width 2: train with --window",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(tmp_path, name):
    attributes, got = CASES[name]
    path = write(tmp_path / f"{name}.dcm", draw(), **attributes)
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: {WANTED}{got}"


def test_lookup_table_in_place_of_a_window(tmp_path):
    """Refused by name without --window, and not used with one or beside a window in the file."""
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], [int(v) for v in np.arange(4096)[::-1]]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    values, limits = draw(), {"WindowCenter": 2000, "WindowWidth": 900}
    path = write(tmp_path / "a.dcm", values, VOILUTSequence=[table])
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: {WANTED}one with a VOI lookup table in place of a window: train with --window"
    assert np.abs(read_image(path, window=(0, 4095)) - values[:, :, None] / 4095).max() < 1e-6
    notices.forget_warnings()
    with pytest.warns(notices.ImageWarning, match="by the window in the file"):
        both = read_image(write(tmp_path / "both.dcm", values, VOILUTSequence=[table], **limits))
    assert np.array_equal(both, read_image(write(tmp_path / "window.dcm", values, **limits)))


def test_damaged_and_foreign_files(tmp_path, monkeypatch):
    """Without pixels, compressed in an unknown way, deflated, cut off; each in one sentence that names the file."""
    values = draw()
    path = write(tmp_path / "a.dcm", values)
    content = path.read_bytes()
    report = pydicom.dcmread(path)
    for name in ("PixelData", "Rows", "Columns"):
        delattr(report, name)
    report.Modality = "SR"
    report.save_as(tmp_path / "report.dcm")
    data = pydicom.dcmread(path)
    data.PixelData = pydicom.encaps.encapsulate([RANDOM.bytes(200)])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    data.save_as(tmp_path / "unknown.dcm")
    (tmp_path / "cut.dcm").write_bytes(content[:-50])
    cases = {
        "report": f"{WANTED}one without pixels (modality SR)",
        "unknown": f"{WANTED}pixels compressed as JPEG-LS Lossless Image Compression that pydicom cannot",
        "cut": "wanted a complete image, got a file that cannot be decoded (",
    }
    for name, text in cases.items():
        for window in (None, (0, 4095)):
            with pytest.raises(ValueError) as caught:
                read_image(tmp_path / f"{name}.dcm", window=window)
            assert str(caught.value).startswith(f"{tmp_path / name}.dcm: {text}")
    bomb = pydicom.dcmread(path)
    bomb.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    bomb.save_as(tmp_path / "deflated.dcm")
    with pytest.raises(ValueError, match=r"deflated\.dcm: wanted a DICOM image .*, got a deflated data set$"):
        image_size(tmp_path / "deflated.dcm")
    grey = write(tmp_path / "grey.dcm", draw(8, dtype=np.uint8), 8)
    with pytest.raises(ValueError, match=r"grey\.dcm: wanted samples of more than 8 bits for the window 0 to 4095"):
        read_image(grey, window=(0, 4095))
    for index in RANDOM.integers(132, len(content), 60):  # damaged anywhere: read, or one sentence
        damaged = bytearray(content)
        damaged[index] ^= 1 << int(RANDOM.integers(8))
        (tmp_path / "damaged.dcm").write_bytes(damaged)
        try:
            assert read_image(tmp_path / "damaged.dcm", window=(0, 4095)).ndim == 3
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/damaged.dcm: wanted ")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        ValueError, match=r"a\.dcm: wanted the package pydicom to read DICOM, got none .*recontrast\[dicom\]"
    ):
        read_image(path)


def meta_element(number, kind, value):
    """An element (0002,number) as in a file; kinds of the second form have a length of 4 bytes."""
    value += b"\0" * (len(value) % 2)
    is_long = kind in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
    length = struct.pack("<HL", 0, len(value)) if is_long else struct.pack("<H", len(value))
    return struct.pack("<HH", 2, number) + kind.encode() + length + value


def test_deflated_files_are_refused_wherever_the_syntax_stands(tmp_path, monkeypatch):
    """Nothing is inflated: the syntax is repeated, or stands behind an element of any kind."""
    plain, deflated = (str(pydicom.uid.ExplicitVRLittleEndian), str(pydicom.uid.DeflatedExplicitVRLittleEndian))
    syntaxes = [meta_element(0x10, "UI", syntax.encode()) for syntax in (plain, deflated)]
    packed = zlib.compress(bytes(1 << 20), wbits=-15)
    monkeypatch.setattr(zlib, "decompress", lambda *_, **__: pytest.fail("inflated"))
    several, one = f"{WANTED}one of several transfer syntaxes", f"{WANTED}a deflated data set"
    cases = [(b"".join(syntaxes), several), (b"".join(syntaxes[::-1]), several), (2 * syntaxes[0], several)]
    for kind in ("OB", "OD", "OL", "OV", "SV", "UC", "UN", "UR", "UT", "UV", "SH"):
        for size in (8, 40):
            cases.append((meta_element(3, kind, bytes(size)) + syntaxes[1], one))
    for meta, text in cases:
        path = tmp_path / "bomb.dcm"
        path.write_bytes(bytes(128) + b"DICM" + meta + packed)
        for read in (read_image, image_size):
            with pytest.raises(ValueError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: {text}", meta


def test_training_and_prediction(tmp_path):
    for folder, count in (("good", 5), ("new", 2)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            write(tmp_path / folder / f"{index}.dcm", draw(shape=(40, 40)), RescaleIntercept=-1024, RescaleSlope=1)
    small = "--architecture padim --backbone test_resnet --weights random --size 32 --holdout 0 --device cpu".split()
    works("train", "--good", tmp_path / "good", *small, "--window", "-1000", "400", "--out", tmp_path / "run")
    assert "2 images scored" in works("predict", tmp_path / "run", tmp_path / "new", "--out", tmp_path / "scores")
    assert image_size(tmp_path / "scores/overlays/0.png") == (40, 40)
    write(tmp_path / "new/2.dcm", draw(), NumberOfFrames=3)
    message = fails("predict", tmp_path / "run", tmp_path / "new", "--out", tmp_path / "scores")
    assert message == f"recontrast: {tmp_path}/new/2.dcm: {WANTED}one of 3 frames"
