"""Run every kernel once on small shapes, for ``compute-sanitizer python benchmarks/sanitize.py``.

The results are not compared with anything.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from recontrast import AnomalyMap, deviation, hard_mined_cosine, hardest, ops, power

device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
SHAPES = [(2, 64, 8, 8), (3, 5, 7, 13), (1, 1030, 2, 2)]
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for layout in (torch.contiguous_format, torch.channels_last):
        pairs = [
            [torch.randn(s, device=device, dtype=dtype).contiguous(memory_format=layout) for s in SHAPES] for _ in "xy"
        ]
        for t in pairs[1]:
            t.requires_grad_()
        for rule in (deviation(1.0), hardest(0.1), power(3.0)):
            hard_mined_cosine(*pairs, rule).backward()
        for act in ("none", "relu", "gelu"):
            for shape in SHAPES:
                x, residual = (
                    torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout) for _ in "xr"
                )
                weight, bias = torch.rand(2, shape[1], device=device)
                for t in (x, residual, weight, bias):
                    t.requires_grad_()
                ops.norm_act(x, residual, weight, bias, act=act)[0].sum().backward()
                ops.norm_act(x, None, weight, bias, mean=bias.detach(), var=weight.detach(), act=act)[
                    0
                ].sum().backward()
mixed = torch.randn(2, 6, 5, 4, device=device), torch.randn(2, 6, 4, 5, device=device).mT.bfloat16()
torch.ops.recontrast.cosine_sums_backward(ops.cosine_sums(*mixed), *mixed)
amap = AnomalyMap([13, 5], 40, method="fused")
for images in (1, 6):
    amap.from_distances([torch.rand(images, size, size, device=device) for size in (13, 5)])
# Enough images for a GPU with 132 multiprocessors to use the kernel for four images at once, as in a large evaluation.
large = AnomalyMap([32, 16], 128, method="fused")
large.from_distances([torch.rand(136 if device == "cuda" else 2, size, size, device=device) for size in (32, 16)])
if device == "cuda":
    torch.cuda.synchronize()
print("ran", ops.BACKEND[torch.device(device).type])
