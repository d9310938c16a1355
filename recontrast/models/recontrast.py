"""The ReContrast network (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3).

Two encoders process each image: a frozen one, and one that is trained with a small learning rate. Both share one
bottleneck and one decoder with two heads, and each head reconstructs the features of one encoder from those of the
other (upstream models/recontrast.py). With a vision transformer all levels, the code and the decoder have one size.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recontrast import reference
from recontrast.distances import point_distances
from recontrast.models.backbone import Backbone
from recontrast.models.blocks import RESNETS, build_mirror_plan, compute_mirror_widths
from recontrast.models.bottleneck import Bottleneck
from recontrast.models.decoder import MirrorDecoder, ReverseResNet
from recontrast.models.network import Network, Views, check_choice
from recontrast.models.partial_norm import convert_partial_norm

__all__ = ["Bottleneck", "MirrorDecoder", "ReContrast", "ReverseResNet"]

PARTIAL_NORM_EPS = 1e-6  # for the trained encoder only: upstream sets it after copying the frozen encoder


class ReContrast(Network):
    """ReContrast: two encoders, a bottleneck and a decoder (section 3 of the paper; upstream models/recontrast.py).

    The frozen encoder is always in eval mode. With ``encoder_bn="eval"`` the trained encoder is too: its BatchNorm
    statistics stay those of the pretraining, but scale and shift are still trained.

    Args:
        backbone: Model name in timm. The paper uses "wide_resnet50_2.tv_in1k".
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        levels: Number of feature levels, from stride 4 on.
        layers: Blocks of each level of a vision transformer, which replace ``levels``, see `Backbone`.
        encoder_bn: Mode of the trained encoder in training, "train" or "eval". Can be changed at any time. It makes no
            difference to a backbone without BatchNorm and dropout.
        decoder: "resnet" is the decoder of RD4AD and needs a ResNet. "mirror" fits any backbone. "auto" uses "resnet"
            if it fits the backbone.
        activation: Activation of the decoder: "relu", or "gelu" as in the paper's unified setting.
        partial_norm: Whether to use `PartialNorm2d` in both encoders, as in the paper's "stable" recipes.
        pairs: "cross" reconstructs the features of each encoder from those of the other. "self" has a single encoder,
            whose features are reconstructed from themselves by a decoder without heads, as in RD4AD (`MirrorDecoder`
            keeps one head, which maps its widths to the encoder's channels).
        train_encoder: Whether to train the encoder. False needs ``pairs="self"`` and gives RD4AD.

    Attributes:
        encoder: Trained encoder.
        frozen: Frozen encoder, or None if ``pairs`` is "self".
        bottleneck: One-class bottleneck.
        decoder: Decoder.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.

    Raises:
        ValueError: If an argument has a value not listed above, the backbone is unknown, or the weights do not fit it.
        OSError: If the weight file or the hub cannot be read.
        ImportError: If ``weights`` is "package" and no package for the backbone is installed.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        *,
        weights: str | os.PathLike | None = None,
        levels: int = 3,
        layers: Sequence[Sequence[int]] | None = None,
        encoder_bn: Literal["train", "eval"] = "train",
        decoder: Literal["auto", "resnet", "mirror"] = "auto",
        activation: Literal["relu", "gelu"] = "relu",
        partial_norm: bool = False,
        pairs: Literal["cross", "self"] = "cross",
        train_encoder: bool = True,
    ) -> None:
        super().__init__()
        check_choice("ReContrast", "encoder_bn", encoder_bn, ("train", "eval"))
        check_choice("ReContrast", "decoder", decoder, ("auto", "resnet", "mirror"))
        check_choice("ReContrast", "activation", activation, ("relu", "gelu"))
        check_choice("ReContrast", "pairs", pairs, ("cross", "self"))
        if pairs == "cross" and not train_encoder:
            raise ValueError("ReContrast: pairs: wanted 'self' where train_encoder is False, got 'cross'")
        plan = RESNETS.get(backbone.partition(".")[0])
        if decoder == "resnet" and plan is None:
            wanted = f"'mirror' or 'auto' for backbone {backbone!r} ('resnet' is for {', '.join(RESNETS)})"
            raise ValueError(f"ReContrast: decoder: wanted {wanted}, got 'resnet'")
        self.encoder_bn = encoder_bn
        self._arguments = {"backbone": backbone, "levels": levels, "decoder": decoder}
        self._arguments |= {"activation": activation, "partial_norm": partial_norm}
        self._arguments |= {"pairs": pairs, "train_encoder": train_encoder}

        self.encoder = Backbone(backbone, levels=levels, weights=weights, layers=layers)
        if self.encoder.layers is not None:
            self._arguments["layers"] = self.encoder.layers
        self.frozen = copy.deepcopy(self.encoder) if pairs == "cross" else None
        channels, strides = self.encoder.channels, self.encoder.strides
        if partial_norm:
            if not any(isinstance(m, nn.BatchNorm2d) for m in self.encoder.modules()):
                raise ValueError(f"ReContrast: partial_norm: wanted a backbone with BatchNorm2d, got {backbone!r}")
            convert_partial_norm(self.encoder, eps=PARTIAL_NORM_EPS)
            if self.frozen is not None:
                convert_partial_norm(self.frozen)
        if self.frozen is not None:
            self.frozen.freeze()
        if not train_encoder:
            self.encoder.freeze()
        heads = 2 if pairs == "cross" else 0
        if plan is None or decoder == "mirror":
            mirror, halves = build_mirror_plan(channels), not self.encoder.is_token_model
            self.bottleneck = Bottleneck(channels, strides, mirror, compute_mirror_widths(channels), halves=halves)
            self.decoder: nn.Module = MirrorDecoder(
                channels, strides, heads=heads or 1, activation=activation, doubles=halves
            )
        else:
            self.bottleneck = Bottleneck(channels, strides, plan)
            self.decoder = ReverseResNet(channels, plan, heads=heads, activation=activation)
        self.mean, self.std = self.encoder.mean, self.encoder.std
        self.stride = strides[-1] * (1 if self.encoder.is_token_model else 2)
        self.train()

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `Network.config`."""
        return {**self._arguments, "encoder_bn": self.encoder_bn}

    def train(self, mode: bool = True) -> "ReContrast":
        """Set training or eval mode.

        Args:
            mode: True for training mode, with the trained encoder in the mode ``encoder_bn``. False for eval mode.

        Returns:
            The model itself.
        """
        super().train(mode)
        self.encoder.train(mode and self.encoder_bn == "train")
        return self

    def forward(
        self,
        images: Tensor,
        views: Views = "both",
        frozen_features: Sequence[Tensor] | None = None,
        *,
        known: Sequence[Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the encoders' features (teachers) and their reconstructions (students).

        Args:
            images: Normalised images (N, 3, H, W), in the dtype of the weights. H and W are multiples of ``stride``.
            views: Groups of pairs to compute: "both", or in eval mode only those with the "trained" or the "frozen"
                encoder as teacher (Table A6), at half the cost of bottleneck and decoder. Training needs both, because
                their features share the batch statistics of bottleneck and decoder.
            frozen_features: Cached features of the frozen encoder (of the only one if it is frozen) for these images,
                (N, C, h, w) of each level. None computes them.
            known: Deprecated name of ``frozen_features``.

        Returns:
            Pairs (teacher, student) of features (N, C, h, w), fine to coarse, in the dtype of the weights or of
            autocast. With two encoders: one pair per level with the frozen encoder's features and the output of head 0
            for the trained encoder's features, then one pair per level with the trained encoder's features and the
            output of head 1 for the frozen encoder's. ``views`` selects one of the groups. A single encoder has one
            group. Teachers from the trained encoder require gradients, which the loss stops.

        Raises:
            ValueError: If the images have another shape, or ``views`` does not fit the mode or the model.
        """
        if known is not None:
            caller = 4  # frames: forward, two of nn.Module.__call__, the caller
            warnings.warn("ReContrast: known is deprecated: use frozen_features", DeprecationWarning, stacklevel=caller)
            frozen_features = known if frozen_features is None else frozen_features
        check_choice("ReContrast", "views", views, ("both", "trained", "frozen"))
        if views != "both" and (self.training or self.frozen is None):
            wanted = "'both' in training mode and where pairs is 'self'"
            raise ValueError(f"ReContrast: views: wanted {wanted}, got {views!r}")
        self.check_images(images)
        if self.frozen is None:
            trained = self.encoder(images) if frozen_features is None else frozen_features
            return list(zip(trained, self.decoder(self.bottleneck(trained)), strict=True))
        trained = self.encoder(images)
        frozen = self.frozen(images) if frozen_features is None else frozen_features
        if views != "both":
            teachers, sources, head = (frozen, trained, 0) if views == "frozen" else (trained, frozen, 1)
            return list(zip(teachers, self.decoder(self.bottleneck(sources), only=head), strict=True))
        # One batch, so that BatchNorm uses the features of both encoders.
        joint = [torch.cat(pair) for pair in zip(trained, frozen, strict=True)]
        students = self.decoder(self.bottleneck(joint))
        return list(zip([*frozen, *trained], students, strict=True))

    @property
    def max_distance(self) -> float:
        """Largest value of a cosine distance."""
        return 2.0

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], None]:
        """Compute the cosine distance between teacher and student at each point, see `Network.distances`.

        Args:
            images: Normalised images (N, 3, H, W), in the dtype of the weights.
            views: Groups of pairs to compute, see `forward`.
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            distances: Distances (N, h, w) of each pair that `forward` returns, float32.
            scores: None.

        Raises:
            ValueError: If `forward` raises it.
        """
        pairs = self(images, views)
        if exportable:
            return [1 - reference.cosine(reference.cosine_sums(teacher, student)) for teacher, student in pairs], None
        return point_distances(pairs), None

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of bottleneck and decoder, which use the large learning rate."""
        return chain(self.bottleneck.parameters(), self.decoder.parameters())
