import os
import sys
from dataclasses import replace

import pytest
from small_run import RECIPE
from tiny import tiny_set

from recontrast.training.tensorboard import TensorBoardLogger
from recontrast.training.train import build_model, train

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read_events(folder):
    return accumulator.EventAccumulator(str(folder)).Reload()


def test_scalars_and_images_of_a_resumed_run(tmp_path):
    samples = tiny_set(tmp_path / "data", train=5, good=2, defects=2)
    recipe, lines = RECIPE.replace(steps=4, log_every=1, checkpoint_every=2), []
    logger = TensorBoardLogger(tmp_path / "events")

    def log_and_fail(*line):
        logger.log(*line)
        if line[0] == 3:
            raise KeyError  # after the checkpoint of step 2

    with pytest.raises(KeyError):
        train(recipe, samples, out=tmp_path / "out", device="cpu", on_log=log_and_fail)
    logger.close()
    resumed_logger = TensorBoardLogger(tmp_path / "events", keep=2)

    def log_and_record(*line):
        resumed_logger.log(*line)
        lines.append(line)

    result = train(
        recipe,
        samples,
        out=tmp_path / "out",
        resume=tmp_path / "out" / "checkpoint.pt",
        device="cpu",
        on_log=log_and_record,
    )
    resumed_logger.images(4, result.model, samples, recipe, count=3)
    resumed_logger.close()
    events = read_events(tmp_path / "events")
    assert [s.step for s in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [s.value for s in events.Scalars("train/loss")][2:] == pytest.approx([line[1] for line in lines])
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/images per second", "train/alpha"}
    assert events.Tags()["images"] == ["nut/test/good/000", "nut/test/square/000", "nut/test/good/001"]
    (image,) = events.Images("nut/test/square/000")
    assert (image.step, image.height, image.width) == (4, 32, 64)
    assert not result.model.training


def test_training_images_are_logged_without_test_images(tmp_path):
    samples = tiny_set(tmp_path / "data", train=2, good=0, defects=0)
    logger = TensorBoardLogger(tmp_path / "events")
    logger.images(0, build_model(RECIPE, "nut"), samples, RECIPE)
    logger.close()
    assert read_events(tmp_path / "events").Tags()["images"] == ["nut/train/good/000", "nut/train/good/001"]


def test_names_that_are_not_utf8(tmp_path):
    """TensorBoard takes only UTF-8, in tags and in the path of its folder."""
    raw = os.fsdecode(b"\xff\xe4")
    samples = [
        replace(
            sample, path=sample.path.rename(sample.path.with_stem(f"{sample.path.stem}{raw}")), category=f"nut{raw}"
        )
        for sample in tiny_set(tmp_path / "data", train=1, good=0, defects=0)
    ]
    folder = tmp_path / f"run{raw}" / "events"
    logger = TensorBoardLogger(folder)
    logger.log(1, 0.5, 2.0, 0.0)
    logger.images(1, build_model(RECIPE, "nut"), samples, RECIPE)
    logger.close()
    folder = folder.rename(tmp_path / "events")
    assert read_events(folder).Tags()["images"] == [r"nut\xff\xe4/train/good/000\xff\xe4"]
    assert "train/loss" in read_events(folder).Tags()["scalars"]


def test_missing_package_raises(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ImportError, match="wanted the package tensorboard, got none installed: pip install tensorboard"
    ):
        TensorBoardLogger(tmp_path / "events")
    assert not (tmp_path / "events").exists()
