import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from command_line import SMALL, call, fails, works
from PIL import Image

import recontrast
from recontrast.app.cli import app
from recontrast.data.synthetic import make_demo

RESULTS = ["results.csv", "results.json", "results.md", "scores.csv"]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


@contextmanager
def file_size_limit(size):
    """As on a full disk: the system refuses to let a file grow beyond ``size`` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("data"), train=4, test=4, size=64)


@pytest.fixture
def brick(data, tmp_path):
    """A category that a test may spoil."""
    return shutil.copytree(data / "brick", tmp_path / "data" / "brick")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "brick"
    return out, works("train", data, "--category", "brick", "--out", out, *SMALL)


# ---- what works --------------------------------------------------------------


def test_train_evaluates_where_there_are_test_images(run):
    out, said = run
    assert files(out) == ["checkpoint.pt", "log.jsonl", "recipe.yaml", *RESULTS]
    assert "2 steps in" in said and "I-AUROC" in said and "AUPRO" in said
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["category"] == "brick" and row["images"] == 8 and row["defects"] == 4 and 0 <= row["i_auroc"] <= 1


def test_evaluate_finds_the_same(run, data, tmp_path):
    out, _ = run
    said = works("evaluate", out, data, "--category", "brick", "--out", tmp_path, "--save-maps", "--device", "cpu")
    assert "brick" in said
    again, before = (json.loads((folder / "results.json").read_text())["rows"][0] for folder in (tmp_path, out))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}
    written = files(tmp_path)
    assert "maps/hole/000.tiff" in written and "maps/good/003.tiff" in written and len(written) == 3 + 2 + 8


def test_predict(run, data, tmp_path):
    said = works("predict", run[0] / "checkpoint.pt", data / "brick" / "test", "--out", tmp_path, "--threshold", "0")
    assert "8 images scored, 8 flagged at 0" in said
    assert len(files(tmp_path / "overlays")) == 8 and not (tmp_path / "maps").exists()


def test_predict_odd_images(run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (70, 50), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "pixel.png")
    Image.new("RGBA", (90, 3), (9, 8, 7, 0)).save(tmp_path / "flat.png")
    works("predict", run[0], tmp_path, "--out", tmp_path / "out", "--maps", "tiff16", "--device", "cpu")
    assert len(files(tmp_path / "out")) == 2 + 2 * 3
    with Image.open(tmp_path / "out" / "overlays" / "pixel.png") as overlay:
        assert overlay.size == (1, 1)


def test_one_bad_file_among_many(run, data, tmp_path):
    shutil.copytree(data / "brick" / "test" / "good", tmp_path / "in")
    (tmp_path / "in" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    message = fails("predict", run[0], tmp_path / "in", "--out", tmp_path / "out", "--device", "cpu")
    assert str(tmp_path / "in" / "001.png") in message and "wanted" in message and "got" in message
    assert files(tmp_path / "out" / "overlays") == ["000.png", "002.png", "003.png"]


def test_train_all_on_one_category_folder_and_plain_folder(data, tmp_path):
    said = works("train", data, "--category", "all", "--out", tmp_path / "all", *SMALL)
    assert all(name in said for name in ("brick", "grass", "gravel", "mean"))
    works("train", data / "grass", "--out", tmp_path / "grass", "--no-evaluate", *SMALL)
    assert files(tmp_path / "grass") == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]
    works("train", data / "grass" / "train" / "good", "--out", tmp_path / "plain", *SMALL)
    assert files(tmp_path / "plain") == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]


def test_several_data(data, tmp_path):
    """One detector for the categories of several paths; two of one name are refused."""
    both = [data / "grass", data / "brick"]
    said = works("train", *both, "--category", "all", "--out", tmp_path / "both", *SMALL)
    assert all(name in said for name in ("brick", "grass", "mean")) and "gravel" not in said
    said = works("evaluate", tmp_path / "both", *both, "--device", "cpu")
    assert all(name in said for name in ("brick", "grass", "mean"))
    message = train_fails(data, tmp_path, data / "grass", "--category", "all")
    assert f"{data / 'grass'}: wanted categories with different names, got 'grass' again, as in {data}" in message
    message = fails("evaluate", tmp_path / "both", data, data, "--out", tmp_path / "out")
    assert f"{data}: wanted categories with different names, got 'brick' again, as in {data}" in message
    assert not files(tmp_path / "out")


def test_resume_takes_recipe_category_and_folder_from_the_checkpoint(data, tmp_path):
    arguments = ["train", data, "--category", "grass", "--out", tmp_path, "--no-evaluate", *SMALL]
    works(*arguments, "--set", "checkpoint_every=1", "--set", "encoder_lr=1e-4")
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert before["recipe"]["encoder_lr"] == 1e-4 and before["step"] == 2
    assert "2 steps in 0.0 s" in works("train", data, "--resume", tmp_path, "--no-evaluate", "--device", "cpu")


def test_ctrl_c_says_where_the_checkpoint_is(data, tmp_path, monkeypatch):
    from recontrast.training import trainer

    real, calls = trainer.train_step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", step)
    arguments = ["train", data, "--category", "brick", *SMALL, "--steps", "9"]
    message = fails(*arguments, "--out", tmp_path / "a", "--set", "checkpoint_every=2", status=130)
    assert message.endswith(f"continue with: recontrast train {data} --resume {tmp_path / 'a' / 'checkpoint.pt'}")
    calls[:] = [1, 1]
    assert "no checkpoint yet" in fails(*arguments, "--out", tmp_path / "b", status=130)


def test_info():
    said = works("info")
    for word in ("recontrast", "python", "torch", "timm", "triton", "numpy", "threads", "kernels cpu", "kernels cuda"):
        assert f"\n{word} " in f"\n{said}"


def test_version_and_help():
    assert works("--version") == f"recontrast {recontrast.__version__}\n"
    for command in ("train", "reproduce", "evaluate", "predict", "demo", "info"):
        assert command in works("--help") and "--help" in works(command, "--help")


@pytest.mark.parametrize("command", [found.name or found.callback.__name__ for found in app.registered_commands])
def test_help_names_every_option_in_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = works(command, "--help")
    assert "…" not in said and max(map(len, said.splitlines())) <= 80


def test_module_runs_and_help_is_quick():
    code = "import sys; from recontrast.app import cli; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    found = subprocess.run([sys.executable, "-m", "recontrast", "--version"], capture_output=True, text=True)
    assert found.stdout == f"recontrast {recontrast.__version__}\n" and not found.stderr


# ---- what does not: one sentence, status 2, nothing half-written -----------------


def test_usage_errors():
    assert call("train").exit_code == 2
    assert call("bake").exit_code == 2
    assert call("predict", "a", "b").exit_code == 2  # no --out


def train_fails(data, tmp_path, *more, wrote=()):
    message = fails("train", data, "--out", tmp_path / "out", *SMALL, *more)
    assert files(tmp_path / "out") == list(wrote)
    return message


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--category", "brik"], "wanted category 'brik', got brick, grass, gravel"),
        ([], "choose one with --category, or all of them with --category all (brick, grass, gravel)"),
        (["--recipe", "mvtek"], "recipe: wanted one of mvtec, visa, "),
        (
            ["--category", "all", "--size", "16"],
            "--size: wanted a multiple of 32 px of at least 32 (the network's stride), got 16",
        ),
        (["--category", "all", "--size", "100"], "--size: wanted a multiple of 32 px of at least 32"),
        (["--category", "all", "--tile", "16"], "--tile: wanted a multiple of 32 px of at least 32 (the network's"),
        (["--category", "all", "--tile", "100"], "stride), got 100"),
        (["--category", "all", "--set", "crop=40"], "crop: wanted a multiple of 32 px"),
        (
            ["--category", "all", "--set", "size=(64,70)"],
            "--size: wanted a multiple of 32 px of at least 32 (the network's stride), got 64 x 70",
        ),
        (["--category", "all", "--holdout", "0.001"], "got 0 of 12 good images held out (holdout 0.001)"),
        (["--category", "all", "--backbone", "resnet19"], "resnet19"),
        (["--category", "all", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--category", "all", "--encoder-bn", "on"], "encoder_bn: wanted one of 'auto', 'train', 'eval', got 'on'"),
        (["--category", "all", "--set", "steps"], "--set: wanted KEY=VALUE, got 'steps'"),
        (["--category", "all", "--set", "stepz=3"], "there is no field 'stepz' (did you mean steps?)"),
        (["--category", "all", "--set", "blur=heavy"], "blur: wanted one of 'reflect', 'zero5', None, got 'heavy'"),
        (["--category", "all", "--device", "tpu9"], "'tpu9'"),
        (["--category", "all", "--teacher-cache", "-1"], "--teacher-cache: wanted GiB of at least 0, got -1"),
        (["--category", "all", "--set", "loss=point"], "mining: wanted false if loss is 'point', got true"),
        (["--category", "all", "--resume", "nowhere.pt"], "nowhere.pt: wanted a checkpoint file, got no such file"),
    ],
)
def test_wrong_arguments_of_train(data, tmp_path, more, wanted):
    assert wanted in train_fails(data, tmp_path, *more)


def test_wrong_path(tmp_path):
    assert f"{tmp_path / 'nowhere'}: wanted" in train_fails(tmp_path / "nowhere", tmp_path)


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: wanted a folder with image files" in train_fails(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", None], ids=["empty", "text", "truncated"])
def test_unreadable_image(brick, tmp_path, content):
    path = brick / "train" / "good" / "002.png"
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    message = train_fails(brick, tmp_path)
    assert str(path) in message and "wanted" in message and "got" in message


def test_mask_without_image(brick, tmp_path):
    (brick / "test" / "hole" / "000.png").rename(brick / "test" / "hole" / "009.png")
    message = train_fails(brick, tmp_path)
    assert "hole" in message and "mask" in message and "wanted" in message


def test_mask_of_another_size(run, brick, tmp_path):
    path = brick / "ground_truth" / "hole" / "000_mask.png"
    Image.new("L", (64, 60), 255).save(path)
    message = fails("evaluate", run[0], brick, "--out", tmp_path / "out", "--device", "cpu")
    assert (
        f"{path}: wanted a mask of the size of its image" in message and "64 x 64" in message and "60 x 64" in message
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())  # of all other images
    assert results["skipped"] == 1


def test_loss_is_not_a_number(data, tmp_path):
    arguments = ("--category", "brick", "--steps", "20", "--set", "decoder_lr=1e30", "--set", "log_every=5")
    message = train_fails(data, tmp_path, *arguments, wrote=["log.jsonl", "recipe.yaml"])
    assert "nan" in message and "step" in message and "lower decoder_lr" in message


def test_weights_of_another_architecture(data, tmp_path):
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    message = train_fails(data, tmp_path, "--category", "brick", "--weights", tmp_path / "other.pth")
    assert str(tmp_path / "other.pth") in message and "test_resnet" in message


def test_former_run_is_not_overwritten(run, data):
    before = (run[0] / "checkpoint.pt").stat().st_mtime_ns
    message = fails("train", data, "--category", "brick", "--out", run[0], *SMALL)
    assert "exists already" in message and (run[0] / "checkpoint.pt").stat().st_mtime_ns == before


def test_disk_full_at_the_checkpoint(data, tmp_path):
    with file_size_limit(1_000_000):
        message = train_fails(data, tmp_path, "--category", "brick", wrote=["log.jsonl", "recipe.yaml"])
    assert str(tmp_path / "out" / "checkpoint.pt") in message and "bytes" in message


def test_disk_full_at_a_map(run, data, tmp_path):
    Image.new("L", (900, 900)).save(tmp_path / "large.png")
    options = ["--out", tmp_path / "out", "--maps", "tiff32", "--device", "cpu", "--no-overlays"]
    with file_size_limit(4_000):
        message = fails("predict", run[0], tmp_path / "large.png", *options)
    assert f"cannot write {tmp_path / 'out' / 'maps' / 'large.tiff'}: File too large" in message
    assert files(tmp_path / "out") == ["scores.csv", "scores.json"]  # the score is not lost


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_bad_checkpoints(run, data, tmp_path, command):
    def message(path):
        return fails(command, path, data / "brick", "--out", tmp_path / "out")

    content = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    torch.save({**content, "recontrast_checkpoint": 99}, tmp_path / "later.pt")
    assert f"{tmp_path / 'later.pt'}: wanted a checkpoint of format 1, got format 99" in message(tmp_path / "later.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert f"{tmp_path / 'text.pt'}: wanted a recontrast checkpoint" in message(tmp_path / "text.pt")
    (tmp_path / "cut.pt").write_bytes((run[0] / "checkpoint.pt").read_bytes()[:5000])
    assert f"{tmp_path / 'cut.pt'}: the checkpoint is cut off or damaged" in message(tmp_path / "cut.pt")
    assert f"{tmp_path / 'checkpoint.pt'}: wanted a checkpoint file, got no such file" in message(tmp_path)
    assert not files(tmp_path / "out")


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--maps", "gif"], "--maps: wanted one of tiff16, tiff32, npy, none, got 'gif'"),
        (["--batch", "0"], "batch: wanted at least 1 image, got 0"),
        (["--threshold", "nan"], "--threshold: wanted a finite number, got nan"),
        (["--threshold", "-inf"], "--threshold: wanted a finite number, got -inf"),
        (["--engine", "ray", "--threshold", "inf"], "--threshold: wanted a finite number, got inf"),
        (["--device", "tpu9"], "'tpu9'"),
    ],
)
def test_wrong_arguments_of_predict(run, data, tmp_path, more, wanted):
    assert wanted in fails("predict", run[0], data / "brick", "--out", tmp_path / "out", *more)
    assert not files(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("list.txt", "wanted images, folders or lists (.csv, .jsonl, .parquet), got a .txt: it needs --engine ray"),
        ("list.PARQUET", "wanted a Parquet file, got a file of another kind or a damaged one"),
    ],
)
def test_lists_that_cannot_be_read(run, tmp_path, name, wanted):
    (tmp_path / name).write_text("a.png")
    message = fails("predict", run[0], tmp_path / name, "--out", tmp_path / "out")
    assert message.endswith(f"{name}: {wanted}")
    assert not (tmp_path / "out").exists()


def test_nothing_is_said_to_be_held_out_where_nothing_can_be(data, tmp_path):
    result = call("train", data, "--category", "brick", "--out", tmp_path / "out", *SMALL, "--holdout", "0.001")
    assert result.exit_code == 2 and not result.stdout and "wanted at least 1 image held out" in result.stderr


def test_out_is_a_file(run, data, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in fails("predict", run[0], data / "brick", "--out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_save_maps_needs_a_folder(run, data):
    assert "--out DIR" in fails("evaluate", run[0], data, "--save-maps")


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("RECONTRAST_DEBUG", "1")
    assert isinstance(call("train", tmp_path / "nowhere").exception, FileNotFoundError)


def test_errors_of_ours_are_not_hidden(monkeypatch):
    from recontrast.app import environment

    monkeypatch.setattr(environment, "describe_environment", lambda: {}["missing"])
    assert isinstance(call("info").exception, KeyError)


def test_piped_output_ends_quietly():
    if not os.path.exists("/bin/sh"):
        pytest.skip("needs a shell")
    command = f"{sys.executable} -m recontrast train --help | head -n 2"
    found = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert "recontrast train" in found.stdout and not found.stderr
