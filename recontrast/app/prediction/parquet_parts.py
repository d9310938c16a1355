"""Predictions as a folder of Parquet files, called parts. A part is complete or missing.

The name of a part is a hash of the detector, the options and its images, which also determine its content. A worker
that writes a part a second time, after a restart or a killed run, replaces it by the same rows. So the parts that exist
are the finished ones.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file
from recontrast.data.csv_table import decode_text, shorten
from recontrast.data.images import list_images
from recontrast.data.json_text import parse_json
from recontrast.data.parquet_file import import_arrow, open_parquet
from recontrast.data.regular_file import open_regular, open_to_change, read_bytes
from recontrast.data.temporary import sweep
from recontrast.inference.decisions import REGION_COLUMNS, describe_undecided

FOLDER = "scores.parquet"  # pandas, polars, DuckDB, Spark and pyarrow read a folder of parts as one table
LISTS = (".txt", ".parquet")  # lists of images: one path per line, or a column named path


@dataclass(frozen=True)
class Part:
    """Part of the output: its file name, and the absolute paths of the images that are scored and written together."""

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Counts over all requested images, and one sentence for each unreadable and each undecided one."""

    scored: int
    decided: int
    defects: int
    flagged: int
    unread: list[str]
    undecided: list[str] = field(default_factory=list)


def list_inputs(inputs: Sequence[Path]) -> list[str]:
    """List the images in files, folders and lists.

    Args:
        inputs: Images, folders that are searched at any depth, text files with one path per line, and Parquet files
            with a column ``path``. Relative paths in a list start at the folder of the list. Files named in a list are
            not opened.

    Returns:
        Absolute paths without duplicates, in the order of the inputs.

    Raises:
        ValueError: If a list is empty or has no column ``path``, or a path is not UTF-8.
        FileNotFoundError: If an input does not exist.
    """
    images: dict[str, None] = {}
    for path in inputs:
        if path.suffix.lower() in LISTS and path.is_file():
            listed = _read_parquet_paths(path) if path.suffix.lower() == ".parquet" else _read_text_paths(path)
            if not listed:
                raise ValueError(f"{path}: wanted a list of images, got an empty one")
            images.update((os.path.abspath(path.parent / name), None) for name in listed)
        else:
            images.update((os.path.abspath(image), None) for image in list_images([path]))
    for name in images:
        try:
            name.encode()
        except UnicodeEncodeError:
            readable = name.encode(errors="surrogateescape").decode(errors="replace")
            raise ValueError(f"{readable}: wanted a path in UTF-8, as Parquet holds it, got other bytes") from None
    return list(images)


