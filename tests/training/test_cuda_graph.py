"""Steps without host waits: replayed as a CUDA graph, compiled, and fed from device memory."""

import numpy as np
import pytest
import torch

from recontrast import ReContrast, deviation, hard_mined_cosine, hardest, pairs_loss, power
from recontrast.data.images import normalise
from recontrast.mining import alpha_at
from recontrast.recipes.recipe import Recipe
from recontrast.training.cuda_graph import WARMUP_STEPS, GraphedStep, record_graph
from recontrast.training.device_images import DeviceImages
from recontrast.training.optimisers import build_optimisers
from recontrast.training.train import train_step

RECIPE = Recipe(
    backbone="test_resnet", weights="random", steps=12, batch=4, size=32, ramp=0.5,
    decoder_lr=2**-9, encoder_lr=2**-17,  # exact in float32, like the tensors on the device
)  # fmt: skip
SIZES = [4, 4, 4, 3] * 3  # each epoch ends with a smaller batch
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: THE STEP WAS NOT RECORDED")


def model_and_optimisers(device, recipe=RECIPE):
    torch.manual_seed(1)
    model = ReContrast("test_resnet", weights="random").to(device).train()
    return model, build_optimisers(model, recipe, torch.device(device))


def batches(device):
    torch.manual_seed(2)
    return [torch.randn(size, 3, 32, 32, device=device) for size in SIZES]


def record_by_rerunning(work):
    """Return a stand-in for `record_graph` that needs no GPU: replaying runs ``work`` again into one result tensor."""
    result = torch.zeros(())
    return lambda: result.copy_(work()), result


def run(device, replay, reset_at=None, paused_at=(), cached=False, recipe=RECIPE):
    """Train over the whole ramp of alpha, with a drop of the learning rates; return losses, weights and replays."""
    model, optimisers = model_and_optimisers(device, recipe)

    def one(moving, images, alpha, features=None):
        return train_step(model, moving, images, alpha, recipe, frozen_features=features)

    call = one
    if replay:
        call = GraphedStep(one, RECIPE.batch, torch.device(device), None if device == "cuda" else record_by_rerunning)
    losses = []
    for i, images in enumerate(batches(device)):
        if i == len(SIZES) // 2:
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] *= 0.25
        if i == reset_at:
            optimisers[0].state.clear()
        alpha = float(np.float32(alpha_at(i, RECIPE.steps, RECIPE.ramp)))
        features = model.constant_features(images) if cached else None
        losses.append(call(optimisers[:1] if i in paused_at else optimisers, images, alpha, features))
    rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    assert all(isinstance(rate, float) for rate in rates), "checkpoints hold numbers"
    return torch.stack(losses), [p.detach() for p in model.parameters()], call.replays if replay else 0


