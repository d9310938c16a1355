"""The runnable blocks of Markdown pages, for ``.ci/walk`` and the tests.

A fenced block of ``sh`` or ``python`` is meant to run, the blocks of a page in order and in one folder. Exceptions:

* ``<!-- not run: REASON -->`` on the line above the fence: the block is not run.
* A paragraph above the fence that says "saved as `NAME.py`" (or "save ... as"): the block is written to that file.
* ``<!-- continues: PAGE.md -->`` anywhere on the page: the page starts with the files that PAGE left.
"""

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
NOT_RUN = re.compile(r"<!-- not run: (.*?) -->")
SAVED = re.compile(r"\b[Ss]aved?\b[^`]*\bas `([\w.]+\.py)`")
CONTINUES = re.compile(r"<!-- continues: (\S+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file.
        line: number of its first line of content, from 1.
        language: "sh" or "python".
        text: its content.
        reason: why it is not run; None: it is run.
        file: name under which it is saved in place of being run, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    file: str | None


def read_blocks(page: Path) -> list[Block]:
    """The ``sh`` and ``python`` blocks of ``page``, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, start, language = [], None, ""
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if start is None and fence:
            start, language = number, fence[1]
        elif start is not None and line.startswith("```"):
            if language in ("sh", "python"):
                above = _above(lines, start)
                reason, saved = NOT_RUN.search(above), SAVED.search(above)
                blocks.append(
                    Block(
                        page, start + 2, language, "\n".join(lines[start + 1 : number]) + "\n",
                        reason and reason[1], saved and saved[1],
                    )
                )  # fmt: skip
            start = None
    return blocks


def _above(lines: list[str], fence: int) -> str:
    """The paragraph that ends directly above the fence, or one blank line above it."""
    end = fence - 1 if fence and not lines[fence - 1].strip() else fence
    start = end
    while start and lines[start - 1].strip() and not lines[start - 1].startswith("```"):
        start -= 1
    return " ".join(lines[start:end])


def previous_page(page: Path) -> Path | None:
    """The page whose files ``page`` starts with, or None."""
    named = CONTINUES.search(page.read_text(encoding="utf-8"))
    return page.parent / named[1] if named else None
