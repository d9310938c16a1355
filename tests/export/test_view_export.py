"""Exported detectors of parts with several views: the same maps, scores and decisions as the checkpoint's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import works
from part_views import PATCHCORE, PATTERN, SMALL, write_set
from PIL import Image

import recontrast
from recontrast.app import calibrate_job
from recontrast.app.commands.export import _measure
from recontrast.export.verify import compare_scores


@pytest.fixture(scope="module", params=["largest", "mean"])
def run(request, tmp_path_factory):
    """A calibrated run on parts with two views: files and the largest value, or pages, a region and the mean."""
    root = tmp_path_factory.mktemp("views")
    is_mean = request.param == "mean"
    write_set(root / "nut", is_mean, train=24)
    options = ["--views-from", "pages" if is_mean else PATTERN, *PATCHCORE, "--holdout", 0.4]
    if is_mean:
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :40] = 255
        Image.fromarray(mask).save(root / "roi.png")
        options += ["--set", "view_map=mean", "--set", "score=0.01", "--roi", root / "roi.png"]
    works("train", root / "nut", "--out", root / "run", *options)
    return root


@pytest.fixture(scope="module")
def file(run):
    """The run as an ONNX file."""
    pytest.importorskip("onnxruntime")
    return export_run(run, run / "nut.onnx", "onnx")


def export_run(run, file, kind):
    printed = works("export", run / "run", "--format", kind, "--out", file, "--images", run / "nut/test/good")
    assert "scores of 11 images differ by at most" in printed  # 3 parts and 8 drawn images
    assert "outputs map, score," in printed and "defect" not in printed  # of single views: they decide nothing
    return file


@pytest.mark.parametrize("run", ["largest"], indirect=True)
def test_openvino_file_scores_parts_as_the_checkpoint_does(run, tmp_path):
    pytest.importorskip("openvino")
    compare_predictions(run, export_run(run, tmp_path / "nut.xml", "openvino"))


def test_onnx_file_scores_parts_as_the_checkpoint_does(run, file):
    compare_predictions(run, file)


def compare_predictions(run, file):
    wanted = recontrast.load(run / "run", "cpu").predict(run / "nut/test")
    detector = recontrast.load(file)
    assert detector.description["views"]["map"] == detector.recipe.view_map
    got = detector.predict(run / "nut/test", batch=3)
    assert len(got) == 6
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, rtol=1e-4, atol=1e-5)
        assert (other.name, other.decision) == (one.name, one.decision)
        assert other.score == pytest.approx(one.score, rel=1e-4) and other.p_value == pytest.approx(one.p_value)


def test_map_in_a_file_is_that_of_its_views(run, file):
    detector = recontrast.load(file)
    recipe, part = detector.recipe, sorted((run / "nut/test/square").iterdir())[0]
    pixels = recipe.image_views.read(part)
    joined = detector.predict(part)[0]
    maps, _ = detector.score(pixels)
    expected = maps.max(0) if recipe.view_map == "max" else maps.mean(0)
    np.testing.assert_allclose(joined.anomaly_map, expected, rtol=1e-6)
    if recipe.roi is None:
        assert joined.score == expected.max()
    else:
        largest = np.sort(expected[:, :40].ravel())[::-1][: 64 * 40 // 100]
        assert joined.score == pytest.approx(largest.mean(), rel=1e-5)


def test_calibrate_and_evaluate_take_the_file(run, file, tmp_path):
    """Its calibration counts parts, is stored without a graph that decides, and metrics are those of the checkpoint."""
    file = Path(shutil.copy(file, tmp_path))
    pages = recontrast.load(file).recipe.views_from == "pages"
    write_set(tmp_path / "new", pages, 20, seed=9)
    works("calibrate", file, "--good", tmp_path / "new/train/good", "--false-alarm-rate", 0.05)
    stored = calibrate_job.open_target(file).calibration
    shutil.copy(run / "run/checkpoint.pt", tmp_path)
    again = recontrast.calibrate(
        tmp_path / "checkpoint.pt", tmp_path / "new/train/good", false_alarm_rate=0.05, device="cpu"
    )
    assert stored.count == 20 and stored.threshold == pytest.approx(again.calibration.threshold, rel=1e-4)
    rows = []
    for number, detector in enumerate((run / "run", file)):
        out = tmp_path / f"e{number}"
        works("evaluate", detector, run / "nut", "--out", out, *(["--device", "cpu"] if number == 0 else []))
        rows.append(json.loads((out / "results.json").read_text())["rows"][0])
        assert (rows[-1]["images"], rows[-1]["defects"]) == (6, 3)
    for name in ("i_auroc", "p_auroc", "aupro"):
        assert rows[1][name] == pytest.approx(rows[0][name], abs=1e-4)
    assert recontrast.evaluate(file, run / "nut").rows[0].p_auroc == pytest.approx(rows[1]["p_auroc"])


@pytest.mark.parametrize("run", ["largest"], indirect=True)
def test_int8_is_measured_on_parts(run, tmp_path):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "int8.onnx"
    options = ["--format", "onnx", "--precision", "int8"]
    works("export", run / "run", "--out", file, *options, "--images", run / "nut/train/good",
          "--data", run / "nut", "--tolerance", 0.9)  # fmt: skip
    report = json.loads(file.with_suffix(".json").read_text())
    assert report["change"]["images"] == 24 and report["metrics"]["i_auroc"][0] > 0


@pytest.mark.parametrize("run", ["largest"], indirect=True)
def test_labelled_lists_without_a_split_are_test_parts(run, tmp_path):
    """As for `evaluate`: their images are not divided by their own names."""
    rows = [f"{path},{int(label)}" for label, folder in enumerate(("good", "square"))
            for path in sorted((run / "nut/test" / folder).iterdir())]  # fmt: skip
    (tmp_path / "new.csv").write_text("\n".join(["path,label", *rows]))
    measure = _measure([tmp_path / "new.csv"], run / "run/checkpoint.pt")
    assert measure(recontrast.load(run / "run", "cpu"))["i_auroc"] > 0


def test_other_joins_are_found_by_the_comparison(run, file):
    """A file that joined views in another way than its checkpoint would not be written."""
    detector, exported = recontrast.load(run / "run", "cpu"), recontrast.load(file)
    paths = sorted((run / "nut/test/square").iterdir())
    assert compare_scores(detector, exported, paths)[0] == 3
    exported.recipe = exported.recipe.replace(view_map="max" if exported.recipe.view_map == "mean" else "mean")
    with pytest.raises(ValueError, match="wanted scores within"):
        compare_scores(detector, exported, paths)


def test_a_part_that_is_broken_costs_no_other(file, tmp_path):
    detector = recontrast.load(file)
    pages = detector.recipe.views_from == "pages"
    data = write_set(tmp_path / "new", pages, train=1, tests=3, seed=4) / "test/good"
    wanted = detector.predict(data)
    if pages:
        Image.new("L", (64, 64)).save(data / "001.tif")
    else:
        (data / "001_right.png").unlink()
    got = detector.predict(data, errors="keep")
    assert [p.error is None for p in got] == [True, False, True] and "wanted" in got[1].error
    assert [got[i].score for i in (0, 2)] == pytest.approx([wanted[i].score for i in (0, 2)], rel=1e-6)


def test_own_scores_of_a_network_with_a_fixed_batch(tmp_path):
    """Scores of the network itself are joined as maps are; the batch of the file is no multiple of the views."""
    pytest.importorskip("onnxruntime")
    write_set(tmp_path / "nut", False, train=8)
    works("train", tmp_path / "nut", "--out", tmp_path / "run", "--views-from", PATTERN, "--architecture", "ensemble",
          *SMALL, "--set", "score=model", "--set", "gaussian_features=8", "--set", "small_size=32",
          "--set", "view_map=mean")  # fmt: skip
    works("export", tmp_path / "run", "--out", tmp_path / "nut.onnx", "--images", tmp_path / "nut/test/good",
          "--format", "onnx", "--input-batch", 3)  # fmt: skip
    wanted = recontrast.load(tmp_path / "run", "cpu").predict(tmp_path / "nut/test").scores
    np.testing.assert_allclose(recontrast.load(tmp_path / "nut.onnx").predict(tmp_path / "nut/test").scores, wanted,
                               rtol=1e-4)  # fmt: skip
