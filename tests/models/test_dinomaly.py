"""Dinomaly against its formulas, restated in float64 token by token.

The public code on equal weights and images, in float64 on three vision transformers: features to 3e-15 (relative), loss
to 4e-16, gradients to 2e-14 (relative), weights after 12 steps of its optimiser and schedule to 3e-15, and maps, which
are float32 here, to 2e-7.
"""

import numpy as np
import pytest
import timm
import tiny_transformers  # noqa: F401 - registers its models
import torch
import torch.nn.functional as F
from token_models import LAYERS, average, expand, gradients, linear, mine, normalise, run_encoder, shake

from recontrast.architectures import ARCHITECTURES, compute_rule_parameter
from recontrast.inference.infer import build_anomaly_map
from recontrast.models.dinomaly import Dinomaly
from recontrast.models.transformer_blocks import LinearAttention
from recontrast.recipes.recipe import Recipe
from recontrast.training.teacher_cache import TeacherCache

RECIPE = Recipe(architecture="dinomaly", rule="hardest", factor=0.1, reduce="mean", blur="zero5")


def build(backbone="test_vit", layers=LAYERS, **options):
    torch.manual_seed(0)
    return shake(Dinomaly(backbone, weights="random", layers=layers, **options).double().eval())


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(2)).double()


def attend(block, tokens):
    """Attention with the kernel elu + 1, as a matrix of weights (quadratic, unlike the model)."""
    width = tokens.shape[2]
    query, key, value = linear(block.qkv, tokens).split(width, dim=2)
    size, outputs = width // block.heads, []
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        positive = [torch.where(x > 0, x + 1, x.exp()) for x in (query[..., part], key[..., part])]
        weights = positive[0] @ positive[1].transpose(1, 2)
        outputs.append(weights / weights.sum(2, keepdim=True) @ value[..., part])
    return linear(block.proj, torch.cat(outputs, dim=2))


