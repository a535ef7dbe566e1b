"""
Shards of proposals in a folder of unfinished work, and the data set that they become: what `aligndet proposals` and
`aligndet clusters` share. Whatever is written is complete or not there.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import embed_table_storage, table_cast
from tqdm.auto import tqdm

from ..files import file_hash, read_json, seal_file, write_json
from ..runs import Interrupted, RunFolder
from .columns import RECORD_MARK, proposals_feature
from .door import image_bytes
from .errors import DataError
from .splits import Splits

REPORT = "proposals.json"

_ROWS_IN_MEMORY = 16  # photographs of 20 megapixels take some 10 MB each
_ROWS_AT_ONCE = 128  # between two mappings of a file into memory, see `reopened`
_BATCH_BYTES = 8_000_000  # of a record batch: each that is mapped costs some memory, however small it is
_FILE_BYTES = 500_000_000  # of a file of the output, as `save_to_disk` has it


# ---- shards ----


class Shard(NamedTuple):
    """The rows `start` to `stop` of a split, and the file for their proposals."""

    split: str
    start: int
    stop: int
    path: str


def make_shards(sources: Splits, work: Path, shard_size: int, settings: dict) -> list[Shard]:
    """
    Cuts the splits into shards of at most `shard_size` rows, with files in the folder `work`.

    The names of the files have a hash of the settings, so that no other run's shard is ever taken for one of these.
    """
    key = settings_hash(settings)
    return [
        Shard(name, start, min(start + shard_size, len(source)), str(work / f"{name}-{start:09d}-{key}.arrow"))
        for name, source in sources.items()
        for start in range(0, len(source), shard_size)
    ]


def settings_hash(settings: dict) -> str:
    """What tells settings from others: 12 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()


def write_shard(shard: Shard, rows: list[dict], with_clusters: bool = False) -> None:
    """
    Writes the file of a shard, at once and complete.

    Args:
        shard ([`Shard`]): The shard.
        rows (`list[dict]`): One per image: `{"proposals": {"bbox", "score", ...}}` or, for an image that cannot be
            read, `{"file", "reason"}`.
        with_clusters (`bool`, *optional*, defaults to `False`): Whether the proposals have the field `cluster`.
    """
    part = Path(f"{shard.path}.{os.getpid()}.part")
    schema = pa.schema([*_features(with_clusters).arrow_schema, ("file", pa.string()), ("reason", pa.string())])
    table = pa.Table.from_pylist(rows, schema=schema)
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    seal_file(part, Path(shard.path))


def _features(with_clusters: bool) -> datasets.Features:
    return datasets.Features({"proposals": proposals_feature(with_clusters)})


# ---- the output ----


def join_proposals(
    sources: Splits, shards: list[Shard], work: Path, report: dict, with_clusters: bool = False
) -> Splits:
    """
    Joins every split with the proposals of its shards.

    Args:
        sources (`dict[str, datasets.Dataset]`): The splits; a column `proposals` that they have is replaced.
        shards (`list[Shard]`): All shards, in order, each with its file (see [`write_shard`]).
        work (`Path`): Folder for the joined columns.
        report (`dict`): Gets the `statistics` of the splits and what was `skipped`; its other entries are recorded in
            the descriptions of the splits.
        with_clusters (`bool`, *optional*, defaults to `False`): Whether the proposals have the field `cluster`.

    Returns:
        `dict[str, datasets.Dataset]`: the splits.
    """
    results = {}
    for name, source in sources.items():
        own = [shard for shard in shards if shard.split == name]
        source = source.remove_columns([column for column in source.column_names if column == "proposals"])
        results[name] = _with_proposals(source, own, work / f"{name}.arrow", report, with_clusters)
    for name, result in results.items():
        record = {key: report[key] for key in ("settings", "versions")} | {"statistics": report["statistics"][name]}
        description = result.info.description.split(RECORD_MARK)[0].rstrip()
        result.info.description = f"{description}\n\n{RECORD_MARK}{json.dumps(record)}".lstrip()
    return results


