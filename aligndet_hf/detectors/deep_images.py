"""
`pipeline("object-detection")` for images with more than 8 bits. It is copied beside the detectors that need it.

The pipeline of transformers cuts the grey levels of such a file at 255 before the image processor sees them. A
detector that was trained on a window of levels would get a white image, without a word. This file needs transformers,
Pillow and NumPy, and nothing of the package that wrote it.
"""

import base64
import io
import os
import urllib.request

import numpy as np
import PIL.Image
import PIL.ImageOps
import transformers


class DeepImagesPipeline(transformers.ObjectDetectionPipeline):
    """
    Detects objects as the class above it does, after `pixel_window` of `preprocessor_config.json` has become 0 to 255.

    Images with 8 bits are taken as they are.
    """

    def preprocess(self, image, timeout: float | None = None):
        return super().preprocess(to_8_bits(open_image(image, timeout), self.image_processor.pixel_window), timeout)


def open_image(image, timeout: float | None = None) -> PIL.Image.Image:
    """Opens what the pipeline takes: a file, an address, base64, or an image that is open already."""
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        with urllib.request.urlopen(image, timeout=timeout) as answer:
            return PIL.Image.open(io.BytesIO(answer.read()))
    if os.path.isfile(image):
        return PIL.Image.open(image)
    try:
        return PIL.Image.open(io.BytesIO(base64.b64decode(image.rpartition(",")[2], validate=True)))
    except ValueError as error:
        raise ValueError(f"{image[:200]!r} is no file, address or base64 string of an image") from error


def to_8_bits(image: PIL.Image.Image, window) -> PIL.Image.Image:
    """
    Grey levels of more than 8 bits (or floating-point) to 0 to 255.

    Args:
        image (`PIL.Image.Image`): Of any mode; only the deep ones (`I;16`, `I`, `F`) change.
        window (`Sequence[float]`): The levels that become 0 and 255. What lies beyond is cut.
    """
    if image.mode[0] not in "IF":
        return image
    low, high = window
    levels = np.asarray(PIL.ImageOps.exif_transpose(image), dtype=np.float64)
    levels = np.clip((levels - low) * (255 / (high - low)) + 0.5, 0, 255)
    return PIL.Image.fromarray(np.nan_to_num(levels, nan=0.0).astype(np.uint8))
