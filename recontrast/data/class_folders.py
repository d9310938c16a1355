"""Which images of a plain folder are good, where its subfolders are classes such as ``good`` and ``crack``.

A folder with ``good/``, ``crack/`` and ``mask/`` holds one class of good images; training on all of it would teach the
defects. The subfolders are told apart by their names (`recontrast.data.class_names`). What could mean both is refused.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recontrast.data.class_names import FolderKind, classify_folder
from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.list_files import is_list
from recontrast.data.listing import (
    DataWarning,
    Folder,
    PathLike,
    count_images,
    list_folder,
    list_images,
    list_names,
    scan_folder,
)


def list_good_images(paths: PathLike | Iterable[PathLike], all_good: bool = False) -> list[Path]:
    """List good images.

    Args:
        paths: One or more files, folders and lists. Files are taken as they are. Of a folder whose subfolders are
            classes, only the good ones are taken; of a list (`recontrast.data.image_lists`) those of the split
            calibration or, if there are none, train.
        all_good: Whether all images in the folders are good, whatever the names of their subfolders.

    Returns:
        The files in the order of ``paths``; the files of a folder in natural order.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If a folder contains no images, or it is unclear which of them are good.
    """
    return [sample.path for sample in list_good_samples(paths, all_good)]


def list_good_samples(
    paths: PathLike | Iterable[PathLike], all_good: bool = False, views_from: str | None = None
) -> list[Sample]:  # fmt: skip
    """List good images as samples, which have the region of interest and the group that a list states.

    Args:
        paths: One or more files, folders and lists, see `list_good_images`.
        all_good: Whether all images in the folders are good, whatever the names of their subfolders.
        views_from: Where the views of a part are found, see `recontrast.data.image_lists.read_list`.

    Returns:
        The images in the order of ``paths``; the category is the name of the folder, or as in the list.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If a folder contains no images, or it is unclear which of them are good.
    """
    from recontrast.data.image_lists import read_good_list  # it imports this module

    samples: list[Sample] = []
    for path in map(Path, [paths] if isinstance(paths, str) or not isinstance(paths, Iterable) else paths):
        if is_list(path):
            samples += read_good_list(path, views_from)
            continue
        files = select_good_images(scan_folder(path), all_good) if path.is_dir() else list_images(path)
        category = Path(os.path.abspath(path)).name
        samples += [Sample(file, None, 0, category, "train", GOOD) for file in files]
    return samples


def describe_files(name: str, paths: Sequence[Path]) -> list[str]:
    """Describe which images were taken from which folders, as a tree with counts.

    Args:
        name: Name of the images, such as that of an option.
        paths: Image files.

    Returns:
        One line for the root, and one for each folder that contains images.
    """
    counts = Counter(os.path.dirname(os.path.abspath(path)) for path in paths)
    if not counts:
        return []
    root = os.path.commonpath(counts) if len(counts) > 1 else os.path.dirname(next(iter(counts)))
    return [f"{name}: {root}", *(f"  {os.path.relpath(f, root)}: {count_images(n)}" for f, n in counts.items())]


def select_good_images(folder: Folder, all_good: bool = False) -> list[Path]:
    """List the good images of a plain folder, and warn of those that are left out.

    Args:
        folder: Result of `recontrast.data.listing.scan_folder`.
        all_good: Whether all images in the folder are good, whatever the names of its subfolders.

    Returns:
        The images in natural order.

    Raises:
        ValueError: If there are no images, or it is unclear which of them are good.
    """
    if all_good or not folder.count():
        return list_folder(folder)
    kind = classify_folder(Path(os.path.abspath(folder.path)).name)
    if kind in ("bad", "mask"):
        meaning = "masks" if kind == "mask" else "images with defects"
        raise ValueError(
            f"{folder.path}: wanted a folder of good images, got one whose name is that of {meaning}: rename it, or "
            "use --all-good (all_good=True) if all its images are good"
        )
    selection = _Selection(folder)
    selection.add(folder, is_good=kind == "good")
    selection.check()
    selection.warn()
    return list_folder(selection.prune(folder))


def _share_word(folder: Path, child: Path) -> bool:
    """Return whether the names of a folder and of its subfolder share a word, as in ``gaskets_2024/gaskets``."""
    first, second = (
        set(re.findall(r"[^\W\d_]{2,}", Path(os.path.abspath(path)).name.lower())) for path in (folder, child)
    )
    return bool(first & second)


@dataclass
class _Selection:
    """Folders whose own images are taken, and folders that are left out."""

    root: Folder
    taken: list[Folder] = field(default_factory=list)
    left_out: list[Folder] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)  # images left out because they lie beside the class folders
    unclassified: list[Folder] = field(default_factory=list)  # folders taken without being called good
    presumed: list[Folder] = field(default_factory=list)  # only subfolders, taken although their names are not known

    def add(self, folder: Folder, is_good: bool) -> None:
        """Decide on a folder and those below it; ``is_good`` if a folder above it is called good."""
        children = [child for child in folder.folders if child.count()]
        kinds = {child.path.name: classify_folder(child.path.name) for child in children}
        if is_good:
            self._add_below_good(folder, children, kinds)
        elif "good" in kinds.values():
            self.loose += [folder.path / name for name in folder.images]
            for child in children:
                if kinds[child.path.name] == "good":
                    self.add(child, is_good=True)
                else:
                    self._refuse_hidden_good(child)
                    self.left_out.append(child)
        else:
            self._add_without_good(folder, children, kinds)

    def _add_below_good(self, folder: Folder, children: list[Folder], kinds: dict[str, FolderKind]) -> None:
        self.taken.append(folder)
        for child in children:
            kind = kinds[child.path.name]
            if kind in ("bad", "unclear"):
                self._refuse(f"{list_names(self.root.path, [child.path])}/ below a folder of good images")
            elif kind == "mask":
                self.left_out.append(child)
            else:
                self.add(child, is_good=True)

    def _add_without_good(self, folder: Folder, children: list[Folder], kinds: dict[str, FolderKind]) -> None:
        names = list_names(self.root.path, [child.path for child in children])
        are_numbers = {*kinds} == {str(number) for number in range(len(kinds))} and len(kinds) > 1
        is_wrapper = len(children) == 1 and not folder.images
        for kind in kinds.values():
            if kind in ("bad", "mask", "unclear", "test") or (kind in ("other", "train") and not is_wrapper):
                self._refuse(f"subfolders {names}" + (f" beside {len(folder.images)} images" if folder.images else ""))
        if are_numbers:
            self._refuse(f"subfolders {names}, which may be numbers of classes")
        if folder.images:
            self.taken.append(folder)
            self.unclassified.append(folder)
        if is_wrapper and "other" in kinds.values() and not _share_word(folder.path, children[0].path):
            self.presumed.append(children[0])
        for child in children:
            self.add(child, is_good=False)

    def _refuse_hidden_good(self, folder: Folder) -> None:
        """Raise if a neutral folder beside a good one holds classes of its own."""
        if classify_folder(folder.path.name) in ("neutral", "other", "train"):
            inner = [f for f in folder.walk() if f is not folder and classify_folder(f.path.name) == "good"]
            if inner:
                self._refuse(f"{list_names(self.root.path, [f.path for f in inner])} as well as other good folders")

    def check(self) -> None:
        """Raise if some images were taken by the name of their class, and others without any."""
        if self.unclassified and (self.left_out or len(self.taken) > len(self.unclassified)):
            names = list_names(self.root.path, [folder.path for folder in self.unclassified])
            self._refuse(f"classes in some of its folders and none in others ({names})")

    def prune(self, folder: Folder) -> Folder:
        """Return a copy of the folder that only has the images that are taken, and all pictures that are not read."""
        below = [self.prune(child) for child in folder.folders]
        if any(folder is taken for taken in self.taken):
            return Folder(folder.path, folder.images, folder.unread, folder.others, below)
        return Folder(folder.path, [], folder.unread, 0, below)

    def warn(self) -> None:
        """Warn of the images that are left out, and of those whose folder has an unknown name."""
        parts = [f"{count_images(f.count())} in {list_names(self.root.path, [f.path])}" for f in self.left_out]
        if self.loose:
            parts.append(
                f"{count_images(len(self.loose))} beside the class folders ({list_names(self.root.path, self.loose)})"
            )
        if parts:
            good = list_names(self.root.path, [folder.path for folder in self.taken])
            warnings.warn(
                f"{self.root.path}: good images are those in {good}; not used: {', '.join(parts)}",
                DataWarning, stacklevel=4,
            )  # fmt: skip
        for folder in self.presumed:
            if any(inner is taken for inner in folder.walk() for taken in self.unclassified):
                name = list_names(self.root.path, [folder.path])
                warnings.warn(
                    f"{self.root.path}: {count_images(folder.count())} in {name} taken as good, although the name of "
                    "this folder does not say so: if it is the name of a defect, name the folder of good images "
                    "instead", DataWarning, stacklevel=4,
                )  # fmt: skip

    def _refuse(self, got: str) -> None:
        raise ValueError(
            f"{self.root.path}: wanted good images alone, or subfolders whose names tell good images from others "
            f"(good, ok, normal; bad, ng, defect), got {got}: name the folder of good images itself, or use --all-good "
            "(all_good=True) to take every image"
        )
