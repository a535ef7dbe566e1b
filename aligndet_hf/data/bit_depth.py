"""
Images with more than 8 bits: which of their grey levels become 0 and 255.

The two are one decision for a whole data set. They are recorded in its description and in the image processor of the
detectors that are trained on it, so that everything that looks at these images sees the same pictures.
"""

import json
import re

import datasets
import numpy as np
from transformers.image_processing_base import ImageProcessingMixin

from .columns import image_batches
from .errors import DataError, ImageError
from .images import Window, raw_pixels
from .pixels import find_deep
from .splits import spread_rows

RULES = "range, percentile, or two numbers such as 7000,9000"

_MARK = "Pixel window: "  # in `info.description`
_MEASURED_IMAGES = 500
_PIXELS_OF_EACH = 10_000  # for percentiles
_PERCENTILES = (0.1, 99.9)


def parse_rule(rule: str) -> Window | None:
    """
    The two numbers of a rule, if it is given as such.

    Raises:
        `ValueError`: if it is none of [`RULES`].
    """
    if rule in ("range", "percentile"):
        return None
    try:
        low, high = (float(number) for number in rule.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"pixel_window must be {RULES}, the lower one first, got {rule!r}")
    return low, high


def pixel_window(dataset: datasets.Dataset | datasets.IterableDataset) -> Window | None:
    """The grey levels of images with more than 8 bits that become 0 and 255, as recorded with a data set."""
    found = re.search(re.escape(_MARK) + r"(\[[^\]]*\])", dataset.info.description or "")
    return tuple(json.loads(found[1])) if found else None


def window_of(image_processor) -> Window | None:
    """The same, as it is saved with a detector, in its image processor."""
    window = getattr(image_processor, "pixel_window", None)
    return tuple(window) if window else None


def saved_window(detector: str) -> Window | None:
    """The same of a detector that is saved in a folder or repository; `None` also where there is no such detector."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(detector)
    except (OSError, ValueError):
        return None
    window = settings.get("pixel_window")
    return tuple(window) if window else None


def record_pixel_window(dataset: datasets.Dataset, window: tuple[float, float]) -> None:
    """Records the grey levels with a data set, before what else its description says."""
    rest = re.sub(re.escape(_MARK) + r"\[[^\]]*\]\s*", "", dataset.info.description or "")
    dataset.info.description = f"{_MARK}{json.dumps(window)}\n\n{rest}".rstrip()


def settle_pixel_window(
    parts: list[datasets.Dataset], rule: str = "range", known: Window | None = None
) -> Window | None:
    """
    Decides which grey levels become 0 and 255, and records it with the data. `None` if no image has more than 8 bits.

    Args:
        parts (`list[datasets.Dataset]`): With the column `image`, not decoded. All get the same.
        rule (`str`, *optional*): `"range"`: the lowest and the highest level of the data; `"percentile"`: those that
            0.1 % of the pixels lie below and above; `"LOW,HIGH"`: these, whatever is recorded.
        known (`tuple[float, float]`, *optional*): What a detector has been trained with.

    Returns:
        `tuple[float, float]`: the two levels, as they are in the files.
    """
    rows = [find_deep(image_batches(part)) for part in parts]
    if not any(rows):
        return None
    recorded = (pixel_window(part) for part in parts)
    window = parse_rule(rule) or known or next(filter(None, recorded), None)
    if window is None:
        window = _measure([(part, row) for part, found in zip(parts, rows, strict=True) for row in found], rule)
    for part in parts:
        record_pixel_window(part, window)
    return window


def _measure(images: list[tuple[datasets.Dataset, int]], rule: str) -> tuple[float, float]:
    """The grey levels by a rule, of evenly spaced images."""
    found = []
    for part, row in (images[index] for index in spread_rows(len(images), _MEASURED_IMAGES)):
        try:
            pixels = raw_pixels(part[row]["image"])
        except ImageError:
            continue  # whoever decodes it tells why
        pixels = pixels[np.isfinite(pixels)]
        if rule == "range" and pixels.size:
            pixels = np.array([pixels.min(), pixels.max()])
        found.append(pixels[:: max(1, pixels.size // _PIXELS_OF_EACH)])
    levels = np.concatenate(found) if found else np.zeros(0)
    if not levels.size:
        raise DataError("None of the images with more than 8 bits can be read.")
    low, high = (levels.min(), levels.max()) if rule == "range" else np.percentile(levels, _PERCENTILES)
    return float(low), float(high) if high > low else float(low) + 1


def window_line(window: tuple[float, float]) -> str:
    """What is told of a decision."""
    return (
        f"images with more than 8 bits (16-bit or floating-point grey): the levels {window[0]:g} to {window[1]:g} of "
        f"the files become 0 to 255, what lies beyond is cut (--pixel_window: {RULES})"
    )
