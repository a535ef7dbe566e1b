"""Decoding images to RGB uint8, and reading their size without decoding them."""

from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from .errors import ImageError

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 exchange height and width


def image_name(value) -> str:
    """What to call an image in a message: its path where it has one."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, PIL.Image.Image):
        return getattr(value, "filename", "") or "<PIL image>"
    return f"<{type(value).__name__}>" if value is not None else "<no image>"


def _open(value) -> PIL.Image.Image:
    """Opens the header; the pixels are read on the first use."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, (bytes, bytearray)):
        return PIL.Image.open(BytesIO(value))
    if isinstance(value, str) and "://" in value:  # a remote file of a streamed or not embedded Hub data set
        from datasets.utils.file_utils import xopen

        with xopen(value, "rb") as file:
            return PIL.Image.open(BytesIO(file.read()))
    if isinstance(value, (str, Path)):
        return PIL.Image.open(value)
    raise TypeError("expected an undecoded datasets image, a path, bytes, a PIL image or an array")


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    """An array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8 or uint16 -> uint8 [H, W, 3]."""
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise TypeError(
            f"expected uint8 or uint16 [height, width] or [height, width, 1, 3 or 4], got {array.dtype} {array.shape}"
        )
    if array.size == 0:
        raise ValueError("the image has no pixels")
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else np.ascontiguousarray(array[:, :, :3])


def decode_image(value) -> np.ndarray:
    """
    Decodes an image to RGB.

    Greyscale and palette images become RGB, an alpha channel is dropped, CMYK is converted, 16-bit images keep their
    upper 8 bits, and an EXIF rotation is applied, as `datasets` does.

    Args:
        value (`dict`, `str`, `Path`, `bytes`, `PIL.Image.Image` or `np.ndarray`):
            The undecoded image of a `datasets` row (`{"bytes", "path"}`), a file, its content, or pixels (RGB order).

    Returns:
        `np.ndarray`: uint8 of shape [height, width, 3].

    Raises:
        [`ImageError`]: if the file is missing, is not an image, or is corrupt or truncated. It names the file.
    """
    try:
        if isinstance(value, np.ndarray):
            return _array_to_rgb(value)
        image = _open(value)
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return np.array(image)  # a copy: PIL's own buffer is read-only
        if image.mode == "F":
            raise ValueError("it has floating-point pixels of unknown range; convert it to 8 bit first")
        if image.mode.startswith("I"):  # 16 bit, which older versions of PIL open as 32 bit; `convert` would saturate
            return _array_to_rgb(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))
        return np.array(image.convert("RGB"))
    except (
        Exception
    ) as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, DecompressionBombError ...
        raise ImageError(f"Cannot read the image {image_name(value)}: {error or type(error).__name__}.") from error


def image_size(value) -> tuple[int, int]:
    """
    Reads the size of an image from its header, without decoding the pixels.

    Args:
        value: as in [`decode_image`].

    Returns:
        `tuple[int, int]`: height and width in pixels, after the EXIF rotation.

    Raises:
        [`ImageError`]: if the header cannot be read.
    """
    try:
        if isinstance(value, np.ndarray):
            return value.shape[0], value.shape[1]
        image = _open(value)
        # For a PNG without EXIF at its head, `getexif` would decode the pixels to look behind them.
        has_exif = image.format != "PNG" or "exif" in image.info
        rotated = has_exif and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if rotated else (image.height, image.width)
    except Exception as error:
        raise ImageError(f"Cannot read the image {image_name(value)}: {error or type(error).__name__}.") from error
