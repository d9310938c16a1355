"""recontrast.data.image_lists: rows of CSV, JSON lines and Parquet become samples, and errors name the row."""

import json
import os
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recontrast.data import datasets
from recontrast.data.class_folders import list_good_images, list_good_samples
from recontrast.data.dataset_sample import Sample
from recontrast.data.groups import group_samples
from recontrast.data.image_lists import read_list, write_list
from recontrast.data.list_files import COLUMNS
from recontrast.data.listing import DataWarning, list_images
from recontrast.data.unsplit import assign_splits, read_good_and_bad

FORMATS = (".csv", ".jsonl", ".parquet")


def create_files(root, *names):
    """Create empty files, and return ``root``."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def write(path, rows):
    """Write rows (dicts) in the format of the suffix, without the code under test."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".csv":
        lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), path)
    return path


@pytest.fixture
def parts(tmp_path):
    """Create a folder with files of images, masks and regions; nothing is decoded."""
    names = ["a.png", "b.png", "c.png", "d.png", "crack/e.png", "crack/f.png", "masks/e.png", "masks/f.png", "roi.png"]
    return create_files(tmp_path / "parts", *names)


ROWS = [
    {"path": "a.png", "split": "train", "label": 0, "group": "1", "category": "nut", "roi": "roi.png"},
    {"path": "b.png", "split": "train", "label": 0, "group": "1", "category": "nut", "roi": "roi.png"},
    {"path": "c.png", "split": "calibration", "label": 0, "group": "2", "category": "nut", "roi": "roi.png"},
    {"path": "d.png", "split": "test", "label": 0, "category": "nut", "roi": "roi.png"},
    {"path": "crack/e.png", "split": "test", "label": 1, "defect": "crack", "mask": "masks/e.png", "category": "nut"},
    {"path": "crack/f.png", "split": "test", "label": 1, "defect": "crack", "mask": "masks/f.png", "category": "nut"},
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_become_samples(parts, suffix):
    path = write(parts / f"list{suffix}", ROWS)
    roi = parts / "roi.png"
    assert read_list(path) == {
        "nut": [
            Sample(parts / "a.png", None, 0, "nut", "train", "good", roi, "1"),
            Sample(parts / "b.png", None, 0, "nut", "train", "good", roi, "1"),
            Sample(parts / "c.png", None, 0, "nut", "calibration", "good", roi, "2"),
            Sample(parts / "d.png", None, 0, "nut", "test", "good", roi),
            Sample(parts / "crack/e.png", parts / "masks/e.png", 1, "nut", "test", "crack"),
            Sample(parts / "crack/f.png", parts / "masks/f.png", 1, "nut", "test", "crack"),
        ]
    }
    assert datasets.load(path) == read_list(path)
    assert list_images(path) == [sample.path for sample in read_list(path)["nut"]]
    assert list_good_images([path]) == [parts / "c.png"]  # those of the split calibration
    assert [sample.group for sample in list_good_samples(path)] == ["2"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_written_lists_are_read_again(parts, suffix, tmp_path):
    groups = read_list(write(parts / "list.csv", ROWS))
    for folder in (parts, tmp_path / "elsewhere"):  # relative and absolute paths
        write_list(folder / f"copy{suffix}", groups)
        assert read_list(folder / f"copy{suffix}") == groups
    text = (tmp_path / f"elsewhere/copy{suffix}").read_bytes()
    assert str(parts).encode() in text and str(parts).encode() not in (parts / f"copy{suffix}").read_bytes()


def test_a_list_of_a_data_set_is_the_data_set(tmp_path):
    files = [f"{name}/{kind}/{i}.png" for name in ("bolt", "nut") for kind in ("train/good", "test/good", "test/a b")
             for i in (1, 10, 2)]  # fmt: skip
    root = create_files(tmp_path / "data", *files)
    create_files(root, *(f"bolt/ground_truth/a b/{i}_mask.png" for i in (1, 2, 10)))
    write_list(root / "all.csv", datasets.load(root))
    assert datasets.load(root / "all.csv") == datasets.load(root)
    assert datasets.load([root / "all.csv"], ["nut"]) == datasets.load(root, ["nut"])
    with pytest.raises(ValueError, match=r"all.csv: wanted category 'screw', got bolt, nut"):
        datasets.load(root / "all.csv", ["screw"])
    with pytest.raises(ValueError, match=r"wanted categories with different names, got 'bolt' again"):
        datasets.load([root, root / "all.csv"])


@pytest.mark.parametrize(
    "name", ["=1.png", "-2.png", "a,b.png", ' "q" .png ', "a;b.png", "über.png", "x\ny.png", "'=.png"]
)
def test_names_that_tables_change(tmp_path, name):
    create_files(tmp_path, name)
    sample = Sample(tmp_path / name, None, 0, "list", "train", "good")
    write_list(tmp_path / "list.csv", {"list": [sample]})
    assert read_list(tmp_path / "list.csv") == {"list": [sample]}


def test_tables_of_spreadsheets(parts):
    path = parts / "list.csv"
    for text in (
        "Path;Split;Label\na.png;train;good\nb.png;test;OK\nc.png;test;NG\n",
        "path\tsplit\tlabel\r\na.png\ttrain\t0\r\n\r\nb.png\ttest\tgood\r\nc.png\ttest\tdefect\r\n",
        "\ufefflabel, path ,split\ngood, a.png,train\n0, b.png , test \n1,c.png,TEST\n",
    ):
        path.write_text(text, encoding="utf-8")
        assert [(s.path.name, s.split, s.label, s.defect) for s in read_list(path)["list"]] == [
            ("a.png", "train", 0, "good"), ("b.png", "test", 0, "good"), ("c.png", "test", 1, "defect")
        ]  # fmt: skip


def test_labels_are_inferred(parts):
    path = write(parts / "list.csv", [
        {"path": "a.png", "split": "train", "defect": "", "mask": ""},
        {"path": "b.png", "split": "test", "defect": "good", "mask": ""},
        {"path": "c.png", "split": "test", "defect": "dent", "mask": "masks/e.png"},
        {"path": "crack/e.png", "split": "test", "defect": "", "mask": "masks/f.png"},
    ])  # fmt: skip
    assert [(s.label, s.defect) for s in read_list(path)["list"]] == [
        (0, "good"),
        (0, "good"),
        (1, "dent"),
        (1, "defect"),
    ]


def test_a_list_of_paths_is_a_list_of_good_images(parts):
    path = parts / "good.csv"
    path.write_text("path\na.png\nb.png\n")
    assert read_list(path) == {
        "good": [Sample(parts / n, None, 0, "good", "train", "good") for n in ("a.png", "b.png")]
    }
    assert [sample.split for sample in read_list(path, for_test=True)["good"]] == ["test", "test"]


# ---- without a split ---------------------------------------------------------------------


def make_unsplit(folder, good=20, bad=4):
    rows = [{"path": f"i{i:02}.png", "label": int(i >= good), "group": f"p{i // 2}"} for i in range(good + bad)]
    create_files(folder, *(row["path"] for row in rows))
    for i, row in enumerate(rows):  # files of different content
        (folder / row["path"]).write_bytes(bytes([i]))
    return write(folder / "all.csv", rows)


def test_a_fifth_of_the_good_images_is_kept_for_the_test(tmp_path):
    path = make_unsplit(tmp_path / "a")
    samples = read_list(path)["all"]
    tests = {s.path.name for s in samples if s.split == "test" and not s.label}
    assert len(tests) == 4 and all(s.split == "test" for s in samples if s.label)
    assert all(len({s.split for s in samples if s.group == name}) == 1 for name in {s.group for s in samples})
    moved = read_list(make_unsplit(tmp_path / "elsewhere"))["all"]
    assert [s.split for s in moved] == [s.split for s in samples]  # the folder does not matter
    grown = read_list(make_unsplit(tmp_path / "b", good=30))["all"]
    kept = {s.path.name for s in grown if s.split == "test" and not s.label} & {f"i{i:02}.png" for i in range(20)}
    assert len(kept & tests) >= 2  # most of them stay
    assert all(s.split == "test" for s in read_list(path, for_test=True)["all"])


@pytest.mark.parametrize("group", range(10))
def test_groups_with_a_defect_are_test_images(tmp_path, group):
    path = make_unsplit(tmp_path, bad=0)
    rows = path.read_text().splitlines()
    column = rows[0].split(",").index("label")
    row = rows[1 + 2 * group].split(",")  # of two images of a part
    rows[1 + 2 * group] = ",".join([*row[:column], "1", *row[column + 1 :]])
    path.write_text("\n".join(rows))
    samples = read_list(path)["all"]
    assert all(len({s.split for s in samples if s.group == name}) == 1 for name in {s.group for s in samples})
    assert {s.split for s in samples if s.group == f"p{group}"} == {"test"}
    assert sum(s.split == "test" for s in samples) == 4  # a fifth of the groups


def test_copies_of_images_with_a_defect_are_test_images(tmp_path):
    create_files(tmp_path, *(f"ok/{i}.png" for i in range(6)), "ng/0.png")
    for i in range(6):
        (tmp_path / f"ok/{i}.png").write_bytes(bytes([i]))
    for i in range(6):
        (tmp_path / "ng/0.png").write_bytes(bytes([i]))
        (samples,) = read_good_and_bad([tmp_path / "ok"], [tmp_path / "ng"]).values()
        assert [s.path.name for s in samples if s.split == "test"] == [f"{i}.png", "0.png"]


def test_copies_are_not_divided(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    create_files(tmp_path, *names)
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([i // 4]))
    samples = [Sample(tmp_path / name, None, 0, "a", "train", "good") for name in names]
    samples.append(Sample(tmp_path / "x.png", None, 1, "a", "train", "defect"))
    splits = [sample.split for sample in assign_splits(samples, [s.path.name for s in samples])]
    assert splits.count("test") == 4 + 1 and all(len({*splits[i : i + 4]}) == 1 for i in range(0, 20, 4))


def test_folders_of_good_and_bad_images(tmp_path):
    create_files(tmp_path, *(f"belt/ok/day{i % 2}/{i}.png" for i in range(10)), "ng/cut/1.png", "ng/2.png")
    for i in range(10):
        (tmp_path / f"belt/ok/day{i % 2}/{i}.png").write_bytes(bytes([i]))
    groups = read_good_and_bad([tmp_path / "belt/ok"], [tmp_path / "ng"])
    assert list(groups) == ["belt"]
    samples = groups["belt"]
    assert sorted((s.split, s.label, s.defect) for s in samples) == [
        *[("test", 0, "good")] * 2, ("test", 1, "cut"), ("test", 1, "defect"), *[("train", 0, "good")] * 8
    ]  # fmt: skip
    assert {s.split for s in read_good_and_bad([tmp_path / "belt/ok"], [])["belt"]} == {"train"}
    assert {s.split for s in read_good_and_bad([tmp_path / "belt/ok"], [], for_test=True)["belt"]} == {"test"}
    with pytest.raises(ValueError, match=r"bad: wanted images with defects, got one that is among the good ones"):
        read_good_and_bad([tmp_path / "belt/ok"], [tmp_path / "belt/ok/day0"])
    with pytest.raises(ValueError, match="good: wanted files or folders of good images, got none"):
        read_good_and_bad([], [tmp_path / "ng"])


def test_groups_join_copies(tmp_path):
    create_files(tmp_path, "a.png", "b.png", "c.png", "d.png")
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"2"), ("d", b"3")):
        (tmp_path / f"{name}.png").write_bytes(content)
    samples = [Sample(tmp_path / f"{n}.png", None, 0, c, "train", "good", None, g)
               for n, c, g in (("a", "x", "1"), ("b", "x", "1"), ("c", "x", None), ("d", "y", "1"))]  # fmt: skip
    assert group_samples(samples) == [0, 0, 0, 3]  # c is a copy of b; d is of another category


# ---- bad input ---------------------------------------------------------------------------


GOOD_ROWS = [{"path": "a.png", "split": "train", "label": 0}, {"path": "b.png", "split": "test", "label": 0}]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rows, message", [
    ([{"file": "a.png", "label": 0}], "{list}: wanted a column path, got the columns file, label"),
    ([*GOOD_ROWS, {"path": "x.png", "split": "test", "label": 0}],
     "{row3}: wanted the image {folder}/x.png, got no such file"),
    ([*GOOD_ROWS, {"path": "crack", "split": "test", "label": 1}],
     "{row3}: wanted the image {folder}/crack, got a folder"),
    ([*GOOD_ROWS, {"path": "./a.png", "split": "test", "label": 0}],
     "{row3}: wanted each path once, got {folder}/a.png again, as in {where1}"),
    ([*GOOD_ROWS, {"path": "", "split": "test", "label": 0}], "{row3}: wanted the path of an image, got none"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "train", "label": 1}],
     "{row3}: wanted good images for training, got one with a defect: {folder}/c.png"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "val", "label": 1}],
     "{row3}: wanted good images for calibration, got one with a defect: {folder}/c.png"),
    ([*GOOD_ROWS, {"path": "crack/e.png", "split": "test", "label": 0}],
     "{row3}: wanted an image that is good, got one in a folder whose name is that of images with "
     "defects: {folder}/crack/e.png"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": 0, "defect": "dent"}],
     "{row3}: wanted a label that fits the defect 'dent', got good (label 0)"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": 1, "defect": "good"}],
     "{row3}: wanted a label that fits the defect 'good', got with a defect (label 1)"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": 0, "mask": "masks/e.png"}],
     "{row3}: wanted masks of images with a defect alone, got one of a good image: "
     "{folder}/masks/e.png"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": 1, "mask": "masks/x.png"}],
     "{row3}: wanted the mask {folder}/masks/x.png, got no such file"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": 0, "roi": "x.png"}],
     "{row3}: wanted the region of interest {folder}/x.png, got no such file"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": 1, "mask": "masks/e.png"},
      {"path": "d.png", "split": "test", "label": 1}],
     "{row4}: wanted a mask for each image with a defect of list or for none, got none for "
     "{folder}/d.png"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "all", "label": 0}],
     "{row3}: split: wanted train, test or calibration, got 'all'"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "", "label": 0}],
     "{row3}: wanted a split in each row or in none, got none in this one"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": "maybe"}],
     "{row3}: label: wanted 0 or good, 1 or defect, got 'maybe'"),
    ([*GOOD_ROWS, {"path": "c.png", "split": "test", "label": ""}],
     "{row3}: wanted a label or a defect for a test image, got neither"),
    ([{**GOOD_ROWS[0], "group": "7"}, {**GOOD_ROWS[1], "group": "7"}],
     "{row2}: wanted all images of group '7' in one split, got test here and train in {where1}"),
])  # fmt: skip
def test_errors_name_the_row(parts, suffix, rows, message):
    if suffix == ".parquet":  # a column has one type
        rows = [{name: str(value) for name, value in row.items()} for row in rows]
    path = write(parts / f"list{suffix}", rows)
    word, offset = {".csv": ("line", 1), ".jsonl": ("line", 0), ".parquet": ("row", 0)}[suffix]
    names = {f"row{i}": f"{path} {word} {i + offset}" for i in range(1, 5)}
    expected = message.format(list=path, folder=parts, where1=f"{word} {1 + offset}", **names)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        read_list(path)


