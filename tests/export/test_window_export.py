"""Exported files of detectors with a window: scores and decisions of the checkpoint, whatever the precision and order.

A threshold is the score of one of the calibration images. Another batch or another runtime changes the last bits of a
score, so that this one image may be decided either way; no other may.
"""

import csv

import numpy as np
import pytest
import tifffile
from command_line import works
from PIL import Image
from traced_once import traced_once

import recontrast
from recontrast.inference.exported_detector import ExportedDetector

KINDS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
LOW, HIGH = 8000, 11_000
ROUNDING = 1e-5  # relative; scores differ by about a tenth of it
TRAIN = """--architecture patchcore --backbone test_resnet --weights random --size 32 --batch 4 --seed 1 --holdout 0
    --device cpu --no-evaluate --window 8000 11000""".split()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings("ignore:.*seem to show one scene:recontrast.data.listing.DataWarning"),
]


def draw(folder, count, random, shapes=((44, 48),), hot=0):
    """Write images of 16 bits as PNG and TIFF, in turn; 2.png comes before 10.png, though not by its letters."""
    folder.mkdir(parents=True)
    for index in range(count):
        height, width = shapes[index % len(shapes)]
        samples = 9000 + 300 * np.sin(np.arange(width) / 3) + random.normal(0, random.uniform(40, 280), (height, width))
        samples[10:22, 10:22] += hot
        samples = samples.clip(0, 65535).astype(np.uint16)
        if index % 2:
            Image.fromarray(samples).save(folder / f"{index}.png")
        else:
            tifffile.imwrite(folder / f"{index}.tif", samples)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of a calibrated run, its images, and its file in each format, before they are calibrated."""
    root, random = tmp_path_factory.mktemp("window"), np.random.default_rng(5)
    draw(root / "plate/train/good", 8, random)
    draw(root / "plate/test/good", 6, random)
    draw(root / "plate/test/hot", 6, random, hot=1500)
    draw(root / "more", 24, random, shapes=((44, 48), (44, 48), (40, 60)))
    works("train", root / "plate", *TRAIN, "--out", root / "run")
    works("calibrate", root / "run", "--good", root / "more", "--false-alarm-rate", 0.2)
    with traced_once():
        for kind, suffix in KINDS.items():
            works("export", root / "run", "--format", kind, "--out", root / f"files/d{suffix}")
    return root


def copy_file(work, suffix, folder):
    """Copy a file, whose calibration is then replaced, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in {suffix, suffix.replace("xml", "bin")}:
        (folder / f"d{part}").write_bytes((work / f"files/d{part}").read_bytes())
    return folder / f"d{suffix}"


def predict(source, images, out, *options):
    """Rows of scores.csv by path."""
    works("predict", source, *images, "--out", out, "--no-overlays", "--decide", "--device", "cpu", *options)
    return {row["path"]: row for row in csv.DictReader((out / "scores.csv").read_text().splitlines())}


def compare(got, wanted, threshold):
    """Compare rows of two detectors, or of two batch sizes: all but an image that sets the threshold are decided alike.

    Returns the number of defects.
    """
    assert set(got) == set(wanted)
    for path, row in wanted.items():
        score, expected = float(got[path]["score"]), float(row["score"])
        assert score == pytest.approx(expected, rel=ROUNDING), path
        if abs(expected - threshold) > ROUNDING * threshold:
            assert got[path]["decision"] == row["decision"], path
    return sum(row["decision"] == "defect" for row in got.values())


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_file_decides_as_the_checkpoint(kind, work, tmp_path):
    """In the order of the folder, in the reverse order, and one by one: each image has its own decision."""
    path = copy_file(work, KINDS[kind], tmp_path)
    checkpoint = recontrast.load(work / "run", device="cpu")
    before = ExportedDetector(path).calibration
    assert before == checkpoint.calibration
    works("calibrate", path, "--good", work / "more", "--false-alarm-rate", 0.2)
    calibration = ExportedDetector(path).calibration
    np.testing.assert_allclose(calibration.scores, checkpoint.calibration.scores, rtol=ROUNDING)
    assert calibration.threshold == pytest.approx(before.threshold, rel=ROUNDING)
    gaps = np.diff(calibration.scores) / calibration.threshold
    assert gaps.min() > 3 * ROUNDING, "images that rounding could exchange would prove nothing"
    for name, fewest in (("more", 4), ("plate/test", 6)):
        wanted = predict(work / "run", [work / name], tmp_path / "wanted" / name)
        got = predict(path, [work / name], tmp_path / "got" / name)
        assert list(got) == list(wanted)
        assert compare(got, wanted, calibration.threshold) >= fewest
        for row in got.values():  # those of the calibration that the file holds
            score = np.float32(row["score"])
            if np.abs(np.array(calibration.scores) - score).min() > ROUNDING * score:
                assert float(row["p_value"]) == pytest.approx(calibration.p_values([score])[0])
        paths = list(got)[::-1]
        for count, batch in enumerate((16, 3, 1)):
            other = predict(path, paths, tmp_path / f"{name}{count}", "--batch", batch)
            assert list(other) == paths
            compare(other, got, calibration.threshold)
    pixels = recontrast.load(path).predict(work / "plate/test")
    assert [p.decision for p in pixels] == [row["decision"] for row in got.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_image_that_sets_the_threshold_is_decided_by_its_last_bit(kind, work, tmp_path, monkeypatch):
    """A score that is one unit higher is above the threshold: the only decision that differs, and only upwards."""
    path = copy_file(work, KINDS[kind], tmp_path)
    works("calibrate", path, "--good", work / "more", "--false-alarm-rate", 0.2)
    detector = recontrast.load(path)
    plain = detector.predict(work / "more")
    score = detector.score

    def score_higher(images):
        maps, scores = score(images)
        return maps, np.nextafter(scores, np.float32(np.inf))

    monkeypatch.setattr(detector, "score", score_higher)
    differs = [(one, other) for one, other in zip(plain, detector.predict(work / "more"), strict=True)
               if one.decision != other.decision]  # fmt: skip
    assert [(one.score, one.decision, other.decision) for one, other in differs] == [
        (detector.calibration.threshold, "good", "defect")
    ]
