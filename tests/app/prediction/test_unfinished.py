"""Predictions that are stopped, in which single images fail, or which meet files of others."""

import csv
import json
import math
import os
import shutil

import numpy as np
import pytest
from command_line import call, fails, works
from PIL import Image
from saved_model import RECIPE, draw, save

from recontrast.app.prediction import journal, writer
from recontrast.app.prediction import predict as module
from recontrast.app.prediction.journal import LINES, MAPS
from recontrast.app.prediction.output_files import Prediction
from recontrast.app.prediction.predict import predict
from recontrast.data import own_files
from recontrast.data.listing import find_images


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "images", 7, seed=3)


def list_files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


def read_scores(folder):
    with open(folder / "scores.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def stop_after(monkeypatch, count):
    append, calls = writer.Journal.append, []

    def append_or_die(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise Killed
        return append(*arguments)

    monkeypatch.setattr(writer.Journal, "append", append_or_die)
    return calls


# ---- stopped -----------------------------------------------------------------


@pytest.mark.parametrize("overlays", [True, False])
@pytest.mark.parametrize("done", [1, 4, 6])
def test_stopped_run_goes_on_where_it_stopped(checkpoint, folder, tmp_path, monkeypatch, done, overlays):
    options = {"maps": "npy", "overlays": overlays, "threshold": 1.0, "batch": 1, "device": "cpu"}
    predict(checkpoint, [folder], tmp_path / "whole", **options)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, done)
        predict(checkpoint, [folder], out, **options)
    assert len((out / LINES).read_bytes().splitlines()) == 1 + done and not (out / "scores.csv").exists()
    calls = stop_after(monkeypatch, 100)
    summary = predict(checkpoint, [folder], out, **options)
    assert summary.continued == done and len(calls) == 7 - done
    assert read_files(out) == read_files(tmp_path / "whole")


def draw_masks(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        mask = np.zeros((64, 64), np.uint8)
        mask[:40] = 255
        Image.fromarray(mask).save(folder / name)
    return folder


def draw_views(folder, count):
    for side in ("left", "right"):
        for i, path in enumerate(sorted(draw(folder / side, count, seed=len(side)).iterdir())):
            path.rename(folder / f"{i}_{side}.png")
        (folder / side).rmdir()
    return folder


@pytest.mark.parametrize("changed", ["mask", "view"])
def test_image_with_another_changed_file_is_scored_again(tmp_path, monkeypatch, changed):
    """The mask of an image and the other views of a part determine its result as well."""
    if changed == "view":
        recipe = RECIPE.replace(views_from=r"_(left|right)\.", view_names=("left", "right"))
        images, roi = draw_views(tmp_path / "images", 4), None
        file = images / "1_right.png"
    else:
        recipe, images = RECIPE, draw(tmp_path / "images", 4, seed=3)
        roi = draw_masks(tmp_path / "masks", [path.name for path in sorted(images.iterdir())])
        file = roi / sorted(images.iterdir())[1].name
    checkpoint = save(tmp_path / "checkpoint.pt", recipe)
    options = {"batch": 1, "device": "cpu", "roi": roi}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        predict(checkpoint, [images], tmp_path / "out", **options)
    pixels = np.asarray(Image.open(file)).copy()
    pixels[:20] = 0
    Image.fromarray(pixels).save(file)
    summary = predict(checkpoint, [images], tmp_path / "out", **options)
    assert summary.continued == 2
    predict(checkpoint, [images], tmp_path / "whole", **options)
    assert (tmp_path / "out/scores.csv").read_bytes() == (tmp_path / "whole/scores.csv").read_bytes()


@pytest.mark.parametrize("name", [LINES, MAPS])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_journal_behind_a_link_is_not_continued(checkpoint, folder, tmp_path, monkeypatch, name, kind):
    out, victim = tmp_path / "out", tmp_path / "victim"
    stop_after(monkeypatch, 4)
    with pytest.raises(Killed):
        predict(checkpoint, [folder], out, device="cpu", batch=2)
    monkeypatch.undo()
    os.rename(out / name, victim)
    if kind == "link":
        (out / name).symlink_to(victim)
    else:
        os.mkfifo(out / name)
    content = victim.read_bytes()
    summary = predict(checkpoint, [folder], out, device="cpu", batch=2, overwrite=True)
    assert victim.read_bytes() == content and summary.continued == 0 and len(summary.predictions) == 7


def test_damaged_end_of_the_journal_is_scored_again(checkpoint, folder, tmp_path, monkeypatch):
    options = {"batch": 2, "device": "cpu"}
    whole = predict(checkpoint, [folder], tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 5)
        predict(checkpoint, [folder], tmp_path / "out", **options)
    journal = (tmp_path / "out" / LINES).read_bytes()
    (tmp_path / "out" / LINES).write_bytes(journal[:-20])  # the fifth line
    maps = (tmp_path / "out" / MAPS).read_bytes()
    (tmp_path / "out" / MAPS).write_bytes(maps[: 4 * 64 * 64 * 4 - 100])  # the fourth map
    summary = predict(checkpoint, [folder], tmp_path / "out", **options)
    assert summary.continued == 3
    assert [p.score for p in summary.predictions] == pytest.approx([p.score for p in whole.predictions], rel=1e-6)
    assert list_files(tmp_path / "out") == list_files(tmp_path / "whole")


def test_lines_of_wrong_types_are_scored_again(tmp_path):
    identity, path = {"checkpoint": "a"}, tmp_path / "0.png"
    path.touch()
    written = journal.Journal(tmp_path, identity, False)
    written.append(Prediction(str(path), 0.5, None, None, None), None)
    written.close()
    head, line, _ = (tmp_path / LINES).read_bytes().split(b"\n")
    whole = json.loads(line)
    assert list(journal.Journal(tmp_path, identity, False).entries) == [str(path)]
    for name in whole:
        for value in (None, [], {}, "text", -1, math.inf, 10**400):
            if value != whole[name]:
                content = {**whole, name: value}
                content["crc32"] = journal._compute_crc32(content) if name != "crc32" else value
                (tmp_path / LINES).write_bytes(head + b"\n" + json.dumps(content).encode() + b"\n")
                entries = journal.Journal(tmp_path, identity, False).entries
                is_text = name in ("error", "map", "overlay") and value == "text"
                is_valid = is_text or (name, value) == ("score", math.inf)
                assert bool(entries) == (is_valid or name == "map_crc32"), (name, value)


def test_other_options_other_weights_and_changed_images_begin_anew(checkpoint, folder, tmp_path, monkeypatch):
    def stop(out):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, 4)
            predict(checkpoint, [folder], out, batch=1, device="cpu", threshold=1.0)
        return out

    assert predict(checkpoint, [folder], stop(tmp_path / "a"), device="cpu", threshold=2.0).continued == 0
    other = shutil.copy(checkpoint, tmp_path / "checkpoint.pt")
    assert predict(other, [folder], stop(tmp_path / "b"), device="cpu", threshold=1.0).continued == 0
    out = stop(tmp_path / "c")
    Image.new("RGB", (64, 64), "red").save(folder / "001.png")
    (folder / "000.png").unlink()
    shutil.copy(folder / "003.png", folder / "extra.png")
    summary = predict(checkpoint, [folder], out, device="cpu", threshold=1.0)
    assert summary.continued == 2 and len(summary.predictions) == 7
    assert len(list_files(out / "overlays")) == 7 and not (out / "overlays" / "000.png").exists()


def test_command_says_how_many_were_scored_before(checkpoint, folder, tmp_path, monkeypatch):
    arguments = ["predict", checkpoint, folder, "--out", tmp_path / "out", "--batch", "1", "--device", "cpu"]

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.Journal, "append", interrupt)
        message = fails(*arguments, status=130)
    assert message.endswith(f"interrupted; the same command continues with what is in {tmp_path / 'out'}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        predict(checkpoint, [folder], tmp_path / "out", batch=1, device="cpu", inference=module.InferenceOptions())
    assert "3 images were scored by an earlier call" in works(*arguments)


# ---- single images -----------------------------------------------------------


def test_each_failure_is_one_line_and_the_rest_is_whole(checkpoint, folder, tmp_path, monkeypatch):
    (folder / "001.png").write_bytes(b"no image")
    long = "x" * 251  # the map's name is too long for the file system, the overlay's is not longer than the image's
    shutil.copy(folder / "000.png", folder / f"{long}.png")
    append = writer.Journal.append

    def delete_then_append(journal, prediction, anomaly):
        if prediction.path.endswith("003.png"):
            os.unlink(prediction.path)
        return append(journal, prediction, anomaly)

    monkeypatch.setattr(writer.Journal, "append", delete_then_append)
    out = tmp_path / "out"
    arguments = ["predict", checkpoint, folder, "--out", out, "--maps", "tiff16", "--device", "cpu"]
    result = call(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert len(lines) == 3
    rows = {os.path.basename(row["path"]): row for row in read_scores(out)}
    assert len(rows) == 8 and [name for name, row in rows.items() if row["error"]] == [
        "001.png",
        "003.png",
        f"{long}.png",
    ]
    assert not rows["001.png"]["score"] and "got a file that starts" in rows["001.png"]["error"]
    assert rows["003.png"]["score"] and "no such file" in rows["003.png"]["error"]
    assert rows[f"{long}.png"]["score"] and "File name too long" in rows[f"{long}.png"]["error"]
    assert lines == [f"recontrast: {rows[name]['error']}" for name in ("001.png", "003.png", f"{long}.png")]
    for row in rows.values():
        assert row["error"].count(row["path"]) <= 1
    content = json.loads((out / "scores.json").read_text())
    assert len(content["images"]) == 7 and len(content["unread"]) == 1
    for image in content["images"]:
        assert all((out / image[key]).is_file() for key in ("map", "overlay") if key in image)
    assert len(list_files(out)) == 6 + 6 + 2  # maps without the long name, overlays without the deleted image


def test_image_deleted_between_scoring_and_decision_keeps_its_score(checkpoint, folder, tmp_path, monkeypatch):
    works("calibrate", checkpoint, "--good", draw(tmp_path / "good", 19, seed=9), "--false-alarm-rate", "0.1",
          "--device", "cpu")  # fmt: skip

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(writer.images, "image_size", gone)
    summary = predict(checkpoint, [folder], tmp_path / "out", overlays=False, device="cpu")
    assert len(summary.incomplete) == 7 and all(p.decision is not None for p in summary.predictions)
    assert {row["regions"] for row in read_scores(tmp_path / "out")} == {"0"}


def test_table_has_a_column_of_errors_only_with_errors(checkpoint, folder, tmp_path):
    predict(checkpoint, [folder], tmp_path / "out", overlays=False, device="cpu", threshold=1.0)
    header = (tmp_path / "out" / "scores.csv").read_text().splitlines()[0]
    assert header.startswith("path,score,flagged") and "error" not in header


# ---- files of others, and results among the inputs ---------------------------


def test_results_are_not_inputs(checkpoint, folder, tmp_path):
    arguments = ["predict", checkpoint, folder, "--out", folder, "--maps", "tiff16", "--device", "cpu"]
    assert "7 images scored" in works(*arguments)
    first = read_files(folder)
    assert "7 images scored" in works(*arguments) and read_files(folder) == first
    assert len(find_images(folder)) == 7
    inside = folder / "results" / "today"
    assert "7 images scored" in works(*arguments[:4], inside, "--device", "cpu")
    assert "7 images scored" in works(*arguments[:4], inside, "--device", "cpu")
    message = fails("predict", checkpoint, inside / "overlays", "--out", tmp_path / "out", "--device", "cpu")
    assert "wanted a folder with image files" in message


def test_unfinished_results_are_not_inputs(checkpoint, folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        predict(checkpoint, [folder], folder, maps="tiff16", batch=1, device="cpu")
    assert len(find_images(folder)) == 7


@pytest.mark.parametrize("name", ["scores.csv", "scores.json", "regions.csv", "overlays/000.png", "maps/004.tiff"])
def test_files_of_others_are_replaced_only_with_overwrite(checkpoint, folder, tmp_path, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    arguments = ["predict", checkpoint, folder, "--out", tmp_path / "out", "--maps", "tiff16", "--device", "cpu"]
    message = fails(*arguments)
    assert str(mine) in message and "--overwrite" in message
    assert list_files(tmp_path / "out") == [name] and mine.read_text() == "mine"
    works(*arguments, "--overwrite")
    assert name == "regions.csv" or mine.read_bytes() != b"mine"


def test_inputs_are_never_replaced(checkpoint, folder, tmp_path):
    shutil.move(folder, tmp_path / "out" / "overlays")
    before = read_files(tmp_path / "out")
    for more in ([], ["--overwrite"]):
        message = fails("predict", checkpoint, tmp_path / "out" / "overlays", "--out", tmp_path / "out", *more)
        assert "replace no input" in message and read_files(tmp_path / "out") == before


def test_earlier_versions_are_recognised(tmp_path):
    """Files as earlier versions wrote them, without a list of the maps."""
    texts = {
        "scores.csv": "path,score,flagged\n",
        "results.md": "| category | images | I-AUROC |\n",
        "results.json": '{\n "rows": []}',
        "results.csv": "category,images,defects,i_auroc\n",
        "log.jsonl": '{"step": 10, "loss": 0.5}\n',
        "report.html": "<!DOCTYPE html><style></style><p>Anomaly detection report</p>",
        "maps/scale.json": '{\n "format": "tiff16"}',
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        assert own_files.is_own(tmp_path / name), name
        (tmp_path / name).write_text("mine" + text)
        assert name == "report.html" or not own_files.is_own(tmp_path / name)
        (tmp_path / name).write_text(text)
    np.save(tmp_path / "mine.npy", np.zeros(3))
    (tmp_path / "maps" / "a.tiff").write_bytes(b"map")
    assert own_files.list_own(tmp_path) == {"maps/scale.json", "maps/a.tiff"}
    assert not own_files.is_own(tmp_path / "mine.npy") and not own_files.is_own(tmp_path / "nowhere.csv")
