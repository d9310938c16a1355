"""Detectors in files of a few kilobytes, in every format, for tests that damage them."""

import json

import torch
from torch import nn

import recontrast
from recontrast import ReContrast
from recontrast import checkpoint as checkpoints
from recontrast.inference import onnx_file, openvino_file
from recontrast.inference.file_checks import CHECKSUM_KEY, FORMAT, KEY, NO_CHECKSUM, compute_sha256, write_checksum
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(backbone="test_resnet", weights="random", size=32, encoder_bn="eval")


def save_checkpoint(path):
    """Save the checkpoint of an untrained model with one level, 3 MB."""
    torch.manual_seed(0)
    model = ReContrast("test_resnet", weights="random", levels=1, decoder="mirror", encoder_bn="eval")
    preprocessing = {"size": [32, 32], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    optimiser = torch.optim.AdamW(list(model.decoder_parameters())[-4:])
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser.step()
    return checkpoints.save(
        path,
        checkpoints.Checkpoint(
            step=3,
            category="tile",
            recipe=RECIPE,
            model_config=model.config,
            preprocessing=preprocessing,
            images={"count": 3, "digest": "abc", "each": "0" * 48},
            model=weights,
            optimisers=[optimiser.state_dict()],
            rng={
                "torch": torch.get_rng_state(),
                "cuda": None,
                "batches": {"generator": torch.get_rng_state(), "place": 2},
            },
        ),
    )


def describe(**changes):
    """The description of an exported detector, as JSON."""
    content = {"format": FORMAT, "recontrast": recontrast.__version__, "category": "tile", "top": 100.0}
    content |= {"recipe": RECIPE.to_dict(), "calibration": None, "weights": "0" * 64, "checksum": CHECKSUM_KEY}
    return json.dumps({**content, **changes})


class Network(nn.Module):
    """Map: a convolution of the grey values. Score: the largest value of the map. Floats are taken as they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 1, 3, padding=1)
        self.register_buffer("offset", torch.full((1, 1, 1), 0.5))

    def forward(self, image):
        planes = image.permute(0, 3, 1, 2)
        maps = self.convolution(planes / 255 if image.dtype == torch.uint8 else planes).relu().squeeze(1) + self.offset
        return maps, maps.flatten(1).amax(1)


def describe_window(window):
    """The description of a detector with or without a window."""
    return describe(recipe=RECIPE.replace(window=window).to_dict())


def export_pt2(path, window=None):
    lengths = {0: torch.export.Dim("n"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    network = Network().requires_grad_(False)
    example = torch.zeros(2, 32, 40, 3, dtype=torch.uint8 if window is None else torch.float32)
    program = torch.export.export(network, (example,), dynamic_shapes=(lengths,))
    torch.export.save(program, path, extra_files={f"{KEY}.json": describe_window(window)})
    return path


def build_onnx(window=None):
    """The network as an ONNX model without a description; with a window its images are floats."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    convolution = Network().convolution
    constants = {
        "weight": convolution.weight.detach().numpy(),
        "bias": convolution.bias.detach().numpy(),
        "scale": torch.full((1,), 255.0 if window is None else 1.0).numpy(),
        "channel": torch.tensor([1]).numpy(),
        "axes": torch.tensor([1, 2]).numpy(),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "weight", "bias"], ["filtered"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["filtered"], ["positive"]),
        helper.make_node("Squeeze", ["positive", "channel"], ["map"]),
        helper.make_node("ReduceMax", ["map", "axes"], ["score"], keepdims=0),
    ]
    kind = TensorProto.UINT8 if window is None else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", kind, ["n", "h", "w", 3])],
        [
            helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", "h", "w"]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def save_onnx(path, model, description=None):
    """Save an ONNX model with a description and its checksum."""
    from onnx import helper

    helper.set_model_props(model, {KEY: description or describe(), CHECKSUM_KEY: NO_CHECKSUM})
    path.write_bytes(model.SerializeToString())
    write_checksum(path, onnx_file.CHECKSUM_PREFIX)
    return path


def export_onnx(path, window=None):
    return save_onnx(path, build_onnx(window), describe_window(window))


def export_openvino(path, window=None):
    import openvino

    intermediate = path.with_suffix(".onnx.tmp.onnx")
    intermediate.write_bytes(build_onnx(window).SerializeToString())
    model = openvino.convert_model(intermediate)
    intermediate.unlink()
    model.set_rt_info(describe_window(window), KEY)
    openvino.save_model(model, path, compress_to_fp16=False)
    model.set_rt_info(compute_sha256(path.with_suffix(".bin")), openvino_file.WEIGHTS_KEY)
    model.set_rt_info(NO_CHECKSUM, CHECKSUM_KEY)
    openvino.save_model(model, path, compress_to_fp16=False)
    write_checksum(path, openvino_file.CHECKSUM_PREFIX)
    return path
