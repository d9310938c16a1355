"""Sphinx configuration of the guide: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``."""

import os
import re

import recontrast

project = "recontrast"
version = release = recontrast.__version__
project_copyright = "the recontrast authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links such as page.md#heading, which work on a code host too
default_role = "py:obj"  # `name` in docstrings links to that name where the reference has it

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "recontrast"
html_static_path = ["static"]
html_css_files = ["guide.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False

# Pages link to Markdown files of the repository outside of docs/, which a code host shows. The site links to them there
# if the variable has the address of the repository's files, and otherwise only names them.
REPOSITORY = os.environ.get("RECONTRAST_REPOSITORY", "")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([\w/]+\.md)(#[\w-]+)?\)")


def replace_outside_links(app, name: str, content: list[str]) -> None:
    """Replace links such as ``[text](../benchmarks/README.md#part)`` in the source of a page."""

    def replacement(match: re.Match[str]) -> str:
        text, path, anchor = match.groups(default="")
        if REPOSITORY:
            return f"[{text}]({REPOSITORY.rstrip('/')}/{path}{anchor})"
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    content[0] = OUTSIDE.sub(replacement, content[0])


def setup(app) -> None:
    """Register the hook."""
    app.connect("source-read", replace_outside_links)
