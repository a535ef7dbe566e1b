"""The splits that proposals are searched in, with all their columns in files that all processes map."""

from pathlib import Path

import datasets

from .proposal_files import import_proposals
from .shards import write_arrow
from .splits import Splits


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
