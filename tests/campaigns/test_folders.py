"""Folder trees of many conventions with known contents: what is trained on is never a defect, a mask or a thumbnail."""

import itertools
import random
import warnings

import pytest

from recontrast.data import datasets
from recontrast.data.class_folders import list_good_images
from recontrast.data.listing import DataWarning

GOOD = (
    "good", "Good", "GOOD", "ok", "OK", "normal", "Normal_images", "pass", "0_good", "good-parts", "Gut",
    "gutteile", "i.O.", "fehlerfrei", "bon", "Bons", "bueno", "buenos", "buono", "conformi", "bom", "goed",
    "dobre", "годные", "良品", "正常", "양품", "no_defect", "defect-free", "undamaged", "OK品",
)  # fmt: skip
BAD = (
    "bad", "Bad", "ng", "NG", "nok", "defect", "Defects", "fail", "anomaly", "abnormal", "1_bad",
    "not_good", "NOT OK", "Schlecht", "n.i.O.", "Ausschuss", "fehlerhaft", "mauvais", "défauts",
    "defectuoso", "malos", "difettosi", "scarti", "reprovado", "afgekeurd", "брак", "不良", "不良品", "异常", "불량",
    "crack", "scratches", "broken",
)  # fmt: skip
KINDS = ("poke", "combined", "typeA", "thread_side", "glue", "A7x")  # names of defects that no list knows
MASKS = ("mask", "masks", "ground_truth", "GT", "labels", "crack_mask")
SYSTEM = ("@eaDir", ".ipynb_checkpoints", "__MACOSX", ".thumbnails", "Thumbnails", "$RECYCLE.BIN", "#recycle", ".git")
NEUTRAL = ("day1", "2024-05-01", "cam_2", "line_B", "images", "batch07")
ENDINGS = (".png", ".JPG", ".jpeg", ".jfif", ".bmp", ".TIFF", ".webp")


class Tree:
    """A folder tree whose files are named by what they show: ``good``, ``bad``, ``mask`` or ``system``."""

    def __init__(self, root, rng):
        self.root, self.rng = root, rng
        self._numbers = itertools.count()

    def add(self, folder, content, most=3):
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        for _ in range(self.rng.randint(1, most)):
            (path / f"{content} {next(self._numbers)}{self.rng.choice(ENDINGS)}").touch()
        if self.rng.random() < 0.3:
            self.add_system(folder)

    def add_system(self, folder):
        path = self.root / folder / self.rng.choice(SYSTEM)
        path.mkdir(exist_ok=True)
        (path / f"system {next(self._numbers)}.png").touch()
        (self.root / folder / f"._system {next(self._numbers)}.png").touch()

    def add_classes(self, folder=""):
        """Add class folders, in one of the usual ways."""
        rng, prefix = self.rng, f"{folder}/" if folder else ""
        has_good = rng.random() < 0.9
        if has_good:
            self.add(prefix + rng.choice(GOOD), "good")
        for name in rng.sample(BAD + KINDS, rng.randint(0, 3)) if has_good else rng.sample(BAD, 2):
            self.add(prefix + name, "bad")
        if rng.random() < 0.3:
            self.add(f"{prefix}{rng.choice(MASKS)}/{rng.choice(BAD)}", "mask")

    def add_category(self):
        rng = self.rng
        train, test = rng.choice((("train", "test"), ("Train", "Test"), ("TRAIN", "TEST")))
        self.add(f"{train}/{rng.choice(GOOD)}", "good")
        if rng.random() < 0.3:
            self.add(f"{train}/{rng.choice(BAD + KINDS + MASKS)}", "bad")
        if rng.random() < 0.2:
            self.add(train, "bad")  # loose beside the good folder
        if rng.random() < 0.8:
            self.add(f"{test}/{rng.choice(GOOD)}", "good")
        for name in rng.sample(BAD + KINDS, rng.randint(0, 3)):
            self.add(f"{test}/{name}", "bad")

    def add_random(self):
        """Add one of the ways in which folders are laid out."""
        way = self.rng.randrange(6)
        if way < 2:
            self.add_classes()
        elif way == 2:
            self.add_category()
        elif way == 3:  # classes below days or cameras, and sometimes a day without classes
            for name in self.rng.sample(NEUTRAL, 2):
                self.add_classes(name)
            if self.rng.random() < 0.3:
                self.add("day9", "bad")
        elif way == 4:  # loose images beside classes
            self.add("", "bad")
            self.add_classes()
        else:  # defects below good images
            name = self.rng.choice(GOOD)
            self.add(name, "good")
            self.add(f"{name}/{self.rng.choice(BAD + MASKS)}", "bad")


def check_tree(tree):
    """Return what is wrong with the images that are taken from the tree; None if nothing is."""
    taken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        for read in (datasets.load, list_good_images):
            try:
                result = read(tree.root)
            except (ValueError, FileNotFoundError):
                continue
            if read is datasets.load:
                samples = next(iter(result.values()))
                taken += [sample.path for sample in samples if sample.split == "train"]
                for sample in samples:
                    if sample.path.name.split()[0] not in (("bad", "good")[sample.label == 0],):
                        return f"{sample.path.relative_to(tree.root)} has label {sample.label}"
            elif not any((tree.root / name).exists() for name in ("train", "Train", "TRAIN")):
                taken += result
    wrong = [str(path.relative_to(tree.root)) for path in taken if not path.name.startswith("good")]
    return f"taken as good: {wrong}" if wrong else None


def test_folder_trees(campaign, tmp_path):
    used = 0
    for seed in range(campaign.tries(40, 1500)):
        tree = Tree(tmp_path / str(seed) / "product", random.Random(seed))
        tree.root.mkdir(parents=True)
        tree.add_random()
        wrong = check_tree(tree)
        if wrong is None:
            campaign.passed()
        else:
            campaign.failed(f"seed {seed}: {wrong}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)
                used += bool(datasets.load(tree.root))
        except (ValueError, FileNotFoundError):
            pass
    assert used > campaign.tried / 3  # refusing everything would be no use


@pytest.mark.parametrize("good", GOOD)
def test_usual_layouts_are_read(tmp_path, good):
    """A good class beside a bad one is never refused."""
    rng = random.Random(good)
    tree = Tree(tmp_path / "product", rng)
    tree.add(good, "good")
    for name in rng.sample(BAD, 3):
        tree.add(name, "bad")
    with pytest.warns(DataWarning):
        images = list_good_images(tree.root)
    assert images and all(path.name.startswith("good") for path in images)
