"""HTML pages: the head that all of them share, and pages that one file holds."""

from datetime import datetime
from html import escape
from importlib.resources import files

# The browser refuses to load anything from outside the file, and runs no script but that of the page if it has one.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SCRIPT_POLICY = f"{POLICY}; script-src 'unsafe-inline'"


def render_page(title: str, body: str, head: str) -> str:
    """Return an HTML page.

    Args:
        title: Title, plain text.
        body: HTML between ``<body>`` and ``</body>``.
        head: HTML of further elements of the head, such as the style.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
{head}
</head>
<body>
{body}
</body>
</html>
"""


def render_single_file(title: str, body: str, *, generator: str, style: str, script: str = "") -> str:
    """Return an HTML page that needs no other file: it loads nothing but its own style, script and data URIs.

    Args:
        title: Title, plain text.
        body: HTML between ``<body>`` and ``</body>``.
        generator: What wrote the page. `recontrast.data.own_files.is_own` recognises pages by it.
        style: CSS.
        script: JavaScript that runs at the end of the body; empty for none.
    """
    policy = SCRIPT_POLICY if script else POLICY
    head = f"""<meta name="generator" content="{escape(generator)}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{style}</style>"""
    return render_page(title, f"{body}\n<script>{script}</script>" if script else body, head)


def read_style(*packages: str) -> str:
    """Return the ``page.css`` of packages, joined.

    Args:
        packages: Names of packages; later ones override earlier ones.
    """
    return "".join(files(package).joinpath("page.css").read_text(encoding="utf-8") for package in packages)


def render_today() -> str:
    """Return the HTML of today's date, with the time of day in the ``datetime`` attribute."""
    date = datetime.now().astimezone()
    return f'<time datetime="{date.isoformat(timespec="seconds")}">{date.day} {date:%B %Y}</time>'
