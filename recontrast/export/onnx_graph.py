"""Conversion of a traced graph to ONNX by `torch.onnx`, without what takes most of its time and changes nothing.

`torch.onnx.export` traces a program a second time, to replace operators that it does not know by ones that it does
(`ExportedProgram.run_decompositions`). The graph of a detector has few of them: `replace_operators` replaces them node
by node. A graph that has others is traced a second time. Patterns that `onnxscript` would look for at each node are
left as they are: the runtimes fuse operators themselves.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from recontrast.inference.programs import INPUTS, OUTPUTS

OPSET = 18  # of ONNX
_ATEN = torch.ops.aten


def convert_to_onnx(program: torch.export.ExportedProgram, calibrated: bool) -> Any:
    """Convert a traced graph to ONNX.

    Args:
        program: Program of a detector. It is not changed.
        calibrated: Whether it has the outputs of a calibration.

    Returns:
        ``onnx.ModelProto``.
    """
    replaced = replace_operators(program)
    try:
        exported = _convert(program if replaced is None else replaced, calibrated)
    except torch.onnx.OnnxExporterError:
        if replaced is None:
            raise
        exported = _convert(program, calibrated)  # by a second trace
    _clean(exported.model)
    model = exported.model_proto
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "TopK" and attribute.name == "sorted":
                attribute.i = 1  # TensorRT has no other; which values they are is the same
    return model


def _convert(program: torch.export.ExportedProgram, calibrated: bool) -> torch.onnx.ONNXProgram:
    outputs = list(OUTPUTS if calibrated else OUTPUTS[:2])
    inputs = list(INPUTS[: len(program.graph_signature.user_inputs)])
    exported = torch.onnx.export(
        program, (), dynamo=True, verbose=False, opset_version=OPSET, input_names=inputs, output_names=outputs,
        optimize=False,
    )  # fmt: skip
    return cast(torch.onnx.ONNXProgram, exported)  # None is returned only without dynamo


def _clean(model: Any) -> None:
    """Compute what is constant, and remove what is unused or there twice, in place (an ``onnx_ir.Model``)."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model, onnx_shape_inference=True)
    for change in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),  # names that are there twice
    ):
        change(model)


class _ReplacedProgram(torch.export.ExportedProgram):
    """Program whose operators are replaced already."""

    def run_decompositions(self, *_: Any, **__: Any) -> torch.export.ExportedProgram:
        """Return the program itself."""
        return self


def replace_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram | None:
    """Replace the operators of `REPLACEMENTS`, and those that work in place.

    Args:
        program: Program of `torch.export`. It is not changed.

    Returns:
        The new program, which `torch.onnx.export` does not trace again; None if an operator works in place on values
        that others read, or cannot be replaced.
    """
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in REPLACEMENTS:
            if REPLACEMENTS[node.target](node) is False:
                return None
        elif node.target._schema.is_mutable and not _compute_apart(node):
            return None
    graph.eliminate_dead_code()
    return _ReplacedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _compute_apart(node: fx.Node) -> bool:
    """Make a node like ``relu_`` compute like ``relu``; return whether nothing else can tell the difference."""
    target = cast(torch._ops.OpOverload, node.target)
    name, source = target._schema.name.removeprefix("aten::"), node.args[0]
    packet = getattr(_ATEN, name[:-1], None) if name.endswith("_") else None
    if packet is None or target._overloadname not in packet.overloads() or not isinstance(source, fx.Node):
        return False
    made_by = getattr(source.target, "_schema", None)
    if made_by is None or len(source.users) > 1 or any(value.alias_info for value in made_by.returns):
        return False  # a parameter, a buffer or a view, or read by another node
    node.target = getattr(packet, target._overloadname)
    return True


def _replace_conversion(node: fx.Node) -> None:
    """``tensor.to(dtype)``."""
    tensor, dtype, *_ = node.args  # the others say whether to copy
    node.target, node.args, node.kwargs = _ATEN._to_copy.default, (tensor,), {"dtype": dtype}


def _replace_transposed_convolution(node: fx.Node) -> None:
    defaults = (None, None, None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    given = (*node.args, *defaults[len(node.args) :])
    tensor, weight, bias, stride, padding, output_padding, groups, dilation = given
    node.target = _ATEN.convolution.default
    node.args = (tensor, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _replace_reversed_difference(node: fx.Node) -> bool:
    """``number - tensor``: the tensor's negative plus the number. Return False for ``number - alpha * tensor``."""
    tensor, number, *others = node.args
    if (others[0] if others else node.kwargs.get("alpha", 1)) != 1:
        return False
    with node.graph.inserting_before(node):
        negative = node.graph.call_function(_ATEN.neg.default, (tensor,))
    negative.meta = dict(node.meta)
    node.target, node.args, node.kwargs = _ATEN.add.Tensor, (negative, number), {}
    return True


def _replace_square(node: fx.Node) -> None:
    node.target, node.args = _ATEN.mul.Tensor, (node.args[0], node.args[0])


def _replace_matrix_transpose(node: fx.Node) -> None:
    """``tensor.mT``, which `torch.onnx` knows as a sum by Einstein's convention: few runtimes have its ellipsis."""
    node.target, node.args = _ATEN.transpose.int, (node.args[0], -2, -1)


# Operator -> function that makes a node of it one of operators that `torch.onnx` converts well; False if it cannot.
REPLACEMENTS: dict[Any, Callable[[fx.Node], bool | None]] = {
    _ATEN.to.dtype: _replace_conversion,
    _ATEN.conv_transpose2d.input: _replace_transposed_convolution,
    _ATEN.rsub.Scalar: _replace_reversed_difference,
    _ATEN.square.default: _replace_square,
    _ATEN.mT.default: _replace_matrix_transpose,
}
