"""Files whose images have one size, and whose calls have one number of images: nothing in the graph is dynamic."""

import json

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from PIL import Image
from saved_model import save
from tiny import tiny_set
from traced_once import traced_once

import recontrast
from recontrast.data.pillow_resize import FloatResize, PillowResize
from recontrast.data.roi import encode_mask
from recontrast.export.export import export
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.file_checks import ForeignFileError, parse_description
from recontrast.recipes.recipe import Recipe
from recontrast.service.detectors import check_detector

RECIPE = Recipe(backbone="test_resnet", weights="random", size=40, crop=32, score=0.01, encoder_bn="eval", levels=2)
KINDS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
SIZE, BATCH = (60, 77), 3
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings("ignore:.*seem to show one scene:recontrast.data.listing.DataWarning"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of 10 images of the size."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(10):
        pixels = 120 + random.normal(0, 10 + 6 * index, (*SIZE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)


@pytest.fixture(scope="module")
def files(run, images, tmp_path_factory):
    """File of each format with both lengths fixed."""
    folder = tmp_path_factory.mktemp("files")
    with traced_once():
        for kind, suffix in KINDS.items():
            options = ("--input-size", *SIZE, "--input-batch", BATCH, "--images", images)
            output = works("export", run, "--format", kind, *options, "--out", folder / f"d{suffix}")
            assert "scores of 18 images differ" in output
    return folder


def list_operators(path):
    import onnx

    model = onnx.load(path)
    return model, [node.op_type for node in model.graph.node]


def list_lengths(values):
    """Lengths of tensors; None or a name for those that are not fixed."""
    return [[d.dim_param or d.dim_value or None for d in value.type.tensor_type.shape.dim] for value in values]


def test_onnx_graph_has_no_dynamic_length(files, run, tmp_path):
    import onnx

    model, operators = list_operators(files / "d.onnx")
    dynamic = {"Shape", "Size", "Range", "Resize", "Upsample", "NonZero", "ConstantOfShape", "Expand"}
    assert not dynamic.intersection(operators)
    assert list_lengths(model.graph.input) == [[BATCH, *SIZE, 3]]
    assert list_lengths(model.graph.output) == [[BATCH, 32, 32], [BATCH]]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    computed = {name for node in inferred.node for name in node.output if name}
    known = {value.name for value in (*inferred.value_info, *inferred.output)}
    assert computed <= known, computed - known
    assert all(isinstance(length, int) for shape in list_lengths(inferred.value_info) for length in shape)
    export(run, "onnx", tmp_path / "size.onnx", input_size=SIZE)
    model, operators = list_operators(tmp_path / "size.onnx")
    assert list_lengths(model.graph.input)[0][1:] == [*SIZE, 3] and list_lengths(model.graph.input)[0][0] != BATCH
    assert not dynamic.difference({"Shape"}).intersection(operators)
    images = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), np.uint8)
    some, all_fixed = (ExportedDetector(path).score(images)[1] for path in (tmp_path / "size.onnx", files / "d.onnx"))
    np.testing.assert_allclose(some, all_fixed, rtol=1e-5)


@pytest.mark.parametrize("suffix", KINDS.values())
def test_scores_and_calibration(suffix, files, run, images, tmp_path):
    """The scores are those of the checkpoint, also of a batch that is not full and of calls in the library."""
    path = tmp_path / f"d{suffix}"
    for part in {suffix, suffix.replace("xml", "bin")}:
        path.with_suffix(part).write_bytes((files / f"d{part}").read_bytes())
    detector, wanted = recontrast.load(path), recontrast.load(run, device="cpu").predict(images)
    assert detector.input_size == SIZE and detector.input_batch == BATCH
    for batch in (1, 16):
        found = detector.predict(images, batch=batch)
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
    np.testing.assert_allclose(found[9].anomaly_map, wanted[9].anomaly_map, rtol=1e-4, atol=1e-5)
    works("calibrate", path, "--good", images, "--false-alarm-rate", 0.3)
    again = ExportedDetector(path)
    assert again.input_batch == BATCH and again.calibration.count == 10
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(images.iterdir())])
    outputs = again.run_program(pixels)
    np.testing.assert_array_equal(outputs["defect"], again.calibration.is_defect(outputs["score"]))
    assert list(outputs) == ["map", "score", "p_value", "defect"] and outputs["map"].shape == (10, 32, 32)
    assert 0 < outputs["defect"].sum() < 10
    check_detector(again)  # as the service does, with a drawn image


