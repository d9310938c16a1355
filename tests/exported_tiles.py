"""Detectors of tiles exported in every format, beside the checkpoint that they must equal."""

import csv

import numpy as np
import pytest
from command_line import works
from PIL import Image
from saved_model import save
from traced_once import traced_once

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import digest
from recontrast.export.export import export

KINDS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}


def write_photographs(folder, sizes):
    """Write an image of noise for each size (height, width), with more noise in each one."""
    random = np.random.default_rng(0)
    for index, (height, width) in enumerate(sizes):
        pixels = 120 + random.normal(0, 10 + 40 * index, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def export_all(folder, recipe, photographs, compared=()):
    """Write a checkpoint, whose threshold lies between the scores of five photographs, and its file in each format.

    The scores are compared on eight drawn images, and on those of ``compared``.
    """
    checkpoint = save(folder / "checkpoint.pt", recipe)
    stored = checkpoints.load(checkpoint)
    measured = sorted(recontrast.load(checkpoint, device="cpu").predict(photographs).scores)
    middle = (measured[2] + measured[3]) / 2
    scores = tuple(float(np.float32(s)) for s in np.linspace(middle - 1, middle + 1, 39))
    calibration = Calibration(scores, 0.5, scores[-20], None, 0.01, False, "drawn", digest(stored.model, stored.recipe))
    checkpoints.write_calibration(checkpoint, calibration)
    with traced_once():
        for kind, suffix in KINDS.items():
            result = export(checkpoint, kind, folder / f"tiles{suffix}", images=list(compared))
            assert result.difference < 1e-4 and result.images == 8 + len(compared)
            assert result.outputs == ("map", "score")
    return folder


def predict(file, photographs, out, *options):
    """Return the rows of ``recontrast predict`` and the maps by name."""
    works("predict", file, photographs, "--out", out, "--maps", "npy", "--device", "cpu", "--no-overlays", *options)
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    return rows, {path.name: np.load(path) for path in (out / "maps").iterdir()}


def compare(got, wanted):
    """Compare two results of `predict` for five photographs: also where a region of interest makes a map 0."""
    for row, expected in zip(got[0], wanted[0], strict=True):
        assert float(row.pop("score")) == pytest.approx(float(expected["score"]), rel=1e-4)
        assert row == {name: value for name, value in expected.items() if name != "score"}
    assert got[1].keys() == wanted[1].keys() and len(wanted[1]) == 5
    for name, anomaly in wanted[1].items():
        np.testing.assert_allclose(got[1][name], anomaly, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got[1][name] == 0, anomaly == 0)
