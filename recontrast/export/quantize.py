"""Post-training quantisation of an exported ONNX graph to 8 bits, for ONNX Runtime and OpenVINO.

Convolutions and products with weights are quantised, group by group: ``QuantizeLinear`` and ``DequantizeLinear`` stand
before each of them, from which the runtimes build integer kernels. Activations have one scale per tensor, from the
smallest and largest value on good images; weights have 7 bits (`WEIGHT_LIMIT`) and one scale per output channel. What
rounding the weights adds to the mean of an output channel is taken off its bias (Nagel et al., ICCV 2019, section 4.2).
The resize, the normalisation and everything behind the network (distances, upsampling, blur, score) stay in float32.
"""

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.inference.programs import name_inputs

# x86 processors without VNNI add two products of an unsigned and a signed 8-bit number in 16 bits,
# which saturate (the instruction PMADDUBSW): 2 x 255 x 127 does, 2 x 255 x 64 does not. With 7 bits for the weights, a
# file has the same scores on all processors. Also ONNX Runtime's guide to quantisation, "reduce_range".
WEIGHT_LIMIT = 63
LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_SCOPE = re.compile(r"network\.(?:model\.)?(\w+)(?:\.(heads)\b)?")
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # metadata of a node: the modules that it comes from


@dataclass(frozen=True)
class Layer:
    """A node with weights.

    Attributes:
        node: Name of the node.
        group: Part of the network that it belongs to, such as "encoder" or "decoder".
        source: Name of the tensor that it reads.
        weight: Name of its weights.
        target: Name of the tensor that it computes; behind the ReLU that alone reads it, if there is one.
    """

    node: str
    group: str
    source: str
    weight: str
    target: str


@dataclass(frozen=True)
class Range:
    """Values of a tensor on good images.

    Attributes:
        low: Smallest value, at most 0.
        high: Largest value, at least 0.
        mean: Mean of each channel, (C,) float64.
    """

    low: float
    high: float
    mean: NDArray[np.float64]

    def parameters(self) -> tuple[np.float32, np.uint8]:
        """Return scale and zero point of the 8-bit numbers."""
        scale = np.float32((self.high - self.low) / 255) or np.float32(1)
        return scale, np.uint8(np.clip(round(-self.low / float(scale)), 0, 255))


def list_layers(model: Any) -> list[Layer]:
    """List the nodes of a graph that can be quantised.

    Args:
        model: ``onnx.ModelProto`` of a detector, with the metadata of the exporter.

    Returns:
        One layer for each node with weights of the network.
    """
    weights = {weight.name for weight in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in model.graph.output}
    layers = []
    for node in model.graph.node:
        if node.op_type not in LAYERS or node.input[1] not in weights or node.input[0] in weights:
            continue
        if node.op_type == "ConvTranspose" and _attribute(node, "group", 1) != 1:
            continue
        group = _find_group(node)
        if group is None:
            continue
        target, following = node.output[0], readers.get(node.output[0], [])
        if len(following) == 1 and following[0].op_type == "Relu" and target not in outputs:
            target = following[0].output[0]
        layers.append(Layer(node.name, group, node.input[0], node.input[1], target))
    return layers


