"""recontrast.data.images and .decode: the same pixels from every file format, bit-identical to torchvision's."""

import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision import transforms

from recontrast.data import images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UPRIGHT = {  # transform of the stored pixels by orientation (EXIF 2.3, tag 0x0112)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def random_pixels(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def make_exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def write_png16(path, array, colour):
    """Write 16-bit colour, which PIL cannot write. Colour type 2 is RGB, 4 is grey with alpha."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def write_tiff(path, data, shape, bits, photometric, order="<", orientation=1):
    """Write an uncompressed TIFF with one strip, for variants that PIL cannot write."""
    height, width, samples = shape
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [0]}
    tags |= {274: [orientation], 277: [samples], 278: [height], 279: [len(data)]}
    start = 8 + 2 + 12 * len(tags) + 4
    more = struct.pack(f"{order}{samples}H", *tags[258]) if samples > 2 else b""
    tags[273] = [start + len(more)]
    entries = b""
    for tag, values in tags.items():
        kind = 3 if tag in (258, 262, 274, 277) else 4
        inline = struct.pack(order + ("H" if kind == 3 else "I") * len(values), *values)
        inline = struct.pack(order + "I", start) if len(inline) > 4 else inline.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + inline
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "IH", 8, len(tags)) + entries + struct.pack(order + "I", 0)
    path.write_bytes(head + more + data)
    return path


# ---- the reference pipeline


@settings(max_examples=40, deadline=None)
@given(
    array=st.tuples(st.integers(1, 90), st.integers(1, 90), st.booleans()).flatmap(
        lambda s: hnp.arrays(np.uint8, s[:2] if s[2] else (*s[:2], 3))
    ),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    data=st.data(),
)
def test_pixels_equal_torchvision(tmp_path_factory, array, size, data):
    crop = data.draw(st.tuples(st.integers(1, size[0]), st.integers(1, size[1])))
    path = save(tmp_path_factory.mktemp("t") / "x.png", array)
    horizontal = transforms.Resize((array.shape[0], size[1]))  # Pillow 13 starts with the height of tall images
    steps = [horizontal, transforms.Resize(size), transforms.CenterCrop(crop), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(Image.open(path).convert("RGB"))
    result = images.read_image(path, size=size, crop=crop)
    assert (
        result.shape == (*crop, 3) and result.dtype == np.uint8 and result.flags.writeable and result.flags.c_contiguous
    )
    for channels_last in (False, True):
        assert torch.equal(images.normalise(result[None], MEAN, STD, channels_last=channels_last)[0], expected)


def test_tall_images_do_not_depend_on_pillows_version(tmp_path):
    y, x, c = np.indices((300, 40, 3))
    path = save(tmp_path / "x.png", ((y * y * 7 + x * x * 13 + c * 71 + x * y * 3) % 256).astype(np.uint8))
    # Image.resize gives this in Pillow 10.1 and 11.3; 13.0 starts with the height and gives 666250913.
    assert zlib.crc32(images.read_image(path, size=(32, 24)).tobytes()) == 1641963054


@pytest.mark.parametrize("shape", [(300, 400), (255, 301), (64, 64)])
def test_resize_256_and_crop_224_equal_upstream(tmp_path, shape):
    path = save(tmp_path / "x.jpg", random_pixels(*shape, 3), quality=92)
    steps = [transforms.Resize((256, 256)), transforms.ToTensor(), transforms.CenterCrop(224)]
    expected = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(Image.open(path))
    assert torch.equal(images.normalise(images.read_image(path, size=256, crop=224)[None], MEAN, STD)[0], expected)


@settings(max_examples=30, deadline=None)
@given(
    mask=hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.sampled_from([0, 90, 255])
    ),
    size=st.integers(1, 50),
)
def test_masks_equal_upstream(tmp_path_factory, mask, size):
    mask[0, 0] = 255  # grey values are kept only if the mask contains white
    mask[:, -1] = mask[-1] = 0  # a mask has a black border
    assume(mask.any())
    path = save(tmp_path_factory.mktemp("m") / "m.png", mask)
    resize = [transforms.Resize((mask.shape[0], size)), transforms.Resize((size, size))]
    steps = [*resize, transforms.CenterCrop(max(1, size - 3)), transforms.ToTensor()]
    expected = transforms.Compose(steps)(Image.open(path))[0].numpy()
    crop = max(1, size - 3)
    assert np.array_equal(images.read_mask(path, size=size, crop=crop), expected.astype(bool))
    assert np.array_equal(images.read_mask(path, size=size, crop=crop, rule="half"), expected >= 0.5)


# ---- one image in many file formats


FILES = {
    "png": ["RGB", "L", "1", "P", "LA", "RGBA"],
    "bmp": ["RGB", "L", "1", "P", "RGBA"],
    "tif": ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "LAB"],
    "lzw.tiff": ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"],
    "webp": ["RGB", "L", "LA", "RGBA"],
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in FILES.items() for mode in modes])
def test_same_pixels_from_every_format(tmp_path, suffix, mode):
    array = np.full((13, 17, 3), [200, 30, 90], np.uint8) if mode == "YCbCr" else random_pixels(13, 17, 3)
    image = Image.fromarray(array).convert(mode) if mode != "LAB" else Image.frombytes("LAB", (17, 13), array.tobytes())
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(random_pixels(13, 17, seed=1)))  # dropped, not composited
    options = {"webp": {"lossless": True, "exact": True}, "lzw.tiff": {"compression": "tiff_lzw"}}.get(suffix, {})
    image.save(tmp_path / f"x.{suffix}", **options)
    expected = np.asarray(image.convert("RGB")).astype(int)
    result = images.read_image(tmp_path / f"x.{suffix}")
    assert np.abs(result - expected).max() <= (mode == "YCbCr"), "libtiff rounds YCbCr differently"
    assert images.image_size(tmp_path / f"x.{suffix}") == (13, 17)


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255, 7])])
def test_palette_with_transparency_keeps_its_colours(tmp_path, transparency):
    image = Image.fromarray(random_pixels(9, 9, 3)).quantize(16)
    image.save(tmp_path / "p.png", transparency=transparency)
    assert np.array_equal(images.read_image(tmp_path / "p.png"), np.asarray(image.convert("RGB")))


def test_jpeg_grey_and_cmyk(tmp_path):
    grey = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 16, 0)
    result = images.read_image(save(tmp_path / "g.jpg", grey, quality=100))
    assert result.shape == (16, 64, 3) and np.abs(result[..., 0].astype(int) - grey).max() <= 2
    save(tmp_path / "c.jpg", np.full((16, 16, 3), [250, 10, 10], np.uint8), "CMYK", quality=100)
    assert np.abs(images.read_image(tmp_path / "c.jpg").astype(int) - [250, 10, 10]).max() <= 2


def to_eight_bits(values):
    """Return 16-bit values divided by 257 and rounded."""
    return (values.astype(np.int64) + 128) // 257


@pytest.mark.parametrize("suffix", ["png", "tif", "lzw.tif", "mm.tif", "white0.tif", "int32.tif"])
def test_16_bit_grey_is_divided_by_257(tmp_path, suffix):
    values = random_pixels(12, 256, dtype=np.uint16)
    values[0] = np.arange(256) * 257  # 8-bit values in 16 bits must be restored exactly
    values[1, :6] = [0, 128, 129, 65406, 65407, 65535]  # 128 / 257 rounds down, 129 / 257 rounds up
    path = tmp_path / f"x.{suffix}"
    if suffix == "mm.tif":
        write_tiff(path, values.astype(">u2").tobytes(), (12, 256, 1), 16, 1, ">")
    elif suffix == "white0.tif":
        write_tiff(path, (65535 - values).astype("<u2").tobytes(), (12, 256, 1), 16, 0)
    else:
        save(
            path,
            values.astype(np.int32) if suffix == "int32.tif" else values,
            **({"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}),
        )
    result = images.read_image(path)
    assert np.array_equal(result, np.broadcast_to(to_eight_bits(values)[..., None], result.shape))
    assert np.array_equal(result[0, :, 0], np.arange(256)) and result[1, :6, 0].tolist() == [0, 0, 1, 254, 255, 255]


def test_16_bit_colour_is_within_a_level_and_exact_for_8_bit_values(tmp_path):
    values = random_pixels(9, 11, 3, dtype=np.uint16)
    exact = random_pixels(9, 11, 3)
    for name, array in (("r", values), ("e", exact.astype(np.uint16) * 257)):
        paths = [
            write_png16(tmp_path / f"{name}.png", array, 2),
            write_tiff(tmp_path / f"{name}.tif", array.astype("<u2").tobytes(), (9, 11, 3), 16, 2),
            write_tiff(tmp_path / f"{name}m.tif", array.astype(">u2").tobytes(), (9, 11, 3), 16, 2, ">"),
        ]
        for path in paths:
            result = images.read_image(path)
            assert np.array_equal(result, array >> 8), "Pillow keeps the high byte"
            assert np.abs(result - to_eight_bits(array)).max() <= (name == "r")
    grey = write_png16(tmp_path / "la.png", values[..., :2], 4)
    assert np.array_equal(images.read_image(grey), np.repeat(values[..., :1] >> 8, 3, 2))


@pytest.mark.parametrize("orientation", list(UPRIGHT))
@pytest.mark.parametrize("suffix", ["png", "tif", "lzw.tif", "webp", "16.png", "16.tif", "jpg"])
def test_exif_orientation(tmp_path, orientation, suffix):
    array = random_pixels(6, 10, dtype=np.uint16) if suffix.startswith("16") else random_pixels(6, 10, 3)
    path = tmp_path / f"x.{suffix}"
    options = {"webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}}.get(suffix, {})
    if suffix.endswith("tif"):
        options["tiffinfo"] = {274: orientation}
    else:
        options["exif"] = make_exif(orientation)
    save(path, array, **options)
    plain = save(
        tmp_path / f"plain.{suffix}", array, **{k: v for k, v in options.items() if k not in ("exif", "tiffinfo")}
    )
    expected = UPRIGHT[orientation](images.read_image(plain))
    assert np.array_equal(images.read_image(path), expected)
    assert images.image_size(path) == expected.shape[:2]


# ---- masks


def test_equivalent_masks(tmp_path):
    truth = np.zeros((20, 30), bool)
    truth[4:9, 3:17] = True
    encodings = {
        "255.png": truth * np.uint8(255),
        "1.png": truth * np.uint8(1),
        "class.png": truth * np.uint8(7),
        "65535.png": truth * np.uint16(65535),
        "1_16.png": truth * np.uint16(1),
        "255_16.tif": truth * np.uint16(255),
        "id.tif": truth * np.int32(100_000),
        "bool.png": truth,
        "blue.png": np.stack([truth * 0, truth * 0, truth * 60], 2).astype(np.uint8),
    }
    paths = [save(tmp_path / name, array) for name, array in encodings.items()]
    palette = Image.fromarray(truth * np.uint8(1)).convert("L")
    palette.putpalette([0, 0, 0, 0, 0, 128])  # blue, which converts to grey 15
    palette.save(tmp_path / "palette.png")
    swapped = Image.fromarray((~truth) * np.uint8(1))
    swapped.putpalette([255, 255, 255, 0, 0, 0])  # as written by PNG optimisers: the colour counts, not the index
    swapped.save(tmp_path / "swapped.gif.png")
    for size in (None, 11):
        for rule in ("any", "half"):
            expected = images.read_mask(paths[0], size=size, rule=rule)
            assert expected.any() and not expected.all() and expected.dtype == bool
            for path in [*paths, tmp_path / "palette.png", tmp_path / "swapped.gif.png"]:
                assert np.array_equal(images.read_mask(path, size=size, rule=rule), expected), path.name
    assert np.array_equal(images.read_mask(paths[0]), truth)


def test_any_grows_the_mask_and_half_does_not(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16:32] = 255
    path = save(tmp_path / "m.png", mask)
    grown, half = (images.read_mask(path, size=32, rule=rule) for rule in ("any", "half"))
    assert half.sum() == 64 and grown.sum() == 100, "8 x 8 pixels, and one more on each side for any"
    assert not images.read_mask(save(tmp_path / "0.png", mask * 0)).any()
    deep = np.array([[65535, 100, 0]], np.uint16)
    assert images.read_mask(save(tmp_path / "d.png", deep)).tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match=r"rule: wanted 'any' or 'half', got 'all'"):
        images.read_mask(path, rule="all")


def test_pairs(tmp_path):
    array = random_pixels(6, 10, 3)
    image = save(tmp_path / "i.jpg", array, exif=make_exif(6))
    mask = np.zeros((6, 10), np.uint8)
    mask[:2] = 255
    turned = save(tmp_path / "m.png", mask, exif=make_exif(6))
    upright = save(tmp_path / "u.png", np.rot90(mask, -1))
    for path in (turned, upright):
        result = images.read_pair(SimpleNamespace(path=image, mask=path))
        assert result[0].shape == (10, 6, 3) and np.array_equal(result[1], np.rot90(mask, -1) > 0)
    pixels, no_mask = images.read_pair(SimpleNamespace(path=image, mask=None), 8, 4)
    assert pixels.shape == (4, 4, 3) and no_mask is None
    flat = save(tmp_path / "flat.png", mask)
    with pytest.raises(ValueError, match=r"flat\.png: wanted .* size of its image .*i\.jpg, 10 x 6 .* got 6 x 10$"):
        images.read_pair(SimpleNamespace(path=image, mask=flat), 8)


# ---- invalid input


def test_one_pixel(tmp_path):
    path = save(tmp_path / "1.png", np.array([[[9, 8, 7]]], np.uint8))
    assert images.read_image(path).tolist() == [[[9, 8, 7]]]
    assert (images.read_image(path, size=32) == [9, 8, 7]).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "lzw.tif", "webp"])
def test_truncated_and_damaged(tmp_path, suffix):
    options = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    path = save(tmp_path / f"x.{suffix}", random_pixels(64, 64, 3), **options)
    content = path.read_bytes()
    for length in (0, 1, 5, 12, 40, len(content) // 2, len(content) - 200):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: wanted .*, got [^\n]*$"):
            images.read_image(path)
    path.write_bytes(b"\0" * len(content))
    with pytest.raises(
        ValueError,
        match=r"wanted a PNG, .* image, got a file that starts with b'",
    ):
        images.image_size(path)


def test_samples_of_unknown_scale(tmp_path):
    path = save(tmp_path / "f.tif", random_pixels(4, 4).astype(np.float32))
    for read in (images.read_image, images.read_mask):
        with pytest.raises(
            ValueError,
            match=rf"^{re.escape(str(path))}: wanted unsigned .* of 1 to 16 bits, got (32-bit )?floating-point samples",
        ):
            read(path)
    deep = save(tmp_path / "i.tif", np.array([[0, 70000]], np.int32))
    with pytest.raises(ValueError, match=r"wanted samples from 0 to 65535 \(16 bits\), got 0 to 70000"):
        images.read_image(deep)


def test_missing_file_and_wrong_suffix(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"^{re.escape(str(tmp_path))}/no\.png: wanted an image, got no such file$"
    ):
        images.read_image(tmp_path / "no.png")
    save(tmp_path / "x.jpg", random_pixels(4, 4), format="PNG")
    assert np.array_equal(images.read_image(tmp_path / "x.jpg")[..., 0], random_pixels(4, 4))


@pytest.mark.parametrize("suffix", ["png", "tif", "lzw.tif", "jpg", "bmp"])
def test_pixel_limit_is_independent_of_pil(tmp_path, monkeypatch, suffix):
    options = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else {}
    path = save(tmp_path / f"x.{suffix}", random_pixels(10, 20), **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # far below the size of the image
    assert images.read_image(path, size=8, crop=4).shape == (4, 4, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 199)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: wanted at most 199 pixels \(.*\), got 20 x 10 = 200$"
    ):
        images.read_image(path)
    assert Image.MAX_IMAGE_PIXELS == 5


@pytest.mark.parametrize("bad", [0, -3, 2.5, "256", (4,), (4, 0), (4, 4, 3), True])
def test_sizes_are_checked(tmp_path, bad):
    path = save(tmp_path / "x.png", random_pixels(8, 8))
    with pytest.raises(ValueError, match="size: wanted a positive number of pixels or two of them"):
        images.read_image(path, size=bad)
    with pytest.raises(ValueError, match="crop: wanted a positive number"):
        images.read_image(path, crop=bad)
    with pytest.raises(ValueError, match=r"x\.png: crop: wanted at most the size of the image, 8 x 8, got 9 x 9"):
        images.read_image(path, crop=9)


# ---- normalise


def test_normalise_layouts_devices_and_types(device):
    batch = torch.from_numpy(random_pixels(2, 5, 7, 3))
    expected = (batch.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    for channels_last, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        result = images.normalise(batch, MEAN, STD, device=device, channels_last=channels_last)
        assert result.is_contiguous(memory_format=layout) and result.device.type == device
        assert torch.equal(result.cpu(), images.normalise(batch, MEAN, STD)), "every device must round as the CPU does"
    torch.testing.assert_close(result.cpu().permute(0, 2, 3, 1).double(), expected, rtol=0, atol=1e-6)
    half = images.normalise(batch, MEAN, STD, dtype=torch.bfloat16)
    assert torch.equal(half, images.normalise(batch, MEAN, STD).bfloat16())
    assert torch.equal(batch, torch.from_numpy(random_pixels(2, 5, 7, 3))), "the input must not change"


def test_normalise_views_and_invalid_batches():
    array = random_pixels(3, 6, 6, 3)
    array.setflags(write=False)  # as images from a memory map
    expected = images.normalise(array, MEAN, STD)
    assert torch.equal(images.normalise(array[::2, 1:4], MEAN, STD), expected[::2, :, 1:4])
    assert images.normalise(array[:0], MEAN, STD).shape == (0, 3, 6, 6)
    for bad in (array.astype(np.float64), array[0], array[..., :2]):
        with pytest.raises(ValueError, match=r"batch: wanted uint8 or float32 \(N, H, W, 3\), got "):
            images.normalise(bad, MEAN, STD)
