"""YOLO: a text file for an image, with classes and centres relative to its size, in the layouts of Ultralytics,
Roboflow and Darknet."""

import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import yaml

from ..door import OUTPUT, is_image_name, is_inside, spelt_as_there, visit
from ..errors import DataError
from ..images import image_size
from .files import (
    called,
    find_file,
    find_inside,
    inside,
    is_file,
    is_folder,
    list_files,
    list_images,
    list_of_names,
    number,
    numbers_as_names,
    read_start,
    read_text,
    split_folders,
    split_of_folder,
    tails,
)
from .listed import Entry, Object, collect
from .rows import Labels, box_around

logger = logging.getLogger(__name__)

NAME = "YOLO"
EXPECTED = (
    "expected, for YOLO, lines 'class centre_x centre_y width height' in parts of the image's sides, in files called "
    "as their images, beside them or in a folder labels beside the folder images"
)

_CONFIGS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.names", "predefined_classes.txt")
_SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
_SNIFFED_BYTES = 200
_LINE = re.compile(r"\d+(\.0+)?(\s+[-+.\deE]+){4,}\s*")


def find(path: Path) -> dict[str, list[Path]]:
    """
    The splits of a `data.yaml`, of a folder with one, or of a folder with `labels` beside `images`, with label files
    or with lists called `train.txt` and so on; and their places: folders of images, or lists of their names.
    """
    if path.is_file() and path.suffix.lower() not in (".yaml", ".yml"):
        return {}
    root, config = _root(path), _config(path)
    if path.is_dir() and not set(_SPLIT_KEYS) & set(config):
        layout, has_texts = _layout(root), any(True for _ in list_files(root, ".txt"))
        is_labelled = has_texts and any(_has_labels(root, place) for place in layout.values())
        return {split: [place] for split, place in layout.items()} if is_labelled else {}
    splits = {}
    for key in _SPLIT_KEYS:
        if not config.get(key):
            continue
        given = config[key] if isinstance(config[key], list) else [config[key]]
        places = [_place(root, config, str(place), key) for place in given]
        if there := [place for place in places if os.path.exists(place)]:
            splits[split_of_folder(key)] = there
        elif key == "train":
            raise DataError(
                f"{config['']}: '{key}' is {config[key]!r}, but there is no {places[0]}. Correct it, or put the file "
                "into the folder of the data."
            )
        else:
            logger.warning("%s: '%s' is %r, which is not there: left out.", config[""], key, config[key])
    return splits or (config and {split: [place] for split, place in _layout(root).items()})


