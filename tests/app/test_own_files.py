"""Commands replace no file that they did not write."""

import pytest
from command_line import SMALL, fails, works

from recontrast.data.synthetic import make_demo


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
    ("demo", "results.json"), ("reproduce", "comparison.md"),
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
        "reproduce": ["mvtec", "--data", data, "--out", out],
    }[command]
    message = fails(command, *arguments)
    assert str(out / name) in message and "--overwrite" in message
    assert (out / name).read_text() == "mine" and len([p for p in out.rglob("*") if p.is_file()]) == 1


def test_own_files_are_replaced(run, data, tmp_path):
    for _ in range(2):
        works("evaluate", run, data / "brick", "--out", tmp_path, "--save-maps", "--device", "cpu")
        works("report", run, data / "brick", "--out", tmp_path / "page.html", "--device", "cpu")
    works("train", data, "--category", "brick", "--out", run, *SMALL, "--overwrite")
