"""recontrast.data.unfinished: results of a command that has not finished are marked."""

import json
import os
import re

import pytest
from command_line import fails, works
from report_run import make_run

from recontrast.data.atomic import replace_files
from recontrast.data.unfinished import check_finished, list_unfinished, mark_unfinished, name_mark, remove_files


def test_mark_replaces_the_tables_of_the_earlier_run(tmp_path):
    (tmp_path / "scores.csv").write_text("old")
    check_finished(tmp_path, "predict")
    mark_unfinished(tmp_path, "predict", ["maps/a.npy"], ["scores.csv"])
    assert os.listdir(tmp_path) == ["unfinished-predict.json"]
    assert list_unfinished(tmp_path, "predict") == {"maps/a.npy"}
    content = json.loads((tmp_path / "unfinished-predict.json").read_text())
    assert content["note"].startswith("predict has not finished") and content["pid"] == os.getpid()
    message = f"^{re.escape(str(tmp_path))}: wanted the results of a finished predict, got unfinished ones"
    with pytest.raises(ValueError, match=message):
        check_finished(tmp_path, "predict")
    check_finished(tmp_path, "evaluate")
    with replace_files(tmp_path, remove=[name_mark("predict")]) as staging:
        (staging / "scores.csv").write_text("new")
    assert os.listdir(tmp_path) == ["scores.csv"] and list_unfinished(tmp_path, "predict") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', '{"files": [3, null]}', "[" * 100_000, "\0"])
def test_a_damaged_mark_names_no_files(tmp_path, content):
    (tmp_path / name_mark("predict")).write_text(content)
    assert list_unfinished(tmp_path, "predict") == set()
    with pytest.raises(ValueError, match="unfinished"):
        check_finished(tmp_path, "predict")


def test_a_pipe_in_place_of_a_mark_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / name_mark("predict"))
    assert list_unfinished(tmp_path, "predict") == set()


def test_only_files_below_the_folder_are_removed(tmp_path):
    out = tmp_path / "out"
    (out / "maps/deep").mkdir(parents=True)
    for path in (tmp_path / "mine", out / "maps/deep/a", out / "maps/b"):
        path.write_text("x")
    names = ["../mine", f"{tmp_path}/mine", "maps/../../mine", "maps/deep/a", "maps", "none/there", "", "maps/b\0"]
    mark_unfinished(out, "predict", names)
    assert list_unfinished(out, "predict") == {"maps/deep/a", "maps", "none/there"}
    remove_files(out, names)
    assert (tmp_path / "mine").exists() and sorted(os.listdir(out)) == ["maps", "unfinished-predict.json"]
    assert os.listdir(out / "maps") == ["b"]


def test_report_names_an_unfinished_evaluation(tmp_path):
    run, data = make_run(tmp_path, good=1, defects=1)
    mark_unfinished(run, "evaluate", [])
    message = fails("report", run, "--device", "cpu")
    assert message.endswith(f"{run}: wanted the results of a finished evaluate, got unfinished ones: run it again")
    works("report", run, data, "--device", "cpu")  # evaluates by itself
