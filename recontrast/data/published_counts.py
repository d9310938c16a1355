"""Published numbers of images of the paper's data sets."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of images of a category.

    Attributes:
        train: Training images.
        test: Test images.
        good: Good test images; None if unknown.
    """

    train: int
    test: int
    good: int | None = None

    def describe_differences(self, published: "Counts") -> list[str]:
        """Describe each number that differs from the one in ``published``.

        Args:
            published: Published numbers.

        Returns:
            Texts such as ``"2 train, published 3"``.
        """
        expected = asdict(published)
        names = {"train": "train", "test": "test", "good": "good of test"}
        return [
            f"{got} {names[key]}, published {expected[key]}"
            for key, got in asdict(self).items()
            if expected[key] is not None and got != expected[key]
        ]

    def describe_differences_of_all(self, published: "Counts") -> list[str]:
        """Describe the differences of all images, and of all good ones, without a published split.

        Args:
            published: Published numbers, whose sums over training and test are compared.

        Returns:
            Texts such as ``"2 images, published 3"``.
        """
        (all_got, good_got), (all_published, good_published) = (
            (counts.train + counts.test, counts.train + (counts.good or 0)) for counts in (self, published)
        )
        pairs = ((all_got, all_published, "images"), (good_got, good_published, "good images"))
        return [f"{got} {name}, published {expected}" for got, expected, name in pairs if got != expected]


def _parse_counts(table: str) -> dict[str, Counts]:
    """Parse lines of category, training images, good test images and defective test images."""
    rows = [line.split() for line in table.strip().splitlines()]
    return {name: Counts(int(train), int(good) + int(bad), int(good)) for name, train, good, bad in rows}


PUBLISHED_COUNTS = {
    "mvtec": _parse_counts(  # Bergmann et al., CVPR 2019, Table 1
        """
        bottle      209  20  63
        cable       224  58  92
        capsule     219  23 109
        carpet      280  28  89
        grid        264  21  57
        hazelnut    391  40  70
        leather     245  32  92
        metal_nut   220  22  93
        pill        267  26 141
        screw       320  41 119
        tile        230  33  84
        toothbrush   60  12  30
        transistor  213  60  40
        wood        247  19  60
        zipper      240  32 119
        """
    ),
    "visa": _parse_counts(  # Zou et al., ECCV 2022; one-class split, with nine tenths of the normal images for training
        """
        candle      900 100 100
        capsules    542  60 100
        cashew      450  50 100
        chewinggum  453  50 100
        fryum       450  50 100
        macaroni1   900 100 100
        macaroni2   900 100 100
        pcb1        904 100 100
        pcb2        901 100 100
        pcb3        905 101 100
        pcb4        904 101 100
        pipe_fryum  450  50 100
        """
    ),
    # Counts of the reference, which does not state how many of the 193 test images of ISIC are normal.
    "aptos": {"aptos": Counts(1000, 2662, 805)},
    "oct2017": {"oct2017": Counts(26315, 1000, 250)},
    "isic2018": {"isic2018": Counts(6705, 193)},
}
