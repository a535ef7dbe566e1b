"""Selective search (Uijlings et al. 2013) as OpenCV implements it, with an order of our own.

OpenCV returns a deterministic *set* of boxes in an order that is neither reproducible (it multiplies by C `rand()`)
nor useful (the smallest fragments come first). Only the set is used here.
"""

import numpy as np

from .filters import select_proposals, unique_boxes

# What OpenCV calls them.
MODES = {
    "single": "switchToSingleStrategy",
    "fast": "switchToSelectiveSearchFast",
    "quality": "switchToSelectiveSearchQuality",
}

# The texture measure rotates the image by 45 degrees, so time grows with the square of the longer side.
_MAX_SIDES_RATIO = 5

# Chosen among 0.6, 0.7, 0.75 and 0.8 by the average recall of the first 50 boxes on photographs and on blood cells.
_AGREEMENT_IOU = 0.75


def opencv_selective_search(
    image: np.ndarray, mode: str = "fast", short_side: int = 200, **selection
) -> tuple[np.ndarray, np.ndarray]:
    """
    Proposes boxes by selective search: the same boxes in the same order on every run, thread count and platform.

    Args:
        image (`np.ndarray` of shape `[H, W, 3]`): RGB image, uint8.
        mode (`str`, *optional*, defaults to `"fast"`):
            `"single"` (1 hierarchy of regions), `"fast"` (12) or `"quality"` (100; about four times slower).
        short_side (`int`, *optional*, defaults to 200):
            The search runs on a copy with this shorter side in pixels (longer side at most five times that); more
            pixels cost more time and put fragments first without finding more objects among the first 100 boxes.
        **selection:
            Filters, NMS threshold and number of boxes, see [`select_indices`].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Boxes float32 `[N, 4]`, absolute `xywh` in pixels of `image`, and scores
        float32 `[N]`, best first; see [`agreement_scores`]. An image without structure yields its whole area or no
        box at all.

    Raises:
        `ValueError`: If the image or the mode is not as described.
        `ImportError`: If OpenCV is missing or was installed without its contrib modules.
    """
    image = np.asarray(image)
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}: expected one of {', '.join(MODES)}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"Expected an RGB image, uint8 of shape [H, W, 3], got {image.dtype} {list(image.shape)}.")
    cv2 = import_opencv()

    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), _MAX_SIDES_RATIO * short_side / max(height, width))
    small_width, small_height = max(1, round(width * scale)), max(1, round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(image, (small_width, small_height), interpolation=interpolation)

    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    getattr(search, MODES[mode])()
    boxes = unique_boxes(search.process())

    scores = agreement_scores(boxes)
    resolution = np.array([small_width, small_height] * 2)
    boxes = np.clip(boxes, 0, resolution) * (np.array([width, height] * 2) / resolution)
    return select_proposals(boxes, scores, (height, width), **selection)


def agreement_scores(boxes: np.ndarray) -> np.ndarray:
    """
    Scores boxes by how many others agree with them.

    Selective search groups the same image in many ways; a region with a clear boundary appears, nearly the same, in
    many of them, a fragment in few. Equal counts are ordered by a hash of the coordinates: as good as random, and
    reproducible anywhere.

    Args:
        boxes (`np.ndarray` of shape `[N, 4]`): Distinct boxes, absolute `xywh` in whole pixels.

    Returns:
        `np.ndarray` of shape `[N]`: Number of boxes, the box itself included, that overlap it so much, plus a fraction
        in `[0, 1)` from the hash; float32.
    """
    boxes = np.asarray(boxes).reshape(-1, 4)
    x, y, width, height = boxes.T.astype(np.float32)
    area = width * height
    counts = np.zeros(len(boxes), dtype=np.int64)
    # In slices of rows: the "quality" mode at high resolution has 10,000 boxes.
    for rows in np.array_split(np.arange(len(boxes)), len(boxes) // 256 + 1):
        x_overlap = np.minimum.outer((x + width)[rows], x + width) - np.maximum.outer(x[rows], x)
        y_overlap = np.minimum.outer((y + height)[rows], y + height) - np.maximum.outer(y[rows], y)
        intersection = x_overlap.clip(min=0) * y_overlap.clip(min=0)
        union = np.add.outer(area[rows], area) - intersection
        counts[rows] = (intersection >= _AGREEMENT_IOU * union).sum(axis=1)
    return (counts + _hash_fractions(boxes)).astype(np.float32)


def _hash_fractions(boxes: np.ndarray) -> np.ndarray:
    """Maps integer boxes `[N, 4]` to pseudo-random numbers in [0, 1) `[N]` with the finaliser of SplitMix64."""
    state = np.zeros(len(boxes), dtype=np.uint64)
    for column in boxes.T.astype(np.uint64):
        state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    # 10 bits: exact in float32 together with a count below 16,384.
    return (state >> np.uint64(54)) / 1024


def import_opencv():
    """
    Imports OpenCV with its contrib modules.

    Raises:
        `ImportError`: If OpenCV has no selective search; it says how to install one that has it.
    """
    import cv2

    # The function itself: where another package has overwritten the files of contrib, empty modules may be left.
    segmentation = getattr(getattr(cv2, "ximgproc", None), "segmentation", None)
    if not hasattr(segmentation, "createSelectiveSearchSegmentation"):
        raise ImportError(
            f"This OpenCV ({cv2.__version__}) has no selective search, which is in its contrib modules: pip install "
            "'aligndet-hf[opencv]'. OpenCV's packages overwrite each other; if it is there already, put its files "
            "back: pip install --force-reinstall --no-deps opencv-contrib-python-headless. The selective search of "
            "this package, --source selective_search, needs none of them."
        )
    return cv2
