"""Reading data sets, from wherever they are: files and folders in any format of `readers`, and the Hub."""

import difflib
import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ..files import similar_path
from ..objects import Given, as_source
from . import door
from .arrow_boxes import read_values
from .columns import BoxReport, require_columns, validate_objects
from .errors import DataError
from .launch import Launch
from .readers import READERS, box_table, find_reader, image_folder, saved, yolo
from .readers.files import list_files, list_images, numbers_as_names, read_start, split_of_folder, unwrapped
from .readers.image_folder import has_metadata, read_labels
from .readers.rows import build_dataset
from .readers.spellings import has_numbers_only, standard_objects
from .splits import Splits

logger = logging.getLogger(__name__)

# What files of labels end with, in formats that are known and others.
_LABEL_ENDINGS = (".json", ".jsonl", ".ndjson", ".odgt", ".manifest", ".csv", ".tsv", ".xlsx", ".txt", ".xml", ".mat",
                  ".tfrecord")  # fmt: skip
_EXPECTED = {".txt": yolo.EXPECTED} | dict.fromkeys((".csv", ".tsv"), box_table.EXPECTED)
_SHOWN_BYTES = 80


def load_dataset_source(
    source: str | Path | datasets.Dataset | datasets.DatasetDict,
    split: str | None = None,
    *,
    labels: bool = False,
    image_dir: str | Path | None = None,
    split_flag: str = "--split",
) -> datasets.Dataset:
    """
    Loads a data set from wherever it is. Images are never decoded.

    Args:
        source (`str`, `Path`, `datasets.Dataset` or `datasets.DatasetDict`):
            A data set in memory (of a `Dataset` the `split` does not count), or one of: a folder in a format that
            [`~aligndet_hf.data.readers.READERS`] know, found by looking at it (COCO, YOLO, Pascal VOC, labelme, CVAT,
            KITTI, the JSON of other tools, a table of boxes, or images with or without metadata); a COCO JSON file or
            a table; a folder written by `save_to_disk`; a Hub id or a local copy of such a repository.
        split (`str`, *optional*):
            The split to load; several are joined by `+`. Sub-folders such as `train`, `val2017` or `test` are splits;
            a folder without them is one split, named after itself (`train` if its name does not tell). A single label
            file is the split that is asked for. May be left out if there is only one.
        labels (`bool`, *optional*, defaults to `False`):
            Whether the column `objects` is needed.
        image_dir (`str` or `Path`, *optional*):
            Folder that the file names of a label file start from. By default looked for beside the file.
        split_flag (`str`, *optional*, defaults to `"--split"`):
            The flag that a command has for `split`, for messages.

    Returns:
        `datasets.Dataset`: the column `image` is `Image(decode=False)`; `objects`, if any, is a struct of lists, see
        [`~aligndet_hf.data.columns.objects_feature`]: `category` is 0..C-1, ids of a label file in their order. Rows
        of folders are in the order of the file names or of the label file.

    Raises:
        [`DataError`]: if the source or split does not exist, or for input that cannot be used. It names the file and
            line.
    """
    source = as_source(source)
    path = Path(source) if isinstance(source, Given) else unwrapped(source)
    reader, found = (None, {}) if isinstance(source, Given) else find_reader(path)
    roots = None  # the readers of files have looked themselves
    if isinstance(source, Given):
        dataset = _load_object(source, split, split_flag)
    elif reader is saved:
        dataset, roots = _joined(standard_objects(found, str(path)), split, path, split_flag), [path]
    elif reader is not None:
        names = list(found)
        chosen = names if path.is_file() and len(names) == 1 else _choose_splits(names, split, path, split_flag)
        if path.is_dir() and reader is not image_folder and Launch().is_main:
            print(f"{path}: read as {reader.NAME}. It has the splits {', '.join(names)}; used: {' + '.join(chosen)}.")
        dataset = build_dataset(reader.read(path, found, chosen, Path(image_dir) if image_dir else None), str(path))
    else:
        dataset, roots = _load_hub(str(source), split), door.hub_roots(source)
        if path.exists() and not _holds_images(dataset):
            raise DataError(
                f"{path}: there is no image in it, and no label file that names some is recognised. Give the folder "
                f"that holds both, or labels as {_formats()}."
            )
    if image_dir is not None and reader in (None, saved, image_folder, yolo):
        logger.warning("%s: image_dir has no effect: the images are looked for in the data set itself.", source)
    if labels and not len(dataset):
        raise DataError(f"{source}: there is no image in it{f', split {split!r}' if split else ''}.")
    if labels and reader is image_folder and "objects" not in dataset.column_names and not has_metadata(path):
        raise DataError(without_labels(path))
    require_columns(dataset, ["image"] + (["objects"] if labels else []), str(source))
    if dataset.format["type"] == "custom":
        logger.warning(
            "%s: its transform is not applied: the flags of views say how images are augmented, or, in Python, "
            "LabelledImages(..., augmentations=[...]).", source,
        )  # fmt: skip
    dataset = dataset.with_format(None)
    try:
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: column 'image' must hold an image in each row, its bytes or file, or an array [height, width, "
            f"3] of uint8; it is {dataset.features['image']} ({error})."
        ) from error
    if roots is not None:
        door.require_inside(dataset.data.column("image"), roots, str(source))  # those that are not selected as well
    return dataset


