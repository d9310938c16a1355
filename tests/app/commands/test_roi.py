"""Regions of interest on the command line: train, predict, evaluate, export, report, and what is refused."""

import csv
import json

import numpy as np
import pytest
from command_line import call, fails, works
from PIL import Image
from tiny import tiny_set

import recontrast
from recontrast.app.compare.unlabelled import paste_patch
from recontrast.data.roi import EACH, decode_mask

OPTIONS = ["--architecture", "patchcore", "--backbone", "test_resnet", "--weights", "random", "--size", 64]
pytestmark = [
    pytest.mark.filterwarnings("ignore:roi. the mask of"),  # of another size than the images
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir).*"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a region of interest, and its data."""
    root = tmp_path_factory.mktemp("roi")
    tiny_set(root / "data", "nut", train=12)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(root / "roi.png")
    Image.fromarray(255 - mask).save(root / "other.png")
    output = works(
        "train", root / "data/nut", "--out", root / "run", "--roi", root / "roi.png", *OPTIONS, "--holdout", 0.4
    )
    assert "region of interest: 62.5 % of the image (64 x 64 px)" in output
    return root


def read_scores(folder):
    with open(folder / "scores.csv", newline="") as file:
        return [(float(row["score"]), row.get("decision")) for row in csv.DictReader(file)]


def test_predict_looks_inside_alone(run, tmp_path):
    works("predict", run / "run", run / "data/nut/test", "--out", tmp_path / "p", "--maps", "npy")
    maps = [np.load(path) for path in sorted((tmp_path / "p/maps").rglob("*.npy"))]
    assert len(maps) == 6
    assert all(not m[:, 40:].any() and m[:, :40].all() for m in maps)
    assert [score for score, _ in read_scores(tmp_path / "p")] == pytest.approx(
        [float(m.max()) for m in maps], rel=1e-5
    )
    description = json.loads((tmp_path / "p/scores.json").read_text())
    assert description["region_of_interest"] == "62.5 % of the image (64 x 64 px)"
    with open(tmp_path / "p/regions.csv", newline="") as file:
        regions = list(csv.DictReader(file))
    assert regions
    assert all(int(row["left"]) + int(row["width"]) <= 40 for row in regions)


def test_another_region_makes_no_decisions(run, tmp_path):
    result = call(
        "predict", run / "run", run / "data/nut/test", "--out", tmp_path / "p", "--roi", run / "other.png",
        "--no-overlays",
    )  # fmt: skip
    output = result.output
    assert result.exit_code == 0
    assert "its calibration is for another region of interest, 62.5 % of the image (64 x 64 px), not 37.5 %" in output
    assert all(not decision for _, decision in read_scores(tmp_path / "p"))
    refused = fails(
        "predict", run / "run", run / "data/nut/test", "--out", tmp_path / "q", "--roi", run / "other.png", "--decide"
    )
    assert "calibration is for another region of interest" in refused
    output = call("evaluate", run / "run", run / "data/nut", "--roi", run / "other.png").output
    assert "calibration is for another region of interest" in output


def test_exported_graph_has_the_region(run, tmp_path):
    pytest.importorskip("onnxruntime")
    works("export", run / "run", "--format", "onnx", "--out", tmp_path / "nut.onnx")
    exported, own = recontrast.load(tmp_path / "nut.onnx"), recontrast.load(run / "run")
    ours, theirs = (d.predict(run / "data/nut/test") for d in (exported, own))
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
    assert [p.decision for p in ours] == [p.decision for p in theirs]
    assert not ours[0].anomaly_map[:, 40:].any()
    Image.new("RGB", (64, 90)).save(tmp_path / "tall.png")
    with pytest.raises(ValueError, match=r"roi: wanted a mask of the size of .*tall.png"):
        exported.predict(tmp_path / "tall.png")
    with pytest.raises(ValueError, match=r"roi: wanted none for an exported file"):
        recontrast.load(tmp_path / "nut.onnx", roi=run / "roi.png")