def _with_proposals(
    source: datasets.Dataset, shards: list[Shard], path: Path, report: dict, with_clusters: bool
) -> datasets.Dataset:
    """
    Joins a split with the proposals of its shards; rows whose image cannot be read are left out, and reported.

    The proposals are copied shard by shard into one file at `path`, from where they are mapped into memory. The column
    is joined to the table: a `map` that touches the images would encode them anew.
    """
    split, features = shards[0].split, _features(with_clusters)
    kept, counts = [], []

    def found():
        for shard in shards:
            with pa.memory_map(shard.path) as part:
                table = pa.ipc.open_stream(part).read_all()
            for row, name, reason in zip(
                range(shard.start, shard.stop), table["file"].to_pylist(), table["reason"].to_pylist(), strict=True
            ):
                if reason is None:
                    kept.append(row)
                else:
                    report["skipped"].append({"split": split, "row": row, "file": name, "reason": reason})
            table = table.filter(pc.is_null(table["reason"])).select(["proposals"]).cast(features.arrow_schema)
            counts.extend(pc.list_value_length(pc.struct_field(table["proposals"], "score")).to_pylist())
            yield table

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
        for table in _merged(found()):
            writer.write_table(table)
    if not kept:
        raise DataError(
            f"None of the {len(source)} images of the split '{split}' can be read. {report['skipped'][-1]['reason']}"
        )
    report["statistics"][split] = {
        "images": len(kept),
        "skipped_images": len(source) - len(kept),
        "images_without_boxes": counts.count(0),
        "boxes_per_image": {
            "min": min(counts),
            "median": float(np.median(counts)),
            "mean": round(float(np.mean(counts)), 2),
            "max": max(counts),
        },
    }
    # Ranges, not a list of rows: that would make `datasets` copy the images into a cache.
    runs = np.split(np.array(kept), np.flatnonzero(np.diff(kept) > 1) + 1)
    source = datasets.concatenate_datasets([source.select(range(run[0], run[-1] + 1)) for run in runs])
    return datasets.concatenate_datasets(
        [source.cast_column("image", datasets.Image()), datasets.Dataset.from_file(str(path))],
        axis=1,
        split=datasets.NamedSplit(split) if split.isidentifier() else None,
    )


def put_in_place(results: Splits, report: dict, folder: RunFolder) -> None:
    """Saves the splits and the report in a folder of work, and makes it the output at once."""
    complete = folder.work / "dataset"
    shutil.rmtree(complete, ignore_errors=True)  # of a run that was killed just here
    for name, result in results.items():
        save_split(result, complete / name if len(results) > 1 else complete)
    if len(results) > 1:
        write_json(complete / "dataset_dict.json", {"splits": list(results)})
    write_json(complete / REPORT, report)
    folder.put_in_place(complete)


