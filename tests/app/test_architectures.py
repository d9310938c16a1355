"""Every architecture through every command: the same commands, files and decisions for all of them."""

import json
import math

import numpy as np
import pytest
import torch

from recontrast import checkpoint as checkpoints
from recontrast.inference.detector import CheckpointDetector, open_detector
from recontrast.models.dinomaly import Dinomaly
from recontrast.models.ensemble import Ensemble
from recontrast.models.inp_former import INPFormer
from recontrast.models.padim import PaDiM
from recontrast.models.patchcore import PatchCore
from recontrast.models.recontrast import ReContrast
from recontrast.models.uniad import UniAD
from recontrast.runtime import memory
from recontrast.training import one_pass
from tests.command_line import call, fails, works
from tests.tiny import tiny_set
from tests.traced_once import traced_once

CLASSES = {"patchcore": PatchCore, "padim": PaDiM, "uniad": UniAD, "ensemble": Ensemble, "recontrast": ReContrast,
           "dinomaly": Dinomaly, "inp_former": INPFormer}  # fmt: skip
STEPPED = ("uniad", "recontrast", "dinomaly", "inp_former")  # trained by steps
TRANSFORMERS = ("dinomaly", "inp_former")
OPTIONS = {
    "patchcore": ("bank_share=0.05", "bank_neighbours=3", "score=model"),
    "padim": ("gaussian_features=9", "score=model"),
    "ensemble": ("bank_share=0.05", "gaussian_features=9", "small_size=32", "score=model"),
    "uniad": ("score=model", "decoder_lr=1e-4", "schedule=linear", "clip=0.1"),
    "recontrast": ("rule=hardest", "factor=0.1", "levels=2", "decoder=mirror", "clip=1", "warmup=0.2",
                   "schedule=cosine", "optimiser=sgd"),
    "dinomaly": ("rule=hardest", "factor=0.1", "optimiser=stableadamw", "amsgrad=true", "schedule=cosine_from_zero",
                 "warmup=0.5", "lr_end=0.1", "clip=0.1", "bottleneck_dropout=0.1", "recentre=true", "score=0.01",
                 "reduce=mean"),
    "inp_former": ("rule=power", "optimiser=stableadamw", "clip=0.1", "prototypes=3", "coherence=0.1", "score=0.01",
                   "map_size=[40,56]", "mask_rule=half"),
}  # fmt: skip
SMALL = ("--backbone", "test_resnet", "--weights", "random", "--size", "64", "--batch", "3", "--device", "cpu",
         "--steps", "2", "--set", "channels_last=false")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=23)
    return root


