"""Reading data sets: image folders, COCO JSON, folders of `save_to_disk`, and the Hub. Images are never decoded."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from .columns import arrow_batches, objects_feature, read_values, require_columns
from .errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}

# Usual names of splits, in folder and file names such as `val2017` or `instances_val2017.json`.
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def load_dataset_source(
    source: str | Path, split: str | None = None, *, labels: bool = False, image_dir: str | Path | None = None
) -> datasets.Dataset:
    """
    Loads a data set from wherever it is.

    Args:
        source (`str` or `Path`):
            One of: a folder of images, with or without `metadata.jsonl` (one line per image: `file_name` and, for
            labelled data, `objects`) and `labels.json` (the names of the categories); a folder written by
            `save_to_disk`; a COCO JSON file; a Hub id or a local copy of such a repository.
        split (`str`, *optional*):
            The split to load; several are joined by `+`. Sub-folders such as `train`, `val2017` or `test` of an image
            folder are its splits; a folder without such sub-folders and a COCO file are one split, named after
            themselves (`train` if the name does not tell). May be left out if there is only one.
        labels (`bool`, *optional*, defaults to `False`):
            Whether the column `objects` is needed.
        image_dir (`str` or `Path`, *optional*):
            Folder that the file names of a COCO file start from. By default looked for beside the file.

    Returns:
        `datasets.Dataset`: the column `image` is `Image(decode=False)`; `objects`, if any, is a struct of lists with
        `bbox` (absolute xywh) and `category` (0..C-1, COCO ids in the order of their numbers). Rows of folders are in
        the order of the file names or of the metadata.

    Raises:
        [`DataError`]: if the source or split does not exist, or for input that cannot be used. It names the file and
            line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, split)
    elif path.is_file():
        if path.suffix.lower() != ".json":
            raise DataError(f"{path}: expected a folder or a COCO file ending in .json.")
        _choose_splits([_split_of_name(path.stem)], split, path)
        dataset = _read_coco(path, Path(image_dir) if image_dir else None)
    else:
        dataset = _load_hub(str(source), split)
    require_columns(dataset, ["image"] + (["objects"] if labels else []), str(source))
    return dataset.cast_column("image", datasets.Image(decode=False))


def is_local_images(source: str | Path) -> bool:
    """Whether a source is read by this module: a folder of images or of `save_to_disk`, or a COCO file."""
    path = Path(source).expanduser()
    return path.is_file() or (path.is_dir() and (_is_saved(path) or _has_images(path)))


def split_names(source: str | Path) -> list[str]:
    """
    The splits of a source, as [`load_dataset_source`] calls them.

    Raises:
        [`DataError`]: if there is no such source.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [_split_of_name(path.stem)]
    if path.is_dir() and _is_saved(path):
        return list(_load_saved(path))
    if path.is_dir() and _has_images(path):
        return list(_folder_splits(path))
    return list(_load_from_hub(str(source), None))


def category_names(dataset: datasets.Dataset, source: str | Path = "the data set") -> list[str]:
    """
    The names of the categories 0..C-1: of the `ClassLabel` feature, of `labels.json` in the folder `source`, or else
    the numbers themselves up to the largest one in use.

    Raises:
        [`DataError`]: if there is no column `objects` with a field `category`, or no category in it.
    """
    require_columns(dataset, ["objects"], str(source))
    feature = dataset.features["objects"]
    category = feature.get("category") if isinstance(feature, dict) else None
    if not isinstance(category, (datasets.List, datasets.LargeList)):
        raise DataError(f"{source}: column 'objects' must be a struct of lists with the field 'category'.")
    if isinstance(category.feature, datasets.ClassLabel):
        return category.feature.names
    names = _read_labels(Path(source))
    if names is None:
        used = [read_values(table["objects"], "category")[0] for _, table in arrow_batches(dataset, ["objects"])]
        largest = max((int(values.max()) for values in used if len(values)), default=None)
        if largest is None:
            raise DataError(f"{source}: column 'objects', field 'category' is empty in all rows.")
        names = [str(number) for number in range(largest + 1)]
    return names


# ---- splits ----


def _split_of_name(name: str, default: str | None = "train") -> str | None:
    """The split that a file or folder name tells: `instances_val2017` -> `validation`."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), default)


