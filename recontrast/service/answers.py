"""Answers: score, decision and regions as JSON, and the map or the overlay as PNG."""

import base64
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps
from recontrast.inference.decisions import decide
from recontrast.inference.detector import Detector
from recontrast.inference.drawing import draw_overlay
from recontrast.service.messages import RequestError, Response, json_response
from recontrast.service.uploads import Upload

SIDES = (16, 16384)  # lowest and highest ?side=, pixels
MOST_REGIONS = 1000  # in one answer


@dataclass(frozen=True)
class AnswerOptions:
    """What a request asks for.

    Attributes:
        image: Picture in the answer: the map, the overlay, or None.
        inline: Whether the picture is part of the JSON, in base64.
        side: Largest side of the overlay in pixels; None: that of the image.
        decide: Whether decisions are required.
        rate: False-alarm rate that replaces the one of the calibration.
    """

    image: Literal["map", "overlay"] | None = None
    inline: bool = False
    side: int | None = None
    decide: bool = False
    rate: float | None = None


def parse_options(query: dict[str, str]) -> AnswerOptions:
    """Parse the query of a request.

    Args:
        query: Parameters; ``detector`` is left to the caller.

    Returns:
        The options.

    Raises:
        RequestError: If a parameter is unknown or its value invalid.
    """
    known = ("image", "inline", "side", "decide", "false_alarm_rate", "detector")
    for name in query:
        if name not in known:
            raise RequestError(400, f"query: wanted {', '.join(known[:-1])} or {known[-1]}, got {name[:40]!r}")
    image = query.get("image")
    if image not in (None, "map", "overlay"):
        raise RequestError(400, f"image: wanted map or overlay, got {str(image)[:40]!r}")
    flags = {}
    for name in ("inline", "decide"):
        text = query.get(name, "false").lower()
        if text not in ("true", "false", "1", "0"):
            raise RequestError(400, f"{name}: wanted true or false, got {text[:40]!r}")
        flags[name] = text in ("true", "1")
    side, rate = _parse_number(query, "side", *SIDES), _parse_number(query, "false_alarm_rate", 0, 1)
    return AnswerOptions(image, flags["inline"], None if side is None else int(side), flags["decide"], rate)  # type: ignore[arg-type]


def _parse_number(query: dict[str, str], name: str, low: float, high: float) -> float | None:
    if name not in query:
        return None
    try:
        value = float(query[name])
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise RequestError(400, f"{name}: wanted a number from {low:g} to {high:g}, got {query[name][:40]!r}")
    return value


def select_calibration(detector: Detector, options: AnswerOptions) -> Calibration | None:
    """Return the calibration that decides, or None.

    Raises:
        RequestError: If decisions are required and the detector has no calibration, or one that is too small for the
            rate.
    """
    calibration = detector.calibration
    if calibration is None:
        if options.decide or options.rate is not None:
            note = detector.calibration_note or "it was not calibrated: recontrast calibrate does so"
            raise RequestError(409, f"decisions: wanted a detector with a calibration, got one without: {note}")
        return None
    if options.rate is None:
        return calibration
    try:
        return calibration.with_rate(options.rate)
    except ValueError as error:
        raise RequestError(400, str(error)) from None


def build_answer(
    name: str, sha256: str, detector: Detector, calibration: Calibration | None, upload: Upload,
    anomaly: NDArray[np.float32], score: float, options: AnswerOptions,
) -> tuple[Response, str | None]:  # fmt: skip
    """Build the response to one image.

    Args:
        name: Name of the detector.
        sha256: SHA-256 of its file.
        detector: The detector.
        calibration: Calibration for the decision, or None.
        upload: The image.
        anomaly: Its map, (h, w).
        score: Its score; NaN if the map is not finite.
        options: What the request asks for.

    Returns:
        The response, which is JSON or the picture alone, and the decision.
    """
    is_finite = math.isfinite(score)
    height, width = upload.shape
    content: dict[str, Any] = {"detector": name, "sha256": sha256, "height": height, "width": width}
    content["score"] = float(f"{score:.9g}") if is_finite else None
    content |= dict.fromkeys(("p_value", "decision", "threshold", "false_alarm_rate", "regions"))
    if calibration is not None:
        decision = decide(calibration, anomaly, score, upload.shape, detector.recipe)
        content["p_value"] = decision.p_value if is_finite else None
        content["decision"] = decision.label
        content["threshold"], content["false_alarm_rate"] = calibration.threshold, calibration.rate
        regions = () if decision.label == "good" and calibration.pixel_threshold is not None else decision.regions
        if regions is not None:
            content["regions"] = [region.to_dict() for region in regions[:MOST_REGIONS]]
            content["region_count"] = len(regions)
    if options.image is None:
        return json_response(content), content["decision"]
    if options.image == "map":
        picture = heatmaps.encode_png(heatmaps.to_uint16(anomaly, detector.max_map_value))
        content["map_scale"] = detector.max_map_value / 65535
    else:
        outlined = calibration.pixel_threshold if calibration is not None and content["decision"] == "defect" else None
        drawn = draw_overlay(upload.image, anomaly, detector.recipe, calibration, outlined, options.side)
        picture = heatmaps.encode_png(drawn)
    if options.inline:
        content["image"] = "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
        return json_response(content), content["decision"]
    shown = ("detector", "score", "p_value", "decision", "map_scale")
    headers = {_name_header(key): str(content[key]) for key in shown if content.get(key) is not None}
    return Response(picture, "image/png", headers=headers), content["decision"]


def _name_header(key: str) -> str:
    return f"X-Recontrast-{key.replace('_', '-').title()}"
