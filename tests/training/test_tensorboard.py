import sys

import pytest
from small_run import RECIPE
from tiny import tiny_set

from recontrast.training.tensorboard import TensorBoardLogger
from recontrast.training.train import build_model, train

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def events(folder):
    found = accumulator.EventAccumulator(str(folder))
    return found.Reload()


def test_scalars_of_a_run_and_of_its_resumption(tmp_path):
    samples = tiny_set(tmp_path / "data", train=5, good=2, defects=2)
    recipe, lines = RECIPE.replace(steps=4, log_every=1, checkpoint_every=2), []
    board = TensorBoardLogger(tmp_path / "board")

    def note(*line):
        board.log(*line)
        if line[0] == 3:
            raise KeyError  # broken off after the checkpoint of step 2

    with pytest.raises(KeyError):
        train(recipe, samples, out=tmp_path / "out", device="cpu", on_log=note)
    board.close()
    again = TensorBoardLogger(tmp_path / "board", keep=2)

    def both(*line):
        again.log(*line)
        lines.append(line)

    result = train(
        recipe, samples, out=tmp_path / "out", resume=tmp_path / "out" / "checkpoint.pt", device="cpu", on_log=both
    )
    again.images(4, result.model, samples, recipe, count=3)
    again.close()
    found = events(tmp_path / "board")
    assert [s.step for s in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [s.value for s in found.Scalars("train/loss")][2:] == pytest.approx([line[1] for line in lines])
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/images per second", "train/alpha"}
    assert found.Tags()["images"] == ["nut/test/good/000", "nut/test/square/000", "nut/test/good/001"]
    (image,) = found.Images("nut/test/square/000")
    assert (image.step, image.height, image.width) == (4, 32, 64)
    assert not result.model.training


def test_images_of_a_set_without_test_images(tmp_path):
    samples = tiny_set(tmp_path / "data", train=2, good=0, defects=0)
    board = TensorBoardLogger(tmp_path / "board")
    board.images(0, build_model(RECIPE, "nut"), samples, RECIPE)
    board.close()
    assert events(tmp_path / "board").Tags()["images"] == ["nut/train/good/000", "nut/train/good/001"]


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"wanted the package, which is not installed: pip install 'recontrast\["):
        TensorBoardLogger(tmp_path / "board")
    assert not (tmp_path / "board").exists()
