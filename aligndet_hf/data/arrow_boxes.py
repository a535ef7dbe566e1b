"""Boxes in columns of Arrow: reading them without a Python object for each, and dropping those that cannot be used."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError

# Why a box cannot be used; index 0 is a sound box.
FAULTS = ("", "not finite", "no area", "outside the image")
OUTSIDE = 3


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def is_number(type_: pa.DataType) -> bool:
    """Whether values of this type are numbers, or all missing."""
    return pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_null(type_)


def _field(column: pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    field_array = pc.struct_field(column, name)
    return field_array.combine_chunks() if isinstance(field_array, pa.ChunkedArray) else field_array


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def read_values(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Reads a list field of a struct column of Arrow: all values in one array, and the number of values per row.

    Raises:
        [`DataError`]: if the field is not a list of numbers. It does not know its source: the caller adds it.
    """
    lists = _field(column, name)
    if pa.types.is_null(lists.type):
        return np.zeros(0), np.zeros(len(lists), dtype=np.int64)
    if not _is_list(lists.type):
        raise DataError(f"'{name}' must be a list per row, it is {lists.type}.")
    values = lists.flatten()
    if not is_number(values.type):
        raise DataError(f"'{name}' must hold numbers, it is {lists.type}.")
    return values.to_numpy(zero_copy_only=False), _lengths(lists)


def read_boxes(column: pa.Array | pa.ChunkedArray, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """
    Reads the field `bbox` of a struct column of Arrow, without a Python object per box.

    Returns:
        `tuple`: all boxes (`dtype` [N, 4], as stored) and the number of boxes per row (int64 [rows]).

    Raises:
        [`DataError`]: if a box does not have four numbers. It does not know its source: the caller adds it.
    """
    boxes = _field(column, "bbox")
    if pa.types.is_null(boxes.type):
        return np.zeros((0, 4), dtype=dtype), np.zeros(len(boxes), dtype=np.int64)
    counts = _lengths(boxes) if _is_list(boxes.type) else None
    if counts is not None and not counts.any():  # all rows empty: the inner type may be unknown
        return np.zeros((0, 4), dtype=dtype), counts
    if counts is None or not _is_list(boxes.type.value_type):
        raise DataError(f"'bbox' must be a list of boxes [x, y, width, height] per row, it is {boxes.type}.")
    rows = boxes.flatten()
    wrong = np.flatnonzero(_lengths(rows) != 4)
    if len(wrong):
        row = int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))
        raise DataError(f"row {row}: a box must be four numbers [x, y, width, height], got {rows[int(wrong[0])]}.")
    values = rows.flatten()
    if not is_number(values.type):
        raise DataError(f"'bbox' must hold numbers, it is {boxes.type}.")
    # A null becomes NaN, which is counted as not finite.
    return values.to_numpy(zero_copy_only=False).astype(dtype).reshape(-1, 4), counts


def read_crowds(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Which boxes of a struct column of Arrow are crowds (bool [N]): regions of many objects, marked by `iscrowd`."""
    if "iscrowd" in column.type.names:
        return read_values(column, "iscrowd")[0] == 1
    return np.zeros(len(read_boxes(column)[0]), dtype=bool)


def find_faults(boxes: np.ndarray, width=np.inf, height=np.inf) -> np.ndarray:
    """
    Finds the boxes that cannot be used.

    Args:
        boxes (`np.ndarray` [N, 4]): xywh in pixels.
        width, height (`float` or `np.ndarray` [N], *optional*): Size of the image of each box.

    Returns:
        `np.ndarray` [N]: 0 for a sound box, else the index of the reason in `FAULTS`: a coordinate is NaN or infinite,
        a side is zero or negative, no part lies in the image.
    """
    x, y, w, h = boxes.T.astype(np.float64)
    faults = np.zeros(len(boxes), dtype=np.int64)
    with np.errstate(invalid="ignore"):  # inf - inf
        faults[(x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)] = OUTSIDE
    faults[(w <= 0) | (h <= 0)] = 2
    faults[~np.isfinite(boxes).all(axis=1)] = 1
    return faults


def clean_boxes(boxes: np.ndarray, width: float, height: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Drops the boxes that cannot be used (see [`find_faults`]) and clips the others to the image.

    Args:
        boxes (`np.ndarray` [N, 4]): xywh in pixels.
        width, height (`float`): Size of the image in pixels.

    Returns:
        `tuple`: the boxes that are left (float32 [n, 4], xywh) and their indices in `boxes` (int64 [n]).
    """
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    kept = np.flatnonzero(find_faults(boxes, width, height) == 0)
    boxes = boxes[kept]
    low = np.clip(boxes[:, :2], 0, (width, height))
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, (width, height))
    return np.concatenate([low, high - low], axis=1).astype(np.float32), kept


def usable_boxes(column: pa.Array | pa.ChunkedArray, width: float, height: float) -> tuple[np.ndarray, np.ndarray]:
    """
    The boxes of one row that can be used: [`clean_boxes`] of those that are no crowds.

    Args:
        column (`pa.Array`): The struct of lists of one row, `objects` or `proposals`.
        width, height (`float`): Size of the image in pixels.

    Returns:
        `tuple`: the boxes (float32 [n, 4], xywh) and their indices among the boxes of the row (int64 [n]).
    """
    objects = np.flatnonzero(~read_crowds(column))
    boxes, kept = clean_boxes(read_boxes(column)[0][objects], width, height)
    return boxes, objects[kept]
