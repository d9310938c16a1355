"""Prediction by many workers over Ray Data: each opens the detector once, scores whole parts and writes them itself.

What travels between processes is names alone. Ray gives the part of a worker that died to another one; the driver may
die as well, and the same call goes on with the parts that are missing (`recontrast.app.prediction.parquet_parts`).
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import recontrast
from recontrast.app.console import describe_error
from recontrast.app.prediction import parquet_parts
from recontrast.data.atomic import lock_folder, replace_file
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import image_size
from recontrast.inference.decisions import decide, select_calibration
from recontrast.inference.detector import open_detector

MISSING = "--engine ray needs Ray Data, which is not installed: pip install 'recontrast[ray]'"
TRIES = 4  # workers that may die over the same part, before the images are to blame; Ray would try for ever
STORE = 128 << 20  # bytes of Ray's object store on this machine: only names pass through it
CPUS_EACH = 4  # of a worker, where neither workers nor GPUs are counted: beyond, one network scales badly


def predict(
    checkpoint: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    workers: int | None = None,
    address: str | None = None,
    part: int = 64,
    batch: int = 16,
    threshold: float | None = None,
    rate: float | None = None,
    must_decide: bool = False,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> parquet_parts.Summary:
    """Score images on all workers of a Ray cluster; what an earlier call finished is not done again.

    Writes ``OUT/scores.parquet``, a folder of parts that readers take for one table (`parts.schema`), and
    ``OUT/predict.json``. Detector, images and ``out`` must be at the same paths on every machine.

    Args:
        checkpoint: what training wrote, or any other file of a detector.
        inputs: images, folders, or lists of images (see `parts.list_inputs`).
        out: folder for the results.
        workers: how many; None: one for each GPU, or where there are none one for every four CPUs.
        address: of a running cluster (``auto``, ``host:6379``); None: that of RAY_ADDRESS, else one of this machine's
            own, for this call.
        part: images in a part: so many are scored again at most, for each worker that dies.
        batch: images at once.
        threshold: flag images whose score is at least this.
        rate: promised share of false alarms in place of the calibration's.
        must_decide: refuse a detector without a calibration.
        device: torch device of the workers; None: the GPU where Ray has one for each.
        on_progress: called with the number of images done and of all.

    Returns:
        The counts of all images that were asked for.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a wrong option, another detector's results in ``out``, or a part that no worker could finish.
        OSError: an input does not exist, or a result cannot be written.
    """
    for name, value in (("part", part), ("batch", batch), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"predict: {name}: wanted at least 1, got {value}")
    ray = _ray(address)
    checkpoint, out = Path(os.path.abspath(checkpoint)), Path(os.path.abspath(out))
    paths = parquet_parts.list_inputs(inputs)
    detector = open_detector(checkpoint, "cpu")  # refused here, in one sentence, before any worker starts
    select_calibration(detector, rate, must_decide, checkpoint)
    options = {"threshold": threshold, "rate": rate}
    who = parquet_parts.identity(checkpoint, options)
    folder = out / parquet_parts.FOLDER
    with lock_folder(out):
        left = parquet_parts.plan(paths, part, who, folder)
        count = len(paths) - sum(len(each.paths) for each in left)
        folder.mkdir(parents=True, exist_ok=True)
        parquet_parts.clean(folder)
        if left:
            with _cluster(ray, address):
                settings = {"checkpoint": checkpoint, "folder": folder, "batch": batch, "device": device, "who": who}
                for finished in _work(ray, left, workers, {**settings, **options}):
                    count += finished
                    if on_progress is not None:
                        on_progress(count, len(paths))
        elif on_progress is not None:
            on_progress(count, len(paths))
        summary = parquet_parts.summarise(folder, paths)
        if not summary.scored:
            raise ValueError(f"none of {len(paths)} images could be read: {summary.unread[0]}")
        about: dict[str, Any] = {
            "recontrast": recontrast.__version__,
            "checkpoint": str(checkpoint),
            "trained_on": detector.category,
        }
        about |= {"identity": who, **options, "images": len(paths), "unread": len(summary.unread)}
        with replace_file(out / "predict.json") as file:
            file.write((json.dumps(about, indent=1) + "\n").encode())
    return summary


class Worker:
    """What runs in each process of Ray: the detector, opened once, and its share of the CPUs."""

    def __init__(self, cpus: int, **settings: Any) -> None:
        """``settings``: see `_open`, which comes later, as what it raises must not pass for a worker that died."""
        self.cpus, self.settings, self.opened = cpus, settings, False

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        """Score and write the parts of a batch of Ray's; says how many images each held, or what went wrong."""
        counts, errors = [], []
        for name, paths in zip(given["name"], given["paths"], strict=True):
            error = ""
            try:
                if not self.opened:
                    self._open(**self.settings)
                self._make(parquet_parts.Part(str(name), tuple(map(str, paths))))
            except (ValueError, OSError, RuntimeError) as raised:
                error = describe_error(raised)
            counts.append(len(paths))
            errors.append(error)
        return {"count": np.array(counts), "error": np.array(errors)}

    def _open(
        self,
        checkpoint: Path,
        folder: Path,
        batch: int,
        device: str | None,
        who: str,
        threshold: float | None,
        rate: float | None,
    ) -> None:
        import torch

        torch.set_num_threads(self.cpus)
        self.detector = open_detector(checkpoint, device)
        self.calibration = select_calibration(self.detector, rate, False)
        self.pool = ThreadPoolExecutor(self.cpus)
        self.folder, self.batch, self.threshold = folder, batch, threshold
        self.about = {"identity": who, "recontrast": recontrast.__version__}
        self.about["worker"] = f"{socket.gethostname()}:{os.getpid()}"
        self.opened = True

    def _make(self, part: parquet_parts.Part) -> None:
        if not (self.folder / part.name).exists():  # else somebody wrote it and died before he could say so
            parquet_parts.begin(self.folder, part, TRIES)
            parquet_parts.write(self.folder, part, self.rows(part.paths), self.about)

    def rows(self, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The row of each image, in order."""
        files = ImageFiles([Path(path) for path in paths], self.pool)
        place = 0
        for maps, scores in self.detector.run(files, self.batch):
            for anomaly, score in zip(maps, scores.tolist(), strict=True):
                yield self._row(files, place, anomaly, score)
                place += 1

    def _row(self, files: ImageFiles, place: int, anomaly: np.ndarray, score: float) -> dict[str, Any]:
        path = files.paths[place]
        if place in files.errors:
            return {"path": str(path), "error": files.errors[place]}
        row: dict[str, Any] = {"path": str(path), "score": score}
        if self.threshold is not None:
            row["flagged"] = score >= self.threshold
        if self.calibration is not None:
            made = decide(self.calibration, anomaly, score, image_size(path), self.detector.recipe)
            row |= {"p_value": made.p_value, "decision": made.label, "regions": parquet_parts.region_rows(made.regions)}
        return row


def share(cpus: Sequence[int], workers: int) -> int:
    """CPUs for each of ``workers``, as many as let all of them fit onto machines with ``cpus``; 0: they do not."""
    return next((each for each in range(max(cpus, default=0), 0, -1) if sum(n // each for n in cpus) >= workers), 0)


def _work(ray: Any, left: Sequence[parquet_parts.Part], workers: int | None, settings: dict[str, Any]) -> Iterator[int]:
    """Have all parts made; yields how many images each held, as they are finished."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    on_gpu = gpus > 0 and settings["device"] != "cpu"
    wanted = workers or (gpus if on_gpu else max(sum(cpus) // CPUS_EACH, 1))
    if on_gpu and wanted > gpus:
        raise ValueError(f"--workers: wanted at most one for each of {gpus} GPUs, got {wanted}")
    each = share(cpus, wanted)
    if not each:
        raise ValueError(f"--workers: wanted at most one for each of {sum(cpus)} CPUs, got {wanted}")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"name": part.name, "paths": list(part.paths)} for part in left]
    todo = ray.data.from_items(rows, override_num_blocks=len(rows))  # a block is what Ray hands out, and again
    done = todo.map_batches(
        Worker,
        fn_constructor_kwargs={**settings, "cpus": each},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(wanted, len(rows))),
        num_cpus=each,
        num_gpus=1 if on_gpu else None,
    )
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise OSError(f"a worker stopped: {row['error']}")
            yield int(row["count"])
    except ray.exceptions.RayError as error:
        raise OSError(f"ray could not go on: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _cluster(ray: Any, address: str | None, cpus: int | None = None) -> Iterator[None]:
    """The cluster that we are in already, the one at ``address``, or one of this machine's for the time being."""
    if ray.is_initialized():
        yield
        return
    told = {"log_to_driver": False, "logging_level": "error"}
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # plans and durations
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **told)
        else:
            ray.init("local", include_dashboard=False, object_store_memory=STORE, _node_ip_address="127.0.0.1",
                     num_cpus=cpus or len(os.sched_getaffinity(0)), **told)  # fmt: skip
    except ConnectionError as error:
        where = address or os.environ.get("RAY_ADDRESS")
        raise OSError(f"--address: wanted a running Ray cluster, got none at {where}") from error
    except Exception as error:  # Ray raises no kind of its own where its processes do not come up in time
        if type(error) is not Exception:
            raise
        raise OSError(f"ray could not start here: {' '.join(str(error).split())[:300]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _ray(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before it is imported: it would report over the network
    if not (address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # one of our own listens on 127.0.0.1 alone
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns on stderr of what its own Ray Data does
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(MISSING) from error
    return ray
