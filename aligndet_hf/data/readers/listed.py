"""What label files that name their images have in common: finding the images, and putting their entries together."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import groupby, takewhile
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from .. import door
from ..errors import DataError
from ..images import image_size
from ..splits import spread_rows
from .files import find_inside, list_files, split_of_folder, tell_unlisted
from .rows import Categories, LabelledImage, Labels

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # files of each folder
PIXELS = None  # what `Entry.parts` is of boxes in pixels
# Where Pascal VOC, CVAT and Supervisely have masks, which are called as their images.
_MASKS = {"segmentationclass", "segmentationobject", "masks", "masks_machine", "masks_human"}


class Object(NamedTuple):
    """
    An object of an [`Entry`].

    Attributes:
        box (`list[float]`): xywh.
        label (`str`): Its class.
        outlines (`list[list[float]]`, *optional*): The corners of the polygons around its parts, x and y in turn.
        is_crowd (`bool`, *optional*): Whether the box is around many objects; of all objects of an image or of none.
    """

    box: list[float]
    label: str
    outlines: list[list[float]] | None = None
    is_crowd: bool | None = None


class Entry(NamedTuple):
    """
    What a label file says of an image, in one of perhaps several entries for it.

    Attributes:
        where (`str`): The place in the label file, for errors.
        split (`str`, *optional*): The split of the image; `None` if it is to be left out.
        image (`str`): How the file calls the image: a path of this machine or another, or a name with or without its
            ending.
        base (`Path`): The folder that relative paths start from.
        objects (`list[Object]`): May be empty.
        size (`tuple[int, int]`, *optional*): Width and height of the image, where the file has them.
        parts (`float`, *optional*): Coordinates are in this many parts of the image's sides, 1 or 100; else in pixels.
        also (`str`, *optional*): How the image may be called instead, for it is often renamed after it was labelled.
        image_id (`int`, *optional*): Its id in the file.
    """

    where: str
    split: str | None
    image: str
    base: Path
    objects: list[Object]
    size: tuple[int | None, int | None] | None = None
    parts: float | None = PIXELS
    also: str = ""
    image_id: int | None = None


def collect(
    folder: Path,
    entries: Iterable[Entry],
    splits: list[str],
    missing: str | None = "are not listed",
    categories: list[str] | None = None,
) -> Labels:
    """
    Makes the images of these splits of the entries of all.

    Images without an entry are left out.

    Args:
        folder (`Path`): The folder of the images, at any depth; nothing outside it is read.
        entries (`Iterable[Entry]`): Of all splits.
        splits (`list[str]`): The splits to read.
        missing (`str`, *optional*): What images without an entry do, such as "have no row in the table", for their
            count. They are not looked for if it is `None`.
        categories (`list[str]`, *optional*): The names of the categories. By default those in use in all splits: texts
            in alphabetical order, numbers in theirs.

    Returns:
        [`Labels`]: the images in the order of their first entries.

    Raises:
        [`DataError`]: an image is not there, or there are two of its name; it names the place.
    """
    finder, images, names, listed, shared = _Finder(folder), {}, set(), set(), {}
    size_of = cache(image_size)  # once an image, however many entries and objects it has
    for entry in entries:
        names |= {one.label for one in entry.objects}
        listed |= {PureWindowsPath(entry.image).name, PureWindowsPath(entry.image).stem}
        if entry.split not in splits:
            continue
        file = finder.find(entry)
        listed |= {file, file.stem}
        if (entry.split, file) not in images:
            about = entry.image, entry.image_id, *(entry.size or (None, None))
            images[entry.split, file] = LabelledImage(file, entry.where, *about, {"bbox": [], "category": []})
        image = images[entry.split, file]
        if len({folder for folder in (_above(image.file_name), _above(entry.image)) if folder}) > 1:
            shared[file] = image.file_name, entry.image
        for box, label, outlines, is_crowd in entry.objects:
            if entry.parts is not PIXELS:
                sides = entry.size or size_of(file)[::-1]
                box = _in_pixels(box, entry.parts, sides)
                outlines = outlines and [_in_pixels(values, entry.parts, sides) for values in outlines]
            crowd = {} if is_crowd is None else {"iscrowd": is_crowd}
            image.add(box, label, segmentation=outlines, **crowd)
    if shared:
        message = "%s: %d images get what is said of several paths, e.g. %s of %r and %r: are files missing?"
        logger.warning(message, folder, len(shared), *next((file, *both) for file, both in shared.items()))
    if not categories:
        categories = sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    numbers = {name: position for position, name in enumerate(categories)}
    for image in images.values():
        image.objects["category"] = [numbers[label] for label in image.objects["category"]]
    tell_left_out(folder, finder.left_out)
    if missing is not None:
        tell_unlisted(folder, finder.visited.get(None, []), listed, missing)
    return Labels(list(images.values()), Categories(categories) if categories else None)


def tell_left_out(folder: Path, found: dict[str, list[Path]]) -> None:
    """Warns of the images of a folder that are not opened: their paths by the reasons."""
    for reason, paths in found.items():
        names = door.listed(os.path.relpath(path, folder) for path in paths)
        logger.warning("%s: left out: %d (%s): %s", folder, len(paths), reason, names)


def require_own_splits(folder: Path, files: Iterable[tuple[str | None, Path]], what: str) -> None:
    """
    Refuses a folder with two label files for one split, such as two versions of the same labels.

    Raises:
        [`DataError`]: names the two.
    """
    found = {}
    for split, file in files:
        other = found.setdefault(split, file)
        if other is not file:
            raise DataError(
                f"{folder}: {other.relative_to(folder)} and {file.relative_to(folder)} are both {what}, and their "
                "names do not tell splits apart. Give the file that you mean instead of the folder."
            )


def label_files(folder: Path, ending: str, looks_right: Callable[[Path], bool]) -> Iterator[list[Path]]:
    """
    The files with this ending, folder by folder: of all folders one of whose files looks right. Of many files some all
    over the folder are looked at: files of images without objects may be empty.
    """
    for _, files in groupby(list_files(folder, ending), lambda file: file.parent):
        files = list(files)
        if any(looks_right(files[row]) for row in spread_rows(len(files), _LOOKED_AT)):
            yield files


def grouped(pairs: Iterable[tuple[str | None, Any]]) -> dict[str | None, list]:
    """Pairs of a name and a value as the list of values of each name."""
    groups = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return groups


def split_above(file: Path, root: Path) -> str:
    """The split that a folder on the way up from a file to the root is, the root included; `train` if none is."""
    folders = [folder for folder in file.parents if folder.is_relative_to(root)] or [file.parent]
    return next(filter(None, (split_of_folder(folder.name) for folder in folders)), "train")


def _in_pixels(values: list[float], parts: float, sides: tuple[int, int]) -> list[float]:
    """Numbers across and down in turn, from parts of the image's width and height."""
    return [value / parts * sides[number % 2] for number, value in enumerate(values)]


