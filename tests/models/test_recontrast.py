import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from upstream_model import replace_norms, upstream_from

from recontrast.models.blocks import RESNETS, build_mirror_plan, compute_mirror_widths, count_halvings
from recontrast.models.bottleneck import Bottleneck
from recontrast.models.decoder import MirrorDecoder, ReverseResNet
from recontrast.models.partial_norm import PartialNorm2d, convert_partial_norm
from recontrast.models.recontrast import ReContrast


def build(backbone="resnet18", **options):
    """Build a model with random weights, and statistics, scales and biases that differ between channels."""
    model = ReContrast(backbone, weights="random", **options)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    return model


def loss(teachers, students):
    """Compute a loss with detached teachers and a different weight for each pair."""
    return sum((i + 1) * F.mse_loss(s, t.detach()) for i, (t, s) in enumerate(zip(teachers, students, strict=True)))


def copy_statistics(module):
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k}


def changed_keys(module, before):
    return {k for k, v in copy_statistics(module).items() if not torch.equal(v, before[k])}


def assert_same(features, expected, tolerance=1e-5):
    for a, b in zip(features, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


# Equal to upstream


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2"])
def test_pairs_equal_upstream(name):
    model = build(name)
    for p in model.frozen.parameters():  # make the encoders differ, as training does
        p.mul_(1.1)
    upstream = upstream_from(model, name)
    x = torch.randn(2, 3, 32, 64)
    for mode, bn in ((True, "train"), (True, "eval"), (False, "train"))[:: 1 if name == "resnet18" else 2]:
        model.encoder_bn = bn
        model.train(mode)
        upstream.train(mode, encoder_bn_train=bn == "train")
        with torch.no_grad():
            teachers, students = zip(*model(x), strict=True)
            expected_teachers, expected_students = upstream(x)
        assert len(teachers) == 6
        assert_same(teachers, expected_teachers)
        assert_same(students, expected_students)
        for part, upstream_part in (("encoder", "encoder"), ("bottleneck.fuse", "bottleneck.bn_layer")):
            result = copy_statistics(model.get_submodule(part)).values()  # the batch updated them equally
            assert_same(result, copy_statistics(upstream.get_submodule(upstream_part)).values())


@pytest.mark.parametrize("partial_norm", [False, True])
def test_gradients_equal_upstream(partial_norm):
    model = build()
    for m in model.encoder.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(1e-5, 1e-3)
    upstream = upstream_from(model, "resnet18")
    if partial_norm:  # as recontrast_mvtec_stable.py: eps 1e-6 for the trained encoder alone
        convert_partial_norm(model.encoder, eps=1e-6)
        convert_partial_norm(model.frozen)
        replace_norms(upstream.encoder, 5e-4, 1e-6)
        replace_norms(upstream.encoder_freeze, 5e-4, 1e-5)
    x = torch.randn(3, 3, 64, 64).double() * torch.tensor([1.0, 0.5, 0.01]).view(3, 1, 1, 1)
    model.double().train()  # in float32, rounding flips some ReLUs
    upstream.double().train()
    loss(*zip(*model(x), strict=True)).backward()
    loss(*upstream(x)).backward()
    upstream_parameters = dict(upstream.encoder.named_parameters())
    for key, p in model.encoder.extractor.named_parameters():
        assert_same([p.grad], [upstream_parameters[key].grad], 1e-8)
    squared_norm = sum(p.grad.square().sum() for p in model.decoder_parameters())
    others = (*upstream.bottleneck.parameters(), *upstream.decoder.parameters())
    torch.testing.assert_close(
        squared_norm, sum(p.grad.square().sum() for p in others if p.grad is not None), rtol=1e-4, atol=0
    )


def test_partial_norm_replaces_the_norms_of_both_encoders():
    model = build(partial_norm=True)
    for part, eps in ((model.encoder, 1e-6), (model.frozen, 1e-5)):
        assert {m.eps for m in part.modules() if isinstance(m, PartialNorm2d)} == {eps}
        assert not any(isinstance(m, nn.BatchNorm2d) for m in part.modules())
    assert not any(isinstance(m, PartialNorm2d) for part in (model.bottleneck, model.decoder) for m in part.modules())


@pytest.mark.parametrize(
    "name, published, rd4ad", [("resnet18", 21.7, 18.7), ("resnet50", 74.9, 63.6), ("wide_resnet50_2", 145, 117)]
)
def test_number_of_parameters_equals_the_paper(name, published, rd4ad):
    """Table A5 counts both encoders up to layer3, and the unused conv4 and bn4 of upstream."""

    def size(part):
        return sum(p.numel() for p in part.parameters()) / 1e6

    with torch.device("meta"):
        model = ReContrast(name, weights="random")
    c = model.bottleneck.channels
    unused = (2 * c * c + 2 * c) / 1e6
    assert size(model) + unused == pytest.approx(published, rel=0.003)
    assert size(model) + unused - size(model.encoder) - size(model.decoder.heads) == pytest.approx(rd4ad, rel=0.003)


@pytest.mark.parametrize("name, published", [("resnet18", 10.1), ("resnet50", 42.0), ("wide_resnet50_2", 75.2)])
def test_number_of_multiplications_equals_the_paper(name, published):
    """Table A5 counts GMACs at 256 px with each transposed convolution four times, and every head on both halves."""
    with torch.device("meta"):
        model = ReContrast(name, weights="random").eval()
        images = torch.empty(1, 3, 256, 256)
    extra = []
    for m in model.decoder.modules():
        if isinstance(m, nn.ConvTranspose2d):  # 4 taps for each of 4 outputs, only 1 of which is not zero
            m.register_forward_hook(lambda m, x, y: extra.append(3 * m.weight.numel() * x[0][:, 0].numel()))
    for head in model.decoder.heads:
        for conv in head:
            conv.register_forward_hook(lambda m, x, y: extra.append(m.weight.numel() * x[0][:, 0].numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert (counter.get_total_flops() / 2 + sum(extra)) / 1e9 == pytest.approx(published, rel=0.005)


# Modes and gradients


@pytest.mark.parametrize("bn", ["train", "eval"])
def test_batchnorm_mode_of_the_encoder(bn):
    model = build(encoder_bn=bn)
    x = torch.randn(2, 3, 64, 64)
    before = copy_statistics(model)
    loss(*zip(*model(x), strict=True)).backward()
    changed = changed_keys(model, before)
    assert any(k.startswith("encoder.") for k in changed) == (bn == "train")
    assert not any(k.startswith("frozen.") for k in changed)
    assert all(k in changed for k in before if k.startswith(("bottleneck.", "decoder.")))
    norms = [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.training == (bn == "train") and m.weight.grad.abs().sum() > 0 for m in norms)
    model.encoder_bn = "train" if bn == "eval" else "eval"
    assert model.train().encoder.training == (bn == "eval") and model.training
    before = copy_statistics(model)
    assert not any(m.training for m in model.eval().modules())
    model(x)
    assert not changed_keys(model, before)
    assert not any(m.training for m in model.train().frozen.modules())


def test_gradient_reaches_the_encoder_through_the_decoder_only():
    model = build(encoder_bn="eval")
    x = torch.randn(2, 3, 64, 64)
    pairs = model(x)
    teachers, students = zip(*pairs, strict=True)
    assert [t.requires_grad for t in teachers] == [False] * 3 + [True] * 3
    loss(teachers, students).backward()
    gradients = [p.grad.clone() for p in model.encoder.parameters()]
    assert all(g.abs().sum() > 0 for g in gradients)
    assert all(p.grad is None and not p.requires_grad for p in model.frozen.parameters())
    assert all(p.grad is not None for p in model.decoder_parameters())  # no unused parameter is created
    # The same computation step by step: separate targets, encoder features for the bottleneck only.
    model.zero_grad()
    model.bottleneck.eval(), model.decoder.eval()
    with torch.no_grad():
        targets = [*model.frozen(x), *model.encoder(x)]
    joint = [torch.cat(pair) for pair in zip(model.encoder(x), model.frozen(x), strict=True)]
    loss(targets, model.decoder(model.bottleneck(joint))).backward()
    expected = [p.grad.clone() for p in model.encoder.parameters()]
    model.zero_grad()
    loss(*zip(*model(x), strict=True)).backward()
    assert_same([p.grad for p in model.encoder.parameters()], expected, 1e-4)


def test_parameter_groups_hold_every_trained_parameter_once():
    model = build()
    groups = [id(p) for p in (*model.encoder_parameters(), *model.decoder_parameters())]
    assert len(set(groups)) == len(groups)
    assert set(groups) == {id(p) for p in model.parameters() if p.requires_grad}


# Decoders


def test_split_heads_equal_whole_heads():
    decoder = ReverseResNet((64, 128, 256), RESNETS["resnet18"])
    code = torch.randn(4, 512, 2, 3)
    split = decoder(code)
    plain = ReverseResNet((64, 128, 256), RESNETS["resnet18"], heads=0)
    plain.load_state_dict(decoder.state_dict(), strict=False)
    levels = plain(code)
    assert [f.shape for f in levels] == [(4, 64, 16, 24), (4, 128, 8, 12), (4, 256, 4, 6)]
    whole = [
        conv(f)[2 * i : 2 * i + 2] for i, head in enumerate(decoder.heads) for conv, f in zip(head, levels, strict=True)
    ]
    assert len(split) == 6
    assert_same(split, whole, 1e-6)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_100", "resnet18"])
def test_mirror_decoder(name):
    model = ReContrast(name, weights="random", decoder="mirror")
    assert isinstance(model.decoder, MirrorDecoder) and model.stride == 32
    pairs = model(torch.randn(2, 3, 64, 96))
    sizes = model.map_sizes((64, 96))
    assert sizes == [(16, 24), (8, 12), (4, 6)]
    for (teacher, student), c, size in zip(pairs, 2 * model.encoder.channels, 2 * sizes, strict=True):
        assert teacher.shape == student.shape == (2, c, *size)
    loss(*zip(*pairs, strict=True)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_auto_decoder_depends_on_the_backbone():
    assert isinstance(build().decoder, ReverseResNet)
    assert isinstance(build("mobilenetv3_small_100").decoder, MirrorDecoder)
    with pytest.raises(ValueError, match="'resnet' is for resnet18"):
        build("mobilenetv3_small_100", decoder="resnet")


def test_plans_widths_and_halvings():
    wide = ReverseResNet((256, 512, 1024), RESNETS["wide_resnet50_2"])
    assert [len(stage) for stage in wide.stages] == [3, 4, 6]
    assert wide.stages[0][0].body[3].weight.shape == (512, 512, 2, 2)  # base width 128: twice the planes
    next50 = ReverseResNet((256, 512, 1024), RESNETS["resnext50_32x4d"])
    assert next50.stages[0][0].body[3].groups == 32 and next50.stages[0][0].body[3].weight.shape == (512, 16, 2, 2)
    assert build_mirror_plan((24, 40, 112)).expansion == 1 and build_mirror_plan((96, 192, 384)).expansion == 4
    assert count_halvings((4, 8, 32)) == [1, 2]
    assert count_halvings((4, 4, 8)) == [0, 1]
    for strides in ((4, 12), (8, 4), (7, 14, 15)):
        with pytest.raises(ValueError, match="strides: wanted each 1, 2, 4, 8"):
            count_halvings(strides)
    features = [torch.randn(2, 8, 16, 16), torch.randn(2, 12, 8, 8), torch.randn(2, 20, 2, 2)]  # a gap in the pyramid
    widths = compute_mirror_widths((8, 12, 20))
    assert widths == [64, 128, 256] and compute_mirror_widths((128, 256, 512)) == [128, 256, 512]
    code = Bottleneck((8, 12, 20), (4, 8, 32), build_mirror_plan((8, 12, 20)), widths)(features)
    assert code.shape == (2, 512, 1, 1)
    decoded = MirrorDecoder((8, 12, 20), (4, 8, 32), heads=1)(code)
    assert [d.shape for d in decoded] == [f.shape for f in features]
    with pytest.raises(ValueError, match="at most 4 levels, got 5"):
        ReverseResNet((1, 2, 3, 4, 5), RESNETS["resnet18"])


def test_initial_weights():
    decoder = ReverseResNet((64, 128, 256), RESNETS["resnet50"])
    conv, deconv = decoder.stages[0][0].body[0], decoder.stages[0][0].body[3]  # 1x1, 512 -> 64; 2x2, 64 -> 64
    assert float(conv.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)  # He, fan out
    assert float(deconv.weight.detach().abs().max()) == pytest.approx((1 / (64 * 4)) ** 0.5, rel=0.02)  # default
    assert decoder.heads[0][0].bias is not None and decoder.stages[0][0].body[0].bias is None


def test_gelu_replaces_the_activations_of_the_decoder():
    model = build(activation="gelu")
    assert not any(isinstance(m, nn.ReLU) for m in model.decoder.modules())
    assert sum(isinstance(m, nn.GELU) for m in model.decoder.modules()) == 12
    assert not any(isinstance(m, nn.GELU) for m in model.bottleneck.modules())  # as upstream
    loss(*zip(*model(torch.randn(2, 3, 64, 64)), strict=True)).backward()


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_number_of_levels(levels):
    model = build(levels=levels)
    assert model.stride == 2 ** (levels + 2)
    pairs = model(torch.randn(1, 3, 128, 64))
    assert [tuple(t.shape[2:]) for t, _ in pairs] == 2 * model.map_sizes((128, 64))
    assert all(t.shape == s.shape for t, s in pairs)


# State, dtype, compilation and errors


def test_state_dict_and_pickle_give_the_same_model(tmp_path):
    model = build(partial_norm=True, activation="gelu", encoder_bn="eval", levels=2)
    x = torch.randn(2, 3, 64, 32)
    loss(*zip(*model(x), strict=True)).backward()
    config = json.loads(json.dumps(model.config))
    assert config["encoder_bn"] == "eval" and config["partial_norm"] is True
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = ReContrast(**config, weights="random")
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    copied = pickle.loads(pickle.dumps(model))
    assert copied.mean == model.mean and not copied.frozen.training
    for other in (again, copied):
        other.train()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        assert_same([t for pair in other(x) for t in pair], [t for pair in model(x) for t in pair], 0)
        model.load_state_dict(state)


def test_channels_last_and_bfloat16():
    model = build().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = [t for pair in model(x) for t in pair]
        model = model.to(memory_format=torch.channels_last)
        got = [t for pair in model(x.to(memory_format=torch.channels_last)) for t in pair]
        assert_same(got, expected, 1e-4)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in got)
        with torch.autocast("cpu", torch.bfloat16):
            half = [t for pair in model(x) for t in pair]
    assert all(t.dtype == torch.bfloat16 for t in half)
    assert_same([t.float() for t in half], expected, 0.1)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        pairs = model(x)
    loss(*zip(*((t.float(), s.float()) for t, s in pairs), strict=True)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_compiles_in_one_graph():
    model = build(levels=2)  # three levels take half as long again
    x = torch.randn(2, 3, 64, 64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = [t.detach() for pair in model(x) for t in pair]
    after = copy_statistics(model)
    model.load_state_dict(state)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pairs = compiled(x)
    assert_same([t.detach() for pair in pairs for t in pair], expected, 1e-4)
    assert_same(copy_statistics(model).values(), after.values(), 1e-4)
    loss(*zip(*pairs, strict=True)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "shape, got",
    [((1, 3, 16, 64), "16x64"), ((1, 3, 64, 100), "64x100"), ((1, 1, 64, 64), "(1, 1,"), ((3, 64, 64), "(3, 64")],
)
def test_images_of_a_wrong_shape_raise(shape, got):
    with pytest.raises(ValueError, match="ReContrast: images: wanted") as info:
        build()(torch.randn(shape))
    assert got in str(info.value) and "\n" not in str(info.value)
    assert "32" in str(info.value) or len(shape) == 3 or shape[1] == 1


def test_unknown_options_raise():
    for option, value in {"encoder_bn": "off", "decoder": "unet", "activation": "tanh"}.items():
        with pytest.raises(ValueError, match=f"{option}: wanted .* got '{value}'"):
            build(**{option: value})
    with pytest.raises(ValueError, match="partial_norm: wanted a backbone with BatchNorm2d, got 'convnext_atto'"):
        build("convnext_atto", partial_norm=True)
    assert build().map_sizes(256) == [(64, 64), (32, 32), (16, 16)]


def test_old_name_of_the_cached_features():
    model = ReContrast("test_resnet", weights="random").eval()
    images = torch.randn(2, 3, 32, 32)
    features = [feature * 2 for feature in model.frozen(images)]
    with pytest.warns(DeprecationWarning, match="use frozen_features") as caught:
        by_old_name = model(images, known=features)
    assert caught[0].filename == __file__
    by_name = model(images, frozen_features=features)
    for (teacher, student), (same_teacher, same_student) in zip(by_old_name, by_name, strict=True):
        assert torch.equal(teacher, same_teacher) and torch.equal(student, same_student)
