"""JSON with an entry for each image: dialects of CreateML, VIA, Label Studio, Scalabel, FiftyOne, Supervisely and
labelme."""

import base64
import io
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from ..door import is_image_name
from ..errors import DataError
from .files import list_images, read_json, read_start, split_of_file
from .listed import PIXELS, Entry, Object, collect, grouped, label_files, require_own_splits, split_above
from .rows import Labels, box_around, box_around_ellipse

logger = logging.getLogger(__name__)

_SNIFFED_BYTES = 1 << 16
_CLASS_NAMES = ("class", "label", "category", "name", "type")  # of the attributes of VIA
_WITHOUT_AREA = {"point", "points", "line", "linestrip"}  # of the kinds of labelme
_CIRCLE = 64  # corners of the polygon that a circle becomes
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the names of files that are uploaded

_PNG_START = 1024  # bytes
_FAULTS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration, zlib.error, OSError)

# xywh, the corners of a polygon, the corners of several polygons, or what has no box.
Shape = list[float] | list[tuple[float, float]] | tuple[list[tuple[float, float]], ...] | None
# Image, shapes with their classes (`None`: nobody has labelled it), size.
Found = tuple[str, list[tuple[Shape, str]] | None, tuple[int, int] | None]


def find(path: Path) -> dict[str, list[tuple[Path, "_Dialect"]]]:
    """The files in one of the dialects, of a folder at any depth; by the splits that they or their folders name."""
    found, lists = [], []
    for files in [[path]] if path.is_file() else label_files(path, ".json", _dialect_of):
        first = next(filter(None, map(_dialect_of, files)), None)
        if first and first.is_of_one_image:
            files = [file for file in files if not first.are_marked or _dialect_of(file) is first]
            found += [(split_above(file, path), (file, first)) for file in files]
        else:
            dialects = {file: _dialect_of(file) for file in files}
            images = {image.stem for image in list_images(files[0].parent)} if len(files) > 1 else set()
            # LabelImg writes a list for each image, called as the image: of one without objects it has no marks.
            own = next((one for file, one in dialects.items() if one and file.stem in images), None)
            for file, dialect in dialects.items():
                is_of_one = file.stem in images
                if dialect := dialect or (own if is_of_one else None):
                    split = (None if is_of_one else split_of_file(file.stem)) or split_above(file, path)
                    found.append((split, (file, dialect)))
                    lists += [] if is_of_one else [(split, file)]
    require_own_splits(path, lists, "lists of images")
    return grouped(found)


