"""
Checkpoints of pre-training and fine-tuning: written under another name, synced, checksummed, renamed into place.

A checkpoint is a folder `checkpoint-<step>` with the model's tensors under their exact names (`model.safetensors`),
what else training needs, the state of the run (`trainer_state.json`), and the size and checksum of all these files
(`checksums.json`). One that was damaged since is named, set aside, and the last sound one taken. Nothing is loaded
that could run code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers.utils import logging

from ..files import UNFINISHED, clear_write_errors, file_hash, remove, sync, sync_folder

logger = logging.get_logger(__name__)

MODEL, OPTIMIZER, STATE, CHECKSUMS = "model.safetensors", "optimizer.pt", "trainer_state.json", "checksums.json"
# What a checkpoint is called, and one that was damaged.
CHECKPOINTS, DAMAGED = "checkpoint-[0-9]*", "damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and the content of its `trainer_state.json`."""

    path: Path
    state: dict

    def load(self, model: nn.Module) -> dict:
        """Load the weights into `model` (every tensor, by its exact name) and return the optimizer's state."""
        load_model(model, self.path / MODEL, strict=True)
        return torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True)


def save_checkpoint(
    output_dir: str | Path,
    model: nn.Module,
    optimizer_state: dict,
    state: dict,
    keep: int = 2,
    export: Callable[[Path], None] | None = None,
) -> Path:
    """
    Write `output_dir/checkpoint-<step>`, then remove all but the newest `keep` checkpoints.

    Args:
        output_dir (`str` or `Path`): The folder of the run.
        model (`nn.Module`): Saved whole, by the names of its `state_dict`.
        optimizer_state (`dict`): Tensors, numbers, text, lists and dictionaries only.
        state (`dict`): What JSON can hold; `state["step"]` names the checkpoint.
        keep (`int`, defaults to 2): How many checkpoints remain.
        export (`Callable`, *optional*): Writes what others load into the folder that it is given.

    Returns:
        `Path`: the folder of the new checkpoint.

    Raises:
        OSError: the disk is full or not writable. The checkpoints that were there are still there.
    """
    final = Path(output_dir) / f"checkpoint-{state['step']}"
    with new_checkpoint(final) as folder:
        save_model(model, folder / MODEL)
        torch.save(optimizer_state, folder / OPTIMIZER)
        if export is not None:
            export(folder)
        (folder / STATE).write_text(json.dumps(state, indent=2))
    rotate(final, keep)
    return final


def find_last_checkpoint(output_dir: str | Path) -> Checkpoint | None:
    """The newest sound checkpoint of a run, or `None`. Damaged ones are named in a warning and set aside."""
    for path in reversed(_checkpoints(output_dir)):
        if not (damage := damage_of(path)):
            return Checkpoint(path, json.loads((path / STATE).read_text()))
        aside = path.with_name(DAMAGED + path.name)
        if aside.exists():
            remove(aside)
        os.replace(path, aside)
        logger.warning(f"{path} is damaged and not used ({damage}): it is set aside as {aside.name}")
    return None


def damage_of(checkpoint: str | Path) -> str:
    """What is wrong with a checkpoint; empty if it is as it was written."""
    checkpoint = Path(checkpoint)
    try:
        _require_file(checkpoint / CHECKSUMS)
        written = json.loads((checkpoint / CHECKSUMS).read_text())
        changed = [name for name, signature in written.items() if _signature(checkpoint / name) != signature]
        _require_file(checkpoint / STATE)
        found, state = _files(checkpoint), json.loads((checkpoint / STATE).read_text())
        step = state.get("step", state.get("global_step"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    if changed:
        return f"{' and '.join(changed)} changed after it was written"
    if more := sorted(found - written.keys() - {CHECKSUMS}):
        return f"{more[0]} was not written with it"
    if checkpoint.name != f"checkpoint-{step}":
        return f"it is of step {step}"
    return ""


def require_within(checkpoint: str | Path, step: int, total_steps: int) -> None:
    """Raises a `ValueError` if the step of a checkpoint is beyond the last one of a run."""
    if step > total_steps:
        raise ValueError(
            f"{checkpoint} is beyond the {total_steps} steps that are asked for: give at least --max_steps {step}, "
            "which ends the run there"
        )


def rotate(newest: Path, keep: int | None, protected: str | Path | None = None) -> None:
    """
    Removes old checkpoints.

    Args:
        newest (`Path`): The checkpoint that was written just now. Checkpoints of later steps go too: the run did not
            resume from them.
        keep (`int`, *optional*): How many remain; all, if not given.
        protected (`str` or `Path`, *optional*): One that remains in any case.
    """
    found = _checkpoints(newest.parent)
    end = found.index(newest) + 1
    old = found[: max(0, end - keep)] if keep else []
    for other in old + found[end:]:
        if protected is None or other.resolve() != Path(protected).resolve():
            remove(other)


@contextmanager
def new_checkpoint(final: Path) -> Iterator[Path]:
    """
    Yield an empty folder to write to; when the block ends well it gets its checksums and the name `final`.

    Raises:
        OSError: writing failed, on a full disk above all. The partial folder is removed; `final` is as it was.
    """
    folder = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with clear_write_errors(final):
            folder.mkdir(parents=True)
            yield folder
            seal(folder, final)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def seal(folder: Path, final: Path) -> None:
    """Writes the checksums of a folder's files into it, has it on the disk, and gives it its name."""
    checksums = {name: _signature(folder / name) for name in sorted(_files(folder))}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
    sync_folder(folder)
    if final.exists():
        remove(final)
    os.replace(folder, final)
    sync(final.parent)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = [path for path in Path(output_dir).glob(CHECKPOINTS) if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _files(folder: Path) -> set[str]:
    """The names of all that is in a folder but folders, and but hidden files, which systems leave behind."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path.as_posix() for path in found if not path.name.startswith(".")}


def _require_file(path: Path) -> None:
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(f"there is no file {path.name}")


def _signature(path: Path) -> str:
    _require_file(path)
    return f"{path.stat().st_size} bytes, sha256 {file_hash(path, digest=hashlib.sha256())}"