def _choose_splits(available: list[str], split: str | None, source: str | Path) -> list[str]:
    if split is None and len(available) == 1:
        return available
    chosen = split.split("+") if split else []
    if not chosen or not set(chosen) <= set(available):
        wrong = f"no split '{split}'" if split else "several splits"
        raise DataError(
            f"{source}: {wrong}; found {', '.join(sorted(available))}. Choose one, or join several by '+', with "
            f"split='{'train' if 'train' in available else available[0]}'."
        )
    return chosen


# ---- folders and the Hub ----


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(folder: Path) -> dict[str, datasets.Dataset]:
    saved = datasets.load_from_disk(str(folder))
    return {str(saved.split or "train"): saved} if isinstance(saved, datasets.Dataset) else saved


def _load_folder(folder: Path, split: str | None) -> datasets.Dataset:
    if _is_saved(folder):
        saved = _load_saved(folder)
        return datasets.concatenate_datasets([saved[name] for name in _choose_splits(list(saved), split, folder)])
    if not _has_images(folder):
        return _load_hub(str(folder), split)
    splits = _folder_splits(folder)
    chosen = [splits[name] for name in _choose_splits(list(splits), split, folder)]
    labels = _read_labels(folder)
    return datasets.concatenate_datasets([_read_image_folder(part, labels) for part in chosen])


def _load_from_hub(source: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """What `load_dataset` makes of a Hub id, or of a local folder of the files of a data repository."""
    try:
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:  # includes everything that datasets and the Hub raise for a missing one
        raise DataError(
            f"Cannot load '{source}' (split {split or 'not given'}): it is not a folder with images, a COCO file or a "
            f"folder of save_to_disk, and as a data set of the Hub: {error}"
        ) from error


def _load_hub(source: str, split: str | None) -> datasets.Dataset:
    loaded = _load_from_hub(source, split)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    return loaded[_choose_splits(list(loaded), None, source)[0]]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in a fixed order, without hidden ones (`.ipynb_checkpoints` and the like)."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in _files(folder))


def _folder_splits(folder: Path) -> dict[str, Path]:
    """The sub-folders, all that have images, if any of them has the name of a split; else the folder itself."""
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and not part.name.startswith(".")]
    whole_name = re.compile(rf"({'|'.join(_SPLITS)})[-_]?\d*", re.IGNORECASE)
    if (folder / "metadata.jsonl").is_file() or not any(whole_name.fullmatch(part.name) for part in parts):
        return {_split_of_name(folder.name): folder}
    splits = {}
    for part in parts:
        if _has_images(part):
            name = _split_of_name(part.name, default=part.name)
            splits[part.name if name in splits else name] = part
    return splits


def _read_labels(folder: Path) -> list[str] | None:
    """Category names of `labels.json` in the folder, or above that of a split: a list, or {"0": name, ...}."""
    places = [folder] + ([folder.parent] if _split_of_name(folder.name, default=None) else [])
    path = next((place / "labels.json" for place in places if (place / "labels.json").is_file()), None)
    if path is None:
        return None
    names = _read_json(path)
    if isinstance(names, dict):
        try:
            numbers = sorted((int(key), name) for key, name in names.items())
        except ValueError:
            numbers = []
        names = [name for _, name in numbers] if [key for key, _ in numbers] == list(range(len(numbers))) else None
    if not isinstance(names, list) or not names or len({str(name) for name in names}) != len(names):
        raise DataError(f'{path}: expected a list of different category names, or {{"0": name, "1": name, ...}}.')
    return [str(name) for name in names]


