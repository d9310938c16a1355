import copy
import json

import numpy as np
import pytest
import torch
from tiny import tiny_set
from typer.testing import CliRunner

from recontrast import ReContrast
from recontrast.app.cli import app
from recontrast.calibration.conformal import calibrate_maps
from recontrast.checkpoint import Checkpoint, digest, save
from recontrast.inference.detector import CheckpointDetector, open_detector
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.models.fold import FoldedModel
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import is_bfloat16_fast

RECIPE = Recipe(name="tiny", backbone="resnet18", weights="random", size=64, batch=4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ReContrast("resnet18", weights="random", levels=1).eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    maps = np.full((20, 64, 64), 0.5, np.float32)
    weights = model.state_dict()
    calibration = calibrate_maps(
        [(maps, np.linspace(0, 1, 20))], 20, rate=0.1, pixel_rate=0.1, source="", weights=digest(weights, RECIPE)
    )
    preprocessing = {"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    return save(file, Checkpoint(
        1, "nut", RECIPE, model.config, preprocessing, {"count": 1, "digest": ""}, weights, calibration=calibration
    ))  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=1, good=2, defects=2)
    return root / "nut" / "test"


def scores_of(network, images, recipe):
    ((maps, scores),) = infer(network, images, recipe)
    return maps, scores


@pytest.mark.parametrize("views", ["both", "trained", "frozen"])
def test_folding_does_not_change_scores(model, images, views):
    options = InferenceOptions(views=views)
    recipe = options.apply_to(RECIPE)
    network = options.build_network(model, recipe, RECIPE)
    assert isinstance(network, FoldedModel) and network.norms_left == 0
    for folded, original in zip(scores_of(network, images, recipe), scores_of(model, images, recipe), strict=True):
        torch.testing.assert_close(folded, original, rtol=1e-5, atol=1e-6)
    assert InferenceOptions(folded=False).build_network(model, recipe, RECIPE) is model


def test_folded_bfloat16_weights_are_stored_in_bfloat16(model, images):
    options = InferenceOptions(precision="bfloat16")
    recipe = options.apply_to(RECIPE)
    network = options.build_network(model, recipe, RECIPE)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    maps, scores = scores_of(network, images[:1], recipe)
    exact, _ = scores_of(model, images[:1], RECIPE)
    assert maps.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(maps, exact, rtol=0.1, atol=0.05)


def test_bfloat16_without_folding_converts_the_convolutions_once(model, images):
    options = InferenceOptions(precision="bfloat16", folded=False)
    recipe = options.apply_to(RECIPE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    network = options.build_network(model, recipe, RECIPE)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    assert {m.weight.dtype for m in convolutions} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16, torch.float32}
    plain = options.build_network(model, recipe, RECIPE)
    fused = options.build_network(model, recipe.replace(fused_norm=True), RECIPE, keep=True)
    for cast, original in zip(scores_of(plain, images, recipe), scores_of(model, images, recipe), strict=True):
        assert torch.equal(cast, original)  # as autocast converts them
    for cast, original in zip(scores_of(fused, images, recipe), scores_of(model, images, recipe), strict=True):
        torch.testing.assert_close(cast, original, rtol=0.02, atol=0.01)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    consumed = copy.deepcopy(model)
    assert options.build_network(consumed, recipe, RECIPE, keep=False) is consumed


