"""A short trajectory of training beside the restated reference loop, from equal weights on equal batches.

In float64 the two are equal all the way. In float32 they are equal until rounding is amplified: AdamW divides a
gradient by its own size, so that one of nearly zero, whose sign is noise, moves its weight by a whole learning rate.
"""

import copy
from itertools import chain

import pytest
import torch
import upstream
from tiny import tiny_set
from upstream_model import upstream_from

from recontrast.data.cache import ImageCache
from recontrast.data.images import normalise
from recontrast.engine.batches import Batches
from recontrast.engine.recipes import RECIPES
from recontrast.engine.train import new_model, train

MVTEC = RECIPES["mvtec"].replace(backbone="resnet18", weights="random", batch=3, size=64, seed=3)  # ramp: a tenth
MIRROR = MVTEC.replace(steps=11, backbone="test_resnet")
CASES = {  # recipe, dtype, tolerance, mode of the encoder's BatchNorm
    "float32-eval": (MVTEC.replace(steps=3, channels_last=False), torch.float32, 1e-5, "eval"),  # rounds as there
    "float32-train": (MVTEC.replace(steps=3, channels_last=False), torch.float32, 1e-5, "train"),
    "float64-eval": (MVTEC.replace(steps=3), torch.float64, 1e-9, "eval"),
    "float64-train": (MVTEC.replace(steps=6, size=32, batch=4), torch.float64, 1e-9, "train"),
}


def batches_of(samples, model, recipe, dtype):
    """What `train` sees: the same images in the same order, a ragged batch at the end of each epoch."""
    images = ImageCache(samples, recipe.size)
    order = Batches(len(samples), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    while True:
        yield normalise(images[next(order)], model.mean, model.std, dtype=dtype)


def relative_error(one, other):
    return max(((one[k] - other[k]).norm() / other[k].norm().clamp_min(1e-12)).item() for k in other)


@pytest.mark.parametrize("recipe, dtype, rtol, mode", CASES.values(), ids=CASES)
def test_reference_model_and_loop(tmp_path, recipe, dtype, rtol, mode):
    samples = tiny_set(tmp_path, train=10, good=0, defects=0)
    torch.manual_seed(0)
    ours = new_model(recipe.replace(encoder_bn=mode), "any").to(dtype)
    theirs = upstream_from(ours, "resnet18").to(dtype).train(encoder_bn_train=mode == "train")
    expected = upstream.train(
        lambda images: list(zip(*theirs(images), strict=True)),
        batches_of(samples, ours, recipe, dtype),
        recipe.steps,
        chain(theirs.bottleneck.parameters(), theirs.decoder.parameters()),
        theirs.encoder.parameters(),
    )
    losses = train(recipe, samples, model=ours, device="cpu").losses
    assert losses == pytest.approx(expected, rel=rtol)
    assert losses[-1] < losses[0]  # something was learnt on the way
    if dtype == torch.float64:
        weights = dict(upstream_from(ours, "resnet18").named_parameters())
        used = {k: v for k, v in theirs.named_parameters() if ".conv4" not in k and ".bn4" not in k}
        assert relative_error(weights, used) < 1e-7


def test_any_model_in_the_reference_loop(tmp_path):
    """The decoder that the reference does not have, with its loop."""
    samples = tiny_set(tmp_path, train=7, good=0, defects=0)
    torch.manual_seed(0)
    ours = new_model(MIRROR, "any").double()
    theirs = copy.deepcopy(ours).train()
    batches = batches_of(samples, ours, MIRROR, torch.float64)
    groups = theirs.decoder_parameters(), theirs.encoder_parameters()
    expected = upstream.train(theirs, batches, MIRROR.steps, *groups)
    losses = train(MIRROR, samples, model=ours, device="cpu").losses
    assert losses == pytest.approx(expected, rel=1e-9)
    assert relative_error(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-7
