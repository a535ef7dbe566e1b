"""Features of boxes in files, from where they are read as often as needed."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..files import is_sound, seal_file
from .box_features import BoxFeatures

BATCH = 16  # images between two files
_PATTERN = "features-*.npz"


def seen_boxes(features: BoxFeatures, items: Sequence[dict]) -> list[dict]:
    """
    The features of the boxes of some items of [`~aligndet_hf.evaluation.box_features.BoxImages`].

    Args:
        features ([`BoxFeatures`]): The backbone.
        items (`Sequence[dict]`): The items.

    Returns:
        `list[dict]`: `{"kept", "features"}` of each: int64 [n] as in the item, and float16 [n, D]. An item of an image
        that cannot be read stays as it is.
    """
    readable = [item for item in items if "reason" not in item and len(item["kept"])]
    found = iter(features.of_images([item["image"] for item in readable], [item["boxes"] for item in readable]))
    empty = np.zeros((0, features.size), np.float16)
    return [
        item
        if "reason" in item
        else {"kept": item["kept"].numpy(), "features": next(found).astype(np.float16) if len(item["kept"]) else empty}
        for item in items
    ]


class FeatureFiles:
    """
    Features of the boxes of some images, a file for every `BATCH` of them. Each file is complete or not there.

    Args:
        folder (`Path`): Where the files are.
        key (`str`): What tells these features from others; it is in the names of the files.
        rows (`list[tuple[str, int]]`): Split and row of each image.
    """

    def __init__(self, folder: Path, key: str, rows: list[tuple[str, int]]):
        self.batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        self._paths = [folder / _PATTERN.replace("*", f"{key}-{n:06d}") for n in range(len(self.batches))]
        self._places = {row: divmod(n, BATCH) for n, row in enumerate(rows)}
        self._opened: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def missing(self) -> list[int]:
        """The numbers of the batches that have no file yet."""
        return [number for number, path in enumerate(self._paths) if not is_sound(path)]

    def write(self, number: int, found: list[dict]) -> None:
        """Writes the file of a batch: what [`seen_boxes`] gave for its rows."""
        read = [entry for entry in found if "reason" not in entry]
        counts = [-1 if "reason" in entry else len(entry["kept"]) for entry in found]
        tensors = {"counts": np.array(counts, np.int64)}
        for name in ("kept", "features"):
            tensors[name] = np.concatenate([entry[name] for entry in read]) if read else np.zeros(0, np.int64)
        part = self._paths[number].with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.savez(file, **tensors)
        seal_file(part, self._paths[number])

    def __contains__(self, row: tuple[str, int]) -> bool:
        """Whether the features of an image are there; they are not if it cannot be read."""
        return row in self._places and self._batch(row)["counts"][self._places[row][1]] >= 0

    def __getitem__(self, row: tuple[str, int]) -> dict:
        """What [`seen_boxes`] gave for an image."""
        batch, index = self._batch(row), self._places[row][1]
        counts = batch["counts"].clip(0)
        start = int(counts[:index].sum())
        boxes = slice(start, start + int(counts[index]))
        return {name: batch[name][boxes] for name in ("kept", "features")}

    def _batch(self, row: tuple[str, int]) -> dict[str, np.ndarray]:
        """What the file of a row's batch holds: the numbers of boxes of its images, and of all boxes the rest."""
        number = self._places[row][0]
        if self._opened[0] != number:
            with np.load(self._paths[number]) as stored:
                self._opened = number, {name: stored[name] for name in stored.files}
        return self._opened[1]

    def best(self, per_image: int, total: int) -> Iterator[np.ndarray]:
        """The features of the first `per_image` boxes of each image, float16 [n, D], until there are `total`."""
        for row in self._places:
            if total > 0 and row in self:
                found = self[row]["features"][: min(per_image, total)]
                total -= len(found)
                yield found
