"""
Shards of proposals in a folder of unfinished work, and the data set that they become: what `aligndet proposals` and
`aligndet clusters` share. Whatever is written is complete or not there.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import embed_table_storage, table_cast
from tqdm.auto import tqdm

from ..files import write_json
from .columns import RECORD_MARK, proposals_feature
from .door import read_bytes
from .errors import DataError

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


def make_shards(sources: dict[str, datasets.Dataset], work: Path, shard_size: int) -> list[Shard]:
    """Cuts the splits into shards of at most `shard_size` rows, with files in the folder `work`."""
    return [
        Shard(name, start, min(start + shard_size, len(source)), str(work / f"{name}-{start:09d}.arrow"))
        for name, source in sources.items()
        for start in range(0, len(source), shard_size)
    ]


def write_shard(shard: Shard, rows: list[dict], with_clusters: bool = False) -> None:
    """
    Writes the file of a shard, at once and complete.

    Args:
        shard ([`Shard`]): The shard.
        rows (`list[dict]`): One per image: `{"proposals": {"bbox", "score", ...}}` or, for an image that cannot be
            read, `{"file", "reason"}`.
        with_clusters (`bool`, *optional*, defaults to `False`): Whether the proposals have the field `cluster`.
    """
    part = f"{shard.path}.{os.getpid()}.part"
    schema = pa.schema([*_features(with_clusters).arrow_schema, ("file", pa.string()), ("reason", pa.string())])
    table = pa.Table.from_pylist(rows, schema=schema)
    with pa.OSFile(part, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(part, shard.path)


def _features(with_clusters: bool) -> datasets.Features:
    return datasets.Features({"proposals": proposals_feature(with_clusters)})


# ---- the output ----


def join_proposals(
    sources: dict[str, datasets.Dataset], shards: list[Shard], work: Path, report: dict, with_clusters: bool = False
) -> dict[str, datasets.Dataset]:
    """
    Joins every split with the proposals of its shards.

    Args:
        sources (`dict[str, datasets.Dataset]`): The splits, without the column `proposals`.
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


def put_in_place(results: dict[str, datasets.Dataset], report: dict, work: Path, output: Path) -> None:
    """Saves the splits and the report in the folder `work`, moves them to `output` at once, and removes `work`."""
    complete = work / "dataset"
    shutil.rmtree(complete, ignore_errors=True)  # of a run that was killed just here
    for name, result in results.items():
        save_split(result, complete / name if len(results) > 1 else complete)
    if len(results) > 1:
        write_json(complete / "dataset_dict.json", {"splits": list(results)})
    write_json(complete / REPORT, report)
    if output.exists():
        os.replace(output, work / "replaced")
    os.replace(complete, output)
    shutil.rmtree(work)


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
    batch = next(batches, None)
    while batch is not None:
        files.append(f"data-{len(files):05d}.arrow")
        with pa.OSFile(str(folder / files[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while batch is not None and file.tell() < _FILE_BYTES:
                writer.write_table(batch)
                batch = next(batches, None)
    dataset.info.write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": dataset._fingerprint,
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


def is_finished(output: Path, settings: dict, overwrite: bool) -> bool:
    """Whether the output is there and right; raises if something else is there."""
    if (output / REPORT).is_file():
        differences = _differences(read_report(output)["settings"], settings)
        if differences and not overwrite:
            raise DataError(
                f"{output} holds proposals of other settings ({differences}). Replace them with --overwrite, or "
                "choose another output_dir."
            )
        return not differences
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise DataError(f"{output} exists and was not written by this command. Choose another output_dir.")
    return False


def open_work_folder(work: Path, state: dict, overwrite: bool) -> None:
    """Makes the folder of unfinished work, or continues that of a former run with the same settings."""
    record = work / "run.json"
    if record.is_file():
        differences = _differences(json.loads(record.read_text(encoding="utf-8")), state)
        if not differences:
            return
        finished = any(work.glob("*-" + "[0-9]" * 9 + ".arrow"))  # see `make_shards`
        if finished and not overwrite:
            raise DataError(
                f"{work} holds an unfinished run with other settings ({differences}). Continue it with those, or "
                "start anew with --overwrite."
            )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(record, state)


@contextlib.contextmanager
def writing_to(folder: Path):
    try:
        yield
    except ChildProcessError:
        raise
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # transformers tells so what a model lacks
            raise
        raise DataError(
            f"Cannot write to {folder}: {error}. Choose another output_dir or, if the disk was full, make room and "
            "run the same command again: what is finished is kept."
        ) from error


def read_report(folder: Path) -> dict:
    """The content of `proposals.json`; nothing if there is none."""
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _differences(before: dict, now: dict) -> str:
    """What differs, for a message; empty if nothing does."""
    before, now = _flat(before), _flat(json.loads(json.dumps(now)))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)} then, {now.get(key)} now" for key in keys)


def _flat(settings: dict) -> dict:
    """Settings without nesting: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat = {}
    for key, value in settings.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": entry for name, entry in inner.items()}
    return flat


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
                digest.update(repr(batch.drop_columns(["image"]).to_pylist()).encode())
    return digest.hexdigest()


def _image_bytes(value: dict | None) -> bytes:
    """The stored bytes; of an image that cannot be read, its path. The search will tell why it cannot."""
    value = value or {"bytes": None, "path": ""}
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return read_bytes(value["path"])
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
