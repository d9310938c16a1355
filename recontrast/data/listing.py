"""Find image files, in an order that does not depend on the locale or the file system."""

import errno
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recontrast.data.formats import HEAD_BYTES, NAMES, SUFFIXES, detect_format

IMAGE_SUFFIXES = SUFFIXES
"""File name suffixes of images, in lower case; upper case is accepted too."""

_OTHER_PICTURES = frozenset(
    ".3fr .arw .cr2 .cr3 .cur .dcm .dcx .dds .dng .emf .eps .exr .fit .fits .hdr .heic .heif .hif .ico"
    " .jls .jpf .jxl .jxr .kdc .mpo .nef .nrrd .orf .pam .pcd .pcx .pef .pfm .pic .pnm"
    " .psb .psd .qoi .raf .raw .rw2 .sgi .sr2 .srw .svg .svgz .tga .wdp .wmf .xbm .xcf .xpm".split()
)  # formats that are not read
_NO_PICTURES = frozenset(
    ".bin .cfg .conf .csv .db .doc .docx .gz .h5 .hdf5 .htm .html .ini .ipynb .json .jsonl .log .m .mat .md .npy"
    " .npz .onnx .parquet .pdf .pkl .pt .pth .py .rar .rst .safetensors .sh .sqlite .tar .toml .tsv .txt .xls .xlsx"
    " .xml .yaml .yml .zip .7z .lnk .url .mp4 .avi .mov .mkv .wav".split()
)  # files with these suffixes are not opened to look for pictures
_LARGEST_SEARCH = 1000  # files of unknown kind in a folder whose first bytes are read
# Folders and files that operating systems, storage devices and editors create, in lower case.
_SYSTEM_FOLDERS = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle", "#snapshot", "~snapshot",
    "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "found.000", "__macosx",
    "__pycache__", "network trash folder", "temporary items", "thumbnails", "thumbs", "thumb", "_thumbs", "thumbnail",
    "_vti_cnf", "_vti_pvt", "cvs",
})  # fmt: skip
_SYSTEM_FILES = frozenset({
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "zbthumbnail.info", "picasa.ini",
    "albumart.jpg",
})  # fmt: skip
_SYSTEM_PREFIXES = (".", "~$", "__macosx", "synophoto_", "synofile_", "synoindex_", "albumartsmall", "albumart_{")

PathLike = str | os.PathLike[str]


class DataWarning(UserWarning):
    """Warns of images or masks that are not used, or not used as their files and folders suggest."""


@dataclass
class Folder:
    """A folder and what lies in it.

    Attributes:
        path: Path of the folder.
        images: Names of the image files directly in the folder, in natural order.
        unread: Names of pictures directly in the folder that are not read, because of their format or kind.
        others: Number of all other visible files directly in the folder.
        folders: Visible subfolders, in natural order.
    """

    path: Path
    images: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    others: int = 0
    folders: list["Folder"] = field(default_factory=list)

    def walk(self) -> Iterator["Folder"]:
        """Iterate over this folder and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def count(self) -> int:
        """Count the images in this folder and below."""
        return sum(len(folder.images) for folder in self.walk())

    def list_images(self) -> list[Path]:
        """List the images in this folder and below, in natural order of their relative paths."""
        if not self.folders:
            return [self.path / name for name in self.images]
        images: list[Path] = []
        entries = {name: None for name in self.images} | {folder.path.name: folder for folder in self.folders}
        for name in sorted(entries, key=natural_sort_key):
            folder = entries[name]
            images += [self.path / name] if folder is None else folder.list_images()
        return images


def list_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """List image files.

    Warns (`DataWarning`) of pictures in the folders that are not listed, because their format is not read.

    Args:
        paths: One or more files, folders and lists. Files are taken as they are; folders are searched with
            `find_images`; of a list (`recontrast.data.image_lists`), all images are taken.

    Returns:
        The files in the order of ``paths``; the files of a folder in natural order.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If a folder contains no images.
    """
    from recontrast.data.image_lists import list_paths  # they import this module
    from recontrast.data.list_files import is_list

    images: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            images += list_folder(scan_folder(path))
        elif is_list(path):
            images += list_paths(path)
        elif path.exists():
            images.append(path)
        else:
            raise FileNotFoundError(f"{path}: wanted an image or a folder of images, got no such file or folder")
    return images


def list_folder(folder: Folder) -> list[Path]:
    """List the images of a scanned folder, and warn about pictures in it that are not read.

    Args:
        folder: Result of `scan_folder`.

    Returns:
        The images in natural order.

    Raises:
        ValueError: If there are none.
    """
    images = folder.list_images()
    if not images:
        others = sum(inner.others + len(inner.unread) for inner in folder.walk())
        got = f"{others} of other kinds" if others else "none"
        raise ValueError(f"{folder.path}: wanted a folder with image files ({NAMES}), got {got}")
    warn_of_unread(folder)
    return images


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and its subfolders.

    Symbolic links are followed; hidden files and folders and those of the operating system are skipped.

    Args:
        folder: Folder to search.

    Returns:
        The files in natural order of their relative paths; empty if there are none.
    """
    return scan_folder(folder).list_images()


