"""Losses of Dinomaly and INP-Former compared with the form of both codes, and training steps with cached features."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recontrast import hardest, pairs_loss, power
from recontrast.architectures import build_model
from recontrast.recipes.recipe import Recipe
from recontrast.training.optimisers import build_optimisers
from recontrast.training.step import train_step

SHAPES = [(16, 384, 28, 28), (16, 768, 28, 28)]  # tokens of ViT-S and ViT-B with patches of 14 px at 392 px
GROUPS = 2
RULES = {"hardest": hardest(0.1, 0.1), "power": power(3.0)}


def weight_by_hook(pairs: list[tuple[Tensor, Tensor]], rule: str) -> Tensor:
    """Compute the mean loss of all groups with the gradient changed in a hook, as both codes do.

    Dinomaly's multiplies the entries that a mask of the size of the features selects; INP-Former's multiplies by
    factors of that size.
    """
    loss = torch.zeros((), device=pairs[0][0].device)
    for teacher, student in pairs:
        teacher = teacher.detach()
        distances = (1 - F.cosine_similarity(teacher, student.detach())).unsqueeze(1)
        if rule == "hardest":
            threshold = distances.flatten().topk(max(int(distances.numel() * 0.1), 1)).values[-1]
            student.register_hook(partial(_scale_selected, easy=(distances < threshold).expand_as(student)))
        else:
            student.register_hook(partial(_scale, factor=((distances / distances.mean()) ** 3).expand_as(student)))
        loss = loss + (1 - F.cosine_similarity(teacher.flatten(1), student.flatten(1))).mean() / len(pairs)
    return loss


def _scale_selected(gradient: Tensor, easy: Tensor) -> Tensor:
    gradient[easy] *= 0.1
    return gradient


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    gradient *= factor
    return gradient


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[1]} channels")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rival", ["hook", "ours"])
def test_loss(benchmark, timed, shape, rule, rival, device):
    """Time forward and backward of the loss of two groups of layers."""
    benchmark.group = f"loss of token groups, forward and backward, {rule}, {shape}, {device}"
    teachers, leaves = ([torch.randn(shape, device=device) for _ in range(GROUPS)] for _ in range(2))

    def work():
        students = [leaf.requires_grad_() * 1 for leaf in leaves]
        pairs = list(zip(teachers, students, strict=True))
        loss = weight_by_hook(pairs, rule) if rival == "hook" else pairs_loss(pairs, RULES[rule], groups=GROUPS)
        return torch.autograd.grad(loss, leaves)

    timed(work, rounds=5)


@pytest.mark.parametrize("architecture", ["dinomaly", "inp_former"])
@pytest.mark.parametrize("features", ["computed", "cached"])
def test_step(benchmark, timed, architecture, features, device):
    """Time a training step on DeiT-Tiny at 224 px, batch 8, with and without the frozen encoder."""
    benchmark.group = f"training step of {architecture}, DeiT-Tiny, 224 px, batch 8, {device}"
    recipe = Recipe(
        architecture=architecture, backbone="deit_tiny_patch16_224", weights="random", size=224, batch=8, factor=0.1,
        rule="hardest" if architecture == "dinomaly" else "power", optimiser="stableadamw", amsgrad=True, clip=0.1,
    )  # fmt: skip
    model = build_model(recipe, "all").to(device).train()
    optimisers = build_optimisers(model, recipe, torch.device(device))
    images = torch.randn(8, 3, 224, 224, device=device)
    cached = [group.clone() for group in model.constant_features(images)] if features == "cached" else None
    parameter = 0.1 if architecture == "dinomaly" else 3.0

    def work():
        return train_step(model, optimisers, images, parameter, recipe, frozen_features=cached)

    timed(work, rounds=5)
