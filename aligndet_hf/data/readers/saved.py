"""Folders that `save_to_disk` of `datasets` wrote."""

from pathlib import Path

import datasets

from .spellings import standard_objects

NAME = "save_to_disk"


def recognise(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def split_names(path: Path) -> list[str]:
    """The splits, as they were saved."""
    return list(_load(path))


def load(path: Path) -> dict[str, datasets.Dataset]:
    """All splits, their labels in our form."""
    return standard_objects(_load(path), str(path))


def _load(path: Path) -> dict[str, datasets.Dataset]:
    saved = datasets.load_from_disk(str(path))
    return {str(saved.split or "train"): saved} if isinstance(saved, datasets.Dataset) else dict(saved)
