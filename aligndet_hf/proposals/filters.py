"""Which proposals to keep: shape and size filters, duplicates, non-maximum suppression.

Boxes are absolute `xywh` pixels everywhere in this package's proposal code.
"""

import re

import numpy as np

_STRATEGY = re.compile(r"(?:ratio(?P<ratio>\d+))?(?:size(?P<low>\d\d)(?P<high>\d\d)?)?(?P<post>post)?")


def filter_proposals(
    boxes: np.ndarray,
    image_size: tuple[int, int],
    max_aspect_ratio: float = 3.0,
    min_side: float = 0,
    min_relative_size: float = 0.0,
    max_relative_size: float = 1.0,
    relax_if_empty: bool = False,
    max_borders: int = 4,
) -> np.ndarray:
    """
    Says which boxes have an object-like shape and size.

    Args:
        boxes (`np.ndarray` of shape `[N, 4]`): Boxes, absolute `xywh` in pixels.
        image_size (`tuple[int, int]`): `(height, width)` of the image in the same pixels.
        max_aspect_ratio (`float`, *optional*, defaults to 3.0):
            Longer side over shorter side may be at most this; `float("inf")` for any shape.
        min_side (`float`, *optional*, defaults to 0): Smallest width and height in pixels.
        min_relative_size (`float`, *optional*, defaults to 0.0):
            Lower bound of `sqrt(w * h) / sqrt(W * H)`, the size relative to the image.
        max_relative_size (`float`, *optional*, defaults to 1.0): Upper bound of the relative size.
        relax_if_empty (`bool`, *optional*, defaults to `False`):
            When no box passes, drop the bounds of size and borders; if still none passes, the aspect ratio too.
            `min_side` always holds, so an image may still end up without boxes. SoCo's "post" rule.
        max_borders (`int`, *optional*, defaults to 4):
            Borders of the image that a box may touch, see [`borders_touched`]: what touches two or more is more often
            ground than object.

    Returns:
        `np.ndarray` of shape `[N]`: Boolean mask of the boxes to keep. All bounds are inclusive; boxes without an area
        are never kept.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    width, height = boxes[:, 2], boxes[:, 3]
    large_enough = (width > 0) & (height > 0) & (width >= min_side) & (height >= min_side)
    shape_fits = np.maximum(width, height) <= max_aspect_ratio * np.minimum(width, height)
    # Written as SoCo does: the rounding of the two roots decides for boxes exactly on a bound.
    relative_size = np.sqrt(np.maximum(width * height, 0)) / np.sqrt(image_size[0] * image_size[1])
    size_fits = (min_relative_size <= relative_size) & (relative_size <= max_relative_size)
    keep = large_enough & shape_fits & size_fits & (borders_touched(boxes, image_size) <= max_borders)
    for relaxed in (large_enough & shape_fits, large_enough):
        if relax_if_empty and not keep.any():
            keep = relaxed
    return keep


def borders_touched(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """
    How many of the four borders of the image a box comes close to: 0.5 % of the image's width or height.

    Args:
        boxes (`np.ndarray` of shape `[N, 4]`): Boxes, absolute `xywh` in pixels.
        image_size (`tuple[int, int]`): `(height, width)` of the image in the same pixels.

    Returns:
        `np.ndarray` of shape `[N]`: 0 to 4.
    """
    size = np.array(image_size[::-1])
    margin = size / 200
    starts, ends = boxes[:, :2] <= margin, boxes[:, :2] + boxes[:, 2:] >= size - margin
    return starts.sum(axis=1) + ends.sum(axis=1)


def parse_strategy(strategy: str) -> dict:
    """
    Translates the filter names of SoCo and AlignDet, such as `"ratio3size0308post"`, into arguments.

    `ratioR` bounds the aspect ratio; the digits of `size` are the lower and upper relative size in tenths (`size0308`:
    0.3 to 0.8, `size03`: from 0.3); `post` relaxes the bounds for images left empty; `none` filters by side only. Both
    sides must always be at least 32 pixels, as in SoCo's code.

    Args:
        strategy (`str`): The name.

    Returns:
        `dict`: Keyword arguments of [`filter_proposals`].

    Raises:
        `ValueError`: If the name does not follow the pattern.
    """
    match = _STRATEGY.fullmatch("" if strategy == "none" else strategy)
    if match is None or not strategy:
        raise ValueError(
            f"Unknown filter strategy {strategy!r}: expected 'none' or a name like 'ratio3', 'size03' or "
            "'ratio3size0308post'."
        )
    return {
        "max_aspect_ratio": float(match["ratio"] or "inf"),
        "min_side": 32,
        "min_relative_size": int(match["low"] or 0) / 10,
        "max_relative_size": int(match["high"] or 10) / 10,
        "relax_if_empty": match["post"] is not None,
    }


def unique_boxes(boxes: np.ndarray) -> np.ndarray:
    """
    Sorts boxes by their coordinates and drops exact duplicates, so that the result depends on the set only.

    Args:
        boxes (`np.ndarray` of shape `[N, 4]`): Boxes in any format and order.

    Returns:
        `np.ndarray` of shape `[M, 4]`: The distinct boxes, ascending by the first coordinate, then the second ...
    """
    return np.unique(np.asarray(boxes).reshape(-1, 4), axis=0)


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    Intersection over union of one box or several with others.

    Args:
        boxes (`np.ndarray` of shape `[4]` or `[N, 4]`): Boxes, absolute `xywh`.
        others (`np.ndarray` of shape `[M, 4]`): Boxes, absolute `xywh`.

    Returns:
        `np.ndarray` of shape `[M]` or `[N, M]`: IoU, 0 where neither box has an area.
    """
    boxes = boxes[..., None, :]
    left_top = np.maximum(boxes[..., :2], others[:, :2])
    right_bottom = np.minimum(boxes[..., :2] + boxes[..., 2:], others[:, :2] + others[:, 2:])
    intersection = (right_bottom - left_top).clip(min=0).prod(axis=-1)
    union = boxes[..., 2] * boxes[..., 3] + others[:, 2] * others[:, 3] - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).tiny)


def nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, max_boxes: int | None = None) -> np.ndarray:
    """
    Greedy non-maximum suppression.

    Args:
        boxes (`np.ndarray` of shape `[N, 4]`): Boxes, absolute `xywh`.
        scores (`np.ndarray` of shape `[N]`): Higher is better; of equal scores the earlier box wins.
        threshold (`float`): A box goes when its IoU with a better, kept one is above this.
        max_boxes (`int`, *optional*): Stop after this many.

    Returns:
        `np.ndarray` of shape `[K]`: Indices of the kept boxes, best first.
    """
    from .kernels import suppress  # numba takes a moment to import

    boxes = np.ascontiguousarray(boxes, dtype=np.float64).reshape(-1, 4)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    return suppress(boxes, order, float(threshold), len(boxes) if max_boxes is None else max_boxes)


def select_indices(
    boxes: np.ndarray,
    scores: np.ndarray,
    image_size: tuple[int, int],
    *,
    nms_threshold: float = 0.7,
    max_boxes: int | None = 300,
    **filters,
) -> np.ndarray:
    """
    Filters scored boxes, removes near duplicates and keeps the best.

    Args:
        boxes (`np.ndarray` of shape `[N, 4]`): Boxes, absolute `xywh` in pixels.
        scores (`np.ndarray` of shape `[N]`): Higher is better.
        image_size (`tuple[int, int]`): `(height, width)` of the image in the same pixels.
        nms_threshold (`float`, *optional*, defaults to 0.7): See [`nms`]; 1.0 keeps all.
        max_boxes (`int`, *optional*, defaults to 300): Keep at most this many; `None` for all.
        filters: See [`filter_proposals`]; by default `min_relative_size=0.04` and `relax_if_empty=True`.

    Returns:
        `np.ndarray` of shape `[K]`: Indices of the kept boxes, best first.
    """
    boxes = np.asarray(boxes).reshape(-1, 4)
    filters = {"min_relative_size": 0.04, "relax_if_empty": True} | filters
    passed = np.flatnonzero(filter_proposals(boxes, image_size, **filters))
    # In the precision in which boxes are stored: what is kept does not change when the result is filtered again.
    boxes, scores = boxes[passed].astype(np.float32), np.asarray(scores)[passed].astype(np.float32)
    return passed[nms(boxes, scores, nms_threshold, max_boxes)]


def select_proposals(
    boxes: np.ndarray, scores: np.ndarray, image_size: tuple[int, int], **selection
) -> tuple[np.ndarray, np.ndarray]:
    """
    [`select_indices`], applied: the boxes float32 `[K, 4]` and scores float32 `[K]` that are kept, best first.

    Args:
        boxes, scores, image_size, **selection: See [`select_indices`].
    """
    kept = select_indices(boxes, scores, image_size, **selection)
    return np.asarray(boxes, dtype=np.float32).reshape(-1, 4)[kept], np.asarray(scores, dtype=np.float32)[kept]
