"""The routes of the service: predict, health, model, metrics, the page and the description of the interface."""

import asyncio
import functools
import math
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import recontrast
from recontrast.calibration.conformal import describe_promise
from recontrast.service.access import check_access, check_origin
from recontrast.service.answers import build_answer, parse_options, select_calibration
from recontrast.service.batches import BatchThread, Job, MapAndScore
from recontrast.service.counters import Counters, Labels
from recontrast.service.detectors import LoadedDetector, ServedDetector
from recontrast.service.limits import Limits
from recontrast.service.messages import Request, RequestError, Response, json_response
from recontrast.service.openapi import describe_interface
from recontrast.service.pages import load_pages
from recontrast.service.uploads import Upload, decode_upload, find_images

PACKAGES = ("torch", "numpy", "pillow", "onnxruntime", "openvino", "h11")


class Application:
    """Answers requests.

    Args:
        detectors: Detectors by name.
        batches: Thread that scores images.
        pool: Threads that decode images and draw pictures.
        limits: Limits of the service.
        token: Token that requests must bring, or None.

    Attributes:
        counters: Counters of requests and images.
        is_stopping: Whether the service stops.
        count_connections: Returns the number of open connections.
    """

    def __init__(
        self, detectors: Mapping[str, ServedDetector], batches: BatchThread, pool: ThreadPoolExecutor, limits: Limits,
        token: str | None,
    ) -> None:  # fmt: skip
        self._detectors, self._batches, self._pool = dict(detectors), batches, pool
        self._limits, self._token = limits, token
        self._active = 0  # images that wait or are scored
        self.counters = Counters()
        self.is_stopping = False
        self.count_connections: Callable[[], int] = int
        self._pages = load_pages(describe_interface(list(detectors), limits, token is not None))
        self._routes = {"/health": self._health, "/model": self._model, "/metrics": self._metrics}

    async def handle(self, request: Request) -> Response:
        """Answer a request.

        Args:
            request: The request.

        Returns:
            The response; errors of the client are responses too.
        """
        path = request.path
        is_predict = path == "/predict" or path.startswith("/predict/")
        is_known = is_predict or path in self._routes or path in self._pages
        status = 500
        try:
            response = await self._route(request, is_predict)
            status = response.status
            return response
        except RequestError as error:
            status = error.status
            return error.to_response()
        except OSError:
            status = 499  # the client has gone
            raise
        finally:
            self.counters.count_request("/predict" if is_predict else path if is_known else "other", status)

    async def _route(self, request: Request, is_predict: bool) -> Response:
        check_origin(request, self._token)
        path, is_read = request.path, request.method in ("GET", "HEAD")
        if is_predict:
            if request.method != "POST":
                raise RequestError(405, f"{path}: wanted POST, got {request.method}", {"Allow": "POST"})
            check_access(request, self._token)
            return await self._predict(request)
        if path not in self._routes and path not in self._pages:
            raise RequestError(404, "path: wanted /predict, /health, /model, /metrics, /docs or /, got another")
        if not is_read:
            raise RequestError(405, f"{path}: wanted GET, got {request.method}", {"Allow": "GET, HEAD"})
        if path in self._pages:
            return self._pages[path]
        if path != "/health":
            check_access(request, self._token)
        return self._routes[path]()

    async def _predict(self, request: Request) -> Response:
        """Score one image. What is wrong with the request is said before its body is read, as far as possible."""
        options = parse_options(request.query)
        served = self._select_detector(request)
        select_calibration(served.current.detector, options)
        self._check_queue()
        body = await request.read()
        begin = time.perf_counter()
        loaded = served.current
        content = find_images(body, request.headers.get("content-type"), loaded.detector.recipe.image_views)
        self._check_queue()  # others may have come while the body was read
        self._active += 1
        self.counters.count_accepted()
        self._batches.expect()
        try:
            calibration = select_calibration(loaded.detector, options)
            upload, (anomaly, score) = await self._score(request, loaded, content)
            render = functools.partial(
                build_answer, served.name, loaded.sha256, loaded.detector, calibration, upload, anomaly, score, options
            )
            response, decision = await asyncio.get_running_loop().run_in_executor(self._pool, render)
            self.counters.count_scored(served.name, decision or "none", time.perf_counter() - begin)
            return response
        finally:
            self._active -= 1
            self.counters.count_answered()

    async def _score(
        self, request: Request, loaded: LoadedDetector, content: list[bytes]
    ) -> tuple[Upload, MapAndScore]:
        """Return the decoded image, and its map and score."""

        def submit() -> Job:
            job = None
            try:
                views = loaded.detector.recipe.image_views
                upload = decode_upload(content, loaded.options, self._limits.pixels, views)
                job = Job(loaded.detector, upload, request.is_connected)
            finally:
                if job is None:
                    self._batches.withdraw()
            self._batches.submit(job)
            return job

        job = await asyncio.get_running_loop().run_in_executor(self._pool, submit)
        return job.upload, await asyncio.wrap_future(job.result)

    def _check_queue(self) -> None:
        if self._active < self._limits.queue:
            return
        images = sum(size * count for size, count in self._batches.sizes.items())
        seconds = self._active * self._batches.seconds / images if images else 1
        text = f"queue: wanted at most {self._limits.queue} images at a time, got more: try again later"
        raise RequestError(429, text, {"Retry-After": str(max(math.ceil(seconds), 1))})

    def _select_detector(self, request: Request) -> ServedDetector:
        """Return the detector that a request names by its path or by ``?detector=``; one alone needs no name."""
        in_path, in_query = request.path.removeprefix("/predict").strip("/"), request.query.get("detector")
        name = in_path or in_query
        if in_path and in_query not in (None, in_path):
            raise RequestError(400, "detector: wanted one name, got one in the path and another in the query")
        if not name and len(self._detectors) == 1:
            return next(iter(self._detectors.values()))
        names = ", ".join(self._detectors)
        if not name:
            raise RequestError(400, f"detector: wanted ?detector= with one of {names}, got none")
        if name not in self._detectors:
            raise RequestError(404, f"detector: wanted one of {names}, got {name[:64]!r}")
        return self._detectors[name]

    def _health(self) -> Response:
        state = "stopping" if self.is_stopping else "ok"
        return json_response({"status": state}, 503 if self.is_stopping else 200)

    def _model(self) -> Response:
        limits = {"bytes": self._limits.body_bytes, "pixels": self._limits.pixels, "queue": self._limits.queue}
        content = {
            "detectors": [describe_detector(served) for served in self._detectors.values()],
            "limits": limits, "batch": self._batches.batch,
            "versions": {"recontrast": recontrast.__version__, "python": platform.python_version(), **find_versions()},
        }  # fmt: skip
        return json_response(content)

    def _metrics(self) -> Response:
        served = self._detectors.values()
        batches: list[tuple[Labels, float]]
        reloads: list[tuple[Labels, float]]
        about: list[tuple[Labels, float]]
        batches = [({"images": str(size)}, float(count)) for size, count in sorted(self._batches.sizes.items())]
        reloads = [({"detector": s.name, "outcome": k}, float(n)) for s in served for k, n in s.reloads.items()]
        about = [({"detector": s.name, "sha256": s.current.sha256}, 1.0) for s in served]
        text = self.counters.format((
            ("active_images", "gauge", "Images that wait or are scored.", [({}, float(self._active))]),
            ("queue_limit", "gauge", "Largest number of active images.", [({}, float(self._limits.queue))]),
            ("connections", "gauge", "Open connections.", [({}, float(self.count_connections()))]),
            ("batches_total", "counter", "Batches by their number of images.", batches),
            ("inference_seconds_total", "counter", "Time in the detectors.", [({}, self._batches.seconds)]),
            ("reloads_total", "counter", "Changed files that were loaded, or failed.", reloads),
            ("detector_info", "gauge", "The files that run.", about),
        ))  # fmt: skip
        return Response(text.encode(), "text/plain; version=0.0.4; charset=utf-8")


