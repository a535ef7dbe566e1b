"""Proposal files of AlignDet and SoCo: COCO-format JSON in which every annotation is a proposal."""

import json
import os
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow as pa

from .arrow_boxes import read_boxes, read_values
from .columns import arrow_batches, image_ids, proposals_feature
from .errors import DataError, ImageError
from .images import image_name, image_size
from .readers.files import read_json
from .splits import Splits

_FAULTS = (KeyError, TypeError, ValueError, OverflowError)


def import_proposals(path: str | Path, sources: Splits) -> Splits:
    """
    Reads the proposals of the images of a data set from a COCO-format file.

    Images are found by their file name (as many folders of it as the file gives), or else by the column `image_id`.
    The file is read whole, which takes several times its size of memory.

    Args:
        path (`str` or `Path`):
            The file: `images` with `id` and `file_name`, and `annotations` with `image_id` and `bbox` (absolute xywh).
            Proposals are ordered by `score` where all have one, else they stay as they are. Where `categories` has
            several entries, they are clusters, 0 to C-1 in the order of their ids.
        sources (`dict[str, datasets.Dataset]`): The splits, with the column `image` and, optionally, `image_id`.

    Returns:
        `dict[str, datasets.Dataset]`: per split the column `proposals` alone, row by row; images that the file does
        not list have none.

    Raises:
        [`DataError`]: if it is no such file, or lists no image of a split.
    """
    content = _read(Path(path))
    annotations = content["annotations"]
    try:
        numbers_of_images = {image["id"]: number for number, image in enumerate(content["images"])}
        owners = [numbers_of_images.get(annotation["image_id"], len(numbers_of_images)) for annotation in annotations]
        owners = np.array(owners, dtype=np.int64)
        boxes = np.array([annotation["bbox"] for annotation in annotations] or np.zeros((0, 4)), dtype=np.float32)
        if boxes.shape != (len(owners), 4):
            raise ValueError("'bbox' must be four numbers [x, y, width, height]")
        scored = bool(annotations) and all("score" in annotation for annotation in annotations)
        scores = [annotation["score"] for annotation in annotations] if scored else np.zeros(len(boxes))
        scores = np.array(scores, dtype=np.float64)
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError("'bbox' and 'score' must be finite numbers")
        categories = sorted(category["id"] for category in content.get("categories", []))
        numbers = {category: number for number, category in enumerate(categories)}
        clusters = None
        if len(numbers) > 1:
            clusters = np.array([numbers[annotation["category_id"]] for annotation in annotations], dtype=np.int32)
        names = {str(PurePosixPath(image["file_name"])): number for number, image in enumerate(content["images"])}
    except _FAULTS as error:
        where = f"{path}{_first_fault(content)}"
        raise DataError(f"{where}: not a COCO file of proposals: {type(error).__name__} {error}.") from error
    order = np.lexsort((-scores, owners))
    # The boxes of each image, best first, and the boxes of none.
    groups = np.split(order, np.searchsorted(owners[order], np.arange(len(numbers_of_images)) + 1))

    columns = {}
    for split, source in sources.items():
        keys = [_find(name, names) for name in _names(source)]
        if not any(key is not None for key in keys) and "image_id" in source.column_names:
            keys = [numbers_of_images.get(key) for key in image_ids(source, split)]
        missing = sum(key is None for key in keys)
        if missing == len(keys):
            raise DataError(
                f"{path} lists none of the images of the split '{split}', such as {next(_names(source))}: neither its "
                "file names nor, if there is a column 'image_id', its ids are the images'."
            )
        if missing:
            print(f"{path}: {missing} of {len(keys)} images of the split '{split}' are not in this file.")
        found = [order[:0] if key is None else groups[key] for key in keys]
        taken, offsets = np.concatenate(found), np.cumsum([0, *map(len, found)])
        values = scores[taken] if scored else np.concatenate([1 - np.arange(len(own)) / len(own) for own in found])
        columns[split] = _column(boxes[taken], values, None if clusters is None else clusters[taken], offsets)
    return columns


