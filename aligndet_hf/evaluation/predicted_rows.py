"""Predictions on the disk: shards that are complete or absent, their data set, and files in COCO's formats."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from ..data.columns import objects_feature
from ..data.image_list import ImageList
from ..data.masks import FIELD, has_regions, mask_areas, outlines, segmentation_text
from ..files import seal_file
from .predictions import Prediction

_ROWS_IN_MEMORY = 8  # photographs may take some 10 MB each


def predicted_features(
    classes: list[str] | None = None, ids: list[int | str] | None = None, masks: bool = False
) -> datasets.Features:
    """
    The columns of predictions as a data set: `image`, `image_id`, `file_name`, `width` and `height` in pixels, and
    `objects` as labelled data has them (see [`~aligndet_hf.data.columns.objects_feature`]) with the field `score`.
    """
    objects = objects_feature(classes, ids, masks=masks) | {"score": datasets.List(datasets.Value("float32"))}
    numbers = {name: datasets.Value("int64") for name in ("width", "height")}
    names = {"image_id": datasets.Value("int64"), "file_name": datasets.Value("string")}
    return datasets.Features({"image": datasets.Image(), **names, **numbers, "objects": objects})


def write_predictions(path: Path, predictions: Sequence[Prediction], images: ImageList) -> None:
    """Writes the predictions on some images to a file, at once and complete."""
    features = predicted_features(masks=any(found.masks is not None for found in predictions))
    schema = pa.schema([*features.arrow_schema, ("best_score", pa.float32()), ("error", pa.string())])
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(predictions), _ROWS_IN_MEMORY):
            rows = [_row(found, images) for found in predictions[start : start + _ROWS_IN_MEMORY]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    seal_file(unfinished, path)


def _row(found: Prediction, images: ImageList) -> dict:
    file_name = images.names[found.index]
    if found.masks is None:
        areas, masks = found.boxes[:, 2:].prod(axis=1).tolist(), {}
    else:
        areas, masks = mask_areas(found.masks), {FIELD: [segmentation_text(mask) for mask in found.masks]}
    return {
        "image": images.value(found.index) or {"bytes": found.encoded, "path": file_name},
        "image_id": images.ids[found.index],
        "file_name": file_name,
        "width": found.size[1],
        "height": found.size[0],
        "objects": {
            "bbox": found.boxes.tolist(),
            "category": found.labels.tolist(),
            "area": areas,
            "id": [0] * len(found.scores),  # numbered by `join_predictions`
            "score": found.scores.tolist(),
        }
        | masks,
        "best_score": found.best_score,
        "error": found.error,
    }


def join_predictions(
    shards: Sequence[Path], path: Path, classes: list[str], ids: list[int | str]
) -> tuple[datasets.Dataset, dict]:
    """
    Makes one data set of the shards that [`write_predictions`] wrote, mapped into memory from a file.

    Args:
        shards (`Sequence[Path]`): The files, in order.
        path (`Path`): The file to write.
        classes (`list[str]`): Names of the classes.
        ids (`list[int | str]`): Their ids in COCO's formats.

    Returns:
        `tuple`: the data set, without the images that could not be read, and a report: `images`, `boxes`,
        `images_without_boxes`, `boxes_of_class`, the `best_score` seen, and `skipped`, a list of `file` and `reason`.
    """
    features = predicted_features(classes, ids, masks=any(map(_has_masks, shards)))
    report = dict.fromkeys(("images", "images_without_boxes", "boxes", "best_score"), 0) | {"skipped": []}
    counts = Counter()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
        for rows in _stored(shards):
            readable = [row for row in rows if row["error"] is None]
            skipped = [row for row in rows if row["error"] is not None]
            report["skipped"] += [{"file": row["file_name"], "reason": row["error"]} for row in skipped]
            for row in readable:
                found = len(row["objects"]["score"])
                row["objects"]["id"] = list(range(report["boxes"] + 1, report["boxes"] + 1 + found))
                counts.update(row["objects"]["category"])
                report["images"] += 1
                report["boxes"] += found
                report["images_without_boxes"] += found == 0
                report["best_score"] = max(report["best_score"], row["best_score"])
            writer.write_table(pa.Table.from_pylist(readable, schema=features.arrow_schema))
    report["boxes_of_class"] = {name: counts[label] for label, name in enumerate(classes)}
    return datasets.Dataset.from_file(str(path)), report


def _stored(shards: Sequence[Path]) -> Iterator[list[dict]]:
    """A few rows at a time."""
    for shard in shards:
        with pa.OSFile(str(shard)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield batch.to_pylist()


def _has_masks(shard: Path) -> bool:
    with pa.OSFile(str(shard)) as file, pa.ipc.open_stream(file) as batches:
        return has_regions(batches.schema.field("objects").type)


def predicted_rows(dataset: datasets.Dataset) -> Iterator[dict]:
    """The rows of [`join_predictions`], a few in memory at a time, their images not decoded."""
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    for table in dataset.with_format("arrow").iter(_ROWS_IN_MEMORY):
        yield from table.to_pylist()


def write_results(dataset: datasets.Dataset, path: Path, ids: list[int | str]) -> None:
    """Writes the detections as a list in COCO's result format, which `COCO.loadRes` of pycocotools reads."""
    before = "["
    with open(path, "w", encoding="utf-8") as file:
        for row in predicted_rows(dataset):
            fields = *(row["objects"][name] for name in ("category", "bbox", "score")), _masks(row["objects"])
            for label, box, score, mask in zip(*fields, strict=True):
                entry = {"image_id": row["image_id"], "category_id": ids[label], "bbox": box, "score": score} | mask
                file.write(before + json.dumps(entry))
                before = ",\n"
        file.write("[]\n" if before == "[" else "]\n")