def test_report_outlines_the_region(run, tmp_path):
    output = works("report", run / "run", run / "data/nut", "--out", tmp_path / "report.html")
    assert "report.html" in output
    text = (tmp_path / "report.html").read_text()
    assert "62.5 % of the image (64 x 64 px)" in text and "Outlined in blue: the region of interest." in text
    picture = np.asarray(recontrast.load(run / "run").predict(run / "data/nut/test/good")[0].draw())
    assert (picture == (70, 170, 255)).all(axis=2).any()


def test_report_in_another_region(run, tmp_path):
    own = call("report", run / "run", run / "data/nut", "--out", tmp_path / "own.html")
    result = call("report", run / "run", run / "data/nut", "--out", tmp_path / "r.html", "--roi", run / "other.png")
    assert result.exit_code == own.exit_code == 0
    assert "its calibration is for another region of interest, 62.5 % of the image (64 x 64 px)" in result.output
    assert "warning" not in own.output
    assert "37.5 % of the image (64 x 64 px)" in (tmp_path / "r.html").read_text()
    text = fails("report", run / "run", run / "data/nut", "--out", tmp_path / "n.html", "--roi", tmp_path / "none.png")
    assert "none.png" in text and not (tmp_path / "n.html").exists()


def test_compare_in_a_region(run, tmp_path):
    options = ["--methods", "padim,patchcore", "--backbone", "test_resnet", "--weights", "random", "--size", 64]
    options += ["--out", tmp_path / "c", "--device", "cpu"]
    printed = works("compare", run / "data/nut", *options, "--roi", run / "roi.png")
    assert "region of interest: 62.5 % of the image (64 x 64 px)" in printed
    for method in ("padim", "patchcore"):
        maps = [p.anomaly_map for p in recontrast.load(tmp_path / "c" / method).predict(run / "data/nut/test/good")]
        assert all(m[:, :40].all() and not m[:, 40:].any() for m in maps)
    other = call("compare", run / "data/nut", *options)
    assert other.exit_code == 2 and "another region of interest" in other.output
    other = call("compare", run / "data/nut", *options, "--roi", run / "other.png")
    assert other.exit_code == 2 and "another region of interest" in other.output
    (tmp_path / "masks").mkdir()
    text = fails("compare", run / "data/nut", *options, "--roi", tmp_path / "masks")
    assert "masks" in text


def test_patches_of_a_comparison_lie_inside():
    inside = np.zeros((40, 60), bool)
    inside[30:, :9] = True
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for seed in range(20):
        changed = (paste_patch(image, seed, inside) != image).any(2)
        assert (changed & inside).any()


