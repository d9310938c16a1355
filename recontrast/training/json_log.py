"""Log of a training run: a text file with one JSON object per line."""

import json
import os
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file


class JsonLog:
    """Log file to which lines are appended.

    Args:
        path: Path of the file.
        keep: Step from which the run resumes; lines of an existing file up to this step are kept.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        self.path = path
        kept_lines = [line for line in read_log(path) if line["step"] <= keep] if keep else []
        content = b"".join(json.dumps(line).encode() + b"\n" for line in kept_lines)
        with replace_file(path, size=len(content)) as file:
            file.write(content)

    def write(self, **values: Any) -> None:
        """Append one line; if the disk is full, the file is left as it was.

        Args:
            values: Fields of the line, among them ``step``.

        Raises:
            OSError: If the line cannot be written.
        """
        size_before = self.path.stat().st_size
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            os.truncate(self.path, size_before)
            raise OSError(f"{self.path}: the log could not be written ({error.strerror})") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a log.

    Args:
        path: Path of the file.

    Returns:
        The lines before the first damaged one; an empty list if there is no file.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the run was killed while it wrote this line
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines
