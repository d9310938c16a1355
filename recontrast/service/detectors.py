"""Detectors that are served: loaded, checked, and loaded again when their file changes."""

import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recontrast.data.encoded_image import EncodedImage
from recontrast.data.heatmaps import encode_png, encode_tiff
from recontrast.data.roi import EACH, decode_mask
from recontrast.data.sidecar import compute_sha256
from recontrast.data.window import from_levels, parse_window
from recontrast.inference.protocol import Detector
from recontrast.runtime.threads import defer_measurements
from recontrast.service.batches import score_images
from recontrast.service.messages import RequestError
from recontrast.service.uploads import ReadOptions, Upload, UploadedImages

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class LoadedDetector:
    """A detector that was loaded and checked.

    Attributes:
        detector: The detector.
        options: How it reads its images.
        sha256: SHA-256 of its file.
        since: Time at which it was loaded, in seconds since 1970.
    """

    detector: Detector
    options: ReadOptions
    sha256: str
    since: float


def parse_names(words: Sequence[str]) -> dict[str, Path]:
    """Return the detectors of a command line by name.

    Args:
        words: ``RUN`` or ``NAME=RUN``. Without a name, it is that of the folder of the run, or of the file without its
            suffix. A path that exists is taken as a whole, even with an equals sign.

    Returns:
        Path of each detector by its name, in order.

    Raises:
        ValueError: If a name is invalid or occurs twice.
    """
    detectors: dict[str, Path] = {}
    for word in words:
        path = Path(word).expanduser()
        name, sign, rest = word.partition("=")
        if sign and not path.exists():
            path = Path(rest).expanduser()
        else:
            whole = path.resolve()
            name = whole.parent.name if whole.name == "checkpoint.pt" else whole.stem if whole.is_file() else whole.name
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:64] or "detector"
        if NAME.fullmatch(name) is None:
            wanted = "a name of 1 to 64 letters, digits, dots, hyphens and underscores before the ="
            raise ValueError(f"DETECTOR: wanted {wanted}, got {name!r}")
        if name in detectors:
            raise ValueError(f"DETECTOR: wanted a name for each detector, got {name} twice: write NAME={path}")
        detectors[name] = path
    return detectors


def check_detector(detector: Detector) -> ReadOptions:
    """Run a detector on a drawn image, and return how it reads images.

    Args:
        detector: The detector.

    Returns:
        The options of its first call.

    Raises:
        ValueError: If it gives no finite map and score.
    """
    recipe, fixed = detector.recipe, getattr(detector, "input_size", None)
    height, width = fixed or recipe.out
    if fixed is None and recipe.roi not in (None, EACH):  # which takes images of its own aspect ratio
        height, width = decode_mask(str(recipe.roi)).shape
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    options = ReadOptions(None, None, detector.recipe.bits, detector.recipe.window)
    content = encode_png(noise)
    if (window := parse_window(detector.recipe.window)) is not None:
        low, high = window
        content = encode_tiff((low + (high - low) / 255 * noise[:, :, 0]).astype(np.float32))
    pixels, views = from_levels(noise, window), detector.recipe.image_views
    sources = [EncodedImage(content)] * (1 if views is None else len(views))
    if views is not None:
        pixels = np.stack([pixels] * len(views))
    probe = Upload(sources, (height, width), options, pixels)
    files = UploadedImages([probe])
    (result,) = score_images(detector, files, 1)
    if isinstance(result, RequestError) or not math.isfinite(result[1]):
        raise ValueError("wanted a detector that gives a finite score for a drawn image, got one that does not")
    return files.asked[0] if files.asked else options


class ServedDetector:
    """A detector that is loaded again when its file changes.

    Args:
        name: Name in requests.
        file: Path of the checkpoint or the exported file.
        open_file: Function that opens the detector.
        on_event: Function that is told in a sentence what happens to the file.

    Attributes:
        current: The detector that runs. A new one takes its place after it was checked.
        reloads: Number of times that the file was loaded again, by outcome, "loaded" or "failed".

    Raises:
        ValueError: If the file holds no detector that runs.
        OSError: If the file cannot be read.
    """

    def __init__(
        self, name: str, file: Path, open_file: Callable[[Path], Detector], on_event: Callable[[str], None]
    ) -> None:
        self.name, self.file = name, file
        self._open_file, self._on_event = open_file, on_event
        self.reloads = {"loaded": 0, "failed": 0}
        self._stamp = self._seen = self._read_stamp()
        self.current = self._load()

    def _load(self) -> LoadedDetector:
        detector = self._open_file(self.file)
        try:
            options = check_detector(detector)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}" if str(self.file) not in str(error) else str(error)) from error
        return LoadedDetector(detector, options, compute_sha256(self.file), time.time())

    def _read_stamp(self) -> Stamp:
        """Return what changes with the files of the detector; empty if one is missing."""
        files = [self.file, self.file.with_suffix(".bin")] if self.file.suffix.lower() == ".xml" else [self.file]
        try:
            status = [file.stat() for file in files]
        except OSError:
            return ()
        return tuple((one.st_ino, one.st_size, one.st_mtime_ns) for one in status)

    def reload_if_changed(self) -> bool:
        """Load the file again if it has changed, and no longer changes.

        A file that cannot be loaded or does not run is reported once, and the detector that runs stays.

        Returns:
            Whether a new detector has taken the place of the old one.
        """
        stamp = self._read_stamp()
        if stamp in (self._stamp, ()) or stamp != self._seen:
            self._seen = stamp  # wait until it is the same twice
            return False
        try:
            loaded = self._load()
            if self._read_stamp() != stamp:
                return False  # changed while it was read: load it again
        except Exception as error:
            self._stamp = stamp
            self.reloads["failed"] += 1
            reason = " ".join(str(error).split()) or type(error).__name__
            self._on_event(f"{self.name}: the changed file was not loaded, the former detector stays: {reason}")
            return False
        self._stamp, self.current = stamp, loaded
        self.reloads["loaded"] += 1
        self._on_event(f"{self.name}: the changed file was loaded: {self.file}")
        return True


class ReloadThread:
    """Thread that looks whether the files of detectors have changed.

    Args:
        detectors: The detectors.
        seconds: Time between two looks.
    """

    def __init__(self, detectors: Sequence[ServedDetector], seconds: float) -> None:
        self._detectors, self._seconds = detectors, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recontrast-reload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with defer_measurements():  # of threads: they would be slowed down by the batches beside them
            while not self._stop.wait(self._seconds):
                for detector in self._detectors:
                    detector.reload_if_changed()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
