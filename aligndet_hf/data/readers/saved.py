"""Folders that `save_to_disk` of `datasets` wrote."""

from pathlib import Path

import datasets

from ..splits import Splits

NAME = "save_to_disk"


def find(path: Path) -> Splits:
    """The splits of a folder that `save_to_disk` wrote, as they were saved."""
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return {}
    saved = datasets.load_from_disk(str(path))
    return {str(saved.split or "train"): saved} if isinstance(saved, datasets.Dataset) else dict(saved)
