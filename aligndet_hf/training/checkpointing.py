"""Checkpoints that are complete or absent: written under another name, synced, renamed into place.

A checkpoint is a folder `checkpoint-<step>` with the model's tensors under their exact names (`model.safetensors`),
the optimizer's state (`optimizer.pt`) and everything that is neither (`trainer_state.json`, which also holds the size
and checksum of the other files). Nothing is loaded that could run code.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers.utils import logging

from ..files import UNFINISHED, sync

logger = logging.get_logger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "trainer_state.json"


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
    output_dir: str | Path, model: nn.Module, optimizer_state: dict, state: dict, keep: int = 2
) -> Path:
    """
    Write `output_dir/checkpoint-<step>`, then remove all but the newest `keep` checkpoints.

    Args:
        output_dir (`str` or `Path`): The folder of the run.
        model (`nn.Module`): Saved whole, by the names of its `state_dict`.
        optimizer_state (`dict`): Tensors, numbers, text, lists and dictionaries only.
        state (`dict`): What JSON can hold; `state["step"]` names the checkpoint.
        keep (`int`, defaults to 2): How many checkpoints remain.

    Returns:
        `Path`: the folder of the new checkpoint.

    Raises:
        OSError: the disk is full or not writable. The checkpoints that were there are still there.
    """
    final = Path(output_dir) / f"checkpoint-{state['step']}"
    with atomic_folder(final) as folder:
        save_model(model, folder / MODEL)
        torch.save(optimizer_state, folder / OPTIMIZER)
        files = {name: _signature(folder / name) for name in (MODEL, OPTIMIZER)}
        (folder / STATE).write_text(json.dumps({**state, "files": files}, indent=2))
    found = _checkpoints(output_dir)
    end = found.index(final) + 1
    # A checkpoint of a later step is a damaged one that the run did not resume from.
    for other in found[: max(0, end - keep)] + found[end:]:
        _remove(other)
    return final


def find_last_checkpoint(output_dir: str | Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or `None`. A damaged one is passed over with a warning."""
    for path in reversed(_checkpoints(output_dir)):
        try:
            state = json.loads((path / STATE).read_text())
            damaged = [name for name in (MODEL, OPTIMIZER) if _signature(path / name) != state["files"][name]]
            if not damaged:
                return Checkpoint(path, state)
            reason = f"{' and '.join(damaged)} changed after it was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        logger.warning(f"{path} is not a complete checkpoint and is passed over ({reason})")
    return None


def require_same_run(saved: dict, current: dict, where: str | Path) -> None:
    """
    Refuse to continue a run under another configuration.

    Args:
        saved (`dict`): The configuration that the run in `where` was started with.
        current (`dict`): The configuration of now.
        where (`str` or `Path`): The folder of the run.

    Raises:
        ValueError: they differ. The differing keys are listed with both values.
    """
    keys = [key for key in (*saved, *(set(current) - set(saved))) if saved.get(key) != current.get(key)]
    if keys:
        differences = ", ".join(f"{key}: {saved.get(key)!r} there, {current.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{where} holds a run of another configuration ({differences}). Give the same values to resume it, "
            "another --output_dir to leave it alone, or --overwrite_output_dir to start anew."
        )


def prepare_output_dir(output_dir: str | Path) -> Path:
    """
    Create the folder of a run if need be, and make sure that files can be written there.

    Raises:
        OSError: they cannot.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise OSError(f"cannot write to the output folder {output_dir}: {error.strerror or error}") from error
    return output_dir


def remove_checkpoints(output_dir: str | Path, only_unfinished: bool = False) -> None:
    """Remove what an interrupted save left behind and, unless `only_unfinished`, every checkpoint."""
    for path in Path(output_dir).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in [] if only_unfinished else _checkpoints(output_dir):
        _remove(path)


@contextmanager
def atomic_folder(final: Path):
    """
    Yield an empty folder to write to; when the block ends well it is synced to disk and takes the name `final`.

    Raises:
        OSError: writing failed, on a full disk above all. The partial folder is removed; `final` is as it was.
    """
    folder = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with clear_write_errors(final):
            folder.mkdir(parents=True)
            yield folder
            for path in (*folder.rglob("*"), folder):
                sync(path)
            if final.exists():
                _remove(final)
            os.replace(folder, final)
            sync(final.parent)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def clear_write_errors(path: Path):
    """
    One clear `OSError` for all ways in which writing to `path` fails.

    safetensors and `torch.save` each raise a class of their own when the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"could not write {path}: {error}. The checkpoints saved before are untouched.") from error


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _remove(folder: Path) -> None:
    """Remove a folder so that one left half removed is not taken for a checkpoint."""
    doomed = folder.with_name(UNFINISHED + "removal-" + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _signature(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{path.stat().st_size} bytes, sha256 {digest.hexdigest()}"
