"""Evaluations in which images, masks or maps fail: the metrics are those of the other images, and say so."""

import csv
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
from command_line import call, fails
from saved_model import RECIPE, save
from tiny import tiny_set

import recontrast
from recontrast.app import evaluate_job
from recontrast.data import datasets
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import METRICS
from recontrast.training.train import build_model

SMALL = RECIPE.replace(size=32)


@pytest.fixture(scope="module")
def model():
    return build_model(SMALL, "nut").eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)


@pytest.fixture
def data(tmp_path):
    tiny_set(tmp_path / "data", train=1, good=6, defects=6)
    return tmp_path / "data"


def damage(path, kind):
    """Damage a file that a data set lists."""
    content = path.read_bytes()
    path.unlink()
    if kind == "deleted":
        return
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to(path.parent / "none")
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"not an image"}[kind])


def read_tests(data):
    return [sample for sample in datasets.load(data)["nut"] if sample.split == "test"]


KINDS = ["deleted", "empty", "truncated", "text", "pipe", "link to nothing"]


MODES = ["streaming", "cached", "tiles"]


@pytest.mark.parametrize(
    "mode, kind", [*(("exact", kind) for kind in KINDS), *((mode, kind) for mode in MODES for kind in KINDS[::2])]
)
def test_metrics_are_those_of_the_other_images(model, data, tmp_path, mode, kind):
    samples = read_tests(data)
    failing = {2: samples[2].path, 8: samples[8].path, 10: samples[10].mask}
    for index in (2, 8):
        damage(samples[index].path, kind)
    damage(samples[10].mask, kind)
    recipe = SMALL.replace(size=32, tile=32) if mode == "tiles" else SMALL
    options = {"streaming": mode == "streaming", "batch": 4}
    options |= {"cache_dir": tmp_path / "cache"} if mode == "cached" else {}
    result = evaluate(model, samples, recipe, errors="keep", **options)
    rest = [sample for index, sample in enumerate(samples) if index not in failing]
    expected = evaluate(model, rest, recipe, **options)
    (row,), (expected_row,) = result.rows, expected.rows
    for name in METRICS:
        assert getattr(row, name) == getattr(expected_row, name), name
    assert row.p_auroc is not None and row.i_auroc is not None
    assert (row.images, row.defects, row.skipped) == (9, 4, 3)
    assert row.note.startswith("3 of 12 test images are missing, because they could not be read or scored")
    assert [image.path for image in result.scored] == [str(sample.path) for sample in samples]
    for index, image in enumerate(result.scored):
        assert (image.error is not None) is math.isnan(image.score) is (index in failing)
        if index in failing:
            assert str(failing[index]) in image.error and str(samples[index].path) in image.error
    assert len(result.errors) == 3 and result.mean.skipped == 3
    with pytest.raises((ValueError, OSError)):
        evaluate(model, samples, recipe, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_map_that_is_not_finite_is_missing(model, data, monkeypatch, streaming):
    samples = read_tests(data)
    from recontrast.evaluation import scorers as module

    infer = module.infer

    def spoil(*arguments, **options):
        seen = 0
        for maps, scores in infer(*arguments, **options):
            if seen <= 7 < seen + len(scores):
                maps, scores = maps.clone(), scores.clone()
                maps[7 - seen, 0, 0] = float("nan")
                scores[7 - seen] = float("nan")
            seen += len(scores)
            yield maps, scores

    monkeypatch.setattr(module, "infer", spoil)
    shown = []
    result = evaluate(
        model, samples, SMALL, errors="keep", batch=5, streaming=streaming,
        on_maps=lambda some, maps: shown.extend(zip(some, maps, strict=True)),
    )  # fmt: skip
    assert [sample.path for sample, _ in shown] == [s.path for i, s in enumerate(samples) if i != 7]
    assert all(np.isfinite(anomaly).all() for _, anomaly in shown)
    with pytest.raises(ValueError, match="wanted a finite anomaly map"):
        evaluate(model, samples, SMALL, batch=5, streaming=streaming)
    monkeypatch.undo()
    expected = evaluate(model, [s for i, s in enumerate(samples) if i != 7], SMALL, streaming=streaming)
    assert result.rows[0].aupro == expected.rows[0].aupro and result.rows[0].i_ap == expected.rows[0].i_ap
    assert result.errors == [
        f"{samples[7].path}: wanted a finite anomaly map, got NaN or infinite values: it has no score"
    ]


def test_category_whose_images_all_fail_stays_in_the_table(model, data):
    tiny_set(data, "bolt", train=1, good=2, defects=2)
    groups = datasets.load(data)
    for sample in groups["bolt"]:
        damage(sample.path, "text")
    result = evaluate(model, groups, SMALL, errors="keep")
    bolt, nut = sorted(result.rows, key=lambda row: row.category)
    assert (bolt.images, bolt.skipped, bolt.i_auroc, bolt.aupro) == (0, 4, None, None)
    assert nut.skipped == 0 and nut.i_auroc is not None
    assert "not over all categories" in result.mean.note and result.mean.note.startswith("4 of 16 test images")
    for sample in groups["nut"]:
        damage(sample.path, "text")
    with pytest.raises(ValueError, match=r"^none of 16 images could be scored: .*000\.png"):
        evaluate(model, groups, SMALL, errors="keep")


def test_invalid_rule_for_errors(model, data):
    with pytest.raises(ValueError, match="evaluate: errors: wanted 'raise' or 'keep', got 'drop'"):
        evaluate(model, read_tests(data), SMALL, errors="drop")


def list_errors(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return lines


def test_command_names_each_image_and_writes_the_rest(checkpoint, data, tmp_path):
    samples = read_tests(data)
    out = tmp_path / "out"
    assert call("evaluate", checkpoint, data, "--out", out, "--save-maps", "--device", "cpu").exit_code == 0
    first = read_scores(out)
    assert "error" not in first[0] and "skipped" not in (out / "results.csv").read_text()
    damage(samples[1].path, "truncated")
    damage(samples[9].mask, "text")
    result = call("evaluate", checkpoint, data, "--out", out, "--save-maps", "--device", "cpu")
    lines = list_errors(result)
    assert len(lines) == 2 and str(samples[1].path) in lines[0] and str(samples[9].mask) in lines[1]
    assert "2 of 12 test images are missing" in result.stdout and "results: " in result.stdout
    content = json.loads((out / "results.json").read_text())
    assert content["skipped"] == 2 and content["rows"][0]["skipped"] == 2 and content["rows"][0]["images"] == 10
    assert [f"recontrast: {text}" for text in content["errors"]] == lines
    (row, mean) = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert row["skipped"] == mean["skipped"] == "2" and row["images"] == "10"
    table = (out / "results.md").read_text()
    assert table.startswith("| category | images | skipped |") and "| nut | 10 | 2 |" in table
    rows = read_scores(out)
    assert [row["path"] for row in rows] == [row["path"] for row in first]
    for index, (row, before) in enumerate(zip(rows, first, strict=True)):
        assert bool(row["error"]) is (index in (1, 9)) and row["score"] == ("" if index in (1, 9) else before["score"])
    assert not (out / "maps/good/001.tiff").exists() and len(list((out / "maps").rglob("*.tiff"))) == 11
    assert not list(out.glob("unfinished-*"))
    assert call("evaluate", checkpoint, data, "--device", "cpu").exit_code == 2


def read_scores(out):
    return list(csv.DictReader((out / "scores.csv").read_text().splitlines()))


def test_many_failing_images_are_counted(checkpoint, data, tmp_path):
    tiny_set(data, train=1, good=30, defects=2)
    for sample in read_tests(data)[:25]:
        damage(sample.path, "text")
    out = tmp_path / "out"
    lines = list_errors(call("evaluate", checkpoint, data, "--out", out, "--device", "cpu"))
    assert len(lines) == 21 and lines[-1] == f"recontrast: and 5 more: see {out / 'scores.csv'}"


def test_no_image_can_be_read(checkpoint, data, tmp_path):
    for sample in read_tests(data):
        damage(sample.path, "empty")
    assert "none of 12 images could be scored" in fails("evaluate", checkpoint, data, "--device", "cpu")


def test_map_that_cannot_be_written_costs_no_metric(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    arguments = ("evaluate", checkpoint, data, "--out", out, "--device", "cpu")
    assert call(*arguments).exit_code == 0
    before = json.loads((out / "results.json").read_text())
    (out / "maps/good").mkdir(parents=True)
    os.symlink(out / "none/none", out / "maps/square")  # a folder that cannot be created
    lines = list_errors(call(*arguments, "--save-maps"))
    assert len(lines) == 6 and all("square" in line for line in lines)
    after = json.loads((out / "results.json").read_text())
    assert after["rows"][0]["aupro"] == before["rows"][0]["aupro"] and after["skipped"] == 0
    rows = read_scores(out)
    assert all(row["score"] for row in rows) and [bool(row["error"]) for row in rows] == [False] * 6 + [True] * 6
    assert len(list((out / "maps").rglob("*.tiff"))) == 6


def test_picture_that_is_deleted_after_it_was_scored(checkpoint, data, tmp_path, monkeypatch):
    """The good images are read again for their appearance."""
    calibrated = tmp_path / "checkpoint.pt"
    shutil.copy(checkpoint, calibrated)
    tiny_set(tmp_path / "more", train=1, good=9, defects=0, seed=5)
    arguments = ("--good", tmp_path / "more/nut/test/good", "--false-alarm-rate", "0.1", "--device", "cpu")
    assert call("calibrate", calibrated, *arguments).exit_code == 0
    decide, victim = evaluate_job.decide_on_result, data / "nut/test/good/003.png"

    def delete_then_decide(*values, **options):
        victim.unlink()
        return decide(*values, **options)

    monkeypatch.setattr(evaluate_job, "decide_on_result", delete_then_decide)
    result = call("evaluate", calibrated, data, "--out", tmp_path / "out", "--device", "cpu")
    lines = [line for line in list_errors(result) if "warning" not in line]
    assert len(lines) == 1 and str(victim) in lines[0]
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["decided"]["good"] == 6 and content["skipped"] == 0 and len(content["errors"]) == 1


def test_function_raises_or_keeps(checkpoint, data):
    path = read_tests(data)[4].path
    damage(path, "text")
    with pytest.raises(ValueError, match=r"004\.png"):
        recontrast.evaluate(checkpoint, data, device="cpu")
    result = recontrast.evaluate(checkpoint, data, device="cpu", errors="keep")
    assert result.rows[0].skipped == 1 and str(path) in result.errors[0]
    assert dataclasses.replace(result, scored=[]).errors == []


def test_training_is_kept_if_a_test_image_fails(data, tmp_path):
    damage(read_tests(data)[0].path, "text")
    tiny_set(data, train=6, good=0, defects=0, seed=9)
    options = ["--backbone", "test_resnet", "--weights", "random", "--size", "32", "--batch", "2", "--steps", "1"]
    result = call("train", data, "--out", tmp_path / "run", *options, "--device", "cpu")
    assert len(list_errors(result)) == 1 and (tmp_path / "run/checkpoint.pt").exists()
    assert json.loads((tmp_path / "run/results.json").read_text())["skipped"] == 1


@pytest.mark.parametrize("kind", ["mask", "image", "good image"])
def test_deleted_file_is_named_and_missing(checkpoint, data, tmp_path, kind):
    samples = read_tests(data)
    victim = {"mask": samples[8].mask, "image": samples[8].path, "good image": samples[1].path}[kind]
    victim.unlink()
    result = call("evaluate", checkpoint, data, "--out", tmp_path / "out", "--device", "cpu")
    if kind == "good image":  # nothing says that there was one
        assert result.exit_code == 0, result.output
        return
    (line,) = list_errors(result)
    assert str(victim) in line
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["skipped"] == 1 and content["rows"][0]["images"] == 11 and content["rows"][0]["aupro"] is not None
    with pytest.raises(ValueError, match=r"wanted (its mask|an image in)"):
        recontrast.evaluate(checkpoint, data, device="cpu")
    kept = recontrast.evaluate(checkpoint, data, device="cpu", errors="keep")
    assert kept.rows[0].skipped == 1 and kept.rows[0].aupro == content["rows"][0]["aupro"]


def test_masks_that_all_have_other_names_are_refused(checkpoint, data):
    for mask in (data / "nut/ground_truth/square").iterdir():
        mask.rename(mask.with_name(f"other_{mask.name}"))
    assert "wanted its mask" in fails("evaluate", checkpoint, data, "--device", "cpu")
