"""What a detector makes of images, drawn beside the truth, and what its mistakes are: the files that tell it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..data.columns import image_ids
from ..data.images import decode_image
from ..data.masks import FIELD
from ..data.splits import spread_rows
from ..detectors.build import open_detector, open_image_processor
from ..evaluation.coco_metrics import CocoMetrics
from ..evaluation.detections import EvaluationImages, match_categories, predict_batches
from ..evaluation.diagnosis import Diagnosis, agreeing
from ..evaluation.predicted_rows import predicted_rows
from ..files import read_json, write_json
from .drawing import JPEG_QUALITY, contact_sheet, draw_boxes, enlarged, tint_masks
from .pictures import color_of
from .run_record import DIAGNOSIS

PREDICTIONS, WORST = "predictions.jpg", "worst.jpg"
CROWDED = 12  # boxes, above which their tags name no classes
SHEET_SIDE = 400  # pixels of a picture on a sheet


def tell_predictions(
    images: EvaluationImages, metrics: CocoMetrics, folder: Path, num_pictures: int, threshold: float | None = None
) -> dict:
    """
    Writes what a detector got right and wrong: `diagnosis.json`, and pictures of evenly spaced images
    (`predictions.jpg`) and of those with the most mistakes (`worst.jpg`).

    Args:
        images (`EvaluationImages`): The images.
        metrics (`CocoMetrics`): What was found in them.
        folder (`Path`): Where to.
        num_pictures (`int`): How many images each picture shows; 0: no pictures.
        threshold (`float`, *optional*): The lowest score in `predictions.jpg`; the best of each class by default, as
            in `worst.jpg`.

    Returns:
        `dict`: see [`~aligndet_hf.evaluation.diagnosis.Diagnosis.compute`]; its images have the ids of the data set,
            and their `file_name`.
    """
    own_ids, diagnosis = image_ids(images.dataset), Diagnosis(images.categories)
    rows = {own_id: row for row, own_id in enumerate(own_ids)}
    found, truth = {}, {}
    for row, (_, prediction, objects) in enumerate(metrics.pairs()):
        diagnosis.update(own_ids[row], prediction, objects)
        found[row], truth[row] = prediction, objects
    told = diagnosis.compute()
    for image in told["worst_images"]:
        image["file_name"] = images.name(rows[image["image_id"]])
    write_json(folder / DIAGNOSIS, told)
    best = [of_class["best_threshold"] for of_class in told["per_class"].values()]
    worst = [rows[image["image_id"]] for image in told["worst_images"][:num_pictures]]
    lowest = best if threshold is None else threshold
    for name, shown, scores in ((PREDICTIONS, spread_rows(len(images), num_pictures), lowest), (WORST, worst, best)):
        (folder / name).unlink(missing_ok=True)
        if num_pictures and shown:
            plot_predictions(
                [images.read_image(row) for row in shown],
                [truth[row] for row in shown],
                {"predictions": [found[row] for row in shown]},
                images.categories,
                folder / name,
                scores,
                names=[images.name(row) for row in shown],
            )
    return told


def plot_predictions(
    images: Sequence[np.ndarray],
    ground_truth: Sequence[Mapping],
    predictions: Mapping[str, Sequence[Mapping]],
    class_names: Sequence[str],
    path,
    threshold: float | Sequence[float] | None = 0.3,
    names: Sequence[str] | None = None,
) -> Path:
    """
    Draws one row per image: the ground truth on the left, the predictions of one or several arms to its right.

    A prediction is solid where it agrees with a still free box of its class (IoU >= 0.5) and dashed where it does not.

    Args:
        images (`Sequence[np.ndarray]`): RGB images, uint8 `[height, width, 3]`.
        ground_truth (`Sequence[Mapping]`): Per image `boxes` (`[n, 4]`, absolute pixels, xyxy) and `labels` (`[n]`).
        predictions (`Mapping[str, Sequence[Mapping]]`): Name of each arm to what it found: per image `boxes`, `labels`
            and `scores` in the same form.
        class_names (`Sequence[str]`): Name of each class index.
        path (`str` or `Path`): The file to write, JPEG or PNG.
        threshold (`float` or `Sequence[float]`, *optional*, defaults to 0.3):
            Predictions with a lower score are not drawn; one for all classes, or one for each. `None`: they are those
            above the best threshold of their class, all to be drawn.
        names (`Sequence[str]`, *optional*): What to call each image.

    Returns:
        `Path`: `path`.
    """
    lowest = np.broadcast_to(np.asarray(0.0 if threshold is None else threshold), len(class_names))
    side = 460 if len(predictions) < 3 else 340
    pictures, titles, shown = [], [], set()
    for row, (image, truth) in enumerate(zip(images, ground_truth, strict=True)):
        pictures.append(_draw(image, truth, class_names, side))
        objects = len(truth["labels"])
        titles.append(f"{names[row] if names else 'truth'}: {objects} object{'s' * (objects != 1)}")
        shown.update(map(int, truth["labels"]))
        for name, per_image in predictions.items():
            found = {key: np.asarray(per_image[row][key]) for key in ("boxes", "labels", "scores")}
            found = _above(found, lowest)
            right = agreeing(found, truth)
            pictures.append(_draw(image, found, class_names, side, right))
            titles.append(f"{name}: {right.sum()} of {objects} found, {(~right).sum()} false")
            shown.update(map(int, found["labels"]))
    least = f"{threshold:g}" if isinstance(threshold, float) else "the best threshold of a class"
    note = f"scores from {least}; solid: finds an object of its class (IoU 0.5), dashed: none, or one found before"
    legend = {class_names[label]: color_of(label) for label in sorted(shown)}
    sheet = contact_sheet(pictures, titles, 1 + len(predictions), side, note, legend)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=JPEG_QUALITY)
    return path


def write_sheet(
    dataset: Dataset, classes: Sequence[str], path: Path, number: int, window: tuple | None, note: str = ""
) -> None:
    """
    Draws some images of predictions on one page. Boxes that are left out of account are dashed, with a question mark.

    Args:
        dataset (`datasets.Dataset`): With the columns `image`, `file_name` and `objects`, which has `bbox` (absolute
            xywh), `category` and `score`, and perhaps `segmentation` and `ignore`.
        classes (`Sequence[str]`): Names of the classes.
        path (`Path`): The JPEG to write.
        number (`int`): How many images, evenly spaced.
        window (`tuple`, *optional*): How grey levels become pixels, see [`~aligndet_hf.data.bit_depth`].
        note (`str`, *optional*): A text above the pictures.
    """
    pictures, titles = [], []
    for place in spread_rows(len(dataset), number):
        row = next(predicted_rows(dataset.select([place])))
        objects, image = row["objects"], decode_image(row["image"], window)
        ignored = list(map(bool, objects.get("ignore") or [0] * len(objects["score"])))
        fields = (objects["category"], objects["score"], ignored)
        tags = [
            "?" if is_left_out else f"{classes[label]} {score:.2f}"
            for label, score, is_left_out in zip(*fields, strict=True)
        ]
        if FIELD in objects:
            image = tint_masks(image, objects[FIELD], objects["category"])
        image, boxes = enlarged(image, objects["bbox"], SHEET_SIDE)
        pictures.append(draw_boxes(image, boxes, objects["category"], tags, SHEET_SIDE, ignored))
        more = f" labels, {sum(ignored)} left out" if "ignore" in objects else ""
        titles.append(f"{row['file_name']}: {len(tags) - sum(ignored)}{more}")
    contact_sheet(pictures, titles, side=SHEET_SIDE, note=note).save(path, quality=JPEG_QUALITY)


def plot_detectors(
    detectors: Mapping[str, Path], dataset: Dataset, categories: list[str], path: Path, num_images: int
) -> Path:
    """
    Draws what fine-tuned detectors find in the same, evenly spaced images, from the best thresholds of each on.

    Args:
        detectors (`Mapping[str, Path]`): Name of each to its folder.
        dataset (`datasets.Dataset`): With the columns `image` and `objects`.
        categories (`list[str]`): Names of the categories.
        path (`Path`): The file to write.
        num_images (`int`): How many images.

    Returns:
        `Path`: `path`.
    """
    found = {}
    for arm, folder in detectors.items():
        detector, image_processor = open_detector(str(folder)), open_image_processor(str(folder))
        images = EvaluationImages(dataset, categories, image_processor)
        rows = spread_rows(len(images), num_images)
        classes = match_categories(detector.config.id2label, categories)
        batches = predict_batches(detector, images.batches(4, rows=rows), image_processor, classes)
        best = (read_json(folder / DIAGNOSIS) or {"per_class": {}})["per_class"]  # runs of earlier versions have none
        lowest = np.array([best[name]["best_threshold"] if name in best else 0.3 for name in categories])
        found[arm] = [_above(prediction, lowest) for _, predictions in batches for prediction in predictions]
    pictures = [images.read_image(row) for row in rows]
    truth = [images.objects(row, *picture.shape[:2]) for row, picture in zip(rows, pictures, strict=True)]
    return plot_predictions(pictures, truth, found, categories, path, None)


def _above(prediction: Mapping, lowest: np.ndarray) -> dict:
    kept = prediction["scores"] >= lowest[prediction["labels"]]
    return {key: value[kept] for key, value in prediction.items()}


def _draw(image: np.ndarray, panel: Mapping, class_names: Sequence[str], side: int, right: np.ndarray | None = None):
    """One picture with its boxes, best scores first, with a tag each (short ones where boxes are many)."""
    boxes, labels = np.array(panel["boxes"], dtype=float).reshape(-1, 4), np.asarray(panel["labels"], dtype=int)
    boxes[:, 2:] -= boxes[:, :2]
    image, boxes = enlarged(image, boxes, side)
    scores = panel.get("scores")
    order = np.arange(len(labels)) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    names = ["" if len(labels) > CROWDED else class_names[label] for label in labels]
    tags = (
        names if scores is None else [f"{name} {score:.2f}".strip() for name, score in zip(names, scores, strict=True)]
    )
    dashed = None if right is None else (~right)[order].tolist()
    return draw_boxes(image, boxes[order], labels[order].tolist(), [tags[i] for i in order], side, dashed)
