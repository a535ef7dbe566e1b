"""Images from wherever a person has them, as one list: files, folders, globs, videos, data sets, arrays in memory."""

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.compute as pc

from ..files import file_hash
from .bit_depth import pixel_window
from .columns import arrow_batches, category_ids, image_ids, require_columns
from .door import OUTPUT, image_value, is_image_name, plain_parts, printable, visit
from .errors import DataError, ImageError
from .formats import category_names, load_dataset_source, split_names
from .images import Window, decode_image
from .shards import content_hash

_DATASETS = (datasets.Dataset, datasets.DatasetDict, datasets.IterableDataset, datasets.IterableDatasetDict)
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
_MAGIC = "*?["  # what makes a path a pattern


class Images:
    """Some images of a list, of one kind: with `names`, `read` and `files` or `identity`; what they need not have."""

    ids, categories = None, {}

    def value(self, index: int) -> dict | None:
        """The undecoded image as a data set stores it; `None` for one that is in no file of its own."""
        return None

    def identity(self) -> str:
        """Names and hashes of the content of `files`: others may have the same sizes and times."""
        return repr([(name, _hash(path)) for name, path in self.files])


class ImageFiles(Images):
    """Image files: their paths, and what to call them in the output."""

    def __init__(self, paths: list[str], names: list[str]):
        self.paths, self.names = paths, names
        self.files = list(zip(names, paths, strict=True))

    def value(self, index: int) -> dict:
        return image_value(self.paths[index])

    def read(self, index: int, window: Window | None = None) -> np.ndarray:
        return decode_image(self.paths[index], window)


def _hash(path: str) -> str | None:
    """The hash of a file; of one that cannot be read, which is told when it is looked at, `None`."""
    try:
        return file_hash(path)
    except OSError:
        return None


class MemoryImage(Images):
    """An image in memory: an RGB array uint8 `[H, W, 3]` (or greyscale `[H, W]`) or a PIL image."""

    names = ["image.png"]

    def __init__(self, image):
        self.image = image

    def read(self, index: int, window: Window | None = None) -> np.ndarray:
        return decode_image(self.image, window)

    def identity(self) -> str:
        return hashlib.blake2b(self.read(0).tobytes()).hexdigest()


class DatasetImages(Images):
    """The column `image` of a data set, and the ids of its images and categories if it has some."""

    def __init__(self, dataset: datasets.Dataset, source: str = "the data set"):
        require_columns(dataset, ["image"], source)
        self.ids = image_ids(dataset, source) if "image_id" in dataset.column_names else None
        self.categories = {}
        if "objects" in dataset.column_names:
            names = category_names(dataset, source)
            self.categories = dict(zip(names, category_ids(dataset, names), strict=True))
        self.dataset = (
            dataset.with_format(None).select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        )
        given = dataset["file_name"] if "file_name" in dataset.column_names else [None] * len(dataset)
        paths = []
        for _, table in arrow_batches(self.dataset, ["image"]):
            paths += pc.struct_field(table["image"], "path").to_pylist()
        self.names = [
            "/".join(plain_parts(name or os.path.basename(path or ""))) or f"{row:06d}.jpg"
            for row, (name, path) in enumerate(zip(given, paths, strict=True))
        ]

    def value(self, index: int) -> dict:
        return self.dataset[index]["image"]

    def read(self, index: int, window: Window | None = None) -> np.ndarray:
        return decode_image(self.dataset[index]["image"], window or pixel_window(self.dataset))

    def identity(self) -> str:
        return content_hash(self.dataset)


