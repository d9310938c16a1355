"""Files that Pillow misreads, several images in a file, damaged metadata, and what is said about them."""

import threading
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from picture_files import write_netpbm, write_png, write_tiff
from PIL import Image

from recontrast.data import images, notices
from recontrast.data.formats import FORMATS, SUFFIXES, detect_format
from recontrast.data.in_memory import InMemoryImages
from recontrast.data.listing import list_images
from recontrast.data.pillow_warnings import ignore_pillow_warnings


@pytest.fixture(autouse=True)
def new_process():
    notices.forget_warnings()
    yield
    notices.forget_warnings()


def pixels(*shape, bits=8, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, np.uint16 if bits > 8 else np.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_planes_of_16_bit_colour_equal_interleaved_samples(tmp_path, order, big):
    samples = pixels(20, 30, 3, bits=16)
    planes = write_tiff(
        tmp_path / "p.tif", samples, 16, photometric=2, planar=True, rows_per_strip=7, order=order, big=big
    )
    mixed = write_tiff(tmp_path / "m.tif", samples, 16, photometric=2, rows_per_strip=7, order=order, big=big)
    assert np.array_equal(images.read_image(planes), samples >> 8)
    assert np.array_equal(images.read_image(planes), images.read_image(mixed))


@pytest.mark.parametrize(
    "dtype, kind",
    [("i1", "8-bit signed integer"), ("i2", "16-bit signed integer"), ("f2", "16-bit floating-point"),
     ("f4", "32-bit floating-point"), ("f8", "64-bit floating-point")],
)  # fmt: skip
def test_samples_of_unknown_scale_are_refused_by_name(tmp_path, dtype, kind):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.ones((6, 7), dtype))
    wanted = "wanted unsigned integer samples of 1 to 16 bits"
    message = rf"^{path}: {wanted}, got {kind} samples, whose scale is unknown: train with --window$"
    for read in (images.read_image, images.read_mask):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_tiff_opened_by_pillow_is_refused_if_pillow_misreads_it(tmp_path):
    planes = write_tiff(tmp_path / "p.tif", pixels(9, 9, 3, bits=16), 16, photometric=2, planar=True)
    tifffile.imwrite(tmp_path / "s.tif", np.ones((9, 9), np.int16))
    for path in (planes, tmp_path / "s.tif"):
        with Image.open(path) as picture, pytest.raises(ValueError, match=r"\.tif: wanted .*: pass its path$"):
            InMemoryImages([picture], 8)[[0]]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_images_is_used_and_one_file_named(tmp_path, suffix):
    frames = [Image.fromarray(pixels(8, 9, 3, seed=seed)).quantize(8).convert("RGB") for seed in range(3)]
    paths = [tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"]
    for path in paths:
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(notices.ImageWarning, match=r"^.*a\.\w+: has several images: the first one is used") as said:
        assert np.array_equal(images.read_image(paths[0]), np.asarray(frames[0]))
        images.read_image(paths[1])
    assert len(said) == 1


def test_damaged_exif_data_are_reported(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.jpg"
    Image.fromarray(pixels(8, 12, 3)).save(path, exif=exif.tobytes()[:-9])
    with pytest.warns(notices.ImageWarning, match=r"x\.jpg: has damaged EXIF data"):
        images.read_image(path)


def test_orientation_after_the_pixels_of_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = pixels(8, 12, 3)
    path = write_png(tmp_path / "x.png", samples, 8, 2)
    content, chunk = path.read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
    body = b"eXIf" + chunk
    part = len(chunk).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    path.write_bytes(content[:-12] + part + content[-12:])
    assert images.image_size(path) == (12, 8) and np.array_equal(images.read_image(path), np.rot90(samples, -1))
    path.write_bytes(content)
    assert images.image_size(path) == (8, 12)


def test_the_content_decides_and_every_suffix_is_found_in_folders(tmp_path):
    samples = pixels(5, 6, 3)
    Image.fromarray(samples).save(tmp_path / "png", "PNG")
    for index, suffix in enumerate(SUFFIXES):
        (tmp_path / f"{index:02}{suffix.upper() if index % 2 else suffix}").write_bytes((tmp_path / "png").read_bytes())
    (tmp_path / "png").unlink()
    paths = list_images(tmp_path)
    assert len(paths) == len(SUFFIXES) and {".jfif", ".jpe", ".pgm", ".gif", ".avif"} <= set(SUFFIXES)
    assert all(np.array_equal(images.read_image(path), samples) for path in paths)


def test_formats_are_told_from_each_other():
    for image_format in FORMATS:
        for offset, value in image_format.starts:
            assert detect_format(bytes(offset) + value + bytes(16)) == image_format.name
    assert detect_format(b"") is None and detect_format(b"P7\nWIDTH 3") is None


@pytest.mark.parametrize("full", [1, 7, 255, 1000, 65535])
@pytest.mark.parametrize("plain", [True, False])
def test_incomplete_netpbm_files_are_refused(tmp_path, full, plain):
    samples = np.full((6, 9, 1), full)
    path = write_netpbm(tmp_path / "x.pgm", samples, full, plain=plain)
    assert (images.read_image(path) == 255).all()
    content = path.read_bytes()
    last = len(str(full)) + 1 if plain else 2  # of a number, a part is a number too
    for length in range(3, len(content) - last):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.pgm: wanted .*, got "):
            images.read_image(path)


def test_pillows_warnings_are_hidden_only_while_files_are_decoded():
    def warn(module):
        warnings.warn_explicit("text", UserWarning, "file", 1, module=module)

    with pytest.warns(UserWarning) as said:
        with ignore_pillow_warnings():
            inside = threading.Thread(target=lambda: ignore_pillow_warnings().__enter__())
            inside.start()
            inside.join()
            warn("PIL.TiffImagePlugin")
            warn("user.module")
    assert len(said) == 1
    from recontrast.data import pillow_warnings

    pillow_warnings._active = 0
    with pytest.warns(UserWarning):
        warn("PIL.TiffImagePlugin")
