"""PyTorch data sets over a `datasets.Dataset` of undecoded images: views with proposals, and labelled images."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from .arrow_boxes import clean_boxes, read_boxes, read_values, usable_boxes
from .augmentations import AUGMENTATIONS, Augmentation, Sample, apply_transform
from .bit_depth import pixel_window
from .columns import require_columns
from .errors import ImageError
from .images import decode_image
from .masks import draw_regions, read_regions
from .sampling import SampleKey
from .soco_views import (
    assign_levels,
    draw_shared_boxes,
    flip_corners,
    make_soco_view,
    number_proposals,
    relative_corners,
    scale_boxes,
)
from .views import ViewConfig, draw_crop, draw_two_crops, make_view


def _sample_rng(seed: int, key: SampleKey) -> np.random.Generator:
    return np.random.default_rng((seed, key.epoch, key.index, *key.visit))


def _draw_sizes(count: int, view: ViewConfig, seed: int, key: SampleKey, rng: np.random.Generator) -> list[int]:
    """Sizes of `count` views: drawn per image, or per batch where all images of a batch must have the same size."""
    if view.resize == "square":
        rng = np.random.default_rng((seed, key.epoch, key.batch))
    return [view.sizes[i] for i in rng.integers(len(view.sizes), size=count)]


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """[h, w, 3] -> [3, h, w] without a copy: the collator's copy into the batch lays it out."""
    return torch.from_numpy(image).permute(2, 0, 1)


def _normalized_cxcywh(boxes: np.ndarray, image: np.ndarray) -> torch.Tensor:
    """Boxes xywh in pixels of an image [h, w, 3] -> cxcywh in 0..1 of this image."""
    height, width = image.shape[:2]
    centred = np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)
    return torch.from_numpy((centred / (width, height, width, height)).astype(np.float32))


