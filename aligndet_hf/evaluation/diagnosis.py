"""
What a detector gets right and wrong, beyond its AP: thresholds, curves, confusions and kinds of error.

The kinds of error are TIDE's (Bolya et al., ECCV 2020): a detection that is none has the wrong class, the wrong
place, both, is a double of a found object, or lies on background; an object that nothing hints at is missed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

FOUND_IOU, NEAR_IOU = 0.5, 0.1  # from where a detection has an object, and from where it is about one
ERRORS = ("wrong class", "wrong place", "wrong class and place", "double", "background")
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # areas in pixels, as COCO has them
RECALLS = np.linspace(0, 1, 101)

_LOWEST_SCORE = 0.01
_PER_IMAGE = 100  # detections, as in COCO's AP


class Diagnosis:
    """
    Gathers detections and objects image by image, and tells what is wrong with the detections.

    Args:
        categories (`Sequence[str]`): Names of the categories.
    """

    def __init__(self, categories: Sequence[str]):
        self.categories = list(categories)
        self.images: list[tuple] = []

    def update(self, image_id, prediction: Mapping, truth: Mapping) -> None:
        """
        Adds an image.

        Args:
            image_id: What to call it.
            prediction (`Mapping`): `boxes` (`[n, 4]`, xyxy in pixels), `scores` and `labels` (`[n]`).
            truth (`Mapping`): `boxes` (`[m, 4]`, xyxy in pixels) and `labels` (`[m]`).
        """
        order = np.argsort(-np.asarray(prediction["scores"]), kind="stable")[:_PER_IMAGE]
        order = order[np.asarray(prediction["scores"])[order] >= _LOWEST_SCORE]
        found = [np.asarray(prediction[name])[order] for name in ("boxes", "scores", "labels")]
        boxes = np.asarray(truth["boxes"], dtype=float).reshape(-1, 4)
        self.images.append((image_id, *found, boxes, np.asarray(truth["labels"], dtype=int)))

    def compute(self, worst: int = 20) -> dict:
        """
        Args:
            worst (`int`, *optional*, defaults to 20): How many of the worst images to list.

        Returns:
            `dict`: `per_class` (name -> `objects`, `best_threshold`, where the F1 score is highest, and `precision`,
            `recall` and `f1` there, and `curve`: the precision at recalls of 0, 0.01, ..., 1, as in COCO's AP at an
            IoU of 0.5); `best_threshold` and `f1`, the same for one threshold of all classes; and, of the detections
            from the thresholds of the classes on, `confusion` (`[C + 1, C + 1]`: rows are what an object is, columns
            what it was taken for, the last ones the background), `errors` (kind -> number, with `missed`),
            `errors_by_size` (size of the detection, or of the missed object -> the same), `by_size` (size of the
            object -> `objects` and `found`), and `worst_images`: `image_id`, `false` and `missed`.
        """
        curves = [self._class(label) for label in range(len(self.categories))]
        per_class = {name: _best(*curve) for name, curve in zip(self.categories, curves, strict=True)}
        scores, right, objects = zip(*curves, strict=True)
        pooled = _best(np.concatenate(scores), np.concatenate(right), sum(objects))
        thresholds = np.array([found["best_threshold"] for found in per_class.values()])
        count = len(self.categories)
        confusion = np.zeros((count + 1, count + 1), dtype=int)
        errors_by_size = {name: dict.fromkeys((*ERRORS, "missed"), 0) for name in SIZES}
        by_size = {name: {"objects": 0, "found": 0} for name in SIZES}
        images = []
        for image_id, boxes, scores, labels, true_boxes, true_labels in self.images:
            sure = scores >= thresholds[labels]
            boxes, labels = boxes[sure], labels[sure]
            iou = _iou(boxes, true_boxes)
            owner = _claims(iou, labels[:, None] == true_labels[None])
            kinds = _kinds(iou, labels, true_labels, owner)
            taken = np.isin(np.arange(len(true_labels)), owner)
            hinted = ((iou >= NEAR_IOU) & (owner < 0)[:, None]).any(axis=0)
            _count_confusions(confusion, iou, labels, true_labels)
            for kind, size in zip(kinds, _sizes(boxes), strict=True):
                if kind:
                    errors_by_size[size][kind] += 1
            for number, size in enumerate(_sizes(true_boxes)):
                by_size[size]["objects"] += 1
                by_size[size]["found"] += int(taken[number])
                errors_by_size[size]["missed"] += int(not taken[number] and not hinted[number])
            images.append({"image_id": image_id, "false": sum(map(bool, kinds)), "missed": int((~taken).sum())})
        images = [image for image in images if image["false"] + image["missed"]]
        images.sort(key=lambda image: -(image["false"] + image["missed"]))
        return {
            "per_class": per_class,
            "best_threshold": pooled["best_threshold"],
            "f1": pooled["f1"],
            "confusion": confusion.tolist(),
            "errors": {
                kind: sum(of_size[kind] for of_size in errors_by_size.values()) for kind in (*ERRORS, "missed")
            },
            "errors_by_size": errors_by_size,
            "by_size": by_size,
            "worst_images": images[:worst],
        }

    def _class(self, label: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The detections of a class: their scores, and which are right; and its number of objects."""
        scores, right, objects = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
        for _, boxes, found_scores, labels, true_boxes, true_labels in self.images:
            own, true_own = labels == label, true_labels == label
            iou = _iou(boxes[own], true_boxes[true_own])
            scores.append(found_scores[own])
            right.append(_claims(iou, np.ones_like(iou, dtype=bool)) >= 0)
            objects += int(true_own.sum())
        return np.concatenate(scores), np.concatenate(right), objects


