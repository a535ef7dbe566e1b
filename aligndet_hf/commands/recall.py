"""`aligndet recall`: which objects the proposals find, and which are objects, beside boxes that saw no image."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..arguments import DatasetArguments, MeasureArguments, OptimisationArguments, ProgressArguments, again
from ..data.arrow_boxes import find_faults, read_boxes, read_crowds, read_values, usable_boxes
from ..data.bit_depth import pixel_window
from ..data.columns import arrow_batches, validate_proposals
from ..data.errors import DataError, ImageError
from ..data.formats import load_dataset_source
from ..data.images import decode_image, image_size
from ..data.splits import spread_rows
from ..evaluation.diagnosis import SIZES
from ..evaluation.image_matches import THRESHOLDS
from ..files import write_json
from ..flags import flag, takes_arguments
from ..proposals.controls import grid_boxes, random_boxes
from ..proposals.filters import box_iou
from ..ranges import COUNT
from ..reporting.drawing import contact_sheet, draw_boxes, enlarged
from ..reporting.pictures import new_figure, plot_recall
from ..runs import measuring_folder

LIMITS = (10, 50, 100, 300, 1000)
RANKS = (1, 4, 10)  # pre-training takes no more than the first few boxes of an image

# Bounds of sqrt(area of the box / area of the image), the lower one inclusive.
RELATIVE_SIZES = {"below 0.1": (0, 0.1), "0.1 to 0.3": (0.1, 0.3), "above 0.3": (0.3, np.inf)}
_SHEET_SIDE = 480  # of a picture in pixels
_NAMES = {name: f"{name} of the image's size" for name in RELATIVE_SIZES}


@dataclass(kw_only=True)
class RecallArguments(MeasureArguments, ProgressArguments, DatasetArguments):
    """Arguments of [`measure_recall`]: the flags of `aligndet recall` and the keys of its recipes."""

    help_groups = {"seed": "Control", "plot": "Output"}

    dataset: str = again(
        DatasetArguments,
        "dataset",
        help="images with a column `proposals`, and `objects` to compare with; without labels the boxes are counted "
        "and drawn",
    )
    split: str | None = again(DatasetArguments, "split", help="split of the dataset, if there are several")

    seed: int = again(OptimisationArguments, "seed", help="seed of the random boxes beside the proposals")

    output_dir: str | None = again(MeasureArguments, "output_dir", help="folder for recall.json and the pictures")
    plot: bool = flag(True, "output", "draw the recall over the number of boxes: recall.png")
    num_pictures: int = flag(0, "output", "draw the first boxes of this many images: proposals.png")
    num_boxes: int = flag(10, "output", "draw this many boxes of an image, the best ones", range=COUNT)

    def __post_init__(self):
        super().__post_init__()
        if self.num_pictures and self.output_dir is None:
            raise ValueError("num_pictures needs an output_dir to write to")


@takes_arguments
def measure_recall(arguments: RecallArguments) -> dict:
    """
    Measures what the proposals of a data set find of its labels, and prints a table.

    Args:
        arguments ([`RecallArguments`]): The configuration.

    Returns:
        `dict`: `boxes`, statistics of the proposals (see [`BoxStatistics`]), and, where the data set has labels,
        `recall`: what [`RecallMeter.compute`] returns for the `proposals` and for the controls, `random` and `grid`.

    Raises:
        DataError: there is no column `proposals`, it is broken, or an image cannot be read.
    """
    with measuring_folder(arguments.output_dir, "recall", ["recall.json", "recall.png", "proposals.png"]) as folder:
        return _measure(arguments, folder)


def _measure(arguments: RecallArguments, folder: Path | None) -> dict:
    """Does the work of [`measure_recall`]."""
    dataset = load_dataset_source(arguments.dataset, arguments.split)
    print(validate_proposals(dataset, arguments.dataset))
    if folder is not None and arguments.plot:
        new_figure(1, 1)  # says now that matplotlib is missing
    labelled = "objects" in dataset.column_names
    statistics = BoxStatistics()
    meters = {name: RecallMeter() for name in ("proposals", "random", "grid")}
    with tqdm(total=len(dataset), desc="recall", unit="image", disable=arguments.disable_tqdm) as progress:
        for row, (boxes, truth, areas, size) in enumerate(_rows(dataset, arguments.dataset)):
            statistics.update(boxes, size)
            if labelled:
                seed = arguments.seed + row
                lists = {"proposals": boxes, "random": random_boxes(size, LIMITS[-1], seed), "grid": grid_boxes(size)}
                for name, meter in meters.items():
                    meter.update(lists[name], truth, areas, size)
            progress.update()
    results = {"boxes": statistics.compute()}
    if labelled:
        results["recall"] = {name: meter.compute() for name, meter in meters.items()}
    print(format_statistics(results["boxes"]))
    if labelled:
        print(f"\n{format_recall(results['recall'])}")
    else:
        print("There is no column 'objects': without labels there is no recall to measure.")
    if folder is not None:
        record = {"dataset": arguments.dataset, "split": arguments.split, "seed": arguments.seed, **results}
        write_json(folder / "recall.json", record)
        if labelled and arguments.plot:
            plot_recall(results["recall"], folder / "recall.png")
        if arguments.num_pictures:
            _draw(dataset, folder / "proposals.png", arguments.num_pictures, arguments.num_boxes)
    return results


class RecallMeter:
    """
    Recall and average recall of the first k boxes, fed image by image; it holds counts only.

    As in COCO's evaluation (`useCats=0`), proposals choose in their order: each takes, of the objects that overlap it
    enough and are not yet taken, the one it overlaps most. So one box finds one object at most. The numbers equal the
    average recall of pycocotools with the same `maxDets`.

    Precision asks something else: whether a box is an object. A box is right where it overlaps any object with an IoU
    of at least 0.5, also one that an earlier box overlaps as well.

    Args:
        limits (`tuple[int, ...]`, *optional*, defaults to `(10, 50, 100, 300, 1000)`): The values of k, ascending.
    """

    def __init__(self, limits: tuple[int, ...] = LIMITS):
        self.limits = limits
        self.first = np.zeros(len(RANKS), dtype=np.int64)  # boxes among the first k of their image
        self.right = np.zeros(len(RANKS), dtype=np.int64)
        self.images_with_objects, self.images_found = 0, np.zeros(len(RANKS), dtype=np.int64)
        self.groups = ["all", *SIZES, *RELATIVE_SIZES]
        self.objects = np.zeros(len(self.groups), dtype=np.int64)
        self.found = np.zeros((len(self.groups), len(limits), len(THRESHOLDS)), dtype=np.int64)
        self.images = self.boxes = 0

    def update(
        self,
        boxes: np.ndarray,
        objects: np.ndarray,
        areas: np.ndarray | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """
        Adds an image.

        Args:
            boxes (`np.ndarray` of shape `[N, 4]`): Proposals, absolute `xywh`, best first.
            objects (`np.ndarray` of shape `[M, 4]`): True boxes, absolute `xywh`.
            areas (`np.ndarray` of shape `[M]`, *optional*):
                Areas of the objects in pixels, which decide what is small, medium (from 32² pixels) and large (from
                96²). Width times height of the box by default, and where it is NaN.
            image_size (`tuple[int, int]`, *optional*):
                `(height, width)`; without it the object belongs to none of the sizes relative to the image.
        """
        boxes, objects = (np.asarray(value, dtype=np.float64).reshape(-1, 4) for value in (boxes, objects))
        member = np.stack([np.ones(len(objects), dtype=bool), *_size_groups(objects, areas, image_size).values()])
        ranks = _ranks_of_finders(boxes[: self.limits[-1]], objects, member)
        self._count_right(boxes[: RANKS[-1]], objects)
        self.objects += member.sum(axis=1)
        self.found += (ranks[:, None] < np.array(self.limits)[:, None, None]).sum(axis=-1)
        self.images += 1
        self.boxes += len(boxes)

    def _count_right(self, boxes: np.ndarray, objects: np.ndarray) -> None:
        """Adds the first boxes of an image to the counts of precision."""
        is_right = (box_iou(boxes, objects) >= THRESHOLDS[0]).any(axis=1)
        self.images_with_objects += len(objects) > 0
        for place, rank in enumerate(RANKS):
            self.first[place] += len(boxes[:rank])
            self.right[place] += is_right[:rank].sum()
            self.images_found[place] += is_right[:rank].any()

    def compute(self) -> dict:
        """
        The recall and the precision over what was added so far.

        Returns:
            `dict`: for all objects (`"all"`) and each size (`"small"`, ..., `"below 0.1"`, ...) the number of
            `objects` and, per k, `recall@k` (IoU of at least 0.5) and `AR@k` (mean over the IoU thresholds
            .50:.05:.95), both between 0 and 1, or -1 where there is no such object; the number of `images`, and
            `boxes_per_image`, the mean number of proposals. `"all"` has, for k = 1, 4 and 10, `precision@k`, the share
            of right ones among the first k boxes of every image, and `images@k`, of the images with objects the share
            with a right one among their first k; -1 where there are no boxes, or no objects.

        Raises:
            `ValueError`: If there was no image.
        """
        if not self.images:
            raise ValueError("There is no image to measure recall on.")
        results = {"images": self.images, "boxes_per_image": self.boxes / self.images}
        for group, count, found in zip(self.groups, self.objects.tolist(), self.found, strict=True):
            recalls = found / count if count else np.full(found.shape, -1.0)
            results[group] = {"objects": count}
            results[group] |= {f"recall@{k}": float(r[0]) for k, r in zip(self.limits, recalls, strict=True)}
            results[group] |= {f"AR@{k}": float(r.mean()) for k, r in zip(self.limits, recalls, strict=True)}
        shares = {"precision": (self.right, self.first), "images": (self.images_found, [self.images_with_objects] * 3)}
        for name, (found, counts) in shares.items():
            pairs = zip(RANKS, found.tolist(), map(int, counts), strict=True)
            results["all"] |= {f"{name}@{k}": right / count if count else -1.0 for k, right, count in pairs}
        return results


class BoxStatistics:
    """How many boxes there are in an image, and how large they are; fed image by image."""

    def __init__(self):
        self.counts = []
        self.sizes = dict.fromkeys([*SIZES, *RELATIVE_SIZES], 0)

    def update(self, boxes: np.ndarray, image_size: tuple[int, int]) -> None:
        """Adds the boxes `[N, 4]` (absolute `xywh`) of an image of the size `(height, width)`."""
        self.counts.append(len(boxes))
        for name, member in _size_groups(boxes.astype(np.float64), None, image_size, overlap=False).items():
            self.sizes[name] += int(member.sum())

    def compute(self) -> dict:
        """`per_image`: `min`, `median`, `mean` and `max`; `share` of a size among all boxes, between 0 and 1."""
        total = max(sum(self.counts), 1)
        statistics = {name: float(getattr(np, name)(self.counts)) for name in ("min", "median", "mean", "max")}
        return {"per_image": statistics, "share": {name: count / total for name, count in self.sizes.items()}}


def format_statistics(statistics: Mapping) -> str:
    """Lays out what [`BoxStatistics.compute`] returns for a terminal."""
    counts = statistics["per_image"]
    shares = [f"{100 * share:.1f} % {name}" for name, share in statistics["share"].items()]
    lines = [
        f"boxes an image: mean {counts['mean']:.1f}, min {counts['min']:g}, median {counts['median']:g}, "
        f"max {counts['max']:g}",
        f"  by area: {', '.join(shares[: len(SIZES)])}",
        f"  by size relative to the image: {', '.join(shares[len(SIZES) :])}",
    ]
    return "\n".join(lines)


def format_recall(results: Mapping[str, Mapping]) -> str:
    """
    Lays out recall for a terminal, in percent.

    Args:
        results (`Mapping[str, Mapping]`): Name of each list of boxes to what [`RecallMeter.compute`] returns for it.

    Returns:
        `str`: A block of rows for all objects, and one for each size that there is.
    """
    first, width = next(iter(results.values())), max(len("first boxes"), *map(len, results)) + 2
    limits = [name.removeprefix("AR@") for name in first["all"] if name.startswith("AR@")]
    lines = _header(["recall (IoU 0.5), %", "average recall, %"], limits, width)
    for group in [name for name, values in first.items() if isinstance(values, Mapping) and values["objects"]]:
        lines.append(f"{_NAMES.get(group, group)} ({first[group]['objects']} objects)")
        lines += _lines(results, group, ["recall", "AR"], limits, width)
    lines += ["", *_header(["boxes on an object, %", "images with one, %"], RANKS, width)]
    return "\n".join(lines + _lines(results, "all", ["precision", "images"], RANKS, width))


def _header(titles: list[str], ranks: Iterable, width: int) -> list[str]:
    """The head of a table of two halves, each with a column for each number of first boxes."""
    numbers = "".join(f"{rank:>7}" for rank in ranks)
    return [
        f"{'':<{width}}" + "   ".join(title.rjust(len(numbers)) for title in titles),
        f"{'first boxes':<{width}}" + "   ".join([numbers] * len(titles)),
    ]


def _lines(results: Mapping[str, Mapping], group: str, kinds: list[str], ranks: Iterable, width: int) -> list[str]:
    """The rows of such a table: one for each list of boxes."""
    lines = []
    for name, values in results.items():
        halves = ["".join(f"{100 * values[group][f'{kind}@{rank}']:>7.1f}" for rank in ranks) for kind in kinds]
        lines.append(f"  {name:<{width - 2}}" + "   ".join(halves))
    return lines


def _rows(dataset: datasets.Dataset, source: str):
    """Yields the boxes, the objects, their areas, and the size of the image of each row."""
    labelled = "objects" in dataset.column_names
    for start, table in arrow_batches(dataset, ["image", "proposals"] + ["objects"] * labelled, batch_size=100):
        boxes, counts = read_boxes(table["proposals"])
        lists = [np.split(boxes, np.cumsum(counts)[:-1])]
        if labelled:
            truth, counts = read_boxes(table["objects"])
            names = table["objects"].type.names
            areas = read_values(table["objects"], "area")[0] if "area" in names else truth[:, 2] * truth[:, 3]
            sound = (find_faults(truth) == 0) & ~read_crowds(table["objects"])
            counts = [int(part.sum()) for part in np.split(sound, np.cumsum(counts)[:-1])]
            lists += [np.split(values[sound], np.cumsum(counts)[:-1]) for values in (truth, areas)]
        else:
            lists += [[None] * len(table)] * 2
        for row, (image, *values) in enumerate(zip(table["image"], *lists, strict=True), start):
            try:
                yield *values, image_size(image.as_py())
            except ImageError as error:
                raise DataError(f"{source}, row {row}, column 'image': {error}") from error


def _draw(dataset: datasets.Dataset, path: Path, num_pictures: int, num_boxes: int) -> None:
    """Draws the first boxes of evenly spaced rows, numbered, over the objects (white) where there are any."""
    pictures, rows, note = [], spread_rows(len(dataset), num_pictures), f"the first {num_boxes} boxes, in their order"
    if labelled := "objects" in dataset.column_names:
        note += "; white: the objects"
    for table in dataset.select(rows).with_format("arrow").iter(1):
        image = decode_image(table["image"][0].as_py(), pixel_window(dataset))
        height, width = image.shape[:2]
        boxes, ranks = (values[:num_boxes] for values in usable_boxes(table["proposals"], width, height))
        objects = usable_boxes(table["objects"], width, height)[0] if labelled else boxes[:0]
        image, drawn = enlarged(image, np.concatenate([boxes, objects]), _SHEET_SIDE)
        labels = [*ranks.tolist(), *[None] * len(objects)]
        tags = ["" if rank is None else str(rank + 1) for rank in labels]
        pictures.append(draw_boxes(image, drawn, labels, tags, _SHEET_SIDE))
    contact_sheet(pictures, [f"row {row}" for row in rows], side=_SHEET_SIDE, note=note).save(path)


def _size_groups(
    boxes: np.ndarray, areas: np.ndarray | None, image_size: tuple[int, int] | None, overlap: bool = True
) -> dict:
    """Which boxes `[N, 4]` (xywh) have each size: boolean masks `[N]`; one between two areas has both for COCO."""
    area = boxes[:, 2] * boxes[:, 3]
    size = np.full(len(boxes), np.nan) if image_size is None else np.sqrt(np.maximum(area, 0) / np.prod(image_size))
    if areas is not None:
        areas = np.asarray(areas, dtype=np.float64)
        area = np.where(np.isnan(areas), area, areas)  # a null in Arrow is NaN
    below = np.less_equal if overlap else np.less  # pycocotools has both bounds inclusive
    groups = {name: (low <= area) & below(area, high) for name, (low, high) in SIZES.items()}
    return groups | {name: (low <= size) & (size < high) for name, (low, high) in RELATIVE_SIZES.items()}


def _ranks_of_finders(boxes: np.ndarray, truth: np.ndarray, member: np.ndarray) -> np.ndarray:
    """
    The place in the list of the box that finds each object; beyond any list if none does.

    The choice depends on the group: within a group only its objects `member [groups, M]` are there to be taken. (What
    pycocotools ignores it matches after everything else, so that ignoring and leaving out are the same.)

    Returns:
        `np.ndarray` of shape `[groups, thresholds, M]`.
    """
    ranks = np.full((len(member), len(THRESHOLDS), len(truth)), np.iinfo(np.int64).max)
    if not len(truth) or not len(boxes):
        return ranks
    # The last of equal overlaps wins in pycocotools: reversed, it is the first, which `argmax` finds.
    overlaps = box_iou(boxes, truth[::-1])
    free = np.repeat(member[:, None, ::-1], len(THRESHOLDS), axis=1)
    for rank in np.flatnonzero(overlaps.max(axis=1) >= THRESHOLDS[0]):
        candidates = np.where(free & (overlaps[rank] >= THRESHOLDS[:, None]), overlaps[rank], 0)
        group, threshold = np.nonzero(candidates.any(axis=2))
        best = candidates.argmax(axis=2)[group, threshold]
        ranks[group, threshold, best] = rank
        free[group, threshold, best] = False
    return ranks[..., ::-1]