def _holds_images(dataset: datasets.Dataset) -> bool:
    """Whether a column holds images: as `datasets` marks them, or `image` their bytes, as other libraries write it."""
    image = dataset.features.get("image")
    content = image.get("bytes") if isinstance(image, dict) else image
    is_bytes = isinstance(content, datasets.Value) and content.dtype in ("binary", "large_binary")
    return is_bytes or any(isinstance(feature, datasets.Image) for feature in dataset.features.values())


def _formats() -> str:
    return ", ".join(reader.NAME for reader in READERS if reader not in (saved, image_folder))


def without_labels(folder: Path) -> str:
    """Why a folder of images has no labels, and what to do."""
    formats = _formats()
    if door.is_output(folder):
        return f"{folder}: no column 'objects'; this is what a command wrote. Give the folder of the labelled images."
    for part in sorted(folder.iterdir()):
        reader = find_reader(part)[0] if part.is_dir() else None
        if reader not in (None, saved, image_folder):
            return f"{folder}: no column 'objects'; there are labels in {part} ({reader.NAME}). Give that folder."
    stems = {image.stem for image in list_images(folder)}
    files = list(list_files(folder, *_LABEL_ENDINGS))
    files.sort(key=lambda file: file.suffix == ".txt" and file.stem not in stems)  # README.txt and the like last
    files = [str(file.relative_to(folder)) for file in files]
    if not files:
        return (
            f"{folder}: no column 'objects'; there are images in it and no file of labels. Give the folder that holds "
            f"both, or the label file and --image_dir. Formats: {formats}."
        )
    more = f" and {len(files) - 1} others" if len(files) > 1 else ""
    start = read_start(folder / files[0], _SHOWN_BYTES).decode("utf-8", "replace").strip().partition("\n")[0]
    expected = _EXPECTED.get(Path(files[0]).suffix.lower())
    return (
        f"{folder}: no column 'objects'; its files {files[0]}{more} are no labels in a format that is known ({formats}"
        f"; docs/labels.md has the layouts). {files[0]} begins with {door.printable(start)!r}"
        f"{f'; {expected}' if expected else ''}. Convert them, or correct what makes them unlike these."
    )


def has_unread_labels(folder: Path) -> bool:
    """Whether files in a folder of images look like labels in no known format; texts, if they are called as images."""
    stems = {image.stem for image in list_images(folder)}
    files = list_files(folder, *_LABEL_ENDINGS)
    return any(file.suffix.lower() != ".txt" or file.stem in stems for file in files)


def _load_object(source: Given, split: str | None, split_flag: str) -> datasets.Dataset:
    """A data set in memory in the form that [`load_dataset_source`] gives all of them."""
    if isinstance(source.value, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            f"{source}: a stream can only be read once and in order, which `pretrain` and `generate_proposals` do. "
            "Make a data set of it: datasets.Dataset.from_list(list(stream), features=stream.features)"
        )
    splits = dict(source.value) if isinstance(source.value, dict) else {"train": source.value}
    return _joined(
        standard_objects(splits, str(source)), split if isinstance(source.value, dict) else None, source, split_flag
    )


def is_local_images(source: str | Path) -> bool:
    """Whether a source is read by this module, from files: no data set of the Hub, and no copy of one."""
    return find_reader(source)[0] is not None


def recognised(source: str | Path) -> str:
    """What a source is taken for, in words."""
    if isinstance(source, Given):
        return "a data set in memory"
    reader, _ = find_reader(source)
    if reader is None and Path(source).expanduser().exists():
        return "no format of labels that is known, nor a folder of images: read as `datasets` reads it"
    return "a data set of the Hub" if reader is None else reader.NAME


def split_names(source: str | Path) -> list[str]:
    """
    The splits of a source, as [`load_dataset_source`] calls them.

    Raises:
        [`DataError`]: if there is no such source.
    """
    if isinstance(source, Given):
        return list(source.value) if isinstance(source.value, dict) else ["train"]
    _, found = find_reader(source)
    return list(found or _load_from_hub(str(source), None))


