"""Stages of `gpu.sh`: GPU measurements, written to one JSON file.

    python benchmarks/gpu.py loss --out results.json

GPU work is timed with CUDA events, and the figures are medians of many runs. Each row is written as soon as it is
measured, so an interrupted run keeps its results. The compared implementations are those of `bench_ops.py`. Ratios
compare rows of one run on one GPU. `--device cpu --tiny` runs every code path without a GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

# The restated reference is in tests/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "tests"))
import gpu_evaluation
import gpu_operators
import gpu_rivals
import gpu_training
from measurements import Run, table

STAGES = {
    "loss": gpu_operators.loss,
    "map": gpu_operators.maps,
    "norms": gpu_operators.norms,
    "train": gpu_training.training,
    "profile": gpu_training.profile,
    "kernels": gpu_operators.kernels,
    "evaluate": gpu_evaluation.evaluation,
    "rivals": gpu_rivals.rivals,
    "whole": gpu_evaluation.whole,
}


def main() -> None:
    """Run one stage or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes that run on a CPU in seconds, to test every code path"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="measure only rows whose name contains one of these texts"
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit after which no row starts")
    args = parser.parse_args()
    run = Run(args)
    if args.stage == "table":
        print(table(run.record))
        return
    torch.manual_seed(0)
    STAGES[args.stage](run)


if __name__ == "__main__":
    main()
