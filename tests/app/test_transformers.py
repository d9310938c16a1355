"""Detectors on a vision transformer through the command line."""

import csv
import json

import pytest
from command_line import fails, works
from tiny import tiny_set

from recontrast.inference.detector import open_detector

OPTIONS = ("--backbone", "test_vit", "--weights", "random", "--batch", "4", "--steps", "3", "--no-evaluate")


def test_train_with_cache_and_calibration_then_predict(tmp_path):
    tiny_set(tmp_path)
    good, run = tmp_path / "nut/train/good", tmp_path / "run"
    works("train", good, "--size", "64", *OPTIONS, "--set", "layers=[[1,2],[4]]", "--teacher-cache", "1",
          "--holdout", "0.3", "--out", run)  # fmt: skip
    works("predict", run, tmp_path / "nut/test/square", "--out", tmp_path / "scores", "--no-overlays")
    rows = list(csv.DictReader((tmp_path / "scores/scores.csv").read_text().splitlines()))
    assert len(rows) == 3 and all(float(row["score"]) > 0 and row["p_value"] for row in rows)


def test_tiles_in_bfloat16(tmp_path):
    tiny_set(tmp_path, train=4)
    works("train", tmp_path / "nut/train/good", "--tile", "32", *OPTIONS, "--precision", "bfloat16",
          "--out", tmp_path / "run")  # fmt: skip
    works("predict", tmp_path / "run", tmp_path / "nut/test/good", "--out", tmp_path / "scores", "--no-overlays")
    assert len((tmp_path / "scores/scores.csv").read_text().splitlines()) == 4


def test_evaluate_and_compare(tmp_path):
    """Dinomaly beside PatchCore on one transformer: the metrics of `compare` are those of `evaluate`."""
    tiny_set(tmp_path, train=6)
    options = ("--backbone", "test_vit", "--weights", "random", "--size", "64", "--batch", "4", "--steps", "2")
    out = tmp_path / "compare"
    printed = works("compare", tmp_path / "nut", "--methods", "dinomaly,patchcore", "--shots", "4",
                    "--augment", "flips", *options, "--holdout", "0", "--out", out)  # fmt: skip
    assert "few shots: 4 good images" in printed
    found = json.loads((out / "compare.json").read_text())["methods"][0]["metrics"]
    works("evaluate", out / "dinomaly", tmp_path, "--out", tmp_path / "tables", "--device", "cpu", "--batch", "4")
    (row,) = json.loads((tmp_path / "tables/results.json").read_text())["rows"]
    assert found and all(row[name] == pytest.approx(value, rel=1e-6) for name, value in found.items())
    recipe = open_detector(out / "patchcore/checkpoint.pt", "cpu").recipe
    assert (recipe.shots, recipe.augment) == (4, "flips")


def test_wrong_sizes_and_layers_are_one_sentence(tmp_path):
    tiny_set(tmp_path, train=4)
    good = tmp_path / "nut/train/good"
    for wrong, message in (
        (("--size", "72"), "wanted a multiple of 16 px"),
        (("--size", "64", "--set", "layers=[[1],[9]]"), "wanted blocks 0 to 5 of 'test_vit', got 9"),
        (("--size", "64", "--set", "layers=[[2],[1]]"), "layers: wanted none or groups of blocks"),
    ):
        assert message in " ".join(fails("train", good, *OPTIONS, *wrong, "--out", tmp_path / "run").split())
    assert not (tmp_path / "run").exists()
