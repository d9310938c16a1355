"""Your own training loop around the model, the loss and the map: python examples/own_loop.py"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.optim import AdamW

from recontrast import AnomalyMap, ReContrast, alpha_at, deviation, metrics, pairs_loss
from recontrast.data.datasets import load
from recontrast.data.images import normalise, read_image
from recontrast.data.synthetic import make_demo

options = argparse.ArgumentParser(description=__doc__)
options.add_argument(
    "--data", type=Path, default=Path("demo-data"), help="made if it is not there (default: %(default)s)"
)
options.add_argument("--category", default="brick")
options.add_argument("--steps", type=int, default=60)
options.add_argument("--size", type=int, default=128, help="pixels")
options.add_argument("--backbone", default="tf_efficientnet_lite0", help="timm's name")
options.add_argument("--weights", default="package", help='a file, "package", "random", or "" for timm\'s hub')
args = options.parse_args()

samples = load(make_demo(args.data), [args.category])[args.category]  # your own folder: load("mine", ["screw"])
train = [s for s in samples if s.split == "train"]
test = [s for s in samples if s.split == "test"]
labels = [s.label for s in test]
pixels = {s.path: read_image(s.path, size=args.size) for s in samples}  # (H, W, 3) uint8; no augmentation: read once

torch.manual_seed(0)
model = ReContrast(args.backbone, weights=args.weights or None, encoder_bn="eval")
optimiser = AdamW(
    [{"params": model.decoder_parameters(), "lr": 2e-3}, {"params": model.encoder_parameters(), "lr": 1e-5}]
)
amap = AnomalyMap(model.map_sizes(args.size), args.size)


def batch(some):
    return normalise(np.stack([pixels[s.path] for s in some]), model.mean, model.std)  # (N, 3, H, W) float32


def auroc():
    model.eval()
    with torch.inference_mode():
        scores = [amap.maps_and_scores(model(batch(test[i : i + 16])))[1] for i in range(0, len(test), 16)]
    model.train()
    return 100 * metrics.auroc(torch.cat(scores), labels)


print(f"{args.category}: {len(train)} good images to train on, {len(test)} to test, {sum(labels)} of them defective")
print(f"before training: I-AUROC {auroc():.1f}")
for step in range(args.steps):
    some = [train[i] for i in torch.randperm(len(train))[:8]]
    alpha = alpha_at(step, args.steps, ramp=1.0)  # rises from -3 to 1: more and more points count as easy
    loss = pairs_loss(model(batch(some)), deviation(alpha))  # hard_mined_cosine of all pairs of levels
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if (step + 1) % 20 == 0:
        print(f"step {step + 1}: loss {loss.item():.4f}")
print(f"after training: I-AUROC {auroc():.1f}")
