"""
Readers of label formats, one module each, found by looking at the files.

Every reader has the same three names:

- `NAME` (`str`): what to call the format.
- `find(path)` -> `dict`: the splits of a file or folder in the format, as `train`, `validation`, `test` where their
  names say so, and what each is read from; empty for other files and folders. It reads as little of them as it can.
- `read(path, found, splits, image_dir)` -> [`~aligndet_hf.data.readers.rows.Labels`]: of what `find` has found, the
  images of these splits with their objects, and the categories of the whole data set. `saved` has no need of it.

A new format is one file here and its name in `READERS`.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from . import box_table, coco, cvat, image_folder, json_images, kitti, saved, voc, yolo
from .files import unwrapped

# In this order: the first that finds splits in a file or folder reads it. The last one takes any folder of images.
READERS: list[ModuleType] = [saved, json_images, coco, cvat, yolo, voc, kitti, box_table, image_folder]


def find_reader(source: str | Path) -> tuple[ModuleType | None, dict[str, Any]]:
    """The reader of a file or folder, and the splits that it finds; `None` if there is none, or in no known format."""
    path, readers = unwrapped(source), READERS
    if not path.exists():
        return None, {}
    if path.is_dir() and image_folder.has_metadata(path):
        is_table = any(file.stem == "metadata" for file in box_table.find_files(path))
        readers = [saved, box_table if is_table else image_folder]
    found = ((reader, reader.find(path)) for reader in readers)
    return next(((reader, splits) for reader, splits in found if splits), (None, {}))
