"""Use the losses in a model of your own: python examples/losses_in_your_model.py

A student reconstructs the features of a frozen vision transformer, once with the rule of Dinomaly (the hardest tenth of
the points keeps its gradient, the other points keep a tenth of it) and once with that of INP-Former (the weight is the
cube of the relative distance). The losses do not need recontrast's model: teacher and student are lists of features
(N, C, h, w).

The teacher has RANDOM weights, so that the example runs without a download. The numbers show that training works, not
how good the methods are. To judge them, use --weights pretrained (timm's hub) and train for thousands of steps.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.optim import AdamW

from recontrast import AnomalyMap, hard_mined_cosine, hardest, metrics, power
from recontrast.data.datasets import load
from recontrast.data.images import normalise, read_image
from recontrast.data.synthetic import make_demo

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--data", type=Path, default=Path("demo-data"), help="created if it does not exist")
options.add_argument("--category", default="brick")
options.add_argument("--steps", type=int, default=100)
options.add_argument("--size", type=int, default=128, help="pixels")
options.add_argument("--encoder", default="vit_tiny_patch16_224", help="name of a vision transformer in timm")
options.add_argument("--weights", choices=("random", "pretrained"), default="random")
args = options.parse_args()
LAYERS = (5, 8, 11)  # encoder layers to reconstruct, counted from 0


class Student(nn.Module):
    """Bottleneck with dropout and a transformer block for each reconstructed layer of the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(4 * width, width)
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, batch_first=True) for _ in LAYERS
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        n, c, h, w = maps[0].shape
        x = self.bottleneck(sum(maps).flatten(2).mT / len(maps))
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x.mT.reshape(n, c, h, w))
        return outputs[::-1]  # the first block reconstructs the deepest layer


samples = load(make_demo(args.data), [args.category])[args.category]
train = [s for s in samples if s.split == "train"]
test = [s for s in samples if s.split == "test"]
labels = [s.label for s in test]
pixels = {s.path: read_image(s.path, size=args.size) for s in samples}

torch.manual_seed(0)
encoder = timm.create_model(args.encoder, pretrained=args.weights == "pretrained", img_size=args.size)
encoder.eval().requires_grad_(False)
mean, std = (encoder.pretrained_cfg[name] for name in ("mean", "std"))
side = args.size // 16
amap = AnomalyMap([side] * len(LAYERS), args.size, reduce="mean")


def teacher(batch) -> list[torch.Tensor]:
    with torch.no_grad():
        images = normalise(np.stack([pixels[s.path] for s in batch]), mean, std)
        return encoder.forward_intermediates(images, indices=list(LAYERS), intermediates_only=True)


def auroc(student: Student) -> float:
    student.eval()
    features = teacher(test)
    with torch.inference_mode():
        _, scores = amap.maps_and_scores(list(zip(features, student(features), strict=True)), 0.01)
    return 100 * metrics.auroc(scores, labels)


for name, rule in (("Dinomaly's rule", hardest(0.1, factor=0.1)), ("INP-Former's rule", power(3.0))):
    torch.manual_seed(0)
    student = Student(encoder.embed_dim)
    optimiser = AdamW(student.parameters(), lr=1e-3, weight_decay=1e-4)
    before, losses = auroc(student), []
    student.train()
    for _ in range(args.steps):
        features = teacher([train[i] for i in torch.randperm(len(train))[:8]])
        loss = hard_mined_cosine(features, student(features), rule) / len(LAYERS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, I-AUROC {before:.1f} -> {auroc(student):.1f}")
