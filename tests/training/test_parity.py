"""Short training runs compared with the restated reference loops, from equal weights and on equal batches.

In float64 both agree at every step, including all special rules of the stable and the unified script. In float32 they
agree until rounding errors are amplified: AdamW divides a gradient by its own magnitude, so that a gradient near zero,
whose sign is noise, moves its weight by a full learning rate.
"""

import copy
import json
import sys
from functools import partial
from itertools import chain

import pytest
import torch
import upstream
from tiny import tiny_set
from torch import nn
from upstream_model import replace_layers, replace_norms, upstream_from

from recontrast.data.cache import ImageCache
from recontrast.data.images import normalise
from recontrast.recipes.paper import RECIPES
from recontrast.training.sampler import BatchSampler
from recontrast.training.train import build_model, train

TINY = {"backbone": "resnet18", "weights": "random", "batch": 3, "size": 64, "seed": 3}
MVTEC, STABLE, UNIFIED = (RECIPES[name].replace(**TINY) for name in ("mvtec", "mvtec_stable", "mvtec_unified"))
MIRROR = MVTEC.replace(steps=11, backbone="test_resnet")
WIPED = STABLE.replace(steps=6, wipe_every=3, rest=2)  # a reset after step 3, the encoder pauses in 4 and 5
SMALL = {"size": 32, "batch": 4}
CASES = {  # recipe, dtype, tolerance; in float32 contiguous, as the reference
    "float32-eval": (MVTEC.replace(steps=3, channels_last=False, encoder_bn="eval"), torch.float32, 1e-5),
    "float32-train": (MVTEC.replace(steps=3, channels_last=False, encoder_bn="train"), torch.float32, 1e-5),
    "float32-stable": (STABLE.replace(steps=1, channels_last=False), torch.float32, 1e-5),
    "float32-unified": (UNIFIED.replace(steps=1, channels_last=False), torch.float32, 1e-5),
    "float64-eval": (MVTEC.replace(steps=3, encoder_bn="eval"), torch.float64, 1e-9),
    "float64-train": (MVTEC.replace(steps=6, encoder_bn="train", **SMALL), torch.float64, 1e-9),
    # At 32 px the bottleneck has one point, and BatchNorm over so few values amplifies even float64 rounding.
    "float64-stable": (WIPED, torch.float64, 1e-9),
    "float64-never-resting": (WIPED.replace(steps=3, wipe_every=2, rest=0), torch.float64, 1e-9),
    "float64-unified": (UNIFIED.replace(steps=6), torch.float64, 1e-9),  # learning rates fall after step 4
}


