"""Detectors as single files for ONNX Runtime, OpenVINO and torch.export."""
