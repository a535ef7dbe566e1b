"""Measuring a detector as its users will meet it: on images that the image processor saved with it prepares."""

import os
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ..data.arrow_boxes import read_values, usable_boxes
from ..data.bit_depth import pixel_window, window_of
from ..data.collate import collate_labelled, normalize_images
from ..data.columns import image_numbers
from ..data.door import listed
from ..data.errors import DataError, ImageError
from ..data.images import decode_image
from ..data.masks import FIELD, run_lengths
from ..detectors.classes import are_unnamed
from ..processes import init_worker
from ..proposals.trained import all_detections, with_both_sides
from .coco_metrics import CocoMetrics

# Above what a class has that a detector of torchvision did not find in a box: its "queries" have one class each.
_NO_SCORE = 1e-20


class EvaluationImages(Dataset):
    """
    Images as the image processor saved with a detector prepares them, with the truth to compare with.

    An item is `{"image", "labels"}` for [`collate_labelled`]: uint8 [3, h, w], and a dictionary of `image_id`
    (int64 [1]) and `orig_size` (int64 [2]: height and width in pixels of the stored image). The boxes stay in the
    dataset, from where [`~EvaluationImages.metrics`] takes them.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` (not decoded), `objects` and, optionally, `image_id`.
        categories (`list[str]`): Names of the categories.
        image_processor (`BaseImageProcessor`): The detector's.
    """

    def __init__(self, dataset: datasets.Dataset, categories: list[str], image_processor):
        self.dataset = dataset
        self.categories = categories
        self.image_processor = image_processor
        self.image_ids = image_numbers(dataset)
        self.images = dataset.select_columns(["image"])
        self.window = window_of(image_processor) or pixel_window(dataset)

    def __len__(self) -> int:
        return len(self.images)

    def read_image(self, index: int) -> np.ndarray:
        """The image of a row: RGB uint8 [height, width, 3]."""
        try:
            return decode_image(self.images[index]["image"], self.window)
        except ImageError as error:
            raise ImageError(f"Row {index}, column 'image': {error}") from error

    def __getitem__(self, index: int) -> dict:
        return prepare_image(self.read_image(index), self.image_processor, self.image_ids[index])

    def batches(self, batch_size: int, num_workers: int = 0, rows: list[int] | None = None) -> DataLoader:
        """All images, or those of some rows, in batches, loaded by this number of processes, or by this one."""
        images = self if rows is None else Subset(self, rows)
        return DataLoader(
            images, batch_size, collate_fn=collate_labelled, num_workers=num_workers, worker_init_fn=init_worker
        )

    def metrics(self) -> CocoMetrics:
        """A new [`CocoMetrics`] that holds the truth of these images."""
        return CocoMetrics.from_dataset(self.dataset, self.categories)

    def name(self, index: int) -> str:
        """What to call the image of a row: its file, or its id where it has none."""
        if "file_name" in self.dataset.column_names:
            return self.dataset.select_columns(["file_name"])[index]["file_name"]
        path = self.images[index]["image"]["path"]
        return os.path.basename(path) if path else f"{self.image_ids[index]}"

    def objects(self, row: int, height: int, width: int) -> dict[str, np.ndarray]:
        """The truth of a row, whose image has this size: `boxes` (float [n, 4], pixels, xyxy), `labels` (int [n])."""
        objects = self.dataset.select([row]).with_format("arrow")[:]["objects"]
        boxes, kept = usable_boxes(objects, width, height)
        boxes[:, 2:] += boxes[:, :2]
        return {"boxes": boxes, "labels": read_values(objects, "category")[0].astype(int)[kept]}


def prepare_image(image: np.ndarray, image_processor, image_id: int) -> dict:
    """An image (RGB uint8 [height, width, 3]) as an item of [`EvaluationImages`]."""
    # Only its resizing: padding is the collator's, which keeps the mask, and normalising is done on the device.
    prepared = image_processor(
        images=with_both_sides(image, image_processor.size),
        do_rescale=False,
        do_normalize=False,
        do_pad=False,
        input_data_format="channels_last",
        return_tensors="pt",
    )
    labels = {"image_id": torch.tensor([image_id]), "orig_size": torch.tensor(image.shape[:2])}
    return {"image": prepared["pixel_values"][0], "labels": labels}


