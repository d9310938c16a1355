"""The cache of frozen features changes no result and avoids runs of the frozen encoder."""

import numpy as np
import pytest
import torch
from small_run import RECIPE, same_weights
from tiny import tiny_set

from recontrast.models.backbone import Backbone
from recontrast.training.teacher_cache import TeacherCache
from recontrast.training.train import train

BYTES_PER_IMAGE = 4 * (16 * 16 * 16 + 8 * 8 * 24 + 4 * 4 * 40)  # of the features of `CountingEncoder`


class CountingEncoder(torch.nn.Module):
    """Encoder with three levels by pooling, which records its batch sizes."""

    def __init__(self):
        super().__init__()
        self.batch_sizes = []

    def forward(self, x):
        self.batch_sizes.append(len(x))
        pooled = [torch.nn.functional.avg_pool2d(x, s).repeat(1, 16, 1, 1) for s in (4, 8, 16)]
        return [
            f[:, :c].contiguous(memory_format=torch.channels_last) for f, c in zip(pooled, (16, 24, 40), strict=True)
        ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("capacity", [0, 3, 6, 100])
def test_features_and_encoder_runs(layout, capacity):
    encoder = CountingEncoder()
    images = torch.randn(6, 3, 64, 64).contiguous(memory_format=layout)
    cache = TeacherCache(encoder, 6, capacity * BYTES_PER_IMAGE + 7)
    for index in ([0, 4], [5, 0, 2], [1, 2, 3, 4], [3, 1, 0, 5], [2]):
        batch = images[index].contiguous(memory_format=layout)
        cached = cache(np.array(index), batch)
        for features, expected in zip(cached, CountingEncoder()(batch), strict=True):
            assert torch.equal(features, expected)
    assert cache.capacity == min(capacity, 6) and cache.bytes == cache.capacity * BYTES_PER_IMAGE <= cache.budget
    assert encoder.batch_sizes == {0: [2, 3, 4, 4, 1], 3: [2, 2, 3, 2], 6: [2, 2, 2], 100: [2, 2, 2]}[capacity]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), train=7, good=0, defects=0)


@pytest.mark.parametrize("change", [{"channels_last": False}, {"channels_last": True, "precision": "bfloat16"}])
def test_cache_leaves_training_bit_identical(samples, change, monkeypatch):
    """With a capacity of all 7 images and of 3; batches of 4 and 3 alternate."""
    calls = []
    original = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, x: (calls.append(self.frozen), original(self, x))[1])
    recipe = RECIPE.replace(steps=4, **change)
    plain = train(recipe, samples, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        bytes_per_image = sum(f.nbytes for f in plain.model.frozen(torch.zeros(1, 3, 32, 32)))
    for capacity, runs in ((7, 2), (3, 4)):
        calls.clear()
        cached = train(recipe, samples, device="cpu", teacher_cache=capacity * bytes_per_image)
        assert (calls.count(True), calls.count(False)) == (runs, 4)
        assert cached.losses == plain.losses
        assert same_weights(cached.model, plain.model)


def test_cache_is_ignored_without_a_frozen_encoder(samples):
    recipe = RECIPE.replace(pairs="self", mining=False, steps=2)
    assert (
        train(recipe, samples, device="cpu", teacher_cache=2**20).losses == train(recipe, samples, device="cpu").losses
    )


def test_compiled_model(samples, monkeypatch):
    """`recipe.compile` together with the cache, with a backend that only traces."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: original(model, dynamic=dynamic, backend="eager"))
    recipe = RECIPE.replace(steps=2, batch=7)
    plain = train(recipe, samples, device="cpu")
    result = train(recipe.replace(compile=True), samples, device="cpu", teacher_cache=2**30)
    assert result.losses == pytest.approx(plain.losses, rel=1e-5)
    assert result.model.state_dict().keys() == plain.model.state_dict().keys()