def scan_folder(path: Path, recursive: bool = True) -> Folder:
    """Find the images, and the pictures that cannot be read, in a folder and its subfolders.

    Symbolic links are followed, but each folder is entered once. Hidden files and folders are skipped, and those of the
    operating system. Only regular files count as images. Pictures that a command of this package wrote as results, such
    as overlays, are skipped (`recontrast.data.own_files`).

    Args:
        path: Folder to search.
        recursive: Whether to search subfolders; otherwise they are left out.

    Returns:
        The folder; empty if it does not exist.

    Raises:
        OSError: If a folder cannot be read.
    """
    from recontrast.data.own_files import holds_results, list_own, list_own_around  # they import this module

    visited: set[tuple[int, int]] = set()  # a link to a parent folder would loop forever
    own = list_own_around(path)

    def scan(folder: Folder) -> Folder:
        subfolders: list[str] = []
        unknown: list[str] = []
        try:
            status = os.stat(folder.path)
            if (status.st_dev, status.st_ino) in visited:
                return folder
            visited.add((status.st_dev, status.st_ino))
            entries = os.scandir(folder.path)
        except (FileNotFoundError, NotADirectoryError):
            return folder
        with entries:
            for entry in entries:
                name = entry.name
                is_folder, is_file = classify_entry(entry)
                if is_folder:
                    if recursive and not is_system_folder(name):
                        subfolders.append(name)
                elif is_image(name):
                    # A named pipe, a device, or a link to nothing or to itself is no image.
                    (folder.images if is_file else folder.unread).append(name)
                elif not is_hidden(name):
                    unknown.append(name)
        if holds_results(unknown):
            own.update(os.path.abspath(folder.path / name) for name in list_own(folder.path))
        if own:
            folder.images = [name for name in folder.images if os.path.abspath(folder.path / name) not in own]
        folder.images.sort(key=natural_sort_key)
        _sort_unknown_files(folder, unknown)
        folder.folders = [scan(Folder(folder.path / name)) for name in sorted(subfolders, key=natural_sort_key)]
        return folder

    return scan(Folder(Path(path)))


def classify_entry(entry: "os.DirEntry[str]") -> tuple[bool, bool]:
    """Return whether an entry of a folder is a folder, and whether it is a regular file.

    An image whose kind cannot be found, such as a link to itself, is neither: it costs no other image.

    Args:
        entry: Entry as `os.scandir` lists it.

    Raises:
        OSError: If the kind of anything else cannot be found, which may be a folder.
    """
    try:
        return entry.is_dir(), entry.is_file()
    except OSError as error:
        if error.errno != errno.ELOOP and not is_image(entry.name):
            raise
        return False, False


def warn_of_unread(folder: Folder) -> None:
    """Warn about pictures in and below a folder that are not read, with their number and names.

    Args:
        folder: Result of `scan_folder`.
    """
    unread = [inner.path / name for inner in folder.walk() for name in inner.unread]
    if unread:
        warnings.warn(
            f"{folder.path}: {count_images(len(unread), 'picture')} not read; only {NAMES} files with "
            f"their usual endings are: {list_names(folder.path, unread)}",
            DataWarning, stacklevel=3,
        )  # fmt: skip


def list_names(root: Path, paths: Iterable[Path], most: int = 5) -> str:
    """Join the first paths, relative to ``root``, for a message.

    Args:
        root: Folder of all paths.
        paths: Files or folders below it.
        most: Number of names to write.

    Returns:
        Names separated by commas, and the number of the others.
    """
    names = [path.relative_to(root).as_posix() for path in paths]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count_images(count: int, noun: str = "image") -> str:
    """Write a number of images with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files, such as ``._name.png`` of macOS, are not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is hidden, or belongs to the operating system."""
    lower = name.lower()
    return lower.startswith(_SYSTEM_PREFIXES) or lower in _SYSTEM_FILES or lower.endswith(":zone.identifier")


def is_system_folder(name: str) -> bool:
    """Return whether the name is that of a hidden folder, or of one for thumbnails, deleted files or snapshots."""
    return name.lower() in _SYSTEM_FOLDERS or is_hidden(name)


def natural_sort_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that compares digits as numbers, so that image2 comes before image10."""
    return [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(name))], name


_DIGITS = re.compile(r"([0-9]+)")


def _sort_unknown_files(folder: Folder, names: list[str]) -> None:
    """Count the files, and keep pictures: by their suffix or, if it is not a known one, by their first bytes."""
    opened = 0
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        is_picture = suffix in _OTHER_PICTURES
        if not is_picture and suffix not in _NO_PICTURES and opened < _LARGEST_SEARCH:
            opened += 1
            is_picture = _starts_as_picture(folder.path / name)
        if is_picture:
            folder.unread.append(name)
        else:
            folder.others += 1
    folder.unread.sort(key=natural_sort_key)


def _starts_as_picture(path: Path) -> bool:
    from recontrast.data.regular_file import open_regular  # it imports this module

    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return False
    return detect_format(head) is not None or head[4:12] in (b"ftypheic", b"ftypmif1")