def _read_image_folder(folder: Path, labels: list[str] | None) -> datasets.Dataset:
    files = list(_files(folder))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    metadata = [path for path in files if path.name == "metadata.jsonl"]
    if not metadata:
        if any((folder / f"metadata.{suffix}").is_file() for suffix in ("csv", "parquet")):
            logger.warning("%s: only metadata.jsonl is read; metadata.csv or .parquet is left out.", folder)
        return _build([{"path": path} for path in images], None, str(folder))
    rows = []
    for path in metadata:
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                rows.append(_metadata_row(path, number, line))
    if not rows:
        raise DataError(f"{metadata[0]}: it lists no image.")
    unlisted = set(images) - {row["path"] for row in rows}
    if unlisted:
        logger.warning(
            "%s: %d images are left out, they are not in metadata.jsonl (e.g. %s).",
            folder,
            len(unlisted),
            min(unlisted).name,
        )
    return _build(rows, labels, str(folder))


def _metadata_row(path: Path, number: int, line: str) -> dict:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError(f"{where}: expected an object with the key 'file_name'.")
    fields = {"path": _inside(path.parent, row["file_name"], where), "where": where}
    if "image_id" in row:
        fields["image_id"] = row["image_id"]
    if "objects" in row:
        objects = row["objects"] or {"bbox": [], "category": []}
        if not isinstance(objects, dict) or not {"bbox", "category"} <= set(objects):
            found = ", ".join(objects) if isinstance(objects, dict) else type(objects).__name__
            raise DataError(f"{where}: 'objects' must have the lists 'bbox' and 'category', found {found}.")
        fields |= {key: objects[key] for key in ("bbox", "category", "area", "id") if key in objects}
    return fields


def _inside(root: Path, name: str, where: str) -> Path:
    """The file `name` of the folder `root`; refuses names that lead out of it."""
    relative = os.path.normpath(name.replace("\\", "/"))
    if "://" in name or os.path.isabs(relative) or re.match(r"[A-Za-z]:", relative) or relative.split("/")[0] == "..":
        raise DataError(f"{where}: the file name '{name}' leads out of {root}; expected a relative path inside it.")
    return root / relative


# ---- COCO ----


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors write
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error}).") from error


def _read_json(path: Path):
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from error


