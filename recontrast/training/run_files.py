"""Files of a training run: checkpoint, log and recipe, which always belong to the same run."""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from recontrast import checkpoint
from recontrast.checkpoint import Checkpoint
from recontrast.data.atomic import replace_files
from recontrast.data.json_text import parse_json
from recontrast.data.locks import lock_folder
from recontrast.data.regular_file import read_bytes
from recontrast.data.temporary import temporary_folder
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.training.json_log import JsonLog

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
RESULTS = ("results.json", "results.csv", "results.md", "scores.csv")  # of an evaluation


class RunFiles:
    """Checkpoint, log and recipe in the folder of a run, which is locked within the ``with`` block.

    A new run that replaces an earlier one keeps its log and recipe in a temporary folder until its first checkpoint is
    complete. Then all three replace those of the earlier run at once, and the results of its evaluation are removed.

    Args:
        folder: Folder of the run; created if missing.
        recipe: Recipe of the run.
        data: Description of the training images for the first line of the log; None for images in memory.

    Raises:
        ValueError: If another process writes to the folder.
        OSError: If a file cannot be written.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: str | None = None) -> None:
        self.folder, self.recipe, self.data = folder, recipe, data
        self._staging: Path | None = None
        self._log: JsonLog | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "RunFiles":
        """Lock the folder."""
        self._stack.enter_context(lock_folder(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the temporary files and release the lock."""
        self._stack.close()

    def start(self, step: int) -> None:
        """Write the recipe, and begin or continue the log.

        Args:
            step: Number of completed steps of the resumed run; 0 begins a new one.
        """
        target = self.folder
        if not step and (self.folder / CHECKPOINT).exists():
            target = self._staging = self._stack.enter_context(temporary_folder(self.folder))
        self._log = JsonLog(target / LOG, keep=step)
        yaml_file.write_recipe(target / yaml_file.FILE_NAME, self.recipe)

    def log(self, **values: Any) -> None:
        """Append a line to the log, see `JsonLog.write`. The first line also describes the training images."""
        if self._log is not None:
            if self.data is not None and "data" not in self._log.names:
                values["data"] = self.data
            self._log.write(**values)

    def save(self, content: Checkpoint) -> None:
        """Write a checkpoint; the first one of a run completes the replacement of an earlier run.

        Args:
            content: Checkpoint to write.
        """
        if self._staging is None:
            checkpoint.save(self.folder / CHECKPOINT, content)
            return
        with replace_files(self.folder, remove=list_results(self.folder)) as staging:
            checkpoint.save(staging / CHECKPOINT, content)
            for name in (LOG, yaml_file.FILE_NAME):
                os.replace(self._staging / name, staging / name)
        self._staging = None
        if self._log is not None:
            self._log.path = self.folder / LOG


def list_results(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of an evaluation, if an evaluation of the run in ``folder`` wrote any.

    Args:
        folder: Folder of a run.

    Returns:
        Names of files, which need not exist; empty if the results are not those of this package.
    """
    try:
        return RESULTS if "rows" in parse_json(read_bytes(folder / RESULTS[0])) else ()
    except (OSError, ValueError, TypeError):
        return ()