def agreeing(found: Mapping, truth: Mapping) -> np.ndarray:
    """Which detections take, best score first, a free object of their class with an IoU of at least `FOUND_IOU`."""
    order = np.argsort(-np.asarray(found["scores"]), kind="stable")
    same = np.asarray(found["labels"])[order][:, None] == np.asarray(truth["labels"])[None]
    right = np.zeros(len(order), dtype=bool)
    iou = _iou(np.asarray(found["boxes"]).reshape(-1, 4)[order], truth["boxes"])
    right[order] = _claims(iou, same) >= 0
    return right


def in_crowd(found: Mapping, crowds: Mapping) -> np.ndarray:
    """Which detections have at least a share of `FOUND_IOU` of their area inside a crowd of their class."""
    shares = _iou(found["boxes"], crowds["boxes"], are_crowds=True)
    same = np.asarray(found["labels"])[:, None] == np.asarray(crowds["labels"])[None]
    return (same & (shares >= FOUND_IOU)).any(axis=1)


def _best(scores: np.ndarray, right: np.ndarray, objects: int) -> dict:
    """Curve and best threshold of detections, some of them right, for this number of objects."""
    if not objects or not len(scores):
        nothing = dict.fromkeys(("precision", "recall", "f1"), 0.0)
        return {"objects": objects, "best_threshold": 1.0} | nothing | {"curve": [0.0] * len(RECALLS)}
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    last = np.append(np.diff(scores[order]) != 0, True)  # a threshold takes all detections of a score
    f1 = np.where(last, 2 * hits / (np.arange(1, len(hits) + 1) + objects), -1)
    best = int(f1.argmax())
    ceiling = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS, side="left")
    curve = np.where(places < len(ceiling), ceiling[np.minimum(places, len(ceiling) - 1)], 0)
    return {
        "objects": objects,
        "best_threshold": float(scores[order][best]),
        "precision": float(precision[best]),
        "recall": float(recall[best]),
        "f1": float(f1[best]),
        "curve": curve.round(4).tolist(),
    }


def _sizes(boxes: np.ndarray) -> list[str]:
    """The size of each box (xyxy), as COCO names it."""
    areas = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
    return [next(name for name, (low, high) in SIZES.items() if low <= area < high) for area in areas]


