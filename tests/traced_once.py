"""Exports of one detector to several formats, which trace it once and convert it to ONNX once.

Both take much longer than all the rest of an export, and are the same for each format.
"""

from contextlib import contextmanager

import pytest

from recontrast.export import export as exporting
from recontrast.export import low_precision_file


@contextmanager
def traced_once():
    """Within this context every export uses the graph of the first; all must be of one detector.

    Yields:
        The graphs so far: "program" and "model" with whether they make decisions -> `ExportedProgram`, `ModelProto`.
    """
    trace, convert = exporting.trace, exporting.convert_to_onnx
    graphs = {}

    def trace_once(graph, batch=None):
        key = "program", graph.calibrated
        if key not in graphs:
            graphs[key] = trace(graph, batch)
        return graphs[key]

    def convert_once(program, calibrated):
        import onnx

        key = "model", calibrated
        if key not in graphs:
            graphs[key] = convert(program, calibrated)
        model = onnx.ModelProto()
        model.CopyFrom(graphs[key])  # writing changes the metadata
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", trace_once)
        patch.setattr(exporting, "convert_to_onnx", convert_once)
        patch.setattr(low_precision_file, "convert_to_onnx", convert_once)
        yield graphs