def export_proposals(dataset: datasets.Dataset, path: str | Path) -> None:
    """
    Writes a column of proposals as a COCO-format file, as AlignDet's code reads it.

    The only category is `selective_search`, whatever made the proposals, as in AlignDet's files; with clusters there
    is one per cluster, whose id is its number. Every proposal is an annotation with its `score`. Images have their own
    ids and names; without columns `image_id` and `file_name`, the numbers of their rows and the names of their files.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` (not decoded) and `proposals`.
        path (`str` or `Path`): The file; it is written complete or not at all.

    Raises:
        [`DataError`]: if there is no such column, or an image cannot be read.
    """
    if "proposals" not in dataset.column_names:
        raise DataError(f"There is no column 'proposals' to export to {path}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, number, largest = image_ids(dataset), 0, 0
    images = []
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write('{"annotations": [')
        has_names = "file_name" in dataset.column_names
        for start, table in arrow_batches(dataset, ["image", "proposals"] + ["file_name"] * has_names, batch_size=100):
            boxes, counts = read_boxes(table["proposals"])
            fields = {"score": read_values(table["proposals"], "score")[0].tolist()}
            if "cluster" in dataset.features["proposals"]:
                fields["category_id"] = read_values(table["proposals"], "cluster")[0].tolist()
                largest = max([largest, *fields["category_id"]])
            owners = np.repeat(ids[start : start + len(counts)], counts).tolist()
            for place, (owner, box) in enumerate(zip(owners, boxes.tolist(), strict=True)):
                annotation = {"id": number + 1, "image_id": owner, "category_id": 1, "bbox": box}
                annotation |= {"area": box[2] * box[3], "iscrowd": 0} | {key: fields[key][place] for key in fields}
                file.write((",\n" if number else "\n") + json.dumps(annotation))
                number += 1
            for row, value in enumerate(table["image"].to_pylist(), start):
                try:
                    height, width = image_size(value)
                except ImageError as error:
                    raise DataError(f"Row {row}: {error}") from error
                name = table["file_name"][row - start].as_py() if has_names else None
                name = name or Path(value["path"] or f"{ids[row]}").name
                images.append({"id": ids[row], "file_name": name, "height": height, "width": width})
        categories = [{"id": 1, "name": "selective_search"}]
        if "cluster" in dataset.features["proposals"]:
            categories = [{"id": cluster, "name": f"cluster {cluster}"} for cluster in range(largest + 1)]
        file.write(f'\n],\n"images": {json.dumps(images)},\n"categories": {json.dumps(categories)}}}\n')
    os.replace(part, path)


def _read(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{path}: not a COCO file of proposals, it has no lists 'images' and 'annotations'.")
    return content


def _first_fault(content: dict) -> str:
    """Where the first image or annotation is that cannot be read, for the error."""
    for name, is_right in (("images", _is_image), ("annotations", _is_proposal)):
        for number, entry in enumerate(content[name]):
            try:
                right = is_right(entry)
            except (AttributeError, *_FAULTS):
                right = False
            if not right:
                return f", entry {number} of '{name}'"
    return ""


def _is_image(entry) -> bool:
    return {"id", "file_name"} <= entry.keys()


def _is_proposal(entry) -> bool:
    values = np.array([*entry["bbox"], entry.get("score", 0)], dtype=np.float32)
    return "image_id" in entry and len(values) == 5 and bool(np.isfinite(values).all())


def _names(source: datasets.Dataset):
    for _, table in arrow_batches(source, ["image"], batch_size=100):
        for value in table["image"]:
            yield image_name({"path": value["path"].as_py()})


def _find(name: str, names: dict[str, int]) -> int | None:
    """The number of the image that a path ends with the name of; the longest name if there are several."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    found = (names.get("/".join(parts[start:])) for start in range(len(parts)))
    return next((image for image in found if image is not None), None)


def _column(boxes, scores, clusters, offsets) -> datasets.Dataset:
    """A data set of one column, from the values of all rows and where each row's begin."""
    features = datasets.Features({"proposals": proposals_feature(with_clusters=clusters is not None)})
    values = {"bbox": pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel(), pa.float32()), 4)}
    values["score"] = pa.array(scores, pa.float32())
    if clusters is not None:
        values["cluster"] = pa.array(clusters, pa.int32())
    lists = {name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), array) for name, array in values.items()}
    column = pa.StructArray.from_arrays(list(lists.values()), names=list(lists))
    table = pa.table({"proposals": column}).cast(features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
