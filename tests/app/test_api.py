"""The functions of the root: load, train, evaluate, calibrate, find_samples, and `predict` of a detector."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from command_line import call, works
from PIL import Image
from saved_model import RECIPE as SMALL
from saved_model import draw, save
from tiny import tiny_set

import recontrast
from recontrast import checkpoint as checkpoints

# The random weights of this network score the bright squares of `draw` higher than good images.
RECIPE = SMALL.replace(backbone="resnet10t")
FIELDS = {"backbone": "test_resnet", "weights": "random", "size": 32, "batch": 4, "steps": 2, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("api") / "data"
    tiny_set(root, train=12, good=3, defects=3)
    return root


@pytest.fixture(scope="module")
def run(data):
    """The folder of a run without calibration."""
    out = data.parent / "run"
    recontrast.train(data, out, device="cpu", **FIELDS)
    return out


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A detector and the good images that calibrated it."""
    folder = tmp_path_factory.mktemp("calibrated")
    good = draw(folder / "good", 12, seed=0)
    detector = recontrast.calibrate(save(folder / "checkpoint.pt", RECIPE), good, false_alarm_rate=0.1, device="cpu")
    return detector, good


def test_find_samples_lists_labels_and_masks(data):
    samples = recontrast.find_samples(data)
    assert samples == recontrast.find_samples([data / "nut"], "nut")
    assert [s.split for s in samples].count("train") == 12
    assert sum(s.label for s in samples) == sum(s.mask is not None for s in samples) == 3


