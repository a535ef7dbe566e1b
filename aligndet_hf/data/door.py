"""
The door: the one place where the files of a data set are found and opened.

A file that a data set names is opened only if it is a regular one of bounded size, and lies, with all links resolved,
in the folder of the data set. Nothing is fetched from an address, and no pipe or device is waited for.
"""

import functools
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE

from ..runs import RECORD
from .errors import DataError

MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 32  # of a label file; the largest public ones have some hundred megabytes
OUTPUT = "written by a command: give that folder itself"  # why a folder in a folder of images is left out

_LISTED = 5
# Not pictures, formats without a decoder in Pillow, and one (EPS) that would start another program.
_NOT_OPENED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_XML_ENCODING = re.compile(rb"""\s*<\?xml[^>]*?\sencoding\s*=\s*["']([A-Za-z][\w.-]*)["']""")
# What people have among their pictures, and what makes it readable.
_FIXES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC needs a plug-in of Pillow: pip install pillow-heif"),
    **dict.fromkeys((".dcm", ".nii", ".czi", ".nd2", ".svs"), "convert it to PNG or TIFF"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"), "raw of a camera: convert it"),
    **dict.fromkeys((".jxl", ".svg", ".eps", ".exr", ".npy"), "Pillow does not open this format: convert it to PNG"),
}


# ---- names ----


def printable(name) -> str:
    """A file name as it can be printed: control characters and bytes that are no text become escapes."""
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def listed(names: Iterable, count: int = _LISTED) -> str:
    """The first few names, printable."""
    names = list(names)
    return ", ".join(map(printable, names[:count])) + (" ..." if len(names) > count else "")


def first(lines: list[str], count: int = 50) -> str:
    """The first lines of many, and how many more there are."""
    more = [f"... and {len(lines) - count} more"] if len(lines) > count else []
    return "\n  ".join(lines[:count] + more)


# ---- formats ----


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The formats that images may have, as Pillow names them; HEIC among them where `pillow-heif` is installed."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name not in _NOT_OPENED)  # in the order that Pillow tries them in


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The endings, in lower case with their dot, of the files that are taken for images."""
    formats = set(image_formats())
    return frozenset(suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats)


def is_image_name(name: str | Path) -> bool:
    """Whether a file is taken for an image, by the ending of its name."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def fix_of(name: str | Path) -> str:
    """What to do about a file that Pillow does not recognise, by the ending of its name."""
    suffix = os.path.splitext(name)[1].lower()
    return _FIXES.get(suffix, "it is not an image of a format that Pillow opens, or damaged at its head")


# ---- one file ----


