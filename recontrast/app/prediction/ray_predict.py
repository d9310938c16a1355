"""Prediction by many workers with Ray Data: each loads the detector once, scores whole parts and writes them.

Only paths are sent between processes. If a worker dies, Ray gives its part to another one. If the driver dies, the same
call continues with the missing parts (`recontrast.app.prediction.parquet_parts`).
"""

import json
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import recontrast
from recontrast.app.errors import describe_error
from recontrast.app.prediction import parquet_parts
from recontrast.app.prediction.output_files import describe_image_error
from recontrast.data.atomic import replace_files
from recontrast.data.decode_budget import BUDGET, BYTES_IN_FLIGHT
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import image_size
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.roi import EACH
from recontrast.data.system import count_cpus
from recontrast.data.unfinished import mark_unfinished, name_mark
from recontrast.data.views import group_paths
from recontrast.inference.decisions import decide, select_calibration
from recontrast.inference.detector import Detector, open_detector, run_checked
from recontrast.registration import import_architectures, list_imported

MISSING = "--engine ray: wanted the package ray[data], got none installed: pip install 'ray[data]' pyarrow"
COMMAND = "predict-ray"  # in the name of the mark of unfinished results
TRIES = 4  # an error is raised after this many workers died on the same part; Ray would retry forever
STORE = 128 << 20  # bytes of Ray's object store on this machine; only paths pass through it
CONNECT_SECONDS = 10  # until a host must have answered
CPUS_EACH = 4  # CPUs per worker without GPUs; one network scales badly beyond that


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
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> parquet_parts.Summary:
    """Score images on all workers of a Ray cluster; images that an earlier call finished are not scored again.

    Writes ``OUT/scores.parquet``, a folder of parts that can be read as one table
    (`parquet_parts.build_schema`), and ``OUT/predict.json``. Detector, images and
    ``out`` must be at the same paths on every machine.

    Args:
        checkpoint: Path of a checkpoint or an exported file.
        inputs: Images, folders, or lists of images (see `parquet_parts.list_inputs`).
        out: Folder for the results.
        workers: Number of workers. None: one per GPU, or without GPUs one for every four CPUs.
        address: Address of a running cluster (``auto``, ``host:6379``). None: the address in RAY_ADDRESS, or a new
            cluster on this machine that ends with the call.
        part: Number of images per part. If a worker dies, its part is scored again.
        batch: Number of images per batch.
        threshold: Images with at least this score are flagged.
        rate: Promised false-alarm rate. None: the rate of the calibration.
        must_decide: Whether a detector without a calibration is an error.
        device: PyTorch device of the workers. None: the GPU, if Ray has one for each worker.
        overwrite: Whether a file predict.json that this package did not write may be replaced.
        on_progress: Called with the number of finished images and of all images.

    Returns:
        Counts over all requested images.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If an option is invalid, ``out`` holds results of another detector, or no worker could finish a
            part.
        OSError: If an input does not exist, or a result cannot be written.
    """
    for name, value in (("part", part), ("batch", batch), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"predict: {name}: wanted at least 1, got {value}")
    ray = _import_ray(address)
    checkpoint, out = Path(os.path.abspath(checkpoint)), Path(os.path.abspath(out))
    paths = parquet_parts.list_inputs(inputs)
    check_replaceable(out, ["predict.json"], overwrite=overwrite)
    detector = open_detector(checkpoint, "cpu")  # errors are raised here, before any worker starts
    _refuse_own_masks(detector, checkpoint)
    paths = list(map(str, group_paths(list(map(Path, paths)), detector.recipe.image_views)))
    select_calibration(detector, rate, must_decide, checkpoint)
    options = {"threshold": threshold, "rate": rate}
    identity = parquet_parts.compute_identity(checkpoint, options)
    folder = out / parquet_parts.FOLDER
    with lock_folder(out):
        parts = parquet_parts.plan_parts(paths, part, identity, folder)
        finished = len(paths) - sum(len(missing.paths) for missing in parts)
        folder.mkdir(parents=True, exist_ok=True)
        parquet_parts.remove_leftovers(folder)
        if parts:
            mark_unfinished(out, COMMAND, [], ["predict.json"])  # which describes the parts of the earlier call
            with _cluster(ray, address):
                settings = {"checkpoint": checkpoint, "folder": folder, "batch": batch, "device": device}
                settings["modules"] = list_imported()
                for count in _run_workers(ray, parts, workers, {**settings, "identity": identity, **options}):
                    finished += count
                    if on_progress is not None:
                        on_progress(finished, len(paths))
        elif on_progress is not None:
            on_progress(finished, len(paths))
        summary = parquet_parts.summarise(folder, paths)
        if not summary.scored:
            raise ValueError(f"none of {len(paths)} {detector.recipe.noun}s could be read: {summary.unread[0]}")
        description: dict[str, Any] = {
            "recontrast": recontrast.__version__,
            "checkpoint": str(checkpoint),
            "trained_on": detector.category,
        }
        description |= {"identity": identity, **options, "images": len(paths), "unread": len(summary.unread)}
        description["undecided"] = len(summary.undecided)
        with replace_files(out, remove=[name_mark(COMMAND)]) as staging:
            (staging / "predict.json").write_bytes((json.dumps(description, indent=1) + "\n").encode())
    return summary


