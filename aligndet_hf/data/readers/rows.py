"""What every reader makes of its files: labelled images and the categories, and the data set that is built of them."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa

from .. import door
from ..columns import objects_feature
from ..errors import DataError
from ..masks import FIELD, segmentation_text
from ..pixels import inspect_images

logger = logging.getLogger(__name__)

_NUMBERS = {int, float}
_CROWDS = (None, 0, 1, "0", "1")


class Categories(NamedTuple):
    """
    The categories of a whole data set, whatever one split holds of them.

    Attributes:
        names (`list[str]`): In the order of the labels 0..C-1.
        ids (`list[int | str]`, *optional*): What the label file calls each; `None` if it has no ids of its own.
    """

    names: list[str]
    ids: list[int | str] | None = None


@dataclass
class LabelledImage:
    """
    One image with what a label file says of it.

    Attributes:
        path (`Path`): The file.
        where (`str`): The place in the label file, for errors.
        file_name (`str`, *optional*): The image as the label file names it.
        image_id (`int` or `str`, *optional*): Its id in the label file.
        width, height (`int`, *optional*): Its size in the label file.
        objects (`dict[str, list]`, *optional*):
            `bbox` (absolute xywh), `category` (0..C-1) and, optionally, `area`, `iscrowd`, `segmentation` (in COCO's
            form) and `id`, one entry per object; `None` if nobody labelled the image.
    """

    path: Path
    where: str
    file_name: str | None = None
    image_id: int | str | None = None
    width: int | None = None
    height: int | None = None
    objects: dict[str, list] | None = None

    def add(self, bbox: Sequence[float], category: int, **fields) -> None:
        """Adds an object; with the same `fields` as the other ones."""
        if self.objects is None:
            self.objects = {}
        for name, value in ({"bbox": list(bbox), "category": category} | fields).items():
            self.objects.setdefault(name, []).append(value)


class Labels(NamedTuple):
    """What a reader returns: the images of the splits asked for, and the categories of the whole data set."""

    images: list[LabelledImage]
    categories: Categories | None


def require_unique_ids(images: list[LabelledImage]) -> None:
    """Numbers the images of several files anew if an id occurs twice, or the ids are of different types."""
    ids = [image.image_id for image in images]
    if len(set(ids)) != len(ids) or len({type(own) for own in ids}) > 1:
        for number, image in enumerate(images, start=1):
            image.image_id = number


def build_dataset(labels: Labels, source: str) -> datasets.Dataset:
    """
    Makes the data set of what a reader found.

    Args:
        labels ([`Labels`]): Images, and categories (`None`: numbers without names).
        source (`str`): How to call the data set in messages.

    Returns:
        `datasets.Dataset`: `image` (`Image(decode=False)`), and as far as there are any `image_id`, `file_name`,
        `width` and `height`, and `objects` (see [`objects_feature`]). An area that is not given is the box's.

    Raises:
        [`DataError`]: for what does not fit; it names the place in the label file.
    """
    images, categories = labels
    repeated = len(images) - len({image.path for image in images})
    if repeated:
        logger.warning(
            "%s: %d images are listed more than once; each time is a row with its own objects.", source, repeated
        )
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": _images(images, source)}
    is_labelled = any(image.objects is not None for image in images)
    own = {"file_name": "string", "width": "int64", "height": "int64"} if is_labelled else {}
    for name, type_ in ({"image_id": _type_of_ids(images)} | own).items():
        values = [getattr(image, name) for image in images]
        if any(value is not None for value in values):
            features[name] = datasets.Value(type_)
            columns[name] = _column(values, features[name].pa_type, name, images)
    if is_labelled:
        fields = _complete_objects(images, categories)
        features["objects"] = objects_feature(
            *(categories or (None, None)), **fields, masks=_complete_masks(images, source)
        )
        types = datasets.Features(features["objects"]).arrow_schema
        lists = {name: [image.objects[name] for image in images] for name in types.names}
        arrays = [_column(lists[name], types.field(name).type, name, images) for name in types.names]
        columns["objects"] = pa.StructArray.from_arrays(arrays, names=types.names)
    features = datasets.Features(features)
    table = pa.table(columns, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _images(images: list[LabelledImage], source: str) -> pa.Array:
    """The column `image`; if a file is not there, an error that lists what is wrong with this and all other files."""
    if not any(door.problem(image.path) for image in images):
        return pa.array([door.image_value(image.path) for image in images], datasets.Image.pa_type)
    structs = [{"bytes": None, "path": door.printable(image.path.absolute())} for image in images]
    faults = inspect_images(lambda: [pa.array(structs, datasets.Image.pa_type)], len(images)).faults
    lines, names_in = [], cache(names_in_lower_case)
    for row, reason in faults.items():
        if not os.path.lexists(images[row].path):
            hint = with_other_capitals(images[row].path, names_in)
            reason = f"there is no file {door.printable(images[row].path)}{hint}."
        lines.append(f"{images[row].where}: {reason}")
    if len(lines) == 1:
        raise DataError(lines[0])
    raise DataError(f"{source}: {len(lines)} of {len(images)} images cannot be read:\n  {door.first(lines)}")


def with_other_capitals(path: Path, names_in: Callable[[Path], dict[str, str]]) -> str:
    """What to say of a file whose name differs in capitals only; file systems of Windows and macOS take it as well."""
    near = names_in(path.parent).get(path.name.lower())
    return f"; '{door.printable(near)}' is there: capitals count" if near else ""


def names_in_lower_case(folder: Path) -> dict[str, str]:
    return {name.lower(): name for name in os.listdir(folder)} if folder.is_dir() else {}


def _type_of_ids(images: list[LabelledImage]) -> str:
    without = [image for image in images if image.image_id is None]
    if 0 < len(without) < len(images):
        raise DataError(f"{without[0].where}: no 'image_id', which other images have.")
    return "string" if images and isinstance(images[0].image_id, str) else "int64"


def _complete_objects(images: list[LabelledImage], categories: Categories | None) -> dict[str, bool]:
    """
    Checks the objects of all images and fills in what is not given, areas, ids, and no crowds; whether there are
    `crowds` and `text_ids`.
    """
    next_id = 1
    for image in images:
        objects = image.objects = image.objects or {}
        boxes = objects.setdefault("bbox", [])
        objects.setdefault("category", [])
        _check_categories(image, categories)
        given = objects.get("area") or [None] * len(boxes)
        objects["area"] = [
            float(box[2]) * float(box[3]) if area is None else area for box, area in zip(boxes, given, strict=True)
        ]
        objects.setdefault("id", list(range(next_id, next_id + len(boxes))))
        next_id += len(boxes)
    has_crowds = any("iscrowd" in image.objects for image in images)
    has_texts = any(isinstance(value, str) for image in images for value in image.objects["id"])
    for image in images:
        crowds = image.objects.get("iscrowd") or [0] * len(image.objects["bbox"])
        if wrong := [crowd for crowd in crowds if crowd not in _CROWDS]:
            raise DataError(f"{image.where}: 'iscrowd' must be 0 or 1, got {wrong[0]!r}.")
        image.objects["iscrowd"] = [int(crowd or 0) for crowd in crowds]
        if has_texts:
            image.objects["id"] = list(map(str, image.objects["id"]))
    return {"crowds": has_crowds, "text_ids": has_texts}


def _complete_masks(images: list[LabelledImage], source: str) -> bool:
    """Makes texts of the segmentations; whether there are any. Those that are none are counted and told."""
    left_out, known = 0, False
    for image in images:
        given = image.objects.get(FIELD) or [None] * len(image.objects["bbox"])
        image.objects[FIELD] = list(map(segmentation_text, given))
        known |= any(image.objects[FIELD])
        left_out += sum(bool(value) and text is None for value, text in zip(given, image.objects[FIELD], strict=True))
    if left_out:
        logger.warning(
            "%s: %d objects have a segmentation that is neither polygons nor run lengths of COCO: they have no mask.",
            source,
            left_out,
        )
    return known


def box_around(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """The box around points, xywh in the unit of the points."""
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def box_around_ellipse(x: float, y: float, half_width: float, half_height: float, angle: float = 0) -> list[float]:
    """The box around an ellipse that is turned about its centre by an angle in radians, xywh."""
    cosine, sine = math.cos(angle), math.sin(angle)
    across = math.hypot(half_width * cosine, half_height * sine)
    down = math.hypot(half_width * sine, half_height * cosine)
    return [x - across, y - down, 2 * across, 2 * down]


def box_around_turned(box: Sequence[float], degrees: float) -> list[float]:
    """The box around a box that is turned about its centre, both xywh."""
    left, top, width, height = box
    if not degrees:
        return [left, top, width, height]
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    across, down = width * cosine + height * sine, width * sine + height * cosine
    return [left + (width - across) / 2, top + (height - down) / 2, across, down]


def is_box(value) -> bool:
    """Whether a value is a list of four numbers, and none of them too large for one."""
    if type(value) is not list or len(value) != 4 or not _NUMBERS.issuperset(map(type, value)):
        return False
    try:
        return len(list(map(float, value))) == 4
    except OverflowError:
        return False


def _check_categories(image: LabelledImage, categories: Categories | None) -> None:
    for category in image.objects["category"]:
        if type(category) is not int:
            raise DataError(
                f"{image.where}: 'category' must hold integers, got {category!r}. Number the categories from 0 and "
                "list their names in labels.json."
            )
        if category < 0 or (categories is not None and category >= len(categories.names)):
            names = categories.names if categories else []
            known = f"0 to {len(names) - 1} ({', '.join(names[:10])})" if names else "0 or more"
            raise DataError(f"{image.where}: unknown category {category}, expected {known}.")


def _column(values: list, type_: pa.DataType, name: str, images: list[LabelledImage]) -> pa.Array:
    """An Arrow array; if the values do not fit, an error that names the first image that does not."""
    faults = (pa.ArrowException, TypeError, ValueError, OverflowError)
    try:
        return pa.array(values, type_)
    except faults:
        for image, value in zip(images, values, strict=True):
            try:
                pa.array([value], type_)
            except faults as error:
                raise DataError(
                    f"{image.where}: '{name}' does not fit: {str(value)[:80]!r} is {type(value).__name__}, expected "
                    f"{type_} as in the other images ({error})."
                ) from error
        raise