def _find_group(node: Any) -> str | None:
    """Return the part of the network that a node belongs to; None for the rest of the graph."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES_KEY), "[]")
    for name in (node.input[1], *reversed(ast.literal_eval(scopes))):
        if match := _SCOPE.match(name):
            return match[2] or match[1]
    return None


def measure_ranges(
    model: Any, tensors: Collection[str], images: NDArray[Any], masks: NDArray[np.bool_] | None = None
) -> dict[str, Range]:
    """Measure the values of tensors on good images.

    Args:
        model: ``onnx.ModelProto`` in float32; it is not changed.
        tensors: Names of the tensors, with channels along the second axis.
        images: Images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
        masks: Masks (N, H, W), bool; None for a graph without this input.

    Returns:
        Range of each tensor.
    """
    import onnx
    import onnxruntime

    names = sorted(tensors)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    lows, highs, sums = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict[str, Any]()
    for inputs in iterate_inputs(images, masks):
        for name, values in zip(names, session.run(names, name_inputs(*inputs)), strict=True):
            lows[name], highs[name] = min(lows[name], float(values.min())), max(highs[name], float(values.max()))
            axes = tuple(axis for axis in range(values.ndim) if axis != (1 if values.ndim == 4 else values.ndim - 1))
            sums[name] = sums.get(name, 0.0) + values.mean(axis=axes, dtype=np.float64)
    return {name: Range(lows[name], highs[name], sums[name] / len(images)) for name in names}


def iterate_inputs(images: NDArray[Any], masks: NDArray[np.bool_] | None = None) -> Iterator[tuple[NDArray[Any], ...]]:
    """Iterate over images one by one, each with its mask if there are any.

    Args:
        images: Images (N, H, W, 3).
        masks: Masks (N, H, W), or None.

    Yields:
        Arrays (1, H, W, 3) and, with masks, (1, H, W).
    """
    for index in range(len(images)):
        yield tuple(values[index : index + 1] for values in ((images,) if masks is None else (images, masks)))


def quantize(
    model: Any, layers: Sequence[Layer], ranges: Mapping[str, Range], *, outputs: bool, transposed: bool
) -> Any:
    """Return a copy of a graph in which layers are quantised.

    Args:
        model: ``onnx.ModelProto`` in float32.
        layers: Layers to quantise.
        ranges: Ranges of their sources and targets.
        outputs: Whether what a layer computes is quantised too, as ONNX Runtime's integer convolutions need it.
        transposed: Whether transposed convolutions compute with integers; otherwise only their weights are stored so,
            since ONNX Runtime has no such kernel.

    Returns:
        The quantised ``onnx.ModelProto``.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor = _Editor(copy.graph, ranges)
    nodes = {node.name: node for node in copy.graph.node}
    for layer in layers:
        node = nodes[layer.node]
        editor.quantize_weight(node)
        if node.op_type == "ConvTranspose" and not transposed:
            continue
        node.input[0] = editor.restore(layer.source)
    if outputs:
        sources = {layer.source for layer in layers}
        for layer in layers:
            if nodes[layer.node].op_type in ("Conv", "MatMul", "Gemm") and layer.target not in sources:
                editor.reroute(layer.target)
    editor.finish()
    return copy


