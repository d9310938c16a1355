import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_transformers import NAMES

from recontrast.models.backbone import Backbone, get_strides, list_layers

LAYERS = [[0], [2, 3], [4]]


def error_message(*args, error=ValueError, **kwargs):
    """Return the message of the error that `Backbone` raises; it must be a single line."""
    with pytest.raises(error) as info:
        Backbone(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def build_pair(name, tmp_path, layers=LAYERS):
    """Return timm's whole model with fresh weights, and the backbone that reads them from a file."""
    whole = timm.create_model(name, dynamic_img_size=True).eval()
    for p in whole.parameters():
        torch.nn.init.normal_(p, 0.02, 0.2)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    return whole, Backbone(name, weights=tmp_path / "whole.pth", layers=layers).eval()


# Features


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8), (10, 10), (11, 7)])
def test_features_equal_those_of_timm(name, grid, tmp_path):
    torch.manual_seed(sum(grid))
    whole, backbone = build_pair(name, tmp_path)
    patch = backbone.strides[0]
    images = torch.randn(2, 3, patch * grid[0], patch * grid[1])
    with torch.no_grad():
        outputs = whole.forward_intermediates(images, return_prefix_tokens=backbone.prefix_tokens > 0)[1]
        levels, tokens = backbone(images), backbone.forward_tokens(images)
    if backbone.prefix_tokens:
        prefix, outputs = [p for _, p in outputs], [o for o, _ in outputs]
        for x, block in zip(tokens, (0, 2, 3, 4), strict=True):
            torch.testing.assert_close(x[:, : backbone.prefix_tokens], prefix[block], rtol=1e-6, atol=1e-6)
    assert [x.shape[1] for x in tokens] == [backbone.prefix_tokens + grid[0] * grid[1]] * 4
    for level, group in zip(levels, LAYERS, strict=True):
        assert level.shape == (2, backbone.channels[0], *grid)
        torch.testing.assert_close(level, sum(outputs[i] for i in group) / len(group), rtol=1e-6, atol=1e-6)
    for x, block in zip(tokens, (0, 2, 3, 4), strict=True):
        patches = x[:, backbone.prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(patches, outputs[block], rtol=1e-6, atol=1e-6)


def test_blocks_that_are_not_used_are_removed():
    backbone = Backbone("test_vit", weights="random", layers=[[1], [3]])
    names = [name for name, _ in backbone.extractor.named_parameters()]
    assert any(n.startswith("blocks.3.") for n in names)
    assert not any(n.startswith(("blocks.4.", "norm.", "head.", "fc_norm.")) for n in names)
    sum(f.sum() for f in backbone(torch.randn(1, 3, 32, 48))).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(3, 5), (8, 8), (10, 10)])
