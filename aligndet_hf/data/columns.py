"""The columns `image`, `proposals` and `objects`: their features, their ids, and validation."""

import json
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa

from ..flags import nearest
from .arrow_boxes import FAULTS, OUTSIDE, find_faults, is_number, read_boxes, read_values
from .errors import DataError
from .masks import FIELD
from .pixels import ImageFacts, check_box_format, check_declared_sizes, inspect_images
from .splits import spread_rows

# Rows whose boxes are looked at together, evenly spaced over the data set.
SIZE_CHECKED_ROWS = 4096
_LISTED_ROWS = 10
RECORD_MARK = "Proposals: "  # starts what is appended to `info.description`


def proposal_record(dataset: datasets.Dataset) -> dict | None:
    """What the description of a data set says of its proposals: `settings`, `versions` and `statistics`."""
    _, mark, record = (dataset.info.description or "").rpartition(RECORD_MARK)
    try:
        return json.loads(record) if mark else None
    except json.JSONDecodeError:  # somebody's own words
        return None


def proposals_feature(with_clusters: bool) -> dict:
    """
    The feature of the `proposals` column: a struct of lists.

    `bbox` float32 [N, 4] absolute xywh, `score` float32 [N] (higher is better, already in that order) and, optionally,
    `cluster` int32 [N] (pseudo-class).
    """
    types = {"score": "float32"} | ({"cluster": "int32"} if with_clusters else {})
    feature = {"bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4))}
    return feature | {name: datasets.List(datasets.Value(type_)) for name, type_ in types.items()}


def objects_feature(
    categories: list[str] | None,
    ids: list[int | str] | None = None,
    *,
    crowds: bool = False,
    text_ids: bool = False,
    masks: bool = False,
) -> dict:
    """
    The feature of the `objects` column: a struct of lists.

    `bbox` float64 [N, 4] absolute xywh, `category` int64 [N] in 0..C-1 (a `ClassLabel` if the names are known), `area`
    float64 [N] in pixels, `iscrowd` int64 [N], `segmentation` text [N] (see
    [`~aligndet_hf.data.masks.segmentation_text`]) and `id` int64 or text [N]. A number of a label file leaves as it
    came, therefore float64.

    Args:
        categories (`list[str]`, *optional*): Names of the categories 0..C-1.
        ids (`list[int | str]`, *optional*): What the label file calls each; kept as the `id` of the `ClassLabel`.
        crowds (`bool`, *optional*, defaults to `False`): Whether there is a field `iscrowd`: 1 for a region of many
            objects, which is neither trained nor measured.
        text_ids (`bool`, *optional*, defaults to `False`): Whether the ids of the objects are texts.
        masks (`bool`, *optional*, defaults to `False`): Whether objects have a `segmentation`.
    """
    known = None if ids is None or list(ids) == list(range(len(ids))) else json.dumps(ids)
    category = datasets.ClassLabel(names=categories, id=known) if categories else datasets.Value("int64")
    feature = {
        "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
        "category": datasets.List(category),
        "area": datasets.List(datasets.Value("float64")),
    }
    if crowds:
        feature["iscrowd"] = datasets.List(datasets.Value("int64"))
    if masks:
        feature[FIELD] = datasets.List(datasets.Value("string"))
    return feature | {"id": datasets.List(datasets.Value("string" if text_ids else "int64"))}


def category_ids(dataset: datasets.Dataset, categories: list[str]) -> list[int | str]:
    """
    The ids that the label file has for the categories: where it came from no such file, or one without ids, 0..C-1.

    Args:
        dataset (`datasets.Dataset`): With the column `objects`.
        categories (`list[str]`): Names of the categories.
    """
    feature = dataset.features["objects"]["category"].feature
    ids = json.loads(feature.id) if isinstance(feature, datasets.ClassLabel) and feature.id else []
    return ids if len(ids) == len(categories) else list(range(len(categories)))


def _nearest(name: str, candidates) -> str:
    """A hint for a name that is not there."""
    found = ", ".join(f"'{candidate}'" for candidate in candidates) or "none"
    return f"found {found}{nearest(name, candidates) or '.'}"


def require_columns(dataset: datasets.Dataset, columns: list[str], source: str = "the data set") -> None:
    """
    Checks that the columns exist.

    Raises:
        [`DataError`]: names the missing column, the columns found and the nearest of them.
    """
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        is_several = isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict)
        fix = "give one of its splits" if is_several else "load_dataset_source reads one"
        raise DataError(f"{source}: expected a datasets.Dataset, got a {type(dataset).__name__}: {fix}.")
    for column in columns:
        if column not in dataset.column_names:
            labels = " The file has no list 'annotations'." if str(source).lower().endswith(".json") else ""
            fix = {
                "proposals": "Make it with `aligndet proposals`.",
                "objects": "Labelled data needs it: a struct of lists with 'bbox' (absolute xywh) and 'category'."
                + labels,
            }.get(column, f"Rename the column that holds it: dataset.rename_column(old, '{column}').")
            raise DataError(f"{source}: no column '{column}'; {_nearest(column, dataset.column_names)} {fix}")


