"""A plain labelled `datasets.Dataset` as [`DetectionTrainer`] trains with it and measures on it."""

from collections.abc import Mapping

import datasets
import torch
from torch.utils.data import Dataset

from ..data.dataset import LabelledImages, MixedImages
from ..data.door import listed
from ..data.formats import load_labelled
from ..data.readers.spellings import with_categories
from ..data.sampling import SampleKey
from ..data.views import ViewConfig
from ..detectors.classes import are_unnamed, class_fields
from ..detectors.families import family_of
from ..evaluation.detections import EvaluationImages

DEFAULT_SIZE = 640  # of images, in pixels, without an image processor that has one


def size_of(image_processor) -> int:
    """The size in pixels that an image processor resizes to: the shorter side, or both sides."""
    size = image_processor.size
    return size.get("shortest_edge") or size.get("height") or DEFAULT_SIZE


def training_images(dataset, model, args, image_processor, is_collated: bool = False) -> Dataset:
    """
    A [`LabelledImages`] of a `datasets.Dataset` with the columns `image` and `objects`; anything else as it is.

    Images are flipped at random; their sizes are `image_sizes` of the arguments, or the size of the image processor.

    Raises:
        ValueError: it is no data set, or one with a transform whose items (`is_collated`) somebody's collator expects.
    """
    if not isinstance(dataset, datasets.Dataset):
        if not isinstance(dataset, Dataset | None) or isinstance(dataset, datasets.IterableDataset):
            raise ValueError(
                "train_dataset must be a datasets.Dataset with the columns image and objects, got a "
                f"{type(dataset).__name__}; load_dataset_source reads one, datasets.Dataset.from_list(list(stream), "
                "features=stream.features) makes one of a stream"
            )
        return dataset
    if is_collated and dataset.format["type"] == "custom":
        raise ValueError(
            "train_dataset has a transform, which is not applied here, and data_collator is made for what it gives. "
            "Without the two, LabelledImages(dataset, ViewConfig([640]), augmentations=[...]) augments; or train with "
            "transformers' Trainer, after use_correct_loss(model)"
        )
    dataset, _ = _labelled(dataset, model)
    sizes = getattr(args, "image_sizes", None) or [size_of(image_processor)]
    view = ViewConfig(list(sizes), resize=family_of(model.config).resize, color=False)
    return LabelledImages(dataset, view, seed=args.seed, masks=family_of(model.config).masks)


def require_items(dataset: Dataset | None, is_collated: bool = False) -> None:
    """
    Refuses a torch data set that others have made, if its first item is not what [`LabelledImages`] would give; for a
    collator of somebody's own (`is_collated`) it may be anything.

    Raises:
        ValueError: it does not take a [`SampleKey`], or gives something else for it.
    """
    if dataset is None or isinstance(dataset, LabelledImages | MixedImages):
        return
    try:
        item = dataset[SampleKey(0, 0, 0)]
        if is_collated:
            return
        image, labels = item["image"], item["labels"]
        reason = None if image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 else f"image is {image!r}"
        reason = reason if {"boxes", "class_labels"} <= set(labels) else f"labels have {', '.join(map(str, labels))}"
    except Exception as error:  # of somebody's code
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise ValueError(
            f"train_dataset[SampleKey(0, 0, 0)] must give image (uint8 [3, height, width]) and labels with boxes "
            f"(cxcywh, 0 to 1) and class_labels: {' '.join(reason.split())[:200]}. A datasets.Dataset with "
            "image and objects is taken as it is. SampleKey is in aligndet_hf.data.sampling: its index is the row"
        )


def evaluation_images(dataset, model, image_processor) -> Dataset:
    """An [`EvaluationImages`] of a `datasets.Dataset`, as [`training_images`] takes it; one is left as it is."""
    if isinstance(dataset, Mapping):  # several, by name
        return {name: evaluation_images(part, model, image_processor) for name, part in dataset.items()}
    if dataset is None or isinstance(dataset, EvaluationImages):
        return dataset
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            "eval_dataset must be a datasets.Dataset with the columns image and objects, or EvaluationImages, got a "
            f"{type(dataset).__name__}"
        )
    return EvaluationImages(*_labelled(dataset, model), image_processor)


def _labelled(dataset: datasets.Dataset, model) -> tuple[datasets.Dataset, list[str]]:
    """
    The data set in our form, checked, and its categories, which become the classes of the model: by name, if both have
    names, else in order. A model whose classes have no names takes them.
    """
    dataset, categories, _ = load_labelled(dataset)
    classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
    others = "`transfer_detector` of aligndet_hf.detectors.transfer gives it others, and so does `finetune`"
    if len(categories) > len(classes):
        raise ValueError(
            f"the data set has {len(categories)} categories, the detector {len(classes)} classes: {others}"
        )
    if categories == [str(index) for index in range(len(categories))]:  # numbers, which have no names
        return dataset, categories
    if are_unnamed(model.config.id2label):
        if len(classes) == len(categories):
            for name, value in class_fields(None, categories).items():
                setattr(model.config, name, value)
        return dataset, categories
    if unknown := [name for name in categories if name not in classes]:
        raise ValueError(
            f"the detector has no class {listed(unknown, 8)}, it has the classes {listed(classes, 8)}: {others}"
        )
    if categories != classes[: len(categories)]:
        dataset, categories = with_categories(dataset, categories, classes), classes
    return dataset, categories
