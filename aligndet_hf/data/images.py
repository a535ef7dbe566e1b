"""Decoding images to RGB uint8, and reading their size without decoding them."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
from transformers.utils import logging

from . import door
from .errors import ImageError

logger = logging.get_logger(__name__)

Window = tuple[float, float]  # the grey levels of images with more than 8 bits that become 0 and 255

_LISTED_IMAGES = 10  # that cannot be read, in print
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 exchange height and width
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file ends with


def image_name(value) -> str:
    """What to call an image in a message: its path where it has one."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, (str, Path)):
        return door.printable(value)
    if isinstance(value, PIL.Image.Image):
        return getattr(value, "filename", "") or "<PIL image>"
    if isinstance(value, pa.Buffer):
        return "<bytes>"
    return f"<{type(value).__name__}>" if value is not None else "<no image>"


class _Buffer(io.RawIOBase):
    """A buffer as a file; only the pages that somebody reads from the file are read from disk."""

    def __init__(self, buffer: pa.Buffer):
        self.view, self.place = memoryview(buffer).cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, len(self.view))[whence])
        return self.place

    def readinto(self, target) -> int:
        part = self.view[self.place : self.place + len(target)]
        target[: len(part)] = part
        self.place += len(part)
        return len(part)


@contextlib.contextmanager
def _opened(value) -> Iterator[PIL.Image.Image]:
    """
    Opens the header of an image; the pixels are read on the first use.

    Raises:
        [`ImageError`]: whatever goes wrong, here or in the body of the `with`. It names the image.
    """
    name = image_name(value)
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    try:
        if isinstance(value, PIL.Image.Image):
            yield value
            return
        if isinstance(value, str) and "://" in value:
            raise ValueError("it is an address, and nothing is fetched: a data set must hold its images")
        if isinstance(value, (bytes, bytearray)):
            file = io.BytesIO(value)
        elif isinstance(value, pa.Buffer):
            file = io.BufferedReader(_Buffer(value))
        elif isinstance(value, (str, Path)):
            file = door.open_file(value)
        else:
            raise TypeError("expected an undecoded datasets image, a path, bytes, a PIL image or an array")
        with file, PIL.Image.open(file, formats=door.image_formats()) as image:
            yield image
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"Cannot read the image {name}: {door.fix_of(name)}.") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"Cannot read the image {name}: it has more than {2 * PIL.Image.MAX_IMAGE_PIXELS} pixels. Make it smaller "
            "or cut it into tiles."
        ) from error
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error ...
        raise ImageError(f"Cannot read the image {name}: {error or type(error).__name__}.") from error


def scale_pixels(pixels: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """
    Grey levels of any type to uint8: the two levels of `window` become 0 and 255, what lies beyond is cut.

    Levels that are not finite become 0.
    """
    low, high = window
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low)) + 0.5
    return np.nan_to_num(np.clip(scaled, 0, 255), nan=0.0).astype(np.uint8)


