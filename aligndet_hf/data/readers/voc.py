"""Pascal VOC: an XML file for an image, in the layout of the challenge (`Annotations`, `JPEGImages`, `ImageSets`), of
LabelImg (beside the images) and of Roboflow (in a folder for each split)."""

import logging
import xml.etree.ElementTree as ElementTree
from pathlib import Path, PureWindowsPath

from ..errors import DataError
from .files import (
    inside,
    is_file,
    is_image,
    list_files,
    number,
    read_start,
    read_text,
    read_xml,
    split_folders,
    split_of_folder,
    tell_unlisted,
)
from .rows import Categories, LabelledImage, Labels

logger = logging.getLogger(__name__)

NAME = "Pascal VOC"

_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")
_SNIFFED_BYTES = 4096


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with an XML file of Pascal VOC, at any depth."""
    return path.is_dir() and any(map(_looks_like_voc, list_files(path, ".xml")))


def split_names(path: Path) -> list[str]:
    """The lists of `ImageSets/Main`, or the folders that are splits, or one."""
    return list(_splits(path))


def read(path: Path, splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits.

    Corners of the challenge's own files count from 1 and are the last pixels inside; corners of other tools
    are coordinates: a file is of the challenge if its `source` says so. Names of categories come from all splits,
    in alphabetical order. Objects that are `difficult` are objects.

    Args:
        path (`Path`): The folder.
        splits (`list[str]`): As [`split_names`] has them.
        image_dir (`Path`, *optional*): Folder of the images. By default beside the XML files, or looked for.

    Returns:
        [`Labels`]

    Raises:
        [`DataError`]: for a file that is not as it should be; it names the file and the object.
    """
    files = _splits(path)
    roots = {file: read_xml(file) for file in dict.fromkeys(file for split in files.values() for file in split)}
    names = sorted({_text(one, "name", str(file)) for file, root in roots.items() for one in root.iter("object")})
    chosen = dict.fromkeys(file for split in splits for file in files[split])
    images = [_read_image(path, file, roots[file], names, image_dir) for file in chosen]
    difficult = sum(one.findtext("difficult") == "1" for file in chosen for one in roots[file].iter("object"))
    if difficult:
        logger.warning("%s: %d objects are marked as difficult; they count as objects.", path, difficult)
    names_of_images = {PureWindowsPath(root.findtext("filename") or "").stem for root in roots.values()}
    tell_unlisted(path, names_of_images | {file.stem for file in roots}, "have no XML file")
    return Labels(images, Categories(names) if names else None)


def _looks_like_voc(file: Path) -> bool:
    start = read_start(file, _SNIFFED_BYTES)
    return b"<annotation" in start and b"<annotations" not in start


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The XML files of each split."""
    parts = split_folders(folder)
    if any(list_xml(part) for part in parts.values()):
        return {name: files for name, part in parts.items() if (files := list_xml(part))}
    files = list_xml(folder)
    # `cat_train.txt`, the list of one class, is no split; `trainval.txt` is one where it is not divided.
    lists = {path.stem: path for path in list_files(folder, ".txt") if path.match("ImageSets/Main/*.txt")}
    lists = {split_of_folder(stem): path for stem, path in lists.items() if split_of_folder(stem)} | (
        {"train": lists["trainval"]} if "trainval" in lists and "train" not in lists else {}
    )
    by_stem = {file.stem: file for file in files}
    splits = {}
    for split, path in lists.items():
        listed = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
        missing = [name for name in listed if name not in by_stem]
        if missing and len(missing) < len(listed):  # the labels of a test split may be kept back
            raise DataError(f"{path}: there is no XML file for {missing[0]!r} ({len(missing)} of {len(listed)}).")
        if listed and not missing:
            splits[split] = [by_stem[name] for name in listed]
    return splits or {split_of_folder(folder.name) or "train": files}


def list_xml(folder: Path) -> list[Path]:
    """The XML files of Pascal VOC in a folder, at any depth."""
    return list(filter(_looks_like_voc, list_files(folder, ".xml")))


def _read_image(
    folder: Path, file: Path, root: ElementTree.Element, names: list[str], image_dir: Path | None
) -> LabelledImage:
    image = LabelledImage(
        path=_find_image(folder, file, root, image_dir), where=str(file), objects={"bbox": [], "category": []}
    )
    image.width, image.height = (_size(root, side) for side in ("width", "height"))
    first = 1 if "PASCAL VOC" in (root.findtext("source/annotation") or "") else 0
    for position, one in enumerate(root.iter("object")):
        where = f"{file}, object {position}"
        box = one.find("bndbox")
        if box is None:
            raise DataError(f"{where}: expected a 'bndbox' with xmin, ymin, xmax, ymax.")
        left, top, right, bottom = (
            number(_text(box, corner, where), where, f"'{corner}'") for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        name = _text(one, "name", where)
        image.add([left - first, top - first, right - left + first, bottom - top + first], names.index(name))
    return image


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise DataError(f"{where}: expected a '{name}' in '{element.tag}'.")
    return text


def _size(root: ElementTree.Element, side: str) -> int | None:
    """A side of the image, where the file gives it: some tools write 0."""
    text = (root.findtext(f"size/{side}") or "").strip()
    return int(text) if text.isdecimal() and int(text) else None


def _find_image(folder: Path, file: Path, root: ElementTree.Element, image_dir: Path | None) -> Path:
    """The image of an XML file: named as it says or as the file itself, beside it or in the usual folders."""
    name = (root.findtext("filename") or "").strip().replace("\\", "/")
    places = [image_dir] if image_dir else [file.parent, *(file.parent.parent / part for part in _IMAGE_FOLDERS)]
    for place in places:
        root = folder if folder in place.parents or place == folder else place
        names = [name] if name else []
        names += [path.name for path in sorted(place.glob(f"{_escaped(file.stem)}.*")) if is_image(path)]
        for one in names:
            path = inside(root, one, str(file), place)
            if is_file(path):
                return path
    raise DataError(
        f"{file}: cannot find its image {name or file.stem!r} in {', '.join(map(str, places))}. Give the folder as "
        "image_dir."
    )


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