def describe_detector(served: ServedDetector) -> dict[str, Any]:
    """Return what ``/model`` says of a detector."""
    loaded = served.current
    detector, recipe, calibration = loaded.detector, loaded.detector.recipe, loaded.detector.calibration
    promise = None
    if calibration is not None:
        stored = {k: v for k, v in calibration.to_dict().items() if k not in ("scores", "looks", "source")}
        # The origin of the images may be a path of this machine.
        sentences = describe_promise(replace(calibration, source="those of its calibration"), recipe.noun)
        promise = {"images": calibration.count, **stored, "promise": sentences}
    return {
        "name": served.name,
        "file": served.file.name,
        "kind": served.file.suffix.lstrip("."),
        "sha256": loaded.sha256,
        "loaded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(loaded.since)),
        "trained_on": detector.category,
        "architecture": recipe.architecture if isinstance(recipe.architecture, str) else str(recipe.architecture),
        "backbone": recipe.backbone,
        "size": list(recipe.out),
        "tile": recipe.tile,
        "views": None
        if recipe.image_views is None
        else {
            "from": recipe.views_from,
            "names": list(recipe.view_names),
            "map": recipe.view_map,
        },
        "score": recipe.score,
        "map_range": [0.0, detector.max_map_value],
        "calibration": promise,
        "calibration_note": detector.calibration_note,
    }


def find_versions() -> dict[str, str]:
    """Return the versions of the packages that compute scores, as far as they are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
