"""How other people spell the column `objects`, and how it becomes ours: a struct of lists, categories as numbers."""

from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa

from ..columns import arrow_batches
from ..errors import DataError
from ..masks import FIELD, has_regions, segmentation_text
from ..splits import Splits
from .files import numbers_as_names

_LISTS = (datasets.List, datasets.LargeList)
FORMATS, _OURS = ("bbox_format", "box_format", "bbox_mode"), ("xywh", "coco")  # columns that say what boxes are
COLUMNS = ("objects", "annotations", "annotation")
FIELDS = {
    "bbox": ("bbox", "bboxes", "boxes", "box"),
    "category": (
        *("category", "categories", "label", "labels", "class", "classes", "class_label", "class_labels"),
        *("category_name", "category_names", "class_name", "class_names"),  # before numbers that stand for them
        *("category_id", "category_ids", "class_id", "class_ids", "label_id", "label_ids", "name", "names"),
    ),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "segmentation": ("segmentation", "segmentations"),
    "id": ("id", "ids", "bbox_id"),
}


def find_spelling(fields: Iterable[str]) -> dict[str, str]:
    """Which of the `fields` of a file or data set are ours: `bboxes` -> `bbox`, `label` -> `category`, ..."""
    fields = list(fields)
    found = {name: next((spelt for spelt in spelled if spelt in fields), None) for name, spelled in FIELDS.items()}
    return {name: spelt for name, spelt in found.items() if spelt is not None}


def lists_of(objects, spelling: dict[str, str]) -> dict[str, list] | None:
    """
    The objects of one image as lists, our names to values.

    Args:
        objects (`dict` or `list`): A dictionary of lists, or a list of dictionaries.
        spelling (`dict[str, str]`): Our names to those in `objects`.

    Returns:
        `dict[str, list]`, or `None` if the boxes or categories are not in `objects`.
    """
    needed = [spelling.get("bbox", "bbox"), spelling.get("category", "category")]
    if isinstance(objects, list):
        if not all(isinstance(one, dict) and set(needed) <= set(one) for one in objects):
            return None
        names = [name for name, spelt in spelling.items() if any(spelt in one for one in objects)]
        return {name: [one.get(spelling[name]) for one in objects] for name in names}
    if not isinstance(objects, dict) or not set(needed) <= set(objects):
        return None
    return {name: objects[spelt] for name, spelt in spelling.items() if spelt in objects}


def standard_objects(splits: Splits, source: str) -> Splits:
    """
    Brings the labels of all splits of a data set into one form.

    Column and fields get our names, a list of structs becomes a struct of lists, names become numbers, and numbers
    without names count as far as in all splits. A split without labels stays as it is, and so does what this
    does not understand: the checks of the columns say what is wrong.

    Args:
        splits (`dict[str, datasets.Dataset]`): All splits of the data set.
        source (`str`): How to call it in messages.

    Raises:
        [`DataError`]: a category is null, or a column says that boxes are in another format.
    """
    splits = {name: _with_texts_of_masks(_with_our_names(split)) for name, split in splits.items()}
    for split in splits.values():
        _refuse_other_formats(split, source)
    labelled = [name for name, split in splits.items() if _category_feature(split) is not None]
    features = [_category_feature(splits[name]) for name in labelled]
    if not labelled or all(isinstance(feature, datasets.ClassLabel) for feature in features):
        return splits
    dtypes = {feature.dtype for feature in features if isinstance(feature, datasets.Value)}
    if dtypes <= {"string", "large_string"}:
        used = {name: _used_categories(splits[name]) for name in labelled}
        names = sorted({str(value) for values in used.values() for value in values if value is not None})
        for name in labelled:
            splits[name] = _numbered(splits[name], names, f"{source}, split '{name}'")
    elif len(labelled) > 1 and all(dtype.startswith(("int", "uint")) for dtype in dtypes):
        used = [value for name in labelled for value in _used_categories(splits[name])]
        if used and None not in used and min(used) >= 0:
            names = numbers_as_names(max(used), source)
            for name in labelled:
                splits[name] = _with_names(splits[name], names)
    return splits


def _refuse_other_formats(dataset: datasets.Dataset, source: str) -> None:
    """Refuses a data set where a column, or a field of the objects, says that boxes are no xywh."""
    for column in dataset.column_names:
        feature = dataset.features[column]
        fields = feature if column == "objects" and isinstance(feature, dict) else [column]
        if said := next((name for name in FORMATS if name in fields), None):
            values = _column_of(dataset, column)
            values = values if said == column else values.field(said)
            values = values.flatten() if pa.types.is_list(values.type) else values
            for value in pa.compute.unique(values).to_pylist():
                require_our_format(said, value, source)


def require_our_format(column: str, said, where: str) -> None:
    """Refuses labels where a column says that boxes are no xywh."""
    if said is not None and str(said).lower() not in _OURS:
        raise DataError(
            f"{where}: by '{column}' the boxes are {said!r}, expected [x, y, width, height] in pixels (xywh). Convert "
            f"them, and remove '{column}'."
        )


def has_numbers_only(dataset: datasets.Dataset) -> bool:
    """Whether there are categories, in any spelling, without a list of their names."""
    _, fields = _find_fields(dataset)
    category = fields.get(find_spelling(fields).get("category"))
    return bool(fields) and not isinstance(getattr(category, "feature", category), datasets.ClassLabel)


