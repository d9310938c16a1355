"""Journal of a prediction: scores are written as they come, and a call that was killed goes on where it stopped.

The journal lies in the folder of the results until they are complete: ``unfinished-predict.jsonl`` with one line for
each image, and ``unfinished-predict.maps`` with the maps that wait for the colour range of the overlays.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recontrast.app.prediction.output_files import Prediction
from recontrast.data.json_text import parse_json
from recontrast.data.regular_file import open_to_change
from recontrast.inference.decisions import Decision, Region

LINES, MAPS = "unfinished-predict.jsonl", "unfinished-predict.maps"
_WANTED = "the journal of an unfinished prediction"


@dataclass(frozen=True)
class Entry:
    """Scored image: its prediction, and where its map starts in the file of maps, in bytes, with its shape."""

    prediction: Prediction
    start: int
    shape: tuple[int, ...] | None  # None without overlays


class Journal:
    """Journal of one run. Nothing is written before the first `append`.

    Args:
        out: Folder of the results, locked by the caller.
        identity: What determines the results of an image: detector and options. A journal with another identity is
            replaced. None for a run that cannot be continued.
        with_maps: Whether maps are stored.
        lines: Name of the file of the lines.
        keep_all: Whether to keep the entries of images that have changed or are gone.
        list_inputs: Returns the files that the result of an image depends on, such as the views of a part and its mask,
            and raises ValueError if there is no mask any more. None: the image alone.

    Attributes:
        entries: Images that an earlier call scored, by path, if they have not changed since; with ``keep_all`` the last
            entry of each path.
        all_entries: With ``keep_all``, all entries in order.
        stamps: Size and time of change of the files of each entry, by path.
        has_identity: Whether there was no journal, or one with this identity.
    """

    def __init__(
        self, out: Path, identity: Mapping[str, Any] | None, with_maps: bool, *, lines: str = LINES,
        keep_all: bool = False, list_inputs: Callable[[str], Sequence[Path]] | None = None,
    ) -> None:  # fmt: skip
        self.out, self.identity, self.with_maps, self._name, self._keep_all = out, identity, with_maps, lines, keep_all
        self._list_inputs = list_inputs or (lambda path: [Path(path)])
        self.entries: dict[str, Entry] = {}
        self.all_entries: list[Entry] = []
        self.stamps: dict[str, list[int] | None] = {}
        self.has_identity = not os.path.lexists(out / lines)
        self._lines: BinaryIO | None = None
        self._maps: BinaryIO | None = None
        self._end = 0  # bytes of maps
        if identity is not None:
            self._read()

    def append(self, prediction: Prediction, anomaly: np.ndarray | None, stamp: list[int] | None = None) -> Entry:
        """Write one scored image.

        Args:
            prediction: Prediction of the image.
            anomaly: Map (H, W) to store; None without overlays.
            stamp: Result of `read_stamp` when the image was read; None reads it now.

        Returns:
            The entry.

        Raises:
            OSError: If the journal cannot be written.
        """
        entry = Entry(prediction, self._end, None if anomaly is None else tuple(anomaly.shape))
        pixels = None if anomaly is None else np.ascontiguousarray(anomaly, np.float32)
        stamp = self._read_stamp(prediction.path) if stamp is None else stamp
        line = {**asdict(prediction), "stamp": stamp, "start": entry.start, "shape": entry.shape}
        line["map_crc32"] = None if pixels is None else zlib.crc32(pixels.data)
        line["crc32"] = _compute_crc32(line)
        try:
            self._open()
            if pixels is not None and self._maps is not None:
                self._maps.seek(entry.start)
                self._maps.write(pixels.data)
                self._maps.flush()
                self._end += pixels.nbytes
            self._write_line(line)
        except OSError as error:
            raise OSError(f"cannot write below {self.out}: {error.strerror or error}") from error
        return entry

    def begin(self) -> None:
        """Write the journal's first line, if there is none yet.

        Raises:
            OSError: If the journal cannot be written.
        """
        try:
            self._open()
        except OSError as error:
            raise OSError(f"cannot write below {self.out}: {error.strerror or error}") from error

    def load_map(self, entry: Entry) -> np.ndarray:
        """Return the map of an entry, (H, W) float32, as a memory map."""
        if entry.shape is None:
            raise ValueError(f"{entry.prediction.path}: wanted a stored map, got none")
        return np.memmap(self.out / MAPS, np.float32, "r", entry.start, entry.shape)

    def close(self) -> None:
        """Close the files, and keep them."""
        for file in (self._lines, self._maps):
            if file is not None:
                with suppress(OSError):
                    file.close()
        self._lines = self._maps = None

    def remove(self) -> None:
        """Remove the journal, whose results are complete or worthless."""
        self.close()
        for name in (self._name, MAPS):
            with suppress(OSError):
                (self.out / name).unlink()

    def _open(self) -> None:
        if self._lines is not None:
            return
        if self.entries:
            self._lines = open_to_change(self.out / self._name, _WANTED, append=True)
            self._maps = open_to_change(self.out / MAPS, _WANTED) if self.with_maps else None
            return
        for name in (self._name, MAPS):  # of another run; a link is removed, not followed
            with suppress(FileNotFoundError):
                (self.out / name).unlink()
        self._maps = (self.out / MAPS).open("xb") if self.with_maps else None
        self._lines = (self.out / self._name).open("xb")
        self._write_line({"identity": self.identity})

    def _read_stamp(self, path: str) -> list[int] | None:
        """Return the stamps of all files that the result of an image depends on; None if one of them is gone."""
        try:
            stamps = [read_stamp(str(file)) for file in self._list_inputs(path)]
        except ValueError:  # there is no mask for the image any more
            return None
        known = [stamp for stamp in stamps if stamp is not None]
        return [number for stamp in known for number in stamp] if len(known) == len(stamps) else None

    def _write_line(self, content: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(content).encode() + b"\n")
            self._lines.flush()  # whatever ends the process, the system has the line

    def _read(self) -> None:
        """Read the images that an earlier call scored."""
        try:
            with open_to_change(self.out / self._name, _WANTED) as file:
                lines = file.read().split(b"\n")
            maps = np.zeros(0, np.uint8)
            if self.with_maps:
                with open_to_change(self.out / MAPS, _WANTED) as file:
                    if os.fstat(file.fileno()).st_size:
                        maps = np.asarray(np.memmap(file, np.uint8, "r"))
            if parse_json(lines[0])["identity"] != json.loads(json.dumps(self.identity)):
                return
            self.has_identity = True
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return
        whole = lines[1:-1]  # what follows the last line break was cut off
        for line in whole:
            try:
                content = parse_json(line)
                if content["crc32"] != _compute_crc32(content):
                    continue
                entry, stamp, map_crc32 = _parse_entry(content), content["stamp"], content["map_crc32"]
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            end = entry.start + 4 * math.prod(entry.shape) if entry.shape is not None else 0
            if (entry.shape is not None) is not self.with_maps or end > len(maps):
                continue
            self._end = max(self._end, end)
            if self.with_maps and zlib.crc32(maps[entry.start : end].data) != map_crc32:
                continue
            if self._keep_all or stamp == self._read_stamp(entry.prediction.path):
                self.entries[entry.prediction.path] = entry
                self.stamps[entry.prediction.path] = stamp
            if self._keep_all:
                self.all_entries.append(entry)
        if lines[-1] and self.entries:  # end the line that was cut off, so that the next one is whole
            with open_to_change(self.out / self._name, _WANTED, append=True) as file:
                file.write(b"\n")


def read_stamp(path: str) -> list[int] | None:
    """Return size and time of change of a file, by which a changed image is noticed; None if it is gone."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def describe_identity(checkpoint: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determines the results of an image: the file of the detector, and the options."""
    return {"checkpoint": os.path.abspath(checkpoint), "stamp": read_stamp(str(checkpoint)), **options}


