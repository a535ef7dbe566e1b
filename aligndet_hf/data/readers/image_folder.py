"""Folders of images, plain or with the `metadata.jsonl`, `.csv` or `.parquet` that `datasets` reads."""

import ast
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from .. import door
from ..errors import DataError
from .files import (
    find_file,
    has_images,
    inside,
    list_files,
    list_of_names,
    numbers_as_names,
    parse_json,
    read_json,
    read_text,
    split_folders,
    split_of_folder,
    table_rows,
    tell_unlisted,
)
from .listed import grouped, tell_left_out
from .rows import Categories, LabelledImage, Labels, is_box
from .spellings import COLUMNS, FORMATS, find_spelling, lists_of, require_our_format

logger = logging.getLogger(__name__)

NAME = "image folder"

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SIZES = ("width", "height")


def find(path: Path) -> dict[str, Path]:
    """
    The sub-folders of a folder, all that have images, if any of them has the name of a split; else the folder itself:
    a split if that is its name, else `train`.
    """
    if not path.is_dir() or not (has_metadata(path) or has_images(path)):
        return {}
    is_listed_here = find_file(path, *METADATA) and any(map(door.is_image_name, path.iterdir()))
    splits = {} if is_listed_here else split_folders(path)
    splits = {name: part for name, part in splits.items() if has_images(part)}
    return splits or {split_of_folder(path.name) or "train": path}


def has_metadata(folder: Path) -> bool:
    """Whether a folder or one of its splits has a file of metadata."""
    return any(find_file(part, *METADATA) for part in [folder, *split_folders(folder).values()])