def read(path: Path, found: dict, splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits. The box of a shape is what is around it; points and lines have none and are counted, and so are
    the images of Label Studio that nobody has labelled, which are left out.

    Args:
        path (`Path`): The file or the folder.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Folder of the images, at any depth. By default the folder of the files.

    Returns:
        [`Labels`]: the images in the order of the files.

    Raises:
        [`DataError`]: for a file that is not as it should be; it names the file and the entry.
    """
    skipped = []
    entries = chain.from_iterable(
        _entries(*file, split, skipped if split in splits else []) for split, files in found.items() for file in files
    )
    folder = image_dir or (path if path.is_dir() else path.parent)
    labels = collect(folder, entries, splits, "have no entry")
    if shapes := skipped.count("shape"):
        logger.warning("%s: %d points, lines or brushed masks are left out, no box is read of them.", path, shapes)
    if images := skipped.count("image"):
        logger.warning("%s: %d images are left out, nobody has labelled them: they have no annotation.", path, images)
    return labels


class _Dialect(NamedTuple):
    """
    One tool's JSON.

    Attributes:
        opens (`bytes`): With which brackets a file may begin.
        marks (`tuple[bytes]`): Keys that the start of a file has.
        items (`Callable`): The entries of a file's content.
        read (`Callable`): What an entry says: image (`None`: the name of the file), boxes, size.
        expected (`str`): What an entry must have, for the error.
        parts (`float`, *optional*): See [`Entry`].
        is_of_one_image (`bool`): Whether there is a file for each image.
        are_marked (`bool`): Whether all of these files have the marks, so that others beside them are left alone.
    """

    opens: bytes
    marks: tuple[bytes, ...]
    items: Callable[[object], Iterable]
    read: Callable[[dict], Found]
    expected: str
    parts: float | None = PIXELS
    is_of_one_image: bool = False
    are_marked: bool = False


def _create_ml(item: dict) -> Found:
    objects = []
    for annotation in item["annotations"] if "annotations" in item else item["annotation"]:
        x, y, width, height = (annotation["coordinates"][key] for key in ("x", "y", "width", "height"))
        objects.append(([x - width / 2, y - height / 2, width, height], annotation["label"]))
    return item["image"] if "image" in item else item["imagefilename"], objects, None  # as Apple's own pages have it


def _via(item: dict) -> Found:
    regions = item["regions"]
    regions = regions.values() if isinstance(regions, dict) else regions  # of its first version
    objects = [(_via_shape(one["shape_attributes"]), _via_class(one["region_attributes"])) for one in regions]
    return item["filename"], objects, None


def _via_shape(shape: dict) -> Shape:
    kind = shape["name"]
    if kind == "rect":
        return [shape[key] for key in ("x", "y", "width", "height")]
    if kind in ("circle", "ellipse"):
        rx, ry = (shape["r"], shape["r"]) if kind == "circle" else (shape["rx"], shape["ry"])
        return box_around_ellipse(shape["cx"], shape["cy"], rx, ry, shape.get("theta") or 0)
    return list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)) if kind == "polygon" else None


def via_objects(shape, attributes, where: str) -> list[Object]:
    """The object of a shape and its attributes, as the CSV of VIA has them too; none of a point, a line or nothing."""
    try:
        found = _via_shape(shape) if shape else None
        return [] if found is None else [_object(found, _via_class(attributes))]
    except _FAULTS as error:
        raise DataError(
            f"{where}: expected a shape of VIA and its attributes, got {str(shape)[:120]} ({error})."
        ) from error


def _via_class(attributes: dict) -> str:
    """The value of the attribute that is called a class, or of the only one; of options the one that is chosen."""
    if not attributes:
        return "object"
    by_name = {name.lower(): value for name, value in attributes.items()}
    called = next((name for name in _CLASS_NAMES if name in by_name), None)
    if called is None and len(by_name) > 1:
        raise ValueError(f"several attributes, {', '.join(attributes)}: call the one that is the class 'class'")
    value = by_name[called or next(iter(by_name))]
    if isinstance(value, dict):
        chosen = [option for option, is_chosen in value.items() if is_chosen]
        if len(chosen) != 1:
            raise ValueError(f"{len(chosen)} classes of one region: {', '.join(chosen) or 'choose one'}")
        value = chosen[0]
    return value


def _label_studio(item: dict) -> Found:
    data = item.get("data", item)  # the export with little in it has the image beside the boxes
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    # Without the key of a signed address.
    texts = {key: text if "?d=" in text else text.partition("?")[0] for key, text in texts.items()}
    images = {key: text for key, text in texts.items() if is_image_name(text)}
    if not images:
        raise ValueError("no image in 'data'")
    if len(images) > 1 and "image" not in images:
        raise ValueError(f"several images in 'data', {', '.join(images)}: call the one that is labelled 'image'")
    image = images.get("image") or next(iter(images.values()))
    image = image.partition("?d=")[2] or image
    if "/upload/" in image:
        image = image.replace("\\", "/").rpartition("/")[2]
    if "annotations" in item:
        annotations = [one for one in item["annotations"] if not one.get("was_cancelled")]
        if not annotations:
            return image, None, None
        if len(annotations) > 1:
            raise ValueError(f"{len(annotations)} annotations: keep one")
        results = [result for one in annotations for result in one["result"]]
        named = [result for result in results if result.get("type", "").endswith("labels")]
        ids = {result.get("id") for result in named}  # a shape and its label may be two results
        named += [result for result in results if "original_width" in result and result.get("id") not in ids]
        shapes = [result | result["value"] for result in named]
    else:
        lists = (value for value in item.values() if isinstance(value, list))
        shapes = [shape for value in lists for shape in value if isinstance(shape, dict) and "original_width" in shape]
    objects, size = [], None
    for shape in shapes:
        size = shape["original_width"], shape["original_height"]
        if shape.get("image_rotation"):  # regions are relative to the image as it was seen
            raise ValueError(
                f"labelled with the image turned by {shape['image_rotation']} degrees: turn it back there"
            )
        lists = (value for key, value in shape.items() if key.endswith("labels") and isinstance(value, list))
        if not (classes := next(lists, [])):
            raise ValueError("a region has no label")
        objects += [(_label_studio_shape(shape, size), name) for name in classes]
    return image, objects, size


def _label_studio_shape(shape: dict, size: tuple[int, int]) -> Shape:
    """In percent of the image's sides."""
    if "points" in shape:
        return shape["points"]
    angle = math.radians(shape.get("rotation") or 0)
    across, down = (side / 100 for side in size) if angle else (1, 1)  # shapes turn in pixels
    if "radiusX" in shape:
        centre, radii = (shape["x"] * across, shape["y"] * down), (shape["radiusX"] * across, shape["radiusY"] * down)
        x, y, width, height = box_around_ellipse(*centre, *radii, angle)
        return [x / across, y / down, width / across, height / down]
    if "height" not in shape:  # key points have a width
        return None
    x, y, width, height = (shape[key] for key in ("x", "y", "width", "height"))
    if not angle:
        return [x, y, width, height]
    # A box turns around its first corner.
    corners = [(a * width * across, b * height * down) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))]
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + (a * cos - b * sin) / across, y + (a * sin + b * cos) / down) for a, b in corners]