def _scale_by_own_range(pixels: np.ndarray) -> np.ndarray:
    logger.warning_once(
        "An image with more than 8 bits (16-bit or floating-point grey) is scaled by its own lowest and highest "
        "level, so that equal levels of two images may look different. `--pixel_window` of `aligndet proposals` and "
        "`finetune` decides once for a data set which levels become black and white."
    )
    finite = pixels[np.isfinite(pixels)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return scale_pixels(pixels, (low, high if high > low else low + 1))


def _array_to_rgb(array: np.ndarray, window: Window | None) -> np.ndarray:
    """Pixels of one channel (any type), or of 3 or 4 (uint8 or uint16) -> uint8 [H, W, 3]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_deep = array.dtype != np.uint8 and array.ndim == 2 and array.dtype.kind in "uif"
    if array.dtype == np.uint16 and array.ndim == 3:
        array = (array >> 8).astype(np.uint8)  # colours, as Pillow reads them from a file
    if not is_deep and (
        array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    ):
        raise TypeError(
            "expected numbers [height, width], or uint8 or uint16 [height, width, 1, 3 or 4], got "
            f"{array.dtype} {array.shape}"
        )
    if array.size == 0:
        raise ValueError("the image has no pixels")
    if is_deep:
        array = _scale_by_own_range(array) if window is None else scale_pixels(array, window)
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else np.ascontiguousarray(array[:, :, :3])


def decode_image(value, window: Window | None = None) -> np.ndarray:
    """
    Decodes an image to RGB.

    Greyscale and palette images become RGB, an alpha channel is dropped, CMYK is converted, colours of 16 bits keep
    their upper 8, and an EXIF rotation is applied, as `datasets` does. Grey levels of more than 8 bits are scaled.

    Args:
        value (`dict`, `str`, `Path`, `bytes`, `PIL.Image.Image` or `np.ndarray`):
            The undecoded image of a `datasets` row (`{"bytes", "path"}`), a file, its content, or pixels (RGB order).
        window (`tuple[float, float]`, *optional*):
            The grey levels of an image with more than 8 bits (or floating-point) that become 0 and 255; see
            [`~aligndet_hf.data.bit_depth.pixel_window`]. By default its own lowest and highest, with a warning.

    Returns:
        `np.ndarray`: uint8 of shape [height, width, 3].

    Raises:
        [`ImageError`]: if the file is missing, is not an image, or is corrupt or truncated. It names the file.
    """
    if isinstance(value, np.ndarray):
        try:
            return _array_to_rgb(value, window)
        except (TypeError, ValueError) as error:
            raise ImageError(f"Cannot read the image {image_name(value)}: {error}.") from error
    with _opened(value) as image:
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return np.array(image)  # a copy: PIL's own buffer is read-only
        if image.mode[0] in "IF":  # `convert` would cut the levels at 255
            return _array_to_rgb(np.asarray(image), window)
        return np.array(image.convert("RGB"))


def raw_pixels(value) -> np.ndarray:
    """
    The grey levels of an image with more than 8 bits as they are stored.

    Args:
        value: as in [`decode_image`], but no array.

    Returns:
        `np.ndarray`: `[height, width]`, before the EXIF rotation.

    Raises:
        [`ImageError`]: if it cannot be read.
    """
    with _opened(value) as image:
        return np.asarray(image)


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
    if isinstance(value, np.ndarray):
        return value.shape[0], value.shape[1]
    with _opened(value) as image:
        return _size(image)


def _size(image: PIL.Image.Image) -> tuple[int, int]:
    return (image.width, image.height) if _is_rotated(image) else (image.height, image.width)


def _is_rotated(image: PIL.Image.Image) -> bool:
    """Whether the EXIF rotation exchanges height and width."""
    # For a PNG without EXIF at its head, `getexif` would decode the pixels to look behind them.
    has_exif = image.format != "PNG" or "exif" in image.info
    return has_exif and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


class ImageHeader(NamedTuple):
    """
    What is known of an image before it is decoded.

    Attributes:
        height, width (`int`): In pixels, after the EXIF rotation.
        is_rotated (`bool`): Whether that rotation exchanges height and width.
        format, mode (`str`): As Pillow names them.
        is_deep (`bool`): Whether it is grey with more than 8 bits (or floating-point).
        has_wide_colors (`bool`): Whether it has more than 8 bits for each of several channels.
        has_alpha (`bool`): Whether it has a fourth channel.
        ends_well (`bool`): Whether the file ends as its format does; `False` where that says nothing.
    """

    height: int
    width: int
    is_rotated: bool
    format: str
    mode: str
    is_deep: bool
    has_wide_colors: bool
    has_alpha: bool
    ends_well: bool


def read_header(value) -> ImageHeader:
    """
    Reads what a file says of its image, without decoding the pixels.

    Args:
        value: as in [`decode_image`], but no array.

    Raises:
        [`ImageError`]: if the header cannot be read.
    """
    with _opened(value) as image:
        raw_mode = str(image.tile[0][3]) if getattr(image, "tile", None) else ""
        return ImageHeader(
            *_size(image),
            _is_rotated(image),
            image.format or "",
            image.mode,
            is_deep=image.mode[0] in "IF",
            has_wide_colors=";16" in raw_mode and image.mode[0] not in "IF",
            has_alpha=image.mode in ("RGBA", "RGBa", "RGBX"),
            ends_well=_ends_well(image),
        )


def _ends_well(image: PIL.Image.Image) -> bool:
    end = _ENDS.get(image.format)
    if end is None or getattr(image, "fp", None) is None:
        return False
    size = image.fp.seek(0, 2)
    image.fp.seek(max(0, size - len(end)))
    return image.fp.read(len(end)) == end


def print_left_out(reasons: list[str], report: Path) -> None:
    """Says which images cannot be read, the first few of many; `report` is the file that has all of them."""
    if reasons:
        print(f"Left out, for they cannot be read: {len(reasons)}")
        for reason in reasons[:_LISTED_IMAGES]:
            print(f"  {reason}")
        if len(reasons) > _LISTED_IMAGES:
            print(f"  ... all of them in {report}")