def _compute_crc32(line: Mapping[str, Any]) -> int:
    """Compute the checksum of a line without its field ``crc32``."""
    return zlib.crc32(json.dumps({name: value for name, value in line.items() if name != "crc32"}).encode())


def _parse_entry(content: dict[str, Any]) -> Entry:
    """Create an entry from a line; raise an error if a value has another type than `Journal.append` writes."""
    decision = content["decision"]
    if decision is not None:
        regions = decision["regions"]
        decision = {**decision, "regions": None if regions is None else tuple(Region(**region) for region in regions)}
        decision = Decision(**decision)
        numbers = [decision.p_value, *(value for region in decision.regions or () for value in astuple(region))]
        if not all(type(number) in (int, float) for number in numbers) or decision.defect not in (None, False, True):
            raise ValueError("wanted a decision")
    names = ("path", "score", "flagged", "map", "overlay", "error")
    prediction = Prediction(**{name: content[name] for name in names}, decision=decision)
    texts = [text for text in (prediction.map, prediction.overlay, prediction.error) if text is not None]
    if not all(isinstance(text, str) for text in (prediction.path, *texts)):
        raise ValueError("wanted texts")
    if type(prediction.score) is not float or type(prediction.flagged) not in (bool, type(None)):
        raise ValueError("wanted a score")
    start, shape = content["start"], content["shape"]
    lengths = [start] if shape is None else [start, *shape]
    if any(type(length) is not int or not 0 <= length < 2**63 for length in lengths) or len(lengths) not in (1, 3):
        raise ValueError("wanted the position of a map")
    return Entry(prediction, start, None if shape is None else tuple(shape))
