"""How many objects the proposals find: recall and average recall of the first k boxes, by size of the object."""

from collections.abc import Iterable

import numpy as np

from ..proposals.filters import box_iou

# pycocotools' thresholds: .50:.05:.95
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
LIMITS = (10, 50, 100, 300, 1000)

# Bounds of the area in pixels, inclusive on both sides as in pycocotools.
AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
# Bounds of sqrt(area of the object / area of the image), the lower one inclusive.
RELATIVE_SIZES = {"below 10 %": (0, 0.1), "10 to 30 %": (0.1, 0.3), "above 30 %": (0.3, np.inf)}


def proposal_recall(
    proposals: Iterable[np.ndarray],
    objects: Iterable[np.ndarray],
    areas: Iterable[np.ndarray] | None = None,
    image_sizes: Iterable[tuple[int, int]] | None = None,
    limits: tuple[int, ...] = LIMITS,
) -> dict:
    """
    Measures what share of the objects the first k proposals of their image find, whatever their class.

    As in COCO's evaluation (`useCats=0`), proposals choose in their order: each takes, of the objects that overlap it
    enough and are not yet taken, the one it overlaps most. So one box finds one object at most. The numbers equal the
    average recall of pycocotools with the same `maxDets`. Images are read one after the other and not kept.

    Args:
        proposals (`Iterable[np.ndarray]`): Per image the boxes `[N, 4]`, absolute `xywh`, best first.
        objects (`Iterable[np.ndarray]`): Per image the true boxes `[M, 4]`, absolute `xywh`.
        areas (`Iterable[np.ndarray]`, *optional*):
            Per image the areas `[M]` of the objects in pixels, which decide what is small, medium (from 32² pixels)
            and large (from 96²). Width times height of the box by default.
        image_sizes (`Iterable[tuple[int, int]]`, *optional*):
            Per image `(height, width)`; if given, results by the size relative to the image are added.
        limits (`tuple[int, ...]`, *optional*, defaults to `(10, 50, 100, 300, 1000)`): The values of k, ascending.

    Returns:
        `dict`: for all objects (`"all"`) and each size (`"small"`, ..., `"below 10 %"`, ...) the number of `objects`
        and, per k, `recall@k` (IoU of at least 0.5) and `AR@k` (mean over the IoU thresholds .50:.05:.95), both
        between 0 and 1, or -1 where there is no such object. `"boxes_per_image"` is the mean number of proposals.

    Raises:
        `ValueError`: If there is no image, or not as many of one argument as of another.
    """
    groups = ["all", *AREAS, *(RELATIVE_SIZES if image_sizes is not None else ())]
    total = np.zeros(len(groups), dtype=np.int64)
    found = np.zeros((len(groups), len(limits), len(IOU_THRESHOLDS)), dtype=np.int64)
    images = boxes_seen = 0
    given = [argument for argument in (areas, image_sizes) if argument is not None]
    for boxes, truth, *more in zip(proposals, objects, *given, strict=True):
        boxes, truth = (np.asarray(value, dtype=np.float64).reshape(-1, 4) for value in (boxes, truth))
        area = truth[:, 2] * truth[:, 3] if areas is None else np.asarray(more.pop(0), dtype=np.float64)
        member = [np.ones(len(truth), dtype=bool)] + [(low <= area) & (area <= high) for low, high in AREAS.values()]
        if image_sizes is not None:
            size = np.sqrt(truth[:, 2] * truth[:, 3] / np.prod(more.pop(0)))
            member += [(low <= size) & (size < high) for low, high in RELATIVE_SIZES.values()]
        member = np.stack(member)
        ranks = _ranks_of_finders(boxes[: limits[-1]], truth, member)
        total += member.sum(axis=1)
        found += (ranks[:, None] < np.array(limits)[:, None, None]).sum(axis=-1)
        images += 1
        boxes_seen += len(boxes)
    if not images:
        raise ValueError("There is no image to measure recall on.")

    results = {"images": images, "boxes_per_image": boxes_seen / images}
    for group, count, hits in zip(groups, total.tolist(), found, strict=True):
        recalls = hits / count if count else np.full(hits.shape, -1.0)
        results[group] = {"objects": count}
        results[group] |= {f"recall@{k}": float(recall[0]) for k, recall in zip(limits, recalls, strict=True)}
        results[group] |= {f"AR@{k}": float(recall.mean()) for k, recall in zip(limits, recalls, strict=True)}
    return results


def _ranks_of_finders(boxes: np.ndarray, truth: np.ndarray, member: np.ndarray) -> np.ndarray:
    """
    The place in the list of the box that finds each object; beyond any list if none does.

    The choice depends on the group: within a group only its objects `member [groups, M]` are there to be taken. (What
    pycocotools ignores it matches after everything else, so that ignoring and leaving out are the same.)

    Returns:
        `np.ndarray` of shape `[groups, thresholds, M]`.
    """
    ranks = np.full((len(member), len(IOU_THRESHOLDS), len(truth)), np.iinfo(np.int64).max)
    if not len(truth) or not len(boxes):
        return ranks
    # The last of equal overlaps wins in pycocotools: reversed, it is the first, which `argmax` finds.
    overlaps = np.stack([box_iou(box, boxes) for box in truth[::-1]], axis=1)  # [N, M]
    free = np.repeat(member[:, None, ::-1], len(IOU_THRESHOLDS), axis=1)
    for rank in np.flatnonzero(overlaps.max(axis=1) >= IOU_THRESHOLDS[0]):
        candidates = np.where(free & (overlaps[rank] >= IOU_THRESHOLDS[:, None]), overlaps[rank], 0)
        group, threshold = np.nonzero(candidates.any(axis=2))
        best = candidates.argmax(axis=2)[group, threshold]
        ranks[group, threshold, best] = rank
        free[group, threshold, best] = False
    return ranks[..., ::-1]
