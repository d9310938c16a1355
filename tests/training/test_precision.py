"""TF32 and cuDNN's choice of algorithms: the recipe sets them, they are restored afterwards, and maps use float32."""

import numpy as np
import pytest
import torch
from small_run import RECIPE
from tiny import tiny_set

from recontrast import AnomalyMap, ReContrast, float32
from recontrast.app import environment
from recontrast.float32 import convolution_precision
from recontrast.inference.infer import infer
from recontrast.runtime.cudnn import tuned_convolutions
from recontrast.training.train import train

MATMUL = torch.backends.cuda.matmul
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: TF32 WAS NOT TRIED")


def read(backend):
    """Return the precision of a backend, in the words of torch 2.9 and newer."""
    value = getattr(backend, float32._ATTRIBUTE)
    return value if isinstance(value, str) else {True: "tf32", False: "ieee"}[value]


def read_convolutions():
    return read(float32._convolutions())


@pytest.fixture(autouse=True)
def _check_restored():
    before = read_convolutions()
    yield
    assert read_convolutions() == before
    assert torch.backends.cudnn.allow_tf32 == (before == "tf32")  # the old name still agrees
    torch.set_float32_matmul_precision("highest")


def record_precision(module, precisions):
    """Append the precision of convolutions to ``precisions`` whenever ``module`` runs."""
    module.register_forward_pre_hook(lambda *_: precisions.append(read_convolutions()))


def test_default_is_that_of_cudnn():
    assert RECIPE.tf32
    assert read_convolutions() == "tf32"
    assert read(MATMUL) != "tf32"


@pytest.mark.parametrize("tf32", [True, False])
def test_training_and_inference_use_the_precision_of_the_recipe(tmp_path, tf32):
    model, precisions = ReContrast("test_resnet", weights="random"), []
    record_precision(model, precisions)
    recipe = RECIPE.replace(tf32=tf32, steps=2)
    train(
        recipe, tiny_set(tmp_path), model=model, device="cpu",
        on_log=lambda *_: record_precision(model.decoder, precisions),
    )  # fmt: skip
    images = np.zeros((3, 32, 32, 3), np.uint8)
    for _ in infer(model, images, recipe, batch=2):
        assert read_convolutions() == "tf32"  # the caller's setting is restored between two batches
    assert len(precisions) > 4
    assert set(precisions) == {"tf32" if tf32 else "ieee"}


def test_precision_is_restored_after_an_error():
    with pytest.raises(KeyError), convolution_precision(tf32=False):
        assert read_convolutions() == "ieee"
        raise KeyError


@pytest.mark.parametrize("of_caller", [False, True])
@pytest.mark.parametrize("of_recipe", [False, True])
def test_cudnn_times_its_algorithms_in_training_alone(tmp_path, monkeypatch, of_recipe, of_caller):
    """``cudnn_benchmark`` turns it on; a caller who has turned it on keeps it."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", of_caller)
    model, settings = ReContrast("test_resnet", weights="random"), []
    model.register_forward_pre_hook(lambda *_: settings.append(torch.backends.cudnn.benchmark))
    train(RECIPE.replace(cudnn_benchmark=of_recipe, steps=2), tiny_set(tmp_path), model=model, device="cpu")
    assert settings and set(settings) == {of_recipe or of_caller}
    assert torch.backends.cudnn.benchmark == of_caller
    with pytest.raises(KeyError), tuned_convolutions(True):
        assert torch.backends.cudnn.benchmark
        raise KeyError
    assert torch.backends.cudnn.benchmark == of_caller


def test_matrix_products_of_a_map_use_full_float32(monkeypatch):
    torch.set_float32_matmul_precision("medium")
    precisions, cat = set(), torch.cat

    def record_and_cat(*args, **kwargs):
        precisions.update({read(backend) for backend in float32._matrix_products()})
        return cat(*args, **kwargs)

    monkeypatch.setattr(torch, "cat", record_and_cat)
    AnomalyMap([8, 4], 32, method="matmul").from_distances([torch.rand(1, size, size) for size in (8, 4)])
    assert precisions == {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"


@gpu
def test_maps_on_a_gpu_do_not_depend_on_the_matmul_precision():
    distances = [torch.rand(2, size, size, device="cuda") for size in (64, 32, 16)] * 2
    for method in ("matmul", "fused"):
        amap, maps = AnomalyMap([64, 32, 16], 256, method=method), []
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            maps.append(amap.from_distances(distances)[0])
        assert torch.equal(*maps)


def test_environment_reports_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    description = environment.describe_environment()["float32 on CUDA"]
    assert description == "convolutions TF32, matrix products full; a recipe's tf32 decides its own convolutions"