def problem(path: str | Path, limit: int = MAX_IMAGE_BYTES) -> str | None:
    """Why a file is not opened, in a few words: `None` for a regular file of at most `limit` bytes."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        is_link = not isinstance(error, ValueError) and os.path.islink(path)
        return "a link to nothing" if is_link else getattr(error, "strerror", None) or str(error)
    return _problem(found, limit)


def _problem(found: os.stat_result, limit: int) -> str | None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(found.st_mode):
        return f"not a regular file but {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}"
    if found.st_size > limit:
        return f"{found.st_size / 2**30:.1f} GiB large, more than the {limit / 2**30:g} GiB that are read"
    return None


def open_file(path: str | Path, limit: int = MAX_IMAGE_BYTES) -> BinaryIO:
    """
    Opens a regular file of bounded size for reading. It never waits, as opening a pipe would.

    Raises:
        `OSError`: if it is not there, is not such a file, or cannot be read. The message is the reason only.
    """
    reason = problem(path, limit)
    if reason is None:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            file = os.fdopen(os.open(path, flags), "rb")
        except OSError as error:
            raise OSError(error.strerror) from error
        reason = _problem(os.fstat(file.fileno()), limit)  # it may have been replaced meanwhile
        if reason is None:
            return file
        file.close()
    raise OSError(reason)


def read_bytes(path: str | Path, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """
    The content of a file.

    Raises:
        [`DataError`]: if it cannot be opened (see [`open_file`]). It names the file.
    """
    try:
        with open_file(path, limit) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror or error}.") from error


def image_bytes(value: dict) -> bytes:
    """The content of an undecoded image of a `datasets` row, wherever it is stored."""
    return value["bytes"] if value.get("bytes") is not None else read_bytes(value["path"])


def image_digest(value: dict) -> str:
    """What tells the content of an undecoded image from others: 32 hexadecimal digits."""
    return hashlib.blake2b(image_bytes(value), digest_size=16).hexdigest()


def read_text(path: str | Path, limit: int = MAX_TEXT_BYTES) -> str:
    """
    The text of a label file: in UTF-8 or UTF-16, with or without the mark that some editors write at its head, or in
    the encoding that an XML file declares.

    Raises:
        [`DataError`]: if it cannot be opened (see [`open_file`]), or is in another encoding. It names the file.
    """
    content = read_bytes(path, limit)
    encoding = encoding_of(content)
    try:
        return content.decode(encoding)
    except (UnicodeError, LookupError) as error:
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{printable(path)}: not a text in {name} ({error}). Save it in UTF-8.") from error


def encoding_of(start: bytes) -> str:
    """The encoding of a text that begins so: by its mark, its zero bytes or, in XML, its declaration; else UTF-8."""
    encoding = json.detect_encoding(start)
    declared = _XML_ENCODING.match(start) if encoding == "utf-8" else None
    if declared is None or declared[1].lower().startswith(b"utf"):  # "utf-16" in front of UTF-8 is a fault of .NET
        return encoding
    return declared[1].decode()


def image_value(path: str | Path) -> dict:
    """
    A file as the undecoded image of a `datasets` row: its absolute path or, where the name is no text that a data set
    can hold, its content.
    """
    absolute = os.path.abspath(path)
    try:
        absolute.encode()
    except UnicodeEncodeError:
        return {"bytes": read_bytes(path), "path": printable(absolute)}
    return {"bytes": None, "path": absolute}


# ---- a folder ----


def is_inside(path: str | Path, root: str | Path) -> bool:
    """Whether a file lies in a folder, after all links are resolved."""
    try:
        real = os.path.realpath(path)
    except ValueError:  # a zero byte in the name
        return False
    return any(os.path.commonpath([real, folder]) == folder for folder in _real_folders(os.path.abspath(root)))


@functools.lru_cache(maxsize=32)  # asked for every file of a data set
def _real_folders(root: str) -> list[str]:
    """A folder without links and, of a snapshot in the Hub's cache, the files that the snapshot's links lead to."""
    folder = Path(os.path.realpath(root))
    for place in (folder, *folder.parents):
        blobs = place.parent.parent / "blobs"
        if place.parent.name == "snapshots" and blobs.is_dir():
            return [str(folder), str(blobs)]
    return [str(folder)]


def inside(root: str | Path, name: str, base: str | Path | None = None) -> Path:
    """
    The file that a data set calls `name`.

    Args:
        root (`str` or `Path`): The folder that all files of the data set must lie in.
        name (`str`): A path, with slashes or backslashes.
        base (`str` or `Path`, *optional*): The folder that `name` starts from, `root` by default.

    Returns:
        `Path`: the file, which need not exist.

    Raises:
        [`DataError`]: if it is an address or leads out of `root`, by itself or through links. It does not know where
            the name stands: the caller adds it.
    """
    base = root if base is None else base
    if os.path.lexists(place := os.path.join(base, name.replace("\0", "?"))):
        path = place
    else:
        name = name.replace("\\", "/")
        path = os.path.join(base, spelt_as_there(base, name))
    path = os.path.normpath(path)
    is_foreign = "://" in name or "\0" in name or re.match(r"[A-Za-z]:[/\\]", name)
    if is_foreign or not is_inside(path, root):
        raise DataError(
            f"the file name '{printable(name)}' leads out of {printable(root)}; expected a relative path inside it"
        )
    return Path(path)


def spelt_as_there(folder: str | Path, name: str) -> str:
    """
    A file name as the folder has it, which may take its accents apart (NFD, as macOS does) or not (NFC), and has no
    spaces as `%20`.

    Args:
        folder (`str` or `Path`): Where the name starts from.
        name (`str`): A path, with slashes. It comes back as it is if there is no such file in either form.
    """
    forms = [] if name.isascii() else [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    forms += [unquote(name)] * ("%" in name)
    return next((form for form in [name, *forms] if os.path.lexists(os.path.join(folder, form))), name)


def plain_parts(name: str) -> list[str]:
    """The parts of a path, without what leads out of a folder: `a` and `b.jpg` of `C:\\a\\..\\b.jpg`."""
    parts = name.replace("\\", "/").replace("\0", "").split("/")
    return [part for part in parts if part not in ("", ".", "..") and not part.endswith(":")]


def is_output(folder: str | Path) -> bool:
    """Whether a command of ours writes there, or has written: the pictures in it are none of the data around it."""
    return os.path.isfile(os.path.join(folder, RECORD))


def visit(root: str | Path, is_wanted: Callable[[str], bool] = is_image_name) -> Iterator[tuple[str, str | None]]:
    """
    Goes through the files of a folder, in a fixed order: its own by name, then the files of its folders, without
    hidden ones (`.ipynb_checkpoints` and the like) and what commands have written there.

    Links to folders are not followed: those in `root` are met anyway, and what lies elsewhere is not read.

    Args:
        root (`str` or `Path`): The folder.
        is_wanted (`Callable`, *optional*): Which files are meant, by their names; images by default.

    Yields:
        `tuple`: a path, and why it is left out, or `None` for a file to read.
    """
    failed = []
    for folder, folders, names in os.walk(root, onerror=failed.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in filter(lambda name: is_output(os.path.join(folder, name)), list(folders)):
            folders.remove(name)
            yield os.path.join(folder, name), OUTPUT
        for path in (os.path.join(folder, name) for name in folders):
            if os.path.islink(path) and not is_inside(path, root):
                yield path, "a link to a folder outside: give that folder itself"
        for name in sorted(name for name in names if not name.startswith(".")):
            path = os.path.join(folder, name)
            if is_wanted(name):
                reason = problem(path)
                if reason is None and os.path.islink(path) and not is_inside(path, root):
                    reason = "a link to a file outside the folder: give the folder of that file"
                yield path, reason
            elif is_wanted is is_image_name and (fix := _FIXES.get(os.path.splitext(name)[1].lower())):
                yield path, fix
    yield from ((error.filename, error.strerror) for error in failed)


# ---- a data set that names files ----


def hub_roots(source: str | Path) -> list[str | Path]:
    """
    Where the images of a data set may lie that `load_dataset` has loaded or streams: in its own folder or repository,
    and in what `datasets` has downloaded and unpacked.
    """
    cache = [Path(datasets.config.DOWNLOADED_DATASETS_PATH), Path(datasets.config.EXTRACTED_DATASETS_PATH)]
    if os.path.exists(os.path.expanduser(source)):
        return [Path(source).expanduser(), *cache]
    repository = Path(HF_HUB_CACHE, "datasets--" + str(source).replace("/", "--"))
    return [repository, *cache, f"hf://datasets/{source}@", f"hf://datasets/{source}/"]


def require_inside(images: pa.ChunkedArray, roots: list[str | Path], source: str) -> None:
    """
    Refuses a data set whose images are files elsewhere: what somebody else made may name any file of this machine,
    or an address.

    Args:
        images (`pa.ChunkedArray`): The column `image`, not decoded.
        roots (`list`): The folders that its files may lie in, or beginnings of addresses (`hf://datasets/...`).
        source (`str`): How to call it in messages.

    Raises:
        [`DataError`]: lists the rows.
    """
    strangers, start = [], 0
    for chunk in images.chunks:
        strangers += [(start + row, path) for row, path in strange_paths(chunk, roots)]
        start += len(chunk)
    if strangers:
        rows = "; ".join(f"row {row}: '{printable(path)}'" for row, path in strangers[:_LISTED])
        raise DataError(
            f"{source}: {len(strangers)} images are not in the data set but name files outside its folder or "
            f"addresses ({rows}{' ...' if len(strangers) > _LISTED else ''}), which are not read. Put the files "
            "into its folder, unpack archives; where they are links, give the folder that they lead to."
        )


def strange_paths(images: pa.StructArray, roots: list[str | Path]) -> Iterator[tuple[int, str]]:
    """Yields (row, path) of the images `{"bytes", "path"}` that have no bytes and do not lie in `roots`."""
    # Whether bytes are there is known without reading them.
    paths = pc.struct_field(images, "path")
    named = pc.and_(pc.is_null(pc.struct_field(images, "bytes")), pc.is_valid(paths))
    for row in np.flatnonzero(named.to_numpy(zero_copy_only=False)):
        path = paths[int(row)].as_py()
        if "://" in path:
            address = path.rpartition("::")[2]  # of the archive that a file is in
            is_own = any("://" in str(root) and address.startswith(str(root)) for root in roots)
        else:
            is_own = any("://" not in str(root) and is_inside(path, root) for root in roots)
        if not is_own:
            yield int(row), path
