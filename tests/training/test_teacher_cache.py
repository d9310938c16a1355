"""The cache of teacher features: the same numbers, and the frozen encoder runs as often as it must."""

import numpy as np
import pytest
import torch
from small_run import RECIPE, same_weights
from tiny import tiny_set

from recontrast.models.backbone import Backbone
from recontrast.training.teacher_cache import TeacherCache
from recontrast.training.train import train

EACH = 4 * (16 * 16 * 16 + 8 * 8 * 24 + 4 * 4 * 40)  # bytes of an image's features, see below


class Counted(torch.nn.Module):
    """Three levels by pooling, and how many images went through."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        pooled = [torch.nn.functional.avg_pool2d(x, s).repeat(1, 16, 1, 1) for s in (4, 8, 16)]
        return [
            f[:, :c].contiguous(memory_format=torch.channels_last) for f, c in zip(pooled, (16, 24, 40), strict=True)
        ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("room", [0, 3, 6, 100])
def test_features_and_calls(layout, room):
    encoder = Counted()
    images = torch.randn(6, 3, 64, 64).contiguous(memory_format=layout)
    cache = TeacherCache(encoder, 6, room * EACH + 7)
    for index in ([0, 4], [5, 0, 2], [1, 2, 3, 4], [3, 1, 0, 5], [2]):
        batch = images[index].contiguous(memory_format=layout)
        got = cache(np.array(index), batch)
        for one, other in zip(got, Counted()(batch), strict=True):
            assert torch.equal(one, other)
            assert one.is_contiguous(memory_format=layout) or len(index) == 1 or one.shape == other.shape
    assert cache.capacity == min(room, 6) and cache.bytes == cache.capacity * EACH <= cache.budget
    assert encoder.seen == {0: [2, 3, 4, 4, 1], 3: [2, 2, 3, 2], 6: [2, 2, 2], 100: [2, 2, 2]}[room]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), train=7, good=0, defects=0)


@pytest.mark.parametrize("change", [{"channels_last": False}, {"channels_last": True, "precision": "bfloat16"}])
def test_the_same_trajectory_to_the_bit(samples, change, monkeypatch):
    """With room for all 7 images, and for 3; batches of 4 and 3 in turn."""
    calls = []
    real = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, x: (calls.append(self.frozen), real(self, x))[1])
    recipe = RECIPE.replace(steps=4, **change)
    plain = train(recipe, samples, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        each = sum(f.nbytes for f in plain.model.frozen(torch.zeros(1, 3, 32, 32)))
    for room, runs in ((7, 2), (3, 4)):
        calls.clear()
        kept = train(recipe, samples, device="cpu", teacher_cache=room * each)
        assert (calls.count(True), calls.count(False)) == (runs, 4)
        assert kept.losses == plain.losses
        assert same_weights(kept.model, plain.model)


def test_nothing_to_keep_where_there_is_one_encoder(samples):
    recipe = RECIPE.replace(pairs="self", mining=False, steps=2)
    assert (
        train(recipe, samples, device="cpu", teacher_cache=2**20).losses == train(recipe, samples, device="cpu").losses
    )


def test_compiled_model(samples, monkeypatch):
    """`recipe.compile`, by a backend that traces and compiles nothing, with the cache."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: real(model, dynamic=dynamic, backend="eager"))
    recipe = RECIPE.replace(steps=2, batch=7)
    plain = train(recipe, samples, device="cpu")
    result = train(recipe.replace(compile=True), samples, device="cpu", teacher_cache=2**30)
    assert result.losses == pytest.approx(plain.losses, rel=1e-5)
    assert result.model.state_dict().keys() == plain.model.state_dict().keys()
