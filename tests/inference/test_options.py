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
from recontrast.inference import options
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
    calibration = calibrate_maps(
        [(maps, np.linspace(0, 1, 20))],
        20,
        rate=0.1,
        pixel_rate=0.1,
        source="",
        weights=digest(model.state_dict(), RECIPE),
    )
    about = {"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    return save(file, Checkpoint(
        1, "nut", RECIPE, model.config, about, {"count": 1, "digest": ""}, model.state_dict(), calibration=calibration,
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
def test_folded_scores_are_those_of_the_model(model, images, views):
    asked = InferenceOptions(views=views)
    recipe = asked.apply_to(RECIPE)
    network = asked.build_network(model, recipe, RECIPE)
    assert isinstance(network, FoldedModel) and network.norms_left == 0
    for ours, theirs in zip(scores_of(network, images, recipe), scores_of(model, images, recipe), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert InferenceOptions(folded=False).build_network(model, recipe, RECIPE) is model


def test_bfloat16_weights_are_rounded_once(model, images):
    asked = InferenceOptions(precision="bfloat16")
    recipe = asked.apply_to(RECIPE)
    network = asked.build_network(model, recipe, RECIPE)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    maps, scores = scores_of(network, images[:1], recipe)
    exact, _ = scores_of(model, images[:1], RECIPE)
    assert maps.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(maps, exact, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("last", [True, False])
def test_layout_is_as_asked(model, last):
    asked = InferenceOptions(channels_last=last)
    network = asked.build_network(model, asked.apply_to(RECIPE), RECIPE)
    kernel = network.model.bottleneck.fuse[0].body[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_a_compiled_network_gives_the_same(model, images, monkeypatch):
    monkeypatch.setattr(options, "COMPILE", {"backend": "eager"})
    network = InferenceOptions(compiled=True).build_network(model, RECIPE, RECIPE)
    assert network._compiled_call_impl is not None
    torch.testing.assert_close(scores_of(network, images, RECIPE), scores_of(model, images, RECIPE))
    torch._dynamo.reset()


def test_scores_alike():
    assert InferenceOptions(channels_last=False, folded=False, compiled=True).has_same_scores(RECIPE)
    assert InferenceOptions(views="both", precision="float32").has_same_scores(RECIPE)
    assert not InferenceOptions(views="trained").has_same_scores(RECIPE)
    assert not InferenceOptions(precision="bfloat16").has_same_scores(RECIPE)
    low = RECIPE.replace(precision="bfloat16")  # folding would move its scores: it is not folded unless asked
    assert InferenceOptions().has_same_scores(low) and InferenceOptions(precision="bfloat16").has_same_scores(low)
    assert not InferenceOptions().folds_batchnorm(low) and not InferenceOptions(folded=True).has_same_scores(low)
    assert InferenceOptions(precision="bfloat16").folds_batchnorm(RECIPE) and InferenceOptions(
        precision="float32"
    ).folds_batchnorm(low)
    with pytest.raises(ValueError, match="views must be 'both' if pairs is 'self'"):
        InferenceOptions(views="frozen").apply_to(RECIPE.replace(pairs="self", train_encoder=False, mining=False))


def test_a_checkpoint_is_run_as_asked(checkpoint, model):
    detector = CheckpointDetector(checkpoint, "cpu")
    assert isinstance(detector.model, FoldedModel) and detector.recipe == RECIPE and detector.max_map_value == 4
    assert detector.calibration is not None
    detector = open_detector(checkpoint, "cpu", inference=InferenceOptions(views="trained", folded=False))
    assert isinstance(detector.model, ReContrast) and detector.recipe.views == "trained" and detector.max_map_value == 2
    assert detector.calibration is None  # of scores of both views


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def table(out):
    return [(row["path"], row["score"]) for row in json.loads((out / "scores.json").read_text())["images"]]


def test_predict_as_asked(checkpoint, data, tmp_path):
    common = ("predict", checkpoint, data, "--no-overlays", "--device", "cpu", "--workers", 1)
    assert run(*common, "--out", tmp_path / "folded").exit_code == 0
    plain = run(*common, "--out", tmp_path / "plain", "--no-fold", "--layout", "nchw")
    assert plain.exit_code == 0 and "called defects" in plain.output
    alone = run(*common, "--out", tmp_path / "trained", "--views", "trained")
    assert alone.exit_code == 0 and "called defects" not in alone.output
    folded, plain, alone = (table(tmp_path / name) for name in ("folded", "plain", "trained"))
    assert [path for path, _ in folded] == [path for path, _ in plain]
    np.testing.assert_allclose([s for _, s in folded], [s for _, s in plain], rtol=1e-5)
    assert all(a < b for (_, a), (_, b) in zip(alone, plain, strict=True))
    refused = run(*common, "--out", tmp_path / "none", "--views", "trained", "--decide")
    assert refused.exit_code == 2 and "calibrat" in refused.output and not (tmp_path / "none").exists()


def test_evaluate_as_asked(checkpoint, data, tmp_path):
    common = ("evaluate", checkpoint, data.parent, "--device", "cpu", "--workers", 2)
    for name, more in {"folded": (), "plain": ("--no-fold",), "frozen": ("--views", "frozen")}.items():
        done = run(*common, "--out", tmp_path / name, *more)
        assert done.exit_code == 0, done.output
        assert ("promised false-alarm rate" in done.output) == (name != "frozen")
    folded, plain, frozen = (
        np.array([float(line.rpartition(",")[2]) for line in (tmp_path / n / "scores.csv").read_text().split()[1:]])
        for n in ("folded", "plain", "frozen")
    )
    np.testing.assert_allclose(folded, plain, rtol=1e-5)
    assert (frozen < plain).all()


def test_compile_without_a_compiler(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ("predict", checkpoint, data, "--out", tmp_path / "out", "--compile", "--device", "cpu")
    done = run(*words)
    assert done.exit_code == 2 and "wanted a C++ compiler for the CPU, got no no-such-compiler" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--views", "left"), "--views: wanted both, trained or frozen, got 'left'"),
        (("--precision", "half"), "--precision: wanted float32 or bfloat16, got 'half'"),
        (("--layout", "last"), "--layout: wanted channels_last or nchw, got 'last'"),
        (("--workers", 0), "--workers: wanted at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_words_that_are_none(checkpoint, data, tmp_path, command, words, sentence):
    done = run(command, checkpoint, data.parent, "--out", tmp_path / "out", *words)
    assert done.exit_code == 2 and sentence in done.output and not (tmp_path / "out").exists()


def test_one_target_has_no_other_view(model, data, tmp_path):
    alone = ReContrast("resnet18", weights="random", levels=1, pairs="self", train_encoder=False)
    recipe = RECIPE.replace(pairs="self", train_encoder=False)
    about = {"size": [64, 64], "crop": None, "mean": list(alone.mean), "std": list(alone.std)}
    file = save(tmp_path / "one.pt", Checkpoint(
        1, "nut", recipe, alone.config, about, {"count": 1, "digest": ""}, alone.state_dict()))  # fmt: skip
    for command in ("predict", "evaluate"):
        done = run(command, file, data.parent, "--out", tmp_path / "out", "--views", "trained", "--device", "cpu")
        assert done.exit_code == 2 and "which has one target, got 'trained'" in done.output, done.output


def test_bfloat16_where_it_does_not_pay(checkpoint, data, tmp_path, monkeypatch):
    assert isinstance(is_bfloat16_fast(torch.device("cpu")), bool) and is_bfloat16_fast(torch.device("cuda"))
    monkeypatch.setattr("recontrast.runtime.device.is_bfloat16_fast", lambda device: False)
    words = (
        "predict",
        checkpoint,
        data / "good" / "000.png",
        "--no-overlays",
        "--precision",
        "bfloat16",
        "--device",
        "cpu",
    )
    done = run(*words, "--out", tmp_path)
    assert done.exit_code == 0 and "no kernels for bfloat16" in done.output
    monkeypatch.setattr("recontrast.runtime.device.is_bfloat16_fast", lambda device: True)
    assert "no kernels" not in run(*words, "--out", tmp_path).output
