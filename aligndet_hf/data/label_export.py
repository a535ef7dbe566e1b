"""Writing labelled images for other tools: COCO, YOLO and Pascal VOC, in layouts that `readers` read as they are."""

import json
import logging
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import numpy as np
import PIL.Image
import yaml

from ..files import UNFINISHED, sync_folder
from . import door
from .arrow_boxes import clean_boxes, read_boxes, read_crowds, read_values
from .columns import category_ids, image_ids
from .errors import DataError
from .images import image_size
from .masks import FIELD, has_regions
from .splits import Splits

logger = logging.getLogger(__name__)

_NO_XML = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what XML may not hold, or has readers change
_FOLDERS = {"validation": "val"}  # splits whose folders are called otherwise


class _Row(NamedTuple):
    """One image as it is written: `name` is a path in the folder of its split, `objects` has NumPy arrays."""

    name: PurePosixPath
    content: bytes
    image_id: int | str
    height: int
    width: int
    objects: dict[str, np.ndarray]


def export_labels(splits: Splits, categories: list[str], output_dir: str | Path, layout: str) -> list[str]:
    """
    Writes labelled images, and their files as they are, in a layout that other tools read.

    Args:
        splits (`dict[str, datasets.Dataset]`):
            By name, with the columns `image` (not decoded), `objects` and, optionally, `image_id` and `file_name`.
        categories (`list[str]`):
            Names of the categories 0..C-1.
        output_dir (`str` or `Path`):
            A folder that is new or empty. It is there when it is complete.
        layout (`str`):
            `"coco"`: `annotations/instances_<split>.json` and `images/<split>`, with all ids, areas, crowds and masks
            as they came in. `"yolo"`: `data.yaml`, `images/<split>` and `labels/<split>`. `"voc"`: `Annotations`,
            `JPEGImages` and `ImageSets/Main`; corners are coordinates, as all tools but the challenge's own have them.
            The split `validation` is called `val`.

    Returns:
        `list[str]`: what was left out, a line each: boxes that a format has no room for.

    Raises:
        [`DataError`]: for another layout, a folder that is not empty, or an image that cannot be read.
    """
    if layout not in LAYOUTS:
        raise DataError(f"Unknown layout {layout!r} of labels: expected one of {', '.join(LAYOUTS)}.")
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: expected a new or empty folder to write labels to.")
    unfinished = folder.with_name(UNFINISHED + folder.name)  # part of a data set must not pass for all of it
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    named = {_FOLDERS.get(name, name): split for name, split in splits.items()}
    left_out = LAYOUTS[layout](named, categories, unfinished)
    sync_folder(unfinished)
    if folder.exists():
        folder.rmdir()  # Windows replaces no folder, not even an empty one
    os.replace(unfinished, folder)
    return left_out


# ---- what all layouts have in common ----


def _rows(dataset: datasets.Dataset, flat: bool = False, taken: set[str] | None = None) -> Iterator[_Row]:
    """The rows; `flat` names have no folders. No two names differ in nothing but their suffix or case."""
    taken = set() if taken is None else taken
    has_names = "file_name" in dataset.column_names
    columns = ["image", "objects"] + ["file_name"] * has_names
    rows = dataset.select_columns(columns).with_format("arrow")
    for index, image_id in enumerate(image_ids(dataset)):
        row = rows[index]
        value = row["image"][0].as_py()
        content = door.image_bytes(value)
        given = row["file_name"][0].as_py() if has_names else None
        given = given or (Path(value["path"]).name if value.get("path") else f"{image_id}")
        height, width = image_size(value)
        objects = {"bbox": read_boxes(row["objects"], np.float64)[0], "iscrowd": read_crowds(row["objects"])}
        objects["category"] = read_values(row["objects"], "category")[0].astype(int)
        if has_regions(row["objects"].type):
            objects[FIELD] = np.array(row["objects"][0].as_py()[FIELD] or [], dtype=object)
        if "area" in row["objects"].type.names:
            objects["area"] = read_values(row["objects"], "area")[0].astype(float)
        name = _unique(_file_name(given, content, flat), taken)
        yield _Row(name, content, image_id, height, width, objects)


def _file_name(given: str, content: bytes, flat: bool) -> PurePosixPath:
    """A name inside the folder of a split: as given, without what leads out of it."""
    name = PurePosixPath(("_" if flat else "/").join(door.plain_parts(given)) or "image")
    if not door.is_image_name(name.name):
        image_format = PIL.Image.open(BytesIO(content)).format.lower()
        name = name.with_name(f"{name.name}.{'jpg' if image_format == 'jpeg' else image_format}")
    return name


