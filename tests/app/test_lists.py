"""Lists of images, and folders of good and bad images, in the commands and in Python."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from command_line import SMALL, call, fails, works
from saved_model import RECIPE, draw, save
from tiny import tiny_set

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data import datasets
from recontrast.data.image_lists import write_list

PATCHCORE = [*SMALL, "--architecture", "patchcore"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=12, good=4, defects=3)
    return root


def write_pairs(data, path):
    """Write a list in which training images 0 and 1, 2 and 3 and so on are of one part."""
    samples = datasets.load(data / "nut")["nut"]
    grouped = [replace(s, group=f"part{int(s.path.stem) // 2}") if s.split == "train" else s for s in samples]
    write_list(path, {"nut": grouped})


def read_scores(run):
    return (run / "scores.csv").read_text()


def test_a_run_from_a_list_is_the_run_from_the_folder(data, tmp_path):
    """Weights, calibration, scores and metrics are equal bit for bit, by steps and in one pass."""
    works("list", data / "nut", "--out", data / "all.parquet")
    for options in (SMALL, PATCHCORE):
        runs = []
        for source in (data / "nut", data / "all.parquet"):
            runs.append(tmp_path / f"{source.stem}{len(options)}")
            works("train", source, *options, "--holdout", 0.25, "--out", runs[-1])
        first, second = (checkpoints.load(run / "checkpoint.pt") for run in runs)
        assert first.model.keys() == second.model.keys()
        assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)
        assert (first.calibration, first.images, first.category) == (second.calibration, second.images, second.category)
        assert read_scores(runs[0]) == read_scores(runs[1])
        rows = [json.loads((run / "results.json").read_text())["rows"] for run in runs]
        assert {**rows[0][0], "seconds": 0} == {**rows[1][0], "seconds": 0}


def test_groups_never_cross_training_and_holdout(data, tmp_path):
    write_pairs(data, tmp_path / "list.csv")
    printed = works(
        "train", tmp_path / "list.csv", *PATCHCORE, "--holdout", 0.5, "--no-evaluate", "--out", tmp_path / "run"
    )
    assert "3 of 6 groups of 12 good images held out" in printed
    assert "from 3 groups of good images (6 images, held out of training)" in printed
    stored = checkpoints.load(tmp_path / "run/checkpoint.pt")
    assert (stored.calibration.count, stored.calibration.image_count, stored.images["count"]) == (3, 6, 6)
    assert len(stored.images["groups"]) == 3
    new = draw(tmp_path / "new", 6, seed=5)
    rows = [f"new/{i:03}.png,{'p' if i else stored.images['groups'][0]}\n" for i in range(6)]
    (tmp_path / "new.csv").write_text("path,group\n" + "".join(rows))
    text = fails("calibrate", tmp_path / "run", "--good", tmp_path / "new.csv", "--false-alarm-rate", 0.5)
    assert (
        f"--good: wanted groups that were not trained on, got 1 of 6 images of groups that were (first: {new}/000"
        in text
    )


def test_calibration_counts_groups(tmp_path):
    save(tmp_path / "run/checkpoint.pt", RECIPE)
    draw(tmp_path / "good", 12, seed=0)
    bad = draw(tmp_path / "bad", 3, seed=1, spread=90.0)
    (tmp_path / "good.jsonl").write_text("".join(
        json.dumps({"path": f"good/{i:03}.png", "group": i // 3}) + "\n" for i in range(12)))  # fmt: skip
    command = ("calibrate", tmp_path / "run", "--good", tmp_path / "good.jsonl", "--device", "cpu")
    assert "0.1" in fails(*command, "--false-alarm-rate", 0.1)  # 12 images would be enough for 1/13, 4 groups are not
    printed = works(*command, "--false-alarm-rate", 0.2, "--bad", bad)
    assert "from 4 groups of good images (12 images," in printed and "of 3 images with defects found" in printed
    found = checkpoints.load(tmp_path / "run/checkpoint.pt").calibration
    works("calibrate", tmp_path / "run", "--good", tmp_path / "good", "--false-alarm-rate", 0.2, "--device", "cpu")
    each = [p.score for p in recontrast.load(tmp_path / "run", "cpu").predict(tmp_path / "good.jsonl")]
    largest = sorted(max(each[i : i + 3]) for i in range(0, 12, 3))
    assert found.scores == pytest.approx(largest, rel=1e-5) and found.image_count == 12
    assert "got 12 of them again" in fails(*command, "--bad", tmp_path / "good")
    detector = recontrast.calibrate(tmp_path / "run", tmp_path / "good.jsonl", false_alarm_rate=0.2, device="cpu")
    assert detector.calibration == found
    assert "4 new good images" in works("calibrate", tmp_path / "run", "--check", tmp_path / "good.jsonl")


def test_good_and_bad_folders_without_any_layout(data, tmp_path):
    good, bad = data / "nut/train/good", data / "nut/test/square"
    run = tmp_path / "run"
    printed = works("train", "--good", good, "--bad", bad, *PATCHCORE, "--out", run)
    assert "nut: " in printed and "10 images (good, to train on)" in printed and "2 images (test, good)" in printed
    scores = read_scores(run)
    assert len(scores.splitlines()) == 1 + 2 + 3
    results = recontrast.find_samples(good=good, bad=bad)
    assert {str(s.path) for s in results if s.split == "test"} == {
        row["path"] for row in csv.DictReader(scores.split("\n"))
    }
    result = call("evaluate", run, "--good", good, "--bad", bad, "--out", tmp_path / "again", "--device", "cpu")
    assert "it is measured with the 2 of 12 that training keeps for the test" in result.stderr
    assert result.exit_code == 0 and read_scores(tmp_path / "again") == scores
    others = draw(tmp_path / "others", 4, seed=9)  # the detector was trained on none of them: all are test images
    works("evaluate", run, "--good", others, "--bad", bad, "--out", tmp_path / "new", "--device", "cpu")
    assert len(read_scores(tmp_path / "new").splitlines()) == 1 + 4 + 3
    assert "wanted either DATA or this, got both" in fails("evaluate", run, data / "nut", "--good", good)
    assert "--bad: wanted --good with it, got none" in fails("train", "--bad", bad, *SMALL)
    assert "got --bad too" in fails("train", "--extend", run, "--good", good, "--bad", bad)
    assert "DATA: wanted data sets, folders or lists" in fails("evaluate", run)


def test_predict_report_and_compare_take_lists(data, tmp_path):
    works("list", data / "nut", "--out", data / "list.csv")
    run = tmp_path / "run"
    works("train", data / "list.csv", *PATCHCORE, "--no-evaluate", "--out", run)
    works("predict", run, data / "list.csv", "--out", tmp_path / "out", "--no-overlays", "--device", "cpu")
    assert len(read_scores(tmp_path / "out").splitlines()) == 1 + 19
    works("evaluate", run, data / "list.csv", "--out", tmp_path / "results", "--device", "cpu")
    printed = works("report", run, data / "list.csv", "--device", "cpu")
    assert "report of 7 images" in printed and (run / "report.html").is_file()
    printed = works("compare", data / "list.csv", "--methods", "patchcore", *SMALL, "--out", tmp_path / "compare")
    assert "patchcore" in printed
    table = [json.loads((tmp_path / name / "results.json").read_text())["rows"][0]["p_auroc"]
             for name in ("results", "compare/patchcore")]  # fmt: skip
    assert table[0] == pytest.approx(table[1], abs=0.2)
    result = recontrast.evaluate(run, data / "list.csv", device="cpu")
    assert result.rows[0].p_auroc == pytest.approx(table[0])


def test_new_images_of_a_list_keep_their_groups(data, tmp_path):
    write_pairs(data, tmp_path / "list.csv")
    run = tmp_path / "run"
    works("train", tmp_path / "list.csv", *PATCHCORE, "--holdout", 0, "--no-evaluate", "--out", run)
    draw(tmp_path / "new", 9, seed=4)
    groups = ["part0", "part3", *(f"new{i // 2}" for i in range(7))]  # two images of groups that were trained on
    (tmp_path / "new.csv").write_text("path,group\n" + "".join(f"new/{i:03}.png,{g}\n" for i, g in enumerate(groups)))
    printed = works("train", "--extend", run, "--good", tmp_path / "new.csv", "--holdout", 0.5, "--device", "cpu")
    stored = checkpoints.load(run / "checkpoint.pt")
    assert "from 2 groups of good images (" in printed and stored.calibration.count == 2  # of 4 new ones
    assert stored.images["count"] == 12 + 9 - stored.calibration.image_count
    assert len(stored.images["groups"]) == 6 + 2 == len(set(stored.images["groups"]))


def test_bad_lists_are_one_sentence(data, tmp_path):
    (tmp_path / "list.csv").write_text("path,split,label\nmissing.png,train,0\n")
    wanted = f"{tmp_path}/list.csv line 2: wanted the image {tmp_path}/missing.png, got no such file"
    assert wanted in fails("train", tmp_path / "list.csv", *SMALL, "--out", tmp_path / "run")
    assert wanted in fails("compare", tmp_path / "list.csv", *SMALL, "--out", tmp_path / "run")
    assert wanted in fails("list", tmp_path / "list.csv", "--out", tmp_path / "other.csv")
    assert not (tmp_path / "run").exists() and not (tmp_path / "other.csv").exists()
    save(tmp_path / "run/checkpoint.pt", RECIPE)
    (tmp_path / "bad.csv").write_text("file\nmissing.png\n")
    for command in (("evaluate", tmp_path / "run", tmp_path / "bad.csv"),
                    ("predict", tmp_path / "run", tmp_path / "bad.csv", "--out", tmp_path / "out"),
                    ("report", tmp_path / "run", tmp_path / "bad.csv"),
                    ("calibrate", tmp_path / "run", "--good", tmp_path / "bad.csv")):  # fmt: skip
        assert "bad.csv: wanted a column path, got the columns file" in fails(*command)


def test_list_command(data, tmp_path):
    assert "--out: list.txt: wanted a name that ends in .csv, .jsonl" in fails("list", data, "--out", "list.txt")
    works("list", data, "--out", tmp_path / "list.jsonl")
    assert datasets.load(tmp_path / "list.jsonl").keys() == {"nut"}
    assert "which recontrast did not write" in fails("list", data, "--out", tmp_path / "list.jsonl")
    works("list", data, "--out", tmp_path / "list.jsonl", "--overwrite", "--category", "nut")
    for pattern, text in (
        ("(", "wanted a regular expression"),
        ("a", "with a group in parentheses"),
        ("(xyz)", "fits none"),
    ):
        assert text in fails("list", data, "--out", tmp_path / "x.csv", "--group", pattern)
    text = fails("list", data, "--out", tmp_path / "x.csv", "--group", r"(\d+)\.png")
    assert "wanted all images of group '000' in one split, got test here and train in" in text
    assert not (tmp_path / "x.csv").exists()


def test_calibration_rows_are_not_trained_on(data, tmp_path):
    groups = {"nut": [s for s in datasets.load(data)["nut"] if s.split == "train"]}
    groups["nut"][8:] = [replace(s, split="calibration") for s in groups["nut"][8:]]
    write_list(tmp_path / "list.csv", groups)
    works("train", tmp_path / "list.csv", *PATCHCORE, "--out", tmp_path / "run")
    assert checkpoints.load(tmp_path / "run/checkpoint.pt").images["count"] == 8
    works("calibrate", tmp_path / "run", "--good", tmp_path / "list.csv", "--false-alarm-rate", 0.2, "--device", "cpu")
    assert checkpoints.load(tmp_path / "run/checkpoint.pt").calibration.count == 4
