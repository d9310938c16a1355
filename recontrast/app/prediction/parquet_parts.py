"""Predictions as Parquet in parts: each is there whole or not at all, so the parts themselves say what is done.

A part's name follows from the detector, the options and the images in it, and what it holds follows from them too:
whoever writes it a second time (a worker that was started again, one of a run that was killed) replaces it by its like.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file
from recontrast.data.images import list_images
from recontrast.inference.decisions import REGION_COLUMNS

FOLDER = "scores.parquet"  # a folder of parts is one table to pandas, polars, DuckDB, Spark and pyarrow
MISSING = "Parquet needs pyarrow, which is not installed: pip install 'recontrast[ray]'"
LISTS = (".txt", ".parquet")  # files that name images, one a line or in the column path


@dataclass(frozen=True)
class Part:
    """Images that are scored and written together."""

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What the parts say of the images that were asked for."""

    scored: int
    decided: int
    defects: int
    flagged: int
    unread: list[str]  # a sentence each


def list_inputs(inputs: Sequence[Path]) -> list[str]:
    """Absolute paths of the images that are named by files, folders and lists, each once, in their order.

    Args:
        inputs: images, folders that are searched to the bottom, text files with a path a line, and Parquet files with a
            column ``path``; relative paths of a list begin at its folder. What a list names is not looked at here.
    """
    found: dict[str, None] = {}
    for path in inputs:
        if path.suffix.lower() in LISTS and path.is_file():
            named = _parquet_paths(path) if path.suffix.lower() == ".parquet" else _text_paths(path)
            if not named:
                raise ValueError(f"{path}: wanted a list of images, got an empty one")
            found.update((os.path.abspath(path.parent / name), None) for name in named)
        else:
            found.update((os.path.abspath(image), None) for image in list_images([path]))
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="surrogateescape").decode(errors="replace")
            raise ValueError(f"{shown}: wanted a path in UTF-8, as Parquet holds it, got other bytes") from None
    return list(found)


def identity(detector: Path, options: Mapping[str, Any]) -> str:
    """SHA-256 of the detector's file and of the options that change what is written."""
    total = hashlib.sha256(json.dumps(dict(options), sort_keys=True).encode())
    with detector.open("rb") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def plan(paths: Sequence[str], size: int, who: str, folder: Path) -> list[Part]:
    """What is left to do.

    The images are cut into parts before those that are done are left out: the same call gives the same names, whatever
    an earlier one had finished, or a straggler of it still finishes.

    Args:
        paths: all images.
        size: images in a part.
        who: `identity` of the detector.
        folder: with the parts that are there.

    Returns:
        The parts to make.

    Raises:
        ValueError: the folder holds what another detector or other options gave, or files of another kind.
    """
    done = _done(folder, who)
    left = []
    for start in range(0, len(paths), size):
        rest = tuple(path for path in paths[start : start + size] if path not in done)
        if rest:
            left.append(Part(_name(who, rest), rest))
    return left


def begin(folder: Path, part: Part, tries: int) -> None:
    """Note that a worker begins with a part; the note stays if it dies, and goes when the part is written.

    Raises:
        ValueError: ``tries`` workers have begun with it in this run, and none of them finished.
    """
    note = folder / f".{part.name}.begun"
    handle = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if os.fstat(handle).st_size >= tries:
            raise ValueError(f"{tries} workers died over the same {len(part.paths)} images, from {part.paths[0]} on")
        os.write(handle, b".")
    finally:
        os.close(handle)


def clean(folder: Path) -> None:
    """Remove what workers of a run that was killed left: notes, and parts that were not finished."""
    for left in folder.glob(".part-*"):
        left.unlink(missing_ok=True)


