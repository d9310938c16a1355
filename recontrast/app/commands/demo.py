"""``recontrast demo``: train a detector for three photographed surfaces."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import print_line
from recontrast.app.options import Device, Overwrite, check_writable, path_option
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_result


def demo(
    out: Annotated[Path, path_option(help="Folder for images, checkpoint, results and heat maps.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: 150, or 20 with --short.")] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Less than a minute; shows that it works, not how well.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also evaluate without the trained encoder in the map, with a frozen encoder, and untrained.",
        ),
    ] = False,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one detector for three photographed surfaces with drawn defects, in minutes on a CPU."""
    from recontrast.app import demo as demonstration

    check_writable(out)
    with ProgressBar("train") as progress:
        result = demonstration.run_demo(
            out, steps=steps, seed=seed, short=short, compare=compare, device=device, overwrite=overwrite,
            on_step=lambda variant, step, steps, loss, rate: progress(
                step, steps, f"{variant}: loss {loss:.4f}, {rate:.1f} images/s"),
        )  # fmt: skip
    for variant, metrics in result.results.items():
        print_result(metrics, variant)
    print_line(f"trained in {result.seconds:.0f} s; heat maps: {', '.join(map(str, result.sheets))}")
    print_line(
        f"try: recontrast predict {result.checkpoint} {out / 'data' / 'brick' / 'test'} --out {out / 'predicted'}"
    )