class ImageList:
    """
    Images of several kinds in one order. It can be sent to other processes.

    Attributes:
        names (`list[str]`): What each image is called in the output: a relative path with slashes, no two the same.
        ids (`list[int]`): The `image_id` of each: as in the data sets or, where they give none or one twice, the
            number of the image, from 1 on.
        faults (`list[dict]`):
            What is no image of the list and might have been, such as a video that cannot be read, or not to its end:
            `file` and `reason`.
        window (`tuple[float, float]`, *optional*): How to decode images with more than 8 bits: see
            [`~aligndet_hf.data.images.decode_image`].
    """

    window: Window | None = None

    def __init__(self, parts: list, faults: list[dict]):
        self.parts, self.faults = parts, faults
        self.starts = np.cumsum([0] + [len(part.names) for part in parts])
        self.names = [name for part in parts for name in part.names]
        if len(set(self.names)) < len(self.names):
            self.names = [f"{index:06d}-{os.path.basename(name)}" for index, name in enumerate(self.names)]
        self.ids = [image_id for part in parts for image_id in part.ids or ()]
        if len(set(self.ids)) < len(self.names) or not all(isinstance(image_id, int) for image_id in self.ids):
            self.ids = list(range(1, len(self.names) + 1))

    def __len__(self) -> int:
        return len(self.names)

    def _place(self, index: int) -> tuple:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[number], int(index - self.starts[number])

    def category_ids(self, classes: list[str]) -> list[int | str]:
        """The ids that the data sets have for some classes; 0..C-1 unless they know one of them."""
        known = {name: id_ for part in self.parts for name, id_ in part.categories.items()}
        free = itertools.count(max((id_ for id_ in known.values() if isinstance(id_, int)), default=0) + 1)
        if not known.keys() & set(classes):
            return list(range(len(classes)))
        return [known[name] if name in known else next(free) for name in classes]

    def value(self, index: int) -> dict | None:
        """The undecoded image as a data set stores it; `None` for one that is in no file of its own."""
        part, place = self._place(index)
        return part.value(place)

    def read(self, index: int) -> np.ndarray:
        """
        The pixels, RGB uint8 [H, W, 3].

        Raises:
            [`ImageError`]: if the image cannot be decoded. It names the file.
        """
        part, place = self._place(index)
        return part.read(place, self.window)

    def identity(self) -> str:
        """A hash that tells whether another list has the same images."""
        text = "\n".join(part.identity() for part in self.parts)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def list_images(sources, split: str | None = None) -> ImageList:
    """
    Makes one list of images.

    Args:
        sources:
            One of the following or a list of them: the path of an image or a video; a folder of images and videos, or
            of a data set (`save_to_disk`, parquet files); a pattern such as `photos/*.jpg`; a COCO-JSON file; the Hub
            id of a data set; a `datasets.Dataset`; a PIL image; an array, RGB uint8 `[H, W, 3]`.
        split (`str`, *optional*): Split of the data sets and folders; all of them if not given.

    Returns:
        [`ImageList`]: in the order of the sources, and of the file names within a folder.

    Raises:
        [`DataError`]: a source does not exist or holds no image.
    """
    is_one = isinstance(sources, (str, bytes, Path, Mapping, np.ndarray, PIL.Image.Image, *_DATASETS))
    parts, faults = [], []
    for source in [sources] if is_one else sources:
        parts += _parts_of(source, split, faults)
    if split is not None and not any(isinstance(part, DatasetImages) for part in parts):
        raise DataError(f"split {split!r}: what is given has no splits. Leave it out.")
    images = ImageList(parts, faults)
    if len(images) == 0:
        raise DataError(f"there is no image to look at. {faults[0]['reason'] if faults else ''}".strip())
    return images


def _parts_of(source, split: str | None, faults: list[dict]) -> list:
    if isinstance(source, datasets.Dataset):
        return [DatasetImages(source)]
    if isinstance(source, datasets.DatasetDict):
        return [DatasetImages(load_dataset_source(source, name)) for name in ([split] if split else source)]
    if isinstance(source, (np.ndarray, PIL.Image.Image)):
        return [MemoryImage(source)]
    if str(source).startswith(("http://", "https://")):
        raise DataError(f"{source}: images are not downloaded. Save it to a file first.")
    if not isinstance(source, (str, Path)):
        raise DataError(f"expected images as paths, arrays, PIL images or a datasets.Dataset, got {type(source)}.")
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        if split is not None:
            return _dataset_parts(path, split)
        found = [(name, reason) for name, reason in visit(path, _is_wanted) if reason != OUTPUT]
        files = [name for name, reason in found if reason is None]
        faults += [
            {"file": printable(os.path.relpath(name, path)), "reason": f"{printable(name)}: {reason}."}
            for name, reason in found
            if reason is not None
        ]
        return list(_file_parts(files, path, faults)) if found else _dataset_parts(path, split)
    if os.path.isfile(path):
        if path.lower().endswith(".json"):
            return _dataset_parts(path, split)
        return list(_file_parts([path], os.path.dirname(path), faults))
    if any(character in path for character in _MAGIC):
        files = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name) and _is_wanted(name))
        if not files:
            raise DataError(f"{source}: no image and no video has a name like this.")
        return list(_file_parts(files, _fixed_part(path), faults))
    if _is_wanted(path) or os.path.isabs(path) or path.startswith("."):
        raise DataError(f"{source}: there is no such file or folder.")
    return _dataset_parts(str(source), split)


def _is_wanted(name: str) -> bool:
    return is_image_name(name) or _is_video(name)


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _fixed_part(pattern: str) -> str:
    """The folder that all files of a pattern are in."""
    fixed = pattern[: min(pattern.index(character) for character in _MAGIC if character in pattern)]
    return os.path.dirname(fixed)


def _file_parts(files: Iterable[str], root: str, faults: list[dict]) -> Iterator:
    """Images between two videos are one part, a video is one of its own."""
    for are_videos, group in itertools.groupby(files, _is_video):
        paths = list(map(os.path.abspath, group))
        names = [printable(Path(os.path.relpath(path, root or ".")).as_posix()) for path in paths]
        if not are_videos:
            yield ImageFiles(paths, names)
            continue
        from .video import VideoFrames  # which loads OpenCV

        for path, name in zip(paths, names, strict=True):
            try:
                video = VideoFrames(path, name)
            except ImageError as error:
                faults.append({"file": name, "reason": str(error)})
                continue
            if video.lacking:
                reason = f"The video {path} ends {video.lacking} frames before the number that its header tells."
                faults.append({"file": name, "reason": reason})
            yield video


def _dataset_parts(source: str, split: str | None) -> list[DatasetImages]:
    splits = [split] if split is not None else split_names(source)
    return [DatasetImages(load_dataset_source(source, name), source) for name in splits]
