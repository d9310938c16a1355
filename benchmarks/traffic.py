"""What each CUDA kernel moves through memory, by the model of `tests/emulate_cuda/traffic.py`; needs g++ and no GPU.

    python benchmarks/traffic.py

Compiles the kernels for the CPU (a minute), runs them on small features and prints a table. "least" counts each input
and each result once. "warps" counts the sectors of 32 bytes that warps ask for, "blocks" those that blocks ask for if
their L1 cache serves the rest, "lines" the transactions of 128 bytes for each 128 bytes of the least.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "tests"))
import emulate_cuda
import torch
from emulate_cuda.traffic import Launch, count_traffic
from op_cases import make_anomaly_map_arguments

SHAPES = [(2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4)]  # WideResNet-50-2 at an eighth of the side
PROCESSORS = 4  # and of the multiprocessors
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]


def describe(launch: Launch, case: str, least: int) -> str:
    """Return a row of the table."""
    lines = 128 * (launch.load.lines + launch.store.lines)
    ratios = (launch.moved / least, launch.moved_by_blocks / least, lines / least)
    return f"| {launch.kernel} | {case} | {least / 1e6:.2f} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        emulated = emulate_cuda.load(Path(folder))
        print("| kernel | features | least, MB | warps | blocks | lines |\n|---|---|---|---|---|---|")

        def show(function: Callable[[object], object], case: str, least: dict[str, int]) -> None:
            for launch in count_traffic(emulated, function, PROCESSORS):
                if launch.kernel in least:
                    print(describe(launch, case, least[launch.kernel]), flush=True)

        measure_features(show)
        measure_norm_act(emulated, show)
        measure_map(show)


def measure_features(show: Callable) -> None:
    """Show the sums, the loss and the gradient of three pairs."""
    points = sum(n * h * w for n, _, h, w in SHAPES)
    for dtypes in KINDS:
        for layout, memory_format in LAYOUTS.items():
            x, y = (
                [torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for shape in SHAPES]
                for dtype in dtypes
            )
            bytes_x, bytes_y = (sum(t.nbytes for t in ts) for ts in (x, y))
            case = f"{' and '.join(dict.fromkeys(str(dtype)[6:] for dtype in dtypes))}, {layout}"
            forward, backward = bytes_x + bytes_y + 12 * points, bytes_x + 2 * bytes_y + 8 * points
            names = {"sums_by_planes": forward, "sums_by_rows": forward}
            show(lambda ops, x=x, y=y: ops.cosine_sums_group(x, y), case, names)
            grad = torch.rand(3 * points) + 1
            names = {"gradient_by_planes": backward, "gradient_by_rows": backward}
            show(lambda ops, x=x, y=y, g=grad: ops.cosine_sums_group_backward(g, x, y), case, names)
    sums = torch.rand(3 * 8192) + 0.5
    show(
        lambda ops: ops.mined_loss(sums, [2], [4096], "deviation", 1.0, None, 0.0),
        "8192 points",
        {"summarise_pieces": sums.nbytes},
    )


def measure_norm_act(emulated: emulate_cuda.Emulator, show: Callable) -> None:
    """Show the passes of BatchNorm with ReLU in training mode."""
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(2, 64, 32, 32).to(dtype).contiguous(memory_format=memory_format)
            weight, bias, grad = torch.rand(64), torch.rand(64), torch.randn_like(x)
            forward = (x, None, weight, bias, None, None, "relu", 1e-5)
            case = f"{str(dtype)[6:]}, {layout}"
            show(lambda ops, f=forward: ops.norm_act(*f), case, {"moments_part": x.nbytes, "apply": 2 * x.nbytes})
            _, moments = emulated.operators.norm_act(*forward)
            back = (grad, x, None, weight, bias, moments, True, "relu", 1e-5, True)
            names = {"sums_part": 2 * x.nbytes, "gradient": 3 * x.nbytes}
            show(lambda ops, b=back: ops.norm_act_backward(*b), case, names)


def measure_map(show: Callable) -> None:
    """Show the map of four images from two levels."""
    distances, rows, cols = make_anomaly_map_arguments([(16, 16), (8, 8)], (64, 64), 4, "cpu")
    least = sum(t.nbytes for t in (*distances, *rows[:2], *cols[:2])) + 4 * 4 * 64 * 64
    show(lambda ops: ops.anomaly_map(distances, rows, cols, 1.0), "64 px, 4 images", {"compute_tile": least})


if __name__ == "__main__":
    main()