def _require_fields(dataset: datasets.Dataset, column: str, fields: list[str], source: str) -> None:
    """Checks that a column is a struct of lists with these fields."""
    require_columns(dataset, ["image", column], source)
    feature = dataset.features[column]
    if not isinstance(feature, dict):
        raise DataError(
            f"{source}: column '{column}' must be a struct of lists, {{{', '.join(fields)}}}, each with one entry per "
            f"box; it is {feature}. A list of structs is turned into one with dataset.map."
        )
    for name in fields:
        if name not in feature:
            fix = " Make it with `aligndet clusters`." if name == "cluster" else ""
            raise DataError(f"{source}: column '{column}' has no field '{name}'; {_nearest(name, feature)}{fix}")


@dataclass
class BoxReport:
    """
    What a validation found.

    Attributes:
        source (`str`): The data set.
        column (`str`): The column of the boxes.
        rows (`int`): Rows of the data set.
        boxes (`int`): Boxes stored.
        empty_rows (`int`): Rows without a stored box.
        crowds (`int`): Boxes around crowds, which are neither trained nor measured.
        dropped (`dict[str, int]`): Boxes that will not be used, by reason.
        listed (`dict[str, list[int]]`): The first rows concerned, by reason.
        notes (`list[str]`): What looks odd but may be right.
        images ([`ImageFacts`]): What the headers of the images say.
    """

    source: str
    column: str
    rows: int
    boxes: int = 0
    empty_rows: int = 0
    crowds: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    listed: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: ImageFacts | None = field(default=None, repr=False, compare=False)

    def add(self, faults: np.ndarray, rows: np.ndarray) -> None:
        """Counts the `faults` [N] of boxes that lie in `rows` [N]."""
        for code, reason in enumerate(FAULTS[1:], start=1):
            found = rows[faults == code]
            if len(found):
                self.dropped[reason] = self.dropped.get(reason, 0) + len(found)
                listed = self.listed.get(reason, []) + np.unique(found).tolist()
                self.listed[reason] = sorted(set(listed))[:_LISTED_ROWS]

    def __str__(self) -> str:
        text = f"{self.source}: {self.rows} rows, {self.boxes} boxes in '{self.column}'"
        text += f", {self.empty_rows} rows without" if self.empty_rows else ""
        text += f", {self.crowds} of the boxes crowds, which are not trained" if self.crowds else ""
        for reason, count in self.dropped.items():
            more = " ..." if len(self.listed[reason]) == _LISTED_ROWS else ""
            text += f"\n  dropped: {count} boxes, {reason} (rows {', '.join(map(str, self.listed[reason]))}{more})"
        for note in self.notes:
            text += f"\n  note: {note}"
        return text


def arrow_batches(dataset: datasets.Dataset, columns: list[str], batch_size: int = 1000):
    """Yields (number of the first row, Arrow table) over some columns; honours `select`, `shuffle` and the like."""
    start = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size):
        yield start, table
        start += len(table)


def image_batches(dataset: datasets.Dataset):
    """Yields the column `image`, not decoded, a few rows at a time."""
    for _, table in arrow_batches(dataset, ["image"], batch_size=100):
        yield table["image"]


