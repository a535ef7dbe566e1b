"""Regions of objects: COCO's segmentations, kept as text, moved with their image, and drawn where they are needed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FIELD = "segmentation"
_FARTHEST = 1e5  # pixels: what is farther out is no coordinate


def _coco():
    from faster_coco_eval.core import mask  # here: it loads OpenCV, 20 MB, and most data sets have no masks

    return mask


def segmentation_text(segmentation) -> str | None:
    """
    What a data set keeps of a segmentation in COCO's form.

    Args:
        segmentation (`list`, `dict` or `str`): Polygons `[[x1, y1, x2, y2, ...], ...]` in pixels of the image, or run
            lengths, `{"size": [height, width], "counts": ...}`, compressed or not; or either as JSON.

    Returns:
        `str`: the JSON; `None` if it is neither, or has no point.
    """
    if isinstance(segmentation, str):
        try:
            segmentation = json.loads(segmentation)
        except (ValueError, RecursionError):
            return None
    if isinstance(segmentation, dict):
        segmentation = {name: segmentation.get(name) for name in ("size", "counts")}
        if isinstance(segmentation["counts"], bytes):
            segmentation["counts"] = segmentation["counts"].decode("ascii", "replace")
        sound = _run_lengths(segmentation) is not None
    else:
        sound = isinstance(segmentation, list) and bool(segmentation) and all(map(_is_polygon, segmentation))
    return json.dumps(segmentation, separators=(",", ":")) if sound else None


def _is_polygon(points) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return all(type(value) in (int, float) and abs(value) <= _FARTHEST for value in points)


def _run_lengths(segmentation: dict) -> np.ndarray | None:
    """The run lengths, which fill the image exactly; `None` if they do not."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        return None
    if not 1 <= min(size) <= max(size) <= _FARTHEST:
        return None
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        return None
    return np.array(counts, dtype=np.int64) if sum(counts) == size[0] * size[1] else None