class _Editor:
    """Inserts nodes into a graph; `finish` puts them in an order in which each node follows those that it reads."""

    def __init__(self, graph: Any, ranges: Mapping[str, Range]) -> None:
        self.graph, self.ranges = graph, ranges
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.added: dict[str, list[Any]] = {}  # name of a tensor -> nodes that follow the node that computes it
        self.first: list[Any] = []  # nodes that read weights alone
        self.done: set[str] = set()

    def restore(self, name: str) -> str:
        """Quantise a tensor, and return the name of the tensor of rounded values."""
        if name not in self.added:
            from onnx import helper

            scale, zero = self.ranges[name].parameters()
            parameters = [self.add_constant(f"{name}/scale", scale), self.add_constant(f"{name}/zero", zero)]
            self.added[name] = [
                helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}/int8"], f"{name}/quantize"),
                helper.make_node("DequantizeLinear", [f"{name}/int8", *parameters], [f"{name}/rounded"],
                                 f"{name}/dequantize"),
            ]  # fmt: skip
        return f"{name}/rounded"

    def reroute(self, name: str) -> None:
        """Quantise a tensor for all nodes that read it."""
        readers = [node for node in self.graph.node if name in node.input]
        rounded = self.restore(name)
        for node in readers:
            for index, source in enumerate(node.input):
                if source == name:
                    node.input[index] = rounded

    def quantize_weight(self, node: Any) -> None:
        """Replace the weights of a node by 8-bit numbers, and correct its bias."""
        from onnx import helper, numpy_helper

        name = node.input[1]
        values = numpy_helper.to_array(self.weights[name]).astype(np.float64)
        axis = _output_axis(node)
        others = tuple(a for a in range(values.ndim) if a != axis)
        scale = np.abs(values).max(axis=others) / WEIGHT_LIMIT
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        wide = np.expand_dims(scale, others)
        rounded = np.clip(np.rint(values / wide), -WEIGHT_LIMIT, WEIGHT_LIMIT).astype(np.int8)
        self._correct_bias(node, values - rounded * wide.astype(np.float64))
        if name not in self.done:  # shared weights are stored once
            self.done.add(name)
            self.weights[name].CopyFrom(numpy_helper.from_array(rounded, name))
            parameters = [self.add_constant(f"{name}/scale", scale),
                          self.add_constant(f"{name}/zero", np.zeros(len(scale), np.int8))]  # fmt: skip
            self.first.append(
                helper.make_node("DequantizeLinear", [name, *parameters], [f"{name}/float"], f"{name}/dequantize",
                                 axis=axis)
            )  # fmt: skip
        node.input[1] = f"{name}/float"

    def _correct_bias(self, node: Any, error: NDArray[np.float64]) -> None:
        """Add to the bias what rounding the weights takes off the mean of each output channel."""
        from onnx import numpy_helper

        if node.op_type not in ("Conv", "ConvTranspose") or len(node.input) < 3 or node.input[0] not in self.ranges:
            return
        mean = self.ranges[node.input[0]].mean
        if node.op_type == "Conv":
            groups = _attribute(node, "group", 1)
            parts = mean.reshape(groups, 1, -1)  # (groups, 1, channels of a group)
            sums = error.sum(axis=tuple(range(2, error.ndim))).reshape(groups, -1, parts.shape[-1])
            shift = (sums * parts).sum(-1).reshape(-1)
        else:  # each output point gets the product with kernel size / stride of the taps, on average
            stride = np.prod(_attribute(node, "strides", [1] * (error.ndim - 2)))
            shift = (error.sum(axis=tuple(range(2, error.ndim))) * mean[:, None]).sum(0) / stride
        bias = self.weights.get(node.input[2])
        if bias is None:
            return
        corrected = (numpy_helper.to_array(bias).astype(np.float64) + shift).astype(np.float32)
        node.input[2] = self.add_constant(f"{node.name}/bias", corrected)

    def add_constant(self, name: str, value: Any) -> str:
        """Add a constant to the graph, and return its name."""
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def finish(self) -> None:
        """Insert the new nodes into the graph, and remove weights that are not read any more."""
        nodes = [*self.first, *(node for name in self._inputs() for node in self.added.get(name, []))]
        for node in self.graph.node:
            nodes.append(node)
            nodes += [item for name in node.output for item in self.added.get(name, [])]
        nodes = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        read = {name for node in self.graph.node for name in node.input}
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in read:
                del self.graph.initializer[index]

    def _inputs(self) -> list[str]:
        return [item.name for item in self.graph.input]


def _output_axis(node: Any) -> int:
    """Return the axis of the output channels in the weights of a node."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
        return 0
    return 1


def _attribute(node: Any, name: str, default: Any) -> Any:
    """Return the value of an integer attribute, or of a list of them."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) or attribute.i
    return default


def store_half_weights(model: Any) -> Any:
    """Return a copy of a graph whose network weights are stored in float16; computations stay in float32.

    Args:
        model: ``onnx.ModelProto`` in float32.

    Returns:
        The ``onnx.ModelProto``. Weights that float16 cannot hold stay as they are.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    casts, renamed = [], {}
    for weight in copy.graph.initializer:
        if not weight.name.startswith("network.") or weight.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(weight)
        if values.ndim < 2 or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = weight.name
        renamed[name] = f"{name}/float"
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
        casts.append(helper.make_node("Cast", [name], [renamed[name]], f"{name}/cast", to=TensorProto.FLOAT))
    nodes = [type(node).FromString(node.SerializeToString()) for node in copy.graph.node]
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    del copy.graph.node[:]
    copy.graph.node.extend([*casts, *nodes])
    return copy