def _scalabel(item: dict) -> Found:
    objects = []
    for label in item.get("labels") or []:
        box = label.get("box2d")
        box = box and [box["x1"], box["y1"], box["x2"] - box["x1"], box["y2"] - box["y1"]]
        objects.append((box, label["category"]))
    return item["name"], objects, None


def _fiftyone_items(content: dict) -> Iterator[tuple]:
    return ((name, objects, content["classes"]) for name, objects in content["labels"].items())


def _fiftyone(item: tuple) -> Found:
    image, given, classes = item
    objects = None if given is None else []
    for one in given or []:
        label, (x, y, width, height) = one["label"], one["bounding_box"]
        if type(label) is int:
            label = dict(enumerate(classes))[label]
        objects.append(([x, y, width, height], label))
    return image, objects, None


def _supervisely(item: dict) -> Found:
    objects = []
    for shape in item["objects"]:
        kind = shape["geometryType"]
        if kind == "bitmap":
            place = _box_of_bitmap(**shape["bitmap"])
        else:
            place = shape["points"]["exterior"] if kind in ("rectangle", "polygon") else None
        objects.append((place, shape["classTitle"]))
    return None, objects, (item["size"]["width"], item["size"]["height"])


def _box_of_bitmap(data: str, origin: list[int]) -> Shape:
    """The box of a mask of Supervisely: a compressed PNG, as large as the object, and where it lies."""
    start = zlib.decompressobj().decompress(base64.b64decode(data), _PNG_START)  # its size is told at its start
    with PIL.Image.open(io.BytesIO(start)) as image:
        return [*origin, *image.size]


def _labelme(item: dict) -> Found:
    size = item.get("imageWidth"), item.get("imageHeight")
    # Shapes of one label with the same `group_id` are the parts of one object.
    groups = grouped(
        ((shape["label"], number if shape.get("group_id") is None else ("group", shape["group_id"])), shape)
        for number, shape in enumerate(item["shapes"])
    )
    objects = [(_labelme_parts(shapes), label) for (label, _), shapes in groups.items()]
    return item["imagePath"], objects, size if type(size[0]) is type(size[1]) is int else None


def _labelme_parts(shapes: list[dict]) -> Shape:
    parts = [place for place in map(_labelme_shape, shapes) if place is not None]
    return tuple(map(_corners, parts)) if len(parts) > 1 else next(iter(parts), None)


