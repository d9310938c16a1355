"""Files that this package wrote: only they are replaced without being asked, and none of them is taken for an input.

Tables and reports are recognised by how they begin, also those of earlier versions. Maps and overlays are those that
``scores.json``, ``maps/scale.json`` and the marks of unfinished commands list.
"""

import mmap
import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from recontrast.data.json_text import parse_json
from recontrast.data.regular_file import is_regular, open_regular, read_bytes

_HEAD = 1 << 16  # bytes of a file by which it is recognised
LARGEST_LIST = 1 << 30  # bytes of a list of results: those of millions of images
_SCALE = "maps/scale.json"
_MARKS = ("unfinished-predict.json", "unfinished-evaluate.json", "unfinished-demo.json")
# Text at the start of each file that a command writes under a fixed name.
_STARTS: dict[str, tuple[bytes, ...]] = {
    "scores.csv": (b"path,score", b"path,category,defect,label,score"),
    "regions.csv": (b"path,region,area,top,left",),
    "scores.json": (b'{\n "recontrast": ',),
    "predict.json": (b'{\n "recontrast": ',),
    "results.json": (b'{\n "rows": ',),
    "results.csv": (b"category,images,defects,",),
    "results.md": (b"| category | images |", b"| category | parts |"),
    "comparison.json": (b'{\n "table": ',),
    "comparison.csv": (b"entry,category,metric,seeds,",),
    "compare.json": (b'{\n "compared": ',),
    "compare.csv": (b"method,error,i_auroc,",),
    "compare.md": (b"# Comparison of methods on ",),
    "audit.csv": (b"rank,path,category,score,",),
    "clean.csv": (b"path,split,label,",),
    "method.json": (b'{\n "method": ',),
    "scale.json": (b'{\n "format": ',),
    "unfinished-predict.json": (b'{\n "note": ',),
    "unfinished-evaluate.json": (b'{\n "note": ',),
    "unfinished-demo.json": (b'{\n "note": ',),
    "unfinished-compare.json": (b'{\n "note": ',),
    "unfinished-predict.jsonl": (b'{"identity": ',),
    "watch.jsonl": (b'{"identity": ',),
}
_SHEET = re.compile(r"heatmaps_[^/]+\.png")  # of the demo
_RECIPE_FIELDS = (b"name:", b"\nbackbone:", b"\ndecoder_lr:", b"\ncheckpoint_every:", b"\nmask_rule:")
_PAGES = (b"Anomaly detection report", b"Anomaly detection comparison", b"Anomaly detection audit")
_MODEL = b"recontrast"  # in the description that an exported file holds
_CHECKPOINT = b"recontrast_checkpoint"  # a key in the first member of the archive
_MODEL_SUFFIXES = (".onnx", ".pt2", ".xml")


def is_own(path: Path) -> bool:
    """Return whether this package wrote a file, by its content.

    Args:
        path: Path of an existing file.

    Returns:
        False for files of others, for anything but regular files, and for maps and overlays: see `list_own`.
    """
    if path.suffix.lower() == ".bin":  # the weights of an exported .xml
        path = path.with_suffix(".xml")
    try:
        if path.is_symlink() or not is_regular(path):
            return False
        with open_regular(path) as file:
            if path.suffix.lower() in _MODEL_SUFFIXES:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    return content.find(_MODEL) >= 0
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return False
    if path.name == "unfinished-predict.maps":
        return True  # numbers without a head; a killed command may have left it without its .jsonl
    if path.suffix.lower() in (".html", ".htm"):
        return any(title in head for title in _PAGES)
    if head.startswith((b"# Exported detector: ", b'{\n "exported": ')):  # the report beside an exported file
        return True
    if path.name == "recipe.yaml":
        return head.startswith(_RECIPE_FIELDS[0]) and all(name in head for name in _RECIPE_FIELDS)
    if path.name == "log.jsonl":
        return not head or (head.startswith(b'{"') and b'"step": ' in head)  # empty until the first line
    if path.name == "comparison.md":
        return head.startswith(b"# ") and b"\n| entry | category |" in head
    if head.startswith(b"PK\3\4") and _CHECKPOINT in head:
        return True
    if path.name == "checkpoint.pt":  # damaged
        return is_own(path.with_name("recipe.yaml"))
    return head.startswith(_STARTS.get(path.name, ()))


