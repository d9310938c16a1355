"""Mark of a result folder whose command has not finished, so that its results are never taken for whole.

A command that replaces results file by file first writes the mark, which lists the files, and removes the tables of the
earlier run. The mark goes in the same moment in which the tables of the new run appear.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from recontrast.data.atomic import replace_files
from recontrast.data.json_text import parse_json
from recontrast.data.locks import describe_process
from recontrast.data.regular_file import read_bytes
from recontrast.data.temporary import complete_commits


def name_mark(command: str) -> str:
    """Return the name of the file that marks the results of a command as unfinished."""
    return f"unfinished-{command}.json"


def mark_unfinished(folder: Path, command: str, files: Iterable[str], remove: Iterable[str] = ()) -> None:
    """Mark the results of a command as unfinished.

    Args:
        folder: Folder of the results.
        command: Name of the command, such as "predict".
        files: Files that the command may write or has to remove, relative to ``folder``.
        remove: Names of files in ``folder`` to remove at the same moment.

    Raises:
        OSError: If the mark cannot be written.
    """
    note = f"{command} has not finished: the results in this folder are not complete. Run the command again."
    content = {"note": note, **describe_process(), "files": sorted(files)}
    with replace_files(folder, remove=list(remove)) as staging:
        (staging / name_mark(command)).write_text(json.dumps(content, indent=1) + "\n")


def list_unfinished(folder: Path, command: str) -> set[str] | None:
    """List the files of an unfinished command.

    Args:
        folder: Folder of the results.
        command: Name of the command.

    Returns:
        The files, relative to ``folder``; None if the folder has no mark.
    """
    try:
        content = parse_json(read_bytes(folder / name_mark(command)))
        return {name for name in content["files"] if is_inside(name)}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # damaged
        return set()


def check_finished(folder: Path, command: str) -> None:
    """Check that the results of a command are complete, before they are read.

    Args:
        folder: Folder of the results.
        command: Name of the command.

    Raises:
        ValueError: If the command has not finished.
    """
    complete_commits(folder)
    if os.path.lexists(folder / name_mark(command)):
        raise ValueError(f"{folder}: wanted the results of a finished {command}, got unfinished ones: run it again")


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and the folders that become empty.

    Args:
        folder: Folder of the results.
        names: Files to remove, relative to ``folder``. Those outside, and those that do not exist, are passed over.

    Raises:
        OSError: If a file cannot be removed.
    """
    for name in filter(is_inside, names):
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):  # already gone, or not ours
            (folder / name).unlink()
        for parent in (folder / name).parents[: len(PurePosixPath(name).parents) - 1]:
            with suppress(OSError, ValueError):  # not empty
                parent.rmdir()


def is_inside(name: object) -> bool:
    """Return whether a value is the relative path of a file below a folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