def _corners(shape: Shape) -> list[tuple[float, float]]:
    if not isinstance(shape[0], int | float):
        return shape
    x, y, width, height = shape
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def _labelme_shape(shape: dict) -> Shape:
    kind, points = shape.get("shape_type"), shape["points"]
    if kind in _WITHOUT_AREA or len(points) < 2:
        return None
    if kind == "circle":  # its centre and a point on it
        (x, y), radius = points[0], math.dist(*points)
        angles = [2 * math.pi * step / _CIRCLE for step in range(_CIRCLE)]
        return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points[0], points[len(points) // 2]  # two corners, or all four
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if kind == "mask":  # its first and its last pixel
        xs, ys = zip(*points, strict=True)
        return [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
    return points


# A new dialect is a row here.
_DIALECTS = {
    "CreateML": _Dialect(
        b"[", (b'"coordinates"', b'"annotation'), list, _create_ml,
        "'image' and 'annotations', each with 'label' and 'coordinates' (x, y, width, height)",
    ),
    "VIA": _Dialect(
        b"{", (b'"regions"', b'"file_attributes"'),
        lambda content: content.get("_via_img_metadata", content).values(), _via,
        "'filename' and 'regions', each with 'shape_attributes' and 'region_attributes'",
    ),
    "Label Studio": _Dialect(
        b"[", (b'"original_width"',), list, _label_studio,
        "'data' with an image and 'annotations', whose 'result' has boxes in percent", parts=100.0,
    ),
    "Scalabel": _Dialect(
        b"[{", (b'"box2d"', b'"labels"'), lambda content: content["frames"] if isinstance(content, dict) else content,
        _scalabel, "'name' and 'labels', each with 'category' and 'box2d' (x1, y1, x2, y2)",
    ),
    "FiftyOne": _Dialect(
        b"{", (b'"classes"', b'"labels"', b'"bounding_box"'), _fiftyone_items, _fiftyone,
        "'classes' and, in 'labels', a list for each image, with 'label' and 'bounding_box' (x, y, width, height)",
        parts=1.0,
    ),
    "Supervisely": _Dialect(
        b"{", (b'"classTitle"', b'"geometryType"'), lambda content: [content], _supervisely,
        "'size' and 'objects', each with 'classTitle', 'geometryType' and 'points'", is_of_one_image=True,
    ),
    "labelme": _Dialect(
        b"{", (b'"shapes"', b'"imagePath"'), lambda content: [content], _labelme,
        "'imagePath' and 'shapes', each with 'label' and 'points', pairs of numbers", is_of_one_image=True,
        are_marked=True,
    ),
}  # fmt: skip


NAME = f"JSON of {', '.join(list(_DIALECTS)[:-1])} or {list(_DIALECTS)[-1]}"


def _object(shape: Shape, label: str) -> Object:
    """An object; the box of a polygon is what is around it. Two points are corners of a box."""
    if not isinstance(label, str) or not label:
        raise ValueError("names must be texts")
    if isinstance(shape[0], int | float):
        return Object(list(map(float, shape)), label)
    parts = shape if isinstance(shape, tuple) else (shape,)
    outlines = [[float(value) for x, y in part for value in (x, y)] for part in parts]
    xs, ys = ([value for outline in outlines for value in outline[side::2]] for side in (0, 1))
    return Object(box_around(xs, ys), label, outlines if min(map(len, outlines)) > 4 else None)


# ---- the files ----


def _dialect_of(file: Path) -> _Dialect | None:
    ends = read_start(file, _SNIFFED_BYTES, with_end=True).lstrip()
    for dialect in _DIALECTS.values():
        if ends[:1] and ends[:1] in dialect.opens and all(mark in ends for mark in dialect.marks):
            return dialect
    return None


def _entries(file: Path, dialect: _Dialect, split: str, skipped: list) -> Iterator[Entry]:
    content = read_json(file)
    try:
        items = list(dialect.items(content))
    except _FAULTS as error:
        raise DataError(f"{file}: expected entries with {dialect.expected}.") from error
    for position, item in enumerate(items):
        where = str(file) if dialect.is_of_one_image else f"{file}, entry {position}"
        try:
            image, objects, size = dialect.read(item)
            image = file.name.removesuffix(".json") if image is None else image
            found = [_object(*one) for one in objects or [] if one[0] is not None]
            if not isinstance(image, str):
                raise ValueError("names must be texts")
            if size and not all(0 < side < 1 << 31 for side in size):
                raise ValueError(f"an image has no sides of {size[0]} and {size[1]} pixels")
        except _FAULTS as error:
            raise DataError(f"{where}: expected {dialect.expected}, got {str(item)[:120]} ({error}).") from error
        skipped += ["image"] if objects is None else ["shape"] * (len(objects) - len(found))
        also = file.stem if dialect.is_of_one_image else _UPLOAD.sub("", image)
        yield Entry(where, None if objects is None else split, image, file.parent, found, size, dialect.parts, also)
