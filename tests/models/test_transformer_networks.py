"""The networks on vision transformers, whose levels all have the same stride."""

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import NAMES

from recontrast import Recipe
from recontrast.architectures import build_model, get_architecture
from recontrast.models.blocks import ResidualBlock, ResNetPlan, count_halvings
from recontrast.models.ensemble import Ensemble
from recontrast.models.fold import fold
from recontrast.models.padim import PaDiM
from recontrast.models.patchcore import PatchCore
from recontrast.models.recontrast import ReContrast
from recontrast.models.uniad import UniAD

LAYERS = ((1, 2), (4,))


def randomise(model):
    """Give each BatchNorm its own statistics and scale, as training would."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(m.weight, 0.5, 1)
            torch.nn.init.normal_(m.bias, 0, 0.1)
    return model


# ReContrast


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(7, 7), (4, 4), (1, 3), (27, 5)])
def test_pairs_have_the_size_of_the_tokens(name, grid):
    model = ReContrast(name, weights="random").eval()
    assert model.stride == model.encoder.strides[0]
    images = torch.randn(2, 3, *(model.stride * side for side in grid))
    pairs = model(images)
    assert len(pairs) == 6 and model.map_sizes(tuple(images.shape[2:])) == [grid] * 3
    for teacher, student in pairs:
        assert teacher.shape == student.shape == (2, model.encoder.channels[0], *grid)
    assert [d.shape for d in model.distances(images)[0]] == [(2, *grid)] * 6
    one = model(images, "frozen")
    torch.testing.assert_close(one[1][1], pairs[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairs", ["cross", "self"])
def test_every_weight_is_trained(pairs):
    model = ReContrast("tiny_registers", weights="random", layers=LAYERS, pairs=pairs)
    assert model.encoder.layers == LAYERS
    sum((s - t.detach()).square().mean() for t, s in model(torch.randn(2, 3, 40, 24))).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if pairs == "cross":  # the encoder learns through the students
        assert not missing
    assert all(p.grad is not None for p in model.decoder_parameters())


def test_rd4ad_on_a_transformer():
    model = ReContrast("test_vit", weights="random", pairs="self", train_encoder=False)
    assert model.frozen is None and model.constant_encoder is model.encoder
    assert len(model(torch.randn(2, 3, 48, 80))) == 3


def test_encoder_bn_makes_no_difference():
    torch.manual_seed(0)
    model = ReContrast("test_vit", weights="random", encoder_bn="train")
    images = torch.randn(2, 3, 48, 48)
    first = model(images)
    model.encoder_bn = "eval"
    for (a, b), (c, d) in zip(first, model.train()(images), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_config_builds_the_same_network():
    model = ReContrast("tiny_rotary", weights="random", levels=2, activation="gelu").eval()
    assert model.config["layers"] == ((1, 2), (3, 4))
    again = ReContrast(**model.config, weights="random").eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 24, 40)
    for a, b in zip(model.distances(images)[0], again.distances(images)[0], strict=True):
        assert torch.equal(a, b)
    assert "layers" not in ReContrast("resnet18", weights="random").config


def test_folded_network_computes_the_same():
    model = randomise(ReContrast("test_vit", weights="random")).eval()
    folded = fold(model)
    assert folded.norms_left == 0 and folded.norms_folded > 10
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        for a, b in zip(model.distances(images)[0], folded.distances(images)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16():
    model = ReContrast("tiny_registers", weights="random").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.distances(images)[0]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.distances(images)[0]
        cast = model.cast(torch.bfloat16).distances(images.bfloat16())[0]
    for a, b, c in zip(expected, mixed, cast, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)
        torch.testing.assert_close(a, c.float(), rtol=0.1, atol=0.05)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="'mirror' or 'auto' for backbone 'test_vit'"):
        ReContrast("test_vit", weights="random", decoder="resnet")
    with pytest.raises(ValueError, match="wanted a backbone with BatchNorm2d, got 'test_vit'"):
        ReContrast("test_vit", weights="random", partial_norm=True)
    model = ReContrast("test_vit", weights="random")
    with pytest.raises(ValueError, match=r"at least 16 px and multiples of it \(stride of test_vit\), got 40x32"):
        model(torch.randn(2, 3, 40, 32))


def test_halvings():
    assert count_halvings((16, 16, 16)) == [0, 0]
    assert count_halvings((4, 8, 32)) == [1, 2]
    for strides in [(8, 4), (4, 12), (14, 16)]:
        with pytest.raises(ValueError, match="each 1, 2, 4, 8"):
            count_halvings(strides)


@pytest.mark.parametrize("expansion", [1, 4])
def test_block_that_changes_the_width_alone(expansion):
    block = randomise(ResidualBlock(12, 8, "same", ResNetPlan(expansion, (2,)))).double().eval()
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)

    def norm(y, m):
        scale = m.weight / (m.running_var + m.eps).sqrt()
        return (y - m.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + m.bias.view(-1, 1, 1)

    y, convolutions = x, [m for m in block.body if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in block.body if isinstance(m, torch.nn.BatchNorm2d)]
    for i, (convolution, m) in enumerate(zip(convolutions, norms, strict=True)):
        y = norm(F.conv2d(y, convolution.weight, padding=convolution.weight.shape[-1] // 2), m)
        y = y.clamp(min=0) if i < len(norms) - 1 else y
    side = norm(torch.einsum("oi,nihw->nohw", block.shortcut[0].weight[:, :, 0, 0], x), block.shortcut[1])
    torch.testing.assert_close(block(x), (y + side).clamp(min=0), rtol=1e-12, atol=1e-12)


# Networks that are fitted in one pass, and UniAD


def fit(network, images):
    network.eval().observe(images)
    if isinstance(network, PatchCore):
        network.build_bank(0.5)
    elif isinstance(network, PaDiM):
        network.fit_gaussians()
    return network


@pytest.mark.parametrize("layers", [None, LAYERS])
@pytest.mark.parametrize("kind", [PatchCore, PaDiM])
def test_one_pass_networks(kind, layers):
    options = {"features": 20} if kind is PaDiM else {}
    images = torch.randn(24, 3, 24, 40)
    network = fit(kind("tiny_registers", weights="random", layers=layers, **options), images)
    assert network.map_sizes((24, 40)) == [(3, 5)]
    distances, _ = network.distances(images[:2])
    assert distances[0].shape == (2, 3, 5) and distances[0].isfinite().all()
    again = kind(**network.config, weights="random").eval()
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again.distances(images[:2])[0][0], distances[0])
    if kind is PatchCore:
        assert network.levels == ((2, 3) if layers is None else (1, 2))


def test_patchcore_takes_vectors_of_its_groups():
    network = PatchCore("tiny_plain", weights="random", layers=LAYERS, levels=(2,)).eval()
    images = torch.randn(2, 3, 24, 40)
    expected = F.avg_pool2d(network.encoder.forward_tokens(images)[2].transpose(1, 2).unflatten(2, (3, 5)), 3, 1, 1)
    torch.testing.assert_close(network(images), expected)
    with pytest.raises(ValueError, match="levels: wanted at most 2, as there are layers, got 3"):
        PatchCore("tiny_plain", weights="random", layers=LAYERS, levels=(1, 3))


def test_ensemble_and_uniad():
    network = Ensemble("tiny_registers", weights="random", small_size=(16, 16), features=10, layers=LAYERS).eval()
    assert network.map_sizes((24, 40)) == [(3, 5), (2, 2)]
    network.observe(torch.randn(24, 3, 24, 40))
    network.fit(0.5)
    distances, scores = network.distances(torch.randn(2, 3, 24, 40))
    assert [d.shape for d in distances] == [(2, 3, 5), (2, 2, 2)] and scores.isfinite().all()
    assert Ensemble(**network.config, weights="random").patchcore.levels == network.patchcore.levels
    plain = Ensemble("tiny_registers", weights="random", small_size=(16, 16), features=10)
    assert Ensemble(**plain.config, weights="random").patchcore.levels == plain.patchcore.levels == (2, 3)
    uniad = UniAD("tiny_registers", weights="random", size=(24, 40), blocks=LAYERS, width=32, heads=2, feedforward=16)
    assert uniad.config["blocks"] == LAYERS
    target, reconstruction = uniad(torch.randn(2, 3, 24, 40))
    assert target.shape == reconstruction.shape == (2, 64, 3, 5)


# Recipes


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "recontrast"},
        {"architecture": "patchcore"},
        {"architecture": "padim", "gaussian_features": 10},
        {"architecture": "ensemble", "gaussian_features": 10, "small_size": 16},
        {"architecture": "uniad"},
    ],
    ids=lambda options: options["architecture"],
)
def test_recipes_pass_the_layers(options):
    recipe = Recipe(backbone="tiny_registers", weights="random", size=24, layers=[[1, 2], [4]], **options)
    model = build_model(recipe, "any")
    assert model.encoder.layers == recipe.layers == LAYERS
    assert get_architecture(recipe).compute_stride(recipe) == model.stride == 8
    default = build_model(recipe.replace(layers=None), "any")
    assert default.encoder.layers == ((1, 2), (3,), (4,))
    assert get_architecture(recipe).compute_stride(recipe.replace(layers=None)) == 8


def test_layers_of_a_recipe_survive_json_and_defaults_are_left_out():
    recipe = Recipe(backbone="test_vit", layers=((1, 2), (3,)))
    assert recipe.to_dict()["layers"] == [[1, 2], [3]]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "layers" not in Recipe(backbone="test_vit").to_dict()


@pytest.mark.parametrize(
    "layers",
    [(), ((),), (1, 2), ((1, 1),), ((2,), (1,)), ((-1,),), ((1.0,),), ((True,),), "12", ((1,), None), (("1",),)],
)
def test_wrong_layers_in_a_recipe_raise(layers):
    with pytest.raises(ValueError, match="layers: wanted none or groups of blocks"):
        Recipe(layers=layers)


def test_more_levels_than_layers_raise():
    with pytest.raises(ValueError, match="levels: wanted at most 2, the number of layers, got 3"):
        Recipe(layers=((1,), (2,)), levels=3)
    with pytest.raises(ValueError, match=r"levels: wanted at most 2, the number of layers, got \(1, 3\)"):
        Recipe(architecture="patchcore", layers=((1,), (2,)), levels=(1, 3))
