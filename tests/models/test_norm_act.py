"""Networks with fused norms compute what the layers of PyTorch compute."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models import resnet
from torch import nn

from recontrast import ReContrast, ops
from recontrast.models.blocks import ResidualBlock, ResNetPlan
from recontrast.models.fold import fold
from recontrast.models.norm_act import AddAct, NormAct2d, fuse_norm_act
from recontrast.runtime.sync_batchnorm import GlobalBatchNorm2d, convert_sync_batchnorm

MODELS = [  # name, options, norms that keep their class
    ("resnet18", {}, 0),
    ("resnet26", {"levels": 2, "encoder_bn": "eval"}, 0),
    ("resnet18", {"levels": 2, "activation": "gelu", "decoder": "mirror"}, 0),
    ("tf_efficientnet_lite0", {"levels": 2}, 20),  # ReLU6 has no kernel
    ("convnext_atto", {"levels": 2}, 0),  # BatchNorm in the decoder only
    ("resnet18", {"levels": 2, "partial_norm": True}, 0),
]


def perturb(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    return model


def gradients(model, images):
    loss = sum(a.square().mean() + b.square().mean() for a, b in model(images))
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name, options, kept", MODELS, ids=str)
def test_trained_step_is_the_same(name, options, kept):
    model = perturb(ReContrast(name, weights="random", **options)).double()
    fused = fuse_norm_act(copy.deepcopy(model))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    left = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d) and not isinstance(m, NormAct2d)]
    assert len(left) == kept and any(isinstance(m, NormAct2d) for m in fused.modules())
    images = torch.randn(2, 3, 64, 64).double()
    (loss, expected), (fused_loss, ours) = gradients(model, images), gradients(fused, images)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-12, atol=0)
    scale = max(g.norm() for g in expected)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12 * scale
    for key, value in model.state_dict().items():  # running statistics too
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-11, atol=1e-12)


def test_every_activation_of_a_resnet_is_fused():
    fused = fuse_norm_act(ReContrast("resnet18", weights="random"))
    assert not any(isinstance(m, nn.ReLU | nn.GELU) for m in fused.modules())
    assert sum(isinstance(m, NormAct2d) and m.act == "relu" for m in fused.modules()) == 45
    assert not any(type(m) in (resnet.BasicBlock, resnet.Bottleneck) for m in fused.modules())
    assert fuse_norm_act(fused) is fused  # a second time changes nothing
    assert sum(isinstance(m, NormAct2d) for m in fused.modules()) == 53


@torch.no_grad()
@pytest.mark.parametrize("name, options, kept", MODELS[:4], ids=str)
def test_fused_models_fold_and_export(name, options, kept):
    model = perturb(ReContrast(name, weights="random", **options)).double().eval()
    fused, images = fuse_norm_act(copy.deepcopy(model)), torch.randn(1, 3, 64, 64).double()
    folded = fold(fused)
    assert folded.norms_left == 0
    for network in (fused, folded):
        for pair, expected in zip(network(images), model(images), strict=True):
            for a, b in zip(pair, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_export_uses_the_stock_operators():
    block = fuse_norm_act(ResidualBlock(4, 4, "same", ResNetPlan(1, (1,)))).eval()
    program = torch.export.export(block, (torch.randn(1, 4, 8, 8),))
    assert "recontrast" not in str(program.graph)
    block = fuse_norm_act(resnet.BasicBlock(4, 4)).eval()
    assert "recontrast" not in str(torch.export.export(block, (torch.randn(1, 4, 8, 8),)).graph)


def test_compiles_as_one_graph():
    block = fuse_norm_act(resnet.BasicBlock(4, 4))
    x = torch.randn(2, 4, 8, 8)
    expected = copy.deepcopy(block)(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_running_statistics(momentum, options):
    norm = nn.BatchNorm2d(5, momentum=momentum, **options)
    fused = NormAct2d(copy.deepcopy(norm), "relu")
    for mode in (True, True, False):
        norm.train(mode)
        fused.train(mode)
        x = torch.randn(3, 5, 4, 6) * 2 + 1
        torch.testing.assert_close(fused(x), norm(x).relu())
        for (name, a), (other, b) in zip(fused.state_dict().items(), norm.state_dict().items(), strict=True):
            assert name == other
            torch.testing.assert_close(a, b)


def test_one_value_per_channel_raises():
    norm = NormAct2d(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(torch.ones(1, 3, 1, 1))
    assert not norm.running_mean.any()
    assert norm.eval()(torch.ones(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_batch_without_images_leaves_the_statistics():
    norm = NormAct2d(nn.BatchNorm2d(3))
    assert norm(torch.ones(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert not norm.running_mean.any() and torch.equal(norm.running_var, torch.ones(3))


def test_residual_of_another_dtype():
    norm, x = NormAct2d(nn.BatchNorm2d(3), "relu"), torch.randn(2, 3, 4, 4).bfloat16()
    y = norm(x, torch.randn(2, 3, 4, 4))
    assert y.dtype == torch.bfloat16


def test_without_a_kernel_the_stock_layers_run(monkeypatch):
    norm, x, residual = NormAct2d(nn.BatchNorm2d(3), "relu"), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    other = copy.deepcopy(norm)
    expected = norm(x, residual)
    monkeypatch.setattr(ops, "has_kernel", lambda *_: False)
    monkeypatch.setattr(ops, "norm_act", None)
    torch.testing.assert_close(other(x, residual), expected)
    torch.testing.assert_close(other.running_var, norm.running_var)


def test_what_is_not_fused():
    """A norm whose output another layer reads, an approximate GELU, and subclasses of BatchNorm2d."""
    sequence = fuse_norm_act(nn.Sequential(nn.BatchNorm2d(3), nn.GELU("tanh"), nn.SyncBatchNorm(3)))
    assert [type(m) for m in sequence] == [NormAct2d, nn.GELU, nn.SyncBatchNorm] and sequence[0].act == "none"
    norm = BatchNormAct2d(3, act_layer=nn.SiLU)
    assert fuse_norm_act(norm) is norm
    fused = fuse_norm_act(BatchNormAct2d(3))
    assert fused.act == "relu"
    assert repr(fused).startswith("NormAct2d(3, ") and repr(fused).endswith("act=relu)")
    assert AddAct("none")(torch.ones(1), torch.ones(1)) == 2


class Skipping(nn.Sequential):
    """Returns the output of its first layer beside that of the last."""

    def forward(self, x):
        first = self[0](x)
        return first, self[2](self[1](first))


def test_sequences_with_a_forward_of_their_own_keep_the_order_of_their_layers():
    sequence = perturb(Skipping(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = sequence(x)
    fused = fuse_norm_act(copy.deepcopy(sequence))
    assert fused[0].act == "none" and type(fused[1]) is nn.ReLU
    torch.testing.assert_close(fused(x), expected)
    assert (expected[0] < 0).any()  # a fused activation would have removed them
    replaced = nn.Sequential(*copy.deepcopy(sequence))
    replaced.forward = lambda x: replaced[0](x)  # a forward of this object alone
    assert [type(m) for m in fuse_norm_act(replaced)][1] is nn.ReLU


def test_subclasses_with_the_forward_of_sequential_are_fused():
    class Named(nn.Sequential):
        pass

    fused = fuse_norm_act(Named(nn.BatchNorm2d(3), nn.ReLU()))
    assert fused[0].act == "relu" and type(fused[1]) is nn.Identity


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("hooked", [0, 1])
def test_layers_with_hooks_are_not_fused(hooked, kind):
    sequence, called = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), []
    getattr(sequence[hooked], f"register_{kind}_hook")(lambda module, *values: called.append(module))
    layer = sequence[hooked]
    fused = fuse_norm_act(sequence)
    assert fused[hooked] is layer and type(fused[1]) is nn.ReLU
    assert isinstance(fused[0], NormAct2d) == (hooked == 1)  # a norm without hooks is replaced alone
    fused(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert called == [layer]


@pytest.mark.parametrize("name", ["", "bn1", "act1", "bn2", "act2"])
def test_residual_blocks_of_timm_keep_their_hooks(name):
    block, called = perturb(resnet.BasicBlock(4, 4)).eval(), []
    expected, x = copy.deepcopy(block), torch.randn(2, 4, 8, 8)
    block.get_submodule(name).register_forward_hook(lambda module, *_: called.append(type(module)))
    torch.testing.assert_close(fuse_norm_act(block)(x), expected(x))
    assert called == [type(expected.get_submodule(name))]


@pytest.mark.parametrize("name", ["", "body", "body.1", "body.2", "body.4", "activation"])
def test_residual_blocks_keep_their_hooks(name):
    block, called = perturb(ResidualBlock(4, 4, "same", ResNetPlan(1, (1,)))).eval(), []
    expected, x = copy.deepcopy(block), torch.randn(2, 4, 8, 8)
    block.get_submodule(name).register_forward_hook(lambda module, *_: called.append(type(module)))
    torch.testing.assert_close(fuse_norm_act(block)(x), expected(x))
    assert called == [type(expected.get_submodule(name))]


def build_shared_norm():
    norm = perturb(nn.BatchNorm2d(3))
    return nn.Sequential(norm, norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm, nn.ReLU())


def build_shared_block():
    block = perturb(resnet.BasicBlock(4, 4))
    return nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.Sequential(block))


@pytest.mark.parametrize("build", [build_shared_norm, build_shared_block])
def test_layers_with_several_names_stay_one(build):
    """The statistics are the same ones also after a move to another device or type, which replaces them."""
    network = build()
    expected, x = copy.deepcopy(network), torch.randn(2, 3, 4, 4)
    fused = fuse_norm_act(network)
    for module in (expected, fused):
        module.double().train()
        for _ in range(3):
            module(x.double())
    assert expected.state_dict().keys() == fused.state_dict().keys()
    torch.testing.assert_close(fused.state_dict(), expected.state_dict())
    torch.testing.assert_close(fused.eval()(x.double()), expected.eval()(x.double()))


def test_statistics_over_processes_replace_norms_that_are_not_fused():
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm2d(3)), GlobalBatchNorm2d)