def read(path: Path, found: dict[str, Path], splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits of a folder.

    Args:
        path (`Path`): The folder.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Of no use here.

    Returns:
        [`Labels`]: the images in the order of the metadata or, without any, of their names.

    Raises:
        [`DataError`]: for metadata that are not as they should be; it names file and line.
    """
    images = {split: _read_folder(folder, path) for split, folder in found.items() if split in splits}
    names = read_labels(path)
    everything = [image for split in splits for image in images[split]]
    if any(image.objects is not None for image in everything):
        others = [folder for split, folder in found.items() if split not in splits]
        images_of_others = [image for folder in others for image in _read_metadata(folder, path)]
        names = _number_names(everything + images_of_others, names)
        labels = [label for image in everything + images_of_others for label in _labels_of(image)]
        if names is None and others and {type(label) for label in labels} == {int}:
            names = numbers_as_names(max(labels), str(path))
    return Labels(everything, Categories(names) if names else None)


def read_labels(folder: Path) -> list[str] | None:
    """Category names of `labels.json` in the folder, or above a split's folder: a list, or {"0": name, ...}."""
    places = [folder] + ([folder.parent] if split_of_folder(folder.name) else [])
    path = next(filter(None, (find_file(place, "labels.json") for place in places)), None)
    return None if path is None else list_of_names(read_json(path, path.parent), str(path))


def _read_folder(folder: Path, root: Path) -> list[LabelledImage]:
    found = grouped((reason, Path(path)) for path, reason in door.visit(folder))
    files = found.pop(None, [])
    tell_left_out(folder, found)
    images = _read_metadata(folder, root)
    if not images:
        return [LabelledImage(path=path, where=str(folder)) for path in files]
    listed = {image.path for image in images}
    tell_unlisted(folder, files, listed, f"are not in {_metadata_files(folder, root)[0].name}")
    return images


def _read_metadata(folder: Path, root: Path) -> list[LabelledImage]:
    """The images of a folder that its metadata list; none if there are no metadata."""
    images, spelling = [], {}
    files = _metadata_files(folder, root)
    for path in files:
        images += [_read_row(path, where, row, spelling) for where, row in _rows(path)]
    if files and not images:
        raise DataError(f"{files[0]}: it lists no image.")
    return [image for image in images if image.path.is_relative_to(folder)]


def _metadata_files(folder: Path, root: Path) -> list[Path]:
    """The files of metadata of a folder, of its sub-folders and, for a split, of the root of all splits."""
    files = [path for path in list_files(folder, *METADATA) if path == find_file(path.parent, *METADATA)]
    above = find_file(root, *METADATA)
    return files if above is None or above in files else [above, *files]


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a file of metadata, each with its place."""
    if path.suffix == ".parquet":
        yield from table_rows(path)
    elif path.suffix == ".csv":
        for where, row in table_rows(path):
            yield where, {name: _cell(name, value, where) for name, value in row.items() if value}
    else:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, parse_json(line, where)


def _cell(name: str, value: str, where: str):
    """A cell of a CSV file: objects and lists are JSON, or what Python prints; sizes and ids are integers."""
    if name in COLUMNS or value.startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            if name not in COLUMNS:
                return value
            raise DataError(f"{where}: '{name}' must be JSON, got {value[:80]!r}.") from error
    return int(value) if name in ("image_id", *_SIZES) and value.removeprefix("-").isdecimal() else value


def _read_row(path: Path, where: str, row, spelling: dict[str, str]) -> LabelledImage:
    """One image; `spelling` is filled by the first row with objects, and holds for all rows."""
    name = (row.get("file_name") or row.get("file") or row.get("image")) if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{where}: expected an object with the key 'file_name'.")
    image = LabelledImage(path=inside(path.parent, name, where), where=where, image_id=row.get("image_id"))
    for column in FORMATS:
        require_our_format(column, row.get(column), where)
    if type(row.get("width")) is int and type(row.get("height")) is int:
        image.width, image.height = row["width"], row["height"]
    column = next((column for column in COLUMNS if column in row), None)
    if column is not None:
        image.objects = _read_objects(row[column], column, where, spelling)
    elif {"bbox", "category"} <= set(find_spelling(lists := {n: v for n, v in row.items() if isinstance(v, list)})):
        image.objects = _read_objects(lists, "the row", where, spelling)
    return image


def _read_objects(objects, column: str, where: str, spelling: dict[str, str]) -> dict[str, list]:
    if not objects:
        return {}
    names = objects[0] if isinstance(objects, list) else objects
    own = find_spelling(names if isinstance(names, dict) else [])
    needed = [spelling.setdefault(name, own.get(name, name)) for name in ("bbox", "category")]
    lists = lists_of(objects, own | spelling)
    if lists is None:
        found = ", ".join(names) if isinstance(names, dict) else type(names).__name__
        raise DataError(f"{where}: '{column}' must have the lists '{needed[0]}' and '{needed[1]}', found {found}.")
    _check_lists(lists, where)
    return lists


def _check_lists(lists: dict[str, list], where: str) -> None:
    """One entry per box in each list, and four numbers per box."""
    count = len(lists["bbox"]) if isinstance(lists["bbox"], list) else None
    for name, values in lists.items():
        if count is None or not isinstance(values, list) or len(values) != count:
            has = "one entry per object" if count is None else f"one entry per box, as 'bbox' has {count}"
            raise DataError(f"{where}: '{name}' must be a list with {has}, got {str(values)[:80]}.")
    for box in lists["bbox"]:
        if not is_box(box):
            raise DataError(
                f"{where}: a box in 'bbox' must be four numbers [x, y, width, height], got {str(box)[:80]}."
            )


def _labels_of(image: LabelledImage) -> list:
    return (image.objects or {}).get("category", [])


def _number_names(images: list[LabelledImage], names: list[str] | None) -> list[str] | None:
    """Numbers categories that are given by name, if all are; returns the names, from `labels.json` if given."""
    labels = [label for image in images for label in _labels_of(image)]
    if not labels or not all(isinstance(label, str) for label in labels):
        return names
    names = names or sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    for image in images:
        if unknown := [label for label in _labels_of(image) if label not in numbers]:
            known = ", ".join(names[:10])
            raise DataError(f"{image.where}: the category {unknown[0]!r} is not in labels.json: {known}.")
        if _labels_of(image):
            image.objects["category"] = [numbers[label] for label in image.objects["category"]]
    return names