def test_train_from_paths_and_samples_gives_the_same_weights(data, run, tmp_path):
    steps = []
    samples = recontrast.find_samples(data)
    detector = recontrast.train(
        samples, tmp_path / "run", device="cpu", on_step=lambda *step: steps.append(step), **FIELDS
    )
    weights, others = (checkpoints.load(folder / "checkpoint.pt").model for folder in (run, tmp_path / "run"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert detector.category == "nut" and detector.calibration is None  # 12 images are too few to hold out a tenth
    assert steps[-1][:2] == (2, 2)


def test_train_refuses_a_finished_run_and_resumes_one(data, run):
    with pytest.raises(ValueError, match=r"checkpoint\.pt exists already"):
        recontrast.train(data, run, device="cpu", **FIELDS)
    before = (run / "checkpoint.pt").read_bytes()
    assert recontrast.train(data, resume=run, device="cpu").category == "nut"
    assert (run / "checkpoint.pt").read_bytes() == before


def test_evaluate_measures_what_the_command_measures(data, run, tmp_path):
    result = recontrast.evaluate(run, data, device="cpu", out=tmp_path / "python")
    works("evaluate", run, data, "--device", "cpu", "--out", tmp_path / "command")
    assert (tmp_path / "python/scores.csv").read_text() == (tmp_path / "command/scores.csv").read_text()
    assert result.rows[0].category == "nut" and 0 <= result.rows[0].i_auroc <= 1
    assert str(result) == result._repr_markdown_() == (tmp_path / "python/results.md").read_text()
    again = recontrast.evaluate(recontrast.load(run, "cpu"), recontrast.find_samples(data))
    assert again.rows[0].i_auroc == result.rows[0].i_auroc and again.rows[0].aupro == result.rows[0].aupro


def test_calibrate_stores_what_the_command_stores(calibrated, tmp_path):
    detector, good = calibrated
    works("calibrate", save(tmp_path / "checkpoint.pt", RECIPE), "--good", good, "--false-alarm-rate", 0.1)
    stored = checkpoints.load(tmp_path / "checkpoint.pt").calibration
    assert detector.calibration.scores == stored.scores and detector.calibration.threshold == stored.threshold
    assert recontrast.load(detector.path, "cpu").calibration == detector.calibration
    assert repr(detector).endswith("checkpoint.pt': tile, resnet10t, 64 x 64 px, false-alarm rate 0.1)")


def test_prediction_is_that_of_the_command(calibrated, tmp_path):
    detector, good = calibrated
    predictions = detector.predict(good)
    works("predict", detector.path, good, "--out", tmp_path, "--device", "cpu", "--no-overlays")
    lines = (tmp_path / "scores.csv").read_text().splitlines()[1:]
    assert len(lines) == len(predictions) == 12
    for line, prediction in zip(lines, predictions, strict=True):
        path, score, p_value, decision, regions = line.split(",")
        assert path == prediction.name and float(score) == pytest.approx(prediction.score, rel=1e-8)
        assert float(p_value) == pytest.approx(prediction.p_value) and decision == prediction.decision
        assert int(regions) == len(prediction.regions)


def test_kinds_of_images_give_one_score(calibrated):
    """A path, its PIL image and its pixels are one image, alone or mixed; a folder is the images in it."""
    detector, good = calibrated
    path = sorted(good.iterdir())[0]
    image = Image.open(path)
    pixels = np.asarray(image)
    mixed = detector.predict([path, str(path), image, pixels, pixels / 255.0])
    assert len(set(mixed.scores.tolist())) == 1
    assert [p.name for p in mixed] == [str(path), str(path), "image 2", "image 3", "image 4"]
    for single in (path, str(path), image, pixels):
        assert detector.predict(single).scores.tolist() == mixed.scores[:1].tolist()
    assert detector.predict(np.stack([pixels, pixels])).scores.tolist() == mixed.scores[:2].tolist()
    assert detector.predict(image.convert("L")).scores.shape == (1,)


def test_rate_of_a_call_takes_the_place_of_the_stored_one(calibrated):
    detector, good = calibrated
    assert len(detector.predict(good, false_alarm_rate=0.5).defects) > len(detector.predict(good).defects)
    with pytest.raises(ValueError, match="false-alarm rate: wanted at least"):
        detector.predict(good, false_alarm_rate=0.001)


def test_drawing_shows_image_heat_map_and_regions(calibrated):
    detector, good = calibrated
    strange = np.asarray(Image.open(sorted(good.iterdir())[0])).copy()
    strange[20:50, 20:50] = (255, 0, 255)
    defect = detector.predict(strange, false_alarm_rate=0.5)[0]
    plain = min(detector.predict(good), key=lambda prediction: prediction.score)
    assert defect.decision == "defect" and defect.regions and plain.decision == "good" and plain.regions == ()
    drawing = defect.draw()
    assert drawing.width > plain.draw().width > 2 * 320  # three panels, two panels, 64 px enlarged to 320
    outlined = np.asarray(drawing)[:, -320:]
    assert (outlined == (0, 220, 120)).all(-1).any()
    png = Image.open(io.BytesIO(defect._repr_png_()))
    assert png.size == drawing.size and png.format == "PNG"
    assert defect.heat_map().size == defect.image().size == (64, 64)
    assert defect.anomaly_map.shape == (64, 64) and defect.anomaly_map.dtype == np.float32


def test_show_opens_a_viewer_outside_of_notebooks(calibrated, monkeypatch):
    detector, good = calibrated
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda image, title=None: shown.append(title))
    predictions = detector.predict(good)
    predictions.show(most=2)
    assert shown == [predictions[0].name, predictions[1].name]


def test_large_and_tiny_images_are_drawn(calibrated):
    detector, _ = calibrated
    random = np.random.default_rng(0)
    for shape in ((700, 1200, 3), (1, 1, 3), (3, 500)):
        prediction = detector.predict([random.integers(0, 256, shape, np.uint8)], false_alarm_rate=0.9)[0]
        assert prediction.image().size == (shape[1], shape[0])
        assert prediction.draw().width <= 3 * 320 + 12


def test_unreadable_image_stops_or_is_kept(calibrated, tmp_path):
    detector, good = calibrated
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths = [*sorted(good.iterdir())[:2], broken]
    with pytest.raises(ValueError, match=r"broken\.png: wanted a PNG"):
        detector.predict(paths)
    kept = detector.predict(paths, errors="keep")
    assert np.isnan(kept.scores).tolist() == [False, False, True]
    assert kept[2].decision is None and "broken.png" in kept[2].error and kept[2]._repr_png_() is None
    with pytest.raises(ValueError, match=r"broken\.png"):
        kept[2].draw()
    assert kept.scores[:2].tolist() == detector.predict(paths[:2]).scores.tolist()


def test_exported_file_predicts_as_the_checkpoint(calibrated, tmp_path):
    detector, good = calibrated
    works("export", detector.path, "--format", "pt2", "--out", tmp_path / "detector.pt2")
    exported = recontrast.load(tmp_path / "detector.pt2")
    ours, theirs = detector.predict(good), exported.predict(good)
    assert np.allclose(ours.scores, theirs.scores, rtol=1e-4)
    assert [p.decision for p in ours] == [p.decision for p in theirs]
    for function in (recontrast.evaluate, recontrast.calibrate):
        with pytest.raises(ValueError, match="wanted one from a checkpoint or an exported file, got object"):
            function(object(), good)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "got none"),
        (np.zeros((4, 5, 6), np.uint8), r"got \(4, 5, 6\): pass image\.transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 5, 4), np.uint8), r"wanted an array \(h, w, 3\) or \(h, w\)"),
        (np.full((4, 4, 3), 7.0), r"wanted floats in \[0, 1\]"),
        ([3], "got int at position 0"),
        ({"a": 1}, "got a dictionary: pass list"),
        (b"photo.png", "got bytes"),
        (None, "got NoneType"),
    ],
)
def test_other_images_are_refused(calibrated, images, message):
    with pytest.raises(ValueError, match=message):
        calibrated[0].predict(images)


