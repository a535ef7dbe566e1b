"""Checkpoints: complete or absent, never more than asked for, never another run's."""

import errno
import json
import logging
import os
import shutil

import pytest
import torch
from damages import DAMAGES
from safetensors.torch import load_file
from torch import nn

from aligndet_hf import files
from aligndet_hf.training import checkpointing
from aligndet_hf.training.checkpointing import find_last_checkpoint, rotate, save_checkpoint


class Model(nn.Module):
    """With a buffer, and with one tensor under two names, as tied heads are."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = self.first
        self.register_buffer("mean", torch.full((4,), value))


def optimizer_state(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model.first(1.0 + model.mean[:3]).sum().backward()
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
    sync, replace = files.sync, os.replace
    for module in (checkpointing, files):
        monkeypatch.setattr(module, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    save(tmp_path, 3)
    before, after = events[: events.index("replace")], events[events.index("replace") + 1 :]
    written = {"model.safetensors", "optimizer.pt", "trainer_state.json", "checksums.json", "unfinished-checkpoint-3"}
    assert set(before) == written and after == [tmp_path.name]


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    monkeypatch.setattr(checkpointing, "logger", logging.getLogger("checkpoints"))
    return caplog


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path, warnings_of, damage):
    save(tmp_path, 1)
    DAMAGES[damage](save(tmp_path, 2))
    assert find_last_checkpoint(tmp_path).path.name == "checkpoint-1"
    assert "checkpoint-2" in warnings_of.text and "set aside as damaged-checkpoint-2" in warnings_of.text
    assert names(tmp_path) == ["checkpoint-1", "damaged-checkpoint-2"]
    DAMAGES[damage](save(tmp_path, 2))  # and again
    assert find_last_checkpoint(tmp_path).path.name == "checkpoint-1"


def test_hidden_files_and_links_to_the_same_content_are_no_damage(tmp_path):
    folder = save(tmp_path, 2)
    (folder / ".DS_Store").touch()
    weights = (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(weights)
    assert find_last_checkpoint(tmp_path).path == folder


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


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "unfinished-checkpoint-2")
    assert find_last_checkpoint(tmp_path).path.name == "checkpoint-1"


def test_what_others_load_is_a_part_of_it(tmp_path, warnings_of):
    def export(folder):
        (folder / "detector").mkdir()
        (folder / "detector" / "config.json").write_text("{}")

    model = Model(1)
    path = save_checkpoint(tmp_path, model, optimizer_state(model), {"step": 1}, export=export)
    assert find_last_checkpoint(tmp_path).path == path
    (path / "detector" / "config.json").write_text("{ }")
    assert find_last_checkpoint(tmp_path) is None and "detector/config.json changed" in warnings_of.text


def test_one_checkpoint_can_be_protected(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=None)
    rotate(tmp_path / "checkpoint-3", 1, protected=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


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
        with pytest.raises(OSError, match=r"could not write .*checkpoint-2: .* \(\d+\.\d MB are free there\)"):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    find_last_checkpoint(tmp_path).load(Model())
