"""Pascal VOC: an XML file for an image, in the layout of the challenge (`Annotations`, `JPEGImages`, `ImageSets`), of
LabelImg (beside the images) and of Roboflow (in a folder for each split)."""

import logging
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ..errors import DataError
from .files import list_files, number, read_start, read_text, read_xml, split_folders, split_of_folder
from .listed import Entry, Object, collect
from .rows import Labels

logger = logging.getLogger(__name__)

NAME = "Pascal VOC"

_SNIFFED_BYTES = 4096


def find(path: Path) -> dict[str, list[Path]]:
    """The XML files by the lists of `ImageSets/Main`, or by the folders that are splits, or as one split."""
    if not path.is_dir() or not (files := _list_xml(path)):
        return {}
    if parts := {split: own for split, part in split_folders(path).items() if (own := _list_xml(part))}:
        return parts
    # `cat_train.txt`, the list of one class, is no split; `trainval.txt` is one where it is not divided.
    lists = {file.stem: file for file in list_files(path, ".txt") if file.match("ImageSets/Main/*.txt")}
    lists = {split_of_folder(stem): file for stem, file in lists.items() if split_of_folder(stem)} | (
        {"train": lists["trainval"]} if "trainval" in lists and "train" not in lists else {}
    )
    by_stem = {file.stem: file for file in files}
    splits = {}
    for split, file in lists.items():
        listed = [line.split()[0] for line in read_text(file).splitlines() if line.strip()]
        missing = [name for name in listed if name not in by_stem]
        if missing and len(missing) < len(listed):  # the labels of a test split may be kept back
            raise DataError(f"{file}: there is no XML file for {missing[0]!r} ({len(missing)} of {len(listed)}).")
        if listed and not missing:
            splits[split] = [by_stem[name] for name in listed]
    return splits or {split_of_folder(path.name) or "train": files}


def read(path: Path, found: dict[str, list[Path]], splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits.

    Corners of the challenge's own files count from 1 and are the last pixels inside; corners of other tools
    are coordinates: a file is of the challenge if its `source` says so. Names of categories come from all
    splits. Objects that are `difficult` are objects.

    Args:
        path (`Path`): The folder.
        found (`dict`): What [`find`] gives.
        splits (`list[str]`): Of those found.
        image_dir (`Path`, *optional*): Folder of the images, at any depth. By default the folder.

    Returns:
        [`Labels`]

    Raises:
        [`DataError`]: for a file that is not as it should be; it names the file and the object.
    """
    files = {split: found[split] for split in splits} | found  # in the order that is asked for, then the others
    roots = {file: read_xml(file) for listed in files.values() for file in listed}
    entries = (_entry(file, roots[file], split) for split, listed in files.items() for file in listed)
    labels = collect(image_dir or path, entries, splits, "have no XML file")
    chosen = {file for split in splits for file in files[split]}
    difficult = sum(one.findtext("difficult") == "1" for file in chosen for one in roots[file].iter("object"))
    if difficult:
        logger.warning("%s: %d objects are marked as difficult; they count as objects.", path, difficult)
    return labels


def _looks_like_voc(file: Path) -> bool:
    start = read_start(file, _SNIFFED_BYTES)
    return b"<annotation" in start and b"<annotations" not in start


def _list_xml(folder: Path) -> list[Path]:
    """The XML files of Pascal VOC in a folder, at any depth."""
    return list(filter(_looks_like_voc, list_files(folder, ".xml")))


def _entry(file: Path, root: ElementTree.Element, split: str) -> Entry:
    objects = []
    first = 1 if "PASCAL VOC" in (root.findtext("source/annotation") or "") else 0
    for position, one in enumerate(root.iter("object")):
        where = f"{file}, object {position}"
        box = one.find("bndbox")
        if box is None:
            raise DataError(f"{where}: expected a 'bndbox' with xmin, ymin, xmax, ymax.")
        left, top, right, bottom = (
            number(_text(box, corner, where), where, f"'{corner}'") for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        box = [left - first, top - first, right - left + first, bottom - top + first]
        objects.append(Object(box, _text(one, "name", where)))
    size = _size(root, "width"), _size(root, "height")
    name = (root.findtext("filename") or "").strip() or file.stem
    return Entry(str(file), split, name, file.parent, objects, size if all(size) else None, also=file.stem)


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise DataError(f"{where}: expected a '{name}' in '{element.tag}'.")
    return text


def _size(root: ElementTree.Element, side: str) -> int | None:
    """A side of the image, where the file gives it: some tools write 0."""
    text = (root.findtext(f"size/{side}") or "").strip()
    return int(text) if text.isdecimal() and int(text) else None
