"""
Tiles: a detector looks at overlapping parts of a large image, and what it finds there becomes one list.

The idea is SAHI's (Akyon et al., ICIP 2022): an object that is a few pixels large once the whole image has been
made small for the detector is large enough in a tile. Boxes are `xyxy` in pixels here.
"""

import numpy as np

_MARGIN = 0.01  # a box this near to an edge, in sides of the view, ends there


def tile_corners(height: int, width: int, tile_size: int, overlap: float = 0.2) -> np.ndarray:
    """
    Covers an image with square tiles, evenly spaced.

    Args:
        height, width (`int`): Size of the image in pixels.
        tile_size (`int`): Side of a tile in pixels. Where the image is smaller, the tile is as well.
        overlap (`float`, *optional*, defaults to 0.2): The least share of its side that a tile has in common with the
            next one, 0 to below 1.

    Returns:
        `np.ndarray`: int64 `[n, 4]`, xyxy; row by row.
    """
    lefts, tops = (_starts(length, tile_size, overlap) for length in (width, height))
    return np.array(
        [(x, y, min(x + tile_size, width), min(y + tile_size, height)) for y in tops for x in lefts], dtype=np.int64
    )


def _starts(length: int, tile_size: int, overlap: float) -> list[int]:
    """Where tiles begin along a side: as few as cover it, the last one ending where the side ends."""
    if length <= tile_size:
        return [0]
    step = max(1, int(tile_size * (1 - overlap)))
    count = 1 + -(-(length - tile_size) // step)
    return np.linspace(0, length - tile_size, count).round().astype(int).tolist()


def merge_views(
    views: list[dict[str, np.ndarray]],
    corners: np.ndarray,
    size: tuple[int, int],
    iou_threshold: float = 0.5,
) -> dict[str, np.ndarray]:
    """
    Joins what a detector found in several views of an image: tiles that overlap and, if it is one of them, the whole.

    Of two boxes of one class from different views that show the same object one stays. A box that ends at an edge of
    its tile inside the image may show a part of an object only. Such boxes come last, and give way to any box that
    holds more than `iou_threshold` of them; others give way to a box with more than this IoU and a higher score. Boxes
    of one view never remove each other: that is the detector's own business.

    Args:
        views (`list[dict]`): Per view `boxes` (`[n, 4]`, xyxy in pixels of the view), `scores` and `labels` (`[n]`),
            and whatever else there is one of for each box.
        corners (`np.ndarray`): `[views, 4]`, xyxy: where the views lie in the image.
        size (`tuple[int, int]`): Height and width of the image.
        iou_threshold (`float`, *optional*, defaults to 0.5): See above.

    Returns:
        `dict`: `boxes` (xyxy in pixels of the image), `scores`, `labels` and the rest, best scores first.
    """
    found = {name: np.concatenate([view[name] for view in views]) for name in views[0]}
    owner = np.repeat(np.arange(len(views)), [len(view["scores"]) for view in views])
    height, width = size
    bounds = corners[owner].astype(np.float32)
    inner = bounds[:, :2] > 0, bounds[:, 2:] < (width, height)
    low, high = found["boxes"][:, :2], found["boxes"][:, 2:]
    sides = bounds[:, 2:] - bounds[:, :2]
    is_cut = ((low <= _MARGIN * sides) & inner[0] | (high >= (1 - _MARGIN) * sides) & inner[1]).any(axis=1)
    boxes = found["boxes"] + np.tile(bounds[:, :2], 2)
    order = np.lexsort((-found["scores"], is_cut))
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        inside, union = _overlaps(boxes[best], boxes[order])
        area = np.prod(np.clip(boxes[order, 2:] - boxes[order, :2], 0, None), axis=1)
        share = inside / np.maximum(np.where(is_cut[order], area, union), 1e-9)
        same = (found["labels"][order] == found["labels"][best]) & (owner[order] != owner[best])
        order = order[~(same & (share > iou_threshold))]
    kept = np.array(sorted(kept, key=lambda index: -found["scores"][index]), dtype=np.int64)
    return {name: values[kept] for name, values in (found | {"boxes": boxes}).items()}


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas of the intersection and of the union of a box `[4]` with others `[n, 4]`."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    inside = np.prod(np.clip(sides, 0, None), axis=1)
    areas = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    return inside, areas + np.prod(np.clip(box[2:] - box[:2], 0, None)) - inside
