"""Layers that several names lead to, in every conversion of a network: they stay one layer."""

import pytest
import torch
from torch import nn

from recontrast.models.norm_act import fuse_norm_act
from recontrast.models.partial_norm import PartialNorm2d, convert_partial_norm
from recontrast.models.replacement import replace_modules
from recontrast.runtime.sync_batchnorm import GlobalBatchNorm2d, convert_sync_batchnorm


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (convert_sync_batchnorm, GlobalBatchNorm2d),
        (convert_partial_norm, PartialNorm2d),
        (fuse_norm_act, nn.BatchNorm2d),
    ],
)
def test_a_norm_with_several_names_stays_one(convert, kind):
    norm = nn.BatchNorm2d(3)
    network = nn.ModuleDict({"first": nn.Sequential(norm, norm, nn.ReLU()), "second": nn.Sequential(norm)})
    names = [name for name in network.state_dict() if "num_batches" not in name]
    converted = convert(network)
    norms = [module for _, module in converted.named_modules(remove_duplicate=False) if isinstance(module, kind)]
    assert len(norms) == 3 and all(other is norms[0] for other in norms)
    assert [name for name in converted.state_dict() if name in names] == names


def test_replacement_of_the_module_itself():
    old, new = nn.ReLU(), nn.GELU()
    assert replace_modules(old, {old: new}) is new
    unchanged = nn.Sequential(nn.ReLU())
    assert replace_modules(unchanged, {old: new}) is unchanged and type(unchanged[0]) is nn.ReLU


def test_names_and_missing_children_stay():
    module = nn.Module()
    module.a, module.b, module.c = nn.ReLU(), None, nn.Sequential(nn.ReLU())
    module.register_module("d", None)
    replace_modules(module, {module.a: nn.Identity()})
    assert list(module._modules) == ["a", "c", "d"] and module.b is None
    assert torch.equal(module.a(torch.tensor([-1.0])), torch.tensor([-1.0]))
