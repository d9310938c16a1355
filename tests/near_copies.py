"""Pictures of one kind, and the ways in which a picture is saved again."""

import io

import numpy as np
from PIL import Image, ImageEnhance


def draw(rng, *, scene=0.0, noise=6.0, shift=0):
    """Draw a picture with a texture of its own, 128 x 128 pixels.

    Args:
        scene: Contrast of the texture that all pictures share, as those of one part in a fixed position do.
        noise: Standard deviation of the noise of the camera.
        shift: Largest distance by which the shared texture is moved, in pixels.
    """
    shared = scene * np.random.default_rng(0).normal(0, 1, (16, 16))
    shared = np.asarray(Image.fromarray(shared.astype(np.float32)).resize((128, 128), Image.Resampling.BICUBIC))
    shared = np.roll(shared, rng.integers(-shift, shift + 1, 2), (0, 1))
    own = Image.fromarray(rng.normal(0, 40 if not scene else 6, (40, 40)).astype(np.float32))
    own = own.resize((128, 128), Image.Resampling.BICUBIC)
    pixels = 128 + shared + np.asarray(own) + rng.normal(0, noise, (128, 128))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def save_again(picture, format="JPEG", quality=85):
    """Return a picture after a lossy format."""
    file = io.BytesIO()
    picture.save(file, format, quality=quality)
    return Image.open(file).convert("RGB")


def rescale(picture, factor):
    """Return a picture at another size."""
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC)


AGAIN = {
    "JPEG 95": lambda picture: save_again(picture, quality=95),
    "JPEG 80": lambda picture: save_again(picture, quality=80),
    "WebP 85": lambda picture: save_again(picture, "WebP"),
    "smaller": lambda picture: rescale(picture, 0.94),
    "larger": lambda picture: rescale(picture, 1.06),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.08),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.93),
    "contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(1.1),
}
