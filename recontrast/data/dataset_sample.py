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
        split: "train", "test", or "calibration": good images that are neither trained on nor measured with.
        defect: Kind of defect, which is the name of the folder below ``test``; "good" for normal images.
        roi: Path of the mask of the region of interest; None for the whole image.
        group: Name of what the image shows, such as the serial number of a part. Images of one group of a category
            are never divided between training, calibration and test. None: the image is a group of its own.
        views: Samples of the other views of a part, see `recontrast.data.views`; empty for a single image.
    """

    path: Path
    mask: Path | None
    label: int
    category: str
    split: Literal["train", "test", "calibration"]
    defect: str
    roi: Path | None = None
    group: str | None = None
    views: "tuple[Sample, ...]" = ()
