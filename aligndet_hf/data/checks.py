"""What one should know of labelled images before a training: how many objects they have, and which are there twice."""

import os

import datasets
import numpy as np
import pyarrow.compute as pc

from .arrow_boxes import read_boxes, read_crowds, read_values
from .columns import arrow_batches, image_ids
from .door import image_digest, listed
from .masks import FIELD

COCO_DETECTIONS = 100  # of one category in one image that COCO's metrics count, the best first


def objects_per_image(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """
    How many objects each image has, without crowds: all of them, and the objects of its commonest category.

    Returns:
        `tuple`: two arrays, int64 `[rows]`.
    """
    counts, commonest = np.zeros((2, len(dataset)), dtype=np.int64)
    for start, table in arrow_batches(dataset, ["objects"]):
        lengths = read_boxes(table["objects"])[1]
        kept = ~read_crowds(table["objects"])
        rows = np.repeat(np.arange(start, start + len(lengths)), lengths)[kept]
        categories = read_values(table["objects"], "category")[0].astype(np.int64)[kept]
        np.add.at(counts, rows, 1)
        pairs, of_pair = np.unique(np.stack([rows, categories]), axis=1, return_counts=True)
        np.maximum.at(commonest, pairs[0], of_pair)
    return counts, commonest


def query_note(counts: np.ndarray, num_queries: int) -> str | None:
    """
    A line on images with more objects than a detector can find; `None` if there are none.

    Args:
        counts (`np.ndarray`): Objects of each image.
        num_queries (`int`): Object queries of the detector: it finds no more objects in an image.
    """
    if (most := int(counts.max(initial=0))) <= num_queries:
        return None
    return (
        f"{(counts > num_queries).sum()} of {len(counts)} images have more objects, up to {most}, than the detector "
        f"can find ({num_queries}). Build it with more (num_queries in --detector_config, detections_per_image of a "
        "convnet; in pre-training, if there was one), or cut the images into tiles."
    )


def metric_note(counts: np.ndarray) -> str | None:
    """
    A line on images with more objects than COCO's metrics look at; `None` if there are none.

    Args:
        counts (`np.ndarray`): Objects of the commonest category of each image.
    """
    if (most := int(counts.max(initial=0))) <= COCO_DETECTIONS:
        return None
    return (
        f"{(counts > COCO_DETECTIONS).sum()} of {len(counts)} images have more than {COCO_DETECTIONS} objects of one "
        f"category, up to {most}: COCO's metrics count the best {COCO_DETECTIONS} detections of each category in an "
        "image, so that a perfect detector gets less than 1. Compare such numbers only with one another, or measure "
        "on tiles."
    )


def mask_note(dataset: datasets.Dataset) -> str:
    """A line on how many images can train masks: all of their objects have one."""
    have, objects = 0, dataset.features["objects"]
    if FIELD in objects:
        for _, table in arrow_batches(dataset, ["objects"]):
            lengths, crowds = read_boxes(table["objects"])[1], read_crowds(table["objects"])
            texts = pc.struct_field(table["objects"], FIELD).combine_chunks().flatten()
            lacks = ~crowds & texts.is_null().to_numpy(zero_copy_only=False)
            rows = np.repeat(np.arange(len(lengths)), lengths)
            have += int((lengths > 0).sum()) - len(np.unique(rows[lacks]))
    if not have:
        return "Masks: the labels have none, boxes are trained alone."
    return f"Masks: {have} of {len(dataset)} images have one with every object, and train masks beside boxes."


def same_images(dataset: datasets.Dataset, other: datasets.Dataset) -> list[tuple[int, int]]:
    """
    The images of one data set that another one has as well, byte for byte.

    Files are read only if one of the other data set has the same length.

    Returns:
        `list[tuple[int, int]]`: pairs of rows.
    """
    lengths, of_other = _lengths(dataset), _lengths(other)
    shared = set(lengths) & set(of_other)
    contents = {}
    for length in shared:
        for row in of_other[length]:
            contents.setdefault(image_digest(other[row]["image"]), row)
    hashed = ((row, image_digest(dataset[row]["image"])) for length in shared for row in lengths[length])
    return sorted((row, contents[content]) for row, content in hashed if content in contents)


def _lengths(dataset: datasets.Dataset) -> dict[int, list[int]]:
    """Rows by the length of their files."""
    rows = {}
    for start, table in arrow_batches(dataset, ["image"], batch_size=100):
        for row, value in enumerate(table["image"], start):
            content, path = value["bytes"], value["path"].as_py()
            length = content.as_buffer().size if content.is_valid else os.path.getsize(path)
            rows.setdefault(length, []).append(row)
    return rows


def leak_note(dataset: datasets.Dataset, held_out: datasets.Dataset, source: str) -> str | None:
    """A line on the images that are in the training and in the evaluation data; `None` if there are none."""
    pairs = same_images(dataset, held_out)
    if not pairs:
        return None
    ids, rows = image_ids(held_out), sorted({row for _, row in pairs})
    return (
        f"{len(rows)} of the {len(held_out)} images to measure on ({source}; ids "
        f"{listed((ids[row] for row in rows), 10)}) are also in the training data, so that the numbers say too much: "
        "remove them from one of the two."
    )
