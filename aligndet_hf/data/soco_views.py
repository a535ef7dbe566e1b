"""SoCo's views: the whole image and crops of it, the proposals that both show, and the pyramid level of each box.

Wei et al., NeurIPS 2021; the steps and numbers are the official code's. While they are in pixels, boxes are
corners xyxy with both ends *inclusive*, as there: `x2 = x1 + width - 1`. They leave as corners relative to the view,
0 to 1, with the far ends exclusive: a box of the whole view is [0, 0, 1, 1]. The official code leaves out the last row
and column of pixels there, and so mirrors boxes one pixel off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .views import Crop, adjust_brightness, adjust_color, adjust_contrast, resize_image, solarize

# The id of the box that stands for the whole view where no proposal is left.
WHOLE_VIEW = 1
MAX_TRIES = 5
JITTER_PROBABILITY, JITTER_RATIO = 0.5, 0.1


@dataclass(frozen=True)
class Boxes:
    """
    Boxes of an image or view, and which proposals they are.

    Attributes:
        corners (`np.ndarray` [n, 4]): xyxy in pixels, both ends inclusive.
        ids (`np.ndarray` int64 [n]): Number of the proposal in its image, from 1.
    """

    corners: np.ndarray
    ids: np.ndarray

    def take(self, rows: np.ndarray) -> "Boxes":
        """Some of the boxes, by index or mask."""
        return Boxes(self.corners[rows], self.ids[rows])

    def __len__(self) -> int:
        return len(self.ids)


# ---- boxes ----


def number_proposals(proposals: np.ndarray, height: int, width: int) -> Boxes:
    """The proposals of an image (xywh in pixels [n, 4]) with their ids; the whole image if there are none."""
    if len(proposals) == 0:
        proposals = np.array([[0, 0, width, height]])
    corners = np.concatenate([proposals[:, :2], proposals[:, :2] + proposals[:, 2:] - 1], axis=1)
    return Boxes(corners.astype(np.float64), np.arange(1, len(corners) + 1))


def crop_corners(crop: Crop) -> np.ndarray:
    """A crop (top, left, height, width) as corners xyxy, both ends inclusive: [4]."""
    top, left, height, width = crop
    return np.array([left, top, left + width - 1, top + height - 1])


def overlapping(boxes: Boxes, region: np.ndarray) -> np.ndarray:
    """Which boxes intersect a region (xyxy inclusive [4]), however little: bool [n]."""
    top_left = np.maximum(boxes.corners[:, :2], region[:2])
    return (np.minimum(boxes.corners[:, 2:], region[2:]) > top_left).all(axis=1)


def jitter_boxes(boxes: Boxes, draws: np.ndarray) -> Boxes:
    """Moves boxes by `draws` [n, 4]: shifts in x and y, growth of width and height, relative to the box's size."""
    corners = boxes.corners.astype(np.float64)
    size = corners[:, 2:] - corners[:, :2] + 1
    top_left = corners[:, :2] + draws[:, :2] * size
    return Boxes(np.concatenate([top_left, top_left + size * (1 + draws[:, 2:]) - 1], axis=1), boxes.ids)


