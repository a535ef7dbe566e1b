"""A plain labelled `datasets.Dataset` as [`DetectionTrainer`] trains with it and measures on it."""

import datasets
from torch.utils.data import Dataset

from ..data.dataset import LabelledImages
from ..data.formats import load_labelled
from ..data.views import ViewConfig
from ..detectors.families import family_of
from ..evaluation.detections import EvaluationImages

DEFAULT_SIZE = 640  # of images, in pixels, without an image processor that has one


def size_of(image_processor) -> int:
    """The size in pixels that an image processor resizes to: the shorter side, or both sides."""
    size = image_processor.size
    return size.get("shortest_edge") or size.get("height") or DEFAULT_SIZE


def training_images(dataset, model, args, image_processor) -> Dataset:
    """
    A [`LabelledImages`] of a `datasets.Dataset` with the columns `image` and `objects`; anything else as it is.

    Images are flipped at random; their sizes are `image_sizes` of the arguments, or the size of the image processor.
    """
    if not isinstance(dataset, datasets.Dataset):
        if not isinstance(dataset, Dataset | None):
            raise ValueError(
                "train_dataset must be a datasets.Dataset with the columns image and objects, got a "
                f"{type(dataset).__name__}; load_dataset_source reads one"
            )
        return dataset
    dataset, _ = _labelled(dataset, model)
    sizes = getattr(args, "image_sizes", None) or [size_of(image_processor)]
    view = ViewConfig(list(sizes), resize=family_of(model.config).resize, color=False)
    return LabelledImages(dataset, view, seed=args.seed, masks=family_of(model.config).masks)


def evaluation_images(dataset, model, image_processor) -> Dataset:
    """An [`EvaluationImages`] of a `datasets.Dataset`, as [`training_images`] takes it; anything else as it is."""
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    return EvaluationImages(*_labelled(dataset, model), image_processor)


def _labelled(dataset: datasets.Dataset, model) -> tuple[datasets.Dataset, list[str]]:
    """The data set in our form, checked, and its categories, which must be the first classes of the model."""
    dataset, categories, _ = load_labelled(dataset)
    if len(categories) > model.config.num_labels:
        raise ValueError(
            f"the data set has {len(categories)} categories, the detector {model.config.num_labels} classes: "
            "`transfer_detector` of aligndet_hf.detectors.transfer gives it others, and so does `finetune`"
        )
    return dataset, categories