class _Rows(Dataset):
    """Rows of a data set as Arrow tables, their images not decoded."""

    def open_rows(self, dataset: datasets.Dataset | datasets.IterableDataset, *needed: str, also: str = "") -> None:
        require_columns(dataset, list(needed))
        columns = [*needed, also] if also in dataset.column_names else list(needed)
        self.rows = dataset.select_columns(columns).with_format("arrow")
        self.window = pixel_window(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def read_image(self, row: pa.Table, index: int) -> np.ndarray:
        """The image of a row (a table of one row), whose number is told if it cannot be read."""
        try:
            return decode_image(row["image"][0].as_py(), self.window)
        except ImageError as error:
            raise ImageError(f"Row {index}, column 'image': {error}") from error


@dataclass(eq=False)
class ProposalViews(_Rows):
    """
    Two random views of an image with the same proposals, for pre-training.

    An item is `{"image", "labels", "momentum_image", "momentum_labels"}`. Images are uint8 [3, h, w]; labels are
    dictionaries of `boxes` (float32 [n, 4], cxcywh in 0..1 of the unpadded view), `class_labels` (int64 [n]: 0, or the
    cluster) and `proposal_ids` (int64 [n]: row of the proposal in the image's list). A box too small to see in one
    view is left out of that view only.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            With the columns `image` and `proposals`. A stream has no numbered rows: see
            [`~aligndet_hf.data.view_stream.ViewStream`].
        view ([`ViewConfig`]):
            How to draw each view. With a `crop_scale` both views get the boxes that both crops show.
        seed (`int`):
            Seed of all draws. An item depends on nothing but the seed and its [`SampleKey`].
        max_proposals (`int`):
            Proposals per image, at most; never more than the detector has queries.
        proposal_sampling (`str`, *optional*, defaults to `"top"`):
            `"top"`: the first ones, which have the highest scores. `"random"`: drawn anew for each epoch.
        use_clusters (`bool`, *optional*, defaults to `False`):
            Whether the clusters are the class labels.

    Raises:
        [`DataError`]: if a column is missing. Items raise [`ImageError`] for an image that cannot be decoded.
    """

    dataset: InitVar[datasets.Dataset | datasets.IterableDataset]
    view: ViewConfig
    _: KW_ONLY
    seed: int
    max_proposals: int
    proposal_sampling: str = "top"
    use_clusters: bool = False

    def __post_init__(self, dataset):
        self.open_rows(dataset, "image", "proposals")
        if self.proposal_sampling not in ("top", "random"):
            raise ValueError(f"proposal_sampling must be 'top' or 'random', got '{self.proposal_sampling}'.")
        if self.max_proposals < 1:
            raise ValueError(f"max_proposals must be at least 1, got {self.max_proposals}.")

    def _choose(self, count: int, rng: np.random.Generator) -> np.ndarray:
        if count <= self.max_proposals or self.proposal_sampling == "top":
            return np.arange(min(count, self.max_proposals))
        return np.sort(rng.choice(count, self.max_proposals, replace=False))

    def __getitem__(self, key: SampleKey) -> dict:
        return self.make_views(self.rows[key.index], key)

    def make_views(self, row: pa.Table, key: SampleKey) -> dict:
        """The item of a row (a table of one row, with the columns `image` and `proposals`)."""
        rng = _sample_rng(self.seed, key)
        image = self.read_image(row, key.index)
        height, width = image.shape[:2]
        boxes, ids = clean_boxes(read_boxes(row["proposals"])[0], width, height)
        chosen = self._choose(len(boxes), rng)
        boxes, ids = boxes[chosen], ids[chosen]
        if self.use_clusters:
            classes = read_values(row["proposals"], "cluster")[0][ids].astype(np.int64)
        else:
            classes = np.zeros(len(ids), dtype=np.int64)

        crops = (None, None)
        if self.view.crop_scale is not None:
            *crops, shared = draw_two_crops(height, width, boxes, rng, self.view.crop_scale)
            boxes, ids, classes = boxes[shared], ids[shared], classes[shared]
        item = {}
        sizes = _draw_sizes(2, self.view, self.seed, key, rng)
        for prefix, crop, size in zip(("", "momentum_"), crops, sizes, strict=True):
            view, view_boxes, kept = make_view(image, boxes, rng, self.view, size, crop)
            item[f"{prefix}image"] = _to_tensor(view)
            item[f"{prefix}labels"] = {
                "boxes": _normalized_cxcywh(view_boxes, view),
                "class_labels": torch.from_numpy(classes[kept]),
                "proposal_ids": torch.from_numpy(ids[kept]),
            }
        return item


@dataclass(eq=False)
class SoCoViews(_Rows):
    """
    The views of an image that SoCo compares: all of it, and crops of it, each with the boxes that the two share.

    An item is `{"images", "boxes", "levels", "ids"}`, each a list over the views. Images are uint8 [3, size, size];
    boxes float32 [b, 4], xyxy in 0..1 of the view; levels int64 [b], the level of the pyramid to pool a box from, -1
    for boxes too large for all; ids int64 [b], the number of the proposal in its image, equal for copies. There are
    `max_proposals` boxes in a crop, and in the whole image as many for each set of boxes.

    Args:
        dataset (`datasets.Dataset`):
            With the columns `image` and `proposals`.
        sizes (`list[int]`):
            Both sides of each view in pixels, the view of the whole image first.
        box_sets (`tuple[int]`):
            For each view but the first, which crop and set of boxes it shows: views of the same set differ in size.
        level_sizes (`list[float]`, *optional*):
            See [`~aligndet_hf.data.soco_views.assign_levels`]; without it all boxes are on level 0.
        seed (`int`):
            Seed of all draws. An item depends on nothing but the seed and its [`SampleKey`].
        max_proposals (`int`, *optional*, defaults to 4):
            Boxes per crop.
        proposal_sampling (`str`, *optional*, defaults to `"random"`):
            `"random"`: drawn from those that the crop shows. `"top"`: the first of them.
        crop_scale (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.0)`):
            Range of the area of a crop, relative to the image.
        flip_probability (`float`, *optional*, defaults to 0.5):
            Probability of a horizontal flip of each view.
        color (`bool`, *optional*, defaults to `True`):
            Whether to change the colours of each view.

    Raises:
        [`DataError`]: if a column is missing. Items raise [`ImageError`] for an image that cannot be decoded.
        `ValueError`: if there is not one size for each view.
    """

    dataset: InitVar[datasets.Dataset]
    sizes: list[int]
    box_sets: tuple[int, ...]
    level_sizes: list[float] | None = None
    _: KW_ONLY
    seed: int
    max_proposals: int = 4
    proposal_sampling: str = "random"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip_probability: float = 0.5
    color: bool = True

    def __post_init__(self, dataset):
        self.open_rows(dataset, "image", "proposals")
        if len(self.sizes) != len(self.box_sets) + 1:
            raise ValueError(
                f"expected one size for each of the {len(self.box_sets) + 1} views, the first for the whole image, "
                f"got {list(self.sizes)}."
            )

    def __getitem__(self, key: SampleKey) -> dict:
        rng = _sample_rng(self.seed, key)
        row = self.rows[key.index]
        image = self.read_image(row, key.index)
        height, width = image.shape[:2]
        proposals, _ = clean_boxes(read_boxes(row["proposals"])[0], width, height)
        sets = draw_shared_boxes(
            number_proposals(proposals, height, width),
            height,
            width,
            rng,
            count=self.max_proposals,
            num_crops=max(self.box_sets) + 1,
            scale=self.crop_scale,
            at_random=self.proposal_sampling == "random",
        )
        crops, in_image, in_crops = zip(*sets, strict=True)
        views = [((0, 0, height, width), in_image)]
        views += [(crops[index], in_crops[index : index + 1]) for index in self.box_sets]
        level_sizes = self.level_sizes or [float("inf")]

        item = {"images": [], "boxes": [], "levels": [], "ids": []}
        for view, ((crop, shown), size) in enumerate(zip(views, self.sizes, strict=True)):
            flip = rng.random() < self.flip_probability
            color = ("others" if view else "first") if self.color else "none"
            item["images"].append(_to_tensor(make_soco_view(image, crop, size, rng, flip=flip, color=color)))
            corners = np.concatenate([relative_corners(boxes, crop) for boxes in shown])
            item["boxes"].append(torch.from_numpy(flip_corners(corners) if flip else corners))
            levels = [assign_levels(scale_boxes(boxes, crop, size), level_sizes) for boxes in shown]
            item["levels"].append(torch.from_numpy(np.concatenate(levels)))
            item["ids"].append(torch.from_numpy(np.concatenate([boxes.ids for boxes in shown])))
        return item


# What belongs to a box of a labelled image.
_OBJECT = np.dtype([("category", np.int64), ("score", np.float32), ("ignore", np.bool_)])
_OBJECT_WITH_REGION = np.dtype([*_OBJECT.descr, ("region", object)])


@dataclass(eq=False)
class LabelledImages(_Rows):
    """
    Images with their objects, for fine-tuning and evaluation.

    An item is `{"image", "labels"}`: uint8 [3, h, w], and a dictionary of `boxes` (float32 [n, 4], cxcywh in 0..1 of
    the unpadded view), `class_labels` (int64 [n]), `image_id` (int64 [1]; the row number without such a column, or if
    ids are texts) and `orig_size` (int64 [2]: height and width in pixels of the stored image). Crowds are no objects
    and are left out. Areas follow from the boxes and are not passed on: a stored area is wrong after a resize or crop.

    Args:
        dataset (`datasets.Dataset`):
            With the columns `image`, `objects` and, optionally, `image_id`.
        view ([`ViewConfig`]):
            How to draw the view.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws. An item depends on nothing but the seed and its [`SampleKey`].
        augmentations (`Sequence[str | Callable]`, *optional*):
            What is done before the view is drawn, in this order: names of
            [`~aligndet_hf.data.augmentations.AUGMENTATIONS`], or callables of the form of
            `torchvision.transforms.v2` ([`~aligndet_hf.data.augmentations.apply_transform`]).
        augmentation_probability (`float`, *optional*, defaults to 0.5):
            Probability of each of the named ones. A callable is always applied: it draws by itself.
        pseudo (`bool`, *optional*, defaults to `False`):
            Whether the labels are a teacher's, as `aligndet pseudolabel` writes them. The labels of an item then have
            `weights` (float32 [n], the scores of the boxes) and `ignored_boxes` (float32 [m, 4], as `boxes`), which
            are neither objects nor background.
        masks (`bool`, *optional*, defaults to `False`):
            Whether the labels of an item have `masks` (uint8 [n, h, w], 1 on the object). Only of views all of whose
            objects have a segmentation; the others have boxes alone.

    Raises:
        [`DataError`]: if a column is missing. Items raise [`ImageError`] for an image that cannot be decoded, and
            `TypeError` if a random view is asked for by a bare row number, which would be the same in each epoch.
        `ValueError`: for an augmentation that does not exist.
    """

    dataset: InitVar[datasets.Dataset]
    view: ViewConfig
    _: KW_ONLY
    seed: int = 0
    augmentations: Sequence[str | Callable] = ()
    augmentation_probability: float = 0.5
    pseudo: bool = False
    masks: bool = False

    def __post_init__(self, dataset):
        self.open_rows(dataset, "image", "objects", also="image_id")
        if unknown := [name for name in self.augmentations if isinstance(name, str) and name not in AUGMENTATIONS]:
            raise ValueError(f"there is no augmentation {unknown[0]!r}: choose from {', '.join(AUGMENTATIONS)}")

    def read(self, index: int) -> Sample:
        """The image of a row and its objects, as they are stored; what cannot be used of the boxes is left out."""
        row = self.rows[index]
        image = self.read_image(row, index)
        height, width = image.shape[:2]
        boxes, kept = usable_boxes(row["objects"], width, height)
        what = np.zeros(len(kept), _OBJECT_WITH_REGION if self.masks else _OBJECT)
        if self.masks:
            found = read_regions(row["objects"], height, width)
            what["region"] = [found[number] if found else None for number in kept]
        for name in ("category", "score", "ignore") if self.pseudo else ("category",):
            what[name] = read_values(row["objects"], name)[0][kept]
        return Sample(image, boxes, what)

    def _augmented(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for chosen in self.augmentations:
            if isinstance(chosen, str):
                augmentation: Augmentation = AUGMENTATIONS[chosen]
                if rng.random() < self.augmentation_probability:
                    rows = rng.integers(len(self), size=augmentation.others).tolist()
                    sample = augmentation.function(sample, [self.read(row) for row in rows], rng)
            else:
                sample = apply_transform(chosen, sample, rng)
        return sample

    def __getitem__(self, key: SampleKey | int) -> dict:
        if not isinstance(key, SampleKey):
            if self.view.is_random or self.augmentations:
                raise TypeError("Random views need a SampleKey: use EpochBatchSampler as the loader's batch_sampler.")
            key = SampleKey(int(key), 0, 0)
        rng = _sample_rng(self.seed, key)
        stored = self.read(key.index)
        sample = self._augmented(stored, rng)
        crop = None
        if self.view.crop_scale is not None:
            crop = draw_crop(*sample.image.shape[:2], rng, self.view.crop_scale)
        (size,) = _draw_sizes(1, self.view, self.seed, key, rng)
        view, boxes, what = make_view(sample.image, sample.boxes, rng, self.view, size, crop, sample.classes)
        row = self.rows[key.index]
        image_id = row["image_id"][0].as_py() if "image_id" in row.column_names else key.index
        image_id = image_id if isinstance(image_id, int) else key.index  # a text cannot be in a tensor
        boxes = _normalized_cxcywh(boxes, view)
        labels = {"image_id": torch.tensor([image_id]), "orig_size": torch.tensor(stored.image.shape[:2])}
        if self.pseudo:
            ignored = torch.from_numpy(what["ignore"])
            labels["ignored_boxes"] = boxes[ignored]
            what, boxes = what[~what["ignore"]], boxes[~ignored]
            labels["weights"] = torch.from_numpy(what["score"].copy())
        labels |= {"boxes": boxes, "class_labels": torch.from_numpy(what["category"].copy())}
        if (masks := draw_regions(what, *view.shape[:2])) is not None:
            labels["masks"] = torch.from_numpy(masks)
        return {"image": _to_tensor(view), "labels": labels}


@dataclass(eq=False)
class MixedImages(Dataset):
    """
    Labelled and pseudo-labelled images as one data set, the labelled ones first.

    Which of them form a batch is up to [`~aligndet_hf.data.sampling.MixedBatchSampler`].

    Args:
        labelled ([`LabelledImages`]): Images with labels.
        pseudo ([`LabelledImages`]): Images with the labels of a teacher.
        labelled_share (`float`): Share of labelled images in a batch, between 0 and 1.
    """

    labelled: LabelledImages
    pseudo: LabelledImages
    labelled_share: float

    def __len__(self) -> int:
        return len(self.labelled) + len(self.pseudo)

    def __getitem__(self, key: SampleKey) -> dict:
        if key.index < len(self.labelled):
            return self.labelled[key]
        return self.pseudo[key._replace(index=key.index - len(self.labelled))]