def _validate_boxes(dataset: datasets.Dataset, column: str, source: str, images: ImageFacts | None) -> BoxReport:
    """
    What `validate_proposals` and `validate_objects` share: opens all images; compares their sizes with those in the
    labels, and with the boxes.
    """
    if images is None:
        images = inspect_images(lambda: image_batches(dataset), len(dataset))
        images.require_readable(source)
    check_declared_sizes(images, _declared_sizes(dataset), source)
    report = BoxReport(source, column, len(dataset), notes=images.notes(), images=images)
    # Of proposals there may be many millions: other formats are looked for in evenly spaced rows.
    looked_at = np.zeros(len(dataset), dtype=bool)
    looked_at[spread_rows(len(dataset), SIZE_CHECKED_ROWS)] = True
    sound, sound_rows = [], []
    for start, table in arrow_batches(dataset, [column]):
        boxes, counts = read_boxes(table[column])
        rows = np.repeat(np.arange(start, start + len(counts)), counts)
        is_known = (images.sizes[rows] > 0).all(axis=1)
        faults = find_faults(boxes, *images.sizes[rows, ::-1].T)
        faults[(faults == OUTSIDE) & ~is_known] = 0
        report.add(faults, rows)
        report.boxes += len(boxes)
        report.empty_rows += int((counts == 0).sum())
        kept = looked_at[rows] & np.isin(faults, (0, OUTSIDE)) & is_known
        sound.append(boxes[kept])
        sound_rows.append(rows[kept])
    if report.boxes == 0:
        raise DataError(f"{source}: column '{column}' holds no box in any of its {report.rows} rows.")
    boxes, rows = np.concatenate(sound), np.concatenate(sound_rows)
    if len(boxes):
        report.notes += check_box_format(boxes, images.sizes[rows], rows, column, source)
    num_dropped = sum(report.dropped.values())
    if report.boxes == num_dropped:
        raise DataError(f"{source}: column '{column}' holds no usable box.\n{report}")
    if num_dropped > 0.5 * report.boxes:
        raise DataError(
            f"{source}: {num_dropped} of {report.boxes} boxes in '{column}' cannot be used. Were they made for other "
            f"images, or in other units? Correct or remove them.\n{report}"
        )
    return report


def _declared_sizes(dataset: datasets.Dataset) -> np.ndarray:
    """Height and width of the images as the labels have them, float [N, 2]; NaN where they do not."""
    sizes = np.full((len(dataset), 2), np.nan)
    for index, name in enumerate(("height", "width")):
        if name in dataset.column_names:
            table = dataset.select_columns([name]).with_format("arrow")[:]
            if is_number(table[name].type):
                sizes[:, index] = table[name].cast(pa.float64()).to_numpy()
    return sizes


def has_clusters(dataset: datasets.Dataset) -> bool:
    """Whether the proposals have clusters, as `aligndet clusters` writes them."""
    feature = dataset.features.get("proposals")
    return isinstance(feature, dict) and "cluster" in feature


def validate_proposals(
    dataset: datasets.Dataset,
    source: str = "the data set",
    with_clusters: bool = False,
    images: ImageFacts | None = None,
) -> BoxReport:
    """
    Checks the `proposals` column of all rows.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` and `proposals`.
        source (`str`, *optional*): How to call the data set in messages.
        with_clusters (`bool`, *optional*, defaults to `False`): Whether the field `cluster` is needed.
        images ([`ImageFacts`], *optional*): What is known of the images: they are not opened again, and those that
            cannot be read are no error.

    Returns:
        [`BoxReport`]: the boxes that will be dropped, by reason. Boxes that reach out of the image are clipped.

    Raises:
        [`DataError`]: for a missing column or field, lists of different lengths, scores out of order, images that
            cannot be read, boxes in another format, more unusable boxes than usable ones.
    """
    _require_fields(dataset, "proposals", ["bbox", "score"] + (["cluster"] if with_clusters else []), source)
    for start, table in arrow_batches(dataset, ["proposals"]):
        if with_clusters:
            _check_lengths(table["proposals"], "proposals", "cluster", start, source)
        scores, counts = _check_lengths(table["proposals"], "proposals", "score", start, source)
        rows = np.repeat(np.arange(start, start + len(counts)), counts)
        wrong = np.flatnonzero((rows[1:] == rows[:-1]) & ~(scores[1:] <= scores[:-1]))
        if len(wrong):
            raise DataError(
                f"{source}, row {rows[wrong[0]]}, column 'proposals', field 'score': expected the highest score "
                f"first, got {scores[wrong[0]]} before {scores[wrong[0] + 1]}. Sort the proposals of each image."
            )
    return _validate_boxes(dataset, "proposals", source, images)


