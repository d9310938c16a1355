"""TF32: a recipe decides its convolutions, nothing is left behind, and maps are in full float32 whatever is allowed."""

import numpy as np
import pytest
import torch
from small_run import RECIPE
from tiny import tiny_set

from recontrast import AnomalyMap, ReContrast
from recontrast.app import environment
from recontrast.inference.infer import infer
from recontrast.runtime.device import convolution_precision
from recontrast.training.train import train

CONV, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: TF32 WAS NOT TRIED")


@pytest.fixture(autouse=True)
def _settings():
    before = CONV.fp32_precision
    yield
    assert CONV.fp32_precision == before
    assert torch.backends.cudnn.allow_tf32 == (before == "tf32")  # the old name still agrees
    torch.set_float32_matmul_precision("highest")


def seen_by(module, seen):
    """Notes what convolutions of ``module`` may do while it runs."""
    module.register_forward_pre_hook(lambda *_: seen.append(CONV.fp32_precision))


def test_the_default_is_that_of_cudnn():
    assert RECIPE.tf32
    assert CONV.fp32_precision == "tf32"
    assert MATMUL.fp32_precision != "tf32"


@pytest.mark.parametrize("tf32", [True, False])
def test_a_run_keeps_to_its_recipe(tmp_path, tf32):
    model, seen = ReContrast("test_resnet", weights="random"), []
    seen_by(model, seen)
    recipe = RECIPE.replace(tf32=tf32, steps=2)
    train(recipe, tiny_set(tmp_path), model=model, device="cpu", on_log=lambda *_: seen_by(model.decoder, seen))
    images = np.zeros((3, 32, 32, 3), np.uint8)
    for _ in infer(model, images, recipe, batch=2):
        assert CONV.fp32_precision == "tf32"  # between two batches the caller's setting holds
    assert len(seen) > 4
    assert set(seen) == {"tf32" if tf32 else "ieee"}


def test_an_error_leaves_no_setting_behind():
    with pytest.raises(KeyError), convolution_precision(tf32=False):
        assert CONV.fp32_precision == "ieee"
        raise KeyError


def test_products_of_a_map_are_in_full_float32(monkeypatch):
    torch.set_float32_matmul_precision("medium")
    seen, cat = [], torch.cat

    def noting(*args, **kwargs):
        seen.append((MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return cat(*args, **kwargs)

    monkeypatch.setattr(torch, "cat", noting)
    AnomalyMap([8, 4], 32, method="matmul").from_distances([torch.rand(1, size, size) for size in (8, 4)])
    assert set(seen) == {("ieee", "ieee")}
    assert torch.get_float32_matmul_precision() == "medium"


@gpu
def test_maps_on_a_gpu_do_not_depend_on_what_is_allowed():
    distances = [torch.rand(2, size, size, device="cuda") for size in (64, 32, 16)] * 2
    for method in ("matmul", "fused"):
        amap, found = AnomalyMap([64, 32, 16], 256, method=method), []
        for allowed in ("highest", "medium"):
            torch.set_float32_matmul_precision(allowed)
            found.append(amap.from_distances(distances)[0])
        assert torch.equal(*found)


def test_info_tells(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = environment.describe_environment()["float32 on CUDA"]
    assert told == "convolutions TF32, matrix products full; a recipe's tf32 decides its own convolutions"
