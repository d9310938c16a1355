"""High-level functions of the package: load, train, evaluate, calibrate, find_samples.

They work like the commands of the same names, but take paths or objects and return objects.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from recontrast import checkpoint as checkpoints
from recontrast.app import evaluate_job
from recontrast.app.calibrate_job import CheckpointTarget, ExportedTarget, calibrate_detector
from recontrast.app.data_options import load_data, load_tests
from recontrast.app.load import load, resolve_detector
from recontrast.app.options import parse_duration
from recontrast.app.prepare_training import prepare_job
from recontrast.app.run_training import run_job
from recontrast.calibration.conformal import DEFAULT_PIXEL_RATE, DEFAULT_RATE, allowed_false_alarms
from recontrast.data.class_folders import list_good_samples
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import read_fingerprints
from recontrast.data.groups import count_groups
from recontrast.data.listing import PathLike
from recontrast.data.near_copies import read_sketches
from recontrast.data.part_samples import join_part_samples
from recontrast.data.roi import RoiFolder
from recontrast.data.unsplit import list_good_of_classes
from recontrast.data.views import check_source
from recontrast.evaluation.results import Result
from recontrast.inference.calibrate import select_new_samples
from recontrast.inference.detector import CheckpointDetector, Detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.rois import RegionOfInterest, add_rois
from recontrast.training.extend import extend as extend_detector

Data = PathLike | Sequence[PathLike] | Sequence[Sample]


def train(
    data: Data,
    out: PathLike | None = None,
    *,
    recipe: str | None = None,
    category: str | None = None,
    device: str | None = None,
    resume: PathLike | None = None,
    overwrite: bool = False,
    all_good: bool = False,
    cache_dir: PathLike | None = None,
    teacher_cache: float = 0.0,
    budget: str | float | None = None,
    roi: RegionOfInterest | None = None,
    on_step: Callable[[int, int, str], None] | None = None,
    **fields: Any,
) -> CheckpointDetector:
    """Train a detector (ReContrast, Guo et al., https://arxiv.org/abs/2306.02602) on good images.

    Args:
        data: A data set in MVTec AD layout, a category of it, a folder of good images, a list of images (.csv, .jsonl,
            .parquet), several of these, or samples of `find_samples`.
        out: Folder of the run: checkpoint.pt, log.jsonl, recipe.yaml. None: ``runs/CATEGORY``.
        recipe: Name of one of the paper's recipes, or a YAML file. None: "mvtec", with a tenth of the good images held
            out for calibration if that is 9 images or more.
        category: Name of one category in ``data``, or "all" for one detector of all categories. None: the only
            category.
        device: "cpu", "cuda", "cuda:1", "mps". None takes the CUDA GPU if there is one.
        resume: Checkpoint or run folder to continue, with its recipe, category and folder.
        overwrite: Whether to replace an earlier run in ``out``, and files of others in the way.
        all_good: Whether all images in a plain folder are good. Otherwise its subfolders may be classes, such as
            ``good`` and ``crack``, of which only the good one is used.
        cache_dir: Folder for decoded images. None keeps them in memory.
        teacher_cache: GiB of device memory for features of the frozen encoder.
        budget: Time for the training: seconds, or a text such as "3m". What fits is chosen from the speed of this
            machine, see `recontrast.training.budget.plan_budget`; given ``fields`` stay as they are.
        roi: Region of interest: a mask image (black outside), a JSON file of rectangles and polygons, a folder with a
            mask for each image, or a mask (H, W) of bool. None: whole images, or the masks of the samples.
        on_step: Called with the number of finished steps, of all steps, and a text with loss and speed, whenever a
            line is logged.
        fields: Fields of the recipe, such as ``backbone``, ``weights``, ``steps``, ``batch``, ``size``, ``tile``.

    Returns:
        The trained detector, loaded from its checkpoint; calibrated if good images were held out.

    Raises:
        ValueError: If there is nothing to train on, an option does not fit, or ``out`` holds a checkpoint already, or
            files of others in the way.
        OSError: If a file cannot be read or written.
        KeyboardInterrupt: On Ctrl-C, after the current step is complete and a checkpoint is written.
    """
    given = [data] if isinstance(data, str | os.PathLike) else list(data)
    paths = [Path(item) for item in given if not isinstance(item, Sample)]
    source = paths if paths and len(paths) == len(given) else _group_samples(data, category, all_good)
    file = None if resume is None else resolve_detector(resume)
    job = prepare_job(
        source, recipe, fields, category=category, out=None if out is None else Path(out), resume=file,
        overwrite=overwrite, all_good=all_good, option="out", device=device, roi=roi,
        budget=None if budget is None else parse_duration("budget", budget),
    )  # fmt: skip
    run_job(
        job, device=device, cache=None if cache_dir is None else Path(cache_dir), teacher_cache=teacher_cache,
        tensorboard=False,
        on_step=None if on_step is None else lambda _, done, total, note: on_step(done, total, note),
    )  # fmt: skip
    has_folder = isinstance(roi, str | Path) and Path(roi).is_dir()
    return CheckpointDetector(job.target, device, roi=roi if has_folder else None)


def evaluate(
    detector: Detector | PathLike,
    data: Data,
    *,
    category: str | None = None,
    out: PathLike | None = None,
    device: str | None = None,
    batch: int = 16,
    streaming: bool = False,
    cache_dir: PathLike | None = None,
    overwrite: bool = False,
    errors: Literal["raise", "keep"] = "raise",
    measures: str = "auto",
    threshold: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Measure a detector on test images: AUROC, AP, F1 and AUPRO by category (protocol of the paper, section 4.1).

    Args:
        detector: A detector from a checkpoint or an exported file, or the path of one.
        data: Data sets or categories in MVTec AD layout, lists of images, or samples of `find_samples`. If a list has
            no column ``split``, all its images are test images, or the part that `train` keeps for the test.
        category: Name of one category, or "all". None: all.
        out: Folder for results.json, results.csv, results.md and scores.csv. None writes nothing.
        device: For a path: "cpu", "cuda", "cuda:1", "mps". None takes the CUDA GPU if there is one.
        batch: Number of images per forward pass.
        streaming: Whether to compute pixel metrics from histograms, in constant memory, with proven bounds.
        cache_dir: Folder for decoded images. None decodes them again.
        overwrite: Whether files in ``out`` that this package did not write may be replaced. Images never are.
        errors: "raise" stops at an image or mask that cannot be read; "keep" computes the metrics of the others, and
            counts and names it in the result, see its ``errors``.
        measures: Measures of a benchmark in the ``extra`` of each row: "mvtec_loco" (AU-sPRO), "mvtec_ad_2" (AUPRO at
            0.05 and SegF1), "real_iad" (S-AUROC) or "none". "auto": those of the data set that ``recontrast prepare``
            prepared.
        threshold: Map value for SegF1, the F1 of the pixels. None: from the validation images of MVTec AD 2.
        on_progress: Called with the category, and the number of finished images and of all images in it.

    Returns:
        Metrics in [0, 1] by category, and the score of each image; printed as a table.

    Raises:
        ValueError: If there are no test images, an image or a mask cannot be decoded, or ``out`` holds files of others
            with the names of results.
        OSError: If a file cannot be read or written.
    """
    loaded = _open_own_detector("evaluate", detector, device)
    folder = getattr(loaded, "roi_folder", None)
    incomplete = errors == "keep" or loaded.recipe.image_views is not None  # of which some need no mask
    groups = add_rois(_group_samples(data, category, detector=loaded, incomplete=incomplete), folder)
    if out is not None:
        evaluate_job.check_outputs(Path(out), groups, save_maps=False, overwrite=overwrite, option="out")
    network = loaded if isinstance(loaded, ExportedDetector) else loaded.model
    return evaluate_job.measure_network(
        network, groups, loaded.recipe, None if out is None else Path(out), calibration=loaded.calibration,
        batch=batch, streaming=streaming, cache_dir=cache_dir, on_progress=on_progress, errors=errors,
        measures=measures, threshold=threshold,
        trained=read_fingerprints(loaded.images), sketches=read_sketches(loaded.images),
    )[0]  # fmt: skip


def calibrate(
    detector: Detector | PathLike,
    good: PathLike | Sequence[PathLike],
    *,
    false_alarm_rate: float = DEFAULT_RATE,
    pixel_rate: float = DEFAULT_PIXEL_RATE,
    all_good: bool = False,
    device: str | None = None,
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Detector:
    """Set the threshold for a promised false-alarm rate (split conformal, Vovk et al., 2005), and store it.

    An exported file is calibrated on its own scores.

    Args:
        detector: A detector from a checkpoint or an exported file, or the path of one.
        good: Good images that the detector was not trained on: paths of files, folders or lists. Of images that a list
            puts into one group, such as those of one part, the largest score counts.
        false_alarm_rate: Promised share of good images called defects, at least 1 / (n + 1) for n images.
        pixel_rate: Promised share of a good image's map that is flagged.
        all_good: Whether all images in a folder are good, whatever the names of its subfolders.
        device: For a path: "cpu", "cuda", "cuda:1", "mps". None takes the CUDA GPU if there is one.
        batch: Number of images per forward pass.
        on_progress: Called with the number of finished images and of all images.

    Returns:
        The calibrated detector, loaded from its file; see its ``calibration``.

    Raises:
        ValueError: If the images are too few for the rate, or an image cannot be read or was trained on.
        OSError: If the file cannot be written.
    """
    loaded = _open_own_detector("calibrate", detector, device)
    listed = list_good_samples(good, all_good, loaded.recipe.views_from)
    samples = join_part_samples(listed, loaded.recipe.image_views)
    noun = loaded.recipe.noun
    allowed_false_alarms(count_groups(samples), false_alarm_rate, noun)  # raises if there are too few images
    target: CheckpointTarget | ExportedTarget
    if isinstance(loaded, ExportedDetector):
        target = ExportedTarget(loaded.path, loaded)
    else:
        model_device = next(loaded.model.parameters()).device
        folder = loaded.roi_folder.folder if isinstance(loaded.roi_folder, RoiFolder) else None
        target = CheckpointTarget(
            loaded.path, checkpoints.load(loaded.path, mapped=True), model_device, loaded.inference, folder
        )
    samples = select_new_samples("calibrate: good", samples, target)
    allowed_false_alarms(count_groups(samples), false_alarm_rate, noun)  # again, without copies
    if loaded.recipe.roi != target.recipe.roi:
        raise ValueError(
            "calibrate: detector: wanted one with the region of interest of its checkpoint or file, got another"
        )
    calibration, unread = calibrate_detector(
        target, loaded, samples, false_alarm_rate=false_alarm_rate, pixel_rate=pixel_rate, source=_describe_paths(good),
        batch=batch, on_progress=on_progress or (lambda done, total: None),
    )  # fmt: skip
    if unread:
        raise ValueError(f"calibrate: good: wanted images that can be read, got {len(unread)} others: {unread[0]}")
    target.store(calibration)
    return ExportedDetector(loaded.path) if isinstance(loaded, ExportedDetector) else target.open(calibrated=True)


def extend(
    detector: CheckpointDetector | PathLike,
    good: PathLike | Sequence[PathLike],
    *,
    holdout: float = 0.0,
    steps: int | None = None,
    all_good: bool = False,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckpointDetector:
    """Add good images to a detector, and store it.

    The bank of a fitted PatchCore (Roth et al., https://arxiv.org/abs/2106.08265) keeps its vectors and gains a share
    of those of the new images. PaDiM's Gaussians become those of all images. The ensemble does both, and needs the
    former images with the new ones to weight its members. A detector that is trained by steps makes further ones on all
    given images. The stored calibration is removed, since it belongs to the detector before. On failure the checkpoint
    is unchanged.

    Args:
        detector: A detector from a checkpoint, or the path of one.
        good: Good images, as paths of files, folders or lists. A fitted detector adds only those that it was not
            trained on; a detector that is trained by steps may forget what it learnt from images that are not given.
        holdout: Share of the new images that are not added but used for a new calibration, in [0, 1).
        steps: Number of further steps; None: a quarter of those of the run. Only for a detector trained by steps.
        all_good: Whether all images in a folder are good, whatever the names of its subfolders.
        device: "cpu", "cuda", "cuda:1", "mps". None takes the CUDA GPU if there is one.
        on_progress: Called with the number of finished images and of all images, or with those of steps.

    Returns:
        The extended detector, loaded from its checkpoint.

    Raises:
        ValueError: If the architecture cannot be extended, an image cannot be read, no image is new, or images are held
            out for the checkpoint of an older version, which does not tell the images that it was trained on.
        OSError: If the checkpoint cannot be written.
    """
    file = detector.path if isinstance(detector, CheckpointDetector) else resolve_detector(detector)
    views_from = checkpoints.load(file, mapped=True).recipe.views_from
    result = extend_detector(
        file,
        list_good_of_classes(good, all_good, views_from),
        holdout=holdout,
        steps=steps,
        device=device,
        on_step=on_progress,
    )
    return CheckpointDetector(result.checkpoint, device)


def find_samples(
    data: PathLike | Sequence[PathLike] = (),
    category: str | None = None,
    *,
    good: PathLike | Sequence[PathLike] = (),
    bad: PathLike | Sequence[PathLike] = (),
    all_good: bool = False,
    views_from: str | None = None,
) -> list[Sample]:
    """List the images of data sets with their labels, masks and splits.

    Args:
        data: Data sets or categories in MVTec AD layout (the paper's section 4.1), folders of good images, or lists of
            images (.csv, .jsonl, .parquet; see `recontrast.data.image_lists`).
        category: Name of one category, or "all". None: all. With ``good``: the name of the category they make.
        good: In place of ``data``: files or folders of good images, without any layout.
        bad: With ``good``: files or folders of images with defects. These and a fifth of the good images, chosen by
            their names, are test images, the others training images.
        all_good: Whether all images in a plain folder are good, see `train`.
        views_from: Where the views of a part are found, as in the recipe field: they are in one split where images are
            divided by their names, and those that do not show a defect need no mask.

    Returns:
        One `recontrast.data.datasets.Sample` for each image: categories, splits and files in natural order.

    Raises:
        ValueError: If a folder has another layout, two categories have the same name, or a list is invalid.
        FileNotFoundError: If there is no such folder, or no such category.
    """
    data, good, bad = ([v] if isinstance(v, str | os.PathLike) else list(v) for v in (data, good, bad))
    check_source(views_from, "views_from")
    groups = load_data(
        data, good, bad, category=category, all_good=all_good, views_from=views_from, options=("data", "good", "bad")
    )
    return [sample for group in groups.values() for sample in group]


def _open_own_detector(
    function: str, detector: Detector | PathLike, device: str | None
) -> CheckpointDetector | ExportedDetector:
    if isinstance(detector, str | os.PathLike):
        detector = load(detector, device)
    if not isinstance(detector, CheckpointDetector | ExportedDetector):
        raise ValueError(
            f"{function}: detector: wanted one from a checkpoint or an exported file, got {type(detector).__name__}"
        )
    return detector


def _group_samples(
    data: Data, category: str | None, all_good: bool = False, detector: Any = None, incomplete: bool = False
) -> dict[str, list[Sample]]:
    """Return the samples by category: for training, or to measure ``detector``."""
    given = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not given:
        raise ValueError("data: wanted paths or samples, got none")
    samples = [item for item in given if isinstance(item, Sample)]
    if samples and len(samples) < len(given):
        raise ValueError("data: wanted either paths or samples, got both")
    if not samples:
        paths = [item for item in given if not isinstance(item, Sample)]
        names = ("data", "good", "bad")
        if detector is not None:
            return load_tests(
                lambda: detector, paths, None, None, category=category, incomplete=incomplete, options=names
            )
        return load_data(paths, None, None, category=category, all_good=all_good, options=names)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.category, []).append(sample)
    if category in (None, "all"):
        return groups
    if category not in groups:
        raise ValueError(f"category: wanted one of {', '.join(groups)} or all, got {category!r}")
    return {category: groups[category]}


def _describe_paths(good: PathLike | Sequence[PathLike]) -> str:
    paths = [good] if isinstance(good, str | os.PathLike) else list(good)
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
