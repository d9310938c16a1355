"""Run an exported detector with NumPy, Pillow and ONNX Runtime; neither PyTorch nor recontrast is needed.

recontrast export runs/mine --format onnx --out detector.onnx
python examples/onnx_production.py detector.onnx photos/*.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP")  # Pillow misreads some TIFF files


def read(path, bits):
    """Read an image upright, as (H, W, 3) uint8 of any size, in the same way as recontrast, or stop.

    ``bits`` are those that the camera uses of 16-bit samples.
    """
    with Image.open(path) as image:
        deep = image.mode.startswith("I")  # 16-bit grey; PIL would clip it at 255
        if image.format not in FORMATS or image.mode == "F":
            sys.exit(f"{path}: wanted PNG, JPEG, BMP or WebP, got {image.format} of mode {image.mode}")
        if bits < 16 and not deep:
            sys.exit(f"{path}: wanted 16-bit grey, as the detector was trained on, got mode {image.mode}")
        image = ImageOps.exif_transpose(image)
        if deep:
            white = 2**bits - 1
            values = np.minimum(np.asarray(image).astype(np.int64), white)
            image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


detector = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in detector.get_outputs()]
recipe = json.loads(detector.get_modelmeta().custom_metadata_map["recontrast"])["recipe"]
bits = recipe.get("bits") or 16
for path in sys.argv[2:]:
    outputs = dict(zip(names, detector.run(None, {"image": read(path, bits)[None]}), strict=True))
    line = f"{path}: score {outputs['score'][0]:.6f}, maximum of the map {outputs['map'][0].max():.4f}"
    if "defect" in outputs:  # the detector is calibrated
        line += f", p-value {outputs['p_value'][0]:.4f}: {'defect' if outputs['defect'][0] else 'good'}"
    print(line)
