"""Flipped bits and truncations of every kind of file that is read: refused in one sentence, or read as before."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import export_onnx, export_openvino, export_pt2, save_checkpoint

from recontrast import checkpoint as checkpoints
from recontrast.app.errors import describe_error
from recontrast.app.prediction import journal, parquet_parts
from recontrast.app.prediction.output_files import Prediction
from recontrast.data.cache import ImageCache
from recontrast.inference.decisions import Decision, Region
from recontrast.inference.detector import open_detector
from recontrast.models.weights import read_weights
from recontrast.recipes.recipe import Recipe
from recontrast.recipes.yaml_file import read_recipe, write_recipe
from recontrast.training.json_log import read_log

SELECTION, WHOLE = 15, 1000  # trials
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*")]


def score(path):
    """Scores of two images, as Python numbers."""
    detector = open_detector(path, "cpu")
    return [prediction.score for prediction in detector.predict(list(IMAGES))]


def damage(content, random):
    """Flip one bit, or cut the end off; return the bytes and a description."""
    if random.random() < 0.2:
        length = int(random.integers(len(content)))
        return content[:length], f"cut to {length} bytes"
    position, bit = int(random.integers(len(content))), int(random.integers(8))
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed), f"bit {bit} of byte {position} flipped"


def try_damages(campaign, path, read, *, is_equal=None, named=None):
    """Damage a file and read it, again and again.

    Args:
        campaign: Counter of the trials.
        path: File to damage; it is whole again at the end.
        read: Function that reads the file, or the file that belongs to it.
        is_equal: Function that compares a result with that of the whole file; None if every result is right that
            needs no traceback, for files of text without checksums.
        named: Name that the error message must hold. Default: the name of the file.
    """
    whole = path.read_bytes()
    expected = read(path)
    seed = campaign.tries(SELECTION, WHOLE)
    random = np.random.default_rng(seed)
    for trial in range(seed):
        content, description = damage(whole, random)
        path.write_bytes(content)
        about = f"{path.name}: {description} (trial {trial} of seed {seed})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = read(path)
        except (ValueError, OSError) as error:
            message = describe_error(error)
            if (named or path.name) not in message or len(message) > 1000:
                campaign.failed(f"{about}: message {message!r}")
                continue
        except Exception as error:
            campaign.failed(f"{about}: {type(error).__name__}: {error}")
            continue
        else:
            if is_equal is not None and not is_equal(result, expected):
                campaign.failed(f"{about}: another result")
                continue
        campaign.passed()
    path.write_bytes(whole)


def equal(a, b):
    """Whether two nested structures of tensors and plain values are equal."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_checkpoint_for_prediction(campaign, tmp_path):
    try_damages(campaign, save_checkpoint(tmp_path / "checkpoint.pt"), score, is_equal=equal)


def test_checkpoint_for_resuming(campaign, tmp_path):
    path = save_checkpoint(tmp_path / "checkpoint.pt")
    try_damages(campaign, path, lambda path: copy.copy(vars(checkpoints.load(path))), is_equal=equal)


def test_checkpoint_of_an_older_version(campaign, tmp_path):
    """Files without checksums of their tensors are protected by the archive."""
    path = save_checkpoint(tmp_path / "checkpoint.pt")
    content = torch.load(path, weights_only=True)
    del content["checksums"]
    torch.save(content, path)
    try_damages(campaign, path, score, is_equal=equal)


def test_onnx(campaign, tmp_path):
    try_damages(campaign, export_onnx(tmp_path / "d.onnx"), score, is_equal=equal)


def test_pt2(campaign, tmp_path):
    try_damages(campaign, export_pt2(tmp_path / "d.pt2"), score, is_equal=equal)


def test_openvino_network(campaign, tmp_path):
    try_damages(campaign, export_openvino(tmp_path / "d.xml"), score, is_equal=equal)


def test_openvino_weights(campaign, tmp_path):
    path = export_openvino(tmp_path / "d.xml")
    try_damages(campaign, path.with_suffix(".bin"), lambda _: score(path), is_equal=equal)


def test_weights_of_a_backbone(campaign, tmp_path):
    torch.save({"weight": torch.randn(30, 20), "bias": torch.randn(30)}, tmp_path / "w.pth")
    try_damages(campaign, tmp_path / "w.pth", read_weights, is_equal=equal)


def test_decoded_images(campaign, tmp_path):
    """A damaged cache file is built again."""
    for index, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    paths = sorted(tmp_path.glob("*.png"))
    cache = ImageCache(paths, 16, directory=tmp_path / "cache")
    try_damages(
        campaign,
        cache.path,
        lambda _: ImageCache(paths, 16, directory=tmp_path / "cache")[:].tolist(),
        is_equal=equal,
    )


def test_recipe(campaign, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", Recipe(weights="wéights.pth", size=(64, 32)))
    try_damages(campaign, path, read_recipe)


def test_log(campaign, tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 1 / step, "alpha": -3.0, "images_per_second": None} for step in range(1, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def keeps_whole_lines(result, expected):
        return len(result) >= len(Path(path).read_bytes().split(b"\n")) - 3

    try_damages(campaign, path, read_log, is_equal=keeps_whole_lines)


def test_part_of_predictions(campaign, tmp_path):
    paths = tuple(f"/images/{index}.png" for index in range(20))
    rows = [{"path": path, "score": index / 7, "decision": "good"} for index, path in enumerate(paths)]
    part = parquet_parts.Part("part-a.parquet", paths)
    parquet_parts.write_part(tmp_path, part, rows, {"identity": "a", "worker": "host:1"})

    def read(path):
        names = ["path", "score", "decision", "flagged", "error"]
        parquet_parts._read_finished(path.parent, "a")
        return parquet_parts._read_columns(path, names)

    try_damages(campaign, tmp_path / part.name, read, is_equal=equal, named=str(tmp_path))


@pytest.mark.parametrize("name", [journal.LINES, journal.MAPS])
def test_journal_of_a_prediction(campaign, tmp_path, name):
    """Scores and maps that differ from their checksums are computed again."""
    maps = np.random.default_rng(0).normal(size=(10, 6, 7)).astype(np.float32)
    lines = journal.Journal(tmp_path, {"a": 1}, True)
    for index, anomaly in enumerate(maps):
        decision = Decision(index / 7, True, (Region(1, 2, 3, 4, 5, 0.1, 7, 8),))
        lines.append(Prediction(f"/{index}.png", index / 3, None, None, f"{index}.png", decision), anomaly)
    lines.close()

    def read(path):
        opened = journal.Journal(tmp_path, {"a": 1}, True)
        return [(entry.prediction, opened.load_map(entry).tolist()) for entry in opened.entries.values()]

    def is_part(result, expected):
        return all(entry in expected for entry in result) and len(expected) == len(maps)

    try_damages(campaign, tmp_path / name, read, is_equal=is_part)
