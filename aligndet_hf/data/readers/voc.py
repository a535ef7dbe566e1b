"""Pascal VOC: an XML file for an image, in the layout of the challenge (`Annotations`, `JPEGImages`, `ImageSets`), of
LabelImg (beside the images) and of Roboflow (in a folder for each split)."""

import logging
import xml.etree.ElementTree as ElementTree
from pathlib import Path, PurePath, PureWindowsPath

from ..errors import DataError
from .files import list_files, number, read_start, read_text, read_xml, split_folders, split_of_folder
from .listed import Entry, Object, collect, grouped, split_above
from .rows import Labels, box_around_turned

logger = logging.getLogger(__name__)

NAME = "Pascal VOC"

_SNIFFED_BYTES = 4096
_LIST_FOLDERS = ("ImageSets/Main", "ImageSets", ".")  # of the challenge, of those who copy it, of PaddleDetection


def find(path: Path) -> dict[str, list[Path]]:
    """The XML files by the folders at the top that are splits, or by lists, or by the folders that they are in."""
    if not path.is_dir() or not (files := _list_xml(path)):
        return {}
    if parts := {split: own for split, part in split_folders(path).items() if (own := _list_xml(part))}:
        return parts
    return _by_lists(path, files) or grouped((split_above(file, path), file) for file in files)


def _by_lists(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The XML files by the lists that are called as splits, of one year of the challenge or of several."""
    texts, found = list(list_files(path, ".txt")), []
    for folder in _LIST_FOLDERS:
        parts = PurePath(folder).parts
        own = [text for text in texts if text.parent.relative_to(path).parts[-len(parts) :] == parts]
        found = found or [(text.parents[len(parts)], text) for text in own]
    splits = {}
    for root, lists in grouped(found).items():
        by_stem = {file.stem: file for file in files if file.is_relative_to(root)}
        # `cat_train.txt`, the list of one class, is no split; `trainval.txt` is one where it is not divided.
        named = {text.stem.removesuffix("_list"): text for text in lists}
        own = {split_of_folder(stem): text for stem, text in named.items() if split_of_folder(stem)}
        for split, text in ({"train": named["trainval"]} | own if "trainval" in named else own).items():
            lines = [line for line in read_text(text).splitlines() if line.strip()]
            listed = [_file_of(line, by_stem) for line in lines]
            missing = [line for line, file in zip(lines, listed, strict=True) if file is None]
            if missing and len(missing) < len(lines):  # the labels of a test split may be kept back
                raise DataError(f"{text}: there is no XML file for {missing[0]!r} ({len(missing)} of {len(lines)}).")
            if not missing:
                splits[split] = splits.get(split, []) + listed
    return {split: listed for split, listed in splits.items() if listed}


def _file_of(line: str, by_stem: dict[str, Path]) -> Path | None:
    """The XML file of a line of a list: an image, with or without folder and ending, perhaps with the file in it."""
    names = map(PureWindowsPath, [line.strip(), *line.split()])
    return next((by_stem[stem] for name in names for stem in (name.name, name.stem) if stem in by_stem), None)


def read(path: Path, found: dict[str, list[Path]], splits: list[str], image_dir: Path | None = None) -> Labels:
    """
    Reads these splits.

    Corners of the files of the challenge and of supervision count from 1 and are the last pixels inside, which their
    `source` tells; corners of other tools are coordinates. Boxes that CVAT has turned, as an attribute says, are the
    boxes around them. Names of categories come from all splits. Objects that are `difficult` are objects.

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
    """The XML files of Pascal VOC in a folder, at any depth; an empty file beside them is one that lost its text."""
    files = list(list_files(folder, ".xml"))
    ours = set(filter(_looks_like_voc, files))
    folders = {file.parent for file in ours}
    return [file for file in files if file in ours or (file.parent in folders and not file.stat().st_size)]


def _entry(file: Path, root: ElementTree.Element, split: str) -> Entry:
    objects = []
    of_supervision = root.findtext("folder") == "VOC" and root.findtext("source/database") == "roboflow.ai"
    first = 1 if of_supervision or "PASCAL VOC" in (root.findtext("source/annotation") or "") else 0
    for position, one in enumerate(root.iter("object")):
        where = f"{file}, object {position}"
        box = one.find("bndbox")
        if box is None:
            raise DataError(f"{where}: expected a 'bndbox' with xmin, ymin, xmax, ymax.")
        left, top, right, bottom = (
            number(_text(box, corner, where), where, f"'{corner}'") for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        box = [left - first, top - first, right - left + first, bottom - top + first]
        turned = (own.findtext("value") for own in one.iterfind("attributes/attribute[name='rotation']"))  # of CVAT
        degrees = number(next(turned, 0), where, "'rotation'")
        objects.append(Object(box_around_turned(box, degrees), _text(one, "name", where)))
    size = _size(root, "width"), _size(root, "height")
    # Files that were renamed, or made from a template, keep the old name inside: then their own name counts first.
    named, own = (root.findtext("filename") or "").strip() or file.stem, file.stem
    name, also = (named, own) if PureWindowsPath(named).stem == own else (own, PureWindowsPath(named).name)
    return Entry(str(file), split, name, file.parent, objects, size if all(size) else None, also=also)


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise DataError(f"{where}: expected a '{name}' in '{element.tag}'.")
    return text


def _size(root: ElementTree.Element, side: str) -> int | None:
    """A side of the image, where the file gives it: some tools write 0."""
    text = (root.findtext(f"size/{side}") or "").strip()
    return int(text) if text.isdecimal() and int(text) else None