def batches_of(samples, model, recipe, dtype):
    """Yield the batches of `train`: the same images in the same order, with or without a smaller last batch."""
    images = ImageCache(samples, recipe.size)
    sampler = BatchSampler(len(samples), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    while True:
        yield normalise(images[next(sampler)], model.mean, model.std, dtype=dtype)


def relative_error(actual, expected):
    errors = {k: (actual[k] - expected[k]).norm() / expected[k].norm().clamp_min(1e-12) for k in expected}
    return max(error.item() for error in errors.values())


def build_both_models(recipe, dtype):
    """Return our model and the restated one with equal weights; some channels of the encoder are rarely active."""
    torch.manual_seed(0)
    plain = build_model(recipe.replace(partial_norm=False), "any")
    torch.manual_seed(0)
    ours = build_model(recipe, "any")
    for model in (plain, ours):
        for part in (model.encoder, model.frozen):
            part.extractor.conv1.weight.data[::4] *= 1e-3
    theirs = upstream_from(plain, "resnet18")
    if recipe.partial_norm:  # the minimum is rounded to float32 before the model changes its dtype
        replace_norms(theirs.encoder, float(torch.tensor(5e-4)), 1e-6)
        replace_norms(theirs.encoder_freeze, float(torch.tensor(5e-4)), 1e-5)
    if recipe.activation == "gelu":
        replace_layers(theirs.decoder)
    theirs.to(dtype).train(encoder_bn_train=recipe.encoder_bn == "train")
    return ours.to(dtype), theirs


def reference_losses(recipe, theirs, batches):
    """Return the losses of the reference loop whose script ``recipe`` reproduces."""
    if recipe.partial_norm:  # its counter already includes the step of the reset: one less than the argument
        loop = partial(upstream.train_stable, wipe_every=recipe.wipe_every, rest=recipe.rest + 1 if recipe.rest else 0)
    else:
        loop = upstream.train_unified if recipe.amsgrad else upstream.train
    groups = chain(theirs.bottleneck.parameters(), theirs.decoder.parameters()), theirs.encoder.parameters()
    return loop(lambda images: list(zip(*theirs(images), strict=True)), batches, recipe.steps, *groups)


@pytest.mark.parametrize("recipe, dtype, rtol", CASES.values(), ids=CASES)
def test_reference_model_and_loop(tmp_path, recipe, dtype, rtol):
    samples = tiny_set(tmp_path, train=10, good=0, defects=0)
    ours, theirs = build_both_models(recipe, dtype)
    expected = reference_losses(recipe, theirs, batches_of(samples, ours, recipe, dtype))
    losses = train(recipe, samples, model=ours, device="cpu").losses
    assert losses == pytest.approx(expected, rel=rtol)
    if recipe.steps > 1:
        assert losses[-1] < losses[0]  # the model has learnt
    if dtype == torch.float64:
        weights = dict(upstream_from(ours, "resnet18").named_parameters())
        used = {k: v for k, v in theirs.named_parameters() if ".conv4" not in k and ".bn4" not in k}
        assert relative_error(weights, used) < 1e-7


@pytest.mark.parametrize(
    "recipe, change",
    [
        (WIPED, {"wipe_every": 4}),
        (WIPED, {"rest": 1}),
        (WIPED, {"eps": 1e-8}),
        (UNIFIED.replace(steps=6), {"lr_drop_at": 0.5}),
        (UNIFIED.replace(steps=6), {"amsgrad": False}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.name,
)
def test_each_special_rule_changes_the_weights(tmp_path, recipe, change):
    """Agreement to 1e-9 is evidence only if each rule changes the weights by more than that."""
    samples = tiny_set(tmp_path, train=10, good=0, defects=0)
    recipe = recipe.replace(backbone="test_resnet", size=32)
    ours = build_model(recipe, "any").double()
    changed = copy.deepcopy(ours)
    train(recipe, samples, model=ours, device="cpu")
    train(recipe.replace(**change), samples, model=changed, device="cpu")
    assert relative_error(dict(changed.named_parameters()), dict(ours.named_parameters())) > 1e-6


def test_rarely_active_channels_are_below_the_variance_minimum():
    """`test_reference_model_and_loop` covers both branches of the norm."""
    ours, _ = build_both_models(STABLE, torch.float64)
    norm, variances = ours.encoder.extractor.bn1, []
    norm.register_forward_pre_hook(lambda module, inputs: variances.append(inputs[0].var(dim=(0, 2, 3))))
    ours(torch.randn(3, 3, 64, 64, dtype=torch.float64))
    rare = variances[0] < norm.min_var
    assert rare[::4].all() and not rare[1::4].any()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.encoder.modules())


def test_decoder_without_counterpart_in_the_reference(tmp_path):
    """A decoder that the reference does not have, trained by the reference loop."""
    samples = tiny_set(tmp_path, train=7, good=0, defects=0)
    torch.manual_seed(0)
    ours = build_model(MIRROR, "any").double()
    theirs = copy.deepcopy(ours).train()
    batches = batches_of(samples, ours, MIRROR, torch.float64)
    groups = theirs.decoder_parameters(), theirs.encoder_parameters()
    expected = upstream.train(theirs, batches, MIRROR.steps, *groups)
    losses = train(MIRROR, samples, model=ours, device="cpu").losses
    assert losses == pytest.approx(expected, rel=1e-9)
    assert relative_error(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-7


def float32_drift(samples, recipe):
    """Return the relative difference of the float32 losses at each step."""
    ours, theirs = build_both_models(recipe, torch.float32)
    expected = reference_losses(recipe, theirs, batches_of(samples, ours, recipe, torch.float32))
    losses = train(recipe, samples, model=ours, device="cpu").losses
    return [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]


# python tests/training/test_parity.py FOLDER prints the drift over 32 steps of benchmarks/README.md.
if __name__ == "__main__":
    torch.set_num_threads(1)
    samples = tiny_set(sys.argv[1], train=10, good=0, defects=0)
    short_schedules = {"mvtec": {}, "mvtec_stable": {"wipe_every": 10, "rest": 4}, "mvtec_unified": {}}
    for name, changes in short_schedules.items():
        drift = float32_drift(
            samples, RECIPES[name].replace(**TINY, steps=32, encoder_bn="train", channels_last=False, **changes)
        )
        print(json.dumps({"recipe": name, **{f"step {i}": f"{drift[i - 1]:.1e}" for i in (1, 2, 4, 8, 16, 32)}}))