def read(path: Path, found: dict[str, list[Path]], splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits. An image without a label file has no objects. Polygons count as the boxes around them.

    Args:
        path (`Path`): The folder, or its `data.yaml`.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Of no use here.

    Returns:
        [`Labels`]: boxes in pixels of the images, whose headers are read for their sizes.

    Raises:
        [`DataError`]: for a line that is not as it should be; it names file and line.
        [`ImageError`]: for an image whose size cannot be read.
    """
    root, config = _root(path), _config(path)
    names, count = _names(root, config), config.get("nc")
    count = count if type(count) is int and count > 0 else None
    if names and count not in (None, len(names)):
        raise DataError(f"{config['']}: 'nc' is {count}, but there are {len(names)} names: correct one of the two.")
    pairs_of = functools.cache(lambda place: list(_pairs(root, place)))
    folders = [place for places in found.values() for place in places if place.is_dir()]
    _tell_unused(path, root, {file for place in folders for _, file in pairs_of(place)})
    if names is None:
        below = None if config else next(filter(_read_config, list_files(root, ".yaml", ".yml")), None)
        if below is not None:
            raise DataError(
                f"{path}: no data.yaml in it, but further down there is {below}. Give that file or its folder."
            )
        files = [file for places in found.values() for place in places for _, file in pairs_of(place)]
        labels = ((label, where) for file in files for where, label, _ in _lines(file, root))
        last, where = (count - 1, f"{config['']}, 'nc'") if count else max(labels, default=(0, ""))
        names = numbers_as_names(last, where)
        logger.warning("%s: no data.yaml or classes.txt names the classes: they are called by their numbers.", path)
    keypoints = bool(config.get("kpt_shape"))
    pairs = ((split, *pair) for split in splits for place in found[split] for pair in pairs_of(place))
    pairs = list(dict.fromkeys(pairs))
    if pairs and not any(file.exists() for *_, file in pairs):
        logger.warning("%s: no image has a label file; %s is where the first was looked for.", path, pairs[0][2])
    entries = (_entry(*pair, root, names, keypoints) for pair in pairs)
    return collect(root, entries, splits, missing=None, categories=names)


def _tell_unused(path: Path, root: Path, used: set[Path]) -> None:
    """Warns of label files without an image: those that were renamed, for one. Lists may leave some out."""
    files = (file for folder in sorted({file.parent for file in used}) for file in sorted(folder.glob("*.txt")))
    if unused := [file for file in files if file not in used and _is_label_file(file)]:
        left_out = (Path(image) for image, reason in visit(root) if reason not in (None, OUTPUT))
        told = {_label_file(image) for image in left_out}  # with their images, by the reading
        unused = [file for file in unused if file not in told]
    if unused:
        message = "%s: %d label files are not used, there is no image of that name (e.g. %s)."
        logger.warning(message, path, len(unused), unused[0])


# ---- the layout ----


def _root(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _find_config(folder: Path) -> Path | None:
    """The `data.yaml` of a folder, or another YAML file with splits and names, or Darknet's `obj.data`."""
    files = [folder / name for name in _CONFIGS] + sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    files += sorted(folder.glob("*.data"))
    files = (file for file in files if is_file(file) and is_inside(file, folder))
    return next((file for file in files if _read_config(file)), None)


def _read_config(path: Path) -> dict | None:
    """What a YAML file, or one of Darknet, says of a data set; `None` if it is about something else."""
    text = read_text(path)
    if path.suffix == ".data":
        return _read_darknet(path, dict(re.findall(r"^\s*(\w+)\s*=\s*(\S.*?)\s*$", text, re.MULTILINE)))
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        if path.name in _CONFIGS:
            raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
        return None
    if not isinstance(content, dict) or not ({"names"} | ({"nc"} if path.name in _CONFIGS else set())) & set(content):
        return None
    if not set(_SPLIT_KEYS) & set(content) and path.name not in _CONFIGS:
        return None
    texts = yaml.load(text, yaml.BaseLoader).get("names")  # a class may be called `no`, which is not False
    return content | {"": path} | ({"names": texts} if content.get("names") else {})


def _read_darknet(path: Path, content: dict[str, str]) -> dict | None:
    places = {key: find_inside(path.parent, tails(value)) for key, value in content.items()}
    if places.get("names") is None or not any(places.get(key) for key in _SPLIT_KEYS):
        return None
    return content | {"names": _lines_of_names(places["names"], path.parent), "": path}


def _config(path: Path) -> dict:
    file = path if path.is_file() else _find_config(path)
    return (_read_config(file) if file else None) or {}


def _layout(folder: Path) -> dict[str, Path]:
    """The places of images by split, without a `data.yaml`: `images/train`, `train/images`, lists, or one folder."""
    images = called(folder, "images")
    has_images = is_folder(images, folder)
    if has_images and split_folders(images):
        return split_folders(images)
    parts = split_folders(folder)
    if parts:
        places = {name: called(part, "images") for name, part in parts.items()}
        return {name: place if is_folder(place, parts[name]) else parts[name] for name, place in places.items()}
    lists = {split_of_folder(file.stem.removeprefix("autosplit_")): file for file in sorted(folder.glob("*.txt"))}
    lists = {split: file for split, file in lists.items() if split and _lists_images(file, folder)}
    return lists or {split_of_folder(folder.name) or "train": images if has_images else folder}


def _lists_images(file: Path, folder: Path) -> bool:
    text = read_text(file, folder).strip() if is_file(file) and is_inside(file, folder) else ""
    first = text and text.splitlines()[0].strip()
    return is_image_name(first) and find_inside(folder, [first, *tails(first)]) is not None


def _has_labels(root: Path, place: Path) -> bool:
    """Whether there is a label file for one of the images of a folder or list, and it looks like one."""
    return any(_is_label_file(file) for _, file in _pairs(root, place))


def _is_label_file(file: Path) -> bool:
    return bool(_LINE.match(read_start(file, _SNIFFED_BYTES).decode("utf-8", "replace").split("\n")[0]))


def _place(root: Path, config: dict, name: str, key: str) -> Path:
    """
    Where a split is. Ultralytics starts from `path`, Roboflow writes `../train/images` and means `train/images`, and
    both write places of the machine on which the file was made.
    """
    where, base = f"{config['']}, '{key}'", str(config.get("path") or ".").replace("\\", "/")
    plain = name.replace("\\", "/")
    tries = [plain] if base in (".", "") else [str(PurePosixPath(base) / plain), plain]
    tries += [re.sub(r"^(\.\./)+", "", plain), *tails(plain)]
    found = find_inside(root, tries, is_there=lambda place: os.path.exists(place) and place != root)
    return found or inside(root, re.sub(r"^(\.\./)+|^/+", "", plain), where)


def _pairs(root: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """The images of a folder or a list with their label files, which need not exist."""
    if place.is_file():  # a list of images
        for row, line in enumerate(read_text(place, root).splitlines(), start=1):
            if name := line.strip():
                image = find_inside(root, [name, *tails(name)])
                if image is None:
                    raise DataError(f"{place}, line {row}: there is no file {name!r} in {root}.")
                yield image, _label_file(image)
    else:
        yield from ((image, _label_file(image)) for image in list_images(place))


def _label_file(image: Path) -> Path:
    """`images/train/1.jpg` -> `labels/train/1.txt`; without a folder `images` the file beside the image."""
    parts, folders = image.parent.parts, [image.parent]
    if images := [position for position, part in enumerate(parts) if part.lower() == "images"]:
        names = ["labels", *parts[images[-1] + 1 :]]
        folders.insert(0, functools.reduce(called, names, Path(*parts[: images[-1]])))
    names = [f"{image.stem}{ending}" for ending in (".txt", ".TXT")]
    files = [folder / spelt_as_there(folder, name) for folder in folders for name in names]
    return next(filter(is_file, files), files[0])


# ---- names and boxes ----


def _names(root: Path, config: dict) -> list[str] | None:
    if config.get("names") is not None:
        return list_of_names(config["names"], f"{config['']}, 'names'")
    places = [root, root / "labels", *split_folders(root).values()]
    of_parts = [part for part in map(_config, places[2:]) if part.get("names")]  # supervision: one for each split
    if of_parts:
        if different := [part for part in of_parts if part["names"] != of_parts[0]["names"]]:
            files = f"{of_parts[0]['']} and {different[0]['']}"
            raise DataError(f"{files} name the classes differently: the splits of a data set need the same classes.")
        return list_of_names(of_parts[0]["names"], f"{of_parts[0]['']}, 'names'")
    of_darknet = [file.name for place in places for file in sorted(place.glob("*.names"))]
    file = next((found for place in places if (found := find_file(place, *_NAME_FILES, *of_darknet))), None)
    return list_of_names(_lines_of_names(file, root), str(file)) if file else None


def _lines_of_names(file: Path, root: Path) -> list[str]:
    """The names of a file with one in each line: an empty line between them has a number as well."""
    return [line.strip() for line in read_text(file, root).rstrip().splitlines()]


def _lines(file: Path, root: Path) -> Iterator[tuple[str, int, list[float]]]:
    """The place, class and numbers of each object of a label file; of a file that does not exist none."""
    if not file.exists():
        return
    for row, line in enumerate(read_text(file, root).splitlines(), start=1):
        where, values = f"{file}, line {row}", line.split()
        if not values:
            continue
        numbers = [number(value, where, "each value") for value in values]
        if len(values) < 5 or numbers[0] < 0 or not numbers[0].is_integer():
            raise DataError(f"{where}: expected 'class centre_x centre_y width height', got {line.strip()[:80]!r}.")
        yield where, int(numbers[0]), numbers[1:]


def _entry(split: str, image: Path, file: Path, root: Path, names: list[str], keypoints: bool) -> Entry:
    objects = []
    for where, label, values in _lines(file, root):
        if label >= len(names):
            known = f"0 to {len(names) - 1} ({', '.join(names[:10])})"
            raise DataError(f"{where}: unknown class {label}, expected {known}.")
        box, outline = _shape(values, keypoints, where)
        objects.append(Object(box, names[label], outline and [outline]))
    size = image_size(image)[::-1] if objects else None
    where = str(file if file.exists() else image)
    return Entry(where, split, image.name, image.parent, objects, size, parts=1.0)


def _shape(values: list[float], keypoints: bool, where: str) -> tuple[list[float], list[float] | None]:
    """The relative box of a box, of a box with its key points, or of what is around a polygon; and the polygon."""
    outline = None
    if len(values) == 4 or keypoints:
        x, y, width, height = values[:4]
        box = [x - width / 2, y - height / 2, width, height]
    elif len(values) == 5:
        raise DataError(
            f"{where}: six values, expected five: a detection with its score, or a track with its number? Remove the "
            "last value of each line."
        )
    elif len(values) % 2:
        raise DataError(f"{where}: a polygon must have two numbers for each point, got {len(values)} numbers.")
    else:
        box, outline = box_around(values[::2], values[1::2]), values
    left, top, width, height = box
    if max(map(abs, (left, top, left + width, top + height))) >= 2:  # 2 marks a key point that is seen
        shown = " ".join(f"{value:g}" for value in (values[:4] if outline is None else [max(outline, key=abs)]))
        hint = "" if outline is None else " in a polygon. Of key points data.yaml must give the 'kpt_shape'"
        raise DataError(
            f"{where}: the numbers must be relative to the size of the image, from 0 to 1, got {shown}{hint}."
        )
    return box, outline