def test_fixed_size_computes_the_same_without_resampling(name, grid, tmp_path):
    _, backbone = build_pair(name, tmp_path)
    images = torch.randn(2, 3, *(backbone.strides[0] * side for side in grid))
    with torch.no_grad():
        expected = backbone.forward_tokens(images)
        backbone.freeze()
        assert backbone.fix_size(tuple(images.shape[2:])) is backbone
        for a, b in zip(backbone.forward_tokens(images), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        program = torch.export.export(backbone, (images,))
    assert not [n for n in program.graph.nodes if "upsample" in str(n.target)]
    assert not backbone.extractor.training and not any(p.requires_grad for p in backbone.parameters())


def test_frozen_and_cast():
    backbone = Backbone("tiny_registers", weights="random", frozen=True).train()
    images = torch.randn(1, 3, 16, 24, requires_grad=True)
    assert not backbone.training
    assert not any(x.requires_grad for x in [*backbone(images), *backbone.forward_tokens(images)])
    expected = backbone(images)
    assert all(f.dtype == torch.bfloat16 for f in backbone.to(torch.bfloat16)(images.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(backbone.float()(images), expected, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)


def test_attributes():
    backbone = Backbone("tiny_registers", weights="random", levels=2)
    assert backbone.is_token_model and backbone.prefix_tokens == 5
    assert (backbone.channels, backbone.strides) == ((32, 32), (8, 8))
    assert (backbone.layers, backbone.group_sizes) == (((1, 2), (3, 4)), (2, 2))
    assert Backbone("tiny_plain", weights="random").prefix_tokens == 0
    other = Backbone("resnet18", weights="random")
    assert not other.is_token_model and (other.layers, other.group_sizes, other.prefix_tokens) == (None, (), 0)
    with pytest.raises(ValueError, match="vision transformer, got 'resnet18'"):
        other.forward_tokens(torch.randn(1, 3, 32, 32))


def test_default_layers_are_those_of_dinomaly():
    assert list_layers("vit_base_patch14_reg4_dinov2", 2) == ((2, 3, 4, 5), (6, 7, 8, 9))
    assert list_layers("vit_large_patch14_reg4_dinov2", 2) == ((4, 6, 8, 10), (12, 14, 16, 18))
    assert list_layers("deit_tiny_patch16_224") == ((2, 3, 4), (5, 6, 7), (8, 9))
    assert list_layers("test_vit", 1) == ((1, 2, 3, 4),)
    assert list_layers("resnet18") is None
    assert get_strides("test_vit", 2) == (16, 16)
    assert get_strides("test_vit", layers=LAYERS) == (16, 16, 16)
    assert get_strides("tiny_rotary", layers=[[5]]) == (8,)


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224"])
def test_other_models_keep_their_levels(name):
    backbone = Backbone(name, weights="random", levels=2)
    assert backbone.strides == (4, 8) and not backbone.is_token_model
    assert [f.shape[2] for f in backbone.eval()(torch.randn(1, 3, 224, 224))] == [56, 28]


# Weight files


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["half", "safetensors", "backbone", "short"])
def test_weight_files(name, form, tmp_path):
    whole, backbone = build_pair(name, tmp_path)
    state, path = whole.state_dict(), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "half":
        state = {k: v.half() for k, v in state.items()}
    elif form == "backbone":
        state = backbone.state_dict()
    elif form == "short":  # without what the levels do not need
        state = {k: v for k, v in state.items() if not k.startswith(("blocks.5", "norm.", "head", "fc_norm"))}
    (save_file if form == "safetensors" else torch.save)(state, path)
    again = Backbone(name, weights=path, layers=LAYERS)
    for (key, a), b in zip(again.state_dict().items(), backbone.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b.half().float() if form == "half" else b, msg=key)


@pytest.mark.parametrize("name", ["tiny_registers", "tiny_plain"])
def test_position_embeddings_of_another_grid_are_resampled_as_in_timm(name, tmp_path):
    from timm.models.vision_transformer import checkpoint_filter_fn

    other = timm.create_model(name, img_size=88)
    torch.nn.init.normal_(other.pos_embed)
    torch.save(other.state_dict(), tmp_path / "w.pth")
    backbone = Backbone(name, weights=tmp_path / "w.pth", layers=LAYERS)
    expected = checkpoint_filter_fn(other.state_dict(), timm.create_model(name))["pos_embed"]
    assert other.pos_embed.shape != expected.shape
    torch.testing.assert_close(backbone.extractor.pos_embed, expected, rtol=0, atol=0)


def name_as_dinov2(state):
    """The names of the authors' files: the class token has a position of its own, and LayerScale is `ls1.gamma` too."""
    position = torch.full((1, 1, 32), 0.3)
    state = {**state, "mask_token": torch.zeros(1, 32), "register_tokens": state["reg_token"]}
    state |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], dim=1)}
    return {k: v for k, v in state.items() if not k.startswith(("reg_token", "head", "fc_norm"))}


def name_as_dinov3(state):
    state = {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in state.items()}
    state |= {"storage_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, 32)}
    state |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(96) for i in range(6)}
    state |= {"rope_embed.periods": torch.ones(4), "blocks.0.attn.qkv.bias_mask": torch.ones(96)}
    return {k: v for k, v in state.items() if not k.startswith(("head", "fc_norm"))}


def name_as_clip(state):
    names = {"patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "blocks.": "transformer.resblocks.",
             "norm_pre": "ln_pre", "norm1": "ln_1", "norm2": "ln_2", "qkv.": "in_proj_", "attn.proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "cls_token": "class_embedding"}  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for own, theirs in names.items():
            key = key.replace(own, theirs)
        renamed[f"visual.{key.replace('norm.', 'ln_post.')}"] = value.squeeze(0) if "embedding" in key else value
    renamed["visual.class_embedding"] = renamed["visual.class_embedding"].squeeze(0)
    return {**renamed, "logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(48)}


def name_as_open_clip(state):
    return {f"visual.trunk.{k}": v for k, v in state.items()} | {"logit_scale": torch.ones(())}


def name_as_mae(state):
    return state | {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 64)}


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("tiny_registers", name_as_dinov2),
        ("tiny_rotary", name_as_dinov3),
        ("tiny_clip", name_as_clip),
        ("tiny_registers", name_as_open_clip),
        ("test_vit", name_as_mae),
    ],
)
def test_files_of_the_authors(name, rename, tmp_path):
    whole, backbone = build_pair(name, tmp_path)
    given = rename(whole.state_dict())
    torch.save({"model": given}, tmp_path / "authors.pth")
    again = Backbone(name, weights=tmp_path / "authors.pth", layers=LAYERS)
    for (key, a), b in zip(again.state_dict().items(), backbone.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if "cls_token" in key else 0, msg=key)


