"""COCO average precision, fed batch by batch."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from ..data.arrow_boxes import read_boxes, read_values
from ..data.checks import COCO_DETECTIONS, metric_note
from ..data.columns import image_numbers, require_columns
from ..data.errors import DataError
from ..data.masks import FIELD, coco_run_lengths, has_regions, run_lengths
from .diagnosis import agreeing, in_crowd

logger = logging.get_logger(__name__)

# Each number: precision or recall, IoU threshold (None: the mean of .50:.05:.95), object area, detections per image.
SUMMARY = {
    "AP": ("precision", None, "all", 100),
    "AP50": ("precision", 0.5, "all", 100),
    "AP75": ("precision", 0.75, "all", 100),
    "APs": ("precision", None, "small", 100),
    "APm": ("precision", None, "medium", 100),
    "APl": ("precision", None, "large", 100),
    "AR1": ("recall", None, "all", 1),
    "AR10": ("recall", None, "all", 10),
    "AR100": ("recall", None, "all", 100),
    "ARs": ("recall", None, "small", 100),
    "ARm": ("recall", None, "medium", 100),
    "ARl": ("recall", None, "large", 100),
}
# The same precision by the overlap of masks.
MASK_SUMMARY = {f"mask_{name}": row for name, row in SUMMARY.items() if name.startswith("AP")}


class CocoMetrics:
    """
    The 12 COCO numbers and the AP of every class, equal to pycocotools on the same input; faster-coco-eval counts.

    Of each image only the boxes that count are kept, as compact arrays; logits and images never are.

    Example:

    ```python
    metrics = CocoMetrics.from_dataset(dataset, categories)
    for image_ids, predictions in ...:
        metrics.update(predictions, image_ids)
    metrics.gather()  # with several processes
    print(format_table(metrics.compute()))
    ```

    Args:
        ground_truth (`dict` or `str` or `Path`):
            Ground truth in COCO format, or the JSON file that holds it: `images` with `id`, `categories` with `id` and
            `name`, and `annotations` with `image_id`, `category_id`, `bbox` (absolute xywh) and, optionally, `area` in
            pixels (width times height of the box by default), `iscrowd` and `segmentation` (polygons or run lengths,
            or the text of [`~aligndet_hf.data.masks.segmentation_text`]).

    Raises:
        `ValueError`: If an annotation belongs to no image or category, or if two categories share a name.
    """

    def __init__(self, ground_truth: dict | str | Path):
        if not isinstance(ground_truth, dict):
            ground_truth = json.loads(Path(ground_truth).read_text(encoding="utf-8"))
        self.categories = {category["id"]: str(category["name"]) for category in ground_truth["categories"]}
        if len(set(self.categories.values())) != len(ground_truth["categories"]):
            raise ValueError("The ids and names of the categories must be unique.")
        self.images = [image["id"] for image in ground_truth["images"]]
        # In the order of the ids, integers or texts: of detections with equal scores the first image's counts.
        self._numbers = {image_id: number for number, image_id in enumerate(sorted(set(self.images)), start=1)}
        self.truth = {category: [] for category in self.categories}
        for number, annotation in enumerate(ground_truth["annotations"], start=1):
            for key, ids in (("image_id", self._numbers), ("category_id", self.categories)):
                if annotation[key] not in ids:
                    raise ValueError(f"Annotation {annotation.get('id', number)}: unknown {key} {annotation[key]}.")
            box = [float(value) for value in annotation["bbox"]]
            area = annotation.get("area")
            self.truth[annotation["category_id"]].append(
                {
                    # Not its own id: pycocotools takes a match with the annotation 0 for no match.
                    "id": number,
                    "image_id": self._numbers[annotation["image_id"]],
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3] if area is None or area != area else float(area),  # a null in Arrow is NaN
                    "iscrowd": int(annotation.get("iscrowd") == 1),
                }
                | ({FIELD: annotation[FIELD]} if annotation.get(FIELD) else {})
            )
        annotations = [annotation for own in self.truth.values() for annotation in own]
        self.has_masks = bool(annotations) and all(FIELD in annotation for annotation in annotations)
        if note := metric_note(self._most_objects()):
            logger.warning_once(note)
        self.reset()

    def _most_objects(self) -> np.ndarray:
        """The objects of the commonest category of each image, without crowds."""
        most: Counter[int] = Counter()
        for annotations in self.truth.values():
            most |= Counter(annotation["image_id"] for annotation in annotations if not annotation["iscrowd"])
        return np.array([most[number] for number in self._numbers.values()], dtype=np.int64)

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, categories: list[str]) -> "CocoMetrics":
        """
        Takes the ground truth from a dataset; no image is read.

        Args:
            dataset (`datasets.Dataset`):
                With the column `objects`: `bbox` (absolute xywh), `category` (0..C-1) and, optionally, `area`,
                `iscrowd` and `segmentation`. The ids of the images come from
                [`~aligndet_hf.data.columns.image_numbers`]. Boxes without area count as missed, as in pycocotools;
                those that are not finite do not.
            categories (`list[str]`): Names of the categories; label `k` of a prediction means `categories[k]`.

        Raises:
            [`DataError`]: The dataset has another form: `load_dataset_source` brings it into this one.
        """
        if isinstance(categories, str):
            raise ValueError(f"categories must be a list of names, got the text {categories!r}")
        require_columns(dataset, ["objects"])
        feature = (dataset.features or {}).get("objects")
        has_form = isinstance(feature, dict) and {"bbox", "category"} <= set(feature)
        if not has_form or not isinstance(dataset, datasets.Dataset):
            raise DataError(
                "The column 'objects' of a `datasets.Dataset` must be a struct of lists with the fields 'bbox' and "
                f"'category', got {feature} of a {type(dataset).__name__}: `load_dataset_source` makes one."
            )
        objects = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"]
        boxes, counts = read_boxes(objects, np.float64)
        fields = {"category_id": read_values(objects, "category")[0].astype(np.int64)}
        fields |= {name: read_values(objects, name)[0] for name in ("area", "iscrowd") if name in objects.type.names}
        ids = image_numbers(dataset)
        fields["image_id"] = np.repeat(ids, counts)
        kept = np.flatnonzero(np.isfinite(boxes).all(axis=1))
        annotations = [{name: values[i].item() for name, values in fields.items()} for i in kept]
        texts = pc.struct_field(objects, FIELD).combine_chunks().flatten() if has_regions(objects.type) else None
        for number, annotation, box in zip(kept.tolist(), annotations, boxes[kept].tolist(), strict=True):
            annotation["bbox"] = box
            annotation[FIELD] = None if texts is None else texts[number].as_py()
        return cls(
            {
                "images": [{"id": image_id} for image_id in ids],
                "categories": [{"id": number, "name": name} for number, name in enumerate(categories)],
                "annotations": annotations,
            }
        )

    def reset(self) -> None:
        """Forgets all predictions; the ground truth stays."""
        self.predictions: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.masks: dict[int, np.ndarray] = {}

    def update(self, predictions: list[dict], image_ids) -> None:
        """
        Adds the predictions of some images. An image that comes again (several processes may share the last batch)
        replaces its former predictions.

        Args:
            predictions (`list[dict]`):
                One per image, as `post_process_object_detection` returns them: `scores` [n], `labels` [n] (category
                ids of the ground truth) and `boxes` [n, 4] (absolute xyxy pixels of the stored image), as tensors,
                arrays or lists, and optionally `masks` [n] (an array of run lengths of COCO in the stored image;
                of all images or of none). Detections of other categories or with NaN or infinite values are left out.
            image_ids (`list[int]` or tensor): The image of each prediction.

        Raises:
            `ValueError`: If an image is not in the ground truth, or the lengths do not match.
        """
        image_ids = _to_numpy(image_ids).tolist()
        if len(predictions) != len(image_ids):
            raise ValueError(f"{len(predictions)} predictions for {len(image_ids)} image ids.")
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            if image_id not in self._numbers:
                raise ValueError(f"Image {image_id} is not in the ground truth.")
            scores, labels = _to_numpy(prediction["scores"]), _to_numpy(prediction["labels"])
            if len(labels) and labels.dtype.kind not in "iuf":
                raise ValueError(f"Image {image_id}: labels must be category ids, got {labels[0]!r}.")
            boxes = _to_numpy(prediction["boxes"]).reshape(-1, 4)
            if not len(scores) == len(labels) == len(boxes):
                raise ValueError(
                    f"Image {image_id}: {len(scores)} scores, {len(labels)} labels and {len(boxes)} boxes; expected "
                    "as many of each."
                )
            usable = np.isin(labels, list(self.categories)) & np.isfinite(scores) & np.isfinite(boxes).all(axis=1)
            scores, labels, boxes = scores[usable], labels[usable].astype(np.int64), boxes[usable]
            best = _best_of_each(labels, scores)
            self.predictions[image_id] = scores[best], labels[best], boxes[best]
            if self.has_masks and "masks" in prediction:
                self.masks[image_id] = prediction["masks"][usable][best]

    def gather(self) -> None:
        """Gives every process the predictions of all of them; does nothing in a single process."""
        for predictions, masks in gather_object([(self.predictions, self.masks)]):
            self.predictions |= predictions
            self.masks |= masks

    def compute(self) -> dict:
        """
        Evaluates what was added so far against the whole ground truth: an image without predictions has its objects
        missed.

        Returns:
            `dict`: `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`, `AR100`, `ARs`, `ARm`, `ARl` between 0
            and 1, and `per_class`, the AP by name of the category. -1: there is nothing to find, as in pycocotools.
            If the truth and all predictions have masks, also `mask_AP`, `mask_AP50`, `mask_AP75`, `mask_APs`,
            `mask_APm` and `mask_APl`; sizes of detections are the sizes of their boxes, as pycocotools has it for
            a file with boxes and masks.
        """
        missing = len(self.images) - len(self.predictions)
        if missing:
            logger.warning(
                "%d of %d images have no predictions yet: their objects count as missed.", missing, len(self.images)
            )
        counts, params = self._counts("bbox")
        results = _summary(SUMMARY, counts, params)
        average_precisions = counts["precision"][..., params.areaRngLbl.index("all"), params.maxDets.index(100)]
        results["per_class"] = {
            name: _mean(average_precisions[:, :, number]) for number, name in enumerate(self.categories.values())
        }
        if self.masks and len(self.masks) == len(self.predictions):
            results |= _summary(MASK_SUMMARY, *self._counts("segm"))
        return results

    def _counts(self, kind: str) -> tuple[dict[str, np.ndarray], Any]:
        """Precision and recall by the overlap of boxes ("bbox") or masks ("segm"), and what their axes are."""
        evaluations = [self._evaluate(category, kind) for category in self.categories]
        # [thresholds, (recall levels,) categories, areas, numbers of detections]
        counts = {
            name: np.concatenate([evaluation.eval[name] for evaluation in evaluations], axis=-3)
            for name in ("precision", "recall")
        }
        return counts, evaluations[0].params

    def pairs(self) -> Iterator[tuple[int, dict, dict]]:
        """
        Puts what was found beside what there is.

        Yields:
            `tuple`: of each image its id; what was found: `boxes` (`[n, 4]`, xyxy in pixels), `scores` and `labels`
            (`[n]`), without what finds a crowd and no object, which COCO ignores; and what there is, without crowds:
            `boxes` and `labels`.
        """
        truth: dict[tuple[int, bool], list] = {}
        for category, annotations in self.truth.items():
            for annotation in annotations:
                place = annotation["image_id"], bool(annotation["iscrowd"])
                truth.setdefault(place, []).append((category, annotation["bbox"]))
        nothing = np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros((0, 4))
        for image_id in self.images:
            found = dict(zip(("scores", "labels", "boxes"), self.predictions.get(image_id, nothing), strict=True))
            objects, crowds = (_as_found(truth.get((self._numbers[image_id], kind), [])) for kind in (False, True))
            if len(crowds["labels"]):
                counts = agreeing(found, objects) | ~in_crowd(found, crowds)
                found = {name: values[counts] for name, values in found.items()}
            yield image_id, found, objects

    def _with_masks(self, category: int, sizes: dict[int, tuple[int, int]]) -> list[dict]:
        """The truth of a category, with masks in images of the sizes of those that were found."""
        pairs = ((annotation, sizes[annotation["image_id"]]) for annotation in self.truth[category])
        return [
            annotation | {FIELD: coco_run_lengths(annotation[FIELD], *size) or run_lengths(np.zeros(size))}
            for annotation, size in pairs
        ]

    def _sizes(self) -> dict[int, tuple[int, int]]:
        """Height and width of the images, from their masks; of those in which nothing was found none is needed."""
        found = {self._numbers[image_id]: masks[0]["size"] for image_id, masks in self.masks.items() if len(masks)}
        return {number: tuple(found.get(number, (1, 1))) for number in self._numbers.values()}

    def _evaluate(self, category: int, kind: str):
        """COCO's evaluation of one category: of all at once the dictionaries would fill the memory."""
        from faster_coco_eval import COCO, COCOeval_faster

        detections, sizes = [], self._sizes()
        for image_id, (scores, labels, boxes) in self.predictions.items():
            own = labels == category
            masks = self.masks[image_id][own] if kind == "segm" else [None] * int(own.sum())
            for score, (x1, y1, x2, y2), mask in zip(scores[own].tolist(), boxes[own].tolist(), masks, strict=True):
                width, height = x2 - x1, y2 - y1
                detections.append(
                    {
                        "id": len(detections) + 1,
                        "image_id": self._numbers[image_id],
                        "category_id": 1,
                        "bbox": [x1, y1, width, height],
                        "area": width * height,
                        "score": score,
                        "iscrowd": 0,
                        FIELD: mask,
                    }
                )
        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            truth = self._with_masks(category, sizes) if kind == "segm" else self.truth[category]
            for annotations in (truth, detections):
                side = COCO()
                images = [{"id": number, "height": h, "width": w} for number, (h, w) in sizes.items()]
                side.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
                side.createIndex()
                sides.append(side)
            evaluation = COCOeval_faster(*sides, iouType=kind)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation


def _as_found(truth: list[tuple[int, list[float]]]) -> dict[str, np.ndarray]:
    """Categories and boxes (xywh) as `boxes` (xyxy) and `labels`."""
    boxes = np.array([box for _, box in truth], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {"boxes": boxes, "labels": np.array([label for label, _ in truth], dtype=np.int64)}


def _summary(rows: dict[str, tuple], counts: dict[str, np.ndarray], params) -> dict[str, float]:
    results = {}
    for name, (kind, threshold, area, detections) in rows.items():
        values = counts[kind][..., params.areaRngLbl.index(area), params.maxDets.index(detections)]
        results[name] = _mean(values if threshold is None else values[np.isclose(params.iouThrs, threshold)])
    return results


def format_table(results: dict) -> str:
    """
    Lays out results for a terminal, in percent.

    Args:
        results (`dict`): What [`CocoMetrics.compute`] returns.

    Returns:
        `str`: The 12 numbers in two rows, numbers of masks, if any, in a third, then the AP of every class in as many
        columns as fit.
    """
    names = list(SUMMARY)
    lines = []
    masks = [name for name in MASK_SUMMARY if name in results]
    for row in filter(None, (names[:6], names[6:], masks)):
        width = max(8, *(len(name) + 2 for name in row))
        lines += [
            "".join(f"{name:>{width}}" for name in row),
            "".join(f"{_percent(results[name]):>{width}}" for name in row),
            "",
        ]
    per_class = results["per_class"]
    width = max(map(len, [*per_class, "class"])) + 2
    columns = max(1, min(100 // (width + 8), -(-len(per_class) // 8)))
    cells = [f"{name:<{width}}{_percent(value):>6}" for name, value in per_class.items()]
    rows = -(-len(cells) // columns)
    header = f"{'class':<{width}}{'AP':>6}"
    lines.append("  ".join([header] * min(columns, -(-len(cells) // max(rows, 1)))))
    lines += ["  ".join(cells[row::rows]) for row in range(rows)]
    return "\n".join(line.rstrip() for line in lines)


def exists(value: float | None) -> bool:
    """Whether a number was measured: COCO says -1 (and some tools NaN) where there is nothing to measure."""
    return value is not None and value >= 0


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"


def _mean(values: np.ndarray) -> float:
    """Mean over what exists; pycocotools marks the rest by -1."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _best_of_each(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices of the `COCO_DETECTIONS` best of each label; the earlier of equals first, as pycocotools has it."""
    order = np.lexsort((-scores, labels))
    labels = labels[order]
    rank = np.arange(len(order)) - np.searchsorted(labels, labels)
    return order[rank < COCO_DETECTIONS]


def _to_numpy(values) -> np.ndarray:
    """An array of at least float32 precision where the values are not integers."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return np.asarray(values)
