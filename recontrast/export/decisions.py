"""The part of an exported graph that decides: p-value and decision from the score, replaced by a new calibration.

`recontrast.export.detector_graph.DetectorGraph` computes the same when a checkpoint is exported.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recontrast.calibration.conformal import Calibration
from recontrast.inference.programs import OUTPUTS

_DECISIONS = OUTPUTS[2:]
_PREFIX = "decision/"  # of the names of new nodes


def round_scores(calibration: Calibration) -> tuple[NDArray[np.float32], np.float32]:
    """Return the scores and the threshold of a calibration in the precision of the graph.

    Args:
        calibration: Calibration of float32 scores, for which the conversion is exact.

    Returns:
        Scores (n,), float32, and the threshold.
    """
    return np.array(calibration.scores, np.float32), np.float32(calibration.threshold)


def decide(score: Tensor, good: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Compute p-values and decisions by operators that every format can hold.

    Args:
        score: Scores (N,), float32.
        good: Scores of the calibration images (n,), float32.
        threshold: Threshold of the calibration.

    Returns:
        p-values (N,), float32, NaN where the score is; and decisions (N,), bool, True for a defect or a NaN.
    """
    above = (good >= score.unsqueeze(1)).float().sum(1)
    p_value = (1 + above) / (1 + good.shape[0])
    return torch.where(score == score, p_value, torch.nan), ~(score <= threshold)


def replace_onnx_decisions(model: Any, calibration: Calibration) -> None:
    """Make an ONNX model decide by a calibration, whether it made decisions before or not.

    Args:
        model: ``onnx.ModelProto`` with the outputs map and score, changed in place.
        calibration: Calibration of its scores.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    outputs = {output.name: output for output in graph.output}
    for name in _DECISIONS:
        if name in outputs:
            graph.output.remove(outputs[name])
    _prune_onnx(graph)
    good, threshold = round_scores(calibration)
    constants: dict[str, Any] = {
        "good": good, "threshold": threshold, "axis": np.array([1]), "one": np.float32(1),
        "count": np.float32(len(good) + 1), "nan": np.float32(np.nan),
    }  # fmt: skip
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), _PREFIX + name) for name, value in constants.items()
    )

    def name_of(value: str) -> str:
        return value if value in OUTPUTS else _PREFIX + value

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        name, sources = name_of(output), list(map(name_of, inputs))
        graph.node.append(helper.make_node(operator, sources, [name], name=f"{name}_node", **attributes))

    add("Unsqueeze", ["score", "axis"], "column")
    add("GreaterOrEqual", ["good", "column"], "reached")
    add("Cast", ["reached"], "numbers", to=TensorProto.FLOAT)
    add("ReduceSum", ["numbers", "axis"], "above", keepdims=0)
    add("Add", ["above", "one"], "rank")
    add("Div", ["rank", "count"], "share")
    add("IsNaN", ["score"], "void")
    add("Where", ["void", "nan", "share"], "p_value")
    add("LessOrEqual", ["score", "threshold"], "passes")
    add("Not", ["passes"], "defect")
    shape = [d.dim_param or d.dim_value for d in outputs["score"].type.tensor_type.shape.dim]
    graph.output.append(helper.make_tensor_value_info("p_value", TensorProto.FLOAT, shape))
    graph.output.append(helper.make_tensor_value_info("defect", TensorProto.BOOL, shape))


def _prune_onnx(graph: Any) -> None:
    """Remove the nodes and weights that no output needs."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # sorted: each node comes after those whose outputs it reads
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    weights = [weight for weight in graph.initializer if weight.name in needed]
    values = [info for info in graph.value_info if info.name in needed]
    for field, items in ((graph.node, kept[::-1]), (graph.initializer, weights), (graph.value_info, values)):
        items = [type(item).FromString(item.SerializeToString()) for item in items]  # del frees what they refer to
        del field[:]
        field.extend(items)


def replace_openvino_decisions(model: Any, calibration: Calibration) -> None:
    """Make an OpenVINO model decide by a calibration, whether it made decisions before or not.

    Args:
        model: ``openvino.Model`` with the outputs map and score, changed in place.
        calibration: Calibration of its scores.
    """
    from openvino import opset13 as ops

    for result in model.get_results():
        if result.output(0).get_names() & set(_DECISIONS):
            model.remove_result(result)
    score = model.output("score").get_node().input_value(0)
    good, threshold = round_scores(calibration)
    reached = ops.greater_equal(ops.constant(good), ops.unsqueeze(score, ops.constant(np.array([1]))))
    above = ops.reduce_sum(ops.convert(reached, "f32"), ops.constant(np.array([1])), keep_dims=False)
    share = ops.divide(ops.add(above, ops.constant(np.float32(1))), ops.constant(np.float32(len(good) + 1)))
    p_value = ops.select(ops.is_nan(score), ops.constant(np.float32(np.nan)), share)
    defect = ops.logical_not(ops.less_equal(score, ops.constant(threshold)))
    for name, node in zip(_DECISIONS, (p_value, defect), strict=True):
        node.output(0).get_tensor().set_names({name})
        model.add_results([ops.result(node)])
    model.validate_nodes_and_infer_types()


class DecidedProgram(nn.Module):
    """The program of a .pt2 file with decisions by another calibration.

    Args:
        program: Module with the outputs map, score and, perhaps, decisions.
        calibration: Calibration of its scores.
    """

    good: Tensor

    def __init__(self, program: nn.Module, calibration: Calibration) -> None:
        super().__init__()
        self.program = program
        good, threshold = round_scores(calibration)
        self.register_buffer("good", torch.from_numpy(good), persistent=False)
        self.threshold = float(threshold)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute maps (N, h, w), scores (N,), p-values (N,), float32, and decisions (N,), bool.

        Args:
            image: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
        """
        maps, score = self.program(image)[:2]
        return maps, score, *decide(score, self.good, self.threshold)


def list_files(path: Path) -> list[Path]:
    """Return the files of an exported detector: the file itself, and the .bin file of an .xml file.

    Args:
        path: Path of the file.

    Returns:
        One or two paths.
    """
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
