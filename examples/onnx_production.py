"""An exported detector in production: numpy, pillow and onnxruntime, no PyTorch, not this package.

recontrast export runs/mine --format onnx --out detector.onnx
python examples/onnx_production.py detector.onnx photos/*.png
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

detector = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in detector.get_outputs()]
for path in sys.argv[2:]:
    with Image.open(path) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # 8 bits a channel, of any size
    found = dict(zip(names, detector.run(None, {"image": pixels[None]}), strict=True))
    said = f"score {found['score'][0]:.6f}, hottest map value {found['map'][0].max():.4f}"
    if "defect" in found:  # a calibrated detector decides
        said += f", p-value {found['p_value'][0]:.4f}: {'defect' if found['defect'][0] else 'good'}"
    print(f"{path}: {said}")