def test_a_good_image_in_the_folder_of_good_images(parts):
    create_files(parts, "good/g.png")
    path = write(parts / "list.csv", [*GOOD_ROWS, {"path": "good/g.png", "split": "test", "label": 1}])
    with pytest.raises(
        ValueError, match=r"line 4: wanted an image that is with a defect, got one in a folder whose name"
    ):
        read_list(path)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"", "{}: wanted a list of images, got one without rows"),
    ("a.csv", b"path,label\n", "{}: wanted a list of images, got one without rows"),
    ("a.csv", b"path,label\na.png\n", "{} line 2: wanted 2 cells, one for each column, got 1"),
    ("a.csv", b"path,path\na.png,b.png\n", "{} line 1: wanted each column once, got 'path' again"),
    ("a.csv", b"path\na.png\0\n", "{} line 2: wanted text in UTF-8, or UTF-16 with a byte order mark, got a null byte"),
    ("a.csv", b'path\n"' + b"a" * 140_000 + b'"\n', "{} line 2: wanted a CSV table, got one that cannot be read .*"),
    ("a.jsonl", b'{"path": "a.png"}\n{"path": \n', "{} line 2: wanted a JSON object, got text that is not JSON .*"),
    ("a.jsonl", b'["a.png"]\n', "{} line 1: wanted a JSON object, one a line, got .*"),
    ("a.jsonl", b'{"path": ["a.png"]}\n', "{} line 1: path: wanted text or a whole number, got .*"),
    ("a.jsonl", b'{"path": "a\\u0000.png"}\n', "{} line 1: path: wanted text, got a null byte"),
    ("a.jsonl", b'{"path": "a.png", "label": 0.5}\n', "{} line 1: label: wanted text or a whole number, got 0.5"),
    ("a.jsonl", b'{"path": "a.png", "label": true}\n', "{} line 1: label: wanted 0 or good, 1 or defect, got 'true'"),
    ("a.parquet", b"path\na.png\n", "{}: wanted a Parquet file, got a file of another kind or a damaged one"),
])  # fmt: skip
def test_broken_files(parts, name, content, message):
    path = parts / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{message.format(re.escape(str(path)))}$"):
        read_list(path)


