"""``recontrast demo``: train a detector for three photographed surfaces."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import ProgressBar, print_result
from recontrast.app.options import Device, check_writable


def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, checkpoint, results and heat maps.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Of training. Default: 150, 20 with --short.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Under a minute: shows that it works, not how well.")] = False,
    seed: Annotated[int, typer.Option(help="Of pictures, weights and order.")] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also without the trained encoder, in the map and in training, and with an untrained decoder.",
        ),
    ] = False,
    device: Device = None,
) -> None:
    """Train one detector for three photographed surfaces with drawn defects: minutes on a CPU, nothing to download."""
    from recontrast.app import demo as demonstration

    check_writable(out)
    with ProgressBar("train") as shown:
        found = demonstration.run_demo(
            out, steps=steps, seed=seed, short=short, compare=compare, device=device,
            on_step=lambda variant, step, steps, loss, rate: shown(
                step, steps, f"{variant}: loss {loss:.4f}, {rate:.1f} images/s"),
        )  # fmt: skip
    for variant, result in found.results.items():
        print_result(result, variant)
    typer.echo(f"trained in {found.seconds:.0f} s; heat maps: {', '.join(map(str, found.sheets))}")
    typer.echo(
        f"try: recontrast predict {found.checkpoint} {out / 'data' / 'brick' / 'test'} --out {out / 'predicted'}"
    )