def test_files_of_the_authors_of_another_transformer_raise(tmp_path):
    path, state = tmp_path / "w.pth", name_as_dinov2(timm.create_model("tiny_registers").state_dict())

    def message_for(name, **changes):
        torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
        message = error_message(name, weights=path)
        assert str(path) in message and name in message
        return message

    assert "reg_token: wanted one of shape (1, 4, 32)" in message_for("tiny_registers", register_tokens=None)
    fewer = message_for("tiny_registers", register_tokens=torch.zeros(1, 2, 32))
    assert "reg_token: wanted one of shape (1, 4, 32)" in fewer and "got one of shape (1, 2, 32)" in fewer
    assert "reg_token: wanted none" in message_for("tiny_plain", **{"patch_embed.proj.bias": None})
    patches = {"patch_embed.proj.weight": torch.zeros(32, 3, 14, 14)}  # timm would resample them
    assert "wanted one of shape (32, 3, 8, 8)" in message_for("tiny_registers", **patches)
    assert "that timm cannot convert" in message_for("tiny_registers", pos_embed=torch.zeros(6))
    assert "wanted blocks.2.attn.qkv.weight" in message_for("tiny_registers", **{"blocks.2.attn.qkv.weight": None})


def test_files_of_another_transformer_raise(tmp_path):
    path = tmp_path / "w.pth"

    def message_for(name, state):
        torch.save(state, path)
        message = error_message(name, weights=path)
        assert str(path) in message and name in message
        return message

    state = timm.create_model("tiny_registers").state_dict()
    without = {k: v for k, v in state.items() if "token" not in k}
    assert "cls_token: wanted one of shape (1, 1, 32)" in message_for("tiny_registers", without)
    assert "cls_token: wanted one of shape (1, 1, 64) for" in message_for("test_vit", state)
    fewer = timm.create_model("tiny_registers", reg_tokens=2).state_dict()
    message = message_for("tiny_registers", fewer)
    assert "reg_token: wanted one of shape (1, 4, 32)" in message and "got one of shape (1, 2, 32)" in message
    none = {k: v for k, v in state.items() if k != "reg_token"}
    assert "reg_token: wanted one of shape (1, 4, 32)" in message_for("tiny_registers", none)
    assert "cls_token: wanted none" in message_for("tiny_plain", state)
    deep = {**state, "blocks.6.norm1.weight": torch.ones(32)}
    assert "got some with blocks.6.norm1.weight" in message_for("tiny_registers", deep)
    scaled = {**timm.create_model("tiny_plain").state_dict(), "blocks.0.ls1.gamma": torch.ones(32)}
    assert "got some with blocks.0.ls1.gamma" in message_for("tiny_plain", scaled)  # it would be left out
    part = {k: v for k, v in state.items() if k != "blocks.2.attn.qkv.weight"}
    assert "wanted blocks.2.attn.qkv.weight of shape (96, 32)" in message_for("tiny_registers", part)
    wide = {**state, "blocks.1.mlp.fc1.weight": torch.zeros(64, 32)}
    assert "wanted blocks.1.mlp.fc1.weight of shape (128, 32)" in message_for("tiny_registers", wide)
    for shape in [(1, 63, 32), (1, 0, 32), (2, 64, 32), (1, 64, 16), (64, 32)]:
        message = message_for("tiny_registers", {**state, "pos_embed": torch.zeros(shape)})
        assert "wanted pos_embed of shape (1, 64, 32) or of another square grid" in message
        assert f"got one of shape {shape}" in message
    assert "cls_token: wanted one" in message_for("tiny_registers", timm.create_model("resnet18").state_dict())


# Wrong arguments


@pytest.mark.parametrize(
    "layers, text",
    [
        ([[1], [6]], "wanted blocks 0 to 5 of 'test_vit', got 6"),
        ([[-1], [2]], "wanted blocks 0 to 5 of 'test_vit', got -1"),
        ([[2, 1]], "whose numbers ascend, got [[2, 1]]"),
        ([[1], [1]], "whose numbers ascend, got [[1], [1]]"),
        ([[1], []], "whose numbers ascend"),
        ([], "whose numbers ascend, got []"),
    ],
)
def test_wrong_layers_raise(layers, text):
    assert text in error_message("test_vit", weights="random", layers=layers)


def test_wrong_levels_and_models_raise():
    assert "levels: wanted 1 to 4 for 'test_vit', which has 6 blocks, got 5" in error_message("test_vit", levels=5)
    assert "levels: wanted 1 to 4" in error_message("test_vit", levels=0)
    assert "layers: wanted none for 'resnet18'" in error_message("resnet18", layers=[[1]])
    assert "layers: wanted none for 'beit_base_patch16_224'" in error_message("beit_base_patch16_224", layers=[[1]])
    assert "a known tag (vit_base_patch16_224.aug" in error_message("vit_base_patch16_224.nothing")
    message = error_message("tiny_linear", weights="random")
    assert "wanted a timm model with features_only or forward_intermediates" in message and "'tiny_linear'" in message


def test_image_size_must_be_a_multiple_of_the_patch():
    backbone = Backbone("tiny_registers", weights="random")
    for size in [(20, 16), (16, 20), (0, 16)]:
        for call in (backbone, backbone.forward_tokens):
            with pytest.raises(ValueError, match=r"multiples of 8 px \(patch size of tiny_registers\), got"):
                call(torch.randn(1, 3, *size))
