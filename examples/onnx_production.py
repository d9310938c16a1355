"""Run an exported detector with NumPy, Pillow and ONNX Runtime; neither PyTorch nor recontrast is needed.

recontrast export runs/mine --format onnx --out detector.onnx
python examples/onnx_production.py detector.onnx photos/*.png
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path):
    """Read an image upright, as (H, W, 3) uint8 of any size, in the same way as recontrast."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey; PIL would clip it at 255
            values = np.asarray(image).astype(np.int32)
            if values.min() < 0 or values.max() > 65535:
                sys.exit(f"{path}: wanted samples of 8 or 16 bits, got {values.min()} to {values.max()}")
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            sys.exit(f"{path}: wanted samples of 8 or 16 bits, got floats, whose scale is unknown")
        return np.asarray(image.convert("RGB"))


detector = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in detector.get_outputs()]
for path in sys.argv[2:]:
    outputs = dict(zip(names, detector.run(None, {"image": read(path)[None]}), strict=True))
    line = f"{path}: score {outputs['score'][0]:.6f}, maximum of the map {outputs['map'][0].max():.4f}"
    if "defect" in outputs:  # the detector is calibrated
        line += f", p-value {outputs['p_value'][0]:.4f}: {'defect' if outputs['defect'][0] else 'good'}"
    print(line)
