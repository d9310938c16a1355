"""One image of a data set, with its label and mask."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GOOD = "good"  # name of the folders of normal images, and `Sample.defect` of normal samples


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        path: Path of the image.
        mask: Path of the mask; None for normal images, and in categories without masks.
        label: 0 for normal, 1 for anomalous.
        category: Name of the category, which is the name of its folder.
        split: "train" or "test".
        defect: Kind of defect, which is the name of the folder below ``test``; "good" for normal images.
    """

    path: Path
    mask: Path | None
    label: int
    category: str
    split: Literal["train", "test"]
    defect: str
