"""Training, prediction and evaluation on Apple's device "mps", simulated: see `simulate_mps` for what that can show.

Nothing here ran on a Mac.
"""

import shutil

import numpy as np
import pytest
import tiny_transformers  # noqa: F401  # registers its networks
import torch
import torch.nn.functional as F
from simulate_mps import FLOAT64, MpsTensor, has_kernel, simulate_mps
from small_run import log_of, same_weights
from tiny import tiny_set

import recontrast
from recontrast import checkpoint, ops, reference
from recontrast.data.images import read_image
from recontrast.data.roi import encode_mask
from recontrast.device_limits import pool_adaptively, to_float64
from recontrast.evaluation import validation
from recontrast.evaluation.scorers import build_scorer
from recontrast.experiments.paper_tables import RD4AD
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.inside import pool_inside, score_inside
from recontrast.metrics import Streaming
from recontrast.models.patchcore import PatchCore
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import copy_to_device, resolve_device
from recontrast.runtime.distributed import join_processes
from recontrast.training.audit import audit_images
from recontrast.training.budget import plan_budget
from recontrast.training.train import train

FIELDS = {"backbone": "test_resnet", "weights": "random", "size": 32, "batch": 4, "steps": 2, "log_every": 1, "seed": 1}
TOKENS = FIELDS | {"backbone": "test_vit", "size": 64, "layers": ((1, 2), (3, 4)), "encoder_bn": "eval"}
ARCHITECTURES = {
    "recontrast": FIELDS,
    "rd4ad": FIELDS | {"architecture": "recontrast", "optimiser": "sgd", "teacher_cache": 0.01, **RD4AD},
    "uniad": FIELDS | {"encoder_bn": "eval", "levels": 2, "size": 64, "clip": 0.1, "jitter": 0.0},
    "dinomaly": TOKENS | {"optimiser": "stableadamw", "rule": "hardest", "clip": 0.1, "bottleneck_dropout": 0.0},
    "inp_former": TOKENS | {"rule": "power", "prototypes": 2},
    "patchcore": FIELDS | {"bank_share": 0.2, "bank_neighbours": 3, "score": "model"},
    "padim": FIELDS | {"gaussian_features": 8},
    "ensemble": FIELDS | {"gaussian_features": 8, "small_size": 32, "size": 64},
}
pytestmark = pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device itself")
RANDOM = ("uniad",)  # draws on the device, whose random numbers are others


@pytest.fixture
def mps():
    with simulate_mps() as simulated:
        yield simulated


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mps")
    tiny_set(folder, train=8)
    return folder


@pytest.fixture(scope="module")
def tests(data):
    return sorted((data / "nut" / "test").rglob("*.png"))


@pytest.fixture(scope="module")
def images(data):
    return np.stack([read_image(path, size=32) for path in sorted((data / "nut" / "train").rglob("*.png"))])


@pytest.fixture(scope="module")
def padim(data, tmp_path_factory):
    """The run of a PaDiM that was fitted on the CPU."""
    out = tmp_path_factory.mktemp("padim") / "run"
    recontrast.train(data, out, device="cpu", architecture="padim", **ARCHITECTURES["padim"])
    return out


def compare(own, other, paths):
    """Compare scores and maps of two detectors with the same weights."""
    for first, second in zip(own.predict(paths), other.predict(paths), strict=True):
        np.testing.assert_allclose(first.score, second.score, rtol=1e-4)
        scale = float(second.anomaly_map.max())
        np.testing.assert_allclose(first.anomaly_map, second.anomaly_map, rtol=1e-3, atol=1e-4 * scale)


# ---- the simulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda x: torch.ones(2, dtype=torch.float64).to("mps"),
        lambda x: torch.tensor([1.0], dtype=torch.float64, device="mps"),
        lambda x: torch.mul(x.long(), torch.tensor(0.5, dtype=torch.float64)),
    ],
)
def test_refuses_float64(mps, compute):
    with pytest.raises(TypeError, match=FLOAT64):
        compute(torch.ones(2, device="mps"))
    with pytest.raises(TypeError, match="complex128"):
        torch.ones(2, device="mps").to(torch.complex128)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + torch.ones(2),
        lambda x: torch.cat([x, torch.ones(2)]),
        lambda x: torch.ones(2)[x.long() - 1],
        lambda x: F.linear(x, torch.ones(3, 2)),
        lambda x: x @ torch.ones(2),
    ],
)
def test_refuses_tensors_of_two_devices(mps, compute):
    x = torch.ones(2, device="mps")
    with pytest.raises(RuntimeError, match="at least two devices, mps:0 and cpu"):
        compute(x)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3]  # as PyTorch: a number, and positions, may be on the CPU
    assert x[torch.tensor([0])].tolist() == [1] and x[torch.tensor([0])].device.type == "mps"


