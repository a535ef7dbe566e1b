"""Shards of streams: rows are stored as they come, to be searched at once and put together at the end."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import embed_table_storage, table_cast

from ..files import is_sound, read_json, seal_file, write_json
from .errors import DataError
from .launch import Launch
from .shards import Shard, settings_hash, write_arrow
from .splits import Splits
from .streaming import read_shard


def read_streams(
    streams: dict[str, datasets.IterableDataset], work: Path, shard_size: int, settings: dict, launch: Launch
) -> Iterator[Shard]:
    """Stores the rows of the shards that this process has to search and that are not searched yet, and yields them."""
    key = settings_hash(settings)
    for name, stream in streams.items():
        for part in range(stream.num_shards):
            yield from _read_part(stream, name, part, work, shard_size, key, launch)


def _read_part(
    stream: datasets.IterableDataset, name: str, part: int, work: Path, shard_size: int, key: str, launch: Launch
) -> Iterator[Shard]:
    # A part of the stream is read by one process or, where there are not enough of them, by all.
    is_shared = stream.num_shards < launch.size
    if not is_shared and part % launch.size != launch.rank:
        return
    number = next(number for number in itertools.count() if not _is_done(_shard_path(work, name, part, number, key)))
    end = work / f"{name}-{part:05d}-{key}.json"
    if (known := read_json(end)) and number >= known["shards"]:
        return
    rows = (table for _, table in read_shard(stream, part, number * shard_size))
    while tables := list(itertools.islice(rows, shard_size)):
        path = _shard_path(work, name, part, number, key)
        if not _is_done(path) and (not is_shared or number % launch.size == launch.rank):
            table = table_cast(pa.concat_tables(tables), stream.features.arrow_schema)
            unfinished = path.with_suffix(".part")
            write_arrow(datasets.Dataset(embed_table_storage(table)), unfinished)
            seal_file(unfinished, path.with_suffix(".rows"))
            yield Shard(name, 0, len(tables), str(path))
        number += 1
    if not is_shared or launch.rank == 0:
        write_json(end, {"shards": number})


def _is_done(path: Path) -> bool:
    """Whether the boxes of a shard are there, and its rows."""
    return is_sound(path) and is_sound(path.with_suffix(".rows"))


def _shard_path(work: Path, name: str, part: int, number: int, key: str) -> Path:
    return work / f"{name}-{part:05d}-{number:09d}-{key}.arrow"


def read_rows(streams: dict[str, datasets.IterableDataset], work: Path, settings: dict) -> tuple[Splits, list[Shard]]:
    """The stored rows of all shards, in the order of the streams, and the shards with the numbers of these rows."""
    sources, shards, key = {}, [], settings_hash(settings)
    for name, stream in streams.items():
        start, path = 0, work / f"{name}-input.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, stream.features.arrow_schema) as writer:
            for part in range(stream.num_shards):
                end = read_json(work / f"{name}-{part:05d}-{key}.json") or {"shards": 1}
                for number in range(end["shards"]):
                    shard = _shard_path(work, name, part, number, key)
                    rows = 0
                    if shard.exists():
                        with pa.memory_map(str(shard.with_suffix(".rows"))) as stored:
                            for batch in pa.ipc.open_stream(stored):
                                writer.write_batch(batch)
                                rows += len(batch)
                    shards.append(Shard(name, start, start + rows, str(shard)))
                    start += rows
        if not any(shard.split == name for shard in shards):
            raise DataError(f"The split '{name}' of the stream has no rows.")
        sources[name] = datasets.Dataset.from_file(str(path), split=datasets.NamedSplit(name))
    return sources, shards
