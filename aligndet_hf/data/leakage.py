"""Images of an evaluation split that training has seen as well: the same files, and copies that look the same."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import datasets
import numpy as np
from tqdm.auto import tqdm

from ..files import read_json, write_json
from .bit_depth import pixel_window
from .door import image_digest
from .errors import ImageError
from .formats import load_dataset_source
from .images import decode_image, image_name

_SIDE = 16  # of the grid of a difference hash: 256 bits
# Between different photographs 74 bits and more differ, between different pictures of blood cells 82; from smaller
# copies with stronger compression up to 28.
_MAX_DISTANCE = 32


@dataclass(frozen=True)
class Fingerprints:
    """
    What images are recognised by.

    Attributes:
        names (`list[str]`): What to call each.
        contents (`list[str]`): A hash of the bytes of each file.
        looks (`np.ndarray`): uint8 `[N, 32]`, the bits of [`difference_hash`].
        num_unreadable (`int`): Images left out because they cannot be decoded.
    """

    names: list[str]
    contents: list[str]
    looks: np.ndarray
    num_unreadable: int


def difference_hash(image: np.ndarray) -> np.ndarray:
    """
    A hash of what an image looks like: whether brightness rises from each cell of a grid to its right neighbour.

    Scaling, compression and brightness hardly change it; a crop or a flip does.

    Args:
        image (`np.ndarray`): uint8 `[H, W, 3]`, RGB.

    Returns:
        `np.ndarray`: uint8 `[32]`, 256 bits. Count the differing ones to compare two.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    cells = cv2.resize(grey, (_SIDE + 1, _SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
    return np.packbits(cells[:, 1:] > cells[:, :-1])


def fingerprints(dataset: datasets.Dataset, disable_tqdm: bool = False) -> Fingerprints:
    """The fingerprints of all images of a dataset (column `image`, not decoded)."""
    names, contents, looks, num_unreadable = [], [], [], 0
    window = pixel_window(dataset)
    for row in tqdm(dataset.select_columns(["image"]), desc="fingerprints", disable=disable_tqdm):
        value = row["image"]
        try:
            look = difference_hash(decode_image(value, window))
        except ImageError:
            num_unreadable += 1
            continue
        names.append(image_name(value))
        contents.append(image_digest(value))
        looks.append(look)
    return Fingerprints(names, contents, np.array(looks, dtype=np.uint8).reshape(-1, _SIDE**2 // 8), num_unreadable)


def find_leaks(seen: Fingerprints, held_out: Fingerprints, max_distance: int = _MAX_DISTANCE) -> list[dict]:
    """
    Finds images of an evaluation split among those that training has seen.

    Args:
        seen (`Fingerprints`): Of the training images.
        held_out (`Fingerprints`): Of the evaluation images.
        max_distance (`int`, *optional*, defaults to 32): This many of the 256 bits of a [`difference_hash`] may differ
            for two images to count as copies.

    Returns:
        `list[dict]`: per evaluation image that was found the closest training image: `image`, `seen`, `same_file`
        (byte for byte), and `distance` in bits.
    """
    by_content = {content: number for number, content in enumerate(seen.contents)}
    leaks = []
    for name, content, look in zip(held_out.names, held_out.contents, held_out.looks, strict=True):
        if content in by_content:
            leaks.append({"image": name, "seen": seen.names[by_content[content]], "same_file": True, "distance": 0})
        elif len(seen.looks):
            distances = np.unpackbits(seen.looks ^ look, axis=1).sum(axis=1)
            closest = int(distances.argmin())
            if distances[closest] <= max_distance:
                found = {"same_file": False, "distance": int(distances[closest])}
                leaks.append({"image": name, "seen": seen.names[closest]} | found)
    return leaks


def look_for_leaks(held_out: tuple, seen: list[tuple], content: list[str], path: Path) -> dict:
    """
    The evaluation images that are among the training images; not looked for again where the sources are the same.

    Args:
        held_out (`tuple`): Data set, split and image folder (each of the last two may be empty) of the evaluation.
        seen (`list[tuple]`): The same of all training images.
        content (`list[str]`): Hashes of their files, where they are on this machine: others are looked at anew.
        path (`Path`): The JSON file for what is found, and to read it from.

    Returns:
        `dict`: `sources`; numbers of `images` and `training_images`, and `unreadable` ones; `leaks`, see
        [`find_leaks`].
    """
    sources = {"evaluation": list(held_out), "training": [list(source) for source in seen], "content": content}
    if (known := read_json(path)) and known["sources"] == sources:
        return known

    def of(dataset: str, split: str | None, image_dir: str | None) -> Fingerprints:
        return fingerprints(load_dataset_source(dataset, split or None, image_dir=image_dir or None))

    measured, trained = of(*held_out), [of(*source) for source in seen]
    together = Fingerprints(
        [name for prints in trained for name in prints.names],
        [content for prints in trained for content in prints.contents],
        np.concatenate([prints.looks for prints in trained]),
        sum(prints.num_unreadable for prints in trained),
    )
    found = {
        "sources": sources,
        "images": len(measured.names) + measured.num_unreadable,
        "training_images": [len(prints.names) for prints in trained],
        "unreadable": measured.num_unreadable + together.num_unreadable,
        "leaks": find_leaks(together, measured),
    }
    write_json(path, found)
    return found
