"""Augmentations that make few labelled images go further: of one image, or of several put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from .masks import cut_regions, draw_regions, move_regions, with_regions

MIN_VISIBLE = 0.3  # share of a box that has to stay visible, or the box is dropped
MAX_HIDDEN = 0.3  # share of a box that a pasted object may hide
_GREY = 114  # what canvases are filled with, as in the YOLO line


@dataclass(frozen=True)
class Sample:
    """
    An image with its objects.

    Attributes:
        image (`np.ndarray`): RGB uint8 [height, width, 3].
        boxes (`np.ndarray`): float32 [n, 4], xywh in pixels of the image.
        classes (`np.ndarray`): [n], what each box is: int64 classes, or rows of whatever else belongs to a box.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """
    A row of [`AUGMENTATIONS`].

    Attributes:
        function (`Callable`): `(sample, others, rng) -> sample`; never changes its arguments.
        others (`int`): How many further samples it takes, drawn at random from the data set.
    """

    function: Callable[[Sample, Sequence[Sample], np.random.Generator], Sample]
    others: int = 0


def zoom_out(sample: Sample, others: Sequence[Sample], rng: np.random.Generator, largest: float = 3.0) -> Sample:
    """Places the image somewhere on a canvas of up to `largest` times its sides (SSD, Liu et al. 2016)."""
    height, width = sample.image.shape[:2]
    ratio = rng.uniform(1.0, largest)
    canvas = _canvas(round(height * ratio), round(width * ratio))
    top, left = (int(rng.integers(0, room + 1)) for room in (canvas.shape[0] - height, canvas.shape[1] - width))
    canvas[top : top + height, left : left + width] = sample.image
    return Sample(canvas, _shifted(sample.boxes, left, top), move_regions(sample.classes, [[1, 0, left], [0, 1, top]]))