def _iou(boxes: np.ndarray, others: np.ndarray, are_crowds: bool = False) -> np.ndarray:
    """IoU `[n, m]` of boxes xyxy; of crowds, as COCO has it, the share of the box that lies in them."""
    boxes, others = (np.asarray(values, dtype=float).reshape(-1, 4) for values in (boxes, others))
    sides = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    inside = np.prod(np.clip(sides, 0, None), axis=2)
    areas = [np.prod(np.clip(values[:, 2:] - values[:, :2], 0, None), axis=1) for values in (boxes, others)]
    union = areas[0][:, None] + (0 if are_crowds else areas[1][None] - inside)
    return inside / np.maximum(union, 1e-9)


def _claims(iou: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The object that each detection claims, -1 for none: best score first, the free object with the highest IoU."""
    claims = np.full(len(iou), -1)
    free = np.ones(iou.shape[1], dtype=bool)
    for number in range(len(iou)):
        candidates = np.where(free & allowed[number], iou[number], -1)
        if len(candidates) and candidates.max() >= FOUND_IOU:
            claims[number] = candidates.argmax()
            free[claims[number]] = False
    return claims


def _kinds(iou: np.ndarray, labels: np.ndarray, true_labels: np.ndarray, owner: np.ndarray) -> list[str]:
    """The kind of error of each detection, empty for one that has found its object."""
    same = labels[:, None] == true_labels[None]
    own, other = (np.where(where, iou, 0).max(axis=1, initial=0) for where in (same, ~same))
    kinds = {
        "": owner >= 0,
        "double": own >= FOUND_IOU,
        "wrong class": other >= FOUND_IOU,
        "wrong place": own >= NEAR_IOU,
        "wrong class and place": other >= NEAR_IOU,
    }
    return np.select(list(kinds.values()), list(kinds), "background").tolist()


def _count_confusions(confusion: np.ndarray, iou: np.ndarray, labels: np.ndarray, true_labels: np.ndarray) -> None:
    """Pairs detections and objects by IoU alone, the own class first, and counts what was taken for what."""
    background = len(confusion) - 1
    same = labels[:, None] == true_labels[None]
    preferred = np.where(iou >= FOUND_IOU, iou + same, 0)
    free = set(range(len(true_labels)))
    for number in np.argsort(-preferred.max(axis=1, initial=0), kind="stable"):
        candidates = [place for place in free if preferred[number, place] > 0]
        if candidates:
            place = max(candidates, key=lambda place: preferred[number, place])
            confusion[true_labels[place], labels[number]] += 1
            free.remove(place)
        else:
            confusion[background, labels[number]] += 1
    for place in free:
        confusion[true_labels[place], background] += 1


def threshold_text(found: Mapping) -> str:
    """The best threshold of a class, if there is one: nothing right was found of some."""
    return f"{found['best_threshold']:.2f}" if found["f1"] else "–"


def format_diagnosis(diagnosis: dict, categories: Sequence[str]) -> str:
    """The best threshold of each class, and the kinds of error, as a table to print."""
    width = max(map(len, (*categories, "class")))
    lines = [f"{'class':<{width}}  objects  threshold  precision  recall     F1"]
    for name, found in diagnosis["per_class"].items():
        lines.append(
            f"{name:<{width}}  {found['objects']:>7}  {threshold_text(found):>9}  {found['precision']:>9.2f}  "
            f"{found['recall']:>6.2f}  {found['f1']:>5.2f}"
        )
    counts = ", ".join(f"{kind} {number}" for kind, number in diagnosis["errors"].items())
    sizes = ", ".join(
        f"{name} {values['found']} of {values['objects']}"
        for name, values in diagnosis["by_size"].items()
        if values["objects"]
    )
    return "\n".join([*lines, f"errors at these thresholds: {counts}", f"objects found: {sizes}"])