def test_generators_of_images_are_taken(calibrated):
    detector, good = calibrated
    assert len(detector.predict(path for path in sorted(good.iterdir())[:3])) == 3


def _other_tool(path):
    torch.save({"state_dict": {}}, path)


def _newer_version(path):
    save(path, RECIPE)
    stored = torch.load(path, weights_only=True)
    (key,) = [name for name in stored if name.startswith("recontrast")]
    torch.save({**stored, key: 99}, path)


@pytest.mark.parametrize(
    ("name", "make", "error", "message"),
    [
        ("folder", lambda path: path.mkdir(), ValueError, r"got a folder without checkpoint\.pt"),
        ("missing.pt", lambda path: None, FileNotFoundError, r"missing\.pt: wanted a checkpoint file"),
        ("missing.onnx", lambda path: None, FileNotFoundError, r"missing\.onnx: wanted an exported detector"),
        ("other.pt", _other_tool, ValueError, r"other\.pt: wanted a recontrast checkpoint"),
        ("newer.pt", _newer_version, ValueError, r"newer\.pt: wanted a checkpoint of format 1, got format 99"),
        ("text.pt", lambda path: path.write_text("text"), ValueError, r"text\.pt: wanted a recontrast checkpoint"),
        (
            "pickle.pt",
            lambda path: path.write_bytes(pickle.dumps({"a": 1})),
            ValueError,
            r"pickle\.pt: wanted a recontrast checkpoint",
        ),
        (
            "zip.pt",
            lambda path: zipfile.ZipFile(path, "w").close(),
            ValueError,
            r"zip\.pt: wanted a recontrast checkpoint, got a file of another kind",
        ),
    ],
)
def test_load_refuses_in_one_sentence(tmp_path, name, make, error, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(error, match=message) as raised:
        recontrast.load(path)
    assert "\n" not in str(raised.value)


def test_data_of_other_kinds_is_refused(data):
    samples = recontrast.find_samples(data)
    for given, message in (([], "got none"), ([*samples, data], "got both")):
        with pytest.raises(ValueError, match=message):
            recontrast.train(given, device="cpu", **FIELDS)
    with pytest.raises(ValueError, match="category: wanted one of nut or all, got 'bolt'"):
        recontrast.train(samples, category="bolt", device="cpu", **FIELDS)
    assert call("train", data / "nowhere").exit_code == 2