def mosaic(sample: Sample, others: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """
    Puts four images around a random centre (YOLOv4, Bochkovskiy et al. 2020) on a canvas of the first image's size.

    Each image fills its quarter at its own aspect ratio and is cut off at the canvas' edges, so that objects become
    smaller and meet other surroundings.
    """
    height, width = sample.image.shape[:2]
    middle_y, middle_x = (round(side * rng.uniform(0.35, 0.65)) for side in (height, width))
    canvas, boxes, classes = _canvas(height, width), [], []
    for place, part in enumerate((sample, *others)):
        below, right = divmod(place, 2)
        room = (height - middle_y if below else middle_y, width - middle_x if right else middle_x)
        scale = max(room[0] / part.image.shape[0], room[1] / part.image.shape[1])
        image, part_boxes, rows = _scaled(part, scale)
        # The corner that touches the centre stays, whatever sticks out is cut off.
        top = middle_y if below else middle_y - image.shape[0]
        left = middle_x if right else middle_x - image.shape[1]
        window = (max(top, 0), max(left, 0), min(top + image.shape[0], height), min(left + image.shape[1], width))
        canvas[window[0] : window[2], window[1] : window[3]] = image[
            window[0] - top : window[2] - top, window[1] - left : window[3] - left
        ]
        part_boxes, kept = _clipped(_shifted(part_boxes, left, top), window)
        boxes.append(part_boxes)
        visible = np.array([window[1], window[0], window[3] - window[1], window[2] - window[0]])
        classes.append(cut_regions(move_regions(rows[kept], [[1, 0, left], [0, 1, top]]), visible))
    return Sample(canvas, np.concatenate(boxes), np.concatenate(classes))


def mixup(sample: Sample, others: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Blends the image with another one, about half and half, and keeps the objects of both (Zhang et al. 2019)."""
    (other,) = others
    height, width = sample.image.shape[:2]
    scale = min(height / other.image.shape[0], width / other.image.shape[1])
    image, boxes, rows = _scaled(other, scale)
    share = rng.beta(8.0, 8.0)
    blended = sample.image.copy()
    part = blended[: image.shape[0], : image.shape[1]]
    part[:] = cv2.addWeighted(part, 1 - share, image[: part.shape[0], : part.shape[1]], share, 0)
    boxes, kept = _clipped(boxes, (0, 0, height, width))
    return Sample(blended, np.concatenate([sample.boxes, boxes]), np.concatenate([sample.classes, rows[kept]]))


def copy_paste(sample: Sample, others: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """
    Pastes the boxes of another image's objects where they hide little of what is there (Dwibedi et al. 2017).

    Labels of detection seldom have masks, so that whole rectangles are pasted, with blurred edges.
    """
    (other,) = others
    image, boxes, classes = sample.image.copy(), list(sample.boxes), sample.classes
    height, width = image.shape[:2]
    for row, box in enumerate(other.boxes):
        x, y, w, h = (int(round(value)) for value in box)
        x, y = max(x, 0), max(y, 0)
        patch = other.image[y : y + h, x : x + w]
        scale = rng.uniform(0.7, 1.3)
        h, w = (round(side * scale) for side in patch.shape[:2])
        if not (2 < h < height and 2 < w < width):
            continue
        top, left = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
        place = np.array([left, top, w, h], np.float32)
        if len(boxes) and _hidden(np.stack(boxes), place).max() > MAX_HIDDEN:
            continue
        across, down = w / patch.shape[1], h / patch.shape[0]
        pasted = move_regions(
            other.classes[row : row + 1], [[across, 0, left - x * across], [0, down, top - y * down]]
        )
        classes = np.concatenate([cut_regions(classes, place, inside=False), cut_regions(pasted, place)])
        patch = cv2.resize(patch, (w, h), interpolation=cv2.INTER_LINEAR)
        soft = cv2.GaussianBlur(np.pad(np.ones((h - 2, w - 2), np.float32), 1), (3, 3), 0)[..., None]
        window = image[top : top + h, left : left + w]
        window[:] = np.rint(soft * patch + (1 - soft) * window).astype(np.uint8)
        boxes.append(place)
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), classes)


def rotate(sample: Sample, others: Sequence[Sample], rng: np.random.Generator, degrees: float = 10.0) -> Sample:
    """
    Turns the image by a small angle around its centre.

    A box becomes the smallest upright one around the ellipse in the turned box, which is tighter than the one around
    its corners and right for round objects.
    """
    height, width = sample.image.shape[:2]
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), np.rad2deg(angle), 1.0)
    image = cv2.warpAffine(sample.image, matrix, (width, height), borderValue=(_GREY, _GREY, _GREY))
    half = sample.boxes[:, 2:] / 2
    centres = (sample.boxes[:, :2] + half) @ matrix[:, :2].T + matrix[:, 2]
    cos, sin = np.cos(angle), np.sin(angle)
    extent = np.sqrt(half**2 @ np.array([[cos**2, sin**2], [sin**2, cos**2]]))
    boxes, kept = _clipped(np.concatenate([centres - extent, 2 * extent], axis=1), (0, 0, height, width))
    return Sample(image, boxes, move_regions(sample.classes[kept], matrix))


def quarter_turn(sample: Sample, others: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Turns the image by 90, 180 or 270 degrees: for images that have no upright, from above or a microscope."""
    image, boxes, classes = sample.image, sample.boxes, sample.classes
    for _ in range(int(rng.integers(1, 4))):
        x, y, w, h = boxes.T
        boxes = np.stack([y, image.shape[1] - x - w, h, w], axis=1)  # counter-clockwise, as np.rot90
        classes = move_regions(classes, [[0, 1, 0], [-1, 0, image.shape[1]]])
        image = np.rot90(image)
    return Sample(np.ascontiguousarray(image), boxes.astype(np.float32), classes)


def photometric(sample: Sample, others: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """Changes brightness, contrast, saturation and hue (SSD's distortion, as RT-DETR and D-FINE publish it)."""
    from torchvision.transforms import v2

    # The regions stay where they are, and need not be drawn.
    changed = apply_transform(
        v2.RandomPhotometricDistort(p=0.8), replace(sample, classes=np.arange(len(sample.boxes))), rng
    )
    return replace(changed, classes=sample.classes[changed.classes])


# Name and function. A new one is a row here; its name is what `--augmentations` takes.
AUGMENTATIONS: dict[str, Augmentation] = {
    "mosaic": Augmentation(mosaic, others=3),
    "mixup": Augmentation(mixup, others=1),
    "copy_paste": Augmentation(copy_paste, others=1),
    "zoom_out": Augmentation(zoom_out),
    "rotate": Augmentation(rotate),
    "quarter_turn": Augmentation(quarter_turn),
    "photometric": Augmentation(photometric),
}


def apply_transform(transform: Callable, sample: Sample, rng: np.random.Generator) -> Sample:
    """
    Applies a transform of `torchvision.transforms.v2`, or any callable of the same form, to a sample.

    Its random numbers follow from `rng` alone, so that resumed runs see what uninterrupted ones see.

    Args:
        transform (`Callable`):
            Takes and returns `(image, target)`: `tv_tensors.Image` uint8 [3, h, w], and a dictionary of `boxes`
            (`tv_tensors.BoundingBoxes` in xywh), `labels` (int64 [n]) and, where masks are trained and all objects
            have one, `masks` (`tv_tensors.Mask` uint8 [n, h, w]). Without `masks` in what it returns the sample has
            none.
        sample ([`Sample`]): The image and its objects.
        rng (`np.random.Generator`): The source of the transform's seed.

    Returns:
        [`Sample`]

    Raises:
        TypeError: the transform fails, or does not return an image and a target with as many labels as boxes.
    """
    from torchvision import tv_tensors
    from torchvision.transforms.v2.functional import convert_bounding_box_format

    height, width = sample.image.shape[:2]
    image = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1))
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(sample.boxes.astype(np.float32)), format="XYWH", canvas_size=(height, width)
    )
    # The labels are row numbers here: a transform may drop boxes, but does not care what labels say.
    target = {"boxes": boxes, "labels": torch.arange(len(boxes))}
    if (masks := draw_regions(sample.classes, height, width)) is not None:
        target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        try:
            result = transform(image, target)
        except Exception as error:  # of somebody's code
            raise TypeError(
                "the transform is called with an image and {'boxes': ..., 'labels': ...}, as "
                "torchvision.transforms.v2 has it; put one that takes something else, as of albumentations, into a "
                f"function. It raised {type(error).__name__}: {error}"
            ) from error
    try:
        image, target = result
        boxes = convert_bounding_box_format(target["boxes"], new_format="XYWH")
        labels, masks = target["labels"], target.get("masks")
        if masks is not None and tuple(masks.shape) != (len(boxes), *image.shape[-2:]):
            raise ValueError(f"{len(boxes)} boxes, masks {tuple(masks.shape)}, image {tuple(image.shape)}")
        if len(labels) != len(boxes) or image.dtype != torch.uint8 or image.ndim != 3:
            raise ValueError(f"{len(boxes)} boxes, {len(labels)} labels, image {image.dtype} {tuple(image.shape)}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TypeError(
            "the transform must return (image, {'boxes': ..., 'labels': ...}) with a uint8 image [3, h, w] and one "
            f"label for each box, as the transforms of torchvision.transforms.v2 do; it returned {error}"
        ) from error
    image = np.ascontiguousarray(torch.as_tensor(image).permute(1, 2, 0).numpy())
    boxes, kept = _clipped(torch.as_tensor(boxes).numpy().astype(np.float32), (0, 0, *image.shape[:2]))
    rows = sample.classes[labels.numpy()[kept]]
    return Sample(image, boxes, with_regions(rows, None if masks is None else torch.as_tensor(masks).numpy()[kept]))