def write_coco(dataset: datasets.Dataset, path: Path, classes: list[str], ids: list[int | str]) -> None:
    """
    Writes the detections as COCO labels, which a labelling tool imports; every annotation has its `score`,
    and the outlines of its mask, if there are masks.

    Images that lie in no file of their own, such as the frames of a video, are written to `images/` beside `path`.
    """
    parts = {"images": path.with_suffix(".images"), "annotations": path.with_suffix(".annotations")}
    with open(parts["images"], "w", encoding="utf-8") as images, open(parts["annotations"], "w") as annotations:
        for number, row in enumerate(predicted_rows(dataset)):
            if row["image"]["bytes"] is not None:
                frame = path.parent / "images" / row["file_name"]
                frame.parent.mkdir(parents=True, exist_ok=True)
                frame.write_bytes(row["image"]["bytes"])
            entry = {"id": row["image_id"]} | {name: row[name] for name in ("file_name", "width", "height")}
            images.write((",\n" if number else "") + json.dumps(entry))
            objects = row["objects"]
            fields = *(objects[name] for name in ("category", "bbox", "area", "id", "score")), _masks(objects)
            for label, box, area, id_, score, mask in zip(*fields, strict=True):
                entry = {"id": id_, "image_id": row["image_id"], "category_id": ids[label], "bbox": box}
                entry |= {"area": area, "iscrowd": 0, "score": score}
                if mask and (polygons := outlines(mask[FIELD])):
                    entry[FIELD] = polygons
                annotations.write((",\n" if id_ > 1 else "") + json.dumps(entry))
    categories = [{"id": id_, "name": name} for id_, name in zip(ids, classes, strict=True)]
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"categories": {json.dumps(categories)}')
        for name, part in parts.items():
            file.write(f',\n"{name}": [\n')
            with open(part, encoding="utf-8") as content:
                shutil.copyfileobj(content, file)
            file.write("\n]")
            part.unlink()
        file.write("}\n")


def _masks(objects: dict) -> list[dict]:
    """The mask of each object as a field of its annotation; nothing where there are none."""
    return [{FIELD: json.loads(mask)} for mask in objects.get(FIELD) or ()] or [{}] * len(objects["score"])