def test_refuses_operators_without_a_kernel(mps):
    x = torch.rand(1, 1, 4, 4, 4, device="mps")
    with pytest.raises(NotImplementedError, match="_adaptive_avg_pool3d"):
        F.adaptive_avg_pool3d(x, 3)
    assert has_kernel(torch.ops.aten.convolution.default) and not has_kernel(torch.ops.aten._pdist_forward.default)
    with torch.library._scoped_library("simulated_mps_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        assert torch.ops.simulated_mps_test.twice(torch.ones(1)) == 2
        with pytest.raises(NotImplementedError):
            torch.ops.simulated_mps_test.twice(torch.ones(1, device="mps"))


@pytest.mark.parametrize(
    "compute, error",
    [
        (lambda x: torch.ones(2).to("mps", non_blocking=True), RuntimeError),
        (lambda x: x.to("cpu", non_blocking=True), RuntimeError),
        (lambda x: torch.empty(2).copy_(x, non_blocking=True), RuntimeError),
        (lambda x: x.numpy(), TypeError),
        (lambda x: np.asarray(x), TypeError),
        (lambda x: x.pin_memory(), RuntimeError),
        (lambda x: F.adaptive_max_pool2d(x.view(1, 1, 1, 2), (1, 3)), RuntimeError),
        (lambda x: x.normal_(generator=torch.Generator()), RuntimeError),
    ],
)
def test_refuses_what_the_device_refuses(mps, compute, error):
    with pytest.raises(error):
        compute(torch.ones(2, device="mps"))


def test_keeps_the_label_of_the_device(mps):
    x = torch.arange(6.0).to("mps").requires_grad_()
    y = (x.view(2, 3).T.contiguous() * 2)[1:].sum()
    y.backward()
    assert isinstance(x.grad, MpsTensor) and str(y.device) == "mps:0" and x.grad.tolist() == [0, 2, 2, 0, 2, 2]
    assert type(x.detach().cpu()) is torch.Tensor and torch.ones(1).to(x).device == x.device
    with torch.autocast("mps", torch.bfloat16):
        assert (x.view(2, 3) @ x.view(3, 2)).dtype == torch.bfloat16


def test_random_numbers_have_their_own_state(mps):
    torch.manual_seed(0)
    first, state = torch.rand(3, device="mps"), torch.mps.get_rng_state()
    expected = torch.rand(2)
    second = torch.rand(3, device="mps")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), expected) and torch.equal(torch.rand(3, device="mps"), first)
    torch.mps.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="mps"), second)


# ---- the package -----------------------------------------------------------------------------------------------------


def test_choice_of_the_device(mps, monkeypatch):
    assert resolve_device(None).type != "mps"  # only by name: it has never run on one
    assert resolve_device("mps") == torch.device("mps")
    with pytest.raises(ValueError, match=r"one of this machine's devices \(cpu, .*mps:0\), got 'mps:1'"):
        resolve_device("mps:1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="torchrun: wanted the CPU or CUDA GPUs, got 'mps'"), join_processes("mps"):
        pass


def test_own_operators_run_their_form_in_pytorch(mps):
    for name in ops.SCHEMAS:
        assert not ops.has_kernel(name, torch.device("mps"))
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"recontrast::{name}", "MPS")
    x, y = torch.rand(2, 2, 3, 4, 4)
    assert torch.equal(ops.cosine_sums(x.to("mps"), y.to("mps")).cpu(), reference.cosine_sums(x, y))


def test_float64_and_pooling_go_to_the_cpu(mps):
    x = torch.rand(1, 1, 10, 10)
    assert to_float64(x.to("mps")).device.type == "cpu" and torch.equal(to_float64(x.to("mps")), x.double())
    for size in ((5, 2), (3, 4), (20, 15)):
        pooled = pool_adaptively(F.adaptive_max_pool2d, x.to("mps"), size)
        assert pooled.device.type == "mps" and torch.equal(pooled.cpu(), F.adaptive_max_pool2d(x, size))
    assert copy_to_device(x, torch.device("mps")).device.type == "mps"


