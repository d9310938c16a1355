import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from PIL import Image
from saved_model import save
from tensorrt_operators import check_supported
from tiny import tiny_set
from traced_once import traced_once

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import digest
from recontrast.data.image_files import ImageFiles
from recontrast.export import export as exporting
from recontrast.export.describe import describe_detector
from recontrast.export.detector_graph import DetectorGraph
from recontrast.export.export import export
from recontrast.export.verify import compare_scores, draw_images
from recontrast.inference import file_checks
from recontrast.inference.detector import CheckpointDetector, open_detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.options import InferenceOptions
from recontrast.inference.programs import OnnxProgram
from recontrast.recipes.recipe import Recipe

# A crop and a score from the largest values: the branches of the graph with the most operators.
RECIPE = Recipe(backbone="test_resnet", weights="random", size=40, crop=32, score=0.01, encoder_bn="eval")
ROOT = Path(__file__).parents[2]
KINDS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
pytestmark = [
    # Raised by the imports of onnxscript and openvino.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of images with EXIF orientation, alpha, 16 bits, one pixel, grey, tall and wide."""
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
    """Folder of a calibrated checkpoint; its threshold lies between the scores of the images of `photographs`."""
    path = save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)
    stored = checkpoints.load(path)
    batches = CheckpointDetector(path, "cpu").run(ImageFiles(sorted(photographs.iterdir())), 8)
    measured = np.sort(np.concatenate([scores for _, scores in batches]))
    middle = (measured[3] + measured[4]) / 2
    scores = tuple(float(np.float32(s)) for s in np.linspace(middle - 1, middle + 1, 39))
    calibration = Calibration(scores, 0.5, scores[-20], None, 0.01, False, "drawn", digest(stored.model, stored.recipe))
    return checkpoints.write_calibration(path, calibration).parent


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """Result of one export for each format."""
    folder = tmp_path_factory.mktemp("files")
    with traced_once():
        return {kind: export(run / "checkpoint.pt", kind, folder / f"d{end}") for kind, end in KINDS.items()}


def read_predictions(source, photographs, out):
    """Rows of scores.csv that ``recontrast predict`` writes, and the maps by name."""
    works("predict", source, photographs, "--out", out, "--no-overlays", "--maps", "npy", "--device", "cpu")
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert len(rows) == 8
    return rows, {path.name: np.load(path) for path in (out / "maps").iterdir()}


@pytest.fixture(scope="module")
def wanted(run, photographs, tmp_path_factory):
    """What ``recontrast predict`` writes with the checkpoint: rows of scores.csv, and the maps by name."""
    rows, maps = read_predictions(run, photographs, tmp_path_factory.mktemp("wanted"))
    assert {row["decision"] for row in rows} == {"defect", "good"}
    return rows, maps


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_decisions_equal_those_of_the_checkpoint(kind, files, wanted, photographs, tmp_path):
    result = files[kind]
    assert result.difference < 1e-4 and result.images == 8 and result.outputs == ("map", "score", "p_value", "defect")
    assert all(file.is_file() for file in result.files) and not list(result.path.parent.glob(".export-*"))
    rows, maps = read_predictions(result.path, photographs, tmp_path)
    assert maps.keys() == wanted[1].keys()
    for name, anomaly in wanted[1].items():
        np.testing.assert_allclose(maps[name], anomaly, rtol=1e-4, atol=1e-5)
    for row, exported_row in zip(wanted[0], rows, strict=True):
        assert float(exported_row["score"]) == pytest.approx(float(row["score"]), rel=1e-4)
        assert {k: v for k, v in row.items() if k != "score"} == {k: v for k, v in exported_row.items() if k != "score"}


def test_evaluation_equals_that_of_the_checkpoint(files, run, tmp_path):
    tiny_set(tmp_path / "data")
    results = [recontrast.evaluate(path, tmp_path / "data", device="cpu", batch=4)
               for path in (run, *(result.path for result in files.values()))]  # fmt: skip
    for result in results[1:]:
        for name, value in asdict(results[0].mean).items():
            if isinstance(value, float):
                assert getattr(result.mean, name) == pytest.approx(value, abs=1e-4), name
        scores, wanted = ([image.score for image in item.scored] for item in (result, results[0]))
        assert scores == pytest.approx(wanted, rel=1e-4)


def test_batch_size_does_not_change_scores(files):
    images = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), np.uint8)
    for result in files.values():
        program = ExportedDetector(result.path).program
        whole = program(images)
        assert {name: value.shape for name, value in whole.items()} == {
            "map": (5, 32, 32), "score": (5,), "p_value": (5,), "defect": (5,),
        }  # fmt: skip
        assert whole["defect"].dtype == np.bool_
        for n in (1, 2):
            np.testing.assert_allclose(program(images[:n])["score"], whole["score"][:n], rtol=1e-5)


