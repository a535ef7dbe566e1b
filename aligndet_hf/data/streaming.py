"""Data sets that are read as a stream: of the Hub, or of the files of a data repository."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa

from ..objects import Given
from .columns import require_columns
from .door import hub_roots, require_inside
from .errors import DataError
from .formats import is_local_images, load_dataset_source, split_names

_ROWS_AT_ONCE = 16
_LOCAL_SHARDS = 64  # that data which lies on this machine is cut into


def is_stream(source) -> bool:
    """Whether a source is a stream in memory, or several, by split."""
    return isinstance(getattr(source, "value", None), datasets.IterableDataset | datasets.IterableDatasetDict)


def load_stream(source: str | Path, split: str) -> tuple[datasets.IterableDataset, str]:
    """
    Opens a data set as a stream.

    Args:
        source (`str` or `Path`): A Hub id, a folder of the files of a data repository (parquet, arrow, ...), or
            anything else that [`load_dataset_source`] takes.
        split (`str`): The split.

    Returns:
        `tuple`: the stream, its column `image` as `Image(decode=False)`, and what tells its content from another one
        at the same place: a hash of the names of its files with their commits, or times of change.

    Raises:
        [`DataError`]: if there is no such source, split or column.
    """
    is_remote = not isinstance(source, Given) and not is_local_images(source)
    if isinstance(source, Given):
        value = source.value[split] if isinstance(source.value, dict) else source.value
        stream = value if isinstance(value, datasets.IterableDataset) else value.to_iterable_dataset(_LOCAL_SHARDS)
        version = str(source)
    elif not is_remote:
        dataset = load_dataset_source(source, split)
        stream, version = dataset.to_iterable_dataset(min(len(dataset), _LOCAL_SHARDS)), dataset._fingerprint
    else:
        try:
            builder = datasets.load_dataset_builder(str(source))
            stream = builder.as_streaming_dataset(split=split)
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot stream '{source}' (split {split}): {error}") from error
        files = (builder.config.data_files or {}).get(split, [])
        version = repr([[str(file) for file in files], getattr(files, "origin_metadata", None)])
    if stream.column_names is None:
        raise DataError(f"{source}: its columns are not known before it is read; convert it to parquet.")
    require_columns(stream, ["image"], str(source))
    digest = hashlib.blake2b(version.encode(), digest_size=16).hexdigest()
    stream = stream.cast_column("image", datasets.Image(decode=False))
    if is_remote:
        own = partial(_own_images, roots=hub_roots(source), source=str(source))
        stream = stream.with_format("arrow").map(own, batched=True, batch_size=_ROWS_AT_ONCE, features=stream.features)
    return stream, digest


def _own_images(table: pa.Table, roots: list, source: str) -> pa.Table:
    """Rows of a stream as they are, if their images are in the data set: see [`~aligndet_hf.data.door`]."""
    require_inside(table["image"], roots, source)
    return table


def stream_splits(source: str | Path) -> list[str]:
    """
    The splits of a source, without downloading it.

    Raises:
        [`DataError`]: if there is no such source, or one that is not downloaded anyway.
    """
    if isinstance(source, Given):
        return split_names(source)
    if is_local_images(source):
        raise DataError(
            f"{source} lies on this machine, where images are read as they are needed: leave out --streaming."
        )
    try:
        return datasets.get_dataset_split_names(str(source))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot stream '{source}': {error}") from error


def first_rows(stream: datasets.IterableDataset, count: int) -> datasets.Dataset:
    """The first `count` rows of a stream, in memory."""
    tables = list(stream.take(count).with_format("arrow").iter(_ROWS_AT_ONCE))
    if not tables:
        raise DataError("The stream has no rows.")
    return datasets.Dataset(pa.concat_tables(tables), info=datasets.DatasetInfo(features=stream.features))


def read_shard(stream: datasets.IterableDataset, shard: int, start: int = 0) -> Iterator[tuple[int, pa.Table]]:
    """
    Yields (row number in the shard, table of that one row) of one shard of a stream, from the row `start` on.

    Whatever process and worker this is: `datasets` itself would share the rows out over the workers of a loader.
    """
    part = stream.shard(num_shards=stream.num_shards, index=shard).with_format("arrow")
    first = 0
    for table in part.iter(_ROWS_AT_ONCE):
        for row in range(max(start, first), first + len(table)):
            yield row, table.slice(row - first, 1)
        first += len(table)