def test_region_of_interest(mps):
    inside = torch.rand(3, 50, 50) < 0.01
    maps = torch.rand(3, 50, 50)
    assert torch.equal(pool_inside(inside.to("mps"), (8, 12)).cpu(), pool_inside(inside, (8, 12)))
    for how in ("max", "mean", 0.5):
        own = score_inside(maps.to("mps"), inside.to("mps"), how)
        torch.testing.assert_close(own.cpu(), score_inside(maps, inside, how))


def test_streaming_metrics(mps):
    maps, masks = torch.rand(4, 16, 16), torch.zeros(4, 16, 16, dtype=torch.bool)
    masks[:2, 3:7, 4:9] = True
    own, other = Streaming(1.0, device="mps", clip=True), Streaming(1.0, clip=True)
    own.update(maps.to("mps"), masks)
    other.update(maps, masks)
    assert torch.equal(own.counts, other.counts) and torch.equal(own.totals, other.totals)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_load_and_evaluate(mps, data, tests, tmp_path, name):
    """Losses are those of a run on the CPU; the saved weights give the same scores, maps and metrics there."""
    fields = {"architecture": name} | ARCHITECTURES[name]
    own = recontrast.train(data, tmp_path / "mps", device="mps", **fields)
    assert all(isinstance(tensor, MpsTensor) for tensor in own.model.state_dict().values())
    other = recontrast.load(tmp_path / "mps", device="cpu")
    compare(own, other, tests)
    if name not in RANDOM:
        recontrast.train(data, tmp_path / "cpu", device="cpu", **fields)
        first, second = ([line.get("loss") for line in log_of(tmp_path / device)] for device in ("mps", "cpu"))
        np.testing.assert_allclose(*(np.array(losses, float) for losses in (first, second)), rtol=1e-3)
    rows = [recontrast.evaluate(one, data, streaming=name == "padim").rows[0] for one in (own, other)]
    for metric in ("i_auroc", "i_ap", "p_auroc", "aupro", "aupro_per_image"):
        np.testing.assert_allclose(*(getattr(row, metric) for row in rows), atol=2e-3)


def test_calibrate_and_extend(mps, padim, data, tests, tmp_path):
    run = shutil.copytree(padim, tmp_path / "run")
    good = data / "nut" / "test" / "good"
    own = recontrast.calibrate(recontrast.load(run, device="mps"), good, false_alarm_rate=0.3)
    threshold = own.calibration.threshold
    compare(own, recontrast.load(run, device="cpu"), tests)
    other = recontrast.calibrate(recontrast.load(run, device="cpu"), good, false_alarm_rate=0.3)
    np.testing.assert_allclose(threshold, other.calibration.threshold, rtol=1e-4)
    copies = [shutil.copytree(padim, tmp_path / device) for device in ("mps", "cpu")]
    compare(*(recontrast.extend(copy, good, device=copy.name) for copy in copies), tests)


def test_extend_the_ensemble(mps, images):
    recipe = Recipe(architecture="ensemble", **ARCHITECTURES["ensemble"] | {"size": 32})
    scores = {}
    for device in ("mps", "cpu"):
        model = train(recipe, images, device=device).model
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(device) / 255
        for position in model.resume(len(images)):
            model.observe_again(pixels[position : position + 1])
        model.observe(pixels[:2].flip(2))
        distances = model.fit(0.5, seed=0)
        model.set_scales(distances, distances)
        scores[device] = model.distances(pixels)[1].cpu()
    torch.testing.assert_close(scores["mps"], scores["cpu"], rtol=1e-3, atol=1e-4)


def test_resume(mps, images, tmp_path):
    """UniAD draws dropout and noise on the device, from random numbers that the checkpoint keeps."""
    recipe = Recipe(architecture="uniad", **FIELDS | {"encoder_bn": "eval", "levels": 2})

    def interrupt(step, *_):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, images, device="mps", out=tmp_path / "run", on_log=interrupt)
    torch.rand(5, device="mps")
    resumed = train(recipe, images, device="mps", out=tmp_path / "run", resume=tmp_path / "run" / "checkpoint.pt")
    assert same_weights(resumed.model.cpu(), train(recipe, images, device="mps").model.cpu())