def test_programs_contain_only_standard_operators(files):
    program = torch.export.load(files["pt2"].path)
    assert not [node for node in program.graph.nodes if "recontrast" in str(node.target)]
    assert "recontrast::" not in str(program)
    import onnx

    graph = onnx.load(files["onnx"].path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_onnx_file_is_in_what_tensorrt_supports(files):
    check_supported(files["onnx"].path)


def test_file_describes_the_detector(files, run):
    stored = checkpoints.load(run / "checkpoint.pt")
    for result in files.values():
        detector = open_detector(result.path)
        assert (detector.recipe, detector.calibration, detector.category) == (RECIPE, stored.calibration, "tile")
        assert detector.max_map_value == 12 and detector.description["weights"] == stored.calibration.weights
        assert detector.description["preprocessing"]["crop"] == [32, 32]


@pytest.fixture(scope="module")
def predicted(wanted):
    """Rows of scores.csv written by ``recontrast predict`` with the checkpoint, by image path."""
    return {row["path"]: row for row in wanted[0]}


def without_torch(script, *arguments, **options):
    """Run a script in a process where importing torch or this package fails."""
    code = "import runpy, sys; sys.modules['torch'] = sys.modules['recontrast'] = None; del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


def test_example_runs_without_torch(files, predicted, tmp_path):
    example = ROOT / "examples/onnx_production.py"
    process = without_torch(example, files["onnx"].path, *predicted)
    assert process.returncode == 0, process.stderr
    for line, (path, row) in zip(process.stdout.splitlines(), predicted.items(), strict=True):
        assert line.startswith(f"{path}: score ") and line.endswith(f": {row['decision']}")
        assert float(line.split("score ")[1].split(",")[0]) == pytest.approx(float(row["score"]), rel=1e-4)
    for name, dtype, got in (("floats.tiff", np.float32, "TIFF of mode F"), ("wide.tiff", np.int32, "TIFF of mode I")):
        Image.fromarray(np.full((9, 9), 70000, dtype)).save(tmp_path / name)
        process = without_torch(example, files["onnx"].path, tmp_path / name)
        assert process.returncode == 1 and f"{name}: wanted PNG, JPEG, BMP or WebP, got {got}" in process.stderr
        assert "Traceback" not in process.stderr


def test_documented_example_gives_the_scores_of_predict(files, predicted, tmp_path):
    """Runs the code block unchanged, in a folder with a detector of the file name that it uses."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    blocks = [re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in pages]
    (block,) = [block for block in itertools.chain(*blocks) if "onnxruntime" in block and "p_value" in block]
    (tmp_path / "block.py").write_text(block)
    shutil.copy(files["onnx"].path, tmp_path / "detector.onnx")
    process = without_torch("block.py", *predicted, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for line, (path, row) in zip(process.stdout.splitlines(), predicted.items(), strict=True):
        words = line.removeprefix(f"{path} ").split()
        assert [float(word) for word in words[:2]] == pytest.approx(
            [float(row["score"]), float(row["p_value"])], rel=1e-4
        )
        assert words[2] == str(row["decision"] == "defect")


# ---- the graph before tracing ------------------------------------------------


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
def test_graph_gives_the_maps_and_scores_of_the_detector(changes, photographs, tmp_path):
    recipe = RECIPE.replace(**changes)
    detector = CheckpointDetector(
        save(tmp_path / "checkpoint.pt", recipe), "cpu", inference=InferenceOptions(folded=False)
    )
    graph = DetectorGraph(detector.model, recipe, None)
    files = ImageFiles(sorted(photographs.iterdir()))
    expected = list(detector.run(files, 1))
    for index, (maps, scores) in enumerate(expected):
        graph_maps, graph_scores = graph(torch.from_numpy(files.read(index)[None]))
        np.testing.assert_allclose(graph_maps.numpy(), maps, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(graph_scores.numpy(), scores, rtol=1e-4)


def test_decisions_at_the_threshold(run):
    detector = CheckpointDetector(run / "checkpoint.pt", "cpu", inference=InferenceOptions(folded=False))
    graph = DetectorGraph(detector.model, detector.recipe, detector.calibration)
    scores = np.array(
        [
            *detector.calibration.scores,
            0.0,
            100.0,
            np.nextafter(np.float32(detector.calibration.scores[-1]), np.float32(10)),
        ],
        np.float32,
    )
    graph.amap.score = lambda maps, how: torch.from_numpy(scores)
    _, _, p, defect = graph(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))
    np.testing.assert_allclose(p.numpy(), detector.calibration.p_values(scores), rtol=1e-6)
    np.testing.assert_array_equal(defect.numpy(), detector.calibration.is_defect(scores))
    graph.amap.score = lambda maps, how: torch.tensor([torch.nan])
    assert graph(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))[3].item()  # a NaN score must not pass as good


def test_calibration_of_bfloat16_scores_is_dropped(run, tmp_path):
    stored = checkpoints.load(run / "checkpoint.pt")
    path = checkpoints.save(tmp_path / "c.pt", replace(stored, recipe=stored.recipe.replace(precision="bfloat16")))
    detector = CheckpointDetector(path, "cpu", inference=InferenceOptions(folded=False))
    assert (
        "the calibration is for bfloat16 scores, so no decisions are made" in exporting._convert_to_float32(detector)[0]
    )
    assert detector.calibration is None and describe_detector(detector)["recipe"]["precision"] == "float32"


# ---- refusals ----------------------------------------------------------------


def test_different_scores_are_refused_and_leave_no_file(run, monkeypatch):
    class Off(CheckpointDetector):
        def run(self, files, batch):
            for maps, scores in super().run(files, batch):
                yield maps, scores * np.float32(1.0002)

    monkeypatch.setattr(exporting, "trace", lambda graph, batch: None)
    monkeypatch.setattr(exporting, "_write", lambda program, graph, kind, path, about: path.write_text("draft"))
    monkeypatch.setattr(exporting, "ExportedDetector", lambda path: Off(run / "checkpoint.pt", "cpu"))
    before = sorted(run.iterdir())
    message = fails("export", run, "--format", "onnx", "--out", run / "new" / "d.onnx")
    assert "wanted scores within 0.0001 of the checkpoint's" in message and "nothing was written" in message
    assert sorted(run.iterdir()) == before


def test_scores_of_another_checkpoint_are_refused(files, tmp_path):
    torch.manual_seed(5)
    other = CheckpointDetector(save(tmp_path / "checkpoint.pt", RECIPE.replace(blur=None)), "cpu")
    with pytest.raises(ValueError, match="wanted scores within"):
        compare_scores(other, ExportedDetector(files["onnx"].path), draw_images(tmp_path / "samples", (40, 40)))


def copy_with_description(path, files, **changes):
    """Write a copy of the ONNX file with a changed description, or without any if there are no changes."""
    import onnx

    model = onnx.load(files["onnx"].path)
    about = json.loads(next(prop.value for prop in model.metadata_props if prop.key == file_checks.KEY))
    del model.metadata_props[:]
    if changes:
        onnx.helper.set_model_props(model, {file_checks.KEY: json.dumps({**about, **changes})})
    onnx.save(model, path)
    return path


def test_files_of_other_versions_or_origins_are_refused(files, photographs, tmp_path):
    def error_of(path, *options):
        return fails("predict", path, photographs, "--out", tmp_path / "out", *options)

    newer = copy_with_description(tmp_path / "newer.onnx", files, format=2, recontrast="9.9")
    assert "wanted an exported detector of format 1, got format 2, written by recontrast 9.9" in error_of(newer)
    assert "got one of another origin" in error_of(copy_with_description(tmp_path / "bare.onnx", files))
    assert "calibration: wanted the fields" in error_of(
        copy_with_description(tmp_path / "odd.onnx", files, calibration={})
    )
    assert "got no such file" in error_of(tmp_path / "none.onnx")
    for suffix in KINDS.values():
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(b"PK not a program")
        assert f"wanted a whole {suffix} file" in error_of(path)
    assert "wanted one of this machine's devices (cpu), got 'mps'" in error_of(files["onnx"].path, "--device", "mps")
    assert "wanted a checkpoint where tile" in error_of(files["onnx"].path, "--tile", "32")


def test_weights_of_another_export_are_refused(files, photographs, tmp_path):
    for path in files["openvino"].files:
        shutil.copy(path, tmp_path / path.name)
    weights = tmp_path / files["openvino"].path.with_suffix(".bin").name
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    message = fails("predict", tmp_path / files["openvino"].path.name, photographs, "--out", tmp_path / "out")
    assert f"{weights} holds other weights than it was exported with" in message


def test_model_that_the_format_cannot_hold_is_refused(run, monkeypatch):
    def fail(graph, batch):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(exporting, "trace", fail)
    before = sorted(run.iterdir())
    message = fails("export", run, "--format", "onnx", "--out", run / "d.onnx")
    assert "wanted a model that onnx can hold, got one that it cannot: no such operator and more" in message
    assert sorted(run.iterdir()) == before


def test_image_listed_twice_is_compared_once(files, run, photographs):
    paths = [photographs / "grey.png", photographs / "grey.png", photographs / "wide.png"]
    count, difference = compare_scores(
        CheckpointDetector(run / "checkpoint.pt", "cpu"), ExportedDetector(files["onnx"].path), paths
    )
    assert count == 2 and difference < 1e-4


def test_wrong_options_are_refused(run, tmp_path, monkeypatch):
    assert "wanted onnx, pt2, openvino, got 'tflite'" in fails("export", run, "--format", "tflite")
    assert "ends in .onnx, got" in fails("export", run, "--format", "onnx", "--out", tmp_path / "d.xml")
    assert "ends in .xml, got" in fails("export", run, "--format", "openvino", "--out", tmp_path / "d.XML")
    assert "wanted a checkpoint file" in fails("export", tmp_path, "--format", "pt2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "got no onnx, onnxscript, onnxruntime: pip install onnx onnxscript onnxruntime" in fails(
        "export", run, "--format", "onnx"
    )


def test_output_folder_that_cannot_be_written_is_refused_first(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(exporting, "trace", lambda graph, batch: pytest.fail("traced before the folder was checked"))
    message = fails("export", run, "--format", "pt2", "--out", tmp_path / "file" / "d.pt2")
    assert f"--out: wanted a folder that can be written, got {tmp_path / 'file'} (not a folder)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_path_that_is_a_folder_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "d.pt2").mkdir()
    monkeypatch.setattr(exporting, "trace", lambda graph, batch: None)
    monkeypatch.setattr(exporting, "_write", lambda program, graph, kind, path, about: path.write_text("draft"))
    monkeypatch.setattr(exporting, "ExportedDetector", lambda path: CheckpointDetector(run / "checkpoint.pt", "cpu"))
    monkeypatch.setattr(exporting, "compare_scores", lambda *options: (8, 0.0))
    assert "d.pt2" in fails("export", run, "--format", "pt2", "--out", tmp_path / "d.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["d.pt2"] and not list((tmp_path / "d.pt2").iterdir())


def test_image_too_large_for_the_graph_is_reported(files, tmp_path):
    Image.new("RGB", (2401, 2)).save(tmp_path / "long.png")
    Image.new("RGB", (2400, 2)).save(tmp_path / "edge.png")
    result = call("predict", files["pt2"].path, tmp_path, "--out", tmp_path / "out", "--no-overlays")
    assert result.exit_code == 2 and "of at most 2400 x 2400 px" in result.stderr
    assert "1 images scored" in result.stdout


def test_missing_runtime_names_the_package_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"wanted the package onnxruntime, got none installed: pip install onnxruntime"
    ):
        OnnxProgram(files["onnx"].path)


def test_single_view_decides_only_with_its_own_calibration(run, photographs, tmp_path, monkeypatch):
    copy = tmp_path / "run" / "checkpoint.pt"
    copy.parent.mkdir()
    copy.write_bytes((run / "checkpoint.pt").read_bytes())
    with monkeypatch.context() as patch:  # an export without the part that takes long
        only = InferenceOptions("trained")
        patch.setattr(exporting, "trace", lambda graph, batch: pytest.fail("decides") if graph.calibrated else None)
        patch.setattr(exporting, "_write", lambda program, graph, kind, path, about: path.write_text(about))
        patch.setattr(exporting, "ExportedDetector", lambda path: CheckpointDetector(copy, "cpu", inference=only))
        result = export(copy, "pt2", tmp_path / "none.pt2", views="trained")
    assert result.outputs == ("map", "score") and "its calibration is for scores of views both" in result.notes[0]
    assert json.loads(result.path.read_text())["calibration"] is None
    options = ["--good", photographs, "--false-alarm-rate", 0.2, "--views", "trained", "--device", "cpu"]
    works("calibrate", copy.parent, *options)
    output = works("export", copy.parent, "--format", "pt2", "--views", "trained", "--out", tmp_path / "one.pt2")
    assert "outputs map, score, p_value, defect" in output
    detector, wanted = open_detector(tmp_path / "one.pt2"), checkpoints.load(copy).calibration
    assert detector.calibration == wanted and detector.recipe == RECIPE.replace(views="trained")
    pixels = np.full((1, 40, 50, 3), 90, np.uint8)
    outputs = detector.program(pixels)
    assert outputs["p_value"] == pytest.approx(wanted.p_values(outputs["score"]))


def test_pt2_files_in_folders_that_are_not_utf8(tmp_path):
    """PyTorch ends the whole process if it is given such a path."""
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    path = tmp_path / os.fsdecode(b"\xff.pt2")
    exporting._write(program, None, "pt2", path, "{}")
    with open(path, "rb") as file:
        read = torch.export.load(file)
    assert torch.equal(read.module().weight, program.module().weight)