def rebuild(model, images):
    """Teachers and students, (N, C, h, w), as in `ViTill.forward` of the authors' code."""
    encoded = run_encoder(model, images)
    if model.recentre:  # Dinomaly2
        encoded = [layer[:, model.encoder.prefix_tokens :] - layer[:, :1] for layer in encoded]
    tokens = expand(model.bottleneck, torch.stack(encoded).mean(0))
    decoded = []
    for block in model.decoder:
        tokens = tokens + attend(block.attn, normalise(block.norm1, tokens))
        tokens = tokens + expand(block.mlp, normalise(block.norm2, tokens))
        decoded.append(tokens)
    height, width = (side // model.stride for side in images.shape[2:])
    return [
        tuple(x[:, -height * width :].transpose(1, 2).reshape(len(x), -1, height, width) for x in pair)
        for pair in zip(average(encoded, LAYERS), average(decoded[::-1], LAYERS), strict=True)
    ]


def keep_hardest(share):
    def weigh(distances):
        threshold = distances.flatten().sort(descending=True).values[int(distances.numel() * share) - 1]
        return torch.ones_like(distances).masked_fill(distances < threshold, 0.1)

    return weigh


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit3"])  # a class token; register tokens too
def test_features(backbone, images):
    model = build(backbone, ((0, 1), (2, 3, 5)))
    for pair, expected in zip(model(images), rebuild(model, images), strict=True):
        torch.testing.assert_close(pair[0], expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pair[1], expected[1], rtol=1e-10, atol=1e-10)
        assert not pair[0].requires_grad and pair[1].requires_grad


@pytest.mark.parametrize("backbone", ["test_vit", "tiny_registers"])  # one class token; with register tokens behind it
def test_recentred_features(backbone, images):
    """Patch tokens minus the class token of the same layer (Dinomaly2), on cached features too."""
    model = build(backbone, recentre=True)
    expected = rebuild(model, images)
    for pairs in (model(images), model(images, model.constant_features(images))):
        for pair, wanted in zip(pairs, expected, strict=True):
            torch.testing.assert_close(pair[0], wanted[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(pair[1], wanted[1], rtol=1e-10, atol=1e-10)
    plain = build(backbone)
    assert not torch.allclose(plain(images)[0][0], expected[0][0])
    again = Dinomaly(**model.config, weights="random")
    assert again.recentre and "recentre" not in plain.config


@pytest.mark.parametrize("share", [1.0, 0.37, 0.1])
def test_loss_and_gradient(share, images):
    model = build()
    loss = ARCHITECTURES["dinomaly"].compute_loss(model(images), RECIPE, share, None)
    expected = mine(rebuild(model, images), keep_hardest(share))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    wanted = gradients(model, expected)
    assert wanted.keys() == {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-11, msg=name)


def test_the_ramp_is_that_of_the_authors():
    """p rises from 0 to 0.9 in 1000 steps of 10,000; the share of hard points is 1 - p."""
    recipe = RECIPE.replace(steps=10_000)
    for step in (0, 1, 500, 999, 1000, 9999):
        p = min(0.9 * step / 1000, 0.9)
        assert compute_rule_parameter(recipe, step) == pytest.approx(1 - p, abs=1e-12)


def test_map(images):
    model = build()
    with torch.no_grad():
        (height, width), pairs = images.shape[2:], rebuild(model, images)
        distances = [1 - F.cosine_similarity(teacher, student).unsqueeze(1) for teacher, student in pairs]
        upsampled = [F.interpolate(d, size=(height, width), mode="bilinear", align_corners=True) for d in distances]
        offsets = torch.arange(-2, 3).double()
        kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 32)
        blurred = F.conv2d(torch.stack(upsampled).mean(0), (kernel / kernel.sum())[None, None], padding=2)[:, 0]
        amap = build_anomaly_map(model, RECIPE.replace(size=(height, width)))
        maps, _ = amap.from_distances(model.distances(images)[0])
        exported = model.distances(images, exportable=True)[0]
    torch.testing.assert_close(maps.double(), blurred, rtol=0, atol=1e-6)
    scores = blurred.flatten(1).sort(descending=True).values[:, : height * width // 100].mean(1)
    torch.testing.assert_close(amap.score(maps, 0.01).double(), scores, rtol=0, atol=1e-6)
    for distance, expected in zip(exported, distances, strict=True):
        torch.testing.assert_close(distance, expected[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(40, 56), (100, 96), (1, 130)])
def test_map_size(size, images):
    """Maps are resized from the size of the images without smoothing, and then blurred, as in `evaluation_batch`."""
    model, recipe = build(), RECIPE.replace(size=(64, 96), map_size=size)
    with torch.no_grad():
        distances = model.distances(images)[0]
        large = [F.interpolate(d.unsqueeze(1), (64, 96), mode="bilinear", align_corners=True) for d in distances]
        resized = F.interpolate(torch.stack(large).mean(0), size, mode="bilinear", align_corners=False)
        offsets = torch.arange(-2, 3).double()
        kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 32)
        blurred = F.conv2d(resized, (kernel / kernel.sum())[None, None], padding=2)[:, 0]
        maps, _ = build_anomaly_map(model, recipe).from_distances(distances)
    torch.testing.assert_close(maps.double(), blurred, rtol=0, atol=1e-6)


def test_dropout_acts_three_times_in_the_bottleneck_and_in_training_only(images):
    model = build(dropout=0.5).train()
    torch.manual_seed(3)
    tokens = model.fuse(model.encode(images))
    expected = F.dropout(tokens, 0.5)
    expected = F.dropout(F.gelu(linear(model.bottleneck.fc1, expected)), 0.5)
    expected = F.dropout(linear(model.bottleneck.fc2, expected), 0.5)
    torch.manual_seed(3)
    assert torch.allclose(model.bottleneck(tokens), expected, rtol=1e-12)
    model.eval()
    assert torch.equal(model(images)[0][1], model(images)[0][1])


def test_linear_attention_costs_no_matrix_of_all_tokens():
    """The largest tensor that backward keeps has as many numbers as queries, keys and values, not tokens squared."""
    attention, tokens, sizes = LinearAttention(32, 2), torch.randn(1, 1000, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attention(tokens)
    assert max(sizes) <= 3 * tokens.numel() < 1000 * 1000


def test_initial_weights_are_those_of_the_authors_script():
    torch.manual_seed(1)
    model = Dinomaly("test_vit", weights="random", layers=LAYERS)
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert not parameter.requires_grad
        elif "norm" in name or name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        else:
            assert parameter.abs().max() <= 0.03 and parameter.std().item() == pytest.approx(0.01, rel=0.05)


def test_the_encoder_keeps_no_activations_and_runs_no_further_than_the_last_layer(images):
    model = build(layers=((0,), (1, 2)))
    assert len(model.encoder.extractor.blocks) == 3 and len(model.decoder) == 3
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("a tensor is kept"), lambda t: t):
        groups = model.constant_features(images)
    assert not any(group.requires_grad for group in groups)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_cached_features_give_the_same_pairs_without_the_encoder(layout, images, monkeypatch):
    model, images = build("test_vit3"), images.contiguous(memory_format=layout)
    cache = TeacherCache(model.constant_features, 3, 1 << 24)
    expected = model(images)
    cache(np.array([0, 2]), images[[0, 2]].contiguous(memory_format=layout))
    features = cache(np.array([2, 1, 0]), images[[2, 1, 0]].contiguous(memory_format=layout))
    monkeypatch.setattr(model.encoder, "forward_tokens", lambda images: pytest.fail("the encoder runs"))
    for pair, wanted in zip(model(images[[2, 1, 0]], frozen_features=features), expected, strict=True):
        torch.testing.assert_close(pair[1], wanted[1][[2, 1, 0]], rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_the_authors():
    with torch.device("meta"):
        small, large = (Dinomaly(f"vit_{size}_patch14_reg4_dinov2", weights="random") for size in ("base", "large"))
    assert small.encoder.layers == ((2, 3, 4, 5), (6, 7, 8, 9)) and (small.heads, small.width) == (12, 768)
    assert large.encoder.layers == ((4, 6, 8, 10), (12, 14, 16, 18)) and (large.heads, large.width) == (16, 1024)
    assert len(small.decoder) == len(large.decoder) == 8 and small.encoder.prefix_tokens == 5
    assert timm.create_model("vit_small_patch14_reg4_dinov2").embed_dim // 64 == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "test_resnet", "layers": None}, "Dinomaly: backbone: wanted a vision transformer"),
        ({"layers": ((0, 9),)}, "layers: wanted blocks 0 to 5 of 'test_vit', got 9"),
        (
            {"backbone": "tiny_plain", "recentre": True},
            "recentre: wanted a backbone with a class token, got 'tiny_plain'",
        ),
        ({"dropout": 1.0}, "dropout: wanted a number of at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