def category_names(dataset: datasets.Dataset, source: str | Path = "the data set") -> list[str]:
    """
    The names of the categories 0..C-1: of the `ClassLabel` feature, of `labels.json` in the folder `source`, or else
    the numbers themselves up to the largest one in use.

    Raises:
        [`DataError`]: if there is no column `objects` with a field `category`, no category in it, or one that is null.
    """
    require_columns(dataset, ["objects"], str(source))
    feature = dataset.features["objects"]
    category = feature.get("category") if isinstance(feature, dict) else None
    if not isinstance(category, (datasets.List, datasets.LargeList)):
        fields = ", ".join(feature) if isinstance(feature, dict) else feature
        raise DataError(
            f"{source}: column 'objects' must be a struct of lists with the fields 'bbox' and 'category', found "
            f"{fields}."
        )
    if isinstance(category.feature, datasets.ClassLabel):
        return category.feature.names
    names = read_labels(Path(source))
    if names is None:
        objects = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"]
        values, counts = read_values(objects, "category")
        if (is_null := ~np.isfinite(values.astype(np.float64))).any():
            row = np.repeat(np.arange(len(counts)), counts)[is_null][0]
            raise DataError(
                f"{source}, row {row}, column 'objects': a category is null or infinite, expected a number."
            )
        if not len(values):
            raise DataError(f"{source}: column 'objects', field 'category' is empty in all rows.")
        names = numbers_as_names(int(values.max()), str(source))
    return names


def load_labelled(
    source: str | Path, split: str | None = None, image_dir: str | Path | None = None, split_flag: str = "--split"
) -> tuple[datasets.Dataset, list[str], BoxReport]:
    """A data set with labels as [`load_dataset_source`] reads it, the names of its categories, and its validation."""
    source = as_source(source)
    dataset = load_dataset_source(source, split, labels=True, image_dir=image_dir, split_flag=split_flag)
    categories = category_names(dataset, source)
    return dataset, categories, validate_objects(dataset, categories, str(source))


def _joined(splits: Splits, split: str | None, source: str | Path, flag: str = "--split") -> datasets.Dataset:
    return datasets.concatenate_datasets([splits[name] for name in _choose_splits(list(splits), split, source, flag)])


def _choose_splits(available: list[str], split: str | None, source: str | Path, flag: str = "--split") -> list[str]:
    if split is None and len(available) == 1:
        return available
    split = str(split) if isinstance(split, datasets.NamedSplit) else split
    if not isinstance(split, str | None):
        raise DataError(f"{source}: a split must be text, several are joined as in 'train+test', got {split!r}.")
    chosen = split.split("+") if split else []
    if not chosen or not set(chosen) <= set(available):
        wrong = f"no split '{split}'" if split else "several splits"
        usual = split_of_folder(split or "train")  # as folders are read: `val` is `validation`
        same = [name for name in available if split_of_folder(name) == usual]
        near = same or difflib.get_close_matches(split or "train", available, 1)
        raise DataError(
            f"{source}: {wrong}; found {', '.join(sorted(available))}. "
            f"Give {' '.join([flag, *near[:1]]) if near else f'one of them as {flag}'}, or several joined by '+'."
        )
    return chosen


def _load_from_hub(source: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """What `load_dataset` makes of a Hub id, a local folder of the files of a data repository, or one of its files."""
    path, name, options = Path(source).expanduser(), source, {}
    if path.is_file() and path.suffix.lower() in (".parquet", ".arrow"):
        name, options = path.suffix.lower()[1:], {"data_files": {split or "train": str(path)}}
    elif path.is_file():
        raise DataError(
            f"{source}: expected a folder, a COCO file ending in .json, or a table of boxes (.csv, .parquet). Give "
            "the folder of the images, of an archive the folder that it unpacks to."
        )
    try:
        return datasets.load_dataset(name, split=split, **options)
    except (OSError, ValueError) as error:  # includes everything that datasets and the Hub raise for a missing one
        here = "it holds no images and no label files"
        if not path.exists():
            here = f"there is no such file or folder here{similar_path(source)}"
        raise DataError(
            f"Cannot load '{source}' (split {split or 'not given'}): {here}, and as a data set of the Hub: {error}"
        ) from error


def _load_hub(source: str, split: str | None) -> datasets.Dataset:
    loaded = _load_from_hub(source, split)
    if isinstance(loaded, datasets.DatasetDict):
        return _joined(standard_objects(dict(loaded), source), None, source)
    # Categories without names count as far as in all splits, which `load_dataset` has fetched anyway.
    others = dict(_load_from_hub(source, None)) if has_numbers_only(loaded) else {}
    return standard_objects(others | {split: loaded}, source)[split]
