import json
from dataclasses import replace

import numpy as np
import pytest
from command_line import call, works
from PIL import Image
from saved_model import RECIPE, draw, save

from recontrast import checkpoint as checkpoints
from recontrast.calibration.appearance_drift import PROPERTIES, describe_appearance, measure_appearance_drift
from recontrast.calibration.conformal import Calibration, conformal_threshold


def draw_textures(random, count, size=24):
    """Return blurred noise: different images with the same statistics."""
    coarse = random.normal(128, 30, (count, size // 4, size // 4, 3)).clip(0, 255).astype(np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in coarse]
    )


def test_measured_properties():
    flat = np.full((3, 5, 7, 3), (200, 100, 50), np.uint8)
    grey = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    np.testing.assert_allclose(describe_appearance(flat, batch=2), [[grey, 0, 0, 150 / 255]] * 3, atol=1e-6)
    board = np.broadcast_to((np.indices((6, 6)).sum(0) % 2)[..., None] * 255, (6, 6, 3)).astype(np.uint8)
    brightness, contrast, sharpness, warmth = describe_appearance(board[None])[0]
    assert brightness == contrast == 0.5 and warmth == 0
    inner = 4 * 16 + 3 * 16 + 2 * 4  # differing neighbours of the 36 pixels; the edge repeats
    assert sharpness == pytest.approx(inner / 36, abs=1e-6)
    assert describe_appearance(board[None][:0]).shape == (0, 4)


def test_false_warnings_are_as_rare_as_the_level():
    """Without a change, warnings are as rare as `ALARM_LEVEL`."""
    random = np.random.default_rng(0)
    appearance = describe_appearance(draw_textures(random, 2000))
    warnings = 0
    for _ in range(300):
        chosen = random.permutation(2000)[:80]
        warnings += measure_appearance_drift(appearance[chosen[:50]], appearance[chosen[50:]]).is_significant
    assert warnings <= 8  # 3 are expected, more than 8 come in 0.4 % of runs


@pytest.mark.parametrize(
    ("name", "description", "alter"),
    [
        ("brightness", "darker", lambda x: x * 0.9),
        ("brightness", "brighter", lambda x: x * 0.9 + 25),
        ("contrast", "flatter", lambda x: 128 + (x - 128) * 0.6),
        ("sharpness", "sharper or noisier", lambda x: x + np.random.default_rng(3).normal(0, 12, x.shape)),
        ("warmth", "redder", lambda x: x + np.array([14, 0, -14])),
    ],
)
def test_a_change_is_named(name, description, alter):
    random = np.random.default_rng(1)
    known, new = draw_textures(random, 60), draw_textures(random, 30)
    assert not measure_appearance_drift(describe_appearance(known), describe_appearance(new)).is_significant
    drift = measure_appearance_drift(
        describe_appearance(known), describe_appearance(alter(new.astype(float)).clip(0, 255).astype(np.uint8))
    )
    assert drift.is_significant and drift.name == name and f"they are {description} ({name}" in drift.describe()


def test_missing_images_raise():
    with pytest.raises(ValueError, match="at least 1 calibration image and 1 new image, got 0 and 2"):
        measure_appearance_drift(np.empty((0, len(PROPERTIES))), np.zeros((2, len(PROPERTIES))))


def test_older_and_invalid_calibrations():
    scores = (1.0, 2.0, 3.0)
    known = Calibration(scores, 0.5, conformal_threshold(scores, 0.5), None, 0.1, False, "here", "w")
    values = known.to_dict()
    assert values.pop("looks") == [] and Calibration.from_dict(values) == known
    described = replace(known, appearance=((0.1, 0.2, 0.3, 0.4),) * 3)
    assert Calibration.from_dict(json.loads(json.dumps(described.to_dict()))) == described
    with pytest.raises(ValueError, match="looks: wanted 4 numbers for each of 3 images"):
        replace(known, appearance=((0.1, 0.2, 0.3, 0.4),) * 2)
    del values["source"]
    with pytest.raises(ValueError, match="wanted the fields"):
        Calibration.from_dict(values)


def test_darker_images_cause_a_warning(tmp_path):
    """The change is found in the images, whatever scores an untrained detector gives them."""
    save(tmp_path / "run" / "checkpoint.pt", RECIPE)
    good = draw(tmp_path / "good", 24, seed=0)
    dark = tmp_path / "set" / "tile" / "test" / "good"
    dark.mkdir(parents=True)
    draw(tmp_path / "set" / "tile" / "train" / "good", 1, seed=2)
    for path in draw(tmp_path / "new", 16, seed=1).iterdir():
        Image.fromarray((np.asarray(Image.open(path)) * 0.93).astype(np.uint8)).save(dark / path.name)
    options = ["calibrate", tmp_path / "run", "--good", good, "--false-alarm-rate", 0.1, "--device", "cpu", "--check"]
    assert "the new good images look like the calibration images (brightness, contrast" in works(
        *options, tmp_path / "new"
    )
    result = call(*options, dark)
    assert result.exit_code == 0 and "16 new good images do not look like the calibration images" in result.stderr
    found = checkpoints.load(tmp_path / "run" / "checkpoint.pt").calibration
    assert np.shape(found.appearance) == (24, 4)
    result = call("evaluate", tmp_path / "run", tmp_path / "set", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0 and "they are darker (brightness" in result.stderr, result.output
    decisions = json.loads((tmp_path / "out" / "results.json").read_text())["decided"]
    assert decisions["good"] == 16 and decisions["defects"] == 0 and decisions["change"]["name"] == "brightness"
    assert any("darker" in text for text in decisions["warnings"])
    works("predict", tmp_path / "run", dark, "--out", tmp_path / "predicted", "--no-overlays", "--device", "cpu")
    assert "looks" not in json.loads((tmp_path / "predicted" / "scores.json").read_text())["calibration"]
