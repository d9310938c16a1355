"""An exported detector in production: numpy, pillow and onnxruntime, no PyTorch, not this package.

recontrast export runs/mine --format onnx --out detector.onnx
python examples/onnx_production.py detector.onnx photos/*.png
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path):
    """The upright picture, (H, W, 3) uint8, of any size; as the package itself reads it."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
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
    found = dict(zip(names, detector.run(None, {"image": read(path)[None]}), strict=True))
    said = f"score {found['score'][0]:.6f}, hottest map value {found['map'][0].max():.4f}"
    if "defect" in found:  # a calibrated detector decides
        said += f", p-value {found['p_value'][0]:.4f}: {'defect' if found['defect'][0] else 'good'}"
    print(f"{path}: {said}")