@pytest.fixture
def _deterministic_cudnn():
    """Make cuDNN deterministic: rounding may flip the sign of Adam's first updates, whose size is the learning rate."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def compare(device, expected_replays, **kwargs):
    (losses, weights, none), (others, theirs, count) = run(device, False, **kwargs), run(device, True, **kwargs)
    assert (none, count) == (0, expected_replays)
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(losses, others, **tolerance)
    for a, b in zip(weights, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert losses[-1] != losses[0]


FULL = SIZES.count(4) - WARMUP_STEPS


@pytest.mark.usefixtures("_deterministic_cudnn")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_replayed_steps_equal_eager_steps(device):
    compare(device, FULL)


@pytest.mark.usefixtures("_deterministic_cudnn")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_step_is_recorded_again_after_a_reset(device):
    compare(device, FULL - 1, reset_at=5)  # the step after the reset runs eagerly


@pytest.mark.usefixtures("_deterministic_cudnn")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_optimiser_may_pause(device):
    compare(device, FULL, paused_at=range(5, 9))


@pytest.mark.usefixtures("_deterministic_cudnn")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_features_may_come_from_a_cache(device):
    compare(device, FULL, cached=True)


def test_optimiser_without_the_option_capturable():
    compare("cpu", FULL, recipe=RECIPE.replace(optimiser="sgd"))


def test_states_at_an_old_address_are_recorded_again():
    """Whether a recording is valid depends on the tensors of all states, wherever they lie."""
    weights = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimiser = torch.optim.AdamW(weights, lr=0.1)
    memory = torch.zeros(4)

    def give_states():
        for weight in weights:
            optimiser.state[weight] = {"step": torch.ones(()), "exp_avg": memory[:4], "exp_avg_sq": torch.zeros(4)}

    recorded = []

    def record(work):
        recorded.append([optimiser.state[weight]["exp_avg_sq"] for weight in weights])
        return record_by_rerunning(work)

    replay = GraphedStep(lambda moving, images, alpha, features: images.sum(), 2, torch.device("cpu"), record)
    images = torch.ones(2, 3, 4, 4)
    give_states()
    for _ in range(WARMUP_STEPS + 2):
        replay([optimiser], images, 0.0)
    assert len(recorded) == 1
    give_states()  # the state of the first parameter begins at the same address
    replay([optimiser], images, 0.0)
    replay([optimiser], images, 0.0)
    assert len(recorded) == 2
    optimiser.state[weights[1]]["exp_avg_sq"] = torch.zeros(4)  # the last tensor of all
    replay([optimiser], images, 0.0)
    assert len(recorded) == 3


def test_inputs_are_copied_to_static_buffers():
    """A recorded step reads images, features and alpha of each call at fixed addresses."""
    calls = []

    def one(moving, images, alpha, features):
        assert features[0].sum() == images.sum()
        addresses = images.data_ptr(), alpha.data_ptr(), features[0].data_ptr()
        calls.append((addresses, images.sum().item(), alpha.item()))
        return images.sum()

    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(1)
    optimiser.step()
    replay = GraphedStep(one, 2, torch.device("cpu"), record_by_rerunning)
    for i in range(WARMUP_STEPS + 3):
        images = torch.full((2, 3, 4, 4), float(i))
        assert replay([optimiser], images, float(i), [images.clone()]).item() == i * images[0].numel() * 2
    assert [call[1:] for call in calls] == [(96.0 * i, float(i)) for i in range(WARMUP_STEPS + 3)]
    assert len({call[0] for call in calls[WARMUP_STEPS:]}) == 1
    assert replay.replays == 3


def test_model_and_loss_compile_as_one_graph():
    """Alpha is a tensor, so that its ramp causes no recompilation."""
    model, _ = model_and_optimisers("cpu")
    images, alpha = torch.randn(2, 3, 32, 32), torch.tensor(-1.0)

    def loss_of(images, alpha):
        return pairs_loss(model(images), deviation(alpha))

    model.encoder_bn = "eval"
    model.eval()  # fixed statistics, equal for both functions
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=False)
    for value in (-1.0, 0.5):
        alpha.fill_(value)
        results = []
        for function in (loss_of, compiled):
            model.zero_grad()
            loss = function(images, alpha)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.decoder_parameters() if p.grad is not None)])
        assert len(results[0]) > 10
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_recipe_field_graph():
    assert RECIPE.graph is False
    assert RECIPE.replace(graph=True).graph
    with pytest.raises(ValueError, match="graph: wanted true or false, got 1"):
        RECIPE.replace(graph=1)


@pytest.mark.parametrize("budget", [0, 10**9, None])
def test_device_images(budget):
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 3), dtype=np.uint8)
    pixels = DeviceImages(images, torch.device("cpu"), budget)
    assert pixels.resident == bool(budget)
    for index in ([3], [8, 0, 3], []):
        index = np.array(index, np.int64)
        assert np.array_equal(pixels[index].numpy(), images[index])


def test_mean_and_std_are_copied_to_the_device_once(monkeypatch):
    images = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    with torch.inference_mode():
        first = normalise(images, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("a copy to the device"))
    again = normalise(images, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    assert torch.equal(first, again)
    (again * torch.ones(1, requires_grad=True)).sum().backward()  # the cached tensors are no inference tensors


@gpu
@pytest.mark.parametrize("rule", [deviation(1.0), hardest(0.1, 0.1), power(3)], ids=str)
def test_recorded_loss_equals_eager_loss(rule):
    """Replayed with other features, loss and gradients are those of an eager call."""
    shapes = [(4, 64, 16, 16), (4, 96, 8, 8), (2, 7, 5, 3)]
    x, y = ([torch.randn(shape, device="cuda") for shape in shapes] for _ in "xy")
    y = [t.requires_grad_() for t in y]

    def work():
        for t in y:
            t.grad = None
        loss = hard_mined_cosine(x, y, rule)
        loss.backward()
        return loss

    for _ in range(3):
        work()
    repeat, loss = record_graph(work)
    gradients = [t.grad for t in y]
    with torch.no_grad():
        for t in (*x, *y):
            t.normal_()
    repeat()
    captured = [loss.clone(), *(g.clone() for g in gradients)]
    loss = work()
    for ours, eager in zip(captured, [loss, *(t.grad for t in y)], strict=True):
        assert torch.equal(ours, eager)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_do_not_wait_for_the_device(precision):
    """Batches from device memory, normalisation, eager and replayed steps."""
    device = torch.device("cuda")
    model, optimisers = model_and_optimisers(device)
    recipe = RECIPE.replace(precision=precision)
    pixels = DeviceImages(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), device)
    assert pixels.resident

    def one(moving, images, alpha, features=None):
        return train_step(model, moving, images, alpha, recipe)

    replay = GraphedStep(one, 4, device)

    def run_step(call, size=4):
        images = normalise(pixels[np.arange(size)], model.mean, model.std, channels_last=True)
        return call(optimisers, images, 0.5)

    for _ in range(2):
        run_step(one)
    for _ in range(WARMUP_STEPS + 1):  # records
        run_step(replay)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [run_step(one), run_step(replay), run_step(replay, 3), run_step(replay)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    assert replay.replays == 3
