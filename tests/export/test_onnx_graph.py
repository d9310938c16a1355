"""Conversion to ONNX without a second trace: the same numbers, and a second trace wherever it is needed."""

import numpy as np
import pytest
import torch
from torch import nn

from recontrast.export.onnx_graph import convert_to_onnx, replace_operators
from recontrast.export.tracing import silence_exporters, trace_images

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir).*")]


class Base(nn.Module):
    """Takes images (N, H, W, 3), uint8; `compute` gives a map (N, H, W) from features (N, 4, H, W)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)

    def forward(self, image):
        maps = self.compute(self.convolution(image.permute(0, 3, 1, 2).float() / 255))
        return maps, maps.flatten(1).amax(1)


class Replaced(Base):
    """Every operator that is replaced, and operators in place on values that nothing else reads."""

    def compute(self, x):
        y = self.up(x)
        y += x.square()
        return (1 - torch.relu_(y * 2)).mean(1).to(torch.float32)


class Shared(Base):
    """An operator in place on a value that is read before."""

    def compute(self, x):
        y = x * 1.5
        z = y * 2
        torch.relu_(y)
        return (y + z).mean(1)


class View(Base):
    """An operator in place on a part of a value."""

    def compute(self, x):
        y = x * 1.5
        y[:, 0].relu_()
        return y.mean(1)


class Scaled(Base):
    """A difference with a factor, by position or by name."""

    def compute(self, x):
        return (torch.rsub(x, 1.5, alpha=3) + torch.ops.aten.rsub.Scalar(x, 2.5, 0.5)).mean(1)


class Unknown(Base):
    """An operator that `torch.onnx` decomposes."""

    def compute(self, x):
        return torch.nan_to_num(x * 3, nan=7.0).mean(1)


@pytest.mark.parametrize("kind", [Replaced, Shared, View, Scaled, Unknown])
def test_converted_graph_gives_the_numbers_of_the_module(kind, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    traces, trace_again = [], torch.export.ExportedProgram.run_decompositions

    def count(*arguments, **options):
        traces.append(kind)
        return trace_again(*arguments, **options)

    module = kind().requires_grad_(False).eval()
    image = torch.randint(0, 256, (3, 17, 21, 3), dtype=torch.uint8)
    with silence_exporters():
        program = trace_images(module, (16, 16))
        before = str(program.graph)
        assert (replace_operators(program) is None) == (kind in (Shared, View, Scaled))
        monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", count)
        model = convert_to_onnx(program, False)
    assert len(traces) == (0 if kind is Replaced else 1)
    assert str(program.graph) == before
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["map", "score"]
    for got, wanted in zip(session.run(None, {"image": image.numpy()}), module(image), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)
