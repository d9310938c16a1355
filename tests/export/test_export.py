import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from PIL import Image
from saved_model import save

from recontrast import checkpoint as checkpoints
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import digest
from recontrast.data.image_files import ImageFiles
from recontrast.export import export as module
from recontrast.export.detector_graph import DetectorGraph
from recontrast.export.export import describe_detector, export
from recontrast.export.verify import compare_scores, draw_images
from recontrast.inference import exported_detector
from recontrast.inference.detector import CheckpointDetector, open_detector
from recontrast.inference.exported_detector import ExportedDetector, OnnxProgram
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.recipe import Recipe

# A crop and a top share: every branch of the graph but the ones that are simpler.
RECIPE = Recipe(backbone="test_resnet", weights="random", size=40, crop=32, score=0.01, encoder_bn="eval")
ROOT = Path(__file__).parents[2]
KINDS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
pytestmark = [
    # Of the packages' own making: onnxscript's and openvino's imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """EXIF, alpha, 16 bits, one pixel, grey, tall and wide."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(1)

    def noise(*shape, most=256, dtype=np.uint8):
        return Image.fromarray(random.integers(0, most, shape, dtype))

    exif = Image.Exif()
    exif[0x0112] = 6
    noise(30, 70, 3).save(folder / "turned.jpg", exif=exif)
    noise(50, 45, 4).save(folder / "alpha.png")
    noise(64, 33, most=65536, dtype=np.uint16).save(folder / "deep.png")
    noise(1, 1, 3).save(folder / "point.png")
    noise(41, 41).save(folder / "grey.png")
    noise(200, 20, 3).save(folder / "tall.png")
    noise(20, 200, 3).save(folder / "wide.png")
    noise(20, 200, 3).save(folder / "wider.png")
    return folder


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    """A calibrated checkpoint; its threshold lies between the scores of the images of `photographs`."""
    path = save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)
    found = checkpoints.load(path)
    seen = np.sort(
        [
            score
            for _, some in CheckpointDetector(path, "cpu").run(ImageFiles(sorted(photographs.iterdir())), 8)
            for score in some
        ]
    )
    middle = (seen[3] + seen[4]) / 2
    scores = tuple(float(np.float32(s)) for s in np.linspace(middle - 1, middle + 1, 39))
    made = Calibration(scores, 0.5, scores[-20], None, 0.01, False, "drawn", digest(found.model, found.recipe))
    return checkpoints.write_calibration(path, made).parent


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """One export of each kind; the graph is traced once, which takes the most time."""
    folder, kept, traced = tmp_path_factory.mktemp("files"), [], module.trace
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "trace", lambda graph: kept[0] if kept else kept.append(traced(graph)) or kept[0])
    try:
        return {kind: export(run / "checkpoint.pt", kind, folder / f"d{end}") for kind, end in KINDS.items()}
    finally:
        patch.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_decisions_are_the_checkpoints(kind, files, run, photographs, tmp_path):
    made = files[kind]
    assert made.difference < 1e-4 and made.images == 8 and made.outputs == ("map", "score", "p_value", "defect")
    assert all(file.is_file() for file in made.files) and not list(made.path.parent.glob(".export-*"))
    tables = []
    for source in (run, made.path):
        out = tmp_path / source.name
        works("predict", source, photographs, "--out", out, "--no-overlays", "--maps", "npy", "--device", "cpu")
        tables.append(list(csv.DictReader((out / "scores.csv").read_text().splitlines())))
        tables[-1][0]["maps"] = {path.name: np.load(path) for path in (out / "maps").iterdir()}
    wanted, got = tables
    for name, anomaly in wanted[0].pop("maps").items():
        np.testing.assert_allclose(got[0]["maps"][name], anomaly, rtol=1e-4, atol=1e-5)
    got[0].pop("maps")
    assert len(wanted) == len(got) == 8
    for ours, theirs in zip(wanted, got, strict=True):
        assert float(theirs["score"]) == pytest.approx(float(ours["score"]), rel=1e-4)
        assert {k: v for k, v in ours.items() if k != "score"} == {k: v for k, v in theirs.items() if k != "score"}


def test_batches_of_every_length(files):
    images = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), np.uint8)
    for made in files.values():
        program = ExportedDetector(made.path).program
        whole = program(images)
        assert {name: value.shape for name, value in whole.items()} == {
            "map": (5, 32, 32), "score": (5,), "p_value": (5,), "defect": (5,),
        }  # fmt: skip
        assert whole["defect"].dtype == np.bool_
        for n in (1, 2):
            np.testing.assert_allclose(program(images[:n])["score"], whole["score"][:n], rtol=1e-5)