def _decompressed(text: str) -> list[int] | None:
    """COCO's compressed counts: five bits a character, later ones as differences to the one before the last."""
    counts, value, shift = [], 0, 0
    for character in text.encode("ascii", "replace"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return None if shift else counts


# ---- one region ----


@dataclass(frozen=True)
class Region:
    """
    Where an object is, as it was stored, and what has become of its image since.

    Attributes:
        shape (`list[np.ndarray]` or `np.ndarray`): Polygons, float64 `[points, 2]` each, or a mask, uint8
            `[height, width]` of the stored image.
        matrix (`np.ndarray` of shape `[2, 3]`): From coordinates of the stored image to coordinates of the image
            now. Both are continuous: the first pixel reaches from 0 to 1.
        cuts (`tuple`): What has been cut: corners `[4, 2]` in the image now, and whether what is inside stays.
    """

    shape: list[np.ndarray] | np.ndarray
    matrix: np.ndarray = field(default_factory=lambda: np.eye(2, 3))
    cuts: tuple[tuple[np.ndarray, bool], ...] = ()

    @classmethod
    def of(cls, text: str | None, height: int, width: int) -> "Region | None":
        """The region of a text of [`segmentation_text`]; `None` without one, or if the image has another size."""
        text = segmentation_text(text)
        if text is None:
            return None
        segmentation = json.loads(text)
        if isinstance(segmentation, list):
            return cls([np.array(points, dtype=np.float64).reshape(-1, 2) for points in segmentation])
        if segmentation["size"] != [height, width]:
            return None
        counts = _run_lengths(segmentation)
        values = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
        return cls(values.reshape(width, height).T)  # column by column

    def moved(self, matrix: np.ndarray) -> "Region":
        """The region after its image was moved by a matrix `[2, 3]`."""
        together = matrix[:, :2] @ self.matrix
        together[:, 2] += matrix[:, 2]
        return replace(
            self, matrix=together, cuts=tuple((_placed(corners, matrix), keep) for corners, keep in self.cuts)
        )

    def cut(self, box: np.ndarray, inside: bool) -> "Region":
        """What of the region is inside a box (xywh), or outside."""
        x, y, w, h = (float(value) for value in box)
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        return replace(self, cuts=(*self.cuts, (corners, inside)))

    def draw(self, height: int, width: int) -> np.ndarray:
        """The mask in an image of this size: uint8 `[height, width]`, 1 on the object, as COCO draws polygons."""
        if isinstance(self.shape, list):
            mask = _filled([_placed(points, self.matrix) for points in self.shape], height, width)
        else:
            import cv2

            matrix = self.matrix.copy()
            matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5  # of the middles of pixels, as OpenCV has them
            mask = cv2.warpAffine(np.ascontiguousarray(self.shape), matrix, (width, height), flags=cv2.INTER_NEAREST)
        for corners, inside in self.cuts:
            mask = mask & (_filled([corners], height, width) ^ (not inside))
        return mask


def _placed(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def _filled(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    parts = _coco().frPyObjects([points.ravel().tolist() for points in polygons], height, width)
    return _coco().decode(_coco().merge(parts))


def run_lengths(mask: np.ndarray) -> dict:
    """A mask (bool or uint8 `[height, width]`) in COCO's compressed form: `size`, and `counts` as text."""
    found = _coco().encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = found["counts"]
    return {"size": list(mask.shape), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def place_run_lengths(mask: dict, left: int, top: int, height: int, width: int) -> dict:
    """A mask of a part of an image, as [`run_lengths`] has it, as a mask of the whole, where the part begins there."""
    part, whole = _coco().decode(mask), np.zeros((height, width), dtype=np.uint8)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return run_lengths(whole)


def outlines(mask: dict) -> list[list[float]]:
    """
    The outlines of a mask as [`run_lengths`] has it, as COCO's polygons, which labelling tools let people correct.

    One for each connected part; holes are filled. The outline runs a quarter of a pixel inside the outermost pixels.
    """
    import cv2

    doubled = np.kron(_coco().decode(mask), np.ones((2, 2), dtype=np.uint8))  # a pixel has an outline, too
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour.ravel() + 0.5) / 2).tolist() for contour in contours]


def mask_areas(masks: Sequence[dict]) -> list[float]:
    """The pixels of masks as [`run_lengths`] has them."""
    return [float(_coco().area(mask)) for mask in masks]


def coco_run_lengths(segmentation, height: int, width: int) -> dict | None:
    """A segmentation as [`segmentation_text`] takes it, in an image of this size, in COCO's compressed form."""
    region = Region.of(segmentation_text(segmentation), height, width)
    return None if region is None else run_lengths(region.draw(height, width))


# ---- the regions of the objects of an image ----


def read_regions(column: pa.Array | pa.ChunkedArray, height: int, width: int) -> list[Region | None]:
    """The regions of one row of a struct column of Arrow, in an image of this size."""
    if not has_regions(column.type):
        return []
    values = pc.struct_field(column, FIELD).to_pylist()[0] or []
    return [Region.of(text, height, width) for text in values]


def has_regions(objects: pa.DataType) -> bool:
    """Whether there is a text of a region with each object of a struct column of Arrow."""
    if FIELD not in getattr(objects, "names", ()):
        return False
    lists = objects.field(FIELD).type
    inner = getattr(lists, "value_type", lists)
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def move_regions(rows: np.ndarray, matrix) -> np.ndarray:
    """
    Moves the regions among what belongs to boxes.

    Args:
        rows (`np.ndarray` of shape `[n]`): A row for each box, perhaps with a field `region`.
        matrix (`list` or `np.ndarray` of shape `[2, 3]`): Where the image was moved to, in continuous coordinates.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    return _changed(rows, lambda region: region.moved(matrix))


def cut_regions(rows: np.ndarray, box: np.ndarray, inside: bool = True) -> np.ndarray:
    """Cuts the regions among what belongs to boxes: what is inside a box (xywh) stays, or what is outside."""
    return _changed(rows, lambda region: region.cut(box, inside))


def draw_regions(rows: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """The masks `[n, height, width]` (uint8) of what belongs to boxes; `None` if one has no region."""
    if not _have_field(rows) or any(region is None for region in rows["region"]):
        return None
    masks = np.zeros((len(rows), height, width), dtype=np.uint8)
    for mask, region in zip(masks, rows["region"], strict=True):
        mask[:] = region.draw(height, width)
    return masks


def with_regions(rows: np.ndarray, masks: np.ndarray | None) -> np.ndarray:
    """The rows with the regions of other masks `[n, height, width]`; without any if there are none."""
    if not _have_field(rows):
        return rows
    rows = rows.copy()
    for number in range(len(rows)):
        rows["region"][number] = None if masks is None else Region(masks[number])
    return rows


def _have_field(rows: np.ndarray) -> bool:
    return "region" in (rows.dtype.names or ())


def _changed(rows: np.ndarray, change: Callable[[Region], Region]) -> np.ndarray:
    if not _have_field(rows):
        return rows
    rows = rows.copy()
    for number, region in enumerate(rows["region"]):
        rows["region"][number] = None if region is None else change(region)
    return rows
