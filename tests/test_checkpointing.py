"""Checkpoints: complete or absent, never more than asked for, never another run's."""

import errno
import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aligndet_hf.training import checkpointing
from aligndet_hf.training.checkpointing import (
    find_last_checkpoint,
    prepare_output_dir,
    remove_checkpoints,
    require_same_run,
    save_checkpoint,
)


class Model(nn.Module):
    """With a buffer, and with one tensor under two names, as tied heads are."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = self.first
        self.register_buffer("mean", torch.full((4,), value))


def optimizer_state(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model.first(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "scaler": None}


def save(folder, step, keep=2, model=None):
    model = model or Model(step)
    return save_checkpoint(folder, model, optimizer_state(model), {"step": step, "metrics": {"loss": 0.1}}, keep)


def names(folder):
    return sorted(os.listdir(folder))


def test_round_trip(tmp_path):
    model = Model(5)
    state = optimizer_state(model)
    save_checkpoint(tmp_path, model, state, {"step": 7, "metrics": {"loss": 0.1}})
    checkpoint, other = find_last_checkpoint(tmp_path), Model(0)
    loaded = checkpoint.load(other)
    assert checkpoint.path == tmp_path / "checkpoint-7" and checkpoint.state["metrics"] == {"loss": 0.1}
    assert set(other.state_dict()) == set(model.state_dict())
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    moments = state["optimizer"]["state"][0]
    assert all(torch.equal(loaded["optimizer"]["state"][0][name], moments[name]) for name in moments)


def test_tensors_keep_their_exact_names(tmp_path):
    path = save(tmp_path, 1)
    assert set(load_file(path / "model.safetensors")) == {"first.weight", "first.bias", "mean"}


def test_a_model_of_another_shape_is_refused(tmp_path):
    save(tmp_path, 1)
    other = Model()
    other.extra = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="extra"):
        find_last_checkpoint(tmp_path).load(other)


def test_nothing_there(tmp_path):
    assert find_last_checkpoint(tmp_path) is None
    assert find_last_checkpoint(tmp_path / "not even a folder") is None


def test_rotation_keeps_the_newest_by_number(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_rotation_waits_for_the_new_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(names(tmp_path)), replace(*paths)))
    save(tmp_path, 2, keep=1)
    assert seen[0] == ["checkpoint-1", "unfinished-checkpoint-2"]  # As the new one gets its name.
    assert names(tmp_path) == ["checkpoint-2"]


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace = checkpointing.sync, os.replace
    monkeypatch.setattr(checkpointing, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    save(tmp_path, 3)
    before, after = events[: events.index("replace")], events[events.index("replace") + 1 :]
    files = {"model.safetensors", "optimizer.pt", "trainer_state.json", "unfinished-checkpoint-3"}
    assert set(before) == files and after == [tmp_path.name]


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    monkeypatch.setattr(checkpointing, "logger", logging.getLogger("checkpoints"))
    return caplog


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", [os.remove, cut, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, warnings_of, damage, name):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    assert find_last_checkpoint(tmp_path).path.name == "checkpoint-1"
    assert "checkpoint-2" in warnings_of.text and "passed over" in warnings_of.text


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    shutil.rmtree(save(tmp_path, 1))
    (tmp_path / "checkpoint-1").mkdir()
    save(tmp_path, 1)
    assert find_last_checkpoint(tmp_path).state["step"] == 1


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_good_one(tmp_path):
    save(tmp_path, 1, keep=1)
    (tmp_path / "checkpoint-9").mkdir()
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_unfinished_folder_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "unfinished-checkpoint-2")
    (tmp_path / "unfinished-log.jsonl").touch()
    assert find_last_checkpoint(tmp_path).path.name == "checkpoint-1"
    remove_checkpoints(tmp_path, only_unfinished=True)
    assert names(tmp_path) == ["checkpoint-1"]


def test_starting_anew_removes_checkpoints_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-of-mine").mkdir()
    (tmp_path / "notes.txt").touch()
    remove_checkpoints(tmp_path)
    assert names(tmp_path) == ["checkpoint-of-mine", "notes.txt"]


@pytest.mark.parametrize("writer", ["save_model", "torch.save", "json"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, writer):
    save(tmp_path, 1, keep=1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file") if writer == "torch.save" else full

    owner, name = {
        "save_model": (checkpointing, "save_model"),
        "torch.save": (torch, "save"),
        "json": (json, "dumps"),
    }[writer]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(OSError, match=r"could not write .*checkpoint-2: .*"):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    find_last_checkpoint(tmp_path).load(Model())


def test_another_configuration_is_refused_with_the_differences():
    saved = {"learning_rate": 1e-4, "seed": 0, "images": 10, "old": 1}
    require_same_run(saved, dict(saved), "out")
    with pytest.raises(ValueError) as error:
        require_same_run(saved, {"learning_rate": 2e-4, "seed": 0, "images": 10, "new": 2}, "out")
    message = str(error.value)
    assert "learning_rate: 0.0001 there, 0.0002 now" in message
    assert "old: 1 there, None now" in message and "new: None there, 2 now" in message
    assert "seed" not in message and "--overwrite_output_dir" in message


def test_an_output_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to the output folder .*out: Not a directory"):
        prepare_output_dir(tmp_path / "file" / "out")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpointing.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="cannot write to the output folder .*: Read-only file system"):
        prepare_output_dir(tmp_path / "there")


def test_an_output_folder_is_made(tmp_path):
    assert prepare_output_dir(tmp_path / "a" / "b").is_dir()
    assert names(tmp_path / "a" / "b") == []
