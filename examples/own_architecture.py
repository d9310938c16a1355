"""A network of your own: its decoder, its rule for hard points and its protocol, on everything else of this package.

python examples/own_architecture.py
recontrast train mine --architecture own_architecture:TINY   # in the folder of this file; see docs/extending.md
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import recontrast
from recontrast import Recipe, hard_mined_cosine
from recontrast.data.synthetic import make_demo
from recontrast.models.backbone import Backbone, get_strides
from recontrast.models.network import Network


class TinyReconstruction(Network):
    """Rebuilds the features of a frozen encoder from a noisy bottleneck, level by level, with 1 x 1 convolutions."""

    def __init__(self, backbone: str, *, weights: str | None = None, width: int = 32, noise: float = 0.2) -> None:
        super().__init__()
        self._arguments = {"backbone": backbone, "width": width, "noise": noise}
        self.encoder = Backbone(backbone, levels=2, weights=weights, frozen=True)
        self.mean, self.std, self.frozen = self.encoder.mean, self.encoder.std, None
        self.stride = self.encoder.strides[-1]
        self.decoders = nn.ModuleList(
            nn.Sequential(nn.Dropout(noise), nn.Conv2d(c, width, 1), nn.GELU(), nn.Conv2d(width, c, 1))
            for c in self.encoder.channels
        )

    @property
    def config(self):
        """Arguments of the constructor, for checkpoints."""
        return dict(self._arguments)

    max_distance = 2.0  # of two features, by their cosine

    def forward(self, images: Tensor, frozen_features: Sequence[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the features of each level and their reconstruction."""
        features = self.encoder(images) if frozen_features is None else frozen_features
        return [(f, decoder(f)) for f, decoder in zip(features, self.decoders, strict=True)]

    def distances(self, images: Tensor, views: str = "both", *, exportable: bool = False):
        """Return the distance of each point on each level, (N, h, w), and no image scores."""
        return [1 - torch.cosine_similarity(f, r, dim=1).float() for f, r in self(images)], None


@dataclass(frozen=True)
class Softmax:
    """Rule: the weight of a point is its softmax over all points, times their number."""

    sharpness: float

    def __call__(self, distances: Tensor, all_distances: Tensor) -> Tensor:
        """Return a gradient weight for each distance of this process (N, h, w), given those of all processes."""
        largest = all_distances.amax()
        mean = (self.sharpness * (all_distances - largest)).exp().mean()
        return (self.sharpness * (distances - largest)).exp() / mean


def compute_loss(pairs, recipe: Recipe, parameter, shares) -> Tensor:
    """Return the loss of a training step."""
    teachers, students = zip(*pairs, strict=True)
    return hard_mined_cosine(teachers, students, Softmax(recipe.options["sharpness"]), shares=shares)


TINY = recontrast.Architecture(
    network=TinyReconstruction,
    build=lambda recipe, category: TinyReconstruction(
        recipe.backbone, weights=recipe.weights, **{name: recipe.options[name] for name in ("width", "noise")}
    ),
    compute_stride=lambda recipe: get_strides(recipe.backbone, 2)[-1],
    compute_loss=compute_loss,
    fields=("optimiser", "schedule", "warmup", "lr_end", "clip", "sampling"),
    options={"width": 32, "noise": 0.2, "sharpness": 4.0},
    settings={"size": 128, "score": 0.01, "blur": "zero5", "reduce": "mean", "schedule": "cosine", "warmup": 0.1},
)

if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("demo-data"), help="created if it does not exist")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--backbone", default="resnet18")
    options.add_argument("--weights", default="random")
    args = options.parse_args()
    recontrast.register_architecture("own_architecture:TINY", TINY)
    fields = {"architecture": "own_architecture:TINY", "backbone": args.backbone, "weights": args.weights, "batch": 8}
    data = make_demo(args.data)
    detector = recontrast.train(data, "own-run", category="brick", steps=args.steps, overwrite=True, **fields)
    print(recontrast.evaluate(detector, data, category="brick"))
