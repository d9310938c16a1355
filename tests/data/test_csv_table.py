"""CSV tables that spreadsheets cannot run, in which every name keeps its characters."""

import csv
import io
import os

import pandas as pd
import pytest

from recontrast.data.csv_table import Rounded, decode_text, format_table, read_table
from recontrast.data.markdown import escape_markdown, format_row

NAMES = [
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''=1", "'plain", "\uff1d1", "a\rb", "a\nb",
    "a\r\nb", 'quote"d', "a,b", "a;=1", " blanks ", os.fsdecode(b"caf\xe9"), "部品", "", "a\tb",
    "=HYPERLINK(\"http://x\")", "-",
]  # fmt: skip


def write(path, names):
    path.write_bytes(format_table([["path", "score"], *([name or "empty", Rounded(-0.5)] for name in names)]))
    return path


def test_names_return_unchanged(tmp_path):
    table = read_table(write(tmp_path / "scores.csv", NAMES), ["path", "score"], own=True)
    assert [row["path"] for row in table] == [name or "empty" for name in NAMES]
    assert {row["score"] for row in table} == {"-0.5"}


def test_no_cell_runs_and_no_name_makes_a_row(tmp_path):
    path = write(tmp_path / "scores.csv", NAMES)
    cells = list(csv.reader(io.StringIO(path.read_bytes().decode(errors="replace"), newline="")))
    assert len(cells) == len(NAMES) + 1
    starts = tuple("=+@\t\r\n\uff1d")
    assert not [cell for row in cells for cell in row if cell.startswith(starts) or cell in ("-1", "-")]
    frame = pd.read_csv(path, encoding_errors="replace", keep_default_na=False)
    assert len(frame) == len(NAMES) and (frame["score"] == -0.5).all()  # negative numbers stay numbers


def test_numbers_and_empty_cells():
    row = [None, 1, 0.1, 1e-7, Rounded(1 / 3), float("nan"), True]
    assert format_table([row]) == b",1,0.1,1e-07,0.333333333,nan,True\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path, encoding):
    path = tmp_path / "table.csv"
    path.write_bytes("name,value\r\nköln.png, 1\r\n".encode(encoding))
    (row,) = read_table(path, ["name"])
    assert row.cells == {"name": "köln.png", "value": "1"}
    assert decode_text(path, path.read_bytes()) == "name,value\r\nköln.png, 1\r\n"


@pytest.mark.parametrize(
    "content, message",
    [
        ("name\nx".encode("utf-16-le"), "line 1: wanted text in UTF-8, or UTF-16 with a byte order mark, got a null"),
        (b"\xff\xfea\x00b", "wanted text in UTF-16-LE, got truncated data"),
        (b"name\n\xe9", "wanted a CSV table in UTF-8, got a file of another kind or encoding"),
    ],
)
def test_other_encodings_are_refused(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(path, ["name"])


@pytest.mark.parametrize(
    "name, escaped",
    [
        ("metal_nut", "metal_nut"),
        ("a|b", r"a\|b"),
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)\>"),
        ("[link](http://x)", r"\[link\](http://x)"),
        ("*bold* _it_ `code`", r"\*bold\* \_it\_ \`code\`"),
        ("# title", r"\# title"),
        ("a\r\nb\x1b", r"a\\x0d\\x0ab\\x1b"),
        ("&lt;", "&amp;lt;"),
        (os.fsdecode(b"caf\xe9"), r"caf\\xe9"),
    ],
)
def test_markdown_is_escaped(name, escaped):
    assert escape_markdown(name) == escaped
    assert len(format_row([escape_markdown(name), "1"]).splitlines()) == 1


def test_errors_quote_little_of_a_table(tmp_path):
    name = "a\n" * 10_000
    for content in (f'"{name}"\n', f'path\n"{name}"\n"{name}"\n'):
        (tmp_path / "table.csv").write_text(content)
        with pytest.raises(ValueError, match="wanted") as caught:
            read_table(tmp_path / "table.csv", ["path"])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