@pytest.fixture(scope="module", params=CLASSES)
def run(request, data, tmp_path_factory):
    """A trained detector of each architecture: its name, its folder and what the command printed."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = [part for change in OPTIONS[request.param] for part in ("--set", change)]
    backbone = ("--backbone", "test_vit") if request.param in TRANSFORMERS else ()
    options = ("--architecture", request.param, *SMALL, *backbone, *changes, "--holdout", 0.4)
    printed = works("train", data, *options, "--out", folder)
    return request.param, folder, printed


def test_training_says_what_it_did(run):
    name, folder, printed = run
    assert ("2 steps in" if name in STEPPED else "one pass over 14 images in") in printed
    saved = checkpoints.load(folder / "checkpoint.pt")
    assert saved.recipe.architecture == name and saved.step == (2 if name in STEPPED else 5)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == saved.step and ("loss" in last) == saved.recipe.uses_steps


def test_checkpoint_holds_the_network(run):
    name, folder, _ = run
    detector = CheckpointDetector(folder / "checkpoint.pt", "cpu")
    assert isinstance(detector.model.model, CLASSES[name]) and detector.calibration is not None
    assert 0 < detector.max_map_value < math.inf


def test_score_is_that_of_the_recipe(run, data):
    name, folder, _ = run
    predictions = list(open_detector(folder / "checkpoint.pt", "cpu").predict(data / "nut" / "test"))
    maps = [prediction.anomaly_map.max() for prediction in predictions]
    scores = [prediction.score for prediction in predictions]
    if name == "recontrast":  # the maximum of the map
        np.testing.assert_allclose(scores, maps, rtol=1e-6)
    else:
        assert not np.allclose(scores, maps, rtol=1e-3)


def test_predict_evaluate_and_report(run, data, tmp_path):
    _, folder, _ = run
    works("predict", folder, data / "nut" / "test", "--out", tmp_path / "p", "--maps", "tiff16", "--device", "cpu")
    rows = (tmp_path / "p" / "scores.csv").read_text().splitlines()
    assert len(rows) == 7 and "undecided" not in "".join(rows)
    works("evaluate", folder, data, "--out", tmp_path / "e", "--streaming", "--save-maps", "--device", "cpu")
    (row,) = [r for r in json.loads((tmp_path / "e" / "results.json").read_text())["rows"] if r["category"] == "nut"]
    assert row["images"] == 6 and row["i_auroc"] is not None
    works("report", folder, data, "--out", tmp_path / "r.html", "--device", "cpu")


def test_calibrate_replaces_the_threshold(run, data):
    _, folder, _ = run
    before = checkpoints.load(folder / "checkpoint.pt").calibration
    works("calibrate", folder, "--good", data / "nut" / "test" / "good", "--false-alarm-rate", 0.25, "--device", "cpu")
    assert checkpoints.load(folder / "checkpoint.pt").calibration != before


def test_resuming_a_finished_run_changes_nothing(run, data):
    _, folder, _ = run
    before = checkpoints.load(folder / "checkpoint.pt").model
    works("train", data, "--resume", folder, "--device", "cpu")
    after = checkpoints.load(folder / "checkpoint.pt").model
    assert all(torch.equal(value, after[key]) for key, value in before.items()) and before.keys() == after.keys()


def test_exported_files_give_the_same_scores(run, data, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, folder, _ = run
    wanted = open_detector(folder / "checkpoint.pt", "cpu").predict(data / "nut" / "test")
    with traced_once():
        for suffix in (".onnx", ".pt2"):
            works("export", folder, "--format", suffix[1:], "--out", tmp_path / f"detector{suffix}")
            got = open_detector(tmp_path / f"detector{suffix}").predict(data / "nut" / "test")
            np.testing.assert_allclose([p.score for p in got], [p.score for p in wanted], rtol=1e-3)
            for exported, prediction in zip(got, wanted, strict=True):
                np.testing.assert_allclose(exported.anomaly_map, prediction.anomaly_map, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["patchcore", "uniad", "dinomaly"])
def test_tiles(name, data, tmp_path):
    changes = [part for change in OPTIONS[name] for part in ("--set", change)]
    options = [option for option in SMALL if option not in ("--size", "64")]
    options += ["--backbone", "test_vit"] if name in TRANSFORMERS else []
    works("train", data, "--architecture", name, "--tile", 32, *options, *changes, "--holdout", 0, "--out", tmp_path)
    works("predict", tmp_path, data / "nut" / "test", "--out", tmp_path / "p", "--device", "cpu")
    detector = open_detector(tmp_path / "checkpoint.pt", "cpu")
    (prediction,) = detector.predict(next((data / "nut" / "test" / "good").iterdir()))
    assert np.isfinite(prediction.score) and np.isfinite(prediction.anomaly_map).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--architecture", "yolo"), "'inp_former', or an architecture of your own as 'MODULE:NAME', got 'yolo'"),
        (("--architecture", "dinomaly"), "Dinomaly: backbone: wanted a vision transformer, got 'test_resnet'"),
        (("--architecture", "dinomaly", "--backbone", "test_vit", "--size", "72"), "--size: wanted a multiple of 16"),
        (("--architecture", "inp_former", "--set", "score=model"), "score: wanted 'max', 'mean' or a share for"),
        (("--architecture", "dinomaly", "--set", "prototypes=3"), "prototypes: wanted the default for architecture"),
        (("--set", "optimiser=stableadamw", "--set", "graph=true"), "graph: wanted false if optimiser is"),
        (("--architecture", "patchcore", "--set", "rule=power"), "rule: wanted the default for architecture"),
        (("--set", "bank_share=0.2"), "bank_share: wanted the default for architecture 'recontrast'"),
        (("--set", "rule=softest"), "rule: wanted one of 'deviation', 'hardest', 'power', 'none', got 'softest'"),
        (("--set", "rule=power", "--set", "mining=false"), "rule: wanted 'deviation' or 'none' if mining is false"),
        (("--architecture", "padim", "--tile", "32"), "tile: wanted none for architecture 'padim'"),
        (("--architecture", "padim", "--set", "gaussian_features=999999"), "PaDiM: features: wanted 1 to"),
        (("--architecture", "patchcore", "--set", "views=frozen"), "views: wanted 'both' for architecture 'patchcore'"),
        (("--architecture", "uniad", "--size", "72"), "--size: wanted a multiple of"),
        (("--set", "score=model"), "score: wanted 'max', 'mean' or a share for architecture 'recontrast'"),
        (("--architecture", "ensemble", "--set", "small_size=96"), "small_size: wanted at most the size of the images"),
        (("--architecture", "ensemble", "--set", "small_size=20"), "Ensemble: images: wanted height and width of"),
        (("--set", "clip=0"), "clip: wanted none or a number above 0, got 0"),
        (("--set", "levels=[2,3]"), "levels: wanted one number for architecture 'recontrast'"),
    ],
)  # fmt: skip
def test_bad_input(options, message, data, tmp_path):
    assert message in fails("train", data, *SMALL, "--holdout", 0, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_views_of_a_network_with_one_encoder_are_refused(run, data, tmp_path):
    name, folder, _ = run
    if name != "recontrast":
        result = call("predict", folder, data / "nut" / "test", "--views", "frozen", "--out", tmp_path / "p")
        assert result.exit_code == 2 and f"views: wanted 'both' for architecture '{name}'" in result.stderr


def test_cached_features_of_a_frozen_encoder_change_nothing(data, tmp_path):
    """RD4AD and UniAD: the encoder is frozen, and its features can be cached."""
    for changes in (["--set", "pairs=self", "--set", "train_encoder=false", "--set", "mining=false"],
                    ["--architecture", "uniad"]):  # fmt: skip
        weights = []
        for number, cache in enumerate((0, 0.5)):
            out = tmp_path / f"{len(changes)}-{number}"
            works("train", data, *SMALL, "--steps", 12, *changes, "--holdout", 0, "--no-evaluate", "--out", out,
                  "--teacher-cache", cache)  # fmt: skip
            weights.append(checkpoints.load(out / "checkpoint.pt").model)
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


def test_memory_is_checked_before_a_pass(data, tmp_path, monkeypatch):
    """A bank that is too large is refused with the figure; features that do not fit are drawn at random."""
    monkeypatch.setattr(one_pass, "measure_available_memory", lambda device: 1000)
    options = (*SMALL, "--holdout", 0, "--no-evaluate", "--out", tmp_path, "--set")
    refusal = fails("train", data, "--architecture", "patchcore", *options, "bank_share=0.1")
    assert "PatchCore: bank_share: wanted a bank that fits into 0.0 MB of available memory, got one that" in refusal
    refusal = fails("train", data, "--architecture", "padim", *options, "gaussian_features=9")
    assert "PaDiM: gaussian_features: wanted moments that fit into 0.0 MB of available memory" in refusal
    assert not (tmp_path / "checkpoint.pt").exists()
    monkeypatch.setattr(one_pass, "measure_available_memory", lambda device: 1_000_000)
    result = call("train", data, "--architecture", "patchcore", *options, "bank_share=0.1")
    warnings = [line for line in result.stderr.splitlines() if "random share" in line]
    assert result.exit_code == 0 and len(warnings) == 1 and warnings[0].startswith("recontrast: warning: patchcore: ")
    assert len(checkpoints.load(tmp_path / "checkpoint.pt").model["bank"]) == int(0.1 * 23 * 64)


def test_available_memory_is_that_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMORY_INFORMATION", tmp_path / "meminfo")
    assert memory.measure_available_memory(torch.device("cpu")) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert memory.measure_available_memory(torch.device("cpu")) == 5120
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert memory.measure_available_memory(torch.device("cpu")) == 5120
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 300\n")
    assert memory.measure_available_memory(torch.device("cpu")) == 800