def _canvas(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _GREY, dtype=np.uint8)


def _shifted(boxes: np.ndarray, x: float, y: float) -> np.ndarray:
    return boxes + np.array([x, y, 0, 0], dtype=boxes.dtype)


def _scaled(sample: Sample, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image, its boxes and what belongs to them, resized by one factor."""
    height, width = sample.image.shape[:2]
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(sample.image, (new_width, new_height), interpolation=method)
    across, down = new_width / width, new_height / height
    boxes = sample.boxes * np.tile(np.float32([across, down]), 2)
    return image, boxes, move_regions(sample.classes, [[across, 0, 0], [0, down, 0]])


def _clipped(boxes: np.ndarray, window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes cut off at a window (top, left, bottom, right), without boxes that too little is left of; their rows."""
    top, left, bottom, right = window
    first = np.clip(boxes[:, :2], (left, top), (right, bottom))
    last = np.clip(boxes[:, :2] + boxes[:, 2:], (left, top), (right, bottom))
    cut = np.concatenate([first, last - first], axis=1).astype(np.float32)
    visible = cut[:, 2:].prod(axis=1) >= MIN_VISIBLE * np.maximum(boxes[:, 2:].prod(axis=1), 1e-6)
    kept = np.flatnonzero(visible & (cut[:, 2:] > 1).all(axis=1))
    return cut[kept], kept


def _hidden(boxes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The share of each box that `place` (both xywh) covers."""
    first = np.maximum(boxes[:, :2], place[:2])
    last = np.minimum(boxes[:, :2] + boxes[:, 2:], place[:2] + place[2:])
    return np.clip(last - first, 0, None).prod(axis=1) / np.maximum(boxes[:, 2:].prod(axis=1), 1e-6)
