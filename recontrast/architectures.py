"""Architectures: how a recipe builds a network, and how the network learns from good images.

A network that is trained by steps has a loss; one that is fitted in a single pass observes all images and then computes
what it keeps. Everything else needs the methods of `recontrast.models.network.Network` alone: training loops,
inference, tiles, calibration, checkpoints, export and report have no case for any architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from recontrast.anomaly_map import AnomalyMap
from recontrast.inside import pool_inside
from recontrast.loss import compute_mean, compute_mean_inside, pairs_loss
from recontrast.mining import Rule, alpha_at, deviation, hardest, power
from recontrast.models.backbone import get_strides, list_layers
from recontrast.models.dinomaly import Dinomaly
from recontrast.models.ensemble import Ensemble
from recontrast.models.inp_former import INPFormer
from recontrast.models.network import Network
from recontrast.models.padim import PaDiM
from recontrast.models.patchcore import PatchCore
from recontrast.models.recontrast import ReContrast
from recontrast.models.token_network import GROUPS
from recontrast.models.uniad import UniAD
from recontrast.recipes.recipe import Recipe, to_pair

# Outputs of the network's forward, recipe, parameter of the mining rule, images of each process -> loss. With
# `Architecture.masks_loss` also the keyword inside: whether each pixel is in the region of interest, (N or 1, H, W).
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Architecture:
    """An architecture: its network, and how a recipe builds, trains or fits it.

    Either ``compute_loss`` or ``fit`` is set. Those of this package are ReContrast (Guo et al., NeurIPS 2023,
    https://arxiv.org/abs/2306.02602) and the methods that it is compared with.

    Attributes:
        network: Class of the network.
        build: Builds an untrained network from a recipe and the name of a category.
        compute_stride: Returns the number of pixels of which the sides of images must be multiples.
        compute_loss: Returns the loss of a training step, a scalar.
        fit: Computes what the network keeps of the images that `OnePassNetwork.observe` collected.
        plan_memory: Checks before a pass that it fits into memory. Takes the network, the recipe, the number of images
            and the available bytes, and returns a remark for the user, or None. Raises ValueError if it cannot fit.
        is_extendable: Whether a fitted network can be fitted to further images.
        needs_count: Whether it then needs the number of images that it was fitted to, see `OnePassNetwork.resume`.
        needs_former: Whether it then needs these images too.
        masks_loss: Whether ``compute_loss`` takes a region of interest, ``inside``. Otherwise the network learns the
            whole image, and only its map and score have the region.
        fields: Recipe fields that only some architectures have, such as "levels", "rule" or "optimiser", and that this
            one uses. For an architecture of your own; a recipe that changes others is refused.
        options: Options that this architecture alone has, and their defaults: texts, numbers, true, false or tuples.
            ``recipe.options`` holds their values.
        settings: Values of recipe fields to begin with if this architecture is chosen without a recipe.
    """

    network: type[Network]
    build: Callable[[Recipe, str], Network]
    compute_stride: Callable[[Recipe], int]
    compute_loss: Loss | None = None
    fit: Callable[[Any, Recipe], None] | None = None
    plan_memory: Callable[[Any, Recipe, int, int], str | None] | None = None
    is_extendable: bool = False
    needs_count: bool = False
    needs_former: bool = False
    masks_loss: bool = False
    fields: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def get_architecture(recipe: Recipe) -> Architecture:
    """Return the architecture of a recipe.

    Raises:
        ValueError: If it is an architecture of a user that is not imported. A name never imports anything.
    """
    name = recipe.architecture
    if name not in ARCHITECTURES:
        module = name.partition(":")[0]
        raise ValueError(
            f"wanted an architecture that is imported, got {name!r}: if you trust its module, add --import {module} "
            f"(in Python: recontrast.import_architectures({module!r}))"
        )
    return ARCHITECTURES[name]


def build_model(recipe: Recipe, category: str) -> Network:
    """Build the network of a recipe.

    Args:
        recipe: Recipe that sets the architecture, the backbone, the weights and the network's options.
        category: Category, for `Recipe.encoder_bn_for`.

    Returns:
        An untrained network on the CPU, in training mode.

    Raises:
        ValueError: If the network rejects an argument.
        OSError: If the weights cannot be read.
    """
    return get_architecture(recipe).build(recipe, category)


def compute_rule_parameter(recipe: Recipe, step: int) -> float:
    """Compute the parameter of the mining rule at a training step.

    Args:
        recipe: Recipe that sets the rule and its ramp.
        step: Training step, counted from 0.

    Returns:
        Alpha of "deviation", the share of "hardest" or the exponent of "power"; see `recontrast.mining`.
    """
    start, end = {
        "hardest": (recipe.fraction_start, recipe.fraction_end),
        "power": (recipe.exponent_start, recipe.exponent_end),
    }.get(recipe.rule, (recipe.alpha_start, recipe.alpha_end))
    return alpha_at(step, recipe.steps, recipe.ramp, start, end)


def build_rule(recipe: Recipe, parameter: float | Tensor) -> Rule | None:
    """Build the mining rule of a recipe.

    Args:
        recipe: Recipe that sets the rule.
        parameter: Parameter of the rule, see `compute_rule_parameter`.

    Returns:
        The rule; None if the recipe does not use mining.
    """
    if not recipe.uses_mining:
        return None
    if recipe.rule == "hardest":
        return hardest(float(parameter), recipe.factor)
    return power(float(parameter)) if recipe.rule == "power" else deviation(parameter, recipe.factor)


def _build_recontrast(recipe: Recipe, category: str) -> Network:
    return ReContrast(
        recipe.backbone,
        weights=recipe.weights,
        levels=_count_levels(recipe),
        layers=recipe.layers,
        encoder_bn=recipe.encoder_bn_for(category),
        decoder=recipe.decoder,
        activation=recipe.activation,
        partial_norm=recipe.partial_norm,
        pairs=recipe.pairs,
        train_encoder=recipe.train_encoder,
    )


def _pool_pairs(pairs: Sequence[tuple[Tensor, Tensor]], inside: Tensor | None) -> list[Tensor] | None:
    """Return the points inside of each pair, (N, h, w) or (1, h, w); None without a region of interest."""
    if inside is None:
        return None
    sizes = [(student.shape[2], student.shape[3]) for _, student in pairs]
    pooled = {size: pool_inside(inside, size) for size in dict.fromkeys(sizes)}
    return [pooled[size] for size in sizes]


def _compute_recontrast_loss(
    pairs: Sequence[tuple[Tensor, Tensor]],
    recipe: Recipe,
    parameter: float | Tensor,
    shares: Sequence[int] | None,
    inside: Tensor | None = None,
) -> Tensor:
    """Compute the loss of all pairs, see `recontrast.loss.pairs_loss`."""
    return pairs_loss(
        pairs, build_rule(recipe, parameter), form=recipe.loss, groups=2 if recipe.pairs == "cross" else 1,
        stop_gradient=recipe.stop_gradient, shares=shares, inside=_pool_pairs(pairs, inside),
    )  # fmt: skip


def _build_patchcore(recipe: Recipe, category: str) -> Network:
    return PatchCore(
        recipe.backbone,
        weights=recipe.weights,
        levels=_list_levels(recipe),
        layers=recipe.layers,
        embedding=recipe.bank_embedding,
        neighbours=recipe.bank_neighbours,
    )


def _list_levels(recipe: Recipe) -> tuple[int, ...]:
    """Return the levels of PatchCore."""
    if recipe.levels is None:
        return (2, 3) if recipe.layers is None else tuple(range(1, len(recipe.layers) + 1))
    return recipe.levels if isinstance(recipe.levels, tuple) else tuple(range(1, recipe.levels + 1))


def _build_padim(recipe: Recipe, category: str) -> Network:
    return PaDiM(
        recipe.backbone,
        weights=recipe.weights,
        levels=_count_levels(recipe),
        layers=recipe.layers,
        features=recipe.gaussian_features,
        seed=recipe.seed,
    )


def _build_ensemble(recipe: Recipe, category: str) -> Network:
    return Ensemble(
        recipe.backbone,
        weights=recipe.weights,
        small_size=to_pair(recipe.small_size),
        features=recipe.gaussian_features,
        seed=recipe.seed,
        layers=recipe.layers,
    )


def _fit_ensemble(network: Ensemble, recipe: Recipe) -> None:
    """Fit both members, and weight them by the standard deviation of their maps of good images."""
    distances = network.fit(recipe.bank_share, seed=recipe.seed)
    maps = [
        AnomalyMap([(d.shape[1], d.shape[2])], recipe.out, recipe.blur, align_corners=False).from_distances([d])[0]
        for d in distances
    ]
    network.set_scales(maps, distances)


def _build_uniad(recipe: Recipe, category: str) -> Network:
    return UniAD(
        recipe.backbone,
        weights=recipe.weights,
        levels=_count_levels(recipe),
        blocks=recipe.layers,
        size=recipe.out,
        jitter=recipe.jitter,
    )


def _compute_uniad_loss(
    outputs: tuple[Tensor, Tensor],
    recipe: Recipe,
    parameter: float | Tensor,
    shares: Sequence[int] | None,
    inside: Tensor | None = None,
) -> Tensor:
    """Compute the mean squared error between targets and reconstructions."""
    target, reconstruction = outputs
    if inside is not None:
        mask = pool_inside(inside, target.shape[2:])
        return compute_mean_inside((reconstruction - target).square().mean(1), mask, shares)
    if shares is None:
        return F.mse_loss(reconstruction, target)
    return compute_mean((reconstruction - target).square(), shares)


def _build_dinomaly(recipe: Recipe, category: str) -> Network:
    return Dinomaly(
        recipe.backbone,
        weights=recipe.weights,
        layers=recipe.layers,
        dropout=recipe.bottleneck_dropout,
        recentre=recipe.recentre,
    )


def _build_inp_former(recipe: Recipe, category: str) -> Network:
    return INPFormer(recipe.backbone, weights=recipe.weights, layers=recipe.layers, prototypes=recipe.prototypes)


def _compute_dinomaly_loss(
    pairs: Sequence[tuple[Tensor, Tensor]],
    recipe: Recipe,
    parameter: float | Tensor,
    shares: Sequence[int] | None,
    inside: Tensor | None = None,
) -> Tensor:
    """Compute the mean loss of all groups of layers, see `recontrast.loss.pairs_loss`."""
    rule, masks = build_rule(recipe, parameter), _pool_pairs(pairs, inside)
    return pairs_loss(pairs, rule, form=recipe.loss, groups=len(pairs), shares=shares, inside=masks)


def _compute_inp_former_loss(
    outputs: tuple[Sequence[tuple[Tensor, Tensor]], Tensor],
    recipe: Recipe,
    parameter: float | Tensor,
    shares: Sequence[int] | None,
    inside: Tensor | None = None,
) -> Tensor:
    """Compute the loss of Dinomaly's form and the coherence of the prototypes, weighted (equation 9)."""
    pairs, coherence = outputs
    loss = _compute_dinomaly_loss(pairs, recipe, parameter, shares, inside)
    if inside is not None:
        mask = pool_inside(inside, pairs[0][1].shape[2:])
        mean = compute_mean_inside(coherence.to(loss.dtype).view(len(coherence), *mask.shape[1:]), mask, shares)
        return loss + recipe.coherence * mean
    return loss + recipe.coherence * compute_mean(coherence.to(loss.dtype), shares)


def _count_levels(recipe: Recipe) -> int:
    return recipe.levels if isinstance(recipe.levels, int) else 3


def _compute_last_stride(recipe: Recipe) -> int:
    """Return the stride of the coarsest level."""
    count = _list_levels(recipe)[-1] if recipe.architecture == "patchcore" else _count_levels(recipe)
    return get_strides(recipe.backbone, count, recipe.layers)[-1]


def _compute_recontrast_stride(recipe: Recipe) -> int:
    """Return the stride of the code: twice that of the coarsest level, or with a vision transformer the same."""
    is_transformer = recipe.layers is not None or list_layers(recipe.backbone, _count_levels(recipe)) is not None
    return (1 if is_transformer else 2) * _compute_last_stride(recipe)


def _get_patch_size(recipe: Recipe) -> int:
    """Return the side of a patch of a vision transformer, in pixels."""
    return get_strides(recipe.backbone, GROUPS, recipe.layers)[-1]


ARCHITECTURES: dict[str, Architecture] = {
    "recontrast": Architecture(
        ReContrast, _build_recontrast, _compute_recontrast_stride, _compute_recontrast_loss, masks_loss=True
    ),
    "patchcore": Architecture(
        PatchCore, _build_patchcore, _compute_last_stride,
        fit=lambda network, recipe: network.build_bank(recipe.bank_share, seed=recipe.seed),
        plan_memory=lambda network, recipe, count, available: network.plan_memory(
            count, recipe.out, recipe.bank_share, available, seed=recipe.seed),
        is_extendable=True,
    ),
    "padim": Architecture(
        PaDiM, _build_padim, _compute_last_stride, fit=lambda network, recipe: network.fit_gaussians(),
        plan_memory=lambda network, recipe, count, available: network.plan_memory(recipe.out, available),
        is_extendable=True, needs_count=True,
    ),
    "ensemble": Architecture(
        Ensemble, _build_ensemble, _compute_last_stride, fit=_fit_ensemble,
        plan_memory=lambda network, recipe, count, available: network.plan_memory(count, recipe.out, available),
        is_extendable=True, needs_count=True, needs_former=True,
    ),
    "uniad": Architecture(UniAD, _build_uniad, _compute_last_stride, _compute_uniad_loss, masks_loss=True),
    "dinomaly": Architecture(Dinomaly, _build_dinomaly, _get_patch_size, _compute_dinomaly_loss, masks_loss=True),
    "inp_former": Architecture(
        INPFormer, _build_inp_former, _get_patch_size, _compute_inp_former_loss, masks_loss=True
    ),
}  # fmt: skip
"""Architectures by the names of `Recipe.architecture`."""
