"""Changes of OpenVINO graphs: the same numbers as before."""

import numpy as np
import pytest

from recontrast.export.openvino_graph import replace_argmin
from recontrast.inference.openvino_file import get_core

openvino = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset13")


def build(shape, *, mode="min", count=1, axis=-1, outputs=(1,)):
    values = ops.parameter(shape, np.float32)
    node = ops.topk(values, np.int64(count), axis, mode, "value", "i64", stable=True)
    return openvino.Model([node.output(i) for i in outputs], [values], "graph")


def list_types(model):
    return [node.get_type_name() for node in model.get_ops()]


def run(model, values):
    return get_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]


@pytest.mark.parametrize(("shape", "axis"), [((-1, 50, 33), 2), ((-1, 50, 33), -1), ((-1, 17, 5), 1), ((2, 1), 1)])
def test_index_of_the_smallest_value(shape, axis):
    model = build(list(shape), axis=axis)
    values = np.random.default_rng(0).integers(0, 40, (2, *shape[1:])).astype(np.float32)  # with ties
    replace_argmin(model)
    assert "TopK" not in list_types(model)
    index = run(model, values)
    assert index.dtype == np.int64
    np.testing.assert_array_equal(index, values.argmin(axis, keepdims=True))


def test_rows_that_are_not_finite():
    model = build([-1, 33])
    replace_argmin(model)
    values = np.random.default_rng(0).random((4, 33)).astype(np.float32)
    values[0], values[1, 5], values[2] = np.nan, np.nan, np.inf
    index = run(model, values)
    assert index.min() >= 0 and index.max() < 33
    assert index[3, 0] == values[3].argmin()


@pytest.mark.parametrize(
    "options", [{"mode": "max"}, {"count": 3}, {"outputs": (0, 1)}, {"shape": [-1, -1]}], ids=lambda o: next(iter(o))
)
def test_other_sorts_stay(options):
    model = build(**{"shape": [-1, 33], **options})
    replace_argmin(model)
    assert "TopK" in list_types(model)
