"""Random views of an image and its boxes: crop, resize, flip and one colour operation, all on uint8."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

from .masks import move_regions

Crop = tuple[int, int, int, int]  # top, left, height, width in pixels of an image

# The sizes that detectors are fine-tuned with on COCO, and the shorter side of half of COCO's images.
PUBLISHED_SIZES, PUBLISHED_SIDE = list(range(480, 801, 32)), 480
STRIDE, MIN_SIZE = 32, 64  # of the sizes that are chosen
MIN_BOX_SIDE = 0.01  # pixels of the view; smaller boxes are dropped, as in AlignDet's pipeline


@dataclass
class ViewConfig:
    """
    How views are drawn.

    Args:
        sizes (`list[int]`):
            Sizes to draw from, in pixels: of the shorter side (`"shortest_edge"`) or of both sides (`"square"`).
        max_size (`int`, *optional*):
            Longest side in pixels with `"shortest_edge"`. Never unbounded: by default 5/3 of the drawn size, DETR's
            1333 for 800.
        resize (`str`, *optional*, defaults to `"shortest_edge"`):
            `"shortest_edge"` keeps the aspect ratio; `"square"` does not.
        flip_probability (`float`, *optional*, defaults to 0.5):
            Probability of a horizontal flip.
        color (`bool`, *optional*, defaults to `True`):
            Whether to apply one random colour operation (see [`random_color`]).
        crop_scale (`tuple[float, float]`, *optional*):
            Range of the area of a random crop, relative to the image. `None`: no crop, as in AlignDet.
    """

    sizes: list[int]
    max_size: int | None = None
    resize: str = "shortest_edge"
    flip_probability: float = 0.5
    color: bool = True
    crop_scale: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must hold at least one size of 1 pixel or more, got {self.sizes}.")
        if self.resize not in ("shortest_edge", "square"):
            raise ValueError(f"resize must be 'shortest_edge' or 'square', got '{self.resize}'.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], got {self.flip_probability}.")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be (low, high) with 0 < low <= high <= 1, got {self.crop_scale}.")

    @property
    def is_random(self) -> bool:
        """Whether two views of one image can differ."""
        return len(self.sizes) > 1 or self.flip_probability > 0 or self.color or self.crop_scale is not None


# ---- geometry ----


def choose_sizes(published: Sequence[int], images: np.ndarray) -> tuple[list[int], str]:
    """
    The sizes of views that are to images as the published ones are to COCO's: larger by at most two thirds.

    Args:
        published (`Sequence[int]`): Sizes in pixels for COCO, which are never exceeded.
        images (`np.ndarray`): int `[N, 2]`, height and width of all images; 0 where they are not known.

    Returns:
        `tuple[list[int], str]`: the sizes in pixels, multiples of 32, and what to say of them.
    """
    sides = images[(images > 0).all(axis=1)].min(axis=1)
    side = float(np.median(sides)) if len(sides) else PUBLISHED_SIDE
    scale = min(1.0, side / PUBLISHED_SIDE)
    sizes = sorted({max(MIN_SIZE, round(size * scale / STRIDE) * STRIDE) for size in published})
    return sizes, (
        f"image_sizes {' '.join(map(str, sizes))}, since the shorter side of half of the images is at most {side:g} "
        f"pixels (published, for {PUBLISHED_SIDE} pixels: {min(published)} to {max(published)}); --image_sizes gives "
        "others."
    )


def view_shape(height: int, width: int, resize: str, size: int, max_size: int | None = None) -> tuple[int, int]:
    """
    The height and width of a view, rounded as the image processors of `transformers` do.

    Args:
        height, width (`int`): Size of the image in pixels.
        resize (`str`): `"shortest_edge"` or `"square"`.
        size (`int`): Shorter side (or both sides) of the view in pixels.
        max_size (`int`, *optional*): Longest side with `"shortest_edge"`; 5/3 of `size` by default.
    """
    if resize == "square":
        return size, size
    max_size = max_size or size * 5 // 3
    short, long = min(height, width), max(height, width)
    exact = float(size)
    if long / short * size > max_size:
        exact = max_size * short / long
    # A very long image may get a short side that rounds to nothing: one pixel is the least.
    new_short, new_long = max(1, round(exact)), max(1, int(exact * long / short))
    if new_short == short and long <= max_size:
        return height, width  # less than a pixel from its size: not worth a resize
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    Resizes an image [H, W, 3] uint8: area averaging along sides that shrink (no aliasing), bilinear along sides that
    grow. OpenCV's `INTER_AREA` averages only if no side grows, hence the two steps.
    """
    small = (min(width, image.shape[1]), min(height, image.shape[0]))
    if small != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def draw_crop(height: int, width: int, rng: np.random.Generator, scale: tuple[float, float]) -> Crop:
    """
    Draws a crop (top, left, height, width) in pixels: area `scale` times the image's, aspect ratio changed by at
    most 3/4 to 4/3.
    """
    area = rng.uniform(*scale)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    crop_height = max(1, round(height * min(1.0, np.sqrt(area) * ratio)))
    crop_width = max(1, round(width * min(1.0, np.sqrt(area) / ratio)))
    top = rng.integers(height - crop_height + 1)
    left = rng.integers(width - crop_width + 1)
    return int(top), int(left), crop_height, crop_width


