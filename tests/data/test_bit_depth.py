"""16-bit files of cameras with fewer bits: one scale for training, evaluation and prediction of a detector."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_run import RECIPE

import recontrast
from recontrast.data import notices
from recontrast.data.bit_depth import detect_bits
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import fit_picture, read_image
from recontrast.data.in_memory import InMemoryImages
from recontrast.training.camera_bits import fix_bits
from recontrast.training.train import train


@pytest.fixture(autouse=True)
def new_process():
    notices.forget_warnings()
    yield
    notices.forget_warnings()


def camera_pixels(bits, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape or (40, 48), np.uint16)


def save_set(folder, bits, count=5):
    """Write 16-bit images of a camera, and the same images with 8 bits; return both lists of paths."""
    paths: dict[str, list[Path]] = {"deep": [], "plain": []}
    for index in range(count):
        values = camera_pixels(bits, seed=index)
        full = (1 << bits) - 1
        values[0, 0] = full
        levels = ((values.astype(int) * 255 + full // 2) // full).astype(np.uint8)
        for name, pixels in (("deep", values), ("plain", levels)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            paths[name].append(folder / name / f"{index}.png")
            Image.fromarray(pixels).save(paths[name][-1])
    return paths["deep"], paths["plain"]


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_bits_are_detected_and_every_reader_scales_by_them(tmp_path, bits):
    deep, plain = save_set(tmp_path, bits)
    assert detect_bits(deep) == bits and detect_bits(plain) is None
    expected = np.stack([read_image(path, size=32) for path in plain])
    pictures = [Image.open(path) for path in deep]
    readers = {
        "read_image": [read_image(path, size=32, bits=bits) for path in deep],
        "fit_picture": [fit_picture(picture, size=32, bits=bits) for picture in pictures],
        "files": ImageFiles(deep).resized(32, bits=bits)[range(5)],
        "full size": [fit_picture(Image.fromarray(p), size=32) for p in ImageFiles(deep).read_many(range(5), bits)],
        "cache": ImageCache(deep, 32, directory=tmp_path / "cache", bits=bits)[:],
        "paths": InMemoryImages(deep, 32, bits=bits)[range(5)],
        "pictures": InMemoryImages(pictures, 32, bits=bits)[range(5)],
    }
    for name, pixels in readers.items():
        assert np.array_equal(np.stack(pixels), expected), name
    with pytest.warns(notices.ImageWarning):
        other = ImageCache(deep, 32, directory=tmp_path / "cache")
    assert not np.array_equal(other[:], expected), "another scale is another cache file"


def test_images_that_use_16_bits_need_no_scale(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(camera_pixels(16)).save(path)
    assert detect_bits([path]) is None
    with pytest.warns(
        notices.ImageWarning,
        match=r"a\.png: has 16-bit samples: they are rounded to 256 levels.* but those of the lowest",
    ):
        assert fix_bits(RECIPE, [path]) is RECIPE


@pytest.mark.parametrize("suffix", ["tif", "ppm"])
def test_colour_is_scaled_too(tmp_path, suffix):
    values = camera_pixels(12, 20, 30, 3)
    values[0, 0] = 4095
    path = tmp_path / f"c.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, values, photometric="rgb")
    else:
        path.write_bytes(b"P6\n30 20\n65535\n" + values.astype(">u2").tobytes())
    assert detect_bits([path]) == 12
    assert np.array_equal(read_image(path, bits=12), (values.astype(int) * 255 + 2047) // 4095)
    with pytest.warns(notices.ImageWarning, match=r"16-bit samples of at most 4095, which leaves 16 of 256"):
        read_image(path)


def test_samples_beyond_the_scale_become_white_and_are_reported_once(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 4095, 5000]], np.uint16)).save(path)
    with pytest.warns(notices.ImageWarning, match=r"a\.png: has samples of up to 5000, more than the 4095 of 12 bits"):
        assert read_image(path, bits=12)[0, :, 0].tolist() == [0, 255, 255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path, bits=12)


@pytest.mark.parametrize("bits", [7, 17, "12", True])
def test_invalid_bits(tmp_path, bits):
    path = tmp_path / "a.png"
    Image.fromarray(camera_pixels(12)).save(path)
    with pytest.raises(ValueError, match=r"bits: wanted None or a whole number from 8 to 16, got "):
        read_image(path, bits=bits)


def test_training_and_prediction_of_a_detector_use_one_scale(tmp_path):
    """A detector of 12-bit images in 16-bit files equals one of the same images with 8 bits."""
    deep, plain = save_set(tmp_path, 12)
    with pytest.warns(notices.ImageWarning, match=r"0\.png: has 16-bit samples of 12 bits, like all 5 images"):
        runs = {
            name: train(replace(RECIPE, steps=2), [Sample(path, None, 0, "nut", "train", "good") for path in paths],
                        out=tmp_path / f"run {name}", device="cpu")
            for name, paths in (("deep", deep), ("plain", plain))
        }  # fmt: skip
    assert runs["deep"].recipe.bits == 12 and runs["plain"].recipe.bits is None
    assert runs["deep"].losses == runs["plain"].losses
    dark = tmp_path / "dark.png"  # its own brightest sample does not matter
    Image.fromarray(camera_pixels(9)).save(dark)
    detector = recontrast.load(tmp_path / "run deep/checkpoint.pt", device="cpu")
    prediction = detector.predict([dark])[0]
    assert np.array_equal(np.asarray(prediction.image()), read_image(dark, bits=12))
    same = Image.fromarray(read_image(dark, bits=12))
    other = recontrast.load(tmp_path / "run plain/checkpoint.pt", device="cpu")
    assert other.predict([same])[0].score == prediction.score
    resumed = train(
        replace(RECIPE, steps=2), [Sample(path, None, 0, "nut", "train", "good") for path in deep],
        out=tmp_path / "run deep", resume=tmp_path / "run deep/checkpoint.pt", device="cpu",
    )  # fmt: skip
    assert resumed.recipe.bits == 12


@pytest.mark.parametrize("kind", ["paths", "pictures"])
def test_estimator_scales_like_the_command_line(tmp_path, kind):
    deep, plain = save_set(tmp_path, 12)
    items = deep if kind == "paths" else [Image.open(path) for path in deep]
    options = {"recipe": replace(RECIPE, steps=1), "false_alarm_rate": None, "device": "cpu"}
    with pytest.warns(notices.ImageWarning, match=r"16-bit samples of 12 bits, like all 5 images"):
        fitted = recontrast.ReContrastDetector(**options).fit(items)
    other = recontrast.ReContrastDetector(**options).fit(plain)
    assert fitted.recipe_.bits == 12 and np.array_equal(fitted.score_samples(items[:2]), other.score_samples(plain[:2]))