def _find_fields(dataset: datasets.Dataset) -> tuple[list[str], dict]:
    """
    The columns that objects are in, one or, as `boxes` and `labels` beside `image`, one for each field, and the
    features of the fields, lists all of them. Nothing, unless boxes and categories are among the fields.
    """
    column = next((name for name in COLUMNS if name in dataset.column_names), None)
    if column is None:
        lists = {name: feature for name, feature in dataset.features.items() if isinstance(feature, _LISTS)}
        columns = list(find_spelling(lists).values())
        fields = {name: lists[name] for name in columns}
    else:
        columns, fields = [column], dataset.features[column]
        if isinstance(fields, _LISTS) and isinstance(fields.feature, dict):
            fields = {name: datasets.List(feature) for name, feature in fields.feature.items()}
    if not isinstance(fields, dict) or not {"bbox", "category"} <= set(find_spelling(fields)):
        return [], {}
    return columns, fields


def _with_our_names(dataset: datasets.Dataset) -> datasets.Dataset:
    columns, fields = _find_fields(dataset)
    names = {spelt: name for name, spelt in find_spelling(fields).items()}
    if not fields or (dataset.features.get("objects") == fields and all(names[spelt] == spelt for spelt in names)):
        return dataset
    own = {spelt: names.get(spelt, spelt) for spelt in fields}
    if columns == list(fields):
        lists = [_column_of(dataset, column) for column in columns]
    else:
        values = _column_of(dataset, columns[0])
        if pa.types.is_struct(values.type):
            lists = values.flatten()
        else:
            lists = [pa.ListArray.from_arrays(_offsets(values), field) for field in values.flatten().flatten()]
    array = pa.StructArray.from_arrays(lists, names=list(own.values()))
    return _replaced(dataset, columns, array, {own[spelt]: fields[spelt] for spelt in fields})


def _with_texts_of_masks(dataset: datasets.Dataset) -> datasets.Dataset:
    """Polygons and run lengths as the texts that [`segmentation_text`] makes of them."""
    feature = dataset.features.get("objects")
    if not isinstance(feature, dict) or FIELD not in feature:
        return dataset
    values = _column_of(dataset, "objects")
    if has_regions(values.type):
        return dataset
    texts = [None if row is None else list(map(segmentation_text, row)) for row in values.field(FIELD).to_pylist()]
    return _with_field(dataset, FIELD, pa.array(texts, pa.list_(pa.string())), datasets.Value("string"))


def _column_of(dataset: datasets.Dataset, column: str) -> pa.Array:
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _offsets(lists: pa.Array) -> pa.Array:
    """Where each row starts in the flattened values: the values of a slice or with nulls do not start at 0."""
    counts = pa.compute.fill_null(pa.compute.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _replaced(dataset: datasets.Dataset, columns: list[str], array: pa.Array, feature: dict) -> datasets.Dataset:
    array = array.cast(datasets.Features(objects=feature).arrow_schema.field("objects").type)
    return dataset.remove_columns(columns).add_column("objects", array, feature=feature)


def _with_field(dataset: datasets.Dataset, name: str, lists: pa.Array, feature) -> datasets.Dataset:
    """The data set with other values in one field of its objects."""
    values = _column_of(dataset, "objects")
    parts = [lists if own == name else values.field(own) for own in values.type.names]
    array = pa.StructArray.from_arrays(parts, names=values.type.names)
    return _replaced(dataset, ["objects"], array, dict(dataset.features["objects"]) | {name: datasets.List(feature)})


def _category_feature(dataset: datasets.Dataset):
    objects = dataset.features.get("objects")
    category = objects.get("category") if isinstance(objects, dict) else None
    return category.feature if isinstance(category, _LISTS) else None


def _used_categories(dataset: datasets.Dataset) -> set:
    used = set()
    for _, table in arrow_batches(dataset, ["objects"]):
        lists = pa.compute.struct_field(table["objects"], "category")
        used |= set(pa.compute.unique(pa.compute.list_flatten(lists)).to_pylist())
    return used


def _numbered(dataset: datasets.Dataset, names: list[str], source: str) -> datasets.Dataset:
    """The categories, given by name, as numbers."""
    lists = _column_of(dataset, "objects").field("category")
    numbers = pa.compute.index_in(lists.flatten(), pa.array(names, lists.type.value_type))
    if numbers.null_count:
        raise DataError(f"{source}, column 'objects', field 'category': a category is null, expected a name.")
    return _with_numbers(dataset, lists, numbers.cast(pa.int64()), names)


def with_categories(dataset: datasets.Dataset, names: list[str], categories: list[str]) -> datasets.Dataset:
    """A data set in our form whose categories, called `names`, get the numbers of their names among others."""
    lists = _column_of(dataset, "objects").field("category")
    numbers = pa.array([categories.index(name) for name in names], pa.int64()).take(lists.flatten().cast(pa.int64()))
    return _with_numbers(dataset, lists, numbers, categories)


def _with_numbers(dataset: datasets.Dataset, lists: pa.Array, numbers: pa.Array, names: list[str]) -> datasets.Dataset:
    """The data set with these numbers in its lists of categories, and the names that they stand for."""
    category = pa.ListArray.from_arrays(_offsets(lists), numbers)
    return _with_field(dataset, "category", category, datasets.ClassLabel(names=names))


def _with_names(dataset: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    category = dataset.features["objects"]["category"]
    feature = dict(dataset.features["objects"]) | {"category": type(category)(datasets.ClassLabel(names=names))}
    return dataset.cast_column("objects", feature)