def boxes_in_crop(boxes: np.ndarray, crop: Crop) -> np.ndarray:
    """
    Which boxes a crop shows well enough to learn from: at least half of the area lies inside (and so does the centre).

    Args:
        boxes (`np.ndarray` [N, 4]): xywh in pixels of the image.
        crop (`tuple`): (top, left, height, width) in pixels of the image.

    Returns:
        `np.ndarray` [N] of bool.
    """
    top, left, height, width = crop
    x, y, w, h = boxes.T
    shown_w = np.clip(np.minimum(x + w, left + width) - np.maximum(x, left), 0, None)
    shown_h = np.clip(np.minimum(y + h, top + height) - np.maximum(y, top), 0, None)
    return shown_w * shown_h >= 0.5 * w * h


def draw_two_crops(
    height: int, width: int, boxes: np.ndarray, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[Crop, Crop, np.ndarray]:
    """
    Draws two crops that share boxes: of 5 pairs the one that shares most (the first of the best).

    Args:
        boxes (`np.ndarray` [N, 4]): xywh in pixels.

    Returns:
        `tuple`: the two crops, and the indices of the boxes that both show (see [`boxes_in_crop`]).
    """
    pairs = []
    for _ in range(5):
        first, second = (draw_crop(height, width, rng, scale) for _ in range(2))
        pairs.append((first, second, np.flatnonzero(boxes_in_crop(boxes, first) & boxes_in_crop(boxes, second))))
    return max(pairs, key=lambda pair: len(pair[2]))


def make_view(
    image: np.ndarray,
    boxes: np.ndarray,
    rng: np.random.Generator,
    config: ViewConfig,
    size: int,
    crop: Crop | None = None,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Makes one view: crop, resize, flip, colour. Padding is left to the collator, so a flip mirrors image and boxes
    about the same axis (the official code pads first, which shifts the boxes of flipped images by up to 31 pixels).

    Args:
        image (`np.ndarray` [H, W, 3]): uint8, RGB.
        boxes (`np.ndarray` [N, 4]): xywh in pixels of the image.
        rng (`np.random.Generator`): Source of the flip and of the colour operation.
        config ([`ViewConfig`]): How to draw.
        size (`int`): The size drawn from `config.sizes`.
        crop (`tuple`, *optional*): (top, left, height, width); boxes that it does not show well are dropped and the
            others clipped to it.
        rows (`np.ndarray` [N], *optional*): What belongs to each box; by default its index in `boxes`.

    Returns:
        `tuple`: the view (uint8 [h, w, 3]), its boxes (float32 [n, 4], xywh in pixels of the view), and the rows of
        these boxes [n], with their regions, if any, where they are in the view. Boxes with a side of 0.01 pixels or
        less are dropped.
    """
    rows = np.arange(len(boxes)) if rows is None else rows
    top, left = 0, 0
    if crop is not None:
        kept = np.flatnonzero(boxes_in_crop(boxes, crop))
        rows = rows[kept]
        top, left, height, width = crop
        x1, y1 = np.clip(boxes[kept, :2] - (left, top), 0, (width, height)).T
        x2, y2 = np.clip(boxes[kept, :2] + boxes[kept, 2:] - (left, top), 0, (width, height)).T
        boxes = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
        image = image[top : top + height, left : left + width]
    height, width = image.shape[:2]
    new_height, new_width = view_shape(height, width, config.resize, size, config.max_size)
    scale = np.array([new_width / width, new_height / height], dtype=np.float32)
    boxes = boxes.astype(np.float32) * np.tile(scale, 2)
    across, down = new_width / width, new_height / height
    matrix = np.array([[across, 0, -left * across], [0, down, -top * down]])
    flip = rng.random() < config.flip_probability
    flip_first = flip and height * width < new_height * new_width  # the smaller image
    if flip_first:
        image = cv2.flip(image, 1)
    image = resize_image(image, new_height, new_width)
    if flip:
        boxes[:, 0] = new_width - boxes[:, 0] - boxes[:, 2]
        matrix[0] = [-across, 0, new_width + left * across]
        image = image if flip_first else cv2.flip(image, 1)
    if config.color:
        image = random_color(image, rng)
    large = (boxes[:, 2:] > MIN_BOX_SIDE).all(axis=1)
    return np.ascontiguousarray(image), boxes[large], move_regions(rows[large], matrix)


# ---- colour ----
# The nine operations of AlignDet's pipeline, with the definitions of PIL and the ranges of RandAugment. All but two
# are look-up tables.

_LEVELS = np.arange(256)


def _blend(image: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """`other` at factor 0, `image` at 1, beyond it above 1 (PIL.ImageEnhance)."""
    return cv2.addWeighted(image, factor, other, 1 - factor, 0)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Applies one table [256], or one per channel [256, 3]."""
    table = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[:, None])


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches every channel to 0..255."""
    table = np.empty((256, 3))
    for channel in range(3):
        used = np.flatnonzero(cv2.calcHist([image], [channel], None, [256], [0, 256]))
        low, high = used[0], used[-1]
        table[:, channel] = (_LEVELS - low) * (255 / (high - low)) if high > low else _LEVELS
    return _look_up(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalises the histogram of every channel."""
    return np.array(PIL.ImageOps.equalize(PIL.Image.fromarray(image)))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts all levels from `threshold` (0..256) on."""
    return _look_up(image, np.where(_LEVELS < threshold, _LEVELS, 255 - _LEVELS))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper `bits` bits of every level."""
    return _look_up(image, _LEVELS & ~(2 ** (8 - bits) - 1))


def adjust_color(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation: greyscale at factor 0, unchanged at 1."""
    return _blend(image, cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Contrast: the mean grey at factor 0, unchanged at 1."""
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return _look_up(image, mean + factor * (_LEVELS - mean))


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Brightness: black at factor 0, unchanged at 1."""
    return _look_up(image, factor * _LEVELS)


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13


def adjust_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Sharpness: smoothed at factor 0, unchanged at 1."""
    return _blend(image, cv2.filter2D(image, -1, _SMOOTH, borderType=cv2.BORDER_REPLICATE), factor)


# Operation and the range of its one parameter, if any.
COLOR_OPERATIONS = {
    "identity": (lambda image: image, None),
    "autocontrast": (autocontrast, None),
    "equalize": (equalize, None),
    "solarize": (solarize, (0, 256)),
    "color": (adjust_color, (0.1, 1.9)),
    "contrast": (adjust_contrast, (0.1, 1.9)),
    "brightness": (adjust_brightness, (0.1, 1.9)),
    "sharpness": (adjust_sharpness, (0.1, 1.9)),
    "posterize": (lambda image, bits: posterize(image, int(bits)), (4, 9)),
}


def random_color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one of [`COLOR_OPERATIONS`], drawn uniformly, to an image [H, W, 3] uint8."""
    operation, span = list(COLOR_OPERATIONS.values())[rng.integers(len(COLOR_OPERATIONS))]
    return operation(image) if span is None else operation(image, rng.uniform(*span))