def _above(name: str) -> tuple[str, ...]:
    """The folders of a path of this machine or another."""
    return PureWindowsPath(name).parent.parts


def _shared_end(parts: Sequence[str], others: Sequence[str]) -> int:
    """How many of the last parts of two paths are the same."""
    pairs = zip(reversed(parts), reversed(others), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class _Finder:
    """Finds the images that a label file names: by their path, or by their name the nearest to it in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[tuple[str, Path, str, str | None], Path] = {}

    @cached_property
    def visited(self) -> dict[str | None, list[Path]]:
        """All images, by the reason why they are not opened: `None` of those that are."""
        return grouped((reason, Path(path)) for path, reason in door.visit(self.folder))

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        return grouped((name, path) for path in self.visited.get(None, []) for name in (path.name, path.stem))

    @property
    def left_out(self) -> dict[str, list[Path]]:
        """The images that are not opened, by the reasons; what commands have written is none."""
        return {reason: paths for reason, paths in self.visited.items() if reason not in (None, door.OUTPUT)}

    def find(self, entry: Entry) -> Path:
        key = entry.image, entry.base, entry.also, entry.split
        if key not in self.found:
            self.found[key] = self._find(*key, entry.where)
        return self.found[key]

    def _find(self, name: str, base: Path, also: str, split: str, where: str) -> Path:
        plain = PureWindowsPath(name).name
        path = find_inside(self.folder, [name], base) or find_inside(self.folder, [name])
        if path := path or find_inside(self.folder, [plain], base):
            return path
        found = self.by_name.get(plain) or self.by_name.get(also, [])
        ways: list[Callable[[Path], int]] = [
            lambda path: path.parent.name.lower() not in _MASKS,
            lambda path: len({base, *base.parents} & set(path.parents)),  # how far their ways go together
            lambda path: _shared_end(path.parent.parts, _above(name)),
            lambda path: split_above(path, self.folder) == split,
            lambda path: _shared_end(path.parent.parts, base.parts),  # `JPEGImages/a` for `Annotations/a`
        ]
        for way in ways if len(found) > 1 else ():
            best = max(map(way, found))
            found = [path for path in found if way(path) == best]
        if len(found) > 1:
            raise DataError(f"{where}: {name!r} may be {found[0]} or {found[1]}. Give the folder as image_dir.")
        if not found:
            for reason, paths in self.left_out.items():
                if path := next((path for path in paths if plain in (path.name, path.stem)), None):
                    raise DataError(f"{where}: the image {path} is not opened: {reason}.")
            raise DataError(f"{where}: there is no image {name!r} in {self.folder}. Give the folder as image_dir.")
        return found[0]