def save_split(dataset: datasets.Dataset, folder: Path) -> None:
    """
    Does what `dataset.save_to_disk` does, a few images at a time: that holds up to 1000 of them in memory.

    Args:
        dataset (`datasets.Dataset`): Any; files that its images are in are embedded.
        folder (`Path`): The folder, for `datasets.load_from_disk`.
    """
    folder.mkdir(parents=True)
    schema, files = dataset.features.arrow_schema, []
    batches = _merged(_embedded(dataset))
    for first in batches:
        files.append(f"data-{len(files):05d}.arrow")
        with pa.OSFile(str(folder / files[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(first)
            while file.tell() < _FILE_BYTES and (batch := next(batches, None)) is not None:
                writer.write_table(batch)
    dataset.info.write_to_directory(str(folder))
    fingerprint = hashlib.blake2b(str(dataset.features).encode(), digest_size=8)  # of the content, not of its history
    for name in files:
        fingerprint.update(file_hash(folder / name).encode())
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint.hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None if dataset.split is None else str(dataset.split),
    }
    write_json(folder / "state.json", state)


def _embedded(dataset: datasets.Dataset) -> Iterator[pa.Table]:
    """The rows of a data set, a few at a time, with their images."""
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        part = reopened(dataset, range(start, min(start + _ROWS_AT_ONCE, len(dataset))))
        for table in part.with_format("arrow").iter(_ROWS_IN_MEMORY):
            yield embed_table_storage(table_cast(table, dataset.features.arrow_schema))


def _merged(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer tables, of one record batch each."""
    parts = []
    for table in tables:
        parts.append(table)
        if sum(part.nbytes for part in parts) >= _BATCH_BYTES:
            yield pa.concat_tables(parts).combine_chunks()
            parts = []
            pa.default_memory_pool().release_unused()  # Arrow would keep it
    if parts:
        yield pa.concat_tables(parts).combine_chunks()


# ---- the folders ----


def data_folder(arguments, command: str, kept: Iterable[str] = (), **options) -> RunFolder:
    """
    The folder of a command that makes a data set: the work is done in `<output_dir>.partial`.

    Args:
        arguments: With `output_dir` and `overwrite_output_dir`.
        command (`str`): The command.
        kept (`Iterable[str]`, *optional*): What it goes on from, beside shards.
        options: `on_main`, see [`RunFolder`].
    """
    return RunFolder(
        arguments.output_dir,
        command,
        kept=["*-[0-9]*.arrow", *kept],
        overwrite=arguments.overwrite_output_dir,
        aside=True,
        **options,
    )


@contextlib.contextmanager
def telling_progress(shards: list[Shard]):
    """Context in which a signal is told with the number of images that are done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        done = sum(shard.stop - shard.start for shard in shards if os.path.exists(shard.path))
        raise Interrupted(
            f"Stopped after {done} of {sum(shard.stop - shard.start for shard in shards)} images, which are kept. Run "
            "the same command again to go on.",
            getattr(stop, "signal", signal.SIGINT),
        ) from None


@contextlib.contextmanager
def writing_to(folder: Path):
    """What fails for want of space or permission in a folder, or in those beside it that have its name, says so."""
    try:
        yield
    except ChildProcessError:
        raise
    except OSError as error:
        if not _is_of_writing(error, str(folder)):
            raise
        raise DataError(
            f"Cannot write to {folder.parent}: {error}. Choose another output_dir or, if the disk was full, make room "
            "and run the same command again: what is finished is kept."
        ) from error


def _is_of_writing(error: OSError, folder: str) -> bool:
    """Whether an error is one of writing a folder; all others say by themselves what could not be read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    if error.errno is None:  # transformers tells so what a model lacks
        return False
    name = str(error.filename or "")
    return name.startswith(folder) or bool(name and folder.startswith(name)) or (not name and folder in str(error))


def require_all(paths: list[Path]) -> None:
    """
    Checks that the files of all shards are there.

    Raises:
        [`DataError`]: another machine has not written its shards here.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards are not there, such as {missing[0]}: all machines must see the "
            "same output_dir."
        )


def read_report(folder: Path) -> dict:
    """The content of `proposals.json`; nothing if there is none."""
    return read_json(folder / REPORT) or {}


# ---- files ----


def content_hash(dataset: datasets.Dataset, disable_tqdm: bool = True) -> str:
    """
    A hash of the content of a dataset: the bytes of its images, wherever they are stored, and all other columns.

    Args:
        dataset (`datasets.Dataset`): With the column `image`, not decoded.
        disable_tqdm (`bool`, *optional*, defaults to `True`): Whether to show no progress bar.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    with tqdm(total=len(dataset), desc="reading images", unit="image", leave=False, disable=disable_tqdm) as progress:
        for start in range(0, len(dataset), _ROWS_AT_ONCE):
            rows = range(start, min(start + _ROWS_AT_ONCE, len(dataset)))
            for batch in reopened(dataset, rows).with_format("arrow").iter(_ROWS_IN_MEMORY):
                for value in batch["image"]:
                    content = hashlib.blake2b(_image_bytes(value.as_py()), digest_size=16)
                    digest.update(content.digest())
                    progress.update()
                for name in batch.column_names:
                    if name != "image":
                        digest.update(name.encode())
                        _digest_values(digest, batch[name].combine_chunks())
    return digest.hexdigest()


def _digest_values(digest, values: pa.Array) -> None:
    """Adds values to a hash, not what they happen to lie in: boxes are too many to become Python objects."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    digest.update(f"{kind} {len(values)} ".encode())
    if pa.types.is_struct(kind):
        digest.update(np.asarray(values.is_valid()).tobytes())
        for field in values.flatten():
            _digest_values(digest, field)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(np.asarray(pc.fill_null(pc.list_value_length(values), -1), dtype=np.int64).tobytes())
        _digest_values(digest, values.flatten())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(np.asarray(values.is_valid()).tobytes())
        digest.update(pc.fill_null(values, 0).to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(repr(values.to_pylist()).encode())


def _image_bytes(value: dict | None) -> bytes:
    """The stored bytes; of an image that cannot be read, its path. The search will tell why it cannot."""
    value = value or {"bytes": None, "path": ""}
    try:
        return image_bytes(value)
    except DataError:
        return value["path"].encode()


def reopened(dataset: datasets.Dataset, rows: range) -> datasets.Dataset:
    """
    Some rows of a data set, whose files are mapped into memory anew.

    What was read through a mapping counts as memory of this process as long as the mapping is there.
    """
    part = dataset.select(rows)
    return pickle.loads(pickle.dumps(part)) if part.cache_files else part


def write_arrow(dataset: datasets.Dataset, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, dataset.features.arrow_schema) as writer:
        writer.write_table(dataset.data.table, max_chunksize=1000)
