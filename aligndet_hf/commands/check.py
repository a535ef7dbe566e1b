"""`aligndet check`: looks at a data set as a training would, and says everything that is wrong with it at once."""

from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np

from ..arguments import LabelledArguments, MeasureArguments, ProgressArguments, ViewArguments, again
from ..data.arrow_boxes import read_boxes, read_values
from ..data.checks import metric_note, objects_per_image, query_note
from ..data.columns import BoxReport, arrow_batches, image_batches, validate_objects, validate_proposals
from ..data.dataset import LabelledImages
from ..data.door import first, listed
from ..data.errors import DataError
from ..data.formats import (
    category_names,
    has_unread_labels,
    load_dataset_source,
    recognised,
    split_names,
    without_labels,
)
from ..data.label_export import LAYOUTS, export_labels
from ..data.leakage import Fingerprints, find_leaks, fingerprints
from ..data.pixels import ImageFacts, inspect_images
from ..data.readers import image_folder
from ..data.sampling import SampleKey
from ..data.splits import Splits, spread_rows
from ..data.views import PUBLISHED_SIZES, ViewConfig, choose_sizes, view_shape
from ..files import write_json
from ..flags import flag, takes_arguments
from ..ranges import COUNT
from ..reporting.drawing import contact_sheet, draw_boxes
from ..runs import measuring_folder

_SIDES = (8, 16, 32)  # pixels of a view; the finest feature map of most detectors has a cell for 8
_LISTED = 10


