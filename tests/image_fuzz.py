"""Mutated image files of every format: the target of the fuzz tests, and a coverage-guided run by hand.

    pip install atheris
    python tests/image_fuzz.py --seconds 600

decodes files that atheris mutates towards new branches of the readers; without atheris, it mutates them at random. Any
other outcome than pixels or one sentence stops the run and prints the file.
"""

import argparse
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from picture_files import write_bmp, write_netpbm, write_png, write_tiff
from PIL import Image

from recontrast.data import images
from recontrast.data.notices import ImageWarning

MAX_PIXELS = 1 << 22  # of a mutated file: a larger image is refused, as is one beyond the limit of users


def make_corpus(folder):
    """Write a small file of every format and layout, and return their contents by name."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (13, 17, 1)).astype(np.uint8)
    colour = rng.integers(0, 256, (13, 17, 3)).astype(np.uint8)
    deep = rng.integers(0, 65536, (13, 17, 3)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix, options in {
        "png": {"exif": exif}, "jpg": {"exif": exif}, "bmp": {}, "tif": {"tiffinfo": {274: 3}}, "webp": {"exif": exif},
        "gif": {}, "jp2": {}, "avif": {"exif": exif},
    }.items():  # fmt: skip
        Image.fromarray(colour).save(folder / f"colour.{suffix}", **options)
    frames = [Image.fromarray(colour), Image.fromarray(colour[::-1])]
    for suffix in ("png", "tif", "webp", "gif"):
        frames[0].save(folder / f"pages.{suffix}", save_all=True, append_images=frames[1:])
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(colour).save(folder / "progressive.jpg", progressive=True)
    for name in ("tiff_lzw", "packbits", "tiff_jpeg", "tiff_adobe_deflate"):
        Image.fromarray(colour).save(folder / f"{name}.tif", compression=name)
    Image.fromarray(grey[..., 0] > 99).save(folder / "group4.tif", compression="group4")
    write_png(folder / "deep.png", deep, 16, 2, interlaced=True)
    write_png(folder / "palette.png", grey % 16, 4, 3, palette=rng.integers(0, 256, (16, 3)))
    write_tiff(folder / "planes.tif", deep, 16, photometric=2, planar=True, order=">", big=True)
    write_tiff(folder / "tiles.tif", deep[..., :1] >> 4, 12, tile=(16, 16), compression=8)
    write_tiff(folder / "predictor.tif", deep, 16, photometric=2, compression=8, predictor=2, rows_per_strip=4)
    write_tiff(folder / "index.tif", grey % 4, 2, photometric=3, tags={320: list(range(12))})
    for full in (1, 255, 4095, 65535):
        for plain in (False, True):
            samples = rng.integers(0, full + 1, (13, 17, 1 if full == 1 else 3))
            write_netpbm(folder / f"{full}{plain}.pnm", samples, full, plain=plain)
    write_bmp(folder / "index.bmp", grey % 16, bits=4, palette=rng.integers(0, 256, (16, 3)))
    write_bmp(folder / "down.bmp", colour % 32, bits=16, top_down=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutate(content, rng):
    """Damage a file: bits, bytes, integers, a cut, a repeated, removed or zeroed part."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        # Headers decide more than pixels do.
        end = len(data) if rng.random() < 0.5 else min(len(data), 80)
        at = int(rng.integers(0, max(end, 1)))
        length = int(rng.integers(1, 33))
        kind = int(rng.integers(0, 8))
        if not data:
            break
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(256))
        elif kind == 2:
            data[at : at + 4] = int(rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])).to_bytes(4, "little")
        elif kind == 3:
            data[at : at + 2] = int(rng.choice([0, 1, 2, 3, 16, 255, 65535])).to_bytes(2, "big")
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            del data[at : at + length]
        elif kind == 6:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = bytes(min(length, len(data) - at))
    return bytes(data)


def describe_fault(path, content):
    """Read a damaged file as an image, its size, and a mask; return what is wrong, or None."""
    path.write_bytes(content)
    for read in (images.read_image, images.image_size, images.read_mask):
        begin = time.process_time()
        try:
            result = read(path)
        except ValueError as error:
            if not re.fullmatch(rf"{re.escape(str(path))}: wanted .+, got .+", str(error)):
                return f"{read.__name__}: not one sentence: {str(error)[:200]!r}"
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {error}"
        else:
            if read is images.read_image and (result.ndim != 3 or result.shape[2] != 3 or result.dtype != np.uint8):
                return f"read_image: {result.shape} {result.dtype}"
        if time.process_time() - begin > 10:
            return f"{read.__name__}: {time.process_time() - begin:.0f} s"
    return None


def main():
    """Fuzz for a number of seconds, with atheris if it is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="duration (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random mutations without atheris (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ImageWarning)
    images.MAX_PIXELS = MAX_PIXELS
    folder = Path(tempfile.mkdtemp())
    (folder / "corpus").mkdir()
    corpus = make_corpus(folder / "corpus")

    def decode_one(content):
        if fault := describe_fault(folder / "x", content):
            (folder / "fault").write_bytes(content)
            raise AssertionError(f"{fault}: {folder / 'fault'}")

    try:
        import atheris
    except ImportError:
        rng, tried, end = np.random.default_rng(options.seed), 0, time.monotonic() + options.seconds
        names = sorted(corpus)
        while time.monotonic() < end:
            decode_one(mutate(corpus[names[tried % len(names)]], rng))
            tried += 1
        print(f"{tried} files tried, none failed")
        return
    from recontrast.data import decode, eight_bits, masks, netpbm, open_image, tiff, tiff_tags

    for module in (decode, eight_bits, masks, netpbm, open_image, tiff, tiff_tags):
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and isinstance(value, type(main)):
                setattr(module, name, atheris.instrument_func(value))
    arguments = [sys.argv[0], str(folder / "corpus"), f"-max_total_time={options.seconds}", "-timeout=60"]
    atheris.Setup([*arguments, "-rss_limit_mb=4096"], decode_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
