"""The record of a prediction in parts: what is planned, done, refused. No Ray."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recontrast.app.prediction import parquet_parts
from recontrast.inference.decisions import Region

WHO = "a detector"


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def finish(folder, part, **values):
    parquet_parts.write_part(folder, part, [{"path": path, **values} for path in part.paths], {"identity": WHO})


def test_lists_folders_and_files_each_once(tmp_path):
    one, two, three = (image(tmp_path / "in" / f"{n}.png") for n in (1, 2, 10))
    (tmp_path / "list.txt").write_text("in/10.png\r\n\n" + f"{one}\n" + "elsewhere.png")
    pq.write_table(pa.table({"path": ["in/2.png", "in/1.png"], "other": [1, 2]}), tmp_path / "list.parquet")
    assert parquet_parts.list_inputs([tmp_path / "list.txt"]) == [str(three), str(one), str(tmp_path / "elsewhere.png")]
    assert parquet_parts.list_inputs([tmp_path / "list.parquet"]) == [str(two), str(one)]
    assert parquet_parts.list_inputs([tmp_path / "in", tmp_path / "in" / "1.png"]) == [str(one), str(two), str(three)]


def test_lists_that_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="wanted a list of images, got an empty one"):
        parquet_parts.list_inputs([tmp_path / "empty.txt"])
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(ValueError, match="wanted a Parquet file"):
        parquet_parts.list_inputs([tmp_path / "no.parquet"])
    pq.write_table(pa.table({"file": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="wanted a column path, got file"):
        parquet_parts.list_inputs([tmp_path / "other.parquet"])
    pq.write_table(pa.table({"path": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="path: wanted text, got int64"):
        parquet_parts.list_inputs([tmp_path / "numbers.parquet"])
    with pytest.raises(FileNotFoundError):
        parquet_parts.list_inputs([tmp_path / "none.txt"])
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9.png\n")
    with pytest.raises(ValueError, match="wanted a path in UTF-8"):
        parquet_parts.list_inputs([tmp_path / "bytes.txt"])


def test_same_call_same_names_whatever_is_done(tmp_path):
    """A straggler of a killed run writes what the next one would."""
    paths = [f"/{n}" for n in range(10)]
    first = parquet_parts.plan_parts(paths, 4, WHO, tmp_path)
    assert [len(part.paths) for part in first] == [4, 4, 2]
    finish(tmp_path, first[1], score=1.0)
    assert parquet_parts.plan_parts(paths, 4, WHO, tmp_path) == [first[0], first[2]]
    finish(tmp_path, first[1], score=1.0)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_images_and_sizes_later(tmp_path):
    paths = [f"/{n}" for n in range(6)]
    for part in parquet_parts.plan_parts(paths, 3, WHO, tmp_path):
        finish(tmp_path, part, score=1.0)
    more = [*paths[:2], "/new", *paths[2:]]
    left = parquet_parts.plan_parts(more, 5, WHO, tmp_path)
    assert [part.paths for part in left] == [("/new",)]
    with pytest.raises(ValueError, match="wanted results of 7 images, got those of 6"):
        parquet_parts.summarise(tmp_path, more)
    finish(tmp_path, left[0], error="/new: no image")
    found = parquet_parts.summarise(tmp_path, more)
    assert (found.scored, found.unread) == (6, ["/new: no image"])


def test_an_image_twice_is_an_error(tmp_path):
    for paths in (("/a", "/b"), ("/b",)):
        finish(tmp_path, parquet_parts.Part(f"part-{len(paths)}.parquet", paths), score=1.0)
    with pytest.raises(ValueError, match="wanted each image once, got /b twice"):
        parquet_parts.summarise(tmp_path, ["/a", "/b"])


def test_what_others_wrote_is_refused(tmp_path):
    finish(tmp_path, parquet_parts.Part("part-1.parquet", ("/a",)))
    with pytest.raises(ValueError, match="predictions of this detector"):
        parquet_parts.plan_parts(["/a"], 1, "another", tmp_path)
    (tmp_path / "part-2.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match=r"part-2\.parquet: wanted a part of predictions"):
        parquet_parts.plan_parts(["/a"], 1, WHO, tmp_path)


def test_identity_is_of_file_and_options(tmp_path):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"weights")
    ours = parquet_parts.compute_identity(file, {"rate": None})
    assert (
        ours
        == parquet_parts.compute_identity(file, {"rate": None})
        != parquet_parts.compute_identity(file, {"rate": 0.1})
    )
    file.write_bytes(b"others")
    assert ours != parquet_parts.compute_identity(file, {"rate": None})


def test_rows_come_back(tmp_path):
    region = Region(12, 1, 2, 3, 4, 0.5, 2, 3)
    row = {"path": "/a", "score": 0.1, "p_value": 0.05, "decision": "defect", "flagged": True, "error": None}
    row["regions"] = parquet_parts.list_regions([region])
    parquet_parts.write_part(
        tmp_path, parquet_parts.Part("part-1.parquet", ("/a",)), [row], {"identity": WHO, "worker": "here:1"}
    )
    assert pq.read_table(tmp_path).to_pylist() == [row]
    assert row["regions"][0]["peak"] == 0.5
    assert parquet_parts.read_metadata(tmp_path / "part-1.parquet")["worker"] == "here:1"
    found = parquet_parts.summarise(tmp_path, ["/a"])
    assert (found.scored, found.decided, found.defects, found.flagged) == (1, 1, 1, 1)


def test_damaged_part(tmp_path):
    part = parquet_parts.Part("part-a.parquet", ("/a", "/b"))
    finish(tmp_path, part, score=1.0)
    file = tmp_path / part.name
    whole = file.read_bytes()
    at = whole.index(np.float64(1).tobytes())  # in the page of the scores
    file.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"part-a.parquet: wanted a Parquet file, got .* a damaged one"):
        parquet_parts.summarise(tmp_path, part.paths)
    pq.write_table(pa.table({"path": part.paths, "score": ["x", "y"]}), file)
    with pytest.raises(ValueError, match=r"part-a.parquet: wanted a part of predictions, got one without .* score"):
        parquet_parts.summarise(tmp_path, part.paths)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"part-a.parquet: wanted a part of predictions"):
        parquet_parts.plan_parts(part.paths, 2, WHO, tmp_path)


def test_nothing_half_written(tmp_path):
    def rows():
        yield {"path": "/a"}
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        parquet_parts.write_part(tmp_path, parquet_parts.Part("part-1.parquet", ("/a", "/b")), rows(), {})
    assert os.listdir(tmp_path) == []


def test_images_that_kill_every_worker(tmp_path):
    part = parquet_parts.Part("part-1.parquet", ("/a", "/b"))
    for _ in range(2):
        parquet_parts.mark_begun(tmp_path, part, 2)
    with pytest.raises(ValueError, match="2 workers died over the same 2 images, from /a on"):
        parquet_parts.mark_begun(tmp_path, part, 2)
    parquet_parts.remove_leftovers(tmp_path)  # another run tries again
    parquet_parts.mark_begun(tmp_path, part, 2)
    finish(tmp_path, part)
    assert os.listdir(tmp_path) == [part.name]
