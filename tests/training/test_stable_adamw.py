"""StableAdamW and the schedule of Dinomaly against their formulas, step by step in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from recontrast.recipes.recipe import Recipe
from recontrast.training import stable_adamw
from recontrast.training.optimisers import build_optimisers, compute_lr_factor
from recontrast.training.stable_adamw import StableAdamW

OPTIONS = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 1e-4}
SHAPES = [(7, 5), (3,), (2, 3, 4), ()]


def restated(weights, gradients, lr, betas, eps, weight_decay, amsgrad, threshold):
    """The steps of one tensor, number by number in NumPy."""
    weight, first, second, largest = weights.copy(), 0.0, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        weight = weight * (1 - lr * weight_decay)
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        largest = np.maximum(largest, second)
        root = np.sqrt((largest if amsgrad else second) / (1 - betas[1] ** step)) + eps
        rms = math.sqrt(((gradient / root) ** 2).mean())
        weight = weight - lr / max(1.0, rms / threshold) * (first / (1 - betas[0] ** step)) / root
    return weight


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "for each"])
def test_steps(amsgrad, threshold, together, monkeypatch):
    if together:  # as on a GPU
        monkeypatch.setattr(stable_adamw, "_divide", lambda parameters: [parameters])
    generator = np.random.default_rng(5)
    weights = [generator.standard_normal(shape) for shape in SHAPES]
    scales = 10.0 ** generator.integers(-3, 3, (9, len(SHAPES)))  # gradients that jump, so that clipping acts
    gradients = [
        [scale * generator.standard_normal(w.shape) for w, scale in zip(weights, row, strict=True)] for row in scales
    ]
    trained = [nn.Parameter(torch.tensor(w)) for w in weights]
    optimiser = StableAdamW(trained, **OPTIONS, amsgrad=amsgrad, clip_threshold=threshold)
    for row in gradients:
        for parameter, gradient in zip(trained, row, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimiser.step()
    for position, parameter in enumerate(trained):
        column = [row[position] for row in gradients]
        expected = restated(weights[position], column, **OPTIONS, amsgrad=amsgrad, threshold=threshold)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(parameter.grad.numpy(), column[-1])  # gradients stay as they are


def test_without_clipping_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).double()) for _ in range(2))
    optimisers = [
        StableAdamW([ours], **OPTIONS, clip_threshold=math.inf), torch.optim.AdamW([theirs], **OPTIONS)
    ]  # fmt: skip
    for _ in range(5):
        gradient = torch.randn(12).double()
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_chunks_hold_one_device_and_dtype_and_are_bounded(monkeypatch):
    monkeypatch.setattr(stable_adamw, "_CHUNK", 10)
    sizes = [(4, torch.float32), (6, torch.float32), (1, torch.float32), (3, torch.float64), (99, torch.float64)]
    tensors = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]
    chunks = list(stable_adamw._divide(tensors))
    assert [[t.numel() for t in chunk] for chunk in chunks] == [[4, 6], [1], [3], [99]]
    assert [len(chunk) for chunk in stable_adamw._divide([torch.empty(2), torch.empty(2)])] == [1, 1]
    assert list(stable_adamw._divide([])) == []


def test_parameters_without_gradient_stay_and_a_step_of_rate_zero_moves_only_the_moments():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimiser = StableAdamW([used, unused], lr=0.0, weight_decay=0.1, amsgrad=True)
    used.grad = torch.full((3,), 2.0)
    optimiser.step()
    assert torch.equal(used, torch.ones(3)) and unused not in optimiser.state
    assert optimiser.state[used]["exp_avg"].tolist() == pytest.approx([0.2] * 3)


def test_state_can_be_saved_and_loaded():
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(6, 4, generator=generator)

    def run(count, state=None, start=None):
        parameter = nn.Parameter(torch.ones(4) if start is None else start.clone())
        optimiser = StableAdamW([parameter], **OPTIONS, amsgrad=True)
        if state is not None:
            optimiser.load_state_dict(state)
        for gradient in gradients[6 - count :] if start is not None else gradients[:count]:
            parameter.grad = gradient.clone()
            optimiser.step()
        return parameter.detach(), optimiser.state_dict()

    half, state = run(3)
    assert torch.equal(run(3, state, half)[0], run(6)[0])


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"eps": math.nan}, {"betas": (0.9, 1.0)}, {"clip_threshold": 0.0}])
def test_bad_options(option):
    with pytest.raises(ValueError, match=f"StableAdamW: {next(iter(option))}: wanted"):
        StableAdamW([nn.Parameter(torch.ones(1))], **option)


def test_the_schedule_is_that_of_dinomaly():
    """`WarmCosineScheduler` of its code: NumPy's linspace up to the full rate, then a cosine."""
    steps, warmup, base, final = 1000, 30, 2e-3, 2e-4
    count = np.arange(steps - warmup)
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * count / len(count)))
    expected = np.concatenate([np.linspace(0, base, warmup), falling])
    recipe = Recipe(steps=steps, warmup=0.03, schedule="cosine_from_zero", lr_end=0.1)
    rates = [base * compute_lr_factor(recipe, step) for step in range(steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert compute_lr_factor(recipe.replace(warmup=0.001), 0) == 0  # a warm-up of one step
    assert compute_lr_factor(recipe.replace(warmup=0.0), 0) == 1


def test_recipes_select_it():
    model = nn.Linear(2, 2)
    model.decoder_parameters, model.encoder_parameters = model.parameters, lambda: []
    recipe = Recipe(optimiser="stableadamw", amsgrad=True, eps=1e-10, weight_decay=1e-4, decoder_lr=2e-3)
    (optimiser,) = build_optimisers(model, recipe, torch.device("cpu"))
    assert isinstance(optimiser, StableAdamW) and optimiser.param_groups[0]["amsgrad"]
    assert {name: optimiser.param_groups[0][name] for name in OPTIONS} == OPTIONS
    with pytest.raises(ValueError, match="graph: wanted false if optimiser is 'stableadamw'"):
        recipe.replace(graph=True)