def _unique(name: PurePosixPath, taken: set[str]) -> PurePosixPath:
    stem, number = name.stem, 1
    while str(name.with_suffix("")).lower() in taken:
        name, number = name.with_name(f"{stem}_{number}{name.suffix}"), number + 1
    taken.add(str(name.with_suffix("")).lower())
    return name


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _sound_boxes(row: _Row, left_out: Counter) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (float64 [n, 4], xywh) and categories of the objects that a format without crowds can hold."""
    crowds = row.objects["iscrowd"]
    objects = np.flatnonzero(~crowds)
    boxes, kept = clean_boxes(row.objects["bbox"][objects], row.width, row.height)
    left_out["crowds, which the format does not have"] += int(crowds.sum())
    left_out["boxes without area or outside their image"] += len(objects) - len(kept)
    return boxes.astype(np.float64), row.objects["category"][objects[kept]]


def _told(left_out: Counter) -> list[str]:
    return [f"left out: {count} {what}" for what, count in left_out.items() if count]


# ---- the layouts ----


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _export_coco(splits: Splits, categories: list[str], folder: Path) -> list[str]:
    left_out = Counter()
    for split, dataset in splits.items():
        ids = category_ids(dataset, categories)
        images, annotations = [], []
        own_ids = _own_object_ids(dataset)
        for row in _rows(dataset):
            _write(folder / "images" / split / row.name, row.content)
            size = {"width": row.width, "height": row.height}
            images.append({"id": row.image_id, "file_name": str(row.name)} | size)
            for number, box in enumerate(row.objects["bbox"].tolist()):
                own_id = next(own_ids)
                if not np.isfinite(box).all():
                    left_out["boxes that are not finite"] += 1
                    continue
                area = row.objects["area"][number] if "area" in row.objects else np.nan
                annotations.append(
                    {
                        "id": own_id,
                        "image_id": row.image_id,
                        "category_id": ids[row.objects["category"][number]],
                        "bbox": [_plain(value) for value in box],
                        "area": _plain(box[2] * box[3] if np.isnan(area) else area),
                        "iscrowd": int(row.objects["iscrowd"][number]),
                    }
                )
                if FIELD in row.objects and (text := row.objects[FIELD][number]) is not None:
                    annotations[-1][FIELD] = json.loads(text)
        listed = [{"id": own_id, "name": name} for own_id, name in zip(ids, categories, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": listed}
        _write(folder / "annotations" / f"instances_{split}.json", json.dumps(content, ensure_ascii=False))
    return _told(left_out)


def _own_object_ids(dataset: datasets.Dataset) -> Iterator[int | str]:
    """The ids of the objects as they came, if they are unique; else numbers from 1 on."""
    rows = dataset.select_columns(["objects"])["objects"]
    ids, count = [own for row in rows for own in row.get("id") or []], sum(len(row["bbox"]) for row in rows)
    is_told = len(ids) == len(set(ids)) == count and None not in ids
    return iter(ids if is_told else range(1, count + 1))


def _export_yolo(splits: Splits, categories: list[str], folder: Path) -> list[str]:
    left_out = Counter()
    for split, dataset in splits.items():
        for row in _rows(dataset):
            boxes, labels = _sound_boxes(row, left_out)
            boxes[:, :2] += boxes[:, 2:] / 2
            boxes /= (row.width, row.height) * 2
            lines = [
                f"{label} " + " ".join(f"{value:.8f}" for value in box)
                for label, box in zip(labels.tolist(), boxes.tolist(), strict=True)
            ]
            _write(folder / "images" / split / row.name, row.content)
            _write(folder / "labels" / split / row.name.with_suffix(".txt"), "".join(f"{line}\n" for line in lines))
    config = {split: f"images/{split}" for split in splits} | {"names": dict(enumerate(categories))}
    _write(folder / "data.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return _told(left_out)


def _export_voc(splits: Splits, categories: list[str], folder: Path) -> list[str]:
    _require_names(categories)
    left_out, taken = Counter(), set()
    for split, dataset in splits.items():
        stems = []
        for row in _rows(dataset, flat=True, taken=taken):
            boxes, labels = _sound_boxes(row, left_out)
            _write(folder / "JPEGImages" / row.name, row.content)
            _write(folder / "Annotations" / f"{row.name.stem}.xml", _voc_xml(row, boxes, labels, categories))
            stems.append(row.name.stem)
        _write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))
    return _told(left_out)


def _require_names(categories: list[str]) -> None:
    """Refuses names that XML, or those who read it, would change."""
    if bad := [name for name in categories if _NO_XML.search(name) or name != name.strip()]:
        raise DataError(f"the category {bad[0]!r} cannot be written to Pascal VOC's XML as it is: rename it.")


def _voc_xml(row: _Row, boxes: np.ndarray, labels: np.ndarray, categories: list[str]) -> bytes:
    root = ElementTree.Element("annotation")
    _add(root, filename=row.name.name)
    _add(ElementTree.SubElement(root, "size"), width=row.width, height=row.height, depth=3)
    for (x, y, width, height), label in zip(boxes.tolist(), labels, strict=True):
        one = ElementTree.SubElement(root, "object")
        _add(one, name=categories[label], difficult=0)
        corners = (f"{value:.2f}".rstrip("0").rstrip(".") for value in (x, y, x + width, y + height))
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        _add(ElementTree.SubElement(one, "bndbox"), **box)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _add(parent: ElementTree.Element, **texts) -> None:
    for name, text in texts.items():
        ElementTree.SubElement(parent, name).text = str(text)


LAYOUTS: dict[str, Callable] = {"coco": _export_coco, "yolo": _export_yolo, "voc": _export_voc}