def draw_jitter(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws for [`jitter_boxes`], [count, 4]: half of the boxes stay as they are."""
    is_moved = rng.random(count) < JITTER_PROBABILITY
    return rng.uniform(-JITTER_RATIO, JITTER_RATIO, size=(count, 4)) * is_moved[:, None]


def clip_boxes(boxes: Boxes, crop: Crop) -> Boxes:
    """
    Boxes of an image in pixels of a crop (top, left, height, width), clipped to it. Those outside are dropped; if none
    is left, a box of the whole crop takes their place.
    """
    region = crop_corners(crop)
    shown = boxes.take(overlapping(boxes, region))
    if len(shown) == 0:
        return Boxes(np.array([[0, 0, crop[3] - 1, crop[2] - 1]]), np.array([WHOLE_VIEW]))
    low, high = np.tile(region[:2], 2), np.tile(region[2:], 2)
    return Boxes(np.clip(shown.corners, low, high) - low, shown.ids)


def pad_boxes(boxes: Boxes, other: Boxes, count: int, rng: np.random.Generator) -> Boxes:
    """Fills up to `count` with copies of random boxes whose ids `other` has as well (of any if there are none)."""
    common = np.flatnonzero(np.isin(boxes.ids, other.ids))
    pool = common if len(common) else np.arange(len(boxes))
    copies = rng.choice(pool, max(0, count - len(boxes)))
    return boxes.take(np.concatenate([np.arange(len(boxes)), copies]))


def scale_boxes(boxes: Boxes, crop: Crop, size: int) -> Boxes:
    """Boxes in pixels of a crop -> in pixels of the view, `size` on both sides, that it is resized to."""
    return Boxes(boxes.corners / (crop[3], crop[2], crop[3], crop[2]) * size, boxes.ids)


def assign_levels(boxes: Boxes, level_sizes: Sequence[float]) -> np.ndarray:
    """
    The pyramid level of each box: the first one for boxes of its size.

    Args:
        boxes ([`Boxes`]): In pixels of the view. Corners are cut to whole pixels first.
        level_sizes (`Sequence[float]`): Largest size for each level, ascending, in pixels: the root of the area.

    Returns:
        `np.ndarray` int64 [n]: Levels from 0; -1 for boxes that are too large for the last.
    """
    corners = boxes.corners.astype(np.int64)
    width, height = (corners[:, 2:] - corners[:, :2] + 1).T
    levels = np.searchsorted(np.asarray(level_sizes), np.sqrt(width * height), side="left")
    return np.where(levels < len(level_sizes), levels, -1)


def relative_corners(boxes: Boxes, crop: Crop) -> np.ndarray:
    """Boxes in pixels of a crop -> xyxy relative to it, 0 to 1, the far ends exclusive: float32 [n, 4]."""
    corners = boxes.corners + [0, 0, 1, 1]
    return (corners / (crop[3], crop[2], crop[3], crop[2])).astype(np.float32)


def flip_corners(corners: np.ndarray) -> np.ndarray:
    """Mirrors relative corners xyxy [n, 4] left to right."""
    return np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)


# ---- draws ----


def draw_resized_crop(height: int, width: int, rng: np.random.Generator, scale: tuple[float, float]) -> Crop:
    """
    Draws a crop (top, left, height, width) of `scale` times the image's area whose *own* aspect ratio lies between 3/4
    and 4/3, as torchvision's RandomResizedCrop: after ten draws that do not fit, the largest one in the middle.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(low), np.log(high)))
        crop_width, crop_height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_width, crop_height = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def draw_shared_boxes(
    proposals: Boxes,
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    count: int,
    num_crops: int,
    scale: tuple[float, float],
    at_random: bool = True,
) -> list[tuple[Crop, Boxes, Boxes]]:
    """
    Draws crops and, for each, `count` boxes that it shares with the whole image.

    Up to five times, until every crop has half of the boxes; each time that half is halved. The last draw is taken
    anyway. Missing boxes are made up for by copies.

    Args:
        proposals ([`Boxes`]): Of the image.
        height, width (`int`): Of the image in pixels.
        count (`int`): Boxes per crop.
        num_crops (`int`): Number of crops.
        scale (`tuple[float, float]`): Range of a crop's area relative to the image's.
        at_random (`bool`, *optional*, defaults to `True`): Whether to draw the boxes; if not, the first ones.

    Returns:
        `list[tuple]`: each crop (top, left, height, width), its boxes in pixels of the whole image, jittered, and in
            pixels of the crop.
    """
    whole, needed = (0, 0, height, width), max(1, count // 2)
    for _ in range(MAX_TRIES):
        crops = [draw_resized_crop(height, width, rng, scale) for _ in range(num_crops)]
        chosen = []
        for crop in crops:
            # What the whole image and a crop share is the crop.
            rows = np.flatnonzero(overlapping(proposals, crop_corners(crop)))
            if at_random and len(rows) > count:
                rows = rng.choice(rows, count, replace=False)
            chosen.append(proposals.take(rows[:count]))
        if min(map(len, chosen)) >= needed:
            break
        needed = max(1, needed // 2)
    found = []
    for crop, boxes in zip(crops, chosen, strict=True):
        in_image = clip_boxes(jitter_boxes(boxes, draw_jitter(len(boxes), rng)), whole)
        in_crop = clip_boxes(boxes, crop)
        found.append((crop, pad_boxes(in_image, in_crop, count, rng), pad_boxes(in_crop, in_image, count, rng)))
    return found


# ---- images ----


def draw_color(image: np.ndarray, rng: np.random.Generator, is_first: bool) -> np.ndarray:
    """
    BYOL's colours (Grill et al., 2020) with SoCo's numbers: brightness, contrast, saturation and hue of four images in
    five, every fifth grey, always blurred in the first view, seldom blurred or solarised in the others.
    """
    if rng.random() < 0.8:
        operations = [
            (adjust_brightness, rng.uniform(0.6, 1.4)),
            (adjust_contrast, rng.uniform(0.6, 1.4)),
            (adjust_color, rng.uniform(0.8, 1.2)),
            (adjust_hue, rng.uniform(-0.1, 0.1)),
        ]
        for index in rng.permutation(4):
            operation, value = operations[index]
            image = operation(image, value)
    if rng.random() < 0.2:
        image = adjust_color(image, 0.0)
    if rng.random() < (1.0 if is_first else 0.1):
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, 2.0))
    if not is_first and rng.random() < 0.2:
        image = solarize(image, 128)
    return image


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the hue by `shift` of the whole circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(shift * 256) % 256)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def make_soco_view(
    image: np.ndarray, crop: Crop, size: int, rng: np.random.Generator, *, flip: bool, color: str
) -> np.ndarray:
    """
    One view of an image [H, W, 3] uint8: cropped (top, left, height, width), resized to `size` on both sides, flipped
    if told to, and coloured as the `"first"` view, as one of the `"others"` or not at all (`"none"`).
    """
    top, left, height, width = crop
    view = resize_image(image[top : top + height, left : left + width], size, size)
    if flip:
        view = cv2.flip(view, 1)
    if color != "none":
        view = draw_color(view, rng, color == "first")
    return np.ascontiguousarray(view)
