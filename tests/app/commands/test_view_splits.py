"""Views of a part that are divided by names: they are in one split, whatever gives the images."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import fails, works
from part_views import PATCHCORE, PATTERN, SMALL, write_set
from PIL import Image

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data.dataset_sample import Sample
from recontrast.data.image_lists import read_list
from recontrast.data.unsplit import assign_splits
from recontrast.data.views import list_part_names


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 good parts and 6 with a defect that one view shows, of which that one has a mask, and no split."""
    root = write_set(tmp_path_factory.mktemp("splits") / "nut", False, train=24, tests=6)
    masks = root / "ground_truth/square"
    rows = [(path, 0, "") for path in sorted((root / "train/good").iterdir())]
    for path in sorted((root / "test/square").iterdir()):
        shown = int(path.stem[:3]) % 2 == ("right" in path.stem)
        mask = masks / f"{path.stem}_mask.png"
        if not shown:
            mask.unlink()
        rows.append((path, int(shown), mask if shown else ""))
    with open(root.parent / "nut.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "mask"), *rows])
    return root


def count_splits(samples):
    """Return the splits of each part, by the number of the part and its folder."""
    parts = {}
    for sample in samples:
        parts.setdefault((sample.path.parent, sample.path.stem[:3]), set()).add(sample.split)
    return list(parts.values())


def test_lists_and_folders_keep_the_views_of_a_part_together(data):
    (single,) = read_list(data.parent / "nut.csv").values()
    assert any(len(splits) > 1 for splits in count_splits(single))  # by their own names, they would be divided
    (listed,) = read_list(data.parent / "nut.csv", views_from=PATTERN).values()
    folders = recontrast.find_samples(good=data / "train/good", bad=data / "test/square", views_from=PATTERN)
    for samples in (listed, folders):
        splits = count_splits(samples)
        assert len(splits) == 30 and all(len(one) == 1 for one in splits)
        assert sum(one == {"test"} for one in splits) == 6 + 5  # all defects, and a fifth of 24 good parts
    with pytest.raises(ValueError, match="views_from: wanted 'pages' or a regular expression"):
        recontrast.find_samples(data, views_from="(")


def test_split_depends_on_the_names_of_parts_alone():
    def make(part, view, label):
        return Sample(Path(f"/x/{part}_{view}.png"), None, label, "nut", "train", "good")

    samples = [make(part, view, int(part == 3 and view == "right")) for part in range(20) for view in ("left", "right")]
    names = [sample.path.name for sample in samples]
    divided = {s.path.name: s.split for s in assign_splits(samples, names, PATTERN)}
    order = np.random.default_rng(0).permutation(len(samples))
    again = assign_splits([samples[i] for i in order], [names[i] for i in order], PATTERN)
    assert {s.path.name: s.split for s in again} == divided
    assert divided["3_left.png"] == divided["3_right.png"] == "test"  # one view shows the defect
    assert len(set(list_part_names([s.path for s in samples], PATTERN))) == 20


@pytest.mark.parametrize("given", ["list", "good and bad"])
def test_train_evaluate_and_calibrate_keep_parts_together(data, tmp_path, given):
    words = [data.parent / "nut.csv"] if given == "list" else [
        "--good", data / "train/good", "--bad", data / "test/square"]  # fmt: skip
    works("train", *words, "--out", tmp_path / "run", "--views-from", PATTERN, *PATCHCORE, "--holdout", 0.3)
    saved = checkpoints.load(tmp_path / "run/checkpoint.pt")
    assert len(saved.images["each"]) == 16 * 13 and saved.calibration.count == 6  # of 24 parts, 5 are test parts
    works("evaluate", tmp_path / "run", *words, "--out", tmp_path / "e", "--device", "cpu")
    (row,) = [r for r in json.loads((tmp_path / "e/results.json").read_text())["rows"] if r["images"]][:1]
    assert (row["images"], row["defects"]) == (11, 6)
    if given == "list":
        assert row["p_auroc"] > 0.8
        text = fails("calibrate", tmp_path / "run", "--good", words[0], "--false-alarm-rate", 0.1, "--device", "cpu")
        assert "wanted good parts that were not trained on, got 13 of 19 that were" in text
    else:
        works("list", *words, "--views-from", PATTERN, "--out", tmp_path / "l.csv")
        (listed,) = read_list(tmp_path / "l.csv").values()
        assert all(len(one) == 1 for one in count_splits(listed))


def test_list_writes_only_masks_that_exist(data, tmp_path):
    """The list is whole for commands that know nothing of views; and a file that is missing is named."""
    works("list", data, "--views-from", PATTERN, "--out", tmp_path / "l.csv")
    (listed,) = read_list(tmp_path / "l.csv", views_from=PATTERN).values()
    assert sum(sample.mask is not None for sample in listed) == 6
    assert all(sample.mask.is_file() for sample in listed if sample.mask is not None)
    shutil.copy(data / "train/good/000_left.png", tmp_path)
    (tmp_path / "m.csv").write_text("path\n000_left.png\n000_right.png\n")
    for words in (["list", "--out", tmp_path / "n.csv"], ["train", *PATCHCORE, "--out", tmp_path / "run"]):
        text = fails(*words[:1], tmp_path / "m.csv", "--views-from", PATTERN, *words[1:])
        assert f"{tmp_path / '000_right.png'}: wanted an image, got no such file" in text
    assert not (tmp_path / "n.csv").exists()


def test_compare_measures_all_parts_if_one_view_is_the_same_in_all(data, tmp_path):
    """Such as a view without light: parts are copies only if all views are."""
    for path in sorted((data / "train/good").iterdir()):
        Image.new("L", (64, 64)).save(tmp_path / path.name) if "left" in path.name else shutil.copy(path, tmp_path)
    words = ["compare", tmp_path, "--views-from", PATTERN, *SMALL, "--methods", "patchcore", "--out", tmp_path / "c"]
    works(*words)
    record = json.loads((tmp_path / "c/patchcore/method.json").read_text())
    assert len(record["result"]["held_out_scores"]) == 5  # a fifth of 24 parts
    assert checkpoints.load(tmp_path / "c/patchcore/checkpoint.pt").calibration.count == 5
    Image.new("L", (64, 64), 90).save(tmp_path / "000_right.png")  # a view that is not the first one
    assert "wanted a run of this comparison, got one with other images" in fails(*words)


def test_compare_measures_parts(data, tmp_path):
    """It needs no mask of a view that does not show the defect, and a patch is pasted into one view of each part."""
    words = ["compare", data.parent / "nut.csv", "--views-from", PATTERN, *SMALL,
             "--methods", "patchcore,padim", "--out", tmp_path / "c", "--holdout", 0.3]  # fmt: skip
    printed = works(*words, "--images", data / "test/good")
    page, table = ((tmp_path / "c" / name).read_text() for name in ("compare.html", "compare.md"))
    assert "on the 11 labelled test parts" in printed and "ms per part" in printed and "ms per image" not in page
    assert "- I-AUROC: parts: probability" in table and "training parts: " in table and "held-out parts is" in table
    assert " parts whose ranks differ" in page and " parts that no method was trained on" in page
    content = json.loads((tmp_path / "c/compare.json").read_text())
    for method in ("patchcore", "padim"):
        saved = json.loads((tmp_path / "c" / method / "results.json").read_text())
        assert (saved["rows"][0]["images"], saved["rows"][0]["defects"]) == (11, 6)
        assert checkpoints.load(tmp_path / "c" / method / "checkpoint.pt").recipe.view_names == ("left", "right")
    assert {"patchcore", "padim"} <= set(json.dumps(content).replace('"', " ").split())
