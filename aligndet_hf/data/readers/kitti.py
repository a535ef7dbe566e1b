"""KITTI: a text file for each image, with fifteen values for each object, as NVIDIA's TAO has it, too."""

import logging
import re
from glob import escape
from itertools import chain
from pathlib import Path

from ..door import is_image_name
from ..errors import DataError
from .files import number, read_start, read_text
from .listed import Entry, Object, collect, grouped, label_files, split_above
from .rows import Labels

logger = logging.getLogger(__name__)

NAME = "KITTI"

_SNIFFED_BYTES = 200
_LINE = re.compile(r"[^\s\d]\S*(\s+-?\d+(\.\d+)?([eE][-+]?\d+)?){14}")  # a class that is a number is one of YOLO
_CORNERS = slice(3, 7)  # of the numbers
_REGION = "dontcare"  # where nobody has labelled the objects


def find(path: Path) -> dict[str, list[Path]]:
    """The label files of a folder, at any depth; the folders on the way to them say the split, such as `training`."""
    files = chain.from_iterable(label_files(path, ".txt", _looks_like_kitti)) if path.is_dir() else ()
    return grouped((split_above(file, path), file) for file in files)


def read(path: Path, found: dict[str, list[Path]], splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits. Regions called `DontCare` are no objects: they are left out and counted.

    Args:
        path (`Path`): The folder.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Folder of the images. By default looked for beside the label files, `image_2`
            for `label_2`, or anywhere in the folder.

    Returns:
        [`Labels`]: names of categories come from all splits, in alphabetical order.

    Raises:
        [`DataError`]: for a line that is not as it should be; it names file and line.
    """
    regions = []
    entries = (_entry(file, split, regions) for split, files in found.items() for file in files)
    labels = collect(image_dir or path, entries, splits, "have no label file")
    if left_out := sum(split in splits for split in regions):
        logger.warning("%s: %d regions 'DontCare' are left out.", path, left_out)
    return labels


def _looks_like_kitti(file: Path) -> bool:
    return bool(_LINE.match(read_start(file, _SNIFFED_BYTES).decode("utf-8", "replace")))


def _entry(file: Path, split: str, regions: list) -> Entry:
    objects = []
    for row, line in enumerate(read_text(file).splitlines(), start=1):
        where, values = f"{file}, line {row}", line.split()
        if not values:
            continue
        if len(values) not in (15, 16):  # with a score
            raise DataError(f"{where}: expected a class and 14 numbers, got {line.strip()[:80]!r}.")
        numbers = [number(value, where, "each value after the class") for value in values[1:]]
        left, top, right, bottom = numbers[_CORNERS]
        if values[0].lower() == _REGION:
            regions.append(split)
        else:
            objects.append(Object([left, top, right - left, bottom - top], values[0]))
    beside = file.parent.with_name(file.parent.name.replace("label", "image"))
    images = [path for path in sorted(beside.glob(f"{escape(file.stem)}.*")) if is_image_name(path)]
    name = f"../{beside.name}/{images[0].name}" if images else file.stem
    return Entry(str(file), split, name, file.parent, objects)