def _refuse_own_masks(detector: Detector, checkpoint: Path) -> None:
    """Raise ValueError if each image needs a region of interest of its own, which the workers do not get."""
    if detector.recipe.roi == EACH:
        raise ValueError(
            f"{checkpoint}: wanted a detector with one region of interest or none for --engine ray, got one with a "
            "mask for each image"
        )


class Worker:
    """Code of a Ray process: loads the detector once and uses its share of the CPUs."""

    def __init__(self, cpus: int, **settings: Any) -> None:
        """Store the settings. `_load` uses them later: Ray would take an error here for a dead worker."""
        self.cpus, self.settings, self.loaded = cpus, settings, False

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Score and write parts; return the number of images and the error message of each."""
        counts, errors = [], []
        for name, paths in zip(parts["name"], parts["paths"], strict=True):
            error = ""
            try:
                if not self.loaded:
                    self._load(**self.settings)
                self._process(parquet_parts.Part(str(name), tuple(map(str, paths))))
            except (ValueError, OSError, RuntimeError) as raised:
                error = describe_error(raised)
            counts.append(len(paths))
            errors.append(error)
        return {"count": np.array(counts), "error": np.array(errors)}

    def _load(
        self,
        checkpoint: Path,
        folder: Path,
        batch: int,
        device: str | None,
        identity: str,
        threshold: float | None,
        rate: float | None,
        modules: Sequence[str] = (),
    ) -> None:
        import torch

        for module in modules:  # that the user has imported in the calling process
            import_architectures(module)

        torch.set_num_threads(self.cpus)
        # The workers of a machine share its memory.
        BUDGET.limit = max(BYTES_IN_FLIGHT * self.cpus // (os.cpu_count() or 1), 1)
        self.detector = open_detector(checkpoint, device)
        self.calibration = select_calibration(self.detector, rate, False)
        self.pool = ThreadPoolExecutor(self.cpus)
        self.folder, self.batch, self.threshold = folder, batch, threshold
        self.metadata = {"identity": identity, "recontrast": recontrast.__version__}
        self.metadata["worker"] = f"{socket.gethostname()}:{os.getpid()}"
        self.loaded = True

    def _process(self, part: parquet_parts.Part) -> None:
        if not (self.folder / part.name).exists():  # a worker may have died after writing it
            parquet_parts.mark_begun(self.folder, part, TRIES)
            parquet_parts.write_part(self.folder, part, self.rows(part.paths), self.metadata)

    def rows(self, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the row of each image, in order."""
        files = ImageFiles([Path(path) for path in paths], self.pool)
        position = 0
        for maps, scores in run_checked(self.detector, files, self.batch):
            for anomaly, score in zip(maps, scores.tolist(), strict=True):
                yield self._row(files, position, anomaly, score)
                position += 1

    def _row(self, files: ImageFiles, position: int, anomaly: np.ndarray, score: float) -> dict[str, Any]:
        path = files.paths[position]
        if position in files.errors:
            return {"path": str(path), "error": files.errors[position]}
        row: dict[str, Any] = {"path": str(path), "score": score}
        if self.threshold is not None and not math.isnan(score):
            row["flagged"] = score >= self.threshold
        if self.calibration is not None:
            try:
                shape: Sequence[int] | None = image_size(path)
            except (OSError, ValueError) as error:  # deleted or replaced after it was read: no regions in its pixels
                row["error"], shape = describe_image_error(str(path), error), None
            decision = decide(self.calibration, anomaly, score, shape or anomaly.shape, self.detector.recipe)
            row |= {"p_value": decision.p_value, "decision": decision.label}
            row |= {"regions": None if shape is None else parquet_parts.list_regions(decision.regions)}
        return row


