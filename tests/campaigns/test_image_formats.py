"""Pictures of odd formats: `read_image` equals the pixels that were written, or refuses the file in one sentence.

The files are written by `picture_files` or by other libraries. tifffile and imagecodecs, which share no code with the
reader, decode each file as well, so that an error of the writer is not taken for one of the reader.
"""

import re
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import tifffile
from picture_files import write_bmp, write_netpbm, write_png, write_tiff
from PIL import Image

from recontrast.data.images import image_size, read_image
from recontrast.data.notices import ImageWarning

codecs = pytest.importorskip("imagecodecs")

UPRIGHT = {  # transform of the stored pixels by orientation (TIFF 6.0, tag 274)
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@dataclass
class Picture:
    """A file, the pixels that it must give, and whether it may be refused instead."""

    path: object
    expected: np.ndarray | None  # (H, W) or (H, W, 3), uint8; None: must be refused
    description: str
    tolerance: int = 0
    may_be_refused: bool = False


def to_levels(values, full):
    """Scale samples to 8 bits, rounded."""
    return ((values.astype(np.int64) * 255 + full // 2) // full).astype(np.uint8)


def colour_levels(values, bits):
    """Scale samples of colour to 8 bits: of 16 bits, the high byte is kept."""
    return (values >> 8).astype(np.uint8) if bits == 16 else to_levels(values, (1 << bits) - 1)


def choose(rng, *values):
    return values[rng.integers(len(values))]


def random_samples(rng, bits, *shape):
    dtype = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    return rng.integers(0, 1 << bits, shape, np.int64).astype(dtype)


def random_size(rng):
    return int(rng.integers(1, 60)), int(rng.integers(1, 60))


def undo_cmyk(samples):
    """Convert CMYK to RGB as Pillow and TIFF 6.0 do: each ink and black absorb."""
    ink, black = samples[..., :3].astype(int), samples[..., 3:4].astype(int)
    return np.rint((255 - ink) * (255 - black) / 255).astype(np.uint8)


def make_tiff(rng, folder):
    """Unsigned samples of all layouts, which must be read."""
    photometric = choose(rng, 0, 1, 1, 1, 2, 2, 2, 3, 5)
    bits = {3: choose(rng, 1, 2, 4, 8), 5: choose(rng, 8, 16)}.get(photometric) or choose(
        rng, 1, 2, 4, 8, 10, 12, 14, 16, 16
    )
    extra = choose(rng, 0, 0, 1) if photometric != 3 else 0
    channels = {2: 3, 5: 4}.get(photometric, 1) + extra
    height, width = random_size(rng)
    samples = random_samples(rng, bits, height, width, channels)
    compression = choose(rng, 1, 1, 5, 8, 32773)
    options = {
        "photometric": photometric,
        "order": choose(rng, "<", ">"),
        "big": choose(rng, False, False, True),
        "planar": bool(channels > 1 and rng.random() < 0.4),
        "tile": choose(rng, None, None, (16, 16), (32, 16), (16, 48)),
        "rows_per_strip": int(rng.integers(1, height + 1)),
        "compression": compression,
        "predictor": 2 if compression in (5, 8) and bits in (8, 16) and rng.random() < 0.5 else 1,
        "fill_order": 2 if rng.random() < 0.15 else 1,
    }
    orientation = int(rng.integers(1, 9)) if rng.random() < 0.3 else 1
    tags = {274: [orientation]} if orientation > 1 else {}
    if extra:
        tags[338] = [2]  # alpha, not premultiplied
    full = (1 << bits) - 1
    if photometric == 3:
        palette = rng.integers(0, 65536, (1 << bits, 3))
        tags[320] = palette.T.ravel().tolist()
        expected = (palette >> 8).astype(np.uint8)[samples[:, :, 0]]
    elif photometric == 2:
        expected = colour_levels(samples[:, :, :3], bits)
    elif photometric == 5:
        expected = undo_cmyk(colour_levels(samples[:, :, :4], bits))
    else:
        expected = to_levels(full - samples[:, :, 0] if photometric == 0 else samples[:, :, 0], full)
    path = write_tiff(folder / "x.tif", samples, bits, tags=tags, encoders=codecs, **options)
    if options["fill_order"] == 1:
        check_by_tifffile(path, samples)
    description = f"TIFF {bits} bits x {channels}, orientation {orientation}, {options}"
    return Picture(path, UPRIGHT[orientation](expected), description, tolerance=2 if photometric == 5 else 0)


def check_by_tifffile(path, samples):
    """Check that tifffile reads the samples that were written."""
    decoded = tifffile.imread(path)
    if decoded.ndim == 3 and decoded.shape != samples.shape:
        decoded = np.moveaxis(decoded, 0, 2)
    assert np.array_equal(decoded.reshape(samples.shape), samples), "the file is not what was meant to be written"


def make_unknown_scale(rng, folder):
    """Samples without a known scale, which must be refused."""
    kind = choose(rng, "i1", "i2", "f2", "f4", "f8", "u4", "i4", "u8", "c8")
    height, width = random_size(rng)
    channels = choose(rng, 1, 1, 3) if kind != "c8" else 1
    values = rng.random((height, width, channels)) * (1 if kind[0] in "fc" else 2.0 ** (8 * int(kind[1]) - 1))
    values[0, 0] = values.max() + 1
    if kind in ("u4", "i4"):
        values[0, 0, 0] = 70_000
    samples = values.astype(kind)
    path = folder / "x.tif"
    tifffile.imwrite(
        path, samples if channels == 3 else samples[..., 0], photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig" if channels == 3 else None,
        byteorder=choose(rng, "<", ">"), bigtiff=choose(rng, False, True),
        compression=choose(rng, None, "lzw", "deflate"), tile=choose(rng, None, (16, 16)), metadata=None,
    )  # fmt: skip
    return Picture(path, None, f"TIFF of {kind}, {channels} samples")


def make_encoded_tiff(rng, folder):
    """TIFF with compressions of images: JPEG, CCITT and others."""
    height, width = 8 + rng.integers(40), 8 + rng.integers(40)
    path = folder / "x.tif"
    kind = choose(rng, "jpeg grey", "jpeg rgb", "ccitt", "lzma", "zstd", "jpeg2000", "ycbcr", "lab")
    if kind == "ccitt":
        bits = rng.integers(0, 2, (height, width)) > 0
        Image.fromarray(bits).save(path, compression=choose(rng, "group3", "group4", "tiff_ccitt"))
        return Picture(path, bits * np.uint8(255), f"TIFF {kind}", may_be_refused=True)
    smooth = make_smooth(rng, height, width)
    if kind == "ycbcr":
        Image.fromarray(smooth).convert("YCbCr").save(path, compression=choose(rng, "raw", "tiff_lzw"))
        return Picture(path, smooth, f"TIFF {kind}", tolerance=4, may_be_refused=True)
    if kind == "lab":
        from skimage.color import lab2rgb

        lab = np.stack([rng.integers(60, 200, (6, 7)), *rng.integers(-10, 10, (2, 6, 7))], 2)
        expected = np.rint(255 * lab2rgb(lab * [100 / 255, 1, 1])).astype(np.uint8)
        write_tiff(path, lab.astype(np.uint8), 8, photometric=8)
        return Picture(path, expected, "TIFF Lab", tolerance=10)  # scikit-image has another white point
    if kind in ("jpeg grey", "lzma", "zstd"):
        smooth = smooth[:, :, 0]
    compression = {"jpeg2000": "jpeg2000", "lzma": "lzma", "zstd": "zstd"}.get(kind, "jpeg")
    tile = choose(rng, None, (16, 16))
    photometric = "minisblack" if smooth.ndim == 2 else "rgb"
    tifffile.imwrite(path, smooth, compression=compression, tile=tile, photometric=photometric, metadata=None)
    expected = tifffile.imread(path)
    return Picture(path, expected, f"TIFF {kind}", tolerance=3, may_be_refused=True)


def make_png(rng, folder):
    """All colour types and depths."""
    colour = choose(rng, 0, 0, 2, 3, 4, 6)
    bits = {0: choose(rng, 1, 2, 4, 8, 16), 3: choose(rng, 1, 2, 4, 8)}.get(colour) or choose(rng, 8, 16)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    samples = random_samples(rng, bits, *random_size(rng), channels)
    chunks, palette = [], None
    if rng.random() < 0.3:
        chunks.append((b"gAMA", (45455).to_bytes(4, "big")))
    if colour == 3:
        palette = rng.integers(0, 256, (1 << bits, 3))
        expected = palette.astype(np.uint8)[samples[:, :, 0]]
    elif colour in (0, 4):
        expected = (
            colour_levels(samples[:, :, 0], bits) if colour == 4 else to_levels(samples[:, :, 0], (1 << bits) - 1)
        )
    else:
        expected = colour_levels(samples[:, :, :3], bits)
    if colour in (0, 2, 3) and rng.random() < 0.4:
        one = int(samples[0, 0, 0]).to_bytes(2, "big")
        chunks.append((b"tRNS", bytes([0, 128]) if colour == 3 else one * channels))
    interlaced = bool(rng.random() < 0.4)
    path = write_png(folder / "x.png", samples, bits, colour, palette=palette, chunks=chunks, interlaced=interlaced)
    if bits in (8, 16) and colour != 3 and not any(kind == b"tRNS" for kind, _ in chunks):
        decoded = codecs.png_decode(path.read_bytes())
        assert np.array_equal(decoded.reshape(samples.shape), samples), "the file is not what was meant to be written"
    return Picture(path, expected, f"PNG colour type {colour}, {bits} bits, interlaced {interlaced}, {chunks}")


def make_netpbm(rng, folder):
    """Bitmaps, grey and colour, plain and binary, of any maximum."""
    full = choose(rng, 1, 15, 100, 255, 255, 1023, 4095, 65535)
    channels = choose(rng, 1, 3) if full > 1 else 1
    plain = bool(rng.random() < 0.4)
    height, width = random_size(rng)
    samples = rng.integers(0, full + 1, (height, width, channels))
    samples[0, 0] = full
    path = write_netpbm(folder / "x.pnm", samples, full, plain=plain, comment=bool(rng.random() < 0.3))
    expected = (samples >> 8).astype(np.uint8) if (full, channels) == (65535, 3) else to_levels(samples, full)
    return Picture(path, expected[..., 0] if channels == 1 else expected, f"Netpbm maximum {full}, plain {plain}")


def make_bmp(rng, folder):
    """Palettes, 16, 24 and 32 bits, top-down."""
    bits = choose(rng, 1, 4, 8, 16, 24, 32)
    height, width = random_size(rng)
    top_down = bool(rng.random() < 0.4)
    palette = None
    if bits <= 8:
        palette = rng.integers(0, 256, (1 << bits, 3))
        samples = random_samples(rng, bits, height, width, 1)
        expected = palette.astype(np.uint8)[samples[:, :, 0]]
    else:
        samples = random_samples(rng, 5 if bits == 16 else 8, height, width, 4 if bits == 32 else 3)
        expected = to_levels(samples, 31) if bits == 16 else samples[..., :3]
    path = write_bmp(folder / "x.bmp", samples, bits=bits, top_down=top_down, palette=palette)
    return Picture(path, expected, f"BMP {bits} bits, top-down {top_down}", tolerance=1 if bits == 16 else 0)


def make_smooth(rng, height, width):
    """Make an image without edges, which lossy formats keep well."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / rng.uniform(6, 20) + y / rng.uniform(6, 20) + rng.uniform(0, 6)) for _ in range(3)]
    return np.stack(waves, 2).astype(np.uint8)


def make_jpeg(rng, folder):
    """Grey, colour, CMYK, progressive, 12 bits, with orientation."""
    height, width = 8 + rng.integers(50), 8 + rng.integers(50)
    smooth, path = make_smooth(rng, height, width), folder / "x.jpg"
    kind = choose(rng, "L", "RGB", "RGB", "CMYK", "12 bits", "lossless")
    if kind == "12 bits":
        path.write_bytes(codecs.jpeg_encode(smooth[:, :, 0].astype(np.uint16) * 16, bitspersample=12))
        return Picture(path, None, "JPEG of 12 bits")
    if kind == "lossless":
        path.write_bytes(codecs.ljpeg_encode(smooth[:, :, 0]))
        return Picture(path, smooth[:, :, 0], "lossless JPEG", may_be_refused=True)
    orientation = int(rng.integers(1, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth).convert(kind)
    options = {"quality": int(rng.integers(70, 101)), "progressive": bool(rng.random() < 0.5)}
    if kind == "RGB":
        options["subsampling"] = int(rng.integers(3))
    image.save(path, exif=exif, **options)
    if kind == "CMYK":
        expected, tolerance = smooth, 12
    else:
        expected, tolerance = codecs.jpeg8_decode(path.read_bytes()), 2
    return Picture(path, UPRIGHT[orientation](expected), f"JPEG {kind}, {orientation}, {options}", tolerance)


def make_animation(rng, folder):
    """Files of several images, of which the first is used."""
    height, width = 4 + rng.integers(40), 4 + rng.integers(40)
    suffix = choose(rng, "gif", "webp", "png", "tif")
    palette = rng.integers(0, 256, (5, 3)).astype(np.uint8)
    frames = [Image.fromarray(palette[rng.integers(0, 5, (height, width))]) for _ in range(3)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = folder / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    expected = np.asarray(frames[0])
    if suffix == "gif":
        expected = codecs.gif_decode(path.read_bytes())
        expected = (expected[0] if expected.ndim == 4 else expected)[..., :3]
    return Picture(path, expected, f"animated {suffix}")


def make_gif(rng, folder):
    """Palettes of all sizes, interlaced, with a transparent colour."""
    colours = int(rng.integers(2, 257))
    indices = rng.integers(0, colours, random_size(rng)).astype(np.uint8)
    palette = rng.integers(0, 256, (colours, 3)).astype(np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    options = {"transparency": 0} if rng.random() < 0.4 else {}
    image.save(folder / "x.gif", interlace=int(rng.random() < 0.5), **options)
    return Picture(folder / "x.gif", palette[indices], f"GIF of {colours} colours, {options}")


def make_modern(rng, folder):
    """WebP, JPEG 2000 and AVIF, lossless or nearly so."""
    height, width = 8 + rng.integers(50), 8 + rng.integers(50)
    smooth = make_smooth(rng, height, width)
    kind = choose(rng, "webp", "webp alpha", "webp lossy", "jp2", "jp2 alpha", "jp2 grey", "jp2 16", "j2k 12",
                  "jp2 signed", "avif", "avif 10")  # fmt: skip
    path = folder / f"x.{kind.split()[0]}"
    grey16 = (smooth[:, :, 0].astype(np.uint16) << 8) | rng.integers(0, 256, (height, width)).astype(np.uint16)
    if kind.startswith("webp"):
        alpha = rng.integers(0, 256, (height, width, 1)).astype(np.uint8)
        pixels = np.concatenate([smooth, alpha], 2) if kind == "webp alpha" else smooth
        Image.fromarray(pixels).save(path, lossless=kind != "webp lossy", exact=True, quality=90)
        return Picture(path, codecs.webp_decode(path.read_bytes())[..., :3], kind)
    if kind in ("j2k 12", "jp2 16"):
        bits = int(kind.split()[1])
        values = grey16 >> (16 - bits)
        path.write_bytes(
            codecs.jpeg2k_encode(values, bitspersample=bits, level=0, codecformat=choose(rng, "jp2", "j2k"))
        )
        assert np.array_equal(codecs.jpeg2k_decode(path.read_bytes()), values)
        return Picture(path, to_levels(values, (1 << bits) - 1), kind)
    if kind == "jp2 signed":
        path.write_bytes(codecs.jpeg2k_encode(grey16.view(np.int16), level=0))
        return Picture(path, None, kind)
    if kind.startswith("jp2"):
        alpha = rng.integers(0, 256, (height, width, 1)).astype(np.uint8)
        pixels = {"jp2": smooth, "jp2 grey": smooth[..., 0], "jp2 alpha": np.concatenate([smooth, alpha], 2)}[kind]
        Image.fromarray(pixels).save(path, irreversible=False)
        return Picture(path, pixels if pixels.ndim == 2 else pixels[..., :3], kind)
    if kind == "avif 10":
        path.write_bytes(codecs.avif_encode(smooth.astype(np.uint16) << 2, level=100, bitspersample=10))
        return Picture(path, smooth, kind, tolerance=6, may_be_refused=True)
    Image.fromarray(smooth).save(path, quality=95)
    return Picture(path, codecs.avif_decode(path.read_bytes())[..., :3], kind, tolerance=2)


MAKERS = [make_tiff] * 8 + [make_unknown_scale, make_encoded_tiff, make_png, make_png, make_png, make_netpbm, make_bmp,
          make_jpeg, make_animation, make_gif, make_modern, make_modern]  # fmt: skip


def describe_fault(picture):
    """Read a picture, and return what is wrong; None if nothing is."""
    try:
        pixels = read_image(picture.path)
    except ValueError as error:
        sentence = re.fullmatch(rf"{re.escape(str(picture.path))}: wanted [^\n]+, got [^\n]+", str(error))
        if sentence is None:
            return f"refused, but not in one sentence: {error}"
        return None if picture.expected is None or picture.may_be_refused else f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if picture.expected is None:
        return "read, though its scale is unknown"
    expected = picture.expected
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, 2)
    if pixels.shape != expected.shape or image_size(picture.path) != expected.shape[:2]:
        return f"shape {pixels.shape} instead of {expected.shape}"
    difference = np.abs(pixels.astype(int) - expected.astype(int)).max()
    return None if difference <= picture.tolerance else f"up to {difference} levels off"


def test_pictures_of_odd_formats(campaign, tmp_path):
    for seed in range(campaign.tries(80, 3000)):
        rng = np.random.default_rng(seed)
        make = MAKERS[seed % len(MAKERS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImageWarning)
            warnings.simplefilter("ignore", UserWarning)  # of the libraries that write
            picture = make(rng, tmp_path)
            fault = describe_fault(picture)
        picture.path.unlink()
        if fault is None:
            campaign.passed()
        else:
            campaign.failed(f"seed {seed}, {picture.description}: {fault}")