def test_unknown_columns_are_named(parts):
    path = write(parts / "list.csv", [{"path": "a.png", "lable": 0, "camera": 3}])
    with pytest.warns(DataWarning, match="list.csv: columns not used: lable, camera; those of a list are path, split,"):
        read_list(path)


def test_parquet_without_pyarrow(parts, monkeypatch):
    path = write(parts / "list.parquet", GOOD_ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^Parquet: wanted the package pyarrow, got none installed: pip install"):
        read_list(path)


def test_parquet_types_of_pandas(parts):
    """Numbers may be floats where cells are missing."""
    path = parts / "list.parquet"
    pq.write_table(pa.table({"path": ["a.png", "c.png"], "label": [None, 1.0], "group": [7, None],
                             "split": pa.array(["train", "test"]).dictionary_encode()}), path)  # fmt: skip
    assert [(s.label, s.group) for s in read_list(path)["list"]] == [(0, "7"), (1, None)]


def test_missing_files_of_an_incomplete_list(parts):
    rows = [*ROWS[:4], {**ROWS[4], "path": "x.png"}, {**ROWS[5], "mask": ""}]
    path = write(parts / "list.csv", rows)
    samples = read_list(path, incomplete=True)["nut"]
    assert (samples[4].path, samples[5].mask) == (parts / "x.png", None)


def test_groups_are_checked_when_a_list_is_written(parts):
    samples = [Sample(parts / "a.png", None, 0, "nut", split, "good", None, "1") for split in ("train", "test")]
    with pytest.raises(ValueError, match=r"wanted all images of group '1' in one split, got test here and train in"):
        write_list(parts / "list.csv", {"nut": samples})
    assert not (parts / "list.csv").exists()


def test_columns_are_those_of_the_documentation():
    assert COLUMNS == ("path", "split", "label", "defect", "mask", "roi", "category", "group")
    for name in COLUMNS:
        assert f"``{name}``" in read_list.__doc__


@pytest.mark.skipif(os.name == "nt", reason="names of Windows are text")
def test_bytes_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"")
    samples = {"a": [Sample(tmp_path / name, None, 0, "a", "train", "good")]}
    write_list(tmp_path / "list.csv", samples)
    assert read_list(tmp_path / "list.csv") == samples
    for suffix in (".jsonl", ".parquet"):
        with pytest.raises(ValueError, match="wanted names in UTF-8, got other bytes"):
            write_list(tmp_path / f"list{suffix}", samples)
