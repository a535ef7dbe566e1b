"""A table with a row for each box, in CSV or Parquet, as Kaggle, Roboflow and TensorFlow have it."""

import csv
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..door import is_image_name, is_inside
from ..errors import DataError
from .files import (
    delimiter_of,
    is_file,
    list_files,
    number,
    parse_json,
    read_start,
    split_of_file,
    split_of_folder,
    table_rows,
)
from .json_images import via_objects
from .listed import Entry, Object, collect, require_own_splits
from .rows import Labels

logger = logging.getLogger(__name__)

NAME = "table of boxes"

EXPECTED = (
    "expected a row for each box, with the columns image (or filename, ...), class (or label, ...) and xmin, ymin, "
    "xmax, ymax, or x, y, width, height, or bbox"
)
SUFFIXES = (".csv", ".tsv", ".parquet")
_DELIMITERS = ",;\t"
_SNIFFED_BYTES = 1 << 16
# What columns are called, in lower case and without other characters than letters and digits.
_IMAGE = ("filename", "file", "imagename", "image", "imagepath", "filepath", "path", "img", "imgname", "imageid")
# Names first: beside them `class` may hold numbers.
_CLASS = ("classname", "labelname", "categoryname", "class", "label", "category", "classid", "labelid", "categoryid",
          "regionattributes")  # fmt: skip
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"),
    ("bboxxmin", "bboxymin", "bboxxmax", "bboxymax"), ("bboxx1", "bboxy1", "bboxx2", "bboxy2"),
)  # fmt: skip
_SIDES = (
    ("bboxx", "bboxy", "bboxwidth", "bboxheight"), ("bboxx", "bboxy", "bboxw", "bboxh"), ("x", "y", "w", "h"),
    ("x", "y", "width", "height"), ("xmin", "ymin", "width", "height"), ("xmin", "ymin", "w", "h"),
    ("left", "top", "width", "height"), ("bbox",), ("box",),
)  # fmt: skip
_OF_VIA = ("regionshapeattributes",)  # a shape as VIA writes it, with its class in another column
_LISTS = ("boxesstring",)  # all boxes of an image, as the Global Wheat data set has them
_CENTRES = (("xcenter", "ycenter", "width", "height"), ("xcenter", "ycenter", "w", "h"), ("cx", "cy", "w", "h"))
_SIZES = (("imagewidth", "imageheight"), ("imgwidth", "imgheight"), ("width", "height"))
_SPLIT = ("split", "subset", "set")
_CROWD = ("isgroupof", "iscrowd")  # Open Images has a box around more than five objects
# Of tables whose first line is a row.
_WITHOUT_NAMES = (
    ["image", "x1", "y1", "x2", "y2", "class"],  # keras-retinanet
    ["image", "x1", "y1", "x2", "y2", "class", "image_width", "image_height"],  # SKU-110K
    ["class", "x", "y", "w", "h", "image", "image_width", "image_height"],  # makesense.ai
    ["set", "image", "class", "x1", "y1", "", "", "x2", "y2", "", ""],  # AutoML of Google
)
_LARGEST_PART = 1.01  # coordinates up to here are parts of the image's sides, if all of the table are


def find(path: Path) -> dict[str, list["_Table"]]:
    """
    The splits of a table, or of the tables at the top of a folder and in its folders, that a column names, or else the
    names of the files or of their folders; each with all tables.
    """
    if path.is_file() and (path.suffix.lower() not in SUFFIXES or _holds_images(path)):
        return {}
    tables = _tables(path)
    return dict.fromkeys((table.split_of(row) for table in tables for _, row in table.rows()), tables)


