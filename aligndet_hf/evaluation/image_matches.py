"""Which detections are right, image by image: enough to measure AP on any choice of images, quickly and exactly."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .coco_metrics import CocoMetrics

MATCHES = "matches.npz"  # what `aligndet finetune` calls their file
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # pycocotools' .50:.05:.95
_RECALLS = np.linspace(0, 1, 101)


@dataclass
class ImageMatches:
    """
    The matches of all detections with objects, as pycocotools makes them: of any size, the best 100 of each class.

    Attributes:
        objects (`np.ndarray` int64 `[C, I]`): Objects of each class in each image, without crowds.
        categories (`np.ndarray` int64 `[N]`): Class of each detection; class by class, the best score first.
        images (`np.ndarray` int64 `[N]`): Its image, by its place among the sorted ids.
        right (`np.ndarray` bool `[N, 10]`): Whether it finds an object, for each threshold of the IoU.
        ignored (`np.ndarray` bool `[N, 10]`): Whether it lies in a crowd, and does not count.
    """

    objects: np.ndarray
    categories: np.ndarray
    images: np.ndarray
    right: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of(cls, metrics: CocoMetrics) -> "ImageMatches":
        """Matches all that was added to the metrics."""
        number_of = {image_id: number for number, image_id in enumerate(sorted(set(metrics.images)))}
        parts = [_match_category(metrics, category, number_of) for category in metrics.categories]
        objects, images, right, ignored = zip(*parts, strict=True)
        categories = np.repeat(np.arange(len(parts)), list(map(len, images)))
        return cls(np.stack(objects), categories, *map(np.concatenate, (images, right, ignored)))

    def save(self, path: str | Path) -> None:
        """Writes them to an `.npz` file."""
        np.savez_compressed(path, **vars(self))

    @classmethod
    def load(cls, path: str | Path) -> "ImageMatches":
        """Reads what [`~ImageMatches.save`] has written."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in stored.files})

    def average_precision(self, weights: np.ndarray | None = None) -> float:
        """
        COCO's AP (IoU 0.50:0.95) on a sample of the images.

        Args:
            weights (`np.ndarray` int64 `[I]`, *optional*): How often each image is in the sample; once by default.

        Returns:
            `float`: what pycocotools gives for these images, a repeated one beside its first (where an image has equal
            scores, for one of their orders); -1 without any object.
        """
        if weights is None:
            weights = np.ones(self.objects.shape[1], dtype=np.int64)
        found = []
        ends = np.searchsorted(self.categories, np.arange(len(self.objects) + 1))
        totals = self.objects @ weights
        for total, start, end in zip(totals, ends[:-1], ends[1:], strict=True):
            if total:
                rows = slice(start, end)
                found.append(
                    _class_precision(weights[self.images[rows]], self.right[rows], self.ignored[rows], int(total))
                )
        return float(np.mean(found)) if found else -1.0


def _class_precision(weights: np.ndarray, right: np.ndarray, ignored: np.ndarray, total: int) -> float:
    """
    The AP of one class, of the weights `[n]` of its detections, best first.

    Precision is looked up where a detection is right, which is where recall grows: there it is the largest.
    """
    counted = np.cumsum(weights)
    precisions = np.zeros((len(THRESHOLDS), len(_RECALLS)))
    for place in range(len(THRESHOLDS)):
        if ignored[:, place].any():
            seen = np.cumsum(weights * ~ignored[:, place])
        else:
            seen = counted
        hits = np.flatnonzero(right[:, place] & (weights > 0))
        true = np.cumsum(weights[hits])
        precision = np.maximum.accumulate((true / np.maximum(seen[hits], 1))[::-1])[::-1]
        reached = np.searchsorted(true / total, _RECALLS, side="left")
        precisions[place, reached < len(hits)] = precision[reached[reached < len(hits)]]
    return float(precisions.mean())


def _match_category(metrics: CocoMetrics, category: int, number_of: dict) -> tuple[np.ndarray, ...]:
    """Objects per image, and the image and matches of the detections, the best score first."""
    objects = np.zeros(len(number_of), dtype=np.int64)
    truth: dict[int, list[dict]] = {}
    for annotation in metrics.truth[category]:
        truth.setdefault(annotation["image_id"] - 1, []).append(annotation)
        objects[annotation["image_id"] - 1] += not annotation["iscrowd"]
    scores, images, matches = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], [np.zeros((2, 0, len(THRESHOLDS)), bool)]
    for image_id in sorted(metrics.predictions, key=number_of.__getitem__):
        own_scores, labels, boxes = metrics.predictions[image_id]
        rows = np.flatnonzero(labels == category)
        rows = rows[np.argsort(-own_scores[rows], kind="stable")]
        scores.append(own_scores[rows].astype(np.float64))
        images.append(np.full(len(rows), number_of[image_id]))
        matches.append(_match_image(boxes[rows], truth.get(number_of[image_id], [])))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right, ignored = np.concatenate(matches, axis=1)[:, order]
    return objects, np.concatenate(images)[order], right, ignored


def _match_image(boxes: np.ndarray, truth: list[dict]) -> np.ndarray:
    """
    Which detections `[n, 4]` (xyxy, best first) of one class and image find an object, and which lie in a crowd.

    Each takes of the objects that are left the one that it overlaps most, the last of equal ones; a crowd only where
    there is no object, and as often as there are detections in it.

    Returns:
        `np.ndarray` bool `[2, n, 10]`: right, ignored.
    """
    result = np.zeros((2, len(boxes), len(THRESHOLDS)), dtype=bool)
    if not truth or not len(boxes):
        return result
    from faster_coco_eval.core import mask  # which loads OpenCV

    truth = sorted(truth, key=lambda annotation: annotation["iscrowd"])
    crowd = np.array([bool(annotation["iscrowd"]) for annotation in truth])
    boxes = boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    # With a crowd the share of the box that lies in it.
    overlaps = mask.iou(boxes, np.array([annotation["bbox"] for annotation in truth]), crowd.tolist())
    for place, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(truth), dtype=bool)
        for row in np.flatnonzero(overlaps.max(axis=1) >= threshold - 1e-10):
            enough = np.where(free & (overlaps[row] >= min(threshold, 1 - 1e-10)), overlaps[row], -1)
            candidates = np.where(crowd, -1, enough)
            if candidates.max() < 0:
                result[1, row, place] = (enough >= 0).any()
                continue
            best = len(truth) - 1 - int(candidates[::-1].argmax())
            result[0, row, place], free[best] = True, False
    return result
