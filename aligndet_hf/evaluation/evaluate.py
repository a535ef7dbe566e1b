"""Measuring a detector as its users will meet it: on images that the image processor saved with it prepares."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ..data.collate import collate_labelled, normalize_images
from ..data.columns import clean_boxes, image_ids, read_boxes, read_values, validate_objects
from ..data.dataset import init_worker
from ..data.errors import DataError, ImageError
from ..data.formats import category_names, load_dataset_source
from ..data.images import decode_image
from ..files import write_json
from .coco_metrics import CocoMetrics, format_table
from .pictures import new_figure, plot_predictions


@dataclass(kw_only=True)
class EvaluateArguments:
    """Arguments of [`evaluate`]: the flags of `aligndet evaluate` and the keys of its recipes."""

    help_groups = {"detector": "Measured", "batch_size": "Run", "output_dir": "Output"}

    detector: str = field(metadata={"help": "folder or Hub id of a detector with its image processor"})
    dataset: str = field(metadata={"help": "labelled images: folder, COCO-JSON file or Hub id"})
    split: str = field(default="validation", metadata={"help": "split of the dataset"})
    image_dir: str | None = field(
        default=None, metadata={"help": "folder of the images of a COCO file, if they are not found beside it"}
    )

    batch_size: int = field(default=8, metadata={"help": "images per forward pass"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that load images"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; a GPU if there is one"})
    disable_tqdm: bool = field(default=False, metadata={"help": "show no progress bar"})

    output_dir: str | None = field(default=None, metadata={"help": "folder for results.json and what follows"})
    save_predictions: bool = field(
        default=False, metadata={"help": "write predictions.json, a list of detections in COCO's result format"}
    )
    num_pictures: int = field(
        default=0, metadata={"help": "draw predictions beside ground truth for so many images: predictions.png"}
    )
    score_threshold: float = field(default=0.3, metadata={"help": "lowest score that is drawn; no effect on AP"})

    def __post_init__(self):
        if self.output_dir is None and (self.save_predictions or self.num_pictures):
            raise ValueError("save_predictions and num_pictures need an output_dir to write to")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}")


def evaluate(arguments: EvaluateArguments) -> dict:
    """
    Measures a detector on labelled images and prints the COCO table with the AP of every class.

    Args:
        arguments ([`EvaluateArguments`]): The configuration.

    Returns:
        `dict`: What `CocoMetrics.compute()` gives: the 12 COCO numbers in 0 to 1, and `per_class`.

    Raises:
        DataError: the dataset is broken, or its categories are not among the detector's classes.
        OSError: there is no such detector, or it has no image processor.
    """
    dataset = load_dataset_source(arguments.dataset, arguments.split, labels=True, image_dir=arguments.image_dir)
    categories = category_names(dataset, arguments.dataset)
    print(validate_objects(dataset, categories, arguments.dataset))
    if arguments.num_pictures:
        new_figure(1, 1)  # says now, not after the evaluation, that matplotlib is missing
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    detector = AutoModelForObjectDetection.from_pretrained(arguments.detector).to(device)
    image_processor = AutoImageProcessor.from_pretrained(arguments.detector)
    classes = match_categories(detector.config.id2label, categories)

    images = EvaluationImages(dataset, categories, image_processor)
    loader = DataLoader(
        images,
        batch_size=arguments.batch_size,
        collate_fn=collate_labelled,
        num_workers=arguments.dataloader_num_workers,
        worker_init_fn=init_worker,
    )
    drawn = {images.image_ids[row]: row for row in images.spread(arguments.num_pictures)}
    metrics, pictures, detections = images.metrics(), {}, []
    batches = predict_batches(detector, loader, image_processor, classes)
    for ids, predictions in tqdm(batches, total=len(loader), desc="evaluating", disable=arguments.disable_tqdm):
        metrics.update(predictions, ids)
        pictures |= {drawn[i]: found for i, found in zip(ids, predictions, strict=True) if i in drawn}
        if arguments.save_predictions:
            for image_id, found in zip(ids, predictions, strict=True):
                detections += coco_detections(image_id, found)
    results = metrics.compute()
    print(format_table(results))

    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        measured = {"detector": arguments.detector, "dataset": arguments.dataset, "split": arguments.split}
        record = measured | {"images": len(images), "metrics": results}
        write_json(folder / "results.json", record)
        if arguments.save_predictions:
            (folder / "predictions.json").write_text(json.dumps(detections), encoding="utf-8")
        if arguments.num_pictures:
            images.draw(pictures, folder / "predictions.png", arguments.score_threshold)
    return results


class EvaluationImages(Dataset):
    """
    Images as the image processor saved with a detector prepares them, with the truth to compare with.

    An item is `{"image", "labels"}` for [`collate_labelled`]: uint8 [3, h, w], and a dictionary of `image_id`
    (int64 [1]) and `orig_size` (int64 [2]: height and width in pixels of the stored image). The boxes stay in the
    dataset, from where [`~EvaluationImages.metrics`] takes them.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` (not decoded), `objects` and, optionally, `image_id`.
        categories (`list[str]`): Names of the categories.
        image_processor (`BaseImageProcessor`): That of the detector.
    """

    def __init__(self, dataset: datasets.Dataset, categories: list[str], image_processor):
        self.dataset = dataset
        self.categories = categories
        self.image_processor = image_processor
        self.image_ids = image_ids(dataset)
        self.images = dataset.select_columns(["image"])

    def __len__(self) -> int:
        return len(self.images)

    def read_image(self, index: int) -> np.ndarray:
        """The image of a row: RGB uint8 [height, width, 3]."""
        try:
            return decode_image(self.images[index]["image"])
        except ImageError as error:
            raise ImageError(f"Row {index}, column 'image': {error}") from error

    def __getitem__(self, index: int) -> dict:
        image = self.read_image(index)
        # Only its resizing: padding is the collator's, which keeps the mask, and normalising is done on the device.
        prepared = self.image_processor(
            images=image,
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        labels = {"image_id": torch.tensor([self.image_ids[index]]), "orig_size": torch.tensor(image.shape[:2])}
        return {"image": prepared["pixel_values"][0], "labels": labels}

    def metrics(self) -> CocoMetrics:
        """A new [`CocoMetrics`] that holds the truth of these images."""
        return CocoMetrics.from_dataset(self.dataset, self.categories)

    def spread(self, number: int) -> list[int]:
        """So many rows, or all, evenly spaced."""
        return np.unique(np.linspace(0, len(self) - 1, min(number, len(self))).round().astype(int)).tolist()

    def objects(self, row: int, height: int, width: int) -> dict[str, np.ndarray]:
        """The truth of a row, whose image has this size: `boxes` (float [n, 4], pixels, xyxy), `labels` (int [n])."""
        objects = self.dataset.select([row]).with_format("arrow")[:]["objects"]
        boxes, kept = clean_boxes(read_boxes(objects)[0], width, height)
        boxes[:, 2:] += boxes[:, :2]
        return {"boxes": boxes, "labels": read_values(objects, "category")[0].astype(int)[kept]}

    def draw(self, predictions: dict[int, dict], path: str | Path, threshold: float = 0.3) -> None:
        """Draws the predictions of some rows (`dict` from row to prediction) beside the truth."""
        images = [self.read_image(row) for row in predictions]
        truth = [self.objects(row, *image.shape[:2]) for row, image in zip(predictions, images, strict=True)]
        plot_predictions(images, truth, list(predictions.values()), self.categories, path, threshold)


def draw_predictions(detector, images: EvaluationImages, folder: Path, number: int) -> None:
    """Draws what a detector makes of so many images beside the truth: `predictions.png` in `folder`."""
    rows = images.spread(number)
    loader = DataLoader(Subset(images, rows), batch_size=4, collate_fn=collate_labelled)
    batches = predict_batches(detector, loader, images.image_processor)
    found = [prediction for _, predictions in batches for prediction in predictions]
    images.draw(dict(zip(rows, found, strict=True)), folder / "predictions.png")


@torch.no_grad()
def predict_batches(
    detector, batches: Iterable[dict], image_processor, classes: list[int] | None = None
) -> Iterator[tuple[list[int], list[dict]]]:
    """
    Detects objects in batches of images, and holds no more than one batch at a time.

    Args:
        detector (`PreTrainedModel`): Any detector; it is left in evaluation mode, on its device.
        batches (`Iterable[dict]`):
            As [`collate_labelled`] makes them of [`EvaluationImages`]: `pixel_values` (uint8 [B, 3, H, W]),
            `pixel_mask` (int64 [B, H, W]) and `labels`, of which only `image_id` and `orig_size` are read.
        image_processor (`BaseImageProcessor`): That of the detector: how to normalise, and what its outputs mean.
        classes (`list[int]`, *optional*):
            For each class of the detector the category to report, or -1 to leave its detections out.

    Yields:
        `tuple`: the image ids of a batch and, for each, `scores` [n], `labels` [n] and `boxes` [n, 4] (xyxy in pixels
        of the stored image, not clipped to it) as NumPy arrays; every detection, whatever its score.
    """
    detector.eval()
    device = next(detector.parameters()).device
    normalization = normalization_of(image_processor)
    classes = None if classes is None else np.asarray(classes)
    for batch in batches:
        pixel_values, pixel_mask = (batch[name].to(device) for name in ("pixel_values", "pixel_mask"))
        outputs = detector(
            pixel_values=normalize_images(pixel_values, pixel_mask, **normalization), pixel_mask=pixel_mask
        )
        # The processors read these two only; in float32 also where the forward pass ran under autocast.
        outputs = SimpleNamespace(logits=outputs.logits.float(), pred_boxes=outputs.pred_boxes.float())
        sizes = [tuple(label["orig_size"].tolist()) for label in batch["labels"]]
        results = image_processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)
        predictions = [{name: value.cpu().numpy() for name, value in result.items()} for result in results]
        if classes is not None:
            predictions = [_relabelled(prediction, classes) for prediction in predictions]
        yield [int(label["image_id"]) for label in batch["labels"]], predictions


def normalization_of(image_processor) -> dict:
    """What [`normalize_images`] needs (`mean`, `std`, `rescale_factor`) to do what an image processor does."""
    do_normalize = image_processor.do_normalize
    return {
        "mean": list(image_processor.image_mean) if do_normalize else [0.0, 0.0, 0.0],
        "std": list(image_processor.image_std) if do_normalize else [1.0, 1.0, 1.0],
        "rescale_factor": image_processor.rescale_factor if image_processor.do_rescale else 1.0,
    }


def match_categories(id2label: dict[int, str], categories: list[str]) -> list[int]:
    """
    Finds the category of a dataset that each class of a detector stands for, by name.

    Args:
        id2label (`dict[int, str]`): The detector's classes.
        categories (`list[str]`): Names of the dataset's categories.

    Returns:
        `list[int]`: per class its category, or -1 for a class that the dataset does not know.

    Raises:
        DataError: a category is no class of the detector. Classes without names (`LABEL_0`, ...) are taken in order if
            there are as many of them as categories.
    """
    names = [id2label[index] for index in sorted(id2label)]
    if len(names) == len(categories) and all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return list(range(len(names)))
    missing = [name for name in categories if name not in names]
    if missing:
        raise DataError(
            f"the detector has no class for {_some(missing)}: the dataset has the categories {_some(categories)}, the "
            f"detector the classes {_some(names)}. Rename the categories, or fine-tune first."
        )
    return [categories.index(name) if name in categories else -1 for name in names]


def coco_detections(image_id: int, prediction: dict) -> list[dict]:
    """One image's detections in COCO's result format: `bbox` is xywh, `category_id` the index of the category."""
    x1, y1, x2, y2 = prediction["boxes"].T.tolist() if len(prediction["boxes"]) else ([], [], [], [])
    labels, scores = prediction["labels"].tolist(), prediction["scores"].tolist()
    return [
        {"image_id": image_id, "category_id": label, "bbox": [a, b, c - a, d - b], "score": score}
        for a, b, c, d, label, score in zip(x1, y1, x2, y2, labels, scores, strict=True)
    ]


def _relabelled(prediction: dict, classes: np.ndarray) -> dict:
    labels = classes[prediction["labels"]]
    kept = labels >= 0
    return {name: value[kept] for name, value in (prediction | {"labels": labels}).items()}


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