def validate_objects(
    dataset: datasets.Dataset, categories: list[str], source: str = "the data set", images: ImageFacts | None = None
) -> BoxReport:
    """
    Checks the `objects` column of all rows, and `image_id` if there is one.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` and `objects`.
        categories (`list[str]`): Names of the categories 0..C-1.
        source (`str`, *optional*): How to call the data set in messages.
        images ([`ImageFacts`], *optional*): As for [`validate_proposals`].

    Returns:
        [`BoxReport`]: the boxes that will be dropped, by reason. Boxes that reach out of the image are clipped.

    Raises:
        [`DataError`]: for a missing column or field, lists of different lengths, a category that is unknown or has no
            name, a repeated image id, images that cannot be read, sizes in the labels that the images do not have,
            boxes in another format, more unusable boxes than usable ones.
    """
    _require_fields(dataset, "objects", ["bbox", "category"], source)
    image_ids(dataset, source)
    crowds = 0
    nameless = [number for number, name in enumerate(categories) if not name.strip()]
    for start, table in arrow_batches(dataset, ["objects"]):
        values, counts = _check_lengths(table["objects"], "objects", "category", start, source)
        is_known = (values >= 0) & (values < len(categories)) & (values == np.floor(values))
        wrong = np.flatnonzero(~is_known | np.isin(values, nameless))
        if len(wrong):
            row = start + int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))
            reason = f"is not one of the {len(categories)} categories, expected 0 to {len(categories) - 1}."
            if is_known[wrong[0]]:
                reason = "is a category without a name. Name it, or remove the object."
            raise DataError(f"{source}, row {row}, column 'objects', field 'category': {values[wrong[0]]} {reason}")
        if "iscrowd" in dataset.features["objects"]:
            crowds += int((_check_lengths(table["objects"], "objects", "iscrowd", start, source)[0] == 1).sum())
    report = _validate_boxes(dataset, "objects", source, images)
    report.notes += _names_alike(categories)
    report.crowds = crowds
    if report.crowds == report.boxes:
        raise DataError(
            f"{source}: all {report.boxes} boxes in 'objects' are crowds (iscrowd is 1), which are never trained. "
            "CVAT writes this for every mask: export boxes or polygons, or set iscrowd to 0 in the label file."
        )
    return report


def _names_alike(categories: list[str]) -> list[str]:
    """A line on each group of categories that slips of annotators may have made of one."""
    groups = {}
    for name in categories:
        groups.setdefault(" ".join(name.lower().split()), []).append(repr(name))
    return [
        f"the categories {' and '.join(names)} differ in capitals or blanks only: if they are one, call them alike"
        for names in groups.values()
        if len(names) > 1
    ]


def _check_lengths(column: pa.ChunkedArray, name: str, field_name: str, start: int, source: str):
    """Checks that a field has one value per box; returns the values and their number per row."""
    try:
        boxes, counts = read_boxes(column)
        values, lengths = read_values(column, field_name)
    except DataError as error:
        raise DataError(f"{source}, column '{name}', rows from {start} on: {error}") from None
    wrong = np.flatnonzero(lengths != counts)
    if len(wrong):
        raise DataError(
            f"{source}, row {start + wrong[0]}, column '{name}': {counts[wrong[0]]} boxes but {lengths[wrong[0]]} "
            f"values in the field '{field_name}', expected one per box."
        )
    return values, counts


def image_ids(dataset: datasets.Dataset, source: str = "the data set") -> list[int | str]:
    """
    The ids of the images: the column `image_id` (integers or texts), or the row numbers if there is none.

    Raises:
        [`DataError`]: if an id is neither or occurs twice.
    """
    if "image_id" not in dataset.column_names:
        return list(range(len(dataset)))
    first = {}
    stored = [value for _, table in arrow_batches(dataset, ["image_id"]) for value in table["image_id"].to_pylist()]
    for row, image_id in enumerate(stored):
        if not isinstance(image_id, (int, str)):
            raise DataError(
                f"{source}, row {row}, column 'image_id': expected an integer or a text, got {image_id!r}."
            )
        if image_id in first:
            raise DataError(
                f"{source}, row {row}, column 'image_id': {image_id} is also the id of row {first[image_id]}. Ids "
                "must be unique: number the images anew, or remove the column to use row numbers."
            )
        first[image_id] = row
    return list(first)


def image_numbers(dataset: datasets.Dataset) -> list[int]:
    """The ids of the images if all are integers, or else their numbers in order: for tensors, which hold no text."""
    ids = image_ids(dataset)
    if all(isinstance(own, int) for own in ids):
        return ids
    numbers = {own: number for number, own in enumerate(sorted(ids))}
    return [numbers[own] for own in ids]
