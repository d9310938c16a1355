"""Train with your own loop around model, loss and anomaly map: python examples/own_loop.py"""

import argparse
from pathlib import Path

import numpy as np
import torch

from recontrast import AnomalyMap, ReContrast, alpha_at, deviation, hard_mined_cosine, metrics
from recontrast.data.datasets import load
from recontrast.data.images import normalise, read_image
from recontrast.data.synthetic import make_demo

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--data", type=Path, default=Path("demo-data"), help="created if it does not exist")
options.add_argument("--steps", type=int, default=60)
options.add_argument("--size", type=int, default=128, help="pixels")
args = options.parse_args()
samples = load(make_demo(args.data), ["brick"])["brick"]  # your own folder: load("mine", ["screw"])["screw"]
train, test = ([s for s in samples if s.split == split] for split in ("train", "test"))
pixels = {s.path: read_image(s.path, size=args.size) for s in samples}  # (H, W, 3) uint8, read once
torch.manual_seed(0)
model = ReContrast("tf_efficientnet_lite0", weights="package", encoder_bn="eval")  # any timm name; weights="FILE.pth"
rates = {2e-3: model.decoder_parameters(), 1e-5: model.encoder_parameters()}
optimiser = torch.optim.AdamW([{"params": weights, "lr": rate} for rate, weights in rates.items()])
amap = AnomalyMap(model.map_sizes(args.size), args.size)


def pairs(batch):  # 2 x 3 (teacher, student) pairs of features (N, C, h, w)
    return model(normalise(np.stack([pixels[s.path] for s in batch]), model.mean, model.std))


for step in range(args.steps):
    teachers, students = zip(*pairs([train[i] for i in torch.randperm(len(train))[:8]]), strict=True)
    rule = deviation(alpha_at(step, args.steps, ramp=1.0))  # the number of easy points increases
    loss = hard_mined_cosine(teachers, students, rule) / 2  # sum over the levels, mean over the two groups of pairs
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"step {step + 1}: loss {loss.item():.4f}")
model.eval()
with torch.inference_mode():
    scores = torch.cat([amap.maps_and_scores(pairs(test[i : i + 16]))[1] for i in range(0, len(test), 16)])
print(f"{len(test)} test images: I-AUROC {100 * metrics.auroc(scores, [s.label for s in test]):.1f}")
