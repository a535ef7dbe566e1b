"""CVAT: one XML file, "CVAT for images 1.1", with the images beside it or in `images`."""

import logging
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ..errors import DataError
from .files import called, list_files, number, read_start, read_xml, split_folders, split_of_folder
from .listed import Entry, Object, collect
from .rows import Labels, box_around, box_around_ellipse, box_around_turned, require_unique_ids

logger = logging.getLogger(__name__)

NAME = "CVAT"

_SNIFFED_BYTES = 4096
_SHAPES = ("box", "polygon", "polyline", "ellipse", "mask")
_OTHER_SHAPES = ("points", "cuboid", "skeleton", "tag")


def find(path: Path) -> dict[str, dict[Path, ElementTree.Element]]:
    """
    The subsets of the images of an XML file of CVAT, or of those at the top of a folder and of its folders that are
    splits; each with all files.
    """
    files = [path] if path.is_file() else list_files(path, ".xml")
    places = [path, called(path, "annotations"), *split_folders(path).values()] if path.is_dir() else []
    files = [file for file in files if file == path or file.parent in places]
    roots = {file: _read_root(file) for file in filter(_looks_like_cvat, files)}
    return dict.fromkeys((_subset(file, image) for file, root in roots.items() for image in root.iter("image")), roots)


def read(path: Path, found: dict, splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these subsets. The box of a polygon, polyline, ellipse, mask or turned box is what is around it; points,
    cuboids, skeletons and tags are counted and left out.

    Args:
        path (`Path`): The folder, or its XML file.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Folder that the names of the images start from. By default looked for.

    Returns:
        [`Labels`]: categories are the labels of the project, or those in use, in alphabetical order.

    Raises:
        [`DataError`]: for a file that is not as it should be; it names the file, the image and the shape.
    """
    folder = image_dir or (path if path.is_dir() else path.parent)
    names, entries = [], []
    for file, root in next(iter(found.values())).items():
        names = names or _label_names(root)
        for number_, element in enumerate(root.iter("image")):
            where = f"{file}, image {element.get('name', number_)!r}"
            own = file.parent if split_of_folder(file.parent.name) and image_dir is None else folder
            entries.append(_entry(element, _subset(file, element), own, names, where))
        skipped = {name: len(root.findall(f"image/{name}")) for name in _OTHER_SHAPES}
        if any(skipped.values()):
            told = ", ".join(f"{count} {name}" for name, count in skipped.items() if count)
            logger.warning("%s: left out, for they have no box: %s.", file, told)
    labels = collect(folder, entries, splits, categories=names)
    require_unique_ids(labels.images)  # several files, each of a task of its own, number their images alike
    return labels


def _looks_like_cvat(file: Path) -> bool:
    return file.suffix.lower() == ".xml" and b"<annotations" in read_start(file, _SNIFFED_BYTES)


def _read_root(file: Path) -> ElementTree.Element:
    root = read_xml(file)
    if root.find("track") is not None:
        raise DataError(f"{file}: tracks of a video. Export it from CVAT as 'CVAT for images' or 'COCO'.")
    if root.find("image") is None:
        raise DataError(f"{file}: it lists no image.")
    return root


def _subset(file: Path, image: ElementTree.Element) -> str:
    own = (image.get("subset") or "").lower()
    folder = file.parent.parent if file.parent.name.lower() == "annotations" else file.parent
    return split_of_folder(own) or (own if own not in ("", "default") else split_of_folder(folder.name) or "train")


def _label_names(root: ElementTree.Element) -> list[str]:
    """The labels of the task, job or project, in their order; without them those in use."""
    labels = [label for label in root.iterfind("meta//labels/label") if not label.findtext("parent")]  # no key points
    named = [(label.findtext("name") or "").strip() for label in labels]
    used = {shape.get("label", "") for image in root.iter("image") for shape in image if shape.tag in _SHAPES}
    return [name for name in dict.fromkeys(named) if name] or sorted(used)


def _entry(element: ElementTree.Element, split: str, folder: Path, names: list[str], where: str) -> Entry:
    name, subset = element.get("name"), element.get("subset") or "default"
    if not name:
        raise DataError(f"{where}: expected a 'name'.")
    objects = []
    for position, shape in enumerate(child for child in element if child.tag in _SHAPES):
        place = f"{where}, {shape.tag} {position}"
        if shape.get("label") not in names:
            raise DataError(f"{place}: unknown label {shape.get('label')!r}, expected one of {', '.join(names[:10])}.")
        box, outline = _box(shape, place)
        objects.append(Object(box, shape.get("label"), outline and [outline]))
    bases = (folder / "images" / subset, folder / subset, folder / "images")
    base = next((place for place in bases if place.is_dir()), folder)
    own_id, width, height = (_integer(element, name, where) for name in ("id", "width", "height"))
    return Entry(where, split, name, base, objects, (width, height), image_id=own_id)


def _integer(element: ElementTree.Element, name: str, where: str) -> int | None:
    text = element.get(name)
    if text is not None and not text.isdecimal():
        raise DataError(f"{where}: '{name}' must be an integer, got {text!r}.")
    return None if text is None else int(text)


def _box(shape: ElementTree.Element, where: str) -> tuple[list[float], list[float] | None]:
    """The box of a shape, and the outline of a polygon."""

    def attribute(name: str) -> float:
        return number(shape.get(name), where, f"'{name}'")

    if shape.tag == "mask":
        return [attribute(name) for name in ("left", "top", "width", "height")], None
    degrees = number(shape.get("rotation") or 0, where, "'rotation'")
    if shape.tag == "ellipse":
        centre_and_radii = [attribute(name) for name in ("cx", "cy", "rx", "ry")]
        return box_around_ellipse(*centre_and_radii, math.radians(degrees)), None
    if shape.tag == "box":
        left, top, right, bottom = (attribute(name) for name in ("xtl", "ytl", "xbr", "ybr"))
        return box_around_turned([left, top, right - left, bottom - top], degrees), None
    points = [point.split(",") for point in (shape.get("points") or "").split(";") if point]
    if not points or any(len(point) != 2 for point in points):
        raise DataError(f"{where}: 'points' must be pairs of numbers, got {(shape.get('points') or '')[:80]!r}.")
    outline = [number(part, where, "each point") for point in points for part in point]
    return box_around(outline[::2], outline[1::2]), outline if shape.tag == "polygon" else None
