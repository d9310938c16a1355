"""Log of a training run: a text file with one JSON object per line."""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file
from recontrast.data.json_text import parse_json
from recontrast.data.regular_file import open_to_change, read_bytes

LARGEST = 2**30  # bytes of a log; ten million lines


class JsonLog:
    """Log file to which lines are appended.

    Args:
        path: Path of the file.
        keep: Step from which the run resumes; lines of an existing file up to this step are kept.

    Attributes:
        names: Names of the fields of all lines.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        self.path = path
        kept_lines = [line for line in read_log(path) if line["step"] <= keep] if keep else []
        self.names = {name for line in kept_lines for name in line}
        content = b"".join(json.dumps(line).encode() + b"\n" for line in kept_lines)
        with replace_file(path, size=len(content)) as file:
            file.write(content)

    def write(self, **values: Any) -> None:
        """Append one line; if the disk is full, the file is left as it was. A link in its place is not followed.

        Args:
            values: Fields of the line, among them ``step``.

        Raises:
            OSError: If the line cannot be written.
            ValueError: If the path of the log is now that of a link, a folder, a pipe or a device.
        """
        self.names.update(values)
        line = json.dumps(values).encode() + b"\n"
        try:
            with open_to_change(self.path, "the log of this run", append=True, buffering=0) as file:
                size_before = os.fstat(file.fileno()).st_size
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError:
                    os.ftruncate(file.fileno(), size_before)
                    raise
        except OSError as error:
            raise OSError(f"{self.path}: the log could not be written ({error.strerror})") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a log.

    A last line without its end is left out: the run was killed while it wrote this line. Any other line that is damaged
    is left out with a warning that names the file.

    Args:
        path: Path of the file.

    Returns:
        The valid lines, in the order of the file; an empty list if there is no file. Each has a ``step``, and its other
        numbers are finite or None.

    Raises:
        ValueError: If the path is that of a pipe or a device, or the file has more than `LARGEST` bytes.
        OSError: If the file cannot be read.
    """
    try:
        rows = read_bytes(path, "a log of a training run", LARGEST).split(b"\n")
    except FileNotFoundError:
        return []
    lines, damaged = [], []
    for number, row in enumerate(rows, 1):
        if (line := _parse_line(row)) is not None:
            lines.append(line)
        elif row.strip() and number < len(rows):
            damaged.append(number)
    if damaged:
        others = f" and {len(damaged) - 1} others" if len(damaged) > 1 else ""
        warnings.warn(
            f"{path}, line {damaged[0]}{others}: wanted a JSON object with a step, got a damaged line: left out",
            stacklevel=2,
        )
    return lines


def _parse_line(row: bytes) -> dict[str, Any] | None:
    """Parse one line of a log; None if it is damaged."""
    try:
        line = parse_json(row)
    except ValueError:  # among them bytes that are not UTF-8
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**63:
        return None
    return line if all(map(_is_plain, line.values())) else None


def _is_plain(value: Any) -> bool:
    """Return whether a value of a log line is None, a text, or a number below 2**63."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**63)
