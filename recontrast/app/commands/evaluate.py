"""``recontrast evaluate``: options and output; `recontrast.app.evaluate_job` does the work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import print_data, print_image_errors, print_line, print_warning
from recontrast.app.data_options import Bad, Good, load_tests
from recontrast.app.option_groups import expand_options
from recontrast.app.options import (
    Data,
    DetectorFile,
    InferenceArguments,
    OneCategory,
    OtherRoi,
    Overwrite,
    check_writable,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_result

if TYPE_CHECKING:
    import torch

    from recontrast.calibration.conformal import Calibration
    from recontrast.data.datasets import Sample
    from recontrast.inference.options import InferenceOptions
    from recontrast.recipes.recipe import Recipe


@expand_options
def evaluate(  # 19 options
    context: typer.Context,
    checkpoint: DetectorFile,
    data: Data = None,
    *,
    good: Good = None,
    bad: Bad = None,
    category: OneCategory = None,
    out: Annotated[
        Path | None, path_option(help="Folder for results.json, .csv and .md. Default: write nothing.")
    ] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Also write 16-bit TIFF maps to OUT/maps; results.md has their scale.")
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Pixel metrics from histograms, in constant memory, with proven bounds. AU-sPRO still keeps the "
            "highest scores of a category: 5 to 7.5 % of all pixels for each kind of anomaly.",
        ),
    ] = False,
    measures: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Measures of a benchmark: mvtec_loco (AU-sPRO@0.05), mvtec_ad_2 (AUPRO@0.05, SegF1), real_iad "
            "(S-AUROC) or none. Default: those of the data set that was prepared.",
        ),
    ] = "auto",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Map value for SegF1, the F1 of the pixels. Default: from the validation images of MVTec AD 2."
        ),
    ] = None,
    roi: OtherRoi = None,
    inference: InferenceArguments,
    overwrite: Overwrite = False,
    cache: Annotated[
        Path | None, path_option(help="Folder for decoded images. Default: decode them each time.")
    ] = None,
) -> None:
    """Measure a detector on test images: I-AUROC, P-AUROC, AP, F1 and AUPRO by category."""
    from recontrast.app.calibrate_job import open_target
    from recontrast.app.evaluate_job import check_outputs
    from recontrast.data.part_samples import join_part_samples
    from recontrast.inference.detector import is_exported, open_detector
    from recontrast.runtime import distributed

    if save_maps and out is None:
        raise ValueError("--save-maps: wanted --out DIR with it, got none")
    if out is not None:
        check_writable(out)
    if cache is not None:
        check_writable(cache, "--cache")
    options = inference.build()
    file = resolve_checkpoint(checkpoint)
    device = "cpu" if is_exported(file) else inference.device
    _, world_device = context.with_resource(distributed.join_processes(device))
    exported = open_detector(file, inference.device, inference=options, roi=roi) if is_exported(file) else None
    target: Any = exported or open_target(file, device)
    groups = load_tests(lambda: target, data, good, bad, category=category)
    views = target.recipe.image_views
    groups = {name: join_part_samples(samples, views) for name, samples in groups.items()}
    if out is not None:
        check_outputs(out, groups, save_maps=save_maps, overwrite=overwrite, option="--out")
    reading: dict[str, Any] = {
        "workers": inference.workers, "batch": inference.batch, "cache_dir": cache, "streaming": streaming,
        "save_maps": save_maps, "measures": measures, "threshold": threshold,
    }  # fmt: skip
    if exported is not None:
        _evaluate_exported(exported, groups, out, reading)
    else:
        _evaluate_checkpoint(file, groups, out, world_device, options, roi, reading)


def _evaluate_exported(
    detector: Any, groups: "dict[str, list[Sample]]", out: Path | None, reading: dict[str, Any]
) -> None:  # fmt: skip
    """Evaluate an exported file; ``reading`` are options of `show_metrics`."""
    from recontrast.data import datasets
    from recontrast.data.fingerprint import read_fingerprints
    from recontrast.inference.rois import add_rois

    groups = add_rois(groups, getattr(detector, "roi_folder", None))
    print_data(datasets.describe(groups))
    if detector.calibration_note is not None:
        print_warning(detector.calibration_note)
    trained = read_fingerprints(detector.images)
    show_metrics(detector, groups, detector.recipe, out, detector.calibration, trained=trained, **reading)


def _evaluate_checkpoint(
    file: Path, groups: "dict[str, list[Sample]]", out: Path | None, device: "torch.device",
    inference: "InferenceOptions", roi: Path | None, reading: dict[str, Any],
) -> None:  # fmt: skip
    """Evaluate a checkpoint; ``reading`` are options of `show_metrics`."""
    from recontrast import checkpoint as checkpoints
    from recontrast.data import datasets
    from recontrast.data.fingerprint import read_fingerprints
    from recontrast.data.near_copies import read_sketches
    from recontrast.inference.rois import add_rois, apply_roi, describe_other_roi

    model, trained, stored = checkpoints.load_model(file, device)
    recipe, folder = apply_roi(trained, roi)
    groups = add_rois(groups, folder)
    print_data(datasets.describe(groups))
    calibration = stored.calibration
    if calibration is not None:
        mismatch = inference.describe_mismatch(trained, calibration) or describe_other_roi(trained, recipe)
        if mismatch is not None:
            print_warning(f"{file}: {mismatch}")
            calibration = None
    show_metrics(
        model, groups, recipe, out, calibration, inference=inference, device=device,
        trained=read_fingerprints(stored.images), sketches=read_sketches(stored.images), **reading,
    )  # fmt: skip


def show_metrics(
    model: Any, groups: "dict[str, list[Sample]]", recipe: "Recipe", out: Path | None,
    calibration: "Calibration | None", **options: Any
) -> None:  # fmt: skip
    """Evaluate and print the results; ``options`` are those of `recontrast.app.evaluate_job.measure`.

    Images that cannot be read or scored, and maps that cannot be written, are named, and the exit status is 2.
    """
    from recontrast.app.evaluate_job import measure

    with ProgressBar("evaluate") as progress:
        result, decisions, written = measure(
            model, groups, recipe, out, calibration=calibration, errors="keep",
            on_progress=lambda category, done, total: progress(done, total, category), **options,
        )  # fmt: skip
    print_result(result)
    if decisions is not None:
        print_line(decisions.describe())
        for warning in decisions.warnings():
            print_warning(warning)
    if written:
        print_line(f"results: {', '.join(map(str, written))}")
    print_image_errors(result.errors, "with --out DIR, in scores.csv" if out is None else f"see {out / 'scores.csv'}")
    if result.errors:
        raise typer.Exit(2)
