"""Inference in a thread of its own: images that wait at the same time are scored in one batch."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recontrast.inference.detector import run_checked
from recontrast.inference.protocol import Detector
from recontrast.runtime.threads import after_batch, defer_measurements
from recontrast.service.messages import RequestError
from recontrast.service.uploads import Upload, UploadedImages

MapAndScore = tuple[NDArray[np.float32], float]


@dataclass(eq=False)
class Job:
    """An image that waits for its map and score.

    Attributes:
        detector: Detector that scores it.
        upload: The image.
        is_wanted: Returns whether its client still waits for the answer.
        result: Map (H, W) and score.
    """

    detector: Detector
    upload: Upload
    is_wanted: Callable[[], bool] = lambda: True
    result: "Future[MapAndScore]" = field(default_factory=Future)


class BatchThread:
    """Thread that scores images in batches, in the order in which they come.

    A batch holds the images that wait, of one detector. If other images are being received or decoded, it waits for
    them, but no longer than the window; an image that comes alone is scored at once.

    Args:
        batch: Largest number of images in a batch; of tiles, for a detector of tiles.
        window: Longest time that an image waits for others, in seconds.
        report: Function that is called with unexpected exceptions.

    Attributes:
        sizes: Number of batches by the number of their images.
        seconds: Time in which the detectors ran.
    """

    def __init__(self, batch: int, window: float, report: Callable[[BaseException], None]) -> None:
        self.batch, self.window, self._report = batch, window, report
        self.sizes: dict[int, int] = {}
        self.seconds = 0.0
        self._waiting: deque[Job] = deque()
        self._expected = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="recontrast-inference", daemon=True)
        self._thread.start()

    def expect(self) -> None:
        """Announce an image: `submit` or `withdraw` must follow."""
        with self._changed:
            self._expected += 1

    def withdraw(self) -> None:
        """Take back an announcement: the image could not be decoded."""
        with self._changed:
            self._expected -= 1
            self._changed.notify()

    def submit(self, job: Job) -> None:
        """Hand over an image that was announced."""
        with self._changed:
            self._expected -= 1
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Score what waits, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with defer_measurements():
            while jobs := self._take():
                wanted = [job for job in jobs if job.is_wanted()]
                for job in jobs:
                    if job not in wanted:
                        job.result.set_exception(ConnectionError("the client has gone"))
                if wanted:
                    begin = time.perf_counter()
                    self._score(wanted)
                    after_batch((time.perf_counter() - begin) / len(wanted), bool(self._waiting))

    def _take(self) -> list[Job]:
        """Wait for images, and return the next batch; an empty one ends the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if not self._waiting:
                return []
            end = time.monotonic() + self.window
            while len(self._waiting) < self.batch and self._expected > 0 and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            jobs = [self._waiting.popleft()]
            while self._waiting and len(jobs) < self.batch and self._waiting[0].detector is jobs[0].detector:
                jobs.append(self._waiting.popleft())
            return jobs

    def _score(self, jobs: list[Job]) -> None:
        """Score a batch. If it fails, each image is scored alone, so that one cannot cost the others their answers."""
        begin = time.perf_counter()
        try:
            results = score_images(jobs[0].detector, UploadedImages([job.upload for job in jobs]), self.batch)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._score([job])
                return
            self._report(error)
            text = "memory" if isinstance(error, MemoryError) else "a score, got an internal error"
            jobs[0].result.set_exception(RequestError(500, f"service: wanted {text}"))
            return
        self.seconds += time.perf_counter() - begin
        self.sizes[len(jobs)] = self.sizes.get(len(jobs), 0) + 1
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, RequestError):
                job.result.set_exception(result)
            else:
                job.result.set_result(result)


def score_images(detector: Detector, files: UploadedImages, batch: int) -> list[MapAndScore | RequestError]:
    """Score images.

    Args:
        detector: Detector that scores them.
        files: The images.
        batch: Largest number of images, or of tiles, in one pass of the network.

    Returns:
        Map (H, W) and score of each image, or why the detector could not use it.

    Raises:
        Exception: What the detector raises.
    """
    maps: list[NDArray[np.float32]] = []
    scores: list[float] = []
    for batch_maps, batch_scores in run_checked(detector, files, batch):
        maps += list(batch_maps)
        scores += batch_scores.tolist()
    if not len(maps) == len(scores) == len(files):
        raise ValueError(f"detector: wanted {len(files)} maps and scores, got {len(maps)} and {len(scores)}")
    results: list[MapAndScore | RequestError] = []
    for index, result in enumerate(zip(maps, scores, strict=True)):
        text = files.errors.get(index)
        name = str(files.paths[index])
        results.append(result if text is None else RequestError(422, text.replace(name, "image", 1)))
    return results
