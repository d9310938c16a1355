"""`recontrast watch`: each complete image once, whole rows, and nothing lost or repeated over restarts and kills."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import fails, works
from PIL import Image
from saved_model import RECIPE, draw, save

from recontrast.app.prediction import watch as module
from recontrast.app.prediction.watch import LINES, WatchOptions, watch
from recontrast.data.own_files import list_own
from recontrast.inference.detector import open_detector

ROOT = Path(__file__).parents[3]
QUICK = WatchOptions(settle=0.05, poll=0.02)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("watch")
    path = save(root / "checkpoint.pt", RECIPE)
    good = draw(root / "good", 39, seed=3)
    works("calibrate", path, "--good", good, "--false-alarm-rate", "0.05", "--pixel-rate", "0.05", "--device", "cpu")
    return path


@pytest.fixture(scope="module")
def detector(checkpoint):
    return open_detector(checkpoint, "cpu")


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "in", 3, seed=1)


def read_rows(out, name="scores.csv"):
    content = (out / name).read_text()
    assert content.endswith("\n")
    return list(csv.DictReader(content.splitlines()))


def run(folder, checkpoint, detector, out, count, *, act=lambda: None, options=QUICK, **arguments):
    """Watch until so many images are done, or for 60 s; ``act`` runs beside it. Return the predictions."""
    done, end = [], time.monotonic() + 60
    acting = threading.Thread(target=act)
    acting.start()
    calibration = arguments.pop("calibration", detector.calibration)
    try:
        watch(
            folder, checkpoint, detector, calibration, out, options, on_image=done.append,
            is_stopped=lambda: (len(done) >= count and not acting.is_alive()) or time.monotonic() > end, **arguments,
        )  # fmt: skip
    finally:
        acting.join()
    assert len(done) == count
    return done


def names(rows):
    return [os.path.basename(row["path"]) for row in rows]


def test_rows_are_those_of_predict(folder, checkpoint, detector, tmp_path):
    pixels = np.asarray(Image.open(folder / "000.png")).copy()
    pixels[:, :32] = 0
    Image.fromarray(pixels).save(folder / "defect.png")
    (folder / "sub").mkdir()
    shutil.copy(folder / "001.png", folder / "sub" / "a, b.png")
    (folder / "note.txt").write_text("no image")
    run(folder, checkpoint, detector, tmp_path / "out", 5)
    works("predict", checkpoint, folder, "--out", tmp_path / "wanted", "--device", "cpu", "--no-overlays")
    wanted = {row["path"]: row for row in read_rows(tmp_path / "wanted")}
    rows = read_rows(tmp_path / "out")
    assert {row.pop("error") for row in rows} == {""}
    assert {row["path"]: row for row in rows} == wanted
    assert {row["decision"] for row in rows} == {"good", "defect"}
    regions = read_rows(tmp_path / "out", "regions.csv")
    assert sorted(map(str, regions)) == sorted(map(str, read_rows(tmp_path / "wanted", "regions.csv"))) and regions


def test_new_files_are_scored_once_when_they_are_complete(folder, checkpoint, detector, tmp_path):
    whole = (folder / "000.png").read_bytes()

    def bring():
        with (folder / "slow.png").open("wb") as file:  # as a camera writes it
            for start in range(0, len(whole), len(whole) // 8 + 1):
                file.write(whole[start : start + len(whole) // 8 + 1])
                file.flush()
                time.sleep(0.02)
        (folder / ".hidden.png").write_bytes(whole)
        (folder / "part.tmp").write_bytes(whole)
        os.replace(folder / "part.tmp", folder / "renamed.png")

    run(folder, checkpoint, detector, tmp_path / "out", 5, act=bring)
    rows = read_rows(tmp_path / "out")
    assert sorted(names(rows)) == ["000.png", "001.png", "002.png", "renamed.png", "slow.png"]
    assert len({row["score"] for row in rows if names([row])[0] in ("000.png", "slow.png", "renamed.png")}) == 1


def test_restart_goes_on(folder, checkpoint, detector, tmp_path):
    out = tmp_path / "out"
    run(folder, checkpoint, detector, out, 0, act=lambda: None)  # stopped before the first image
    run(folder, checkpoint, detector, out, 3)
    first = read_rows(out)
    (folder / "001.png").unlink()  # its row stays
    shutil.copy(folder / "000.png", folder / "new.png")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "002.png")  # another picture under an old name
    run(folder, checkpoint, detector, out, 2)
    rows = read_rows(out)
    assert rows[:3] == first and sorted(names(rows[3:])) == ["002.png", "new.png"]
    run(folder, checkpoint, detector, out, 0)
    assert read_rows(out) == rows


@pytest.mark.parametrize("damage", ["cut table", "no table", "cut journal", "table behind", "foreign line"])
def test_whatever_a_kill_leaves_is_mended(folder, checkpoint, detector, tmp_path, damage):
    out = tmp_path / "out"
    run(folder, checkpoint, detector, out, 3)
    rows, table, journal = read_rows(out), out / "scores.csv", out / LINES
    expected = 0
    if damage == "cut table":
        table.write_bytes(table.read_bytes()[:-20])
    elif damage == "no table":
        table.unlink()
    elif damage == "table behind":
        table.write_bytes(b"\n".join(table.read_bytes().splitlines()[:2]) + b"\n")
    elif damage == "foreign line":
        journal.write_bytes(journal.read_bytes() + b'{"path": "x"}\n')
    else:
        journal.write_bytes(journal.read_bytes()[:-20])
        expected = 1
    run(folder, checkpoint, detector, out, expected)
    assert sorted(map(str, read_rows(out))) == sorted(map(str, rows))
    run(folder, checkpoint, detector, out, 0)
    assert sorted(map(str, read_rows(out))) == sorted(map(str, rows))


def test_broken_images_have_one_row(folder, checkpoint, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLE_FACTOR", 4)
    whole = (folder / "000.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "pause.png").write_bytes(whole[:200])

    def finish():
        time.sleep(0.1)
        (folder / "pause.png").write_bytes(whole)

    out = tmp_path / "out"
    run(folder, checkpoint, detector, out, 6, act=finish)
    rows = {os.path.basename(row["path"]): row for row in read_rows(out)}
    assert "cannot be decoded" in rows["broken.png"]["error"] and "an empty file" in rows["empty.png"]["error"]
    assert not rows["broken.png"]["score"] and not rows["broken.png"]["decision"]
    assert rows["pause.png"]["score"] == rows["000.png"]["score"] and not rows["pause.png"]["error"]
    run(folder, checkpoint, detector, out, 0)
    assert len(read_rows(out)) == 6


def test_maps_overlays_and_results_inside_the_folder(folder, checkpoint, detector, tmp_path):
    out = folder / "results"
    options = WatchOptions("tiff16", True, 0.05, 0.02)
    run(folder, checkpoint, detector, out, 3, options=options)
    run(folder, checkpoint, detector, out, 0, options=options)  # results are no inputs
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["000.png.png", "001.png.png", "002.png.png"]
    with Image.open(out / "overlays" / "000.png.png") as overlay:
        assert overlay.size == (64, 64)
    assert len(list((out / "maps").glob("*.tiff"))) == 3
    description = json.loads((out / "maps/scale.json").read_text())
    (row,) = [row for row in read_rows(out) if row["path"].endswith("000.png")]
    with Image.open(out / "maps/000.png.tiff") as stored:
        largest = np.asarray(stored).max() * description["scale"]
    assert largest == pytest.approx(float(row["score"]), rel=1e-3)  # the score is the maximum of the map
    assert description["format"] == "tiff16" and description["listed_in"] == "watch.jsonl"
    (out / "maps/mine.tiff").write_bytes(b"of another program")
    assert list_own(out) == {"maps/scale.json"}


def test_without_a_calibration(folder, tmp_path):
    path = save(tmp_path / "plain.pt", RECIPE)
    detector = open_detector(path, "cpu")
    run(folder, path, detector, tmp_path / "out", 3)
    assert [list(row) for row in read_rows(tmp_path / "out")] == [["path", "score", "error"]] * 3
    assert not (tmp_path / "out" / "regions.csv").exists()


def test_other_results_are_kept(folder, checkpoint, detector, tmp_path):
    out = tmp_path / "out"
    run(folder, checkpoint, detector, out, 3)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    arguments = ["watch", folder, checkpoint, "--out", out, "--device", "cpu"]
    assert "begun with others" in fails(*arguments, "--overlays")
    other = save(tmp_path / "other.pt", RECIPE.replace(size=96))
    assert "begun with others" in fails("watch", folder, other, "--out", out, "--device", "cpu")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    works("predict", checkpoint, folder, "--out", tmp_path / "predicted", "--device", "cpu", "--no-overlays")
    message = fails("watch", folder, checkpoint, "--out", tmp_path / "predicted", "--device", "cpu")
    assert "wanted a new folder, or one of an earlier watch" in message
    mine = tmp_path / "mine" / LINES
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "did not write" in fails("watch", folder, checkpoint, "--out", mine.parent, "--device", "cpu")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("arguments, text", [
    (["--maps", "png"], "--maps"), (["--settle", "0"], "--settle"), (["--poll", "nan"], "--poll"),
    (["--batch", "0"], "--batch"), (["--false-alarm-rate", "0.001"], "false-alarm rate"),
])  # fmt: skip
def test_command_refuses(folder, checkpoint, tmp_path, arguments, text):
    assert text in fails("watch", folder, checkpoint, "--out", tmp_path / "out", "--device", "cpu", *arguments)
    assert not (tmp_path / "out").exists()
    missing = fails("watch", tmp_path / "nowhere", checkpoint, "--out", tmp_path / "out")
    assert "wanted a folder to watch" in missing


def start(folder, checkpoint, out):
    command = [sys.executable, "-m", "recontrast", "watch", folder, checkpoint, "--out", out, "--device", "cpu"]
    command += ["--settle", "0.05", "--poll", "0.02", "--batch", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_kills_and_interrupts(checkpoint, tmp_path):
    """SIGKILL in the middle, then SIGINT: each image has one row, and the command ends with status 0."""
    folder, out = draw(tmp_path / "in", 12, seed=5), tmp_path / "out"
    process = start(folder, checkpoint, out)
    for _ in range(4):  # the first line says what is watched
        assert process.stdout.readline()
    process.kill()
    process.communicate()
    process = start(folder, checkpoint, out)
    assert "watching" in process.stdout.readline()
    end = time.monotonic() + 60
    while time.monotonic() < end and len(read_lines(out)) < 12:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped: " in printed and "Traceback" not in errors, errors
    assert sorted(names(read_rows(out))) == [f"{index:03}.png" for index in range(12)]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".recontrast")]


def read_lines(out):
    lines = (out / LINES).read_text().splitlines()[1:] if (out / LINES).exists() else []
    return [json.loads(line) for line in lines]
