"""
Readers of label formats, one module each, found by looking at the files.

Every reader has the same four names:

- `NAME` (`str`): what to call the format.
- `recognise(path)` -> `bool`: whether a file or folder looks like the format; it reads as little as it can.
- `split_names(path)` -> `list[str]`: the splits, as `train`, `validation`, `test` where their names say so.
- `read(path, splits, image_dir)` -> [`~aligndet_hf.data.readers.rows.Labels`]: the images of these splits with their
  objects, and the categories of the whole data set.

A new format is one file here and its name in `READERS`.
"""

from pathlib import Path
from types import ModuleType

from . import box_table, coco, cvat, image_folder, json_images, kitti, saved, voc, yolo

# In this order: the first that recognises a file or folder reads it. The last one takes any folder of images.
READERS: list[ModuleType] = [saved, json_images, coco, cvat, yolo, voc, kitti, box_table, image_folder]


def find_reader(source: str | Path) -> ModuleType | None:
    """The reader of a file or folder; `None` if it is in no format that is known, or not there."""
    path = Path(source).expanduser()
    if not path.exists():
        return None
    if path.is_dir() and not saved.recognise(path) and image_folder.has_metadata(path):
        return box_table if any(file.stem == "metadata" for file in box_table.find_files(path)) else image_folder
    return next((reader for reader in READERS if reader.recognise(path)), None)