def compute_cpus_per_worker(cpus: Sequence[int], workers: int) -> int:
    """Return the largest number of CPUs per worker for which all workers fit on the machines; 0 if there is none."""
    return next((each for each in range(max(cpus, default=0), 0, -1) if sum(n // each for n in cpus) >= workers), 0)


def _run_workers(
    ray: Any, parts: Sequence[parquet_parts.Part], workers: int | None, settings: dict[str, Any]
) -> Iterator[int]:
    """Score all parts; yield the number of images of each finished part."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    on_gpu = gpus > 0 and settings["device"] != "cpu"
    count = workers or (gpus if on_gpu else max(sum(cpus) // CPUS_EACH, 1))
    if on_gpu and count > gpus:
        raise ValueError(f"--workers: wanted at most one for each of {gpus} GPUs, got {count}")
    cpus_each = compute_cpus_per_worker(cpus, count)
    if not cpus_each:
        raise ValueError(f"--workers: wanted at most one for each of {sum(cpus)} CPUs, got {count}")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"name": part.name, "paths": list(part.paths)} for part in parts]
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))  # Ray assigns, and repeats, whole blocks
    results = blocks.map_batches(
        Worker,
        fn_constructor_kwargs={**settings, "cpus": cpus_each},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(count, len(rows))),
        num_cpus=cpus_each,
        num_gpus=1 if on_gpu else None,
    )
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise OSError(f"a worker stopped: {row['error']}")
            yield int(row["count"])
    except ray.exceptions.RayError as error:
        raise OSError(f"ray could not continue: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _cluster(ray: Any, address: str | None, cpus: int | None = None) -> Iterator[None]:
    """Connect to the current cluster, the one at ``address``, or a new one on this machine."""
    if ray.is_initialized():
        yield
        return
    sigterm_handler = signal.getsignal(signal.SIGTERM)  # ray.init replaces it, and ray.shutdown does not restore it
    try:
        _connect(ray, address, cpus)
        yield
    finally:
        ray.shutdown()
        if sigterm_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)


def _connect(ray: Any, address: str | None, cpus: int | None) -> None:
    used = address or os.environ.get("RAY_ADDRESS")
    if used:
        _check_reachable(used)
    logging_options = {"log_to_driver": False, "logging_level": "error"}
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # hides execution plans and durations
    try:
        if used:
            with _hide_stderr():
                ray.init(address=address, **logging_options)
        else:
            ray.init("local", include_dashboard=False, object_store_memory=STORE, _node_ip_address="127.0.0.1",
                     num_cpus=cpus or count_cpus(), **logging_options)  # fmt: skip
    except ConnectionError as error:
        raise OSError(
            f"--address: wanted a running Ray cluster, got none at {used} that lets this process in: if it has a "
            "token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise OSError(f"--engine ray: wanted a token for Ray, got none: {str(error).split('. Ensure')[0]}") from error
    except Exception as error:  # Ray raises a plain Exception if its processes do not start in time
        if type(error) is not Exception:
            raise
        raise OSError(f"ray could not start here: {' '.join(str(error).split())[:300]}") from error


def _check_reachable(address: str) -> None:
    """Raise an error at once if no process listens at an address: Ray would try for minutes.

    Raises:
        ValueError: If it is not an address.
        OSError: If there is no connection.
    """
    if address in ("auto", "local") or ("://" in address and not address.startswith("ray://")):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ValueError(f"--address: wanted auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--address: wanted a running Ray cluster, got none at {address}: {reason}") from error


@contextmanager
def _hide_stderr() -> Iterator[None]:
    """Hide what Ray's C++ code prints while it connects: every second an error that is also raised."""
    try:
        saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # closed
        yield
        return
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _import_ray(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # set before the import: Ray would send usage reports
    if not (address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a local cluster listens on 127.0.0.1 only
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray prints warnings about Ray Data itself
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(MISSING) from error
    return ray