@dataclass(kw_only=True)
class CheckArguments(MeasureArguments, ProgressArguments, ViewArguments, LabelledArguments):
    """Arguments of [`check`]: the flags of `aligndet check` and the keys of its recipes."""

    help_groups = {"resize": "Views", "find_copies": "Data", "num_pictures": "Output"}

    dataset: str = again(
        LabelledArguments,
        "dataset",
        help="images, with or without labels: folder, label file, folder of save_to_disk or Hub id",
    )
    resize: str = flag(
        "shortest_edge", "result", "shortest_edge, as DETR does; or square, as RT-DETR, D-FINE and YOLOS do"
    )
    num_queries: int | None = flag(
        None, "result", "object queries of the detector: 100 of DETR, 300 of RT-DETR and most others", range=COUNT
    )
    find_copies: bool = flag(True, "result", "decode all images, to find copies that look the same as well")

    output_dir: str | None = again(
        MeasureArguments, "output_dir", help="folder for check.json and the sheet of pictures"
    )
    num_pictures: int = flag(
        12, "output", "draw this many images of a split, with their boxes, on a sheet: check-SPLIT.jpg"
    )
    export: str | None = flag(
        None,
        "output",
        "write images and labels as they were read, for other tools or to correct them, to a folder of that name in "
        "output_dir: coco, yolo or voc",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.export is not None and self.export not in LAYOUTS:
            raise ValueError(f"export must be one of {', '.join(LAYOUTS)}, got {self.export!r}")
        if self.export is not None and self.output_dir is None:
            raise ValueError("export needs an output_dir to write to")
        sizes = PUBLISHED_SIZES if self.image_sizes is None else self.image_sizes
        ViewConfig(sizes, self.max_size, self.resize)  # raises what is wrong with them


@dataclass
class SplitReport:
    """
    What was found in one split.

    Attributes:
        images (`int`): Its images.
        kinds (`dict[str, int]`): Images by format and mode, `"JPEG RGB"` for one.
        sizes (`dict`): The smallest, median and largest `width` and `height` in pixels, and `rotated`: images that
            their EXIF data turn by 90 degrees.
        objects (`int`, *optional*): Its boxes, crowds included; `None` without labels.
        objects_per_image (`dict`): `median`, `max` and `without`: images without objects.
        classes (`dict[str, int]`): Objects of each category.
        image_sizes (`list[int]`): Sizes of the views of a training: those that are given, or that it would choose.
        box_sides (`dict`): For the smallest and the largest of them the shares of boxes whose side,
            `sqrt(width * height)`, is below 8, 16 and 32 pixels of the view.
        copies (`list[list[str]]`): Images that look like one before them in the split, with the name of that.
        problems (`list[str]`): What has to be mended before a training.
        notes (`list[str]`): What one should know.
    """

    images: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    objects: int | None = None
    objects_per_image: dict = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    image_sizes: list[int] = field(default_factory=list)
    box_sides: dict = field(default_factory=dict)
    copies: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """
    What [`check`] returns.

    Attributes:
        source (`str`): The data set.
        recognised (`str`): What it was recognised as.
        splits (`dict[str, SplitReport]`): Per split what was found.
        leaks (`list[dict]`): Images that two splits share: `splits`, `image`, `seen`, `same_file`, `distance`.
        problems (`list[str]`): Those that concern no single split.
        notes (`list[str]`): What one should know of several splits.
    """

    source: str
    recognised: str
    splits: dict[str, SplitReport] = field(default_factory=dict)
    leaks: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        """Everything that has to be mended."""
        return self.problems + [problem for split in self.splits.values() for problem in split.problems]

    @property
    def exit_code(self) -> int:
        """What the command ends with: 1 if there is a problem."""
        return 1 if self.all_problems else 0


@takes_arguments
def check(arguments: CheckArguments) -> CheckReport:
    """
    Looks at a data set as a training would, without one, and prints what it finds.

    Every image is opened, every label is compared with its image, and all problems are told at once, each with its
    place and the fix. `finetune`, `evaluate` and `pretrain` make the same checks, and stop at the first.

    Args:
        arguments ([`CheckArguments`]): The configuration.

    Returns:
        [`CheckReport`]

    Raises:
        DataError: there is no such data set.
        ValueError: another process works in `output_dir`, or it is another command's.
        OSError: `output_dir` cannot be written to.
    """
    with measuring_folder(arguments.output_dir, "check", ["check.json", "check-*.jpg"]) as folder:
        return _check(arguments, folder)


def _check(arguments: CheckArguments, folder: Path | None) -> CheckReport:
    source = arguments.dataset
    report = CheckReport(source, recognised(source))
    print(f"{source}: {report.recognised}")
    prints, labelled = {}, {}
    for name in [arguments.split] if arguments.split else split_names(source):
        split = report.splits[name] = SplitReport()
        try:
            dataset = load_dataset_source(source, name, image_dir=arguments.image_dir)
        except DataError as error:
            split.problems.append(str(error))
            print(_describe(name, split))
            continue
        _check_split(dataset, f"{source}, {name}", arguments, split)
        if arguments.find_copies:
            prints[name] = fingerprints(dataset, arguments.disable_tqdm)
            split.copies = [[leak["image"], leak["seen"]] for leak in _copies(prints[name])]
        if split.classes:
            labelled[name] = dataset
        elif "objects" not in dataset.column_names and report.recognised == image_folder.NAME:
            images = Path(source).expanduser()
            is_problem = has_unread_labels(images) and not image_folder.has_metadata(images)
            (split.problems if is_problem else split.notes).append(without_labels(images))
        print(_describe(name, split))
        if folder is not None and arguments.num_pictures and split.classes and not split.problems:
            _draw(dataset, split, arguments, folder / f"check-{name}.jpg")
    for one, other in combinations(prints, 2):
        for leak in find_leaks(prints[one], prints[other]):
            report.leaks.append({"splits": [other, one], **leak})
    _tell_leaks(report)
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    number = len(report.all_problems)
    print(f"{number or 'no'} problem{'s' * (number != 1)} found")
    if folder is not None:
        write_json(folder / "check.json", asdict(report))
    if arguments.export is not None:
        _export(labelled, report, arguments)
    return report


def _tell_leaks(report: CheckReport) -> None:
    """A file that is in two splits is a problem; images that look the same may be right, such as two of one scene."""
    for same_file, told, what in (
        (True, report.problems, "are in another one as well. Remove them from one of the two, or numbers measured on "
         "it say too much"),
        (False, report.notes, "look like one of another split. If they are copies, remove them from one of the two"),
    ):  # fmt: skip
        leaks = [leak for leak in report.leaks if leak["same_file"] == same_file]
        if leaks:
            pairs = [(leak["image"], leak["splits"][0], leak["seen"], leak["splits"][1]) for leak in leaks]
            found = listed(f"{image} ({split}) = {seen} ({other})" for image, split, seen, other in pairs)
            told.append(f"{len(leaks)} images of one split {what}: {found}")


def _export(labelled: Splits, report: CheckReport, arguments: CheckArguments) -> None:
    """Writes the splits in another layout, if none has a problem that would be written as well."""
    if not labelled or any(split.problems for split in report.splits.values()):
        print("Nothing is exported: there must be labels, and no problem in any split.")
        return
    folder = Path(arguments.output_dir) / arguments.export
    names = [category_names(split, arguments.dataset) for split in labelled.values()]
    for line in export_labels(labelled, max(names, key=len), folder, arguments.export):
        print(f"note: {line}")
    print(f"Exported to {folder}")


def _check_split(dataset: datasets.Dataset, source: str, arguments: CheckArguments, split: SplitReport) -> None:
    """Fills in what there is to say of a split."""
    split.images = len(dataset)
    if not split.images:
        split.problems.append(f"{source}: there is no image in it.")
        return
    facts = inspect_images(lambda: image_batches(dataset), len(dataset))
    split.kinds = facts.kinds
    split.problems += [f"{source}, row {row}: {reason}" for row, reason in facts.faults.items()]
    if len(facts.faults) == len(dataset):
        return
    split.sizes = _sizes(facts)
    if "objects" not in dataset.column_names:
        split.notes += facts.notes()
        if "proposals" in dataset.column_names:
            _validated(lambda rows: validate_proposals(rows, source, images=facts), dataset, split)
        return
    try:
        names = category_names(dataset, arguments.dataset)
    except DataError as error:
        split.problems.append(str(error))
        return
    report = _validated(lambda rows: validate_objects(rows, names, source, images=facts), dataset, split)
    if report is None:
        return
    counts, commonest = objects_per_image(dataset)
    split.objects = report.boxes
    split.objects_per_image = {
        "median": float(np.median(counts)),
        "max": int(counts.max()),
        "without": int((counts == 0).sum()),
    }
    notes = [metric_note(commonest), arguments.num_queries and query_note(counts, arguments.num_queries)]
    split.notes += filter(None, notes)
    labels = [read_values(table["objects"], "category")[0] for _, table in arrow_batches(dataset, ["objects"])]
    found = np.bincount(np.concatenate(labels).astype(np.int64), minlength=len(names))
    split.classes = dict(zip(names, found.tolist(), strict=True))
    without = [name for name, count in split.classes.items() if not count]
    if without:
        split.notes.append(f"{len(without)} of {len(names)} categories have no object here: {listed(without)}")
    split.image_sizes = arguments.image_sizes or choose_sizes(PUBLISHED_SIZES, facts.sizes)[0]
    split.box_sides = _box_sides(dataset, facts.sizes, split.image_sizes, arguments)


def _validated(validate, dataset: datasets.Dataset, split: SplitReport) -> BoxReport | None:
    """What a validation says; sizes in the labels that are wrong hide no other problem."""
    own = [name for name in ("width", "height") if name in dataset.column_names]
    for rows in (dataset, dataset.remove_columns(own)) if own else (dataset,):
        try:
            report = validate(rows)
        except DataError as error:
            if str(error) not in split.problems:
                split.problems.append(str(error))
            continue
        for reason, count in report.dropped.items():
            places = ", ".join(map(str, report.listed[reason]))
            split.notes.append(f"{count} boxes will be dropped: {reason} (rows {places})")
        split.notes += report.notes
        return report
    return None


def _sizes(facts: ImageFacts) -> dict:
    sizes = facts.sizes[(facts.sizes > 0).all(axis=1)]
    described = {}
    for name, values in zip(("height", "width"), sizes.T, strict=True):
        described[name] = {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
    return described | {"rotated": int(facts.rotated.sum())}


def _box_sides(
    dataset: datasets.Dataset, sizes: np.ndarray, of_views: list[int], arguments: CheckArguments
) -> dict[str, dict[str, float]]:
    """For the smallest and the largest size of views the shares of boxes below some sides, in pixels of the view."""
    boxes, rows = [], []
    for start, table in arrow_batches(dataset, ["objects"]):
        found, counts = read_boxes(table["objects"])
        boxes.append(found)
        rows.append(np.repeat(np.arange(start, start + len(counts)), counts))
    boxes, rows = np.concatenate(boxes), np.concatenate(rows)
    boxes, rows = boxes[(sizes[rows] > 0).all(axis=1)], rows[(sizes[rows] > 0).all(axis=1)]
    sides = np.sqrt(np.clip(boxes[:, 2], 0, None) * np.clip(boxes[:, 3], 0, None))
    described = {}
    for size in sorted({min(of_views), max(of_views)}):
        # An image that cannot be read has no size; its boxes are left out.
        views = [
            view_shape(*image, arguments.resize, size, arguments.max_size) for image in np.maximum(sizes, 1).tolist()
        ]
        scales = np.sqrt(np.prod(views, axis=1) / np.maximum(sizes, 1).prod(axis=1))
        seen = sides * scales[rows]
        described[str(size)] = {f"below {side}": round(float((seen < side).mean()), 4) for side in _SIDES}
    return described


def _copies(prints: Fingerprints) -> list[dict]:
    """Images that look like one before them: compared with images of their own split."""
    copies = []
    for number in range(1, len(prints.names)):
        before = Fingerprints(prints.names[:number], prints.contents[:number], prints.looks[:number], 0)
        one = Fingerprints(prints.names[number:][:1], prints.contents[number:][:1], prints.looks[number:][:1], 0)
        copies += find_leaks(before, one)
    return copies


# ---- what is shown ----


def _describe(name: str, split: SplitReport) -> str:
    """A split in words."""
    lines = [f"\n{name}: {split.images} images" + (f", {split.objects} boxes" if split.objects is not None else "")]
    if split.kinds:
        lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in split.kinds.items()))
    if split.sizes:
        (low_w, mid_w, high_w), (low_h, mid_h, high_h) = (split.sizes[side].values() for side in ("width", "height"))
        turned = f", {split.sizes['rotated']} turned by their EXIF data" if split.sizes["rotated"] else ""
        lines.append(f"  width {low_w} to {high_w} (median {mid_w}), height {low_h} to {high_h} ({mid_h}){turned}")
    if split.objects_per_image:
        numbers = split.objects_per_image
        lines.append(
            f"  objects an image: median {numbers['median']:g}, at most {numbers['max']}; {numbers['without']} images "
            "without"
        )
        lines.append("  " + ", ".join(f"{category}: {count}" for category, count in split.classes.items()))
    for size, shares in split.box_sides.items():
        parts = ", ".join(f"{share:.0%} {name} pixels" for name, share in shares.items())
        lines.append(f"  sides of the boxes in views of {size}: {parts}")
    if split.copies:
        pairs = listed(f"{image} = {seen}" for image, seen in split.copies)
        lines.append(f"  note: {len(split.copies)} images look like another one of the split: {pairs}")
    lines += [f"  note: {note}" for note in split.notes]
    if split.problems:
        lines.append(f"  {first([f'problem: {problem}' for problem in split.problems], _LISTED)}")
    return "\n".join(lines)


def _draw(dataset: datasets.Dataset, split: SplitReport, arguments: CheckArguments, path: Path) -> None:
    """A sheet of evenly spaced images with their boxes, as views of a training have them."""
    names, view = list(split.classes), ViewConfig(split.image_sizes, arguments.max_size, arguments.resize)
    images, pictures, titles = LabelledImages(dataset, view), [], []
    for row in spread_rows(len(dataset), arguments.num_pictures):
        item = images[SampleKey(row, 0, 0)]
        image, labels = item["image"].permute(1, 2, 0).numpy(), item["labels"]
        height, width = image.shape[:2]
        boxes = labels["boxes"].numpy() * (width, height, width, height)
        boxes[:, :2] -= boxes[:, 2:] / 2
        classes = labels["class_labels"].tolist()
        pictures.append(draw_boxes(image, boxes, classes, [names[label] for label in classes]))
        titles.append(f"row {row}, {width} x {height}")
    contact_sheet(pictures, titles).save(path, quality=90)
