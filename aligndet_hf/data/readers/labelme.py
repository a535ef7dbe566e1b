"""labelme: a JSON file with shapes beside each image."""

import logging
import math
from pathlib import Path, PureWindowsPath

from .. import door
from ..errors import DataError
from .files import inside, is_file, is_image, list_files, read_json, split_folders, split_of_folder, tell_unlisted
from .rows import Categories, LabelledImage, Labels

logger = logging.getLogger(__name__)

NAME = "labelme"

_SNIFFED_BYTES = 1 << 16
_CIRCLE = 64  # corners of the polygon that a circle becomes
_WITHOUT_AREA = {"point", "points", "line", "linestrip"}


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with a JSON file of labelme, at any depth."""
    return path.is_dir() and any(_list_json(path))


def split_names(path: Path) -> list[str]:
    """The folders that are splits, or one."""
    return list(_splits(path))


def read(path: Path, splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits. The box of a shape is what is around it; points and lines have none and are counted.

    Args:
        path (`Path`): The folder.
        splits (`list[str]`): As [`split_names`] has them.
        image_dir (`Path`, *optional*): Folder of the images. By default the folder of the JSON files.

    Returns:
        [`Labels`]: names of categories come from all splits, in alphabetical order.

    Raises:
        [`DataError`]: for a file that is not as it should be; it names the file and the shape.
    """
    files = {split: list(_list_json(folder)) for split, folder in _splits(path).items()}
    contents = {file: _read_shapes(file) for split in files.values() for file in split}
    used = {shape["label"] for content in contents.values() for shape in content["shapes"] if _has_area(shape)}
    names = sorted(used)
    chosen = [file for split in splits for file in files[split]]
    images = [_read_image(path, file, contents[file], names, image_dir) for file in chosen]
    skipped = sum(not _has_area(shape) for file in chosen for shape in contents[file]["shapes"])
    if skipped:
        logger.warning("%s: %d points and lines are left out, they have no box.", path, skipped)
    names_of_images = {PureWindowsPath(content["imagePath"]).stem for content in contents.values()}
    tell_unlisted(path, names_of_images | {file.stem for file in contents}, "have no JSON file")
    return Labels(images, Categories(names) if names else None)


def _list_json(folder: Path):
    return filter(_looks_like_labelme, list_files(folder, ".json"))


def _looks_like_labelme(file: Path) -> bool:
    """Its list of shapes is near the start, or behind the image that some versions store in the file."""
    try:
        with door.open_file(file, door.MAX_TEXT_BYTES) as stream:
            start = stream.read(_SNIFFED_BYTES)
            stream.seek(max(0, file.stat().st_size - _SNIFFED_BYTES))
            end = stream.read(_SNIFFED_BYTES)
    except OSError:
        return False
    return start.lstrip().startswith(b"{") and b'"shapes"' in start + end and b'"imagePath"' in start + end


def _splits(folder: Path) -> dict[str, Path]:
    parts = {name: part for name, part in split_folders(folder).items() if any(_list_json(part))}
    return parts or {split_of_folder(folder.name) or "train": folder}


def _read_shapes(file: Path) -> dict:
    content = read_json(file)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not isinstance(content.get("imagePath"), str):
        raise DataError(f"{file}: not a file of labelme, it needs a list 'shapes' and a text 'imagePath'.")
    for position, shape in enumerate(shapes):
        points = shape.get("points") if isinstance(shape, dict) else None
        sound = isinstance(points, list) and all(
            isinstance(point, list) and len(point) == 2 and all(isinstance(part, (int, float)) for part in point)
            for point in points
        )
        if not sound or not points or not isinstance(shape.get("label"), str):
            raise DataError(f"{file}, shape {position}: expected a text 'label' and 'points', pairs of numbers.")
    return {key: content.get(key) for key in ("shapes", "imagePath", "imageWidth", "imageHeight")}


def _has_area(shape: dict) -> bool:
    return shape.get("shape_type") not in _WITHOUT_AREA and len(shape["points"]) > 1


def _read_image(folder: Path, file: Path, content: dict, names: list[str], image_dir: Path | None) -> LabelledImage:
    path = _find_image(folder, file, content, image_dir)
    image = LabelledImage(path=path, where=str(file), objects={"bbox": [], "category": []})
    if type(content["imageWidth"]) is int and type(content["imageHeight"]) is int:
        image.width, image.height = content["imageWidth"], content["imageHeight"]
    for shape in filter(_has_area, content["shapes"]):
        image.add(_box(shape), names.index(shape["label"]), segmentation=_polygons(shape))
    return image


def _polygons(shape: dict) -> list[list[float]] | None:
    """The outline of a shape in COCO's form; of those without one `None`."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "rectangle":
        x, y, width, height = _box(shape)
        points = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    elif kind == "circle":
        x, y, width, _ = _box(shape)
        angles = [2 * math.pi * step / _CIRCLE for step in range(_CIRCLE)]
        points = [[x + width / 2 * (1 + math.cos(a)), y + width / 2 * (1 + math.sin(a))] for a in angles]
    elif kind != "polygon":
        return None
    return [[float(value) for point in points for value in point]]


def _box(shape: dict) -> list[float]:
    """xywh of what is around the points; of a circle these are its centre and a point on it."""
    xs, ys = zip(*shape["points"], strict=True)
    if shape.get("shape_type") == "circle":
        radius = ((xs[1] - xs[0]) ** 2 + (ys[1] - ys[0]) ** 2) ** 0.5
        return [xs[0] - radius, ys[0] - radius, 2 * radius, 2 * radius]
    return [float(min(xs)), float(min(ys)), float(max(xs) - min(xs)), float(max(ys) - min(ys))]


def _find_image(folder: Path, file: Path, content: dict, image_dir: Path | None) -> Path:
    """The image: `imagePath`, which may be of another machine, or that with the name of the file beside it."""
    place = image_dir or file.parent
    given = content["imagePath"]
    for name in (given, PureWindowsPath(given).name):
        try:
            path = inside(image_dir or folder, name, str(file), place)
        except DataError:
            continue
        if is_file(path):
            return path
    same = [path for path in sorted(place.iterdir()) if path.stem == file.stem and is_image(path)]
    if same:
        return inside(image_dir or folder, same[0].name, str(file), place)
    return inside(image_dir or folder, PureWindowsPath(given).name, str(file), place)