def write(folder: Path, part: Part, rows: Iterable[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """Write the rows of a part (see `schema`), whole or not at all; ``about`` goes into the file's metadata."""
    pa, pq = _arrow()
    said = {b"recontrast": json.dumps(dict(about)).encode()}
    table = pa.Table.from_pylist(list(rows), schema=schema().with_metadata(said))
    sink = pa.BufferOutputStream()  # a part is small
    pq.write_table(table, sink)
    data = sink.getvalue()
    temporary = f".{part.name}.{os.uname().nodename}.{os.getpid()}"
    with replace_file(folder / part.name, size=data.size, temporary_name=temporary) as file:
        file.write(data)
    (folder / f".{part.name}.begun").unlink(missing_ok=True)


def schema() -> Any:
    """Columns: path; score, p_value, decision, regions, flagged (null where they are not known); error (else null)."""
    pa, _ = _arrow()
    kinds = {name: pa.float64() if name == "peak" else pa.int64() for name in REGION_COLUMNS}
    return pa.schema([
        pa.field("path", pa.string(), nullable=False),
        ("score", pa.float64()),
        ("p_value", pa.float64()),
        ("decision", pa.string()),
        ("regions", pa.list_(pa.struct(list(kinds.items())))),
        ("flagged", pa.bool_()),
        ("error", pa.string()),
    ])  # fmt: skip


def summarise(folder: Path, paths: Sequence[str]) -> Summary:
    """Count what the parts say of ``paths``.

    Raises:
        ValueError: one of them is missing or there twice.
    """
    wanted, seen = set(paths), set()
    scored = decided = defects = flagged = 0
    unread: list[tuple[str, str]] = []
    for file in _files(folder):
        columns = _read(file, ["path", "decision", "flagged", "error"])
        for path, decision, flag, error in zip(*(columns[name].to_pylist() for name in columns.column_names),
                                               strict=True):  # fmt: skip
            if path in seen:
                raise ValueError(f"{folder}: wanted each image once, got {path} twice")
            seen.add(path)
            if path not in wanted:
                continue
            scored += error is None
            decided += decision is not None
            defects += decision == "defect"
            flagged += bool(flag)
            if error is not None:
                unread.append((path, error))
    if wanted - seen:
        raise ValueError(f"{folder}: wanted {len(wanted)} images, {len(wanted - seen)} are missing")
    return Summary(scored, decided, defects, flagged, [error for _, error in sorted(unread)])


def about_part(file: Path) -> dict[str, str]:
    """What `write` was given as ``about``."""
    _, pq = _arrow()
    try:
        said = pq.read_schema(file).metadata or {}
        return dict(json.loads(said[b"recontrast"]))
    except (ValueError, KeyError) as error:  # pyarrow's errors of format are ValueErrors
        raise ValueError(
            f"{file}: wanted a part of predictions, got a file of another kind or a damaged one"
        ) from error


def _done(folder: Path, who: str) -> set[str]:
    done: set[str] = set()
    for file in _files(folder):
        if about_part(file).get("identity") != who:
            raise ValueError(
                f"{folder}: wanted an empty folder or predictions of this detector with these options, got others'"
            )
        done.update(_read(file, ["path"])["path"].to_pylist())
    return done


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _read(file: Path, columns: list[str]) -> Any:
    pa, pq = _arrow()
    try:
        return pq.ParquetFile(file).read(columns=columns)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: wanted a Parquet file, got a file of another kind or a damaged one") from error


def _name(who: str, paths: Sequence[str]) -> str:
    return f"part-{hashlib.sha256(chr(0).join([who, *paths]).encode()).hexdigest()[:24]}.parquet"


def _text_paths(path: Path) -> list[str]:
    lines = path.read_bytes().decode(errors="surrogateescape").split("\n")
    return [name for line in lines if (name := line.rstrip("\r")).strip()]


def _parquet_paths(path: Path) -> list[str]:
    pa, pq = _arrow()
    try:
        kinds = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: wanted a Parquet file, got a file of another kind or a damaged one") from error
    if "path" not in kinds.names:
        raise ValueError(f"{path}: wanted a column path, got {', '.join(kinds.names) or 'none'}")
    named = _read(path, ["path"])["path"].to_pylist()
    if not all(isinstance(name, str) for name in named):
        raise ValueError(f"{path}: path: wanted text, got {kinds.field('path').type} or empty cells")
    return named


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(MISSING) from error
    return pyarrow, pyarrow.parquet


def region_rows(regions: Iterable[Any] | None) -> list[dict[str, Any]] | None:
    """Regions as the structs of the column."""
    return None if regions is None else [asdict(region) for region in regions]
