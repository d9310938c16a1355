"""The page for the browser, and the page that describes the interface; neither loads anything from elsewhere."""

import json
from importlib.resources import files
from typing import Any

from recontrast.service.messages import Response
from recontrast.service.openapi import render_interface

# The browser loads nothing from other servers, runs no inline script, and shows the page in no frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin"}
_KINDS = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
_DOCS = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/page.css">
<title>Interface of the recontrast service</title>
</head>
<body>
<main class="docs">
<p><a href="/">Back to the page</a></p>
{body}
</main>
</body>
</html>
"""


def load_pages(described: dict[str, Any]) -> dict[str, Response]:
    """Return the pages and files of the service by path.

    Args:
        described: Description of the interface, see `recontrast.service.openapi.describe_interface`.
    """
    folder = files("recontrast.service")
    html = "text/html; charset=utf-8"
    pages = {"/": Response(folder.joinpath("page.html").read_bytes(), html, headers=_HEADERS)}
    for name, kind in _KINDS.items():
        pages[f"/{name}"] = Response(folder.joinpath(name).read_bytes(), kind, headers=_HEADERS)
    pages["/docs"] = Response(_DOCS.format(body=render_interface(described)).encode(), html, headers=_HEADERS)
    text = json.dumps(described, indent=1).encode() + b"\n"
    pages["/openapi.json"] = Response(text, "application/json", headers=_HEADERS)
    return pages
