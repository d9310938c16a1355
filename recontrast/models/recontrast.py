"""ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3; upstream models/recontrast.py).

Two encoders see the image: a frozen one, and one that is trained with a small step. Both go through one bottleneck and
one decoder, whose two heads rebuild each encoder's features from the other's.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recontrast.models.backbone import Backbone
from recontrast.models.blocks import RESNETS, build_mirror_plan, compute_mirror_widths
from recontrast.models.bottleneck import Bottleneck
from recontrast.models.decoder import MirrorDecoder, ReverseResNet
from recontrast.models.partial_norm import convert_partial_norm

__all__ = ["Bottleneck", "MirrorDecoder", "ReContrast", "ReverseResNet"]

PARTIAL_NORM_EPS = 1e-6  # of the trained encoder alone: upstream sets it after it has copied the frozen one


class ReContrast(nn.Module):
    """Trained and frozen encoder, bottleneck and decoder: section 3 of the paper, upstream's models/recontrast.py.

    ``train()`` keeps the frozen encoder in eval mode, and the trained one too where ``encoder_bn`` is "eval" (its
    statistics then stay those of the pretraining; scale and shift are trained all the same).

    Args:
        backbone: timm's name, such as "wide_resnet50_2.tv_in1k" of the paper.
        weights: None (timm's hub), a file, "package" or "random": see `Backbone`.
        levels: features of that many strides, from 4 on.
        encoder_bn: mode of the trained encoder under ``train()``: "train" or "eval". May be changed at any time.
        decoder: "resnet": RD4AD's, for ResNets; "mirror": for any pyramid; "auto": the first where it exists.
        activation: of the decoder: "relu", or "gelu" as in the paper's unified setting.
        partial_norm: `PartialNorm2d` in both encoders, as in the paper's "stable" recipes.
        pairs: "cross": the two encoders, each rebuilt from the other's features; "self": one encoder, rebuilt from its
            own by a decoder without heads (`MirrorDecoder` keeps one, for its widths), as in RD4AD.
        train_encoder: False: the one encoder of ``pairs="self"`` stays as it is, which is RD4AD.

    Attributes:
        encoder, frozen, bottleneck, decoder: the parts; ``frozen`` is None where ``pairs`` is "self".
        mean, std: of the images in [0, 1] that the weights expect.
        stride: pixels; height and width of images must be multiples of it.

    Raises:
        ValueError: an argument outside of what is named here, an unknown backbone, or weights that do not fit it.
        OSError: a weight file, or the hub, cannot be read.
        ImportError: ``weights`` is "package", and there is none for the backbone.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        *,
        weights: str | os.PathLike | None = None,
        levels: int = 3,
        encoder_bn: Literal["train", "eval"] = "train",
        decoder: Literal["auto", "resnet", "mirror"] = "auto",
        activation: Literal["relu", "gelu"] = "relu",
        partial_norm: bool = False,
        pairs: Literal["cross", "self"] = "cross",
        train_encoder: bool = True,
    ) -> None:
        super().__init__()
        _one_of("encoder_bn", encoder_bn, ("train", "eval"))
        _one_of("decoder", decoder, ("auto", "resnet", "mirror"))
        _one_of("activation", activation, ("relu", "gelu"))
        _one_of("pairs", pairs, ("cross", "self"))
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

        self.encoder = Backbone(backbone, levels=levels, weights=weights)
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
            self.bottleneck = Bottleneck(
                channels, strides, build_mirror_plan(channels), compute_mirror_widths(channels)
            )
            self.decoder: nn.Module = MirrorDecoder(channels, strides, heads=heads or 1, activation=activation)
        else:
            self.bottleneck = Bottleneck(channels, strides, plan)
            self.decoder = ReverseResNet(channels, plan, heads=heads, activation=activation)
        self.mean, self.std = self.encoder.mean, self.encoder.std
        self.stride = 2 * strides[-1]
        self.train()

    @property
    def config(self) -> dict[str, Any]:
        """The arguments to build this model again: ``ReContrast(**config, weights="random")``, then load its state."""
        return {**self._arguments, "encoder_bn": self.encoder_bn}

    def train(self, mode: bool = True) -> "ReContrast":
        """Set the mode: see the class.

        Args:
            mode: True: training; False: eval mode, also of the trained encoder.

        Returns:
            The model itself.
        """
        super().train(mode)
        self.encoder.train(mode and self.encoder_bn == "train")
        return self

    def forward(
        self,
        images: Tensor,
        views: Literal["both", "trained", "frozen"] = "both",
        frozen_features: Sequence[Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Features to compare, and what the decoder made of the other encoder's.

        Args:
            images: (N, 3, H, W), in the dtype of the weights, normalised with ``mean`` and ``std``; H and W are
                multiples of ``stride``.
            views: in eval mode, the group with that target alone (Table A6), at half the cost of bottleneck and
                decoder; their statistics in training are of both.
            frozen_features: Cached features of the frozen encoder for these images, (N, C, h, w) of each level. None
                computes them.

        Returns:
            2 L pairs (teacher, student) of (N, C, h, w), in the dtype of the weights, or of autocast, fine to coarse:
            (frozen, head 0 of trained) of the L levels, then (trained, head 1 of frozen); L where ``views`` is one of
            them, or for the one encoder of ``pairs="self"``. A trained encoder's features carry gradient as teachers
            too: the loss stops it.

        Raises:
            ValueError: images of another shape, or views that the model or its mode does not have.
        """
        _one_of("views", views, ("both", "trained", "frozen"))
        if views != "both" and (self.training or self.frozen is None):
            wanted = "'both' in training mode and where pairs is 'self'"
            raise ValueError(f"ReContrast: views: wanted {wanted}, got {views!r}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"ReContrast: images: wanted (N, 3, H, W), got {tuple(images.shape)}")
        self.map_sizes((images.shape[2], images.shape[3]))
        trained = self.encoder(images)
        if self.frozen is None:
            return list(zip(trained, self.decoder(self.bottleneck(trained)), strict=True))
        frozen = self.frozen(images) if frozen_features is None else frozen_features
        if views != "both":
            teachers, sources, head = (frozen, trained, 0) if views == "frozen" else (trained, frozen, 1)
            return list(zip(teachers, self.decoder(self.bottleneck(sources), only=head), strict=True))
        joint = [torch.cat(pair) for pair in zip(trained, frozen, strict=True)]  # one batch: BatchNorm mixes both
        students = self.decoder(self.bottleneck(joint))
        return list(zip([*frozen, *trained], students, strict=True))

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each level's features, fine to coarse, for images of ``size``, pixels: int or (h, w).

        Raises:
            ValueError: height or width is no multiple of ``stride``.
        """
        height, width = (size, size) if isinstance(size, int) else size
        if height < self.stride or width < self.stride or height % self.stride or width % self.stride:
            wanted = f"height and width of at least {self.stride} px and multiples of it"
            raise ValueError(
                f"ReContrast: images: wanted {wanted} (stride of {self._arguments['backbone']}), got {height}x{width}"
            )
        return [(height // stride, width // stride) for stride in self.encoder.strides]

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What the small learning rate is for; nothing where the encoder is not trained."""
        return (p for p in self.encoder.parameters() if p.requires_grad)

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """What the large learning rate is for: bottleneck and decoder."""
        return chain(self.bottleneck.parameters(), self.decoder.parameters())


def _one_of(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"ReContrast: {argument}: wanted {' or '.join(map(repr, allowed))}, got {value!r}")
