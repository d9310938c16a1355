"""Description of the interface: OpenAPI 3.1 as JSON, and the same as a page without scripts.

The format: https://spec.openapis.org/oas/v3.1.0
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import recontrast
from recontrast.data.formats import NAMES
from recontrast.service.answers import SIDES
from recontrast.service.limits import Limits

_NULLABLE_NUMBER = {"type": ["number", "null"]}
_REGION = {
    "type": "object",
    "description": "8-connected region above the pixel threshold, in pixels of the upright image.",
    "properties": {
        **{name: {"type": "integer"} for name in ("area", "top", "left", "height", "width", "peak_row", "peak_column")},
        "peak": {"type": "number"},
    },
}
_ANSWER = {
    "type": "object",
    "properties": {
        "detector": {"type": "string"},
        "sha256": {"type": "string", "description": "SHA-256 of the file of the detector."},
        "height": {"type": "integer", "description": "Height of the upright image in pixels."},
        "width": {"type": "integer"},
        "score": {**_NULLABLE_NUMBER, "description": "Anomaly score; null if the map is not finite."},
        "p_value": {**_NULLABLE_NUMBER, "description": "Conformal p-value; null without a calibration."},
        "decision": {"type": ["string", "null"], "enum": ["good", "defect", "undecided", None]},
        "threshold": {**_NULLABLE_NUMBER, "description": "Images with a higher score are defects."},
        "false_alarm_rate": {**_NULLABLE_NUMBER, "description": "Promised share of good images called defects."},
        "regions": {"type": ["array", "null"], "items": {"$ref": "#/components/schemas/Region"}},
        "region_count": {"type": "integer", "description": "Number of regions; an answer lists at most 1000."},
        "map_scale": {"type": "number", "description": "With image=map: map value = stored integer x map_scale."},
        "image": {"type": "string", "description": "With inline=true: the picture as a data URL."},
    },
}
_ERRORS = {
    400: "Empty body, damaged form, a view that is missing or sent twice, or an invalid parameter",
    401: "Wrong or missing token",
    404: "Unknown detector",
    408: "The body took too long",
    409: "Decisions asked of a detector without a calibration",
    413: "Too many bytes or pixels",
    415: "Another media type, or no image of a known format",
    422: "An image that cannot be decoded, several images in one file, or views of different sizes",
    429: "The queue is full; Retry-After says when to try again",
}


def _parameter(name: str, text: str, schema: dict[str, Any], where: str = "query") -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "description": text, "schema": schema}


def _describe_predict(names: Sequence[str], limits: Limits, in_path: bool) -> dict[str, Any]:
    """Return the operation of /predict, or of /predict/{detector}."""
    one = {"type": "string", "enum": list(names)}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    binary = {"type": "string", "format": "binary"}
    file = {"schema": binary}
    form = {"schema": {"type": "object", "properties": {"image": binary}, "additionalProperties": binary}}
    return {
        "summary": "Score one image, or one part with all its views",
        "description": f"The body is a {NAMES} file of at most {limits.body_bytes:,} bytes and {limits.pixels:,} "
        "pixels, or a form with one such file. A detector of parts with several views takes all views of a part at "
        "once, within the same limits: a file of pages, or a form with one file for each view. The name of the field, "
        "or else that of the file, is the name of the view.",
        "operationId": "predictNamed" if in_path else "predict",
        "parameters": [
            _parameter("detector", "Name of the detector; needed only if there are several.", one,
                       "path" if in_path else "query"),
            _parameter("image", "Answer with a PNG: the anomaly map (16-bit grey) or the heat map over the image.",
                       {"type": "string", "enum": ["map", "overlay"]}),
            _parameter("inline", "Put the picture into the JSON, as a data URL.", {"type": "boolean"}),
            _parameter("side", "Largest side of the overlay in pixels.",
                       {"type": "integer", "minimum": SIDES[0], "maximum": SIDES[1]}),
            _parameter("decide", "Answer 409 if no decision can be made.", {"type": "boolean"}),
            _parameter("false_alarm_rate", "Decide at this rate instead of the calibrated one.", {"type": "number"}),
        ],
        "requestBody": {"required": True, "content": {
            "image/*": file, "application/octet-stream": file, "multipart/form-data": form,
        }},
        "responses": {
            "200": {"description": "Score and decision", "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}, "image/png": file,
            }},
            **{str(status): {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }  # fmt: skip


def describe_interface(names: Sequence[str], limits: Limits, has_token: bool) -> dict[str, Any]:
    """Return the description of the interface, as JSON values.

    Args:
        names: Names of the detectors.
        limits: Limits of the service.
        has_token: Whether requests need a token.
    """

    def get(summary: str, kind: str = "application/json", is_open: bool = False) -> dict[str, Any]:
        operation = {"summary": summary, "responses": {"200": {"description": summary, "content": {kind: {}}}}}
        return {"get": {**operation, **({"security": []} if is_open else {})}}

    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "recontrast", "version": recontrast.__version__,
            "description": "Scores images for anomalies, and decides at a promised false-alarm rate.",
        },
        "paths": {
            "/predict": {"post": _describe_predict(names, limits, in_path=False)},
            "/predict/{detector}": {"post": _describe_predict(names, limits, in_path=True)},
            "/health": get("Whether the service answers", is_open=True),
            "/model": get("The detectors, their calibrations, limits and versions"),
            "/metrics": get("Counters in the text format of Prometheus", "text/plain"),
        },
        "components": {"schemas": {
            "Answer": _ANSWER, "Region": _REGION,
            "Error": {"type": "object", "properties": {"error": {"type": "string"}}},
        }},
    }  # fmt: skip
    if has_token:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return described


def render_interface(described: dict[str, Any]) -> str:
    """Return the body of the page that shows a description of `describe_interface`."""
    parts = [f"<h1>{escape(described['info']['title'])} {escape(described['info']['version'])}</h1>"]
    parts.append('<p>As JSON: <a href="/openapi.json">openapi.json</a> (OpenAPI 3.1). Errors are JSON with one '
                 "sentence, <code>error</code>.</p>")  # fmt: skip
    if "security" in described:
        parts.append("<p>Every request but <code>/health</code> needs the header <code>Authorization: Bearer</code> "
                     "and the token.</p>")  # fmt: skip
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation['summary'])}. {escape(operation.get('description', ''))}</p>")
            rows = [(p["name"], p["description"], _name_type(p["schema"])) for p in operation.get("parameters", ())]
            parts.append(_render_table(("parameter", "meaning", "value"), rows))
            rows = [(status, answer["description"], "") for status, answer in operation["responses"].items()]
            parts.append(_render_table(("status", "meaning", ""), rows) + "</section>")
    for name, schema in described["components"]["schemas"].items():
        rows = [(key, value.get("description", ""), _name_type(value)) for key, value in schema["properties"].items()]
        parts.append(f"<section><h2>{escape(name)}</h2>{_render_table(('field', 'meaning', 'value'), rows)}</section>")
    return "\n".join(parts)


def _name_type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join("null" if value is None else str(value) for value in schema["enum"])
    kind = schema.get("type", "")
    return kind if isinstance(kind, str) else " or ".join(kind)


def _render_table(head: tuple[str, str, str], rows: Sequence[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    columns = range(3 if head[2] else 2)
    cells = "".join(f"<th>{escape(head[column])}</th>" for column in columns)
    lines = "".join("<tr>" + "".join(f"<td>{escape(row[column])}</td>" for column in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