def test_go_on_on_the_cpu(mps, images, tmp_path):
    recipe = Recipe(**FIELDS)
    train(recipe, images, device="mps", out=tmp_path / "run", on_log=None)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state.rng["mps"].dtype == torch.uint8 and type(state.rng["mps"]) is torch.Tensor
    result = train(recipe, images, device="cpu", resume=tmp_path / "run" / "checkpoint.pt")
    assert result.losses == [] and next(result.model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("architecture", ["recontrast", "patchcore", "padim"])
def test_train_in_a_region(mps, images, architecture):
    inside = np.zeros((50, 50), bool)  # points do not divide it evenly
    inside[5:33, 8:44] = True
    fields = FIELDS | {"architecture": architecture, "score": 0.3}
    recipe = Recipe(**fields, roi=encode_mask(inside), map_size=50)
    own, other = (train(recipe, images, device=device) for device in ("mps", "cpu"))
    np.testing.assert_allclose(own.losses, other.losses, rtol=1e-3)
    maps, scores = next(infer(own.model, images, recipe, batch=8))
    # Adam turns rounding of gradients near zero into whole steps, so that trained weights are compared by their maps.
    model = own.model.cpu() if recipe.uses_steps else other.model
    expected_maps, expected_scores = next(infer(model, images, recipe, batch=8))
    torch.testing.assert_close(maps.cpu(), expected_maps, rtol=1e-3, atol=1e-4 * float(expected_maps.max()))
    torch.testing.assert_close(scores.cpu(), expected_scores, rtol=1e-4, atol=0)


def test_bfloat16(mps, images, data, tests, tmp_path):
    recipe = Recipe(**FIELDS | {"steps": 1}, precision="bfloat16")
    own, other = (train(recipe, images, device=device) for device in ("mps", "cpu"))
    np.testing.assert_allclose(own.losses, other.losses, rtol=2e-2)
    recontrast.train(data, tmp_path / "run", device="mps", **FIELDS | {"steps": 1})
    for folded in (True, False):
        options = InferenceOptions(precision="bfloat16", folded=folded)
        path = tmp_path / "run" / "checkpoint.pt"
        detectors = [CheckpointDetector(path, device, inference=options) for device in ("mps", "cpu")]
        first, second = ([one.score for one in detector.predict(tests)] for detector in detectors)
        np.testing.assert_allclose(first, second, rtol=5e-2)


def test_patchcore_as_in_its_paper(mps, images):
    """Averages channels to a number that does not divide theirs."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    model = PatchCore("test_resnet", weights="random", embedding="unfold", dimension=100).eval()
    expected = model(pixels)
    torch.testing.assert_close(model.to("mps")(pixels.to("mps")).cpu(), expected)


def test_tiles(mps, data, tests, tmp_path):
    fields = FIELDS | {"architecture": "patchcore", "size": 64, "tile": 32, "bank_share": 0.02}
    own = recontrast.train(data, tmp_path / "run", device="mps", **fields)
    compare(own, recontrast.load(tmp_path / "run", device="cpu"), tests[:2])


def test_other_users_of_the_device(mps, data, images):
    samples = recontrast.find_samples(data)
    network = PatchCore("test_resnet", weights="random")
    own, other = (audit_images(samples, network, size=32, device=device)[0] for device in ("mps", "cpu"))
    np.testing.assert_allclose([one.score for one in own], [one.score for one in other], rtol=1e-3)
    estimator = recontrast.ReContrastDetector(
        recipe=Recipe(architecture="padim", **ARCHITECTURES["padim"]), false_alarm_rate=0.4, device="mps"
    ).fit(images)
    assert estimator.score_samples(images).dtype == np.float64
    paths = [sample.path for sample in samples if sample.split == "train"]
    recipe = Recipe(architecture="patchcore", **ARCHITECTURES["patchcore"])
    assert plan_budget(recipe, ["architecture"], paths, 0, 60, torch.device("mps")).recipe.architecture == "patchcore"


def test_threshold_of_good_images(mps, padim, data, monkeypatch):
    """Mean and deviation of the pixels in float64."""
    samples = [sample for sample in recontrast.find_samples(data) if sample.split == "test"]
    folder = data / "nut" / "validation"
    if not folder.exists():
        shutil.copytree(data / "nut" / "train", folder)
    monkeypatch.setattr(validation, "find_prepared", lambda sample: (None, data / "nut"))
    values = []
    for device in ("mps", "cpu"):
        detector = recontrast.load(padim, device=device)
        scorer = build_scorer(detector.model, detector.recipe, None)
        values.append(validation.choose_threshold(scorer, samples, detector.recipe, 3, 1, keep_errors=False)[0])
    np.testing.assert_allclose(*values, rtol=1e-5)
