"""The page for the browser, and the page that describes the interface; neither loads anything from elsewhere."""

import json
from importlib.resources import files
from typing import Any

from recontrast.data.html_page import render_page
from recontrast.service.messages import Response
from recontrast.service.openapi import render_interface

# The browser loads nothing from other servers, runs no inline script, and shows the page in no frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin"}
_KINDS = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
_STYLE = '<link rel="stylesheet" href="/page.css">'
_DOCS = """<main class="docs">
<p><a href="/">Back to the page</a></p>
{interface}
</main>"""


def load_pages(described: dict[str, Any]) -> dict[str, Response]:
    """Return the pages and files of the service by path.

    Args:
        described: Description of the interface, see `recontrast.service.openapi.describe_interface`.
    """
    folder = files("recontrast.service")
    pages = {}
    for path, title, body in (
        ("/", "recontrast: inspect an image", folder.joinpath("body.html").read_text(encoding="utf-8").rstrip()),
        ("/docs", "Interface of the recontrast service", _DOCS.format(interface=render_interface(described))),
    ):
        content = render_page(title, body, _STYLE).encode()
        pages[path] = Response(content, "text/html; charset=utf-8", headers=_HEADERS)
    for name, kind in _KINDS.items():
        pages[f"/{name}"] = Response(folder.joinpath(name).read_bytes(), kind, headers=_HEADERS)
    text = json.dumps(described, indent=1).encode() + b"\n"
    pages["/openapi.json"] = Response(text, "application/json", headers=_HEADERS)
    return pages
