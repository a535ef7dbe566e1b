"""Where proposals come from: one function per source, all of the same form, and the table that names them."""

import hashlib
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils.hub import cached_file

from ..files import file_hash
from ..proposals.controls import random_boxes
from ..proposals.filters import select_indices
from ..proposals.opencv import import_opencv, opencv_selective_search
from ..proposals.selective_search import selective_search
from ..proposals.trained import load_box_finder
from .arrow_boxes import clean_boxes

Search = Callable[[list[np.ndarray], list[dict]], list[dict[str, np.ndarray]]]
"""
What a source is: a function from decoded images (uint8 `[H, W, 3]`, RGB) and their rows to the proposals of each, the
fields `bbox` (float32 `[N, 4]`, absolute `xywh`), `score` (float32 `[N]`, best first) and, optionally, `cluster`.
"""


class Source(NamedTuple):
    """
    One row of the table of sources.

    Attributes:
        open (`Callable`): From its settings and the `selection` (see [`select_indices`]) to a [`Search`].
        settings (`dict[str, Any]`): The fields of `ProposalsArguments` that it takes, and their defaults; `None` for
            one that must be given.
        versions (`Callable[[], dict[str, str]]`): The packages that decide what it finds.
    """

    open: Callable[..., Search]
    settings: dict[str, Any]
    versions: Callable[[], dict[str, str]]


def _of_images(find: Callable[[np.ndarray, dict], dict[str, np.ndarray]]) -> Search:
    """A search that asks a function of an image and its row for the proposals."""
    return lambda images, rows: [find(image, row) for image, row in zip(images, rows, strict=True)]


def _fields(found: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(("bbox", "score"), found, strict=True))


def _open_selective_search(preset: str, selection: dict) -> Search:
    return _of_images(lambda image, row: _fields(selective_search(image, preset, **selection)))


def _open_opencv(mode: str, short_side: int, selection: dict) -> Search:
    import_opencv().setNumThreads(1)  # the processes are the parallelism
    return _of_images(lambda image, row: _fields(opencv_selective_search(image, mode, short_side, **selection)))


def _open_detector(detector: str, score_threshold: float, per_device_eval_batch_size: int, selection: dict) -> Search:
    find = load_box_finder(detector, score_threshold)

    def search(images, rows):
        return [
            select_fields(_fields(found), image.shape[:2], selection)
            for image, found in zip(images, find(images), strict=True)
        ]

    return search


def _open_column(column: str, selection: dict) -> Search:
    def find(image, row):
        height, width = image.shape[:2]
        fields = row[column] or {"bbox": []}
        boxes, kept = clean_boxes(fields["bbox"], width, height)
        # Boxes without scores, labels for one, keep their order.
        proposals = {"bbox": boxes, "score": _in_order(boxes)}
        for name, dtype in {"score": np.float32, "cluster": np.int32}.items():
            if name in fields:
                proposals[name] = np.asarray(fields[name], dtype=dtype)[kept]
        return select_fields(proposals, (height, width), selection)

    return _of_images(find)


def _open_random(selection: dict) -> Search:
    def find(image, row):
        # Of an image the same boxes always, wherever it stands; as many as any other source may give.
        seed = zlib.crc32(np.ascontiguousarray(image))
        boxes = random_boxes(image.shape[:2], selection["max_boxes"], seed)
        return select_fields({"bbox": boxes, "score": _in_order(boxes)}, image.shape[:2], selection)

    return _of_images(find)


def _in_order(boxes: np.ndarray) -> np.ndarray:
    """Scores of boxes whose order is all that is known."""
    return np.linspace(1, 0, len(boxes), endpoint=False, dtype=np.float32)


def _open_json(proposals_file: str, selection: dict) -> Search:
    return _open_column("proposals", selection)  # which the file has been read into


SOURCES = {
    "selective_search": Source(_open_selective_search, {"preset": "default"}, lambda: {"numba": version("numba")}),
    "opencv": Source(
        _open_opencv, {"mode": "fast", "short_side": 200}, lambda: {"opencv": import_opencv().__version__}
    ),
    "detector": Source(
        _open_detector,
        {"detector": None, "score_threshold": 0.05, "per_device_eval_batch_size": 8},
        lambda: {name: version(name) for name in ("torch", "transformers")},
    ),
    "column": Source(_open_column, {"column": "proposals"}, dict),
    "json": Source(_open_json, {"proposals_file": None}, dict),
    "random": Source(_open_random, {}, dict),
}


def select_fields(proposals: dict[str, np.ndarray], image_size: tuple[int, int], selection: dict) -> dict:
    """The proposals of an image that [`select_indices`] keeps, with all their fields."""
    kept = select_indices(proposals["bbox"], proposals["score"], image_size, **selection)
    return {name: values[kept] for name, values in proposals.items()}


def model_hash(model: str) -> str:
    """
    What tells a model from what else its folder or Hub id may hold at another time: a hash of the files of a folder,
    the commit of a repository.
    """
    if Path(model).is_dir():
        files = [path for path in sorted(Path(model).iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
        return hashlib.blake2b("".join(map(file_hash, files)).encode(), digest_size=16).hexdigest()
    return Path(cached_file(model, "config.json")).parent.name