@torch.no_grad()
def predict_batches(
    detector,
    batches: Iterable[dict],
    image_processor,
    classes: list[int] | None = None,
    masks: bool = False,
    lowest_mask_score: float = _NO_SCORE,
) -> Iterator[tuple[list[int], list[dict]]]:
    """
    Detects objects in batches of images, and holds no more than one batch at a time.

    Args:
        detector (`PreTrainedModel`): Any detector; it is left in evaluation mode, on its device.
        batches (`Iterable[dict]`):
            As [`collate_labelled`] makes them of [`EvaluationImages`]: `pixel_values` (uint8 [B, 3, H, W]),
            `pixel_mask` (int64 [B, H, W]) and `labels`; only their `image_id` and `orig_size` are read.
        image_processor (`BaseImageProcessor`): The detector's: how to normalise, and what its outputs mean.
        classes (`list[int]`, *optional*):
            For each class of the detector the category to report, or -1 to leave its detections out.
        masks (`bool`, *optional*, defaults to `False`):
            Whether masks are wanted, of a detector that predicts them.
        lowest_mask_score (`float`, *optional*):
            Masks of detections with a lower score are left empty.

    Yields:
        `tuple`: the image ids of a batch and, for each, `scores` [n], `labels` [n] and `boxes` [n, 4] (xyxy in pixels
        of the stored image, not clipped to it) as NumPy arrays, and perhaps `masks` [n], run lengths of COCO in the
        stored image; every detection, whatever its score. Of a detector of torchvision these are its own, after
        suppression.
    """
    detector.eval()
    parameter = next(detector.parameters())
    normalization = normalization_of(image_processor) | {"dtype": parameter.dtype}
    most = all_detections(image_processor, detector)
    classes = None if classes is None else np.asarray(classes)
    for batch in batches:
        pixel_values, pixel_mask = (batch[name].to(parameter.device) for name in ("pixel_values", "pixel_mask"))
        outputs = detector(
            pixel_values=normalize_images(pixel_values, pixel_mask, **normalization), pixel_mask=pixel_mask
        )
        mask_logits = getattr(outputs, "pred_masks", None) if masks else None
        # The processors read these two only; in float32 also where the forward pass ran under autocast.
        outputs = SimpleNamespace(logits=outputs.logits.float(), pred_boxes=outputs.pred_boxes.float())
        sizes = [tuple(label["orig_size"].tolist()) for label in batch["labels"]]
        results = image_processor.post_process_object_detection(
            outputs, threshold=_NO_SCORE, target_sizes=sizes, **most
        )
        predictions = [{name: value.cpu().numpy() for name, value in result.items()} for result in results]
        if mask_logits is not None:
            places = _places(outputs, image_processor, most)
            for prediction, logits, place, size in zip(predictions, mask_logits, places, sizes, strict=True):
                prediction["masks"] = _pasted(logits[place].float().cpu(), prediction, size, lowest_mask_score)
        if classes is not None:
            predictions = [_relabelled(prediction, classes) for prediction in predictions]
        yield [int(label["image_id"]) for label in batch["labels"]], predictions


def _places(outputs: SimpleNamespace, image_processor, most: dict[str, int]) -> list[torch.Tensor]:
    """Which query each detection of an image is of, which the processor does not tell: the boxes say it here."""
    numbers = torch.arange(outputs.logits.shape[1], device=outputs.logits.device)
    boxes = torch.stack([numbers, numbers, 0 * numbers, 0 * numbers], -1).float()
    numbered = SimpleNamespace(logits=outputs.logits, pred_boxes=boxes.expand(len(outputs.logits), -1, -1))
    results = image_processor.post_process_object_detection(numbered, threshold=_NO_SCORE, **most)
    return [result["boxes"][:, 0].round().long() for result in results]


def _pasted(logits: torch.Tensor, prediction: dict, size: tuple[int, int], lowest_score: float) -> np.ndarray:
    """Masks `[n, 28, 28]` in their boxes, in an image of this size, one after the other: run lengths `[n]`."""
    masks = np.empty(len(logits), dtype=object)
    boxes = torch.from_numpy(prediction["boxes"])
    for number, (mask, score) in enumerate(zip(logits.sigmoid(), prediction["scores"], strict=True)):
        if score >= lowest_score:
            pasted = paste_masks_in_image(mask[None, None], boxes[number : number + 1], size)[0, 0] > 0.5
            masks[number] = run_lengths(pasted.numpy())
        else:
            masks[number] = run_lengths(np.zeros(size))
    return masks


def normalization_of(image_processor) -> dict:
    """What [`normalize_images`] needs (`mean`, `std`, `rescale_factor`) to do what an image processor does."""
    mean, std = (image_processor.image_mean, image_processor.image_std) if image_processor.do_normalize else (0, 1)
    return {
        "mean": np.broadcast_to(mean, 3).tolist(),  # one number stands for all channels
        "std": np.broadcast_to(std, 3).tolist(),
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
    if len(names) == len(categories) and are_unnamed(id2label):
        return list(range(len(names)))
    missing = [name for name in categories if name not in names]
    if missing:
        raise DataError(
            f"the detector has no class for {listed(missing, 8)}: the dataset has the categories "
            f"{listed(categories, 8)}, the detector the classes {listed(names, 8)}. Rename the categories, or "
            "fine-tune first."
        )
    return [categories.index(name) if name in categories else -1 for name in names]


def coco_detections(image_id: int | str, prediction: dict, category_ids: list | None = None) -> list[dict]:
    """
    One image's detections in COCO's result format: `bbox` is xywh, `category_id` the id of the category, which is its
    index by default, `segmentation` the mask, if there is one.
    """
    category_of = (lambda label: label) if category_ids is None else category_ids.__getitem__
    x1, y1, x2, y2 = prediction["boxes"].T.tolist() if len(prediction["boxes"]) else ([], [], [], [])
    labels, scores = prediction["labels"].tolist(), prediction["scores"].tolist()
    masks = [{FIELD: mask} for mask in prediction["masks"]] if "masks" in prediction else [{}] * len(labels)
    return [
        {"image_id": image_id, "category_id": category_of(label), "bbox": [a, b, c - a, d - b], "score": score} | mask
        for a, b, c, d, label, score, mask in zip(x1, y1, x2, y2, labels, scores, masks, strict=True)
    ]


def _relabelled(prediction: dict, classes: np.ndarray) -> dict:
    labels = classes[prediction["labels"]]
    kept = labels >= 0
    return {name: value[kept] for name, value in (prediction | {"labels": labels}).items()}