def test_images_of_another_size_are_refused(files, run, images, tmp_path):
    path, wanted = files / "d.onnx", "60 x 77 px (height x width), for which the file was exported, got "
    tiny_set(tmp_path / "data")
    Image.new("RGB", (60, 77)).save(tmp_path / "turned.png")
    result = call("predict", path, tmp_path / "turned.png", images, "--out", tmp_path / "out", "--no-overlays")
    assert result.exit_code == 2 and "10 images scored" in result.stdout
    assert f"turned.png: wanted an image of {wanted}77 x 60" in " ".join(result.stderr.split())
    assert f"wanted images of {wanted}40 x 40" in fails("evaluate", path, tmp_path / "data")
    with pytest.raises(ValueError, match=r"wanted images of 60 x 77 px"):
        ExportedDetector(path).score(np.zeros((1, 61, 77, 3), np.uint8))


def test_refusals(run, images, tmp_path):
    out = tmp_path / "d.onnx"
    for options, message in [
        (["--input-size", 0, 5], "--input-size: wanted from 1 x 1 to 2400 x 2400 px (height x width), got 0 x 5"),
        (["--input-size", 5, 2401], "got 5 x 2401"),
        (["--input-batch", 0], "--input-batch: wanted at least 1 image, got 0"),
        (["--input-batch", 1, "--precision", "float16"], "--precision: wanted float32 with --input-size"),
    ]:
        assert message in fails("export", run, "--format", "onnx", *options, "--out", out)
    tiles = save(tmp_path / "checkpoint.pt", RECIPE.replace(size=32, crop=None, tile=32))
    message = fails("export", tiles, "--format", "onnx", "--input-size", 32, 32, "--out", out)
    assert "--input-size: wanted none for a detector of tiles, whose input is a tile, got 32 x 32" in message
    mask = np.zeros((30, 40), bool)
    mask[5:20] = True
    region = save(tmp_path / "region.pt", RECIPE.replace(roi=encode_mask(mask)))
    message = fails("export", region, "--format", "onnx", "--input-size", *SIZE, "--out", out)
    wanted = "--input-size: wanted the aspect ratio of the region of interest, 30 x 40 px (height x width), got 60 x 77"
    assert wanted in message
    assert not out.exists()
    about = {"format": 1, "recontrast": "1", "category": "", "top": 1.0, "recipe": RECIPE.to_dict()}
    about["calibration"] = None
    for name, value in (("input_size", [3]), ("input_size", "ab"), ("input_size", [1.5, 2]), ("input_batch", True)):
        with pytest.raises(ForeignFileError, match=rf"d.onnx: {name}: wanted"):
            parse_description(out, json.dumps({**about, name: value}))


@pytest.mark.filterwarnings("ignore:roi. the mask of 40 x 30 px is resized to the images")
def test_region_of_the_same_aspect_ratio(tmp_path):
    mask = np.zeros((30, 40), bool)
    mask[5:20] = True
    run = save(tmp_path / "checkpoint.pt", RECIPE.replace(roi=encode_mask(mask)))
    works("export", run, "--format", "onnx", "--input-size", 60, 80, "--out", tmp_path / "d.onnx")
    Image.effect_noise((80, 60), 50).convert("RGB").save(tmp_path / "0.png")
    assert len(recontrast.load(tmp_path / "d.onnx").predict(tmp_path / "0.png")) == 1


def test_resize_of_one_size_is_that_of_any():
    random = np.random.default_rng(0)
    levels = torch.from_numpy(random.integers(0, 256, (2, *SIZE, 3), np.uint8))
    floats = torch.from_numpy(random.random((2, *SIZE, 3), np.float32))
    for resize, pixels in ((PillowResize, levels), (FloatResize, floats)):
        assert torch.equal(resize((40, 32), SIZE)(pixels), resize((40, 32))(pixels))
