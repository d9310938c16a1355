"""Windows: images of more than 8 bits, from the file to the exported detector, without loss of their range."""

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from command_line import fails, works
from picture_files import write_tiff
from PIL import Image
from small_run import RECIPE

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.app.options import parse_window as parse_option
from recontrast.calibration.appearance_drift import describe_appearance
from recontrast.data import notices
from recontrast.data import window as windows
from recontrast.data.augment import VIEWS, change_view
from recontrast.data.cache import ImageCache
from recontrast.data.decode_budget import BUDGET
from recontrast.data.encoded_image import EncodedImage
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import image_size, normalise, read_image
from recontrast.data.in_memory import InMemoryImages, read_given
from recontrast.data.near_copies import sketch_image
from recontrast.data.pillow_resize import FloatResize
from recontrast.data.tiles import Tiles, join_tiles
from recontrast.data.window import apply_window, find_window, parse_window, to_levels
from recontrast.recipes.recipe import Recipe
from recontrast.training.camera_bits import fix_window

RANDOM = np.random.default_rng()  # fresh inputs: every assertion holds for all of them
LOW, HIGH = 300.0, 40_000.0
SMALL = "--architecture padim --backbone test_resnet --weights random --size 32 --batch 4 --seed 1".split()
SMALL += ["--holdout", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def new_process():
    notices.forget_warnings()
    yield
    notices.forget_warnings()


def draw(*shape):
    return RANDOM.integers(0, 65536, shape, np.uint16)


def scale(samples, low=LOW, high=HIGH):
    """The definition, in float64: (H, W) or (H, W, 3) to (H, W, 3)."""
    pixels = np.clip((samples.astype(np.float64) - low) / (high - low), 0, 1)
    return np.repeat(pixels[:, :, None], 3, 2) if pixels.ndim == 2 else pixels


def save(path, samples):
    """Write samples in the format of the suffix."""
    if path.suffix == ".pgm":
        path.write_bytes(b"P5\n%d %d\n65535\n" % samples.shape[::-1] + samples.astype(">u2").tobytes())
    elif path.suffix == ".ppm":
        path.write_bytes(b"P6\n%d %d\n65535\n" % samples.shape[1::-1] + samples.astype(">u2").tobytes())
    elif path.suffix == ".tif":
        tifffile.imwrite(path, samples, photometric="minisblack" if samples.ndim == 2 else "rgb")
    else:
        Image.fromarray(samples).save(path)
    return path


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif", "jp2"])
def test_every_format_keeps_all_levels(tmp_path, suffix):
    samples = draw(23, 31)
    pixels = read_image(save(tmp_path / f"a.{suffix}", samples), window=(LOW, HIGH))
    assert pixels.dtype == np.float32 and np.abs(pixels - scale(samples)).max() < 1e-6
    inside = (samples > LOW) & (samples < HIGH)
    assert len(np.unique(pixels[inside])) == len(np.unique(samples[inside])) > 256


@pytest.mark.parametrize("suffix", ["tif", "ppm"])
def test_colour_keeps_its_channels(tmp_path, suffix):
    samples = draw(9, 14, 3)
    pixels = read_image(save(tmp_path / f"a.{suffix}", samples), window=(LOW, HIGH))
    assert np.abs(pixels - scale(samples)).max() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("f2", -3, 5), ("f4", -1000, 400), ("f8", 1e9, 1e9 + 50), ("i2", -1024, 3071), ("i4", -70_000, 2**25),
     ("u4", 0, 2**31)],
)  # fmt: skip
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_any_sample_type(tmp_path, dtype, low, high, order):
    samples = RANDOM.uniform(low - 10 * (dtype != "u4"), high + 10, (12, 17)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", samples, byteorder=order)
    pixels = read_image(tmp_path / "a.tif", window=(low, high))
    assert np.abs(pixels - scale(samples, low, high)).max() < 1e-6
    assert image_size(tmp_path / "a.tif") == (12, 17)


def test_twelve_packed_bits_and_inverted_grey(tmp_path):
    values = RANDOM.integers(0, 4096, (6, 10), np.uint16)
    for photometric, wanted in ((1, values), (0, 4095 - values)):
        write_tiff(tmp_path / "a.tif", values[:, :, None], 12, photometric=photometric)
        pixels = read_image(tmp_path / "a.tif", window=(0, 4095))
        assert np.abs(pixels - scale(wanted, 0, 4095)).max() < 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_pillow(tmp_path, orientation):
    samples = draw(5, 8)
    tifffile.imwrite(tmp_path / "a.tif", samples, extratags=[(274, "H", 1, orientation, True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", notices.ImageWarning)
        levels = read_image(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif", window=(0, 65535))
    assert pixels.shape == levels.shape and np.abs(pixels - levels / 255).max() < 0.5 / 255 + 1e-6


def test_resized_in_float_as_an_antialiased_bilinear_filter(tmp_path):
    samples = draw(67, 90)
    path = save(tmp_path / "a.tif", samples)
    pixels = read_image(path, size=(32, 40), crop=(24, 30), window=(LOW, HIGH))
    planes = torch.from_numpy(scale(samples)).permute(2, 0, 1)[None]
    wanted = F.interpolate(planes, (32, 40), mode="bilinear", antialias=True)[0].permute(1, 2, 0)[4:28, 5:35].numpy()
    assert np.abs(pixels - wanted).max() < 2e-6
    for shape in ((67, 90), (20, 33), (1, 1), (5, 300)):
        images = RANDOM.random((2, *shape, 3), np.float32)
        got = FloatResize((32, 40))(torch.from_numpy(images))
        for image, resized in zip(images, got, strict=True):
            tifffile.imwrite(path, image, photometric="rgb")
            assert (
                np.abs(read_image(path, size=(32, 40), window=(0, 1)).transpose(2, 0, 1) - resized.numpy()).max() < 2e-6
            )


def test_every_reader_gives_the_same_pixels(tmp_path):
    samples = [draw(40, 48) for _ in range(3)]
    paths = [save(tmp_path / f"{index}.png", values) for index, values in enumerate(samples)]
    window, expected = (LOW, HIGH), np.stack([read_image(path, size=32, window=(LOW, HIGH)) for path in paths])
    readers = {
        "content": [read_image(EncodedImage(path.read_bytes()), size=32, window=window) for path in paths],
        "files": ImageFiles(paths).resized(32, window=window)[range(3)],
        "memory": ImageCache(paths, 32, window=window)[:],
        "cache": ImageCache(paths, 32, directory=tmp_path / "cache", window=window)[:],
        "cache again": ImageCache(paths, 32, directory=tmp_path / "cache", window=window).tensor().numpy(),
        "paths": InMemoryImages(paths, 32, window=window)[range(3)],
        "pictures": InMemoryImages([Image.open(path) for path in paths], 32, window=window)[range(3)],
        "arrays": InMemoryImages(samples, 32, window=window)[range(3)],
        "floats": InMemoryImages([values.astype(np.float64) for values in samples], 32, window=window)[range(3)],
    }
    for name, pixels in readers.items():
        assert np.abs(np.stack(pixels) - expected).max() < 1e-6, name
        assert np.asarray(pixels).dtype == np.float32, name
    assert not np.array_equal(ImageCache(paths, 32, directory=tmp_path / "cache", window=(0, HIGH))[:], expected)
    whole = read_image(paths[0], window=window)
    tiles = ImageCache(paths[:1], 32, tile=16, stride=8, window=window)
    assert np.array_equal(next(tiles.read_views(0)), whole) and np.array_equal(
        tiles[:], Tiles(whole, 16, 8)[range(len(tiles))]
    )
    assert np.array_equal(join_tiles(tiles[:], (40, 48), 8), whole)


def test_functions_of_pixels_do_on_floats_what_they_do_on_levels():
    levels = RANDOM.integers(0, 256, (3, 24, 24, 3), np.uint8)
    pixels = levels.astype(np.float32) / np.float32(255)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    assert torch.equal(normalise(pixels, mean, std), normalise(levels, mean, std))
    assert np.array_equal(pixels, levels.astype(np.float32) / np.float32(255)), "the batch is not changed"
    assert np.array_equal(to_levels(pixels), levels) and to_levels(levels) is levels
    assert np.abs(describe_appearance(pixels) - describe_appearance(levels)).max() < 2e-6
    for image, same in zip(pixels, levels, strict=True):
        assert float(sketch_image(image) @ sketch_image(same)) > 0.99
    for view in {view for views in VIEWS.values() for view in views}:
        assert np.abs(change_view(pixels, view) * 255 - change_view(levels, view)).max() <= 0.5 + 1e-3


def test_auto_window_is_two_percentiles_of_all_images(tmp_path):
    samples = [draw(50, 60) // (index + 1) for index in range(3)]
    paths = [save(tmp_path / f"{index}.png", values) for index, values in enumerate(samples)]
    low, high = np.percentile(np.stack(samples), (0.1, 99.9), method="nearest")
    assert find_window(paths, read_given) == find_window(samples, read_given) == (low, high)
    recipe = fix_window(RECIPE.replace(window="auto"), paths)
    assert recipe.window == (low, high) and fix_window(recipe, paths) is recipe
    flat = [np.full((8, 8), 7, np.uint16)] * 2
    with pytest.raises(ValueError, match="image 0: wanted images of different values for the window auto, got 7"):
        find_window(flat, read_given)


def test_auto_window_stays_within_the_memory_of_decoding(tmp_path, monkeypatch):
    """With memory for one image, the samples of one are looked at while no other is decoded."""
    paths, seen = [save(tmp_path / f"{index}.png", draw(20, 30)) for index in range(6)], []
    wanted, alive = find_window(paths, read_given), []

    def observe(*arguments):
        alive.append(1)
        time.sleep(0.01)
        seen.append((len(alive), BUDGET._used))
        alive.pop()

    monkeypatch.setattr(BUDGET, "limit", 1)
    monkeypatch.setattr(windows, "count_cpus", lambda: 4)
    monkeypatch.setattr(windows, "check_samples", observe)
    assert find_window(paths, read_given) == wanted
    assert [count for count, _ in seen] == [1] * 6 and all(used > 0 for _, used in seen)


@pytest.mark.parametrize(
    "window", [(5, 5), (6, 5), (1,), "all", (0, float("nan")), (0, float("inf")), (True, 3), ("0", "1")]
)
def test_invalid_windows(tmp_path, window):
    path = save(tmp_path / "a.png", draw(4, 4))
    with pytest.raises(ValueError, match=r"window: wanted two numbers LOW < HIGH, got "):
        read_image(path, window=window)
    with pytest.raises(
        ValueError, match=r"window: wanted none, 'auto' or two numbers \[LOW, HIGH\], the lower one first, got"
    ):
        Recipe(window=window)
    with pytest.raises(ValueError, match=r"bits: wanted none if window is given, got 12"):
        Recipe(window=(0, 4095), bits=12)
    with pytest.raises(ValueError, match="got 'auto', which training finds"):
        parse_window("auto")


def test_images_without_a_window(tmp_path):
    """One sentence that names the file: 8 bits of any kind, samples that are not finite, and unknown layouts."""
    levels = RANDOM.integers(0, 256, (6, 7, 3), np.uint8)
    for name in ("a.png", "a.jpg", "a.tif", "a.gif", "a.ppm"):
        Image.fromarray(levels).save(tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"{name}: wanted samples of more than 8 bits for the window 300 to 40000, got 8 bits"
        ):
            read_image(tmp_path / name, window=(LOW, HIGH))
    for value in (np.nan, np.inf, -np.inf):
        samples = RANDOM.random((6, 7), np.float32)
        samples[2, 3] = samples[4, 4] = value
        tifffile.imwrite(tmp_path / "nan.tif", samples)
        with pytest.raises(ValueError, match=r"nan\.tif: wanted finite samples, got NaN or infinity in 2 of 42"):
            read_image(tmp_path / "nan.tif", window=(0, 1))
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((4, 4), np.complex64))
    with pytest.raises(
        ValueError, match=r"c\.tif: wanted grey or RGB samples .* for a window, got 64-bit complex samples"
    ):
        read_image(tmp_path / "c.tif", window=(0, 1))
    with pytest.raises(ValueError, match=r"image: wanted samples of more than 8 bits .*, got 8 bits"):
        apply_window(levels, (0, 1))


def test_the_option_takes_two_numbers_or_a_word(tmp_path):
    assert parse_option("-1000,400") == parse_option("-1000 400") == [-1000, 400] and parse_option("auto") == "auto"
    run = ["train", tmp_path, "--window"]
    assert fails(*run, "9", "3") == "recontrast: --window: wanted LOW < HIGH, got 9 3"
    assert fails(*run, "wide") == "recontrast: --window: wanted auto or two numbers LOW HIGH, got 'wide'"


def thermal_set(root):
    """Write float images in MVTec AD layout, in kelvin; defects are hot squares. Return their folder."""
    for split, count in (("train/good", 6), ("test/good", 2), ("test/hot", 2)):
        (root / split).mkdir(parents=True)
        for index in range(count):
            samples = (300 + RANDOM.normal(0, 2, (40, 40)) + np.sin(np.arange(40) / 3)).astype(np.float32)
            if split == "test/hot":
                samples[10:20, 10:20] += 8
                (root / "ground_truth/hot").mkdir(parents=True, exist_ok=True)
                Image.fromarray((samples > 306).astype(np.uint8) * 255).save(
                    root / f"ground_truth/hot/{index}_mask.png"
                )
            tifffile.imwrite(root / split / f"{index}.tif", samples)
    return root


def test_from_training_to_the_exported_file(tmp_path):
    """Every command and the exported file use the window of the training."""
    data, out = thermal_set(tmp_path / "plate"), tmp_path / "run"
    small = [
        "--architecture",
        "padim",
        "--backbone",
        "test_resnet",
        "--weights",
        "random",
        "--size",
        "32",
        "--device",
        "cpu",
    ]
    text = works("train", data, *small, "--window", "290", "310.5", "--holdout", "0", "--out", out)
    assert "window: 290 to 310.5, values outside are clipped" in text
    detector = recontrast.load(out, device="cpu")
    assert detector.recipe.window == (290, 310.5)
    assert checkpoints.load(out / "checkpoint.pt").recipe.to_dict()["window"] == [290, 310.5]
    tests = sorted(data.glob("test/*/*.tif"))
    works("calibrate", out, "--good", data / "test/good", "--false-alarm-rate", "0.4")
    works("predict", out, data / "test", "--out", tmp_path / "scores")
    works("report", out, data, "--out", tmp_path / "report.html")
    written = json.loads((tmp_path / "scores/scores.json").read_text())
    assert written["window"] == [290, 310.5]
    scores = {Path(row["path"]): row["score"] for row in written["images"]}
    arrays = [tifffile.imread(path) for path in tests]
    predictions = detector.predict(arrays)
    assert np.allclose([scores[path] for path in tests], predictions.scores, rtol=1e-5)
    assert np.array_equal(np.asarray(predictions[0].image()), to_levels(read_image(tests[0], window=(290, 310.5))))
    predictions[0].heat_map()
    works("export", out, "--format", "onnx", "--out", tmp_path / "d.onnx")
    exported = recontrast.load(tmp_path / "d.onnx")
    assert np.allclose(exported.predict(tests).scores, predictions.scores, rtol=1e-4)
    assert exported.description["preprocessing"]["window"] == [290, 310.5]
    assert exported.description["preprocessing"]["input"].startswith("float32 in [0, 1] RGB")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "plain.png")
    for file in (out, tmp_path / "d.onnx"):
        message = fails("predict", file, tmp_path / "plain.png", "--out", tmp_path / "none")
        assert "plain.png: wanted samples of more than 8 bits for the window 290 to 310.5, got 8 bits" in message
    assert not (tmp_path / "none/scores.csv").exists()


def test_auto_in_training_and_in_the_estimator(tmp_path):
    data = thermal_set(tmp_path / "plate")
    good = sorted((data / "train/good").glob("*.tif"))
    low, high = find_window(good, read_given)
    recipe = replace(RECIPE, architecture="padim", window="auto")
    fitted = recontrast.ReContrastDetector(recipe=recipe, false_alarm_rate=None, device="cpu").fit(good)
    assert fitted.recipe_.window == (low, high)
    text = works("train", data, *SMALL, "--window", "auto", "--out", tmp_path / "run", "--no-evaluate")
    assert f"window: {low:.10g} to {high:.10g} (percentiles 0.1 and 99.9 of the good images)" in text
    detector = recontrast.load(tmp_path / "run", device="cpu")
    assert detector.recipe.window == (low, high)
    tests = sorted(data.glob("test/*/*.tif"))
    assert np.allclose(-fitted.score_samples(tests), detector.predict(tests).scores, rtol=1e-4)
    samples = tifffile.imread(good[2])
    samples[0, 0] = np.nan
    tifffile.imwrite(good[2], samples)
    message = fails("train", data, "--window", "auto", "--out", tmp_path / "other")
    assert message == f"recontrast: {good[2]}: wanted finite samples, got NaN or infinity in 1 of 1600"
    assert not (tmp_path / "other").exists()
