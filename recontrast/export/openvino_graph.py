"""Optimisations of OpenVINO graphs."""

from typing import Any

import numpy as np


def replace_argmin(model: Any) -> None:
    """Replace each argmin by a comparison of all values with the minimum, in place.

    OpenVINO runs an argmin as a sort (TopK), which took most of the time of PatchCore. The index is the same, the first
    one where several values are equal to the minimum. For rows with NaN, or with infinities only, it is arbitrary.

    Args:
        model: ``openvino.Model``.
    """
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() != "TopK" or node.get_attributes()["mode"] != "min":
            continue
        count, values = node.input_value(1).get_node(), node.input_value(0)
        if values.partial_shape.rank.is_dynamic:
            continue
        rank = len(values.partial_shape)
        axis = node.get_attributes()["axis"] % rank
        takes_one = count.get_type_name() == "Constant" and np.all(count.get_data() == 1)
        if not takes_one or node.output(0).get_target_inputs() or values.partial_shape[axis].is_dynamic:
            continue
        length = values.partial_shape[axis].get_length()
        shape = [length if position == axis else 1 for position in range(rank)]
        indices = np.arange(length, dtype=np.int32).reshape(shape)
        axes = np.array([axis], np.int64)
        is_smallest = ops.equal(values, ops.reduce_min(values, axes, keep_dims=True))
        index = ops.reduce_min(ops.select(is_smallest, indices, np.int32(length - 1)), axes, keep_dims=True)
        index = ops.convert(index, node.get_attributes()["index_element_type"])
        for reader in node.output(1).get_target_inputs():
            reader.replace_source_output(index.output(0))
    model.validate_nodes_and_infer_types()
