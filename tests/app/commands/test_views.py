"""Several views of a part on the command line: train, evaluate, calibrate, predict, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from part_views import PATCHCORE, PATTERN, SMALL, write_set
from PIL import Image

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data.views import Views


@pytest.fixture(scope="module", params=[PATTERN, "pages"], ids=["files", "pages"])
def run(request, tmp_path_factory):
    """A calibrated run on parts with two views, and its data."""
    root = tmp_path_factory.mktemp("views")
    write_set(root / "nut", request.param == "pages")
    printed = works("train", root / "nut", "--out", root / "run", "--views-from", request.param, *PATCHCORE,
                    "--holdout", 0.4)  # fmt: skip
    names = "1, 2" if request.param == "pages" else "left, right"
    assert f"views: 2 images of each part ({names}), a map is the largest value of theirs" in printed
    counted = "images" if request.param == "pages" else "parts"
    assert f"train/good: 12 {counted}" in printed and f"test/square: 3 {counted} (test, square, 3 masks)" in printed
    assert "5 of 12 good parts held out" in printed and "one pass over 7 parts of 2 views" in printed
    return root


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_run_learns_all_views_and_counts_parts(run):
    saved = checkpoints.load(run / "run/checkpoint.pt")
    assert saved.images["count"] == 14 and len(saved.images["each"]) == 7 * 16  # images, and parts
    assert saved.calibration.count == 5
    assert len(saved.recipe.view_names) == 2 and saved.recipe.view_map == "max"


def test_map_of_a_part_is_the_largest_of_its_views(run):
    detector = recontrast.load(run / "run", "cpu")
    views = detector.recipe.image_views
    single = recontrast.load(run / "run", "cpu")
    single.recipe = single.recipe.replace(views_from=None, view_names=())
    (joined,) = detector.predict(sorted((run / "nut/test/square").iterdir())[: 1 if views.source == "pages" else 2])
    maps = [prediction.anomaly_map for prediction in single.predict(list(views.read(Path(joined.name))))]
    np.testing.assert_allclose(joined.anomaly_map, np.maximum(*maps), rtol=1e-5)
    assert joined.score == joined.anomaly_map.max()
    mean = recontrast.load(run / "run", "cpu")
    mean.recipe = mean.recipe.replace(view_map="mean")
    np.testing.assert_allclose(mean.predict(joined.name)[0].anomaly_map, np.mean(maps, axis=0), rtol=1e-5)
    assert joined.image().size == (64, 64) and joined.draw().width > 64


def test_predict_writes_a_row_for_each_part(run, tmp_path):
    printed = works("predict", run / "run", run / "nut/test", "--out", tmp_path / "p", "--maps", "npy")
    assert "6 parts scored" in printed
    rows = read_table(tmp_path / "p/scores.csv")
    assert len(rows) == 6 and all(row["decision"] for row in rows)
    assert len(list((tmp_path / "p/maps").rglob("*.npy"))) == len(list((tmp_path / "p/overlays").rglob("*.png"))) == 6
    assert json.loads((tmp_path / "p/scores.json").read_text())["view_map"] == "max"
    again = {row["path"]: float(row["score"]) for row in rows}
    for batch in (1, 3):
        scores = recontrast.load(run / "run", "cpu").predict(run / "nut/test", batch=batch)
        assert [again[p.name] for p in scores] == pytest.approx([p.score for p in scores], rel=1e-5)


def test_evaluate_joins_labels_and_masks(run, tmp_path):
    printed = works("evaluate", run / "run", run / "nut", "--out", tmp_path / "e", "--save-maps")
    assert "of 3 good parts called defects" in printed and "of 3 defect parts found" in printed
    assert (tmp_path / "e/results.md").read_text().startswith("| category | parts | ")
    result = json.loads((tmp_path / "e/results.json").read_text())
    assert "noun" not in result and "noun" not in result["decided"]
    (row,) = [row for row in result["rows"] if row["category"] == "nut"]
    assert (row["images"], row["defects"]) == (6, 3)
    assert row["p_auroc"] > 0.9  # the defect of each view is found in the map of the part
    assert len(read_table(tmp_path / "e/scores.csv")) == 6 and len(list((tmp_path / "e/maps").rglob("*.tiff"))) == 6
    cached = recontrast.evaluate(run / "run", run / "nut", device="cpu", cache_dir=tmp_path / "cache")
    assert cached.rows[0].p_auroc == pytest.approx(row["p_auroc"])
    works("report", run / "run", run / "nut", "--out", tmp_path / "report.html")
    assert "An image in this report is a part with 2 views (" in (tmp_path / "report.html").read_text()


def test_a_view_that_does_not_show_the_defect_needs_no_mask(tmp_path):
    data, options = write_set(tmp_path / "nut", False, tests=4), ["--views-from", PATTERN, *PATCHCORE]
    masks = data / "ground_truth/square"
    for number in range(4):
        (masks / f"{number:03}_{('right', 'left')[number % 2]}_mask.png").unlink()
    printed = works("train", data, "--out", tmp_path / "run", *options)
    assert "test/square: 4 parts (test, square, 4 masks)" in printed
    works("evaluate", tmp_path / "run", data, "--out", tmp_path / "e")
    (row,) = [r for r in json.loads((tmp_path / "e/results.json").read_text())["rows"] if r["category"] == "nut"]
    assert row["p_auroc"] > 0.9
    fields = {"views_from": PATTERN, "architecture": "patchcore", "backbone": "test_resnet", "weights": "random"}
    detector = recontrast.train(data, tmp_path / "run2", size=64, device="cpu", **fields)
    assert detector.recipe.view_names == ("left", "right")
    (masks / "001_right_mask.png").unlink()
    text = fails("train", data, "--out", tmp_path / "run3", *options)
    assert "001_left_mask.png, or one of another view, got none" in text and not (tmp_path / "run3").exists()
    result = call("evaluate", tmp_path / "run", data)
    assert result.exit_code == 2 and "001_left" in result.output


def test_groups_of_a_list_count_once(tmp_path):
    """The group stands in the rows of one view alone, and four groups are too few for the promise of 12 parts."""
    data = write_set(tmp_path / "nut", False, train=12, tests=0)
    works("train", data, "--out", tmp_path / "run", "--views-from", PATTERN, *PATCHCORE)
    new = write_set(tmp_path / "new", False, train=12, tests=0, seed=5) / "train/good"
    rows = [f"new/train/good/{path.name},{int(path.stem[:3]) // 3 if 'right' in path.name else ''}"
            for path in sorted(new.iterdir())]  # fmt: skip
    (tmp_path / "new.csv").write_text("\n".join(["path,group", *rows]))
    works("calibrate", tmp_path / "run", "--good", tmp_path / "new.csv", "--false-alarm-rate", 0.2, "--device", "cpu")
    assert checkpoints.load(tmp_path / "run/checkpoint.pt").calibration.count == 4
    text = fails("calibrate", tmp_path / "run", "--good", tmp_path / "new.csv", "--false-alarm-rate", 0.1)
    assert "4" in text


def test_a_region_of_interest_of_one_view_is_refused(tmp_path):
    """As that of each image is, wherever it stands; a region that is given goes before those of a list."""
    data = write_set(tmp_path / "nut", False, train=4, tests=0)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    rows = [f"{path},train,0,{'roi.png' if path.name == '002_right.png' else ''}"
            for path in sorted((data / "train/good").iterdir())]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(["path,split,label,roi", *rows]))
    words = ["train", tmp_path / "list.csv", "--out", tmp_path / "run", "--views-from", PATTERN, *PATCHCORE]
    assert "roi: wanted one mask for all images with views_from, got one for each image" in fails(*words)
    works(*words, "--roi", tmp_path / "roi.png")
    assert not recontrast.load(tmp_path / "run", "cpu").predict(data / "train/good")[0].anomaly_map[:, 40:].any()


def test_maps_of_others_are_found_under_the_names_of_parts(tmp_path):
    """Views that differ in the suffix alone, which the name of a part does not have."""
    data = write_set(tmp_path / "nut", False, tests=2)
    for path in sorted(data.rglob("*_left.png")):
        Image.open(path).save(path.with_name(f"{path.stem[:3]}.bmp"))
        path.unlink()
    for path in sorted(data.rglob("*_right*.png")):
        path.rename(path.with_name(path.name.replace("_right", "")))
    for path in sorted(data.rglob("*_left_mask.png")):
        path.unlink()
    works("train", data, "--out", tmp_path / "run", "--views-from", r"\.(bmp|png)$", *PATCHCORE, "--no-evaluate")
    words = ["evaluate", tmp_path / "run", data, "--save-maps", "--device", "cpu", "--out"]
    works(*words, tmp_path / "e")
    (name,) = [path for path in (tmp_path / "e/maps").rglob("000.tiff") if "square" in path.parts]
    foreign = tmp_path / "e2" / name.relative_to(tmp_path / "e")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"notes")
    assert "--overwrite" in fails(*words, tmp_path / "e2")
    assert foreign.read_bytes() == b"notes"


def test_calibrate_counts_parts(run, tmp_path):
    write_set(tmp_path / "new", "pages" in checkpoints.load(run / "run/checkpoint.pt").recipe.views_from, 20, seed=9)
    copy = tmp_path / "run/checkpoint.pt"
    copy.parent.mkdir()
    copy.write_bytes((run / "run/checkpoint.pt").read_bytes())
    printed = works("calibrate", copy, "--good", tmp_path / "new/train/good", "--false-alarm-rate", 0.05,
                    "--bad", tmp_path / "new/test/square", "--check", tmp_path / "new/test/good",
                    "--device", "cpu")  # fmt: skip
    for text in (
        "from 20 good parts (", ": a new good part of the same source", "of 20 parts, the", "more parts narrow",
        "of 3 parts with defects found", "of good parts are",
    ):  # fmt: skip
        assert text in printed
    text = fails("calibrate", copy, "--good", tmp_path / "new/test/good", "--device", "cpu")
    assert "the lowest that 3 calibration parts can promise, got 0.01, which needs 99 good parts" in text
    stored = checkpoints.load(copy).calibration
    assert stored.count == 20 and len(stored.appearance) == 20
    again = recontrast.calibrate(copy, tmp_path / "new/train/good", false_alarm_rate=0.05, device="cpu")
    assert again.calibration.threshold == stored.threshold
    text = fails("calibrate", copy, "--good", run / "nut/train/good", "--false-alarm-rate", 0.1, "--device", "cpu")
    assert "wanted good parts that were not trained on, got 7 of 12 that were" in text


def test_calibrate_leaves_out_a_part_without_a_view(run, tmp_path):
    """As it does with a broken image: the part is named, the calibration is stored, and the exit status is 2."""
    pages = checkpoints.load(run / "run/checkpoint.pt").recipe.views_from == "pages"
    write_set(tmp_path / "new", pages, 20, tests=20, seed=9)
    copy = tmp_path / "run/checkpoint.pt"
    copy.parent.mkdir()
    copy.write_bytes((run / "run/checkpoint.pt").read_bytes())
    for folder in ("train/good", "test/good", "test/square"):
        if pages:
            Image.new("L", (64, 64)).save(tmp_path / "new" / folder / "003.tif")
        else:
            (tmp_path / "new" / folder / "003_right.png").unlink()
    result = call("calibrate", copy, "--good", tmp_path / "new/train/good", "--check", tmp_path / "new/test/good",
                  "--bad", tmp_path / "new/test/square", "--false-alarm-rate", 0.05, "--device", "cpu")  # fmt: skip
    assert result.exit_code == 2 and "of 19 parts with defects found" in result.output
    name, wanted = ("003.tif", "2 pages as in training, got 1") if pages else ("003_", "the views left, right of each")
    lines = [line for line in result.stderr.splitlines() if f"{name}" in line and wanted in line]
    assert [next(f for f in ("train/good", "test/good", "test/square") if f in line) for line in lines] == [
        "train/good", "test/good", "test/square",
    ]  # fmt: skip
    assert checkpoints.load(copy).calibration.count == 19
    with pytest.raises(ValueError, match=r"003.*wanted"):
        recontrast.calibrate(copy, tmp_path / "new/train/good", false_alarm_rate=0.05, device="cpu")


def test_extend_adds_parts(run, tmp_path):
    write_set(tmp_path / "new", "pages" in checkpoints.load(run / "run/checkpoint.pt").recipe.views_from, 3, seed=7)
    copy = tmp_path / "run/checkpoint.pt"
    copy.parent.mkdir()
    copy.write_bytes((run / "run/checkpoint.pt").read_bytes())
    printed = works("train", "--extend", copy, "--good", tmp_path / "new/train/good", "--device", "cpu")
    assert "3 parts added" in printed and "10 in all" in printed
    assert checkpoints.load(copy).images["count"] == 20


def test_errors_name_the_part_and_cost_no_other(run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in (run / "nut/test/good").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    views = checkpoints.load(run / "run/checkpoint.pt").recipe.image_views
    if views.source == "pages":
        Image.new("L", (64, 64)).save(folder / "001.tif")
        wanted = "001.tif: wanted 2 pages as in training, got 1"
    else:
        (folder / "001_left.png").unlink()
        wanted = "001_left.png: wanted the views left, right of each part, got no such file"
    result = call("predict", run / "run", folder, "--out", tmp_path / "p", "--device", "cpu")
    assert result.exit_code == 2 and wanted in result.output
    rows = read_table(tmp_path / "p/scores.csv")
    assert len(rows) == 3 and sum(bool(row["error"]) for row in rows) == 1
    with pytest.raises(ValueError, match="images: wanted paths of parts with the views"):
        recontrast.load(run / "run", "cpu").predict(np.zeros((64, 64, 3), np.uint8))


def test_parts_without_their_first_view_have_results_of_their_own(run, tmp_path):
    """Their names are those of the first views, which are not among the inputs; files of others stay as they are."""
    pages = checkpoints.load(run / "run/checkpoint.pt").recipe.views_from == "pages"
    for folder in "ab":
        write_set(tmp_path / folder, pages, train=1, tests=0, seed=ord(folder))
    inputs = [tmp_path / folder / f"train/good/000{'.tif' if pages else '_right.png'}" for folder in "ab"]
    words = ["predict", run / "run", *inputs, "--out", tmp_path / "p", "--maps", "npy", "--device", "cpu"]
    assert "2 parts scored" in works(*words)
    names = [Path(folder, f"train/good/000{'' if pages else '_left'}") for folder in "ab"]
    a, b = (np.load(tmp_path / "p/maps" / name.with_suffix(".npy")) for name in names)
    assert (a != b).any()
    assert all((tmp_path / "p/overlays" / name.with_suffix(".png")).is_file() for name in names)
    foreign = tmp_path / "p2/maps" / names[0].with_suffix(".npy")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"notes")
    assert "--overwrite" in fails(*[tmp_path / "p2" if word == tmp_path / "p" else word for word in words])
    assert foreign.read_bytes() == b"notes" and len(list((tmp_path / "p2").rglob("*"))) == 5


@pytest.mark.parametrize("command", ["benchmark", "watch"])
def test_what_takes_single_images_refuses_the_detector(run, tmp_path, command):
    words = {
        "benchmark": ["benchmark", run / "run"],
        "watch": ["watch", tmp_path, run / "run", "--out", tmp_path / "out"],
    }[command]
    text = fails(*words)
    assert "wanted a detector of single images" in text and "got one of parts with 2 views" in text


def test_training_by_steps_with_a_region_resumes(tmp_path):
    """ReContrast on views, with one region of interest for all and maps that are means."""
    write_set(tmp_path / "nut", False, train=6)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    options = [*SMALL, "--views-from", PATTERN, "--set", "view_map=mean", "--roi", tmp_path / "roi.png"]
    works("train", tmp_path / "nut", "--out", tmp_path / "run", *options, "--steps", 3)
    detector = recontrast.load(tmp_path / "run", "cpu")
    assert detector.recipe.image_views == Views(PATTERN, ("left", "right"))
    maps = [p.anomaly_map for p in detector.predict(tmp_path / "nut/test")]
    assert len(maps) == 6 and all(m[:, :40].all() and not m[:, 40:].any() for m in maps)
    works("train", tmp_path / "nut", "--resume", tmp_path / "run", "--device", "cpu")
    assert checkpoints.load(tmp_path / "run/checkpoint.pt").step == 3


def test_training_names_what_is_missing(tmp_path):
    write_set(tmp_path / "nut", False, train=4)
    (tmp_path / "nut/train/good/002_right.png").unlink()
    text = fails("train", tmp_path / "nut", "--out", tmp_path / "run", "--views-from", PATTERN, *PATCHCORE)
    assert "002_left.png: wanted the views left, right of each part, got no right" in text
    text = fails("train", tmp_path / "nut", "--out", tmp_path / "run", "--views-from", "(0)", *PATCHCORE)
    assert "views_from: wanted at least 2 views of each part as '(0)' finds them, got 1 (0)" in text
    text = fails("train", tmp_path / "nut", "--out", tmp_path / "run", "--views-from", "(", *PATCHCORE)
    assert "views_from: wanted none, 'pages' or a regular expression" in text
    text = fails("train", tmp_path / "nut", "--out", tmp_path / "run", "--views-from", "_(x)_", *PATCHCORE)
    assert "wanted a path with the name of a view" in text
    assert not (tmp_path / "run").exists()


def test_budget_counts_views(tmp_path):
    torch.manual_seed(0)
    write_set(tmp_path / "nut", False, train=6)
    printed = works("train", tmp_path / "nut", "--out", tmp_path / "run", "--views-from", PATTERN, "--budget", "30s",
                    "--backbone", "test_resnet", "--weights", "random", "--device", "cpu", "--set", "size=64",
                    "--architecture", "patchcore")  # fmt: skip
    assert "one pass over 6 parts of 2 views" in printed
