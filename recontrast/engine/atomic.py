"""Files that appear under their name whole, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | Path, wanted: int) -> Iterator[IO[bytes]]:
    """A file open for writing that takes the place of ``path`` when the block ends, and vanishes when it fails.

    Args:
        path: file to write or to replace; its folder is made if need be.
        wanted: bytes that will be written, as far as is known; they must be free before anything is.

    Raises:
        OSError: one sentence with the path, the reason, the bytes wanted and the bytes free; a former file stays.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")  # one name: what a killed run left is overwritten by the next
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if wanted > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the file raised
        if not isinstance(cause, OSError):
            raise
        raise _sentence(path, cause, wanted) from cause


def _sentence(path: Path, cause: OSError, wanted: int) -> OSError:
    room = f", {shutil.disk_usage(path.parent).free:,} are free" if path.parent.is_dir() else ""
    failure = OSError(f"{path}: could not be written ({cause.strerror or cause}): wanted {wanted:,} bytes{room}")
    failure.errno = cause.errno
    return failure
