"""UniAD against its formulas, restated in float64 with explicit softmax attention."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recontrast.architectures import ARCHITECTURES
from recontrast.models.uniad import UniAD, build_neighbour_mask
from recontrast.recipes.recipe import Recipe

SIZE = (64, 96)


def build(**options):
    torch.manual_seed(0)
    arguments = {"size": SIZE, "width": 16, "heads": 2, "layers": 2, "feedforward": 24, "neighbours": 3}
    model = UniAD("test_resnet", weights="random", **{**arguments, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are trivial at the start
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compute_loss(model, images):
    return ARCHITECTURES["uniad"].compute_loss(model(images), Recipe(architecture="uniad"), 0.0, None)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(2)).double()


def attend(block, query, key, value, mask):
    """Softmax attention, head by head."""
    width = query.shape[-1]
    q, k, v = (
        F.linear(
            tokens, block.in_proj_weight[i * width : (i + 1) * width], block.in_proj_bias[i * width : (i + 1) * width]
        )
        for i, tokens in enumerate((query, key, value))
    )
    size = width // block.num_heads
    heads = []
    for head in range(block.num_heads):
        part = slice(head * size, (head + 1) * size)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size) + mask).softmax(-1)
        heads.append(weights @ v[..., part])
    return F.linear(torch.cat(heads, dim=-1), block.out_proj.weight, block.out_proj.bias)


def normalise(norm, tokens):
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def expand(block, tokens):
    hidden = (tokens @ block.expand.weight.T + block.expand.bias).clamp_min(0)
    return hidden @ block.reduce.weight.T + block.reduce.bias


def reconstruct(model, target):
    """Reconstruction of target features (N, C, h, w) as in the authors' code, normalisation after each block."""
    height, width = target.shape[2:]
    tokens = target.flatten(2).transpose(1, 2) @ model.input.weight.T + model.input.bias
    positions = torch.stack(
        [torch.cat([model.column_positions[x], model.row_positions[y]]) for y in range(height) for x in range(width)]
    )
    mask = torch.zeros(height * width, height * width).double()
    for i in range(height * width):
        for j in range(height * width):
            if abs(i // width - j // width) <= 1 and abs(i % width - j % width) <= 1:
                mask[i, j] = -math.inf
    for layer in model.encoder_layers:
        query = tokens + positions
        tokens = normalise(layer.norms[0], tokens + attend(layer.attention, query, query, tokens, mask))
        tokens = normalise(layer.norms[1], tokens + expand(layer.feedforward, tokens))
    memory, previous = tokens, tokens
    for layer in model.decoder_layers:
        queries = layer.queries.expand(len(target), -1, -1)
        attended = attend(layer.first, queries + positions, memory + positions, memory, mask)
        tokens = normalise(layer.norms[0], queries + attended)
        attended = attend(layer.second, tokens + positions, previous + positions, previous, mask)
        tokens = normalise(layer.norms[1], tokens + attended)
        previous = normalise(layer.norms[2], tokens + expand(layer.feedforward, tokens))
    output = normalise(model.norm, previous) @ model.output.weight.T + model.output.bias
    return output.transpose(1, 2).reshape(target.shape)


def test_reconstruction_is_that_of_the_formulas(images):
    model = build()
    target, got = model(images)
    torch.testing.assert_close(got, reconstruct(model, target), rtol=1e-9, atol=1e-11)
    (distances,), scores = model.distances(images)
    wanted = (got - target).norm(dim=1).float()
    torch.testing.assert_close(distances, wanted)
    upsampled = F.interpolate(wanted[:, None], size=images.shape[2:], mode="bilinear", align_corners=True)[:, 0]
    windows = upsampled.unfold(1, 16, 1).unfold(2, 16, 1).mean(dim=(3, 4))
    torch.testing.assert_close(scores, windows.flatten(1).amax(1))
    assert compute_loss(model, images).item() == pytest.approx((got - target).square().mean().item(), rel=1e-12)


def test_gradient_is_that_of_the_formulas(images):
    model = build()
    compute_loss(model, images).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    target = model.align(images)
    (reconstruct(model, target) - target).square().mean().backward()
    assert gradients and not any(name.startswith("encoder.") for name in gradients)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_targets_are_all_levels_at_the_size_of_the_coarsest(images):
    model = build()
    levels = model.encoder(images)
    height, width = levels[-1].shape[2:]
    target = model.align(images)
    assert target.shape == (3, sum(model.encoder.channels), height, width)
    fine = levels[0]
    ys, xs = (np.linspace(0, size - 1, count) for size, count in zip(fine.shape[2:], (height, width), strict=True))
    y, x = ys[1], xs[2]  # bilinear interpolation with aligned corners at one point
    (y0, x0), (fy, fx) = (int(y), int(x)), (y - int(y), x - int(x))
    corners = fine[:, :, y0 : y0 + 2, x0 : x0 + 2]
    wanted = (1 - fy) * ((1 - fx) * corners[..., 0, 0] + fx * corners[..., 0, 1])
    wanted = wanted + fy * ((1 - fx) * corners[..., 1, 0] + fx * corners[..., 1, 1])
    torch.testing.assert_close(target[:, : fine.shape[1], 1, 2], wanted)


def test_jitter_is_of_the_stated_size(images):
    """Noise with standard deviation scale * |feature| / channels, in training only."""
    model = build(dropout=0.0)
    inputs = []
    model.input.register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0].detach()))
    model(images)
    for _ in range(200):
        model.train()(images)
    clean, noisy = inputs[0], torch.stack(inputs[1:])
    wanted = 20 * clean.norm(dim=2) / clean.shape[2]
    torch.testing.assert_close((noisy - clean).square().mean(dim=(0, 3)).sqrt(), wanted, rtol=0.05, atol=0)


def test_training_reduces_the_loss(images):
    model = build(jitter=1.0).train()
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    losses = []
    for _ in range(30):
        loss = compute_loss(model, images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_state_and_config_rebuild_the_model(images):
    model = build()
    copy = UniAD(**model.config, weights="random").double().eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.distances(images)[1], model.distances(images)[1])


def test_mask_hides_the_neighbourhood():
    mask = build_neighbour_mask(5, 6, 3)
    hidden = mask.isinf().view(5, 6, 5, 6)
    assert hidden[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert hidden[2, 3].sum() == 9 and hidden[2, 3, 2, 3]
    assert not mask[~mask.isinf()].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 4}, "neighbours: wanted an odd number of points, got 4"),
        ({"neighbours": 13}, "wanted a square that leaves points of 4x6 visible, got 13"),
        ({"width": 18}, "width: wanted a multiple of 4"),
        ({"size": (64, 100)}, "multiples of it .*, got 64x100"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="wanted 64x96 px, the size that the model was built for, got 128x128"):
        build().map_sizes(128)
