"""Parts of Dinomaly and INP-Former, restated from their formulas."""

import math

import torch
import torch.nn.functional as F

LAYERS = ((0, 1), (2, 3, 5))  # groups of unequal size


def shake(model):
    """Move all trained weights, because biases and norms are trivial at the start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def run_encoder(model, images):
    """Tokens of each block in use, by timm's own blocks; class and register tokens first."""
    whole = model.encoder.extractor
    tokens = whole.norm_pre(whole.patch_drop(whole._pos_embed(whole.patch_embed(images))))
    outputs = []
    for block in whole.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    return [outputs[index] for group in model.encoder.layers for index in group]


def normalise(norm, tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-8).sqrt() * norm.weight + norm.bias


def linear(layer, tokens):
    return tokens @ layer.weight.T + layer.bias


def expand(mlp, tokens):
    hidden = linear(mlp.fc1, tokens)
    return linear(mlp.fc2, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def average(layers, groups):
    means, start = [], 0
    for group in groups:
        means.append(torch.stack(layers[start : start + len(group)]).mean(0))
        start += len(group)
    return means


def mine(pairs, weigh):
    """Mean global cosine distance whose gradient is weighted by point, by a hook on the student as in both codes."""
    loss = 0.0
    for teacher, student in pairs:
        teacher = teacher.detach()
        distances = 1 - F.cosine_similarity(teacher, student.detach())
        weights = weigh(distances).unsqueeze(1)
        student.register_hook(lambda gradient, weights=weights: gradient * weights)
        loss = loss + (1 - F.cosine_similarity(teacher.flatten(1), student.flatten(1))).mean() / len(pairs)
    return loss


def gradients(model, loss):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
