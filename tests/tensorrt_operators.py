"""What the parser of TensorRT 10.15 lists as supported, for float32, int32, int64 and bool.

https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md. Bytes are supported as input alone.
"""

# Operators, of those that detectors use.
OPERATORS = set(
    """
    Abs Add And AveragePool Cast Clip Concat Conv ConvTranspose Div Equal Erf Exp Expand Flatten Floor Gather Gemm
    Greater GreaterOrEqual IsInf IsNaN LayerNormalization Less LessOrEqual MatMul Max MaxPool Min Mul Neg Not Pow Range
    ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh
    TopK Transpose Unsqueeze Where
""".split()
)


def check_supported(path):
    """Check the operators of an .onnx file, the types that they read, and the restrictions on them."""
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    constants = {weight.name: weight for weight in graph.initializer}
    types |= {name: weight.data_type for name, weight in constants.items()}
    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    assert {node.op_type for node in graph.node} <= OPERATORS
    for node in graph.node:
        read = {types[name] for name in node.input if name}
        if node.op_type not in ("Cast", "Shape"):  # the image: its values are converted, its shape is read
            assert read <= kinds, node.op_type
        if node.op_type.startswith("Reduce") or node.op_type in ("Squeeze", "Unsqueeze"):
            assert len(node.input) < 2 or node.input[1] in constants, node.op_type
        if node.op_type == "TopK":
            assert onnx.numpy_helper.to_array(constants[node.input[1]]) < 3840
            assert all(attribute.i == 1 for attribute in node.attribute if attribute.name == "sorted")
    assert "TopK" in {node.op_type for node in graph.node}
