"""What all readers of label files need: listing a folder, reading text, JSON, XML and tables, names of splits."""

import contextlib
import csv
import io
import json
import logging
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .. import door
from ..errors import DataError

logger = logging.getLogger(__name__)

# Usual names of splits, in folder and file names such as `val2017` or `instances_val2017.json`.
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "validate": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_PARTS = ("images", "labels", "annotations")  # folders of a data set, which is around them
_SPLIT_FOLDER = re.compile(rf"({'|'.join(_SPLITS)})[-_]?\d*", re.IGNORECASE)
_MOST_CATEGORIES = 100_000


def split_of_folder(name: str) -> str | None:
    """The split that a folder is, if that is all that its name says: `val2017`, but not `field_test_images`."""
    match = _SPLIT_FOLDER.fullmatch(name)
    return _SPLITS[match[1].lower()] if match else None


def split_of_file(name: str) -> str | None:
    """The split that a word of the name of a label file says: `instances_val2017` -> `validation`."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def split_folders(folder: Path) -> dict[str, Path]:
    """
    The sub-folders of a folder by the split that they are, all of them, if any has the name of a split; else `{}`.

    Two folders of the same split, `train` and `train2`, keep the names that they have.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    parts = [folder / name for name in names if is_folder(folder / name, folder)]
    parts = [part for part in parts if split_of_folder(part.name) or not door.is_output(part)]
    if not any(split_of_folder(part.name) for part in parts):
        return {}
    splits = {}
    for part in parts:
        name = split_of_folder(part.name) or part.name
        splits[part.name if name in splits else name] = part
    return splits


def unwrapped(source: str | Path) -> Path:
    """What a source is a path of: of a folder with nothing but another one, as archives unpack to, the inner one."""
    path = Path(source).expanduser()
    while path.is_dir():
        inside = [part for part in path.iterdir() if not part.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].is_symlink() or door.is_output(inside[0]):
            break
        if split_of_folder(inside[0].name) or inside[0].name.lower() in _PARTS:
            break
        path = inside[0]
    return path


def called(folder: Path, name: str) -> Path:
    """What a folder has under a name, with other capitals if need be: `Images` for `images`."""
    path = folder / name
    if path.exists() or not folder.is_dir():
        return path
    return next((folder / other for other in sorted(os.listdir(folder)) if other.lower() == name.lower()), path)


def is_folder(path: Path, root: Path) -> bool:
    """Whether there is a folder, and in `root`: of a link that leads elsewhere a warning tells."""
    if not path.is_dir():
        return False
    if not door.is_inside(path, root):
        logger.warning("%s: a link to a folder outside is not followed: give that folder itself.", path)
        return False
    return True


def list_files(folder: Path, *endings: str) -> Iterator[Path]:
    """
    The files below a folder whose names end so, in a fixed order, without hidden ones and those that are not opened:
    see [`~aligndet_hf.data.door.visit`].
    """
    return (
        Path(path) for path, reason in door.visit(folder, lambda name: name.lower().endswith(endings)) if not reason
    )


def list_images(folder: Path) -> Iterator[Path]:
    """The images below a folder, as [`list_files`] finds files."""
    return (Path(path) for path, reason in door.visit(folder) if not reason)


def tell_unlisted(folder: Path, images: Iterable[Path], listed: set, reason: str) -> None:
    """Warns of the images of a folder that are left out: all but those `listed`, by path or by name without suffix."""
    unlisted = [path for path in images if not {path, path.stem} & listed]
    if unlisted:
        message = "%s: %d images are left out, they %s (e.g. %s)."
        logger.warning(message, folder, len(unlisted), reason, unlisted[0].name)


