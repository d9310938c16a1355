"""Log of a run: whole lines, and never in another file."""

import errno
import json
import os

import numpy as np
import pytest
from command_line import SMALL, call
from small_run import RECIPE
from tiny import tiny_set

from recontrast.data.datasets import mvtec
from recontrast.training.json_log import JsonLog, read_log
from recontrast.training.train import train


@pytest.mark.parametrize("keep", [0, 1])
def test_link_is_replaced_at_the_start_and_refused_later(tmp_path, keep):
    victim = tmp_path / "victim"
    victim.write_text('{"step": 1}\n')
    path = tmp_path / "log.jsonl"
    path.symlink_to(victim)
    log = JsonLog(path, keep=keep)
    log.write(step=2)
    assert not path.is_symlink() and [line["step"] for line in read_log(path)] == [1, 2][1 - keep :]
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(ValueError, match=r"log\.jsonl: wanted the log of this run, got a symbolic link: remove it"):
        log.write(step=3)
    assert victim.read_text() == '{"step": 1}\n'


def test_line_that_cannot_be_written_whole_is_removed(tmp_path, monkeypatch):
    log = JsonLog(tmp_path / "log.jsonl")
    log.write(step=1)
    fdopen = os.fdopen

    def open_full(handle, *options):
        file = fdopen(handle, *options)

        class FullDisk:
            written = 0

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def fileno(self):
                return file.fileno()

            def write(self, data):
                if self.written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.written = file.write(data[:5])
                return self.written

        return FullDisk()

    monkeypatch.setattr(os, "fdopen", open_full)
    with pytest.raises(OSError, match=r"log\.jsonl: the log could not be written \(No space left on device\)"):
        log.write(step=2)
    monkeypatch.undo()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    log.write(step=3)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3]


def test_link_in_the_folder_of_a_run_is_not_followed(tmp_path):
    tiny_set(tmp_path / "data", "nut", train=4, good=0, defects=0)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    for name in ("log.jsonl", "recipe.yaml", "checkpoint.pt"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "victim")
    train(RECIPE.replace(steps=2), mvtec(tmp_path / "data", "nut"), out=tmp_path / "out", device="cpu")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_first_line_describes_the_training_images(tmp_path):
    samples = tiny_set(tmp_path / "data", "nut", train=5, good=1, defects=0)
    recipe, out = RECIPE.replace(steps=4, log_every=1, checkpoint_every=2), tmp_path / "out"
    tree = f"nut: {tmp_path / 'data/nut/train'}\n  good: 5 images (good, to train on)"

    class Stop(Exception):
        pass

    def stop(step, *values):
        if step == 3:
            raise Stop

    for is_old in (False, True):
        with pytest.raises(Stop):
            train(recipe, samples, out=out, device="cpu", on_log=stop)
        if is_old:  # of a version that wrote no data
            lines = [
                {key: value for key, value in line.items() if key != "data"} for line in read_log(out / "log.jsonl")
            ]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        train(recipe, samples, out=out, device="cpu", resume=out / "checkpoint.pt")
        lines = read_log(out / "log.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["step"] for line in lines if line.get("data") == tree] == [3 if is_old else 1]
        assert sum("data" in line for line in lines) == 1


def test_tree_of_a_run_is_that_on_the_screen(tmp_path):
    tiny_set(tmp_path / "data", "nut", train=4, good=0, defects=0)
    result = call("train", tmp_path / "data", "--out", tmp_path / "out", *SMALL)
    line = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
    assert result.stdout.startswith(line["data"] + "\n")


def test_images_in_memory_have_no_folders(tmp_path):
    train(RECIPE.replace(steps=2), np.zeros((4, 32, 32, 3), np.uint8), out=tmp_path, device="cpu")
    assert "data" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
