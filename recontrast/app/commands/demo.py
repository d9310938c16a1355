"""``recontrast demo``: train a detector for three photographed surfaces."""

import math
from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import print_line
from recontrast.app.options import Device, Overwrite, check_writable, parse_duration, path_option
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_result


def demo(
    out: Annotated[Path, path_option(help="Folder for images, checkpoint, results and heat maps.")] = Path("demo"),
    budget: Annotated[
        str | None, typer.Option(help="Time for the training, such as 30s or 2m. Default: 30s; see train --budget.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of ReContrast, which is then trained instead of what fits into --budget."),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Less than a minute; shows that it works, not how well.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also train ReContrast (150 steps; 20 with --short), leave its trained encoder out of the map, freeze "
            "it, and evaluate it untrained.",
        ),
    ] = False,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one detector for three photographed surfaces with drawn defects, in half a minute on a CPU."""
    from recontrast.app import demo as demonstration

    seconds = None if budget is None else parse_duration("--budget", budget)
    check_writable(out)
    with ProgressBar("train") as progress:

        def show_step(variant: str, step: int, steps: int, loss: float, rate: float) -> None:
            progress(step, steps, f"{variant}: {'' if math.isnan(loss) else f'loss {loss:.4f}, '}{rate:.1f} images/s")

        result = demonstration.run_demo(
            out, budget=seconds, steps=steps, seed=seed, short=short, compare=compare, device=device,
            overwrite=overwrite, on_step=show_step, on_plan=lambda plan: print_line(f"chosen: {plan.description}"),
        )  # fmt: skip
    for variant, metrics in result.results.items():
        print_result(metrics, variant)
    print_line(f"trained in {result.seconds:.0f} s; heat maps: {', '.join(map(str, result.sheets))}")
    print_line(
        f"try: recontrast predict {result.checkpoint} {out / 'data' / 'brick' / 'test'} --out {out / 'predicted'}"
    )