def has_images(folder: Path) -> bool:
    """Whether there is an image in a folder, at any depth."""
    return any(reason is None for _, reason in door.visit(folder))


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of these files that is in the folder, not as a link to one outside."""
    paths = (folder / name for name in names)
    return next((path for path in paths if is_file(path) and door.is_inside(path, folder)), None)


def is_file(path: Path) -> bool:
    """Whether there is a regular file that can be opened."""
    return door.problem(path, limit=door.MAX_TEXT_BYTES) is None


def inside(root: Path, name: str, where: str, base: Path | None = None) -> Path:
    """
    The file that a label file calls `name`, with separators of Windows or not.

    Args:
        root (`Path`): The folder that the file must be in.
        name (`str`): Relative to `base`.
        where (`str`): The place in the label file, for the error.
        base (`Path`, *optional*): A folder in `root`, which is the default.

    Raises:
        [`DataError`]: if the name leads out of `root`, by itself or through links.
    """
    try:
        return door.inside(root, name, base)
    except DataError as error:
        raise DataError(f"{where}: {error}.") from None


def find_inside(
    root: Path, names: Iterable[str], base: Path | None = None, is_there: Callable[[Path], bool] = is_file
) -> Path | None:
    """The first of these files that is there, each called as in [`inside`]; names that lead out of `root` are none."""
    for name in names:
        with contextlib.suppress(DataError):  # of another machine
            if is_there(path := door.inside(root, name, base)):
                return path
    return None


def tails(name: str) -> list[str]:
    """The ends of a path of another machine, the longest first: `mine/images/1.jpg`, `images/1.jpg`, `1.jpg`."""
    parts = door.plain_parts(name)
    return ["/".join(parts[start:]) for start in range(len(parts))]


def read_text(path: Path, root: Path | None = None) -> str:
    """
    The text of a label file, with or without the mark that some editors write at its start.

    Args:
        path (`Path`): The file.
        root (`Path`, *optional*): The folder that it must be in, with all links resolved.

    Raises:
        [`DataError`]: if it is no regular file, elsewhere, too large, or in no known encoding.
    """
    if root is not None and not door.is_inside(path, root):
        raise DataError(f"{door.printable(path)}: a link that leads out of {door.printable(root)}, which is not read.")
    return door.read_text(path)


def read_start(path: Path, count: int, with_end: bool = False) -> bytes:
    """
    The first bytes of a file, in UTF-8, to recognise it by; none if it cannot be opened. With as many of its last
    bytes if asked for: some tools store an image before the labels.
    """
    try:
        with door.open_file(path, door.MAX_TEXT_BYTES) as file:
            start = file.read(count)
            if with_end:
                file.seek(max(count, file.seek(0, os.SEEK_END) - count))
                start += file.read(count)
            encoding = door.encoding_of(start)
            return start if encoding == "utf-8" else start.decode(encoding, "replace").encode()
    except LookupError:  # an encoding that nobody knows, which reading the file tells
        return start
    except OSError:
        return b""


def parse_json(text: str, where: str):
    """
    The content of a text in JSON.

    Raises:
        [`DataError`]: if it is not JSON.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error


def read_json(path: Path, root: Path | None = None):
    """The content of a JSON file; errors as [`read_text`] and [`parse_json`] raise them."""
    return parse_json(read_text(path, root), str(path))


def table_rows(path: Path, delimiters: str = ",", names: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """
    The rows of a CSV or Parquet file, each with its place. Cells of CSV are texts, and empty where they are missing;
    of several delimiters the one that is most frequent in the first line counts. Give `names` of the columns if the
    first line has none.
    """
    if path.suffix.lower() == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file ({error}).") from error
        for position, row in enumerate(rows):
            yield f"{path}, row {position}", row
        return
    text = read_text(path)
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, names, delimiter=delimiter_of(text, delimiters), restval="")
    last = sum(1 for _ in io.StringIO(text, newline="")) if text.count('"') % 2 else 0
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{where}: more cells than the first line has names of columns.")
            if reader.line_num == last and any("\n" in cell for cell in row.values()):
                raise DataError(f"{where}: a quotation mark that nothing closes takes all rows after it. Close it.")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error


def delimiter_of(text: str, delimiters: str) -> str:
    """The delimiter that is most frequent in the first line."""
    return max(delimiters, key=text.partition("\n")[0].count)


def read_xml(path: Path) -> ElementTree.Element:
    """
    The root of an XML file, with tags without namespaces.

    Raises:
        [`DataError`]: if it is not XML, or defines entities, which label files never do and attacks on parsers need.
    """
    text = read_text(path)
    if "<!ENTITY" in text:
        raise DataError(f"{path}: it defines XML entities, which no label file needs. Remove them.")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: not valid XML ({error}).") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def list_of_names(given, where: str) -> list[str]:
    """
    The names of categories that a label file gives, as a list or by their numbers: `{0: name, 1: name, ...}`.

    Raises:
        [`DataError`]: if it gives something else, a name twice, or an empty one.
    """
    names = given
    if isinstance(given, dict):
        numbers = {int(key) if str(key).isdecimal() else -1: name for key, name in given.items()}
        names = [numbers[label] for label in sorted(numbers)] if sorted(numbers) == list(range(len(given))) else None
    if not isinstance(names, list) or not names or len(set(map(str, names)) - {""}) != len(names):
        raise DataError(
            f"{where}: expected a list of different category names, none of them empty, or "
            f'{{"0": name, "1": name, ...}}, got {str(given)[:80]}.'
        )
    return list(map(str, names))


def numbers_as_names(last: int, where: str) -> list[str]:
    """
    Names of categories that have none: their numbers, 0 to `last`.

    Raises:
        [`DataError`]: if there are more than a detector can have, as a broken number makes them.
    """
    if last >= _MOST_CATEGORIES:
        raise DataError(
            f"{where}: the number {last} of a category without a name: more than {_MOST_CATEGORIES:,} categories. "
            "Number the categories from 0 on, or give their names."
        )
    return list(map(str, range(last + 1)))


def number(value, where: str, what: str) -> float:
    """
    A finite number that a label file gives as text.

    Raises:
        [`DataError`]: if it is not one.
    """
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = float("nan")
    if not abs(result) < float("inf"):
        raise DataError(f"{where}: {what} must be a number, got {value!r}.")
    return result
