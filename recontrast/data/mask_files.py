"""Find the masks of a category."""

import os
from pathlib import Path

from recontrast.data.class_names import classify_folder
from recontrast.data.listing import (
    classify_entry,
    is_system_folder,
    list_names,
    natural_sort_key,
    scan_folder,
    warn_of_unread,
)


def find_mask_folder(path: Path) -> Path | None:
    """Find the folder of the masks of a category.

    Args:
        path: Folder of the category.

    Returns:
        The folder ``ground_truth``, or one whose name is that of masks; None if there is none.

    Raises:
        ValueError: If several folders have names of masks.
    """
    if (path / "ground_truth").is_dir():
        return path / "ground_truth"
    folders = [child for child in list_folders(path) if classify_folder(child.name) == "mask"]
    if len(folders) > 1:
        raise ValueError(f"{path}: wanted one folder of masks, ground_truth, got {list_names(path, folders)}")
    return folders[0] if folders else None


def find_masks(ground_truth: Path) -> dict[str, Path]:
    """List mask files, except those of good images, which are always black.

    Args:
        ground_truth: Folder of the masks.

    Returns:
        Paths of the files by their path relative to the folder, without suffix.

    Raises:
        ValueError: If two files differ only in their suffix.
    """
    masks: dict[str, Path] = {}
    folder = scan_folder(ground_truth)
    warn_of_unread(folder)
    for path in folder.list_images():
        relative = path.relative_to(ground_truth)
        if len(relative.parts) > 1 and classify_folder(relative.parts[0]) == "good":
            continue
        key = relative.with_suffix("").as_posix()
        if key in masks:
            raise ValueError(f"{path}: wanted one mask of this name, got {masks[key].name} as well")
        masks[key] = path
    return masks


def list_folders(path: Path) -> list[Path]:
    """List the visible folders directly below a folder.

    Args:
        path: Folder to list.

    Returns:
        Paths of the folders, in natural order.
    """
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if not is_system_folder(entry.name) and classify_entry(entry)[0]]
    return [path / name for name in sorted(names, key=natural_sort_key)]
