"""What a stage reads: hashes of the content of local files and folders that its settings name."""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import DataError
from ..data.formats import load_dataset_source, split_names
from ..data.shards import content_hash
from ..detectors.backbone_weights import read_weights
from ..detectors.backbones import find_backbone
from ..detectors.build import backbone_source
from ..files import file_hash
from ..flags import names_of
from ..runs import RECORD

if TYPE_CHECKING:
    from .stages import Stage

_LABEL_FILES = {".json", ".jsonl", ".csv", ".parquet", ".yaml", ".yml", ".txt", ".xml"}


def inputs_of(stage: "Stage", arguments: type) -> dict[str, str]:
    """
    What a stage reads, beside its settings.

    Args:
        stage ([`Stage`]): The stage.
        arguments (`type`): The dataclass of its command.

    Returns:
        `dict[str, str]`: by the name of the flag and the path, a hash: of the record of an earlier stage, else of the
        content. What is not there, or on the Hub, is left out.
    """
    hashes = {}
    for name in sorted(names_of(arguments, "result", "data", "start") & stage.settings.keys()):
        values = stage.settings[name]
        for value in values if isinstance(values, list) else [values]:
            path = Path(value).expanduser() if isinstance(value, str) and value else None
            if path is None or name.endswith("split") or not path.exists():
                continue
            made = next(
                (need.folder for need in stage.needs if path.absolute().is_relative_to(need.folder.absolute())), None
            )
            if made is not None:
                record = made / RECORD
                hashes[f"{name} {value}"] = file_hash(record) if record.is_file() else ""
            else:
                image_dir = stage.settings.get(name.replace("dataset", "image_dir"))
                hashes[f"{name} {value}"] = path_hash(path, image_dir if name != "image_dir" else None)
    return hashes


def require_weights(parsed: Mapping["Stage", Any], variables: Mapping[str, Any]) -> None:
    """
    Refuses a pipeline whose backbones cannot get their weights, before hours of work that do not need them yet.

    Args:
        parsed (`Mapping[Stage, Any]`): The stages that will run, with the arguments of their commands.
        variables (`Mapping`): The variables of the pipeline, for the fix that the message names.

    Raises:
        ValueError: weights are not there, cannot be read, or cannot be downloaded. The message names the stage.
    """
    made = [stage.folder.absolute() for stage in parsed]
    known = set()
    for stage, arguments in parsed.items():
        found = backbone_source(arguments)
        if found is None or found in known or any(_is_in(source, made) for source in found if source):
            continue
        known.add(found)
        backbone, weights = found
        try:
            config = find_backbone(backbone)
            if weights or config._name_or_path:
                read_weights(config, weights or config._name_or_path)
        except (OSError, ValueError) as error:
            flag, given = ("backbone_weights", weights) if weights else ("backbone", backbone)
            names = [name for name, value in variables.items() if value == given] or [f"{stage.name}.{flag}"]
            raise ValueError(f"stage {stage.name!r}: {error}. Here that is --set {names[0]}=...") from error


def _is_in(source: str, folders: list[Path]) -> bool:
    return any(Path(source).expanduser().absolute().is_relative_to(folder) for folder in folders)


def path_hash(path: Path, image_dir: str | None = None) -> str:
    """A hash of the content of a file, of a label file with its images, or of a folder with all that is in it."""
    if path.is_dir():
        found = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    else:
        found = [path]
    states = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.is_file())
    return _content(path, image_dir, states)


@functools.lru_cache(maxsize=256)
def _content(path: Path, image_dir: str | None, states: tuple[tuple[str, int, int], ...]) -> str:
    """The hash of files, which is not computed again while their `states` are the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, *_ in states:
        digest.update(f"{os.path.relpath(name, path)} {file_hash(name)} ".encode())
    if path.is_file() and path.suffix.lower() in _LABEL_FILES:
        try:
            for split in split_names(path):
                images = load_dataset_source(path, split, image_dir=image_dir)
                digest.update(f"{split} {content_hash(images)} ".encode())
        except DataError:
            pass  # its command tells what is wrong
    return digest.hexdigest()