@pytest.mark.parametrize("last", [True, False])
def test_memory_layout_follows_the_options(model, last):
    options = InferenceOptions(channels_last=last)
    network = options.build_network(model, options.apply_to(RECIPE), RECIPE)
    kernel = network.model.bottleneck.fuse[0].body[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_compiling_does_not_change_scores(model, images, monkeypatch):
    monkeypatch.setattr("recontrast.inference.options.COMPILE", {"backend": "eager"})
    network = InferenceOptions(compiled=True).build_network(model, RECIPE, RECIPE)
    assert network.model._compiled_call_impl is not None
    torch.testing.assert_close(scores_of(network, images, RECIPE), scores_of(model, images, RECIPE))
    torch._dynamo.reset()


def test_options_with_the_same_scores():
    assert InferenceOptions(channels_last=False, folded=False, compiled=True).has_same_scores(RECIPE)
    assert InferenceOptions(views="both", precision="float32").has_same_scores(RECIPE)
    assert not InferenceOptions(views="trained").has_same_scores(RECIPE)
    assert not InferenceOptions(precision="bfloat16").has_same_scores(RECIPE)
    low = RECIPE.replace(precision="bfloat16")  # folding would change its scores, so it is off by default
    assert InferenceOptions().has_same_scores(low) and InferenceOptions(precision="bfloat16").has_same_scores(low)
    assert not InferenceOptions().folds_batchnorm(low) and not InferenceOptions(folded=True).has_same_scores(low)
    assert InferenceOptions(precision="bfloat16").folds_batchnorm(RECIPE) and InferenceOptions(
        precision="float32"
    ).folds_batchnorm(low)
    with pytest.raises(ValueError, match="views: wanted 'both' if pairs is 'self'"):
        InferenceOptions(views="frozen").apply_to(RECIPE.replace(pairs="self", train_encoder=False, mining=False))


def test_checkpoint_is_run_with_the_options(checkpoint, model):
    detector = CheckpointDetector(checkpoint, "cpu")
    assert isinstance(detector.model, FoldedModel) and detector.recipe == RECIPE and detector.max_map_value == 4
    assert detector.calibration is not None
    detector = open_detector(checkpoint, "cpu", inference=InferenceOptions(views="trained", folded=False))
    assert isinstance(detector.model, ReContrast) and detector.recipe.views == "trained" and detector.max_map_value == 2
    assert detector.calibration is None  # the calibration is for scores of both views


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def table(out):
    return [(row["path"], row["score"]) for row in json.loads((out / "scores.json").read_text())["images"]]


def test_predict_with_options(checkpoint, data, tmp_path):
    common = ("predict", checkpoint, data, "--no-overlays", "--device", "cpu", "--workers", 1)
    assert run(*common, "--out", tmp_path / "folded").exit_code == 0
    plain = run(*common, "--out", tmp_path / "plain", "--no-fold", "--layout", "nchw")
    assert plain.exit_code == 0 and "called defects" in plain.output
    trained = run(*common, "--out", tmp_path / "trained", "--views", "trained")
    assert trained.exit_code == 0 and "called defects" not in trained.output
    folded, plain, trained = (table(tmp_path / name) for name in ("folded", "plain", "trained"))
    assert [path for path, _ in folded] == [path for path, _ in plain]
    np.testing.assert_allclose([s for _, s in folded], [s for _, s in plain], rtol=1e-5)
    assert all(a < b for (_, a), (_, b) in zip(trained, plain, strict=True))
    refused = run(*common, "--out", tmp_path / "none", "--views", "trained", "--decide")
    assert refused.exit_code == 2 and "calibrat" in refused.output and not (tmp_path / "none").exists()


def test_evaluate_with_options(checkpoint, data, tmp_path):
    common = ("evaluate", checkpoint, data.parent, "--device", "cpu", "--workers", 2)
    for name, options in {"folded": (), "plain": ("--no-fold",), "frozen": ("--views", "frozen")}.items():
        result = run(*common, "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert ("promised false-alarm rate" in result.output) == (name != "frozen")
    folded, plain, frozen = (
        np.array([float(line.rpartition(",")[2]) for line in (tmp_path / n / "scores.csv").read_text().split()[1:]])
        for n in ("folded", "plain", "frozen")
    )
    np.testing.assert_allclose(folded, plain, rtol=1e-5)
    assert (frozen < plain).all()


def test_compiling_without_a_compiler_is_refused(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ("predict", checkpoint, data, "--out", tmp_path / "out", "--compile", "--device", "cpu")
    result = run(*arguments)
    assert result.exit_code == 2 and "wanted a C++ compiler for the CPU, got no no-such-compiler" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--views", "left"), "--views: wanted both, trained or frozen, got 'left'"),
        (("--precision", "half"), "--precision: wanted float32 or bfloat16, got 'half'"),
        (("--layout", "last"), "--layout: wanted channels_last or nchw, got 'last'"),
        (("--workers", 0), "--workers: wanted at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_unknown_option_values_are_refused(checkpoint, data, tmp_path, command, arguments, message):
    result = run(command, checkpoint, data.parent, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "out").exists()


def test_model_with_one_target_has_no_views(model, data, tmp_path):
    single_target = ReContrast("resnet18", weights="random", levels=1, pairs="self", train_encoder=False)
    recipe = RECIPE.replace(pairs="self", train_encoder=False)
    preprocessing = {"size": [64, 64], "crop": None, "mean": list(single_target.mean), "std": list(single_target.std)}
    weights = single_target.state_dict()
    file = save(tmp_path / "one.pt", Checkpoint(
        1, "nut", recipe, single_target.config, preprocessing, {"count": 1, "digest": ""}, weights
    ))  # fmt: skip
    for command in ("predict", "evaluate"):
        result = run(command, file, data.parent, "--out", tmp_path / "out", "--views", "trained", "--device", "cpu")
        assert result.exit_code == 2 and "which has one target, got 'trained'" in result.output, result.output


def test_bfloat16_without_fast_kernels_is_reported(checkpoint, data, tmp_path, monkeypatch):
    assert isinstance(is_bfloat16_fast(torch.device("cpu")), bool) and is_bfloat16_fast(torch.device("cuda"))
    monkeypatch.setattr("recontrast.runtime.device.is_bfloat16_fast", lambda device: False)
    arguments = (
        "predict",
        checkpoint,
        data / "good" / "000.png",
        "--no-overlays",
        "--precision",
        "bfloat16",
        "--device",
        "cpu",
    )
    result = run(*arguments, "--out", tmp_path)
    assert result.exit_code == 0 and "no kernels for bfloat16" in result.output
    monkeypatch.setattr("recontrast.runtime.device.is_bfloat16_fast", lambda device: True)
    assert "no kernels" not in run(*arguments, "--out", tmp_path).output