def read(path: Path, found: dict, splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits.

    Corners are coordinates; if none in a table is above 1, they are parts of the image's sides. A row without
    coordinates is an image without objects; images without a row are left out and counted. Names of categories come
    from all splits: texts in alphabetical order, numbers in theirs.

    Args:
        path (`Path`): The file or the folder.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Folder of the images, at any depth. By default the folder of the table.

    Returns:
        [`Labels`]: the images in the order of their first rows.

    Raises:
        [`DataError`]: for a table that is not as it should be; it names the file, the line and the column.
    """
    folder = image_dir or (path if path.is_dir() else path.parent)
    entries = (entry for table in next(iter(found.values())) for entry in table.entries())
    return collect(folder, entries, splits, "have no row in the table")


@dataclass
class _Table:
    """
    A file, and which of its columns are what.

    Attributes:
        path (`Path`): The file.
        image (`str`): The column of the images.
        coordinates (`list[str]`): Four columns, or one with four numbers, all boxes of an image, or a shape of VIA.
        are_corners (`bool`): Whether these are corners, and not corner and sides.
        are_centres (`bool`): Whether these are a centre and sides.
        category, split, crowd (`str`, *optional*): The columns of the classes, of the splits, and of the boxes around
            many objects.
        sizes (`list[str]`): The columns of width and height of the image, if there are any.
        names (`list[str]`, *optional*): The names of the columns, if the file has none.
    """

    path: Path
    image: str
    coordinates: list[str]
    are_corners: bool
    are_centres: bool
    category: str | None
    split: str | None
    crowd: str | None
    sizes: list[str]
    names: list[str] | None

    @cached_property
    def is_of_via(self) -> bool:
        """Whether the only column of coordinates holds shapes as VIA writes them."""
        return _plain(self.coordinates[0]) in _OF_VIA

    @cached_property
    def descriptions(self) -> dict[str, str]:
        """What codes of classes stand for, by the file that Open Images has for them beside its tables."""
        folder, above = self.path.parent, _outer_folder(self.path)
        files = [*sorted(folder.glob("*class-descriptions*.csv")), above / "metadata" / "classes.csv"]  # of FiftyOne
        files = [file for file in files if is_file(file) and is_inside(file, above)]
        rows = (row for file in files for _, row in table_rows(file, names=["code", "name"]))
        return {row["code"]: row["name"] for row in rows if row["name"]}

    def entries(self) -> Iterator[Entry]:
        """The images and boxes of the rows."""
        if self.category is None:
            logger.warning("%s: no column of classes (%s): all are 'object'.", self.path, ", ".join(_CLASS[:6]))
        found, without_box = [], 0
        for where, row in self.rows():
            image, objects = self.cell(row, self.image, where), self.objects(row, where)
            without_box += not objects and self.is_of_via and row[self.coordinates[0]] != "{}"
            found.append(Entry(where, self.split_of(row), image, self.path.parent, objects, self.size(row, where)))
        if without_box:
            logger.warning("%s: %d points and lines are left out, they have no box.", self.path, without_box)
        ends = [max(x + w, y + h) for entry in found for (x, y, w, h), *_ in entry.objects]
        if ends and max(ends) <= _LARGEST_PART:
            logger.warning("%s: no coordinate is above 1: they are taken as parts of the images' sides.", self.path)
            found = [entry._replace(parts=1.0) for entry in found]
        yield from found

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """
        The rows, each with its place, but those without a value, as spreadsheets write them below the others; all
        values are texts, those that are missing empty.
        """
        for where, row in table_rows(self.path, _DELIMITERS, self.names):
            texts = {name: _as_text(value) for name, value in row.items()}
            if any(texts.values()):
                yield where, texts

    def cell(self, row: dict[str, str], column: str, where: str) -> str:
        """What a cell holds, which must not be empty."""
        if not row[column]:
            raise DataError(f"{where}: column '{column}' is empty.")
        return row[column]

    def split_of(self, row: dict[str, str]) -> str:
        own = row[self.split].lower() if self.split else ""
        return split_of_folder(own) or own or _split_of(self.path) or "train"

    def label(self, row: dict[str, str], where: str) -> str:
        if self.category is None:
            return "object"
        is_empty = not any(row[name] for name in self.coordinates)
        text = row[self.category] if is_empty else self.cell(row, self.category, where)
        text = self.descriptions.get(text, text)
        return re.sub(r"^(\d+)\.0+$", r"\1", text)  # whole numbers beside empty cells, as pandas writes them

    def objects(self, row: dict[str, str], where: str) -> list[Object]:
        """What the row says of its image; nothing if it has no coordinates at all."""
        texts = [row[name] for name in self.coordinates]
        if not any(texts):
            return []
        is_crowd = row[self.crowd].lower() in ("1", "1.0", "true") if self.crowd else None
        if len(texts) > 1:
            return [Object(self.box(texts, where), self.label(row, where), is_crowd=is_crowd)]
        place = f"{where}, column '{self.coordinates[0]}'"
        if self.is_of_via:
            attributes = parse_json(row[self.category] or "{}", where) if self.category else {}
            return via_objects(parse_json(texts[0], place), attributes, place)
        if _plain(self.coordinates[0]) in _LISTS:
            boxes = [_four(text, place, "x1 y1 x2 y2") for text in texts[0].split(";") if text not in ("", "no_box")]
            return [Object([x, y, a - x, b - y], self.label(row, where)) for x, y, a, b in boxes]
        box = _four(texts[0], place, "[x, y, width, height]")
        return [Object(box, self.label(row, where), is_crowd=is_crowd)]

    def box(self, texts: list[str], where: str) -> list[float]:
        """xywh of the four coordinates."""
        named = zip(texts, self.coordinates, strict=True)
        x, y, a, b = (number(text, where, f"column '{name}'") for text, name in named)
        if self.are_centres:
            x, y = x - a / 2, y - b / 2
        return [x, y, a - x, b - y] if self.are_corners else [x, y, a, b]

    def size(self, row: dict[str, str], where: str) -> tuple[int, int] | None:
        """Width and height of the image, where the row has them."""
        given = tuple(int(number(row[name], where, f"column '{name}'")) if row[name] else 0 for name in self.sizes)
        return given if len(given) == 2 and all(given) else None


def _four(text: str, where: str, form: str) -> list[float]:
    """The numbers of a box in one cell, with or without brackets and commas."""
    parts = re.split(r"[,\s]+", text.strip("[]() \n\t"))
    if len(parts) != 4:
        raise DataError(f"{where} must hold four numbers {form} for a box, got {text[:80]!r}.")
    return [number(part, where, "a coordinate") for part in parts]


def _outer_folder(path: Path) -> Path:
    """The folder of a table or, of a folder `labels`, the folder around it."""
    return path.parent.parent if path.parent.name.lower() == "labels" else path.parent


def _split_of(path: Path) -> str | None:
    return split_of_file(path.stem) or split_of_folder(_outer_folder(path).name)


def _tables(path: Path) -> list[_Table]:
    """The tables of a file or folder, which have to be of different splits."""
    tables = []
    for file in [path] if path.is_file() else find_files(path):
        table = _columns_of(file)
        if table is None:
            raise DataError(f"{file}: {EXPECTED}; found {', '.join(_header(file)) or 'no names'} in the first line.")
        tables.append(table)
    paths = [table.path for table in tables]
    splits = [(_split_of(one), one) for one in paths]
    require_own_splits(path, splits, "tables of boxes")
    return tables


def find_files(folder: Path) -> list[Path]:
    """The tables at the top of a folder and in its folders."""
    files = list_files(folder, *SUFFIXES)
    files = [path for path in files if folder in (path.parent, path.parent.parent, _outer_folder(path).parent)]
    # A cell `bbox` of metadata may hold the boxes of an image: `image_folder` reads it.
    tables = [(path, _columns_of(path)) for path in files]
    return [path for path, table in tables if table and (path.stem != "metadata" or len(table.coordinates) == 4)]


def _header(path: Path) -> list[str]:
    """The names of the columns; none of a file that cannot be read, or whose images are not named but in it."""
    if path.suffix.lower() == ".parquet":
        return [
            field.name for field in _schema(path) if not pa.types.is_nested(field.type) or pa.types.is_list(field.type)
        ]
    text = read_start(path, _SNIFFED_BYTES).decode("utf-8", errors="replace").partition("\n")[0].rstrip("\r")
    try:
        return next(csv.reader([text], delimiter=delimiter_of(text, _DELIMITERS)), [])
    except csv.Error:
        return []


def _holds_images(path: Path) -> bool:
    """Whether a Parquet file has images in it, as `datasets` writes them, or as bytes in the column `image`."""
    types = {field.name: field.type for field in _schema(path)} if path.suffix.lower() == ".parquet" else {}
    image = types.get("image", pa.null())
    is_bytes = pa.types.is_binary(image) or pa.types.is_large_binary(image)
    return is_bytes or any(pa.types.is_struct(one) and one.get_field_index("bytes") >= 0 for one in types.values())


def _schema(path: Path) -> Iterable[pa.Field]:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return []


def _columns_of(path: Path) -> _Table | None:
    """
    What the columns of a file are; `None` if there is none of images, or of boxes.

    Raises:
        [`DataError`]: if a column that is needed is there twice.
    """
    header = _header(path)
    without_names = _names_of_row(header)
    names = {_plain(name): name for name in without_names or header}

    def first(*known: tuple[str, ...]) -> list[str]:
        return next(([names[name] for name in group] for group in known if names.keys() >= set(group)), [])

    def column(known: tuple[str, ...]) -> str | None:
        return next((names[name] for name in known if name in names), None)

    image, corners = column(_IMAGE), first(*_CORNERS)
    centres = first(*_CENTRES)
    coordinates = corners or first(*_SIDES) or centres or first(_OF_VIA, _LISTS)
    if image is None or not coordinates:
        return None
    sizes = next((size for group in _SIZES if (size := first(group)) and not set(size) & set(coordinates)), [])
    kind = bool(corners), coordinates == centres
    others = list(map(column, (_CLASS, _SPLIT, _CROWD)))
    for name in filter(None, [image, *coordinates, *others, *sizes]):
        same = [other for other in without_names or header if _plain(other) == _plain(name)]
        if len(same) > 1:
            raise DataError(f"{path}: {len(same)} columns are called alike, {', '.join(same)}. Rename all but one.")
    return _Table(path, image, coordinates, *kind, *others, sizes, without_names)


def _names_of_row(cells: list[str]) -> list[str] | None:
    """The names of the columns of a table whose first line is a row of a known form, and not these names."""
    for names in _WITHOUT_NAMES:
        row = dict(zip(names, cells, strict=False))
        if len(cells) == len(names) and is_image_name(row["image"]):
            corners = [row[name] for name in ("x1", "y1", "x2", "y2") if name in row] or cells[1:5]
            if not any(corners) or all(re.fullmatch(r"-?\d*\.?\d+", cell) for cell in corners):
                return names
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _as_text(value) -> str:
    if value is None or value != value or str(value).strip().lower() == "nan":  # not a number
        return ""
    return json.dumps(value) if isinstance(value, list) else str(value).strip()
