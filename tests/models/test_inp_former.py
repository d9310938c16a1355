"""INP-Former against its formulas, restated in float64 token by token.

The public code on equal weights and images, in float64 on three vision transformers: features to 4e-10 and gradients to
5e-9 (relative), loss to 5e-13, weights after 12 steps of its optimiser and schedule to 5e-13, and maps, which are
float32 here, to 2e-7. The small weights at the start enlarge rounding errors: the decoder's norms divide by values near
their epsilon.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from token_models import LAYERS, average, expand, gradients, linear, mine, normalise, run_encoder, shake

from recontrast.architectures import ARCHITECTURES
from recontrast.models.inp_former import INPFormer
from recontrast.models.transformer_blocks import compute_coherence
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(architecture="inp_former", rule="power", coherence=0.2)


def build(backbone="test_vit", layers=LAYERS, **options):
    torch.manual_seed(0)
    return shake(INPFormer(backbone, weights="random", layers=layers, prototypes=4, **options).double().eval())


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(2)).double()


def heads(block, queries, others):
    """Queries, keys and values of each head."""
    query = linear(block.q, queries)
    key, value = linear(block.kv, others).chunk(2, dim=2)
    size = query.shape[2] // block.heads
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        yield query[..., part], key[..., part], value[..., part]


def aggregate(block, prototypes, tokens):
    outputs = []
    for query, key, value in heads(block.attn, normalise(block.norm1, prototypes), normalise(block.norm1, tokens)):
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[2])).exp()
        outputs.append(weights / weights.sum(2, keepdim=True) @ value)
    prototypes = prototypes + linear(block.attn.proj, torch.cat(outputs, dim=2))
    return prototypes + expand(block.mlp, normalise(block.norm2, prototypes))


def guide(block, tokens, prototypes):
    outputs, scales = [], block.attn.learn_scale.flatten()
    projected = heads(block.attn, normalise(block.norm1, tokens), normalise(block.norm1, prototypes))
    for scale, (query, key, value) in zip(scales, projected, strict=True):
        cosines = F.cosine_similarity(query.unsqueeze(2), key.unsqueeze(1), dim=3, eps=1e-12)
        outputs.append((cosines * scale).clamp_min(0) @ value)
    tokens = linear(block.attn.proj, torch.cat(outputs, dim=2))  # no path around the attention
    return tokens + expand(block.mlp, normalise(block.norm2, tokens))


def rebuild(model, images):
    """Teachers, students and the coherence loss, as in `INP_Former.forward` of the authors' code."""
    height, width = (side // model.stride for side in images.shape[2:])
    encoded = [tokens[:, -height * width :] for tokens in run_encoder(model, images)]
    tokens = torch.stack(encoded).mean(0)
    prototypes = aggregate(model.aggregation, model.prototype_tokens.repeat(len(images), 1, 1), tokens)
    distances = 1 - F.cosine_similarity(tokens.unsqueeze(2), prototypes.unsqueeze(1), dim=-1)
    tokens = expand(model.bottleneck, tokens)
    decoded = []
    for block in model.decoder:
        tokens = guide(block, tokens, prototypes)
        decoded.append(tokens)
    pairs = [
        tuple(x.transpose(1, 2).reshape(len(x), -1, height, width) for x in pair)
        for pair in zip(average(encoded, LAYERS), average(decoded[::-1], LAYERS), strict=True)
    ]
    return pairs, distances.min(2).values


def weigh_softly(distances):
    return (distances / distances.mean()) ** 3


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit3"])
def test_features_and_coherence(backbone, images):
    model = build(backbone)
    pairs, coherence = model(images)
    wanted, distances = rebuild(model, images)
    torch.testing.assert_close(coherence, distances, rtol=1e-9, atol=1e-10)
    for pair, expected in zip(pairs, wanted, strict=True):
        torch.testing.assert_close(pair[0], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pair[1], expected[1], rtol=1e-9, atol=1e-9)


def test_loss_and_gradient(images):
    model = build()
    loss = ARCHITECTURES["inp_former"].compute_loss(model(images), RECIPE, 3.0, None)
    pairs, distances = rebuild(model, images)
    expected = mine(pairs, weigh_softly) + 0.2 * distances.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    wanted = gradients(model, expected)
    assert wanted.keys() == {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-9, msg=name)


def test_the_coherence_loss_has_its_weight(images):
    model = build()
    outputs = model(images)
    losses = [
        ARCHITECTURES["inp_former"].compute_loss(outputs, RECIPE.replace(coherence=weight), 3.0, None).item()
        for weight in (0.0, 0.2, 1.0)
    ]
    assert losses[1] - losses[0] == pytest.approx(0.2 * outputs[1].mean().item(), rel=1e-9)
    assert losses[2] - losses[0] == pytest.approx(outputs[1].mean().item(), rel=1e-9)


def test_the_coherence_loss_does_not_depend_on_how_a_batch_is_divided(images):
    """The mean over processes is that of the whole batch."""
    model, compute_loss = build(), ARCHITECTURES["inp_former"].compute_loss

    def compute(part, shares):
        outputs = model(part)
        losses = [compute_loss(outputs, RECIPE.replace(coherence=weight), 3.0, shares) for weight in (1.0, 0.0)]
        return (losses[0] - losses[1]).item()

    parts = [compute(part, [1, 2]) for part in (images[:1], images[1:])]
    assert sum(parts) / 2 == pytest.approx(compute(images, None), rel=1e-9)


def test_coherence_by_hand():
    """Tokens along the axes: one prototype has the direction of the first, the second is at 45 degrees to both."""
    tokens = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    prototypes = torch.tensor([[[3.0, 0.0], [0.0, 0.1]]])
    torch.testing.assert_close(compute_coherence(tokens, prototypes), torch.tensor([[0.0, 1 - math.sqrt(0.5), 1.0]]))


def test_prototypes_start_from_a_normal_distribution():
    torch.manual_seed(1)
    model = INPFormer("test_vit", weights="random", layers=LAYERS, prototypes=64)
    assert model.prototype_tokens.std().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(model.decoder[0].attn.learn_scale, torch.ones(model.heads, 1, 1))
    assert all(part.fc1.weight.abs().max() <= 0.03 for part in (model.bottleneck, model.decoder[1].mlp))


def test_class_and_register_tokens_are_left_out(images):
    model = build("test_vit3")
    groups = model.constant_features(images)
    assert [group.shape[1] for group in groups] == [4 * 6, 4 * 6] and model.encoder.prefix_tokens > 0
    tokens = model.encoder.forward_tokens(images)
    torch.testing.assert_close(groups[0], (tokens[0] + tokens[1])[:, -24:] / 2)


@pytest.mark.parametrize("count", [0, 5000])
def test_bad_number_of_prototypes(count):
    with pytest.raises(ValueError, match=f"INPFormer: prototypes: wanted 1 to 4096, got {count}"):
        INPFormer("test_vit", weights="random", prototypes=count)
