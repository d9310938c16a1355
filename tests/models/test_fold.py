import copy

import pytest
import torch
from torch import nn

from recontrast import ReContrast
from recontrast.models.fold import fold
from recontrast.models.partial_norm import PartialNorm2d

NORMS = (nn.modules.batchnorm._BatchNorm, PartialNorm2d)
MODELS = {
    "resnet18": {},
    "resnet26": {"levels": 2},  # the last norm of a block follows a 1x1 convolution
    "resnext50_32x4d": {"levels": 2},  # groups, in transposed convolutions too
    "tf_efficientnet_lite0": {"levels": 2},  # activation inside the norm, TensorFlow padding
    "mobilenetv3_small_050": {"levels": 2},
    "convnext_atto": {"levels": 2},  # BatchNorm in the decoder only
}


def build_model(name, **options):
    """Build a model with statistics, scales and shifts that differ from their initial values."""
    model = ReContrast(name, weights="random", **options)
    for norm in model.modules():
        if isinstance(norm, NORMS):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    return model


def max_relative_difference(pairs, expected):
    """Largest difference, relative to the largest value of the same feature."""
    assert len(pairs) == len(expected)
    return max(
        ((a - b).abs().max() / b.abs().max()).item()
        for pair, expected_pair in zip(pairs, expected, strict=True)
        for a, b in zip(pair, expected_pair, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_folded_model_gives_the_same_pairs(name):
    model = build_model(name, **MODELS[name])
    images = torch.randn(1, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    assert folded.norms_left == 0 and not any(isinstance(m, NORMS) for m in folded.modules())
    assert folded.norms_folded == sum(isinstance(m, NORMS) for m in model.modules()) > 0
    for views in ("both", "trained", "frozen") if name == "resnet18" else ("both",):
        assert max_relative_difference(folded(images, views), model(images, views)) < 1e-5
    model.double()
    assert max_relative_difference(fold(model)(images.double()), model(images.double())) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"partial_norm": True, "levels": 1},
        {"activation": "gelu", "decoder": "mirror", "levels": 2},
        {"pairs": "self", "train_encoder": False, "levels": 1},
    ],
    ids=str,
)
def test_every_kind_of_model_can_be_folded(options):
    model = build_model("resnet18", **options).double().eval()
    images = torch.randn(1, 3, 32, 32).double()
    folded = fold(model)
    assert folded.norms_left == 0
    assert max_relative_difference(folded(images), model(images)) < 1e-10
    assert folded.map_sizes(32) == model.map_sizes(32)
    for name in ("mean", "std", "stride", "config"):
        assert getattr(folded, name) == getattr(model, name)


@torch.no_grad()
def test_partial_norm_with_an_activation():
    model = build_model("tf_efficientnet_lite0", partial_norm=True, levels=2).double().eval()
    images = torch.randn(1, 3, 64, 64).double()
    assert max_relative_difference(fold(model)(images), model(images)) < 1e-10


@torch.no_grad()
def test_norm_with_two_names():
    """A norm that is called by the second of its names was folded, and called once more."""

    class Named(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.first, self.second = norm, norm

        def forward(self, x):
            return self.second(x)

    model = build_model("resnet18", levels=2).double()
    model.encoder.extractor.layer1[0].bn1 = Named(model.encoder.extractor.layer1[0].bn1)
    model.eval()
    images = torch.randn(1, 3, 64, 64).double()
    assert max_relative_difference(fold(model)(images), model(images)) < 1e-10


@torch.no_grad()
def test_norms_that_cannot_be_folded_stay():
    """Norms after a pooling, with batch statistics, or after a convolution whose output is read twice."""

    class ReadTwice(nn.Module):
        def __init__(self, convolution, norm):
            super().__init__()
            self.convolution, self.norm = convolution, norm

        def forward(self, x):
            x = self.convolution(x)
            return x + self.norm(x)

    model = build_model("resnet18", levels=2).double()
    extractor = model.encoder.extractor
    extractor.maxpool = nn.Sequential(extractor.maxpool, nn.BatchNorm2d(64).double())
    extractor.conv1 = nn.Sequential(extractor.conv1, nn.BatchNorm2d(64, track_running_stats=False).double())
    block = extractor.layer2[0]
    block.conv2 = ReadTwice(block.conv2, nn.BatchNorm2d(128).double())
    model.eval()
    images = torch.randn(1, 3, 64, 64).double()
    folded = fold(model)
    assert folded.norms_left == 5  # bn1 follows a norm, and layer2.0.bn2 a sum
    assert max_relative_difference(folded(images), model(images)) < 1e-10


def test_device_layout_and_dtype_are_kept(device):
    model = build_model("resnet18", levels=2).to(device, memory_format=torch.channels_last).to(torch.bfloat16)
    folded = fold(model, 64)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert {p.device for p in folded.parameters()} == {next(model.parameters()).device}
    assert folded.model.bottleneck.fuse[0].body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in folded.parameters())


def test_folded_model_has_no_training_mode():
    folded = fold(build_model("resnet18", levels=1))
    assert not folded.eval().training
    with pytest.raises(ValueError, match="no training mode"):
        folded.train()
    with pytest.raises(ValueError, match="multiples"):
        fold(build_model("resnet18", levels=1), 30)
