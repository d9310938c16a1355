"""Exported detectors on vision transformers: equal scores in every format, without operators that few runtimes have."""

import onnx
import pytest
import tiny_transformers  # noqa: F401 - registers the backbones
import torch
from saved_model import save
from tiny import tiny_set
from traced_once import traced_once

from recontrast.export.export import export
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import train

KINDS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
pytestmark = [
    # Raised by the imports of onnxscript and openvino.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
]


@pytest.fixture(
    scope="module",
    params=[("recontrast", "tiny_registers"), ("dinomaly", "tiny_registers"), ("inp_former", "tiny_rotary")],
    ids=lambda pair: " ".join(pair),
)
def files(request, tmp_path_factory):
    """Result of one export for each format; the position embeddings of the backbone have another grid."""
    architecture, backbone = request.param
    folder = tmp_path_factory.mktemp(architecture)
    recipe = Recipe(architecture=architecture, backbone=backbone, weights="random", size=(40, 24))
    checkpoint = save(folder / "checkpoint.pt", recipe)

    with traced_once():
        return {kind: export(checkpoint, kind, folder / f"d{end}") for kind, end in KINDS.items()}


def test_scores_equal_those_of_the_checkpoint(files):
    for result in files.values():
        assert result.difference < 1e-5 and result.images == 8


def test_graphs_resample_no_position_embeddings(files):
    program = torch.export.load(files["pt2"].path)
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]
    assert "recontrast::" not in str(program)
    graph = onnx.load(files["onnx"].path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "Resize" not in {node.op_type for node in graph.node}


def test_ensemble(tmp_path):
    """PatchCore and PaDiM on one transformer, at two image sizes and so with two grids of position embeddings."""
    recipe = Recipe(architecture="ensemble", backbone="tiny_registers", weights="random", size=64, small_size=32,
                    score="model", bank_share=1.0, gaussian_features=8, seed=0)  # fmt: skip
    train(recipe, tiny_set(tmp_path, train=10), out=tmp_path / "run", device="cpu")
    with traced_once():
        for kind in ("onnx", "pt2"):
            result = export(tmp_path / "run/checkpoint.pt", kind, tmp_path / f"d{KINDS[kind]}")
            assert result.difference < 1e-5