def list_own(folder: Path) -> set[str]:
    """List the maps, overlays and other pictures that commands wrote to a folder.

    Args:
        folder: Folder of results, or any other.

    Returns:
        Paths relative to the folder, with ``/``; empty if it holds no results.
    """
    listed: set[str] = set()
    for name in ("scores.json", *_MARKS):
        content = _read_json(folder / name)
        images = content.get("images", [])
        for image in images if isinstance(images, list) else []:
            if isinstance(image, dict):
                listed |= {value for key in ("map", "overlay") if isinstance(value := image.get(key), str)}
        files = content.get("files", [])
        listed |= {file for file in files if isinstance(file, str)} if isinstance(files, list) else set()
    scale = _read_json(folder / _SCALE)
    if isinstance(files := scale.get("files"), list):
        listed |= {_SCALE, *(file for file in files if isinstance(file, str))}
    elif "listed_in" in scale:  # of a watched folder
        listed.add(_SCALE)
    elif "format" in scale:  # of an earlier version, whose maps are not listed
        listed |= {_SCALE, *(path.relative_to(folder).as_posix() for path in (folder / "maps").rglob("*.tiff"))}
    listed = {
        name
        for name in listed
        if (".." not in PurePosixPath(name).parts and PurePosixPath(name).parts[:1] in (("maps",), ("overlays",)))
        or _SHEET.fullmatch(name)
    }
    if is_own(folder / "results.json"):  # perhaps of the demo, which lists its pictures only until it has finished
        listed |= {path.name for path in folder.glob("heatmaps_*.png")}
    return listed


def holds_results(names: Collection[str]) -> bool:
    """Return whether a folder with files of these names can be one of results, for which `list_own` lists pictures."""
    return not {"scores.json", "results.json", *_MARKS}.isdisjoint(names)


def list_own_around(folder: Path) -> set[str]:
    """List the pictures of results that have ``folder`` below them, such as ``results/overlays/good``.

    Args:
        folder: Folder that is searched for images.

    Returns:
        Absolute paths.
    """
    listed: set[str] = set()
    folder = Path(os.path.abspath(folder))
    for parent in (folder, *folder.parents):
        if parent.name in ("maps", "overlays"):
            listed |= {str(parent.parent / name) for name in list_own(parent.parent)}
    return listed


def check_replaceable(
    folder: Path, names: Iterable[str], *, overwrite: bool = False, inputs: Iterable[Path] = (), option: str = "--out"
) -> None:
    """Check that no file of others would be replaced.

    Args:
        folder: Folder of the files.
        names: Paths of the files that are to be written, relative to the folder.
        overwrite: Whether files of others may be replaced.
        inputs: Files that are read, which are never replaced.
        option: Option or argument that names the folder, such as "--out" or "out", for the error message.

    Raises:
        ValueError: If a file of others, a folder or an input has one of the names.
    """
    if not folder.is_dir():
        return
    permission = "--overwrite" if option.startswith("--") else "overwrite=True"
    own: set[str] | None = None
    real = os.path.realpath(folder)
    read = {os.path.realpath(path) for path in inputs}
    for name in names:
        path = folder / name
        try:
            os.lstat(path)
        except (OSError, ValueError):  # does not exist, or cannot: reported when it is written
            continue
        if os.path.realpath(os.path.join(real, name)) in read:
            raise ValueError(f"{option}: wanted a folder whose results replace no input, got {path}, which is one")
        if path.is_dir() and not path.is_symlink():
            raise ValueError(f"{option}: wanted a name for {name}, got a folder of that name: {path}")
        if overwrite:
            continue
        if own is None:
            own = list_own(folder)
        if name not in own and not is_own(path):
            raise ValueError(
                f"{option}: wanted a folder without files of others, got {path}, which recontrast did not write: "
                f"choose another folder or add {permission}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        if is_regular(path):
            content = parse_json(read_bytes(path, "a list of results", LARGEST_LIST))
            return content if isinstance(content, dict) else {}
    return {}