def test_calibrate_counts_the_pixels_inside(run, tmp_path):
    recontrast.find_samples(run / "data/nut")
    tiny_set(tmp_path / "new", "nut", train=20, seed=9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_bytes((run / "run/checkpoint.pt").read_bytes())
    works(
        "calibrate",
        tmp_path / "run",
        "--good",
        tmp_path / "new/nut/train/good",
        "--false-alarm-rate",
        0.1,
        "--pixel-rate",
        0.1,
    )
    detector = recontrast.load(tmp_path / "run")
    inside = decode_mask(detector.recipe.roi)
    maps = [p.anomaly_map for p in detector.predict(tmp_path / "new/nut/train/good")]
    flagged = np.mean([(m[inside] > detector.calibration.pixel_threshold).mean() for m in maps])
    assert 0.03 < flagged <= 0.1
    options = ["--false-alarm-rate", 0.1, "--roi", run / "roi.png"]
    text = fails("calibrate", tmp_path / "run", "--good", tmp_path / "new/nut/train/good", *options)
    assert "--roi: wanted a folder of masks for a detector that was trained with one, got" in text


def test_resume_keeps_the_region(run, tmp_path):
    options = [
        "--backbone",
        "test_resnet",
        "--weights",
        "random",
        "--size",
        64,
        "--steps",
        2,
        "--batch",
        4,
        "--holdout",
        0,
    ]
    works("train", run / "data/nut", "--out", tmp_path / "a", "--roi", run / "roi.png", *options, "--no-evaluate")
    text = fails("train", run / "data/nut", "--resume", tmp_path / "a", "--roi", run / "other.png", "--no-evaluate")
    assert "roi: 62.5 % of the image (64 x 64 px) and 37.5 % of the image (64 x 64 px)" in text
    works("train", run / "data/nut", "--resume", tmp_path / "a", "--no-evaluate")
    assert recontrast.load(tmp_path / "a").recipe.roi == recontrast.load(run / "run").recipe.roi


def test_folder_of_masks(run, tmp_path):
    for sample in recontrast.find_samples(run / "data/nut"):
        target = tmp_path / "masks" / sample.path.relative_to(run / "data/nut")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((run / "roi.png").read_bytes())
    masks = ["--roi", tmp_path / "masks"]
    works("train", run / "data/nut", "--out", tmp_path / "each", *masks, *OPTIONS, "--holdout", 0.4)
    assert recontrast.load(tmp_path / "each").recipe.roi == EACH
    works("predict", tmp_path / "each", run / "data/nut/test", "--out", tmp_path / "p", *masks, "--no-overlays")
    works("predict", run / "run", run / "data/nut/test", "--out", tmp_path / "q", "--no-overlays")
    ours, theirs = read_scores(tmp_path / "p"), read_scores(tmp_path / "q")
    assert [s for s, _ in ours] == pytest.approx([s for s, _ in theirs], rel=1e-5)
    assert [d for _, d in ours] == [d for _, d in theirs]
    text = fails("predict", tmp_path / "each", run / "data/nut/test", "--out", tmp_path / "r")
    assert "roi: wanted a mask for each image, as the detector was trained with, got none" in text
    text = fails("predict", tmp_path / "each", run / "data/nut/test", "--out", tmp_path / "r", "--engine", "ray")
    assert "wanted a detector with one region of interest or none for --engine ray" in text
    text = fails("export", tmp_path / "each", "--format", "onnx")
    assert "wanted a detector with one region of interest to export, got one with a mask for each image" in text
    (tmp_path / "masks/train/good/003.png").unlink()
    text = fails("train", run / "data/nut", "--out", tmp_path / "no", *masks, *OPTIONS)
    assert "masks: wanted a mask for each image, got none named 003 for" in text
    assert not (tmp_path / "no").exists()


def write_list(run, path, roi="roi.png", splits=("train", "test")):
    """Write a list of the images whose masks are all that of a file, ``roi``."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "label", "mask", "roi"])
        for s in recontrast.find_samples(run / "data/nut"):
            if s.split in splits:
                writer.writerow([s.path, s.split, "defect" if s.label else "good", s.mask or "", run / roi])
    return path


def test_list_with_a_column_of_regions(run, tmp_path):
    write_list(run, tmp_path / "list.csv")
    works("train", tmp_path / "list.csv", "--out", tmp_path / "run", *OPTIONS, "--holdout", 0.4, "--no-evaluate")
    detector = recontrast.load(tmp_path / "run")
    assert detector.recipe.roi == EACH
    ours = recontrast.evaluate(detector, tmp_path / "list.csv").rows[0]
    theirs = recontrast.evaluate(run / "run", run / "data/nut").rows[0]
    assert ours.i_auroc == pytest.approx(theirs.i_auroc)
    assert ours.p_auroc == pytest.approx(theirs.p_auroc, abs=1e-3)


def test_given_region_wins_over_those_of_a_list(run, tmp_path):
    masks = write_list(run, tmp_path / "list.csv", "other.png")
    mask = recontrast.load(run / "run").recipe.roi
    steps = ["--backbone", "test_resnet", "--weights", "random", "--size", 64, "--steps", 2, "--batch", 4]
    for name, given in [("option", ("--roi", run / "roi.png")), ("field", ("--set", f"roi={mask}"))]:
        works("train", masks, "--out", tmp_path / name, *steps, "--holdout", 0, *given)
        assert recontrast.load(tmp_path / name).recipe.roi == mask
        works("train", masks, "--resume", tmp_path / name, "--no-evaluate")
    works("train", masks, "--out", tmp_path / "whole", *OPTIONS, "--holdout", 0, "--set", "roi=none")
    assert recontrast.load(tmp_path / "whole").recipe.roi is None


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_compare_in_one_region_with_a_list_of_others(run, tmp_path, splits):
    masks = write_list(run, tmp_path / "list.csv", "other.png", splits)
    options = ["--methods", "padim,patchcore", *OPTIONS[2:], "--out", tmp_path / "c", "--device", "cpu"]
    text = fails("compare", masks, *options)
    assert "--roi: wanted one region of interest for all images to compare methods, got one for each" in text
    printed = works("compare", masks, *options, "--roi", run / "roi.png")
    assert "region of interest: 62.5 % of the image (64 x 64 px)" in printed
    mask = recontrast.load(run / "run").recipe.roi
    assert {recontrast.load(tmp_path / "c" / name).recipe.roi for name in ("padim", "patchcore")} == {mask}


def test_calibrate_with_masks_of_some_images(run, tmp_path):
    tiny_set(tmp_path / "new", "nut", train=10, seed=9)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_bytes((run / "run/checkpoint.pt").read_bytes())
    with open(tmp_path / "list.csv", "w", newline="") as file:
        rows = [[path, run / "other.png"] for path in sorted((tmp_path / "new/nut/train/good").iterdir())]
        csv.writer(file).writerows([["path", "roi"], [rows[0][0], ""], *rows[1:]])
    works("calibrate", tmp_path / "run", "--good", tmp_path / "list.csv", "--false-alarm-rate", 0.2)


def bad_regions(folder):
    """Name -> file of a region that is refused, and a part of the message."""

    def save(name, values):
        Image.fromarray(np.asarray(values, np.uint8)).save(folder / name)

    save("size.png", np.full((48, 64), 255))
    save("zero.png", np.zeros((64, 64)))
    save("values.png", np.arange(64 * 64).reshape(64, 64) % 7)
    size = '"width": 64, "height": 64'
    (folder / "outside.json").write_text(f'{{{size}, "polygons": [[[1, 1], [70, 2], [3, 9]]]}}')
    (folder / "broken.json").write_text("{")
    (folder / "text.png").write_text("text")
    (folder / "empty").mkdir()
    return {
        "size.png": "roi: wanted a mask of the size of",
        "zero.png": "wanted a region of interest with at least one pixel, got an empty one",
        "values.png": "wanted a mask of two values, black outside the region of interest, got 7 values",
        "outside.json": "polygons: number 1: wanted corners in the image of 64 x 64 px, got (70, 2)",
        "broken.json": "wanted a region of interest in JSON, got a text that is not JSON",
        "text.png": "text.png: ",
        "missing.png": "missing.png: ",
        "empty": "wanted a folder with a mask for each image, got an empty one",
    }


def test_bad_regions_are_refused(run, tmp_path):
    for name, message in bad_regions(tmp_path).items():
        text = fails("train", run / "data/nut", "--out", tmp_path / "no", "--roi", tmp_path / name, *OPTIONS)
        assert message in text
        assert name in text or name == "size.png"
        assert not (tmp_path / "no").exists()
        if name != "size.png":  # each image is compared with it
            text = fails(
                "predict", run / "run", run / "data/nut/test", "--out", tmp_path / "no", "--roi", tmp_path / name
            )
            assert message in text
    text = fails(
        "predict",
        run / "run",
        run / "data/nut/test",
        "--out",
        tmp_path / "p",
        "--engine",
        "ray",
        "--roi",
        run / "roi.png",
    )
    assert "--roi: wanted none with --engine ray" in text