def test_nothing_of_ours_is_in_the_programs(files):
    program = torch.export.load(files["pt2"].path)
    assert not [node for node in program.graph.nodes if "recontrast" in str(node.target)]
    assert "recontrast::" not in str(program)
    import onnx

    graph = onnx.load(files["onnx"].path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_what_the_file_says(files, run):
    found = checkpoints.load(run / "checkpoint.pt")
    for made in files.values():
        detector = open_detector(made.path)
        assert (detector.recipe, detector.calibration, detector.category) == (RECIPE, found.calibration, "tile")
        assert detector.max_map_value == 12 and detector.description["weights"] == found.calibration.weights
        assert detector.description["preprocessing"]["crop"] == [32, 32]


@pytest.fixture(scope="module")
def predicted(run, photographs, tmp_path_factory):
    """Path -> line of `recontrast predict` with the checkpoint."""
    out = tmp_path_factory.mktemp("predicted")
    works("predict", run, photographs, "--out", out, "--no-overlays", "--device", "cpu")
    found = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert len(found) == 8 and {line["decision"] for line in found} == {"defect", "good"}
    return {line["path"]: line for line in found}


def without_torch(script, *arguments, **options):
    """What a script prints; it would fail here if it, or what it imports, brought torch or this package."""
    code = "import runpy, sys; sys.modules['torch'] = sys.modules['recontrast'] = None; del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


def test_example_runs_without_torch(files, predicted, tmp_path):
    example = ROOT / "examples/onnx_production.py"
    done = without_torch(example, files["onnx"].path, *predicted)
    assert done.returncode == 0, done.stderr
    for line, (path, wanted) in zip(done.stdout.splitlines(), predicted.items(), strict=True):
        assert line.startswith(f"{path}: score ") and line.endswith(f": {wanted['decision']}")
        assert float(line.split("score ")[1].split(",")[0]) == pytest.approx(float(wanted["score"]), rel=1e-4)
    for name, dtype, got in (("floats.tiff", np.float32, "floats"), ("wide.tiff", np.int32, "70000 to 70000")):
        Image.fromarray(np.full((9, 9), 70000, dtype)).save(tmp_path / name)
        done = without_torch(example, files["onnx"].path, tmp_path / name)
        assert done.returncode == 1 and f"{name}: wanted samples of 8 or 16 bits, got {got}" in done.stderr
        assert "Traceback" not in done.stderr


def test_what_readme_shows_gives_the_scores_of_predict(files, predicted, tmp_path):
    """The block as it stands there, beside a detector of the name that it has there."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "onnxruntime" in block]
    (tmp_path / "block.py").write_text(block)
    shutil.copy(files["onnx"].path, tmp_path / "detector.onnx")
    done = without_torch("block.py", *predicted, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line, (path, wanted) in zip(done.stdout.splitlines(), predicted.items(), strict=True):
        said = line.removeprefix(f"{path} ").split()
        assert [float(word) for word in said[:2]] == pytest.approx(
            [float(wanted["score"]), float(wanted["p_value"])], rel=1e-4
        )
        assert said[2] == str(wanted["decision"] == "defect")


# ---- the graph, without writing it down -------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "max", "crop": None, "size": (32, 64)},
        {"score": "mean", "reduce": "mean", "blur": "zero5", "activation": "gelu"},
        {"views": "trained", "partial_norm": True, "blur": None},
        {"pairs": "self", "train_encoder": False, "mining": False},
    ],
    ids=["max", "unified", "trained", "self"],
)
def test_graph_is_the_detector(changes, photographs, tmp_path):
    recipe = RECIPE.replace(**changes)
    detector = CheckpointDetector(
        save(tmp_path / "checkpoint.pt", recipe), "cpu", inference=InferenceOptions(folded=False)
    )
    graph = DetectorGraph(detector.model, recipe, None)
    files = ImageFiles(sorted(photographs.iterdir()))
    wanted = list(detector.run(files, 1))
    for place, (maps, scores) in enumerate(wanted):
        found, score = graph(torch.from_numpy(files.read(place)[None]))
        np.testing.assert_allclose(found.numpy(), maps, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(score.numpy(), scores, rtol=1e-4)


def test_decisions_at_the_threshold(run):
    found = CheckpointDetector(run / "checkpoint.pt", "cpu", inference=InferenceOptions(folded=False))
    graph = DetectorGraph(found.model, found.recipe, found.calibration)
    scores = np.array(
        [*found.calibration.scores, 0.0, 100.0, np.nextafter(np.float32(found.calibration.scores[-1]), np.float32(10))],
        np.float32,
    )
    graph.amap.score = lambda maps, how: torch.from_numpy(scores)
    _, _, p, defect = graph(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))
    np.testing.assert_allclose(p.numpy(), found.calibration.p_values(scores), rtol=1e-6)
    np.testing.assert_array_equal(defect.numpy(), found.calibration.is_defect(scores))
    graph.amap.score = lambda maps, how: torch.tensor([torch.nan])
    assert graph(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))[3].item()  # no number is no reason to pass a part


def test_bfloat16_is_left_out_of_the_calibration(run, tmp_path):
    found = checkpoints.load(run / "checkpoint.pt")
    path = checkpoints.save(tmp_path / "c.pt", replace(found, recipe=found.recipe.replace(precision="bfloat16")))
    detector = CheckpointDetector(path, "cpu", inference=InferenceOptions(folded=False))
    assert "calibration, of bfloat16 scores, was left out" in module._in_float32(detector)[0]
    assert detector.calibration is None and describe_detector(detector)["recipe"]["precision"] == "float32"


# ---- refusals ----------------------------------------------------------------


def test_scores_that_differ_are_refused_and_nothing_is_left(run, monkeypatch):
    class Off(CheckpointDetector):
        def run(self, files, batch):
            for maps, scores in super().run(files, batch):
                yield maps, scores * np.float32(1.0002)

    monkeypatch.setattr(module, "trace", lambda graph: None)
    monkeypatch.setattr(module, "_write", lambda program, graph, kind, path, about: path.write_text("draft"))
    monkeypatch.setattr(module, "ExportedDetector", lambda path: Off(run / "checkpoint.pt", "cpu"))
    before = sorted(run.iterdir())
    said = fails("export", run, "--format", "onnx", "--out", run / "new" / "d.onnx")
    assert "wanted scores within 0.0001 of the checkpoint's" in said and "nothing was written" in said
    assert sorted(run.iterdir()) == before


def test_another_checkpoints_scores_are_refused(files, tmp_path):
    torch.manual_seed(5)
    other = CheckpointDetector(save(tmp_path / "checkpoint.pt", RECIPE.replace(blur=None)), "cpu")
    with pytest.raises(ValueError, match="wanted scores within"):
        compare_scores(other, ExportedDetector(files["onnx"].path), draw_images(tmp_path / "samples", (40, 40)))


def described(path, files, **changes):
    """A copy of the ONNX file that says other things of itself; None takes them away."""
    import onnx

    model = onnx.load(files["onnx"].path)
    about = json.loads(next(prop.value for prop in model.metadata_props if prop.key == exported_detector.KEY))
    del model.metadata_props[:]
    if changes:
        onnx.helper.set_model_props(model, {exported_detector.KEY: json.dumps({**about, **changes})})
    onnx.save(model, path)
    return path


def test_files_of_other_versions_or_origins(files, photographs, tmp_path):
    def said(path, *options):
        return fails("predict", path, photographs, "--out", tmp_path / "out", *options)

    newer = described(tmp_path / "newer.onnx", files, format=2, recontrast="9.9")
    assert "wanted an exported detector of format 1, got format 2, written by recontrast 9.9" in said(newer)
    assert "got one of another origin" in said(described(tmp_path / "bare.onnx", files))
    assert "calibration: wanted the fields" in said(described(tmp_path / "odd.onnx", files, calibration={}))
    assert "got no such file" in said(tmp_path / "none.onnx")
    for suffix in KINDS.values():
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(b"PK not a program")
        assert f"wanted a whole {suffix} file" in said(path)
    assert "wanted the CPU for an exported detector, got device 'cuda'" in said(files["onnx"].path, "--device", "cuda")
    assert "wanted a checkpoint where tile" in said(files["onnx"].path, "--tile", "32")


def test_weights_of_another_export_are_refused(files, photographs, tmp_path):
    for path in files["openvino"].files:
        shutil.copy(path, tmp_path / path.name)
    weights = tmp_path / files["openvino"].path.with_suffix(".bin").name
    found = bytearray(weights.read_bytes())
    found[len(found) // 2] ^= 1
    weights.write_bytes(found)
    said = fails("predict", tmp_path / files["openvino"].path.name, photographs, "--out", tmp_path / "out")
    assert f"{weights} holds other weights than it was exported with" in said


def test_a_model_that_the_format_cannot_hold(run, monkeypatch):
    def fail(graph):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(module, "trace", fail)
    before = sorted(run.iterdir())
    said = fails("export", run, "--format", "onnx", "--out", run / "d.onnx")
    assert "wanted a model that onnx can hold, got one that it cannot: no such operator and more" in said
    assert sorted(run.iterdir()) == before


def test_an_image_named_twice_is_compared_once(files, run, photographs):
    paths = [photographs / "grey.png", photographs / "grey.png", photographs / "wide.png"]
    count, difference = compare_scores(
        CheckpointDetector(run / "checkpoint.pt", "cpu"), ExportedDetector(files["onnx"].path), paths
    )
    assert count == 2 and difference < 1e-4


def test_wrong_options(run, tmp_path, monkeypatch):
    assert "wanted onnx, pt2, openvino, got 'tflite'" in fails("export", run, "--format", "tflite")
    assert "ends in .onnx, got" in fails("export", run, "--format", "onnx", "--out", tmp_path / "d.xml")
    assert "ends in .xml, got" in fails("export", run, "--format", "openvino", "--out", tmp_path / "d.XML")
    assert "wanted a checkpoint file" in fails("export", tmp_path, "--format", "pt2")
    tiled = save(tmp_path / "tiled.pt", RECIPE.replace(tile=32, size=32, crop=None))
    assert "wanted a detector of whole images to export, got one of tiles" in fails("export", tiled, "--format", "pt2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "onnx needs onnx, onnxscript, onnxruntime: pip install 'recontrast[export]'" in fails(
        "export", run, "--format", "onnx"
    )


def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "trace", lambda graph: pytest.fail("work for nothing"))
    said = fails("export", run, "--format", "pt2", "--out", tmp_path / "file" / "d.pt2")
    assert f"--out: wanted a folder that can be written, got {tmp_path / 'file'} (not a folder)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_place_of_the_file(run, tmp_path, monkeypatch):
    (tmp_path / "d.pt2").mkdir()
    monkeypatch.setattr(module, "trace", lambda graph: None)
    monkeypatch.setattr(module, "_write", lambda program, graph, kind, path, about: path.write_text("draft"))
    monkeypatch.setattr(module, "ExportedDetector", lambda path: CheckpointDetector(run / "checkpoint.pt", "cpu"))
    monkeypatch.setattr(module, "compare_scores", lambda *options: (8, 0.0))
    assert "d.pt2" in fails("export", run, "--format", "pt2", "--out", tmp_path / "d.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["d.pt2"] and not list((tmp_path / "d.pt2").iterdir())


def test_an_image_too_large_for_the_graph(files, tmp_path):
    Image.new("RGB", (2401, 2)).save(tmp_path / "long.png")
    Image.new("RGB", (2400, 2)).save(tmp_path / "edge.png")
    result = call("predict", files["pt2"].path, tmp_path, "--out", tmp_path / "out", "--no-overlays")
    assert result.exit_code == 2 and "of at most 2400 x 2400 px" in result.stderr
    assert "1 images scored" in result.stdout


def test_runtime_that_is_not_installed(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'recontrast\[export\]'"):
        OnnxProgram(files["onnx"].path)


def test_one_view_with_its_own_decisions_or_none(run, photographs, tmp_path):
    copy = tmp_path / "run" / "checkpoint.pt"
    copy.parent.mkdir()
    copy.write_bytes((run / "checkpoint.pt").read_bytes())
    made = export(copy, "pt2", tmp_path / "none.pt2", views="trained")
    assert made.outputs == ("map", "score") and "its calibration is for scores of views both" in made.notes[0]
    options = ["--good", photographs, "--false-alarm-rate", 0.2, "--views", "trained", "--device", "cpu"]
    works("calibrate", copy.parent, *options)
    said = works("export", copy.parent, "--format", "pt2", "--views", "trained", "--out", tmp_path / "one.pt2")
    assert "outputs map, score, p_value, defect" in said
    alone, wanted = open_detector(tmp_path / "one.pt2"), checkpoints.load(copy).calibration
    assert alone.calibration == wanted and alone.recipe == RECIPE.replace(views="trained")
    pixels = np.full((1, 40, 50, 3), 90, np.uint8)
    found = alone.program(pixels)
    assert found["p_value"] == pytest.approx(wanted.p_values(found["score"]))
