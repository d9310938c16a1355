"""The log of a run: one JSON object a line, appended as training goes."""

import json
import os
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file


class JsonLog:
    """A file of JSON lines, each with its step."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Begin the log at ``path``; of a former one the lines up to step ``keep`` stay, those of a resumed run."""
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= keep] if keep else []
        text = b"".join(json.dumps(line).encode() + b"\n" for line in kept)
        with replace_file(path, size=len(text)) as file:
            file.write(text)

    def write(self, **values: Any) -> None:
        """Append one line; none, where it cannot be written whole."""
        before = self.path.stat().st_size
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            os.truncate(self.path, before)
            raise OSError(f"{self.path}: the log could not be written ({error.strerror})") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, () where there is none; a last one that was cut off is passed over."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        found.append(line)
    return found