def compute_identity(detector: Path, options: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of the detector's file and of the options that change the results."""
    total = hashlib.sha256(json.dumps(dict(options), sort_keys=True).encode())
    with open_regular(detector, "a detector") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def plan_parts(paths: Sequence[str], size: int, identity: str, folder: Path) -> list[Part]:
    """Return the parts that are not finished.

    Images are divided into parts first, then finished images are removed. So a repeated call gives the same names, even
    if a worker of an earlier call is still writing.

    Args:
        paths: Absolute paths of all images.
        size: Number of images per part.
        identity: See `compute_identity`.
        folder: Folder of the finished parts.

    Returns:
        The parts to write.

    Raises:
        ValueError: If the folder holds results of another detector or other options, or other files.
    """
    finished = _read_finished(folder, identity)
    parts = []
    for start in range(0, len(paths), size):
        rest = tuple(path for path in paths[start : start + size] if path not in finished)
        if rest:
            parts.append(Part(_name_part(identity, rest), rest))
    return parts


def mark_begun(folder: Path, part: Part, tries: int) -> None:
    """Count the start of a part in a marker file, which is removed when the part is written.

    Raises:
        ValueError: If ``tries`` workers have started the part in this run and none has finished it.
    """
    marker = folder / f".{part.name}.begun"
    with open_to_change(marker, "a marker of this run", append=True, create=True) as file:
        if os.fstat(file.fileno()).st_size >= tries:
            raise ValueError(f"{tries} workers died over the same {len(part.paths)} images, from {part.paths[0]} on")
        file.write(b".")


def remove_leftovers(folder: Path) -> None:
    """Remove markers and unfinished parts of a killed run."""
    for leftover in folder.glob(".part-*"):
        leftover.unlink(missing_ok=True)
    sweep(folder)


def write_part(folder: Path, part: Part, rows: Iterable[Mapping[str, Any]], metadata: Mapping[str, str]) -> None:
    """Write the rows of a part (see `build_schema`) and its metadata, completely or not at all."""
    pa, pq = import_arrow()
    encoded = {b"recontrast": json.dumps(dict(metadata)).encode()}
    table = pa.Table.from_pylist(list(rows), schema=build_schema().with_metadata(encoded))
    sink = pa.BufferOutputStream()  # a part is small
    pq.write_table(table, sink, write_page_checksum=True)
    data = sink.getvalue()
    with replace_file(folder / part.name, size=data.size) as file:
        file.write(data)
    (folder / f".{part.name}.begun").unlink(missing_ok=True)


def build_schema() -> Any:
    """Return the columns: path; score, p_value, decision, regions, flagged (null if unknown); error (else null).

    Score and p-value are NaN, and the decision is "undecided", if the map is not finite.
    """
    pa, _ = import_arrow()
    region = {name: pa.float64() if name == "peak" else pa.int64() for name in REGION_COLUMNS}
    return pa.schema([
        pa.field("path", pa.string(), nullable=False),
        ("score", pa.float64()),
        ("p_value", pa.float64()),
        ("decision", pa.string()),
        ("regions", pa.list_(pa.struct(list(region.items())))),
        ("flagged", pa.bool_()),
        ("error", pa.string()),
    ])  # fmt: skip


def summarise(folder: Path, paths: Sequence[str]) -> Summary:
    """Count the results of ``paths`` over all parts.

    Raises:
        ValueError: If an image is missing or occurs twice.
    """
    requested, counted = set(paths), set()
    scored = decided = defects = flagged = 0
    unread: list[tuple[str, str]] = []
    undecided: list[str] = []
    for file in _list_parts(folder):
        names = ["path", "score", "decision", "flagged", "error"]
        columns = _read_columns(file, names)
        for path, score, decision, flag, error in zip(*(columns[name] for name in names), strict=True):
            if path in counted:
                raise ValueError(f"{folder}: wanted each image once, got {path} twice")
            counted.add(path)
            if path not in requested:
                continue
            scored += score is not None or error is None
            decided += decision in ("good", "defect")
            defects += decision == "defect"
            flagged += bool(flag)
            if error is not None:
                unread.append((path, error))
            elif score is None or math.isnan(score):
                undecided.append(describe_undecided(path))
    if missing := requested - counted:
        got = len(requested) - len(missing)
        raise ValueError(f"{folder}: wanted results of {len(requested)} images, got those of {got}")
    return Summary(scored, decided, defects, flagged, [error for _, error in sorted(unread)], sorted(undecided))


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata that `write_part` stored."""
    try:
        with open_parquet(file) as opened:
            stored = opened.schema_arrow.metadata or {}
        return dict(parse_json(stored[b"recontrast"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: wanted a part of predictions, got a file of another kind or a damaged one"
        ) from error


def _read_finished(folder: Path, identity: str) -> set[str]:
    finished: set[str] = set()
    for file in _list_parts(folder):
        if read_metadata(file).get("identity") != identity:
            raise ValueError(
                f"{folder}: wanted an empty folder or predictions of this detector with these options, got others'"
            )
        finished.update(_read_columns(file, ["path"])["path"])
    return finished


def _list_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _read_columns(file: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return columns of a part, whose types are those of `build_schema`."""
    schema = build_schema()
    with open_parquet(file) as opened:
        for name in names:
            if name not in opened.schema_arrow.names or opened.schema_arrow.field(name).type != schema.field(name).type:
                raise ValueError(f"{file}: wanted a part of predictions, got one without a valid column {name}")
        table = opened.read(columns=list(names))
        return {name: table[name].to_pylist() for name in names}


def _name_part(identity: str, paths: Sequence[str]) -> str:
    return f"part-{hashlib.sha256(chr(0).join([identity, *paths]).encode()).hexdigest()[:24]}.parquet"


def _read_text_paths(path: Path) -> list[str]:
    lines = decode_text(path, read_bytes(path, "a list of images", 2**30)).split("\n")
    return [name for line in lines if (name := line.rstrip("\r")).strip()]


def _read_parquet_paths(path: Path) -> list[str]:
    with open_parquet(path) as opened:
        columns = opened.schema_arrow
        if "path" not in columns.names:
            raise ValueError(f"{path}: wanted a column path, got {shorten(', '.join(columns.names)) or 'none'}")
        listed = opened.read(columns=["path"])["path"].to_pylist()
    if not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{path}: path: wanted text, got {columns.field('path').type} or empty cells")
    return listed


def list_regions(regions: Iterable[Any] | None) -> list[dict[str, Any]] | None:
    """Return regions as dicts, the structs of the column ``regions``."""
    return None if regions is None else [asdict(region) for region in regions]
