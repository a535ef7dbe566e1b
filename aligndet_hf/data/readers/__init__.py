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

from . import coco, image_folder, saved

# In this order: the first that recognises a file or folder reads it. The last one takes any folder of images.
READERS: list[ModuleType] = [saved, coco, image_folder]


def find_reader(path: Path) -> ModuleType | None:
    """The reader of a file or folder; `None` if it is in no format that is known."""
    return next((reader for reader in READERS if reader.recognise(path)), None)