def _read_coco(path: Path, image_dir: Path | None) -> datasets.Dataset:
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or not content["images"]:
        raise DataError(f"{path}: not a COCO file, it has no list 'images'.")
    for key, needed in (
        ("images", {"id", "file_name"}),
        ("categories", {"id", "name"}),
        ("annotations", {"image_id"}),
    ):
        for number, entry in enumerate(content.get(key, [])):
            if not isinstance(entry, dict) or not needed <= set(entry):
                raise DataError(f"{path}: entry {number} of '{key}' must have {', '.join(sorted(needed))}.")

    labelled = "annotations" in content
    rows = {}
    for number, image in enumerate(content["images"]):
        where = f"{path}, image {image['id']}"
        if image["id"] in rows:
            raise DataError(
                f"{where}: this id occurs twice in 'images' (again in entry {number}); ids must be unique."
            )
        rows[image["id"]] = {"name": image["file_name"], "image_id": image["id"], "where": where}
        if labelled:
            rows[image["id"]] |= {"bbox": [], "category": [], "area": [], "id": []}

    categories = sorted(content.get("categories", []), key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    names = [str(category["name"]) for category in categories]
    if len(numbers) != len(names) or len(set(names)) != len(names):
        raise DataError(f"{path}: ids and names of 'categories' must be unique.")
    crowds = 0
    for number, annotation in enumerate(content.get("annotations", [])):
        where = f"{path}, annotation {annotation.get('id', f'number {number}')}"
        if annotation["image_id"] not in rows:
            raise DataError(f"{where}: no image has the id {annotation['image_id']}. Remove the annotation or add it.")
        if annotation.get("category_id") not in numbers:
            raise DataError(f"{where}: no category has the id {annotation.get('category_id')}; found {list(numbers)}.")
        if annotation.get("iscrowd"):
            crowds += 1
            continue
        box = annotation.get("bbox")
        if not _is_box(box):
            raise DataError(f"{where}: 'bbox' must be four numbers [x, y, width, height], got {box}.")
        row = rows[annotation["image_id"]]
        row["bbox"].append(box)
        row["category"].append(numbers[annotation["category_id"]])
        row["area"].append(annotation.get("area", box[2] * box[3]))
        row["id"].append(annotation.get("id", number))
    if crowds:
        logger.warning("%s: %d crowd annotations are left out.", path, crowds)

    root = _image_root(path, image_dir, content["images"][0]["file_name"])
    for row in rows.values():
        row["path"] = _inside(root, row.pop("name"), row["where"])
    return _build(list(rows.values()), names if labelled else None, str(path))


def _image_root(path: Path, image_dir: Path | None, first: str) -> Path:
    """Where the images of a COCO file are: the usual places, such as `X/` for `annotations/instances_X.json`."""
    if image_dir is not None:
        return image_dir
    above = path.parent.parent
    places = [path.parent, path.parent / "images", above / path.stem.split("_")[-1], above / "images", above]
    for place in places:
        if (place / first).is_file():
            return place
    raise DataError(f"{path}: cannot find '{first}' in {', '.join(map(str, places))}. Give the folder as image_dir.")


# ---- building ----


def _build(rows: list[dict], categories: list[str] | None, source: str) -> datasets.Dataset:
    """
    Makes the data set of rows with `path` and, if they come from a list, `where` (to name the row in an error),
    `image_id`, `bbox`, `category`, `area`, `id`.
    """
    for row in rows:
        if "where" in row and not row["path"].is_file():
            raise DataError(f"{row['where']}: there is no file {row['path']}.")
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": pa.array([{"bytes": None, "path": str(row["path"].absolute())} for row in rows], _IMAGE_TYPE)}
    without_id = [row for row in rows if "image_id" not in row]
    if 0 < len(without_id) < len(rows):
        raise DataError(f"{without_id[0]['where']}: no 'image_id', which other images have.")
    if not without_id:
        features["image_id"] = datasets.Value("int64")
        columns["image_id"] = _column([row["image_id"] for row in rows], pa.int64(), "image_id", rows, source)
    if any("bbox" in row for row in rows):
        features["objects"] = objects_feature(categories)
        next_id = 1
        for row in rows:
            boxes = row.setdefault("bbox", [])
            row.setdefault("category", [])
            _check_row(row, categories)
            row.setdefault("area", [box[2] * box[3] for box in boxes])
            row.setdefault("id", list(range(next_id, next_id + len(boxes))))
            next_id += len(boxes)
        types = datasets.Features(features["objects"]).arrow_schema
        columns["objects"] = pa.StructArray.from_arrays(
            [_column([row[name] for row in rows], types.field(name).type, name, rows, source) for name in types.names],
            names=types.names,
        )
    features = datasets.Features(features)
    table = pa.table(columns, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


_IMAGE_TYPE = datasets.Image.pa_type


def _is_box(value) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(number, (int, float)) for number in value)


def _check_row(row: dict, categories: list[str] | None) -> None:
    """One entry per box in each list, four numbers per box, and only known categories."""
    boxes, where = row["bbox"], row["where"]
    for name in ("bbox", "category", "area", "id"):
        if not isinstance(row.get(name, []), list) or len(row.get(name, boxes)) != len(boxes):
            raise DataError(f"{where}: '{name}' must be a list with one entry per box, as 'bbox' has {len(boxes)}.")
    for box in boxes:
        if not _is_box(box):
            raise DataError(f"{where}: a box in 'bbox' must be four numbers [x, y, width, height], got {box}.")
    for category in row["category"]:
        if not isinstance(category, int):
            raise DataError(
                f"{where}: 'category' must hold integers, got {category!r}. Number the categories from 0 and list "
                "their names in labels.json."
            )
        if category < 0 or (categories is not None and category >= len(categories)):
            known = f"0 to {len(categories) - 1} ({', '.join(categories[:10])})" if categories else "0 or more"
            raise DataError(f"{where}: unknown category {category}, expected {known}.")


def _column(values: list, type_: pa.DataType, name: str, rows: list[dict], source: str) -> pa.Array:
    """An Arrow array; if the values do not fit, an error that names the first row that does not."""
    try:
        return pa.array(values, type_)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for row, value in zip(rows, values, strict=True):
            try:
                pa.array([value], type_)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                where = row.get("where", source)
                raise DataError(f"{where}: '{name}' does not fit: {error}") from error
        raise
