"""The splits that proposals are searched in: opened, and with all their columns in files that all processes map."""

from pathlib import Path

import datasets

from .columns import require_columns
from .errors import DataError
from .formats import load_dataset_source, split_names
from .proposal_files import import_proposals
from .shards import write_arrow
from .splits import Splits
from .streaming import load_stream, stream_splits


def load_inputs(
    dataset: str, split: str | None, *, streaming: bool, image_dir: str | None, column: str | None, tell: bool
) -> Splits | dict[str, datasets.IterableDataset]:
    """
    Opens the splits to search; an earlier column `proposals` stays only if it is the source.

    Args:
        dataset (`str`): The data set.
        split (`str`, *optional*): The split; all by default.
        streaming (`bool`): Whether to open streams.
        image_dir (`str`, *optional*): Folder of the images of a label file.
        column (`str`, *optional*): The column that the source reads.
        tell (`bool`): Whether to print that a column is replaced.

    Raises:
        [`DataError`]: a split or the column is not there, or a split is empty.
    """
    if split is not None:
        names = [split]
    else:
        names = stream_splits(dataset) if streaming else split_names(dataset)
    sources = {}
    for name in names:
        if streaming:
            source, _ = load_stream(dataset, name)
        else:
            source = load_dataset_source(dataset, name, image_dir=image_dir)
            if len(source) == 0:
                raise DataError(f"{dataset}: the split '{name}' has no rows.")
        if column is not None:
            require_columns(source, [column], f"{dataset}, split '{name}'")
        if "proposals" in source.column_names and column != "proposals":
            if tell:
                print(f"{dataset}: the column 'proposals' of the split '{name}' is replaced.")
            source = without_proposals(source)
        sources[name] = source
    return sources


def without_proposals(source: datasets.Dataset) -> datasets.Dataset:
    """The data set without a column `proposals`."""
    return source.remove_columns([name for name in source.column_names if name == "proposals"])


def write_inputs(sources: Splits, work: Path, proposals_file: str | None) -> None:
    """Writes what only the memory of this process holds to files: paths of images, and imported boxes."""
    for name, source in sources.items():
        if not source.cache_files:
            write_arrow(source, work / f"{name}-input.arrow")
    if proposals_file is not None:
        for name, column in import_proposals(proposals_file, sources).items():
            write_arrow(column, work / f"{name}-imported.arrow")


def mapped_inputs(sources: Splits, work: Path, *, with_imported: bool) -> Splits:
    """The splits with all their columns in files, as [`write_inputs`] has written them."""
    mapped = {}
    for name, source in sources.items():
        if not source.cache_files:
            source = datasets.Dataset.from_file(str(work / f"{name}-input.arrow"), source.info, source.split)
        if with_imported:
            imported = datasets.Dataset.from_file(str(work / f"{name}-imported.arrow"))
            source = datasets.concatenate_datasets([source, imported], axis=1)
        mapped[name] = source
    return mapped
