"""What a command takes as a detector: every folder that holds one, by whatever command, and nothing else."""

import importlib
import json
import pickle
import re
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_detectors import tiny_detector
from transformers import AutoModelForObjectDetection

from aligndet_hf.cli import COMMANDS
from aligndet_hf.data.collate import normalize_images
from aligndet_hf.data.synthetic import make_synthetic_dataset
from aligndet_hf.detectors import build
from aligndet_hf.detectors.build import (
    DetectorArguments,
    build_image_processor,
    find_detector,
    load_detector,
    open_detector,
    open_image_processor,
    save_image_processor,
)
from aligndet_hf.detectors.families import FAMILIES
from aligndet_hf.detectors.published import PUBLISHED
from aligndet_hf.detectors.transfer import transfer_detector
from aligndet_hf.evaluation.detections import normalization_of
from aligndet_hf.pipelines.stages import arguments_class


def write_config(folder, model_type):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def test_a_detector_and_what_made_one_are_found(tmp_path):
    write_config(tmp_path / "plain", "detr")
    write_config(tmp_path / "pretrained", "aligndet")
    write_config(tmp_path / "pretrained" / "detector", "rt_detr")
    write_config(tmp_path / "pretrained" / "checkpoint-4" / "detector", "rt_detr")
    assert find_detector(tmp_path / "plain") == str(tmp_path / "plain")
    for name in ("pretrained", "pretrained/checkpoint-4"):
        assert find_detector(tmp_path / name) == str(tmp_path / name / "detector")
        assert find_detector(str(tmp_path / name / "detector")) == str(tmp_path / name / "detector")


def test_hub_ids_are_left_to_the_hub(monkeypatch):
    monkeypatch.setattr(build, "cached_file", lambda name, file: None)
    assert find_detector("PekingU/rtdetr_r50vd") == "PekingU/rtdetr_r50vd"
    assert find_detector("detr") == "detr"


def test_a_name_that_is_neither_here_nor_on_the_hub_is_told(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "finetuned").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    message = (
        r"^detector 'outputs/finetund': no such folder here \(did you mean 'outputs/finetuned'\?\), no family, and"
    )
    with pytest.raises(OSError, match=message):
        find_detector("outputs/finetund")


def test_a_name_that_is_nearly_a_family_is_told():
    with pytest.raises(OSError, match="^detector 'rtdetr': no such folder here, no family; did you mean 'rt_detr'\\?"):
        find_detector("rtdetr")
    with pytest.raises(OSError, match=r"no such folder here, a family \(what `build_detector\('rt_detr'\)` builds"):
        open_detector("rt_detr")


def test_short_names_are_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "cached_file", lambda name, file: None)
    assert find_detector("rt_detr_r18") == "PekingU/rtdetr_r18vd"
    assert not set(PUBLISHED) & set(FAMILIES) and all(hub_id.count("/") == 1 for hub_id in PUBLISHED.values())
    with pytest.raises(ValueError, match=r"no detector 'rt_detr_r19'; did you mean 'rt_detr_r18'\?"):
        find_detector("rt_detr_r19")
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "rt_detr_r18", "detr")  # a folder of that name is the folder
    assert find_detector("rt_detr_r18") == "rt_detr_r18"


def test_the_page_has_all_short_names():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    assert re.findall(r"\| `(\w+)` \| `([\w./-]+)` \|", page) == list(PUBLISHED.items())


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "a/b/nowhere", "~/nowhere"])
def test_a_folder_that_is_not_there_is_told(name):
    with pytest.raises(ValueError, match=f"^{name} is not a detector: there is no such folder$"):
        find_detector(name)


def test_what_is_there_instead_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[")
    write_config(tmp_path / "bert", "bert")
    for command in ("pretrain", "proposals"):
        (tmp_path / command).mkdir()
        (tmp_path / command / "run.json").write_text(json.dumps({"command": command}))
    write_config(tmp_path / "soco", "soco")
    write_config(tmp_path / "soco" / "backbone", "resnet")
    write_config(tmp_path / "unfinished" / "checkpoint-3" / "detector", "detr")
    for name, told in {
        "empty": "it has no config.json of one",
        "broken": "it has no config.json of one",
        "pretrain": "it holds a run of `aligndet pretrain`, which has no checkpoint yet",
        "proposals": "it holds a run of `aligndet proposals`, which makes no detector",
        "bert": "it holds a model of the type 'bert'",
        "soco": f"it holds a backbone. A detector gets it by --backbone {tmp_path / 'soco' / 'backbone'}",
        "unfinished": f"not finished. Give a checkpoint of it, such as {tmp_path / 'unfinished' / 'checkpoint-3'}",
    }.items():
        with pytest.raises(ValueError, match=f"{name} is not a detector: .*{told}"):
            find_detector(tmp_path / name)


def test_commands_load_it(detector_folders, tmp_path):
    (tmp_path / "detector").symlink_to(detector_folders("detr"), target_is_directory=True)
    expected = AutoModelForObjectDetection.from_pretrained(detector_folders("detr")).state_dict()
    loaded, _ = load_detector(DetectorArguments(detector=str(tmp_path)), 1)
    other, report = transfer_detector(tmp_path, 1, preset="everything")
    for detector in (loaded, other):
        assert all((detector.state_dict()[name] == tensor).all() for name, tensor in expected.items())
    assert not report.reset and not report.mismatched


class Found(Exception):
    """In place of loading a detector: what would have been loaded."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Labelled images, and what people give as a detector: for each what has to be loaded."""
    root = tmp_path_factory.mktemp("places")
    make_synthetic_dataset(4, seed=0, image_size=(64, 80)).save_to_disk(root / "labelled")
    detector = tiny_detector("rt_detr", num_labels=5)
    commit = root / "hub" / "models--someone--detector" / "snapshots" / ("0" * 40)
    for folder in ("pretrained/detector", "pretrained/checkpoint-4/detector", "finetuned/checkpoint-2", commit):
        detector.save_pretrained(root / folder)
        save_image_processor(build_image_processor(detector, 64), root / folder)
    write_config(root / "pretrained", "aligndet")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    loaded = {
        "pretrained": "pretrained/detector",
        "pretrained/checkpoint-4": "pretrained/checkpoint-4/detector",
        "pretrained/detector": "pretrained/detector",
        "finetuned/checkpoint-2": "finetuned/checkpoint-2",
    }
    return root, {str(root / name): str(root / place) for name, place in loaded.items()} | {
        "someone/detector": "someone/detector"
    }


# Of every command that takes a detector the flags with which it loads one soon.
TAKE_A_DETECTOR = {
    "proposals": {"dataset": "{labelled}", "source": "detector", "dataloader_num_workers": 0, "disable_tqdm": True},
    "clusters": {"dataset": "{proposals}", "num_clusters": 2, "use_cpu": True, "disable_tqdm": True},
    "pretrain": {"dataset": "{proposals}", "max_steps": 1, "use_cpu": True, "image_sizes": [64]},
    "finetune": {"dataset": "{labelled}", "split": None, "do_eval": False, "max_steps": 1, "use_cpu": True},
    "evaluate": {"dataset": "{labelled}", "split": None, "use_cpu": True},
    "predict": {"use_cpu": True},
    "export": {},
    "pseudolabel": {"dataset": "{labelled}", "split": None, "label_fraction": 0.5, "use_cpu": True},
    "convert": {"to": "mmdet"},
    "embeddings": {"dataset": "{labelled}", "split": None, "use_cpu": True, "untrained": False},
}


def test_every_command_that_takes_a_detector_is_here():
    takes = {name for name in COMMANDS if "detector" in {item.name for item in fields(arguments_class(name))}}
    assert takes == set(TAKE_A_DETECTOR)


@pytest.mark.parametrize("command", TAKE_A_DETECTOR)
def test_runs_checkpoints_folders_and_hub_ids_are_taken_alike(command, places, proposal_folder, tmp_path, monkeypatch):
    def load(name, *args, **kwargs):
        raise Found(str(name))

    root, expected = places
    monkeypatch.setattr(AutoModelForObjectDetection, "from_pretrained", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
    known = {"labelled": root / "labelled", "proposals": proposal_folder}
    flags = {
        name: value.format(**known) if isinstance(value, str) else value
        for name, value in TAKE_A_DETECTOR[command].items()
    }
    flags |= {"images": [str(root / "labelled")]} if command == "predict" else {}
    row, cls = COMMANDS[command], arguments_class(command)
    if any(item.name == "output_dir" and item.default is MISSING for item in fields(cls)):
        flags["output_dir"] = str(tmp_path / "out")
    found = {}
    for given in expected:
        arguments = cls(detector=[given] if command == "embeddings" else given, **flags)
        with pytest.raises(Found) as loading:
            getattr(importlib.import_module(row.module), row.function)(arguments)
        found[given] = str(loading.value)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert found == expected


@pytest.fixture
def saved(tmp_path):
    tiny_detector("rt_detr", num_labels=2).save_pretrained(tmp_path / "det")
    return tmp_path / "det"


def rewritten(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_damaged_weights_are_one_error(saved):
    path = saved / "model.safetensors"
    for content in (path.read_bytes()[:1000], b"", b"version https://git-lfs", b"<!DOCTYPE html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{saved}: its weights are damaged or no weights"):
            open_detector(saved)
    path.unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="its weights are damaged or no weights"):
        open_detector(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_hidden_dim": 10**30}, "its config.json makes no detector"),
        ({"feat_strides": [8, 16, None]}, "its config.json makes no detector"),
        ({"d_model": "wide"}, "its config.json makes no detector"),
        ({"model_type": ["rt_detr"]}, "is not a detector: it has no config.json of one"),
    ],
)
def test_a_config_that_makes_no_detector_is_one_error(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"^{saved}.*{message}"):
        open_detector(saved)


@pytest.mark.parametrize(
    "change",
    [
        *({"image_std": value} for value in ([], [0.2, 0.2], [[0.2], [0.2], [0.2]], "wide", 10**400)),
        *({"size": value} for value in ({"height": "a", "width": 9}, {"height": {}, "width": 9}, {"depth": 3})),
        {"rescale_factor": "../../x"},
        {"image_processor_type": {}},
        None,
    ],
)
def test_an_image_processor_that_prepares_no_image_is_one_error(saved, change):
    save_image_processor(build_image_processor(open_detector(saved), 64), saved)
    path = saved / "preprocessor_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps([1] if change is None else content | {"do_normalize": True} | change))
    with pytest.raises(ValueError, match=f"^{saved}: its image processor prepares no image"):
        open_image_processor(saved)


def test_one_number_stands_for_all_channels_of_an_image_processor(saved):
    processor = build_image_processor(open_detector(saved), 64)
    processor.do_normalize, processor.image_mean, processor.image_std = True, 0.5, [0.25]
    processor.save_pretrained(saved)
    image, mask = np.full((3, 8, 8), 200, np.uint8), torch.ones(1, 8, 8)
    normal = normalize_images(torch.from_numpy(image)[None], mask, **normalization_of(open_image_processor(saved)))
    assert torch.allclose(normal, torch.full((1, 3, 8, 8), (200 / 255 - 0.5) / 0.25))


def test_weights_that_do_not_fit_are_one_error(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_queries": 30, "d_model": 64}))
    with pytest.raises(ValueError, match=r"tensors have other shapes than its config\.json makes, such as .* with \["):
        open_detector(saved)


def test_weights_that_are_not_numbers_are_one_error(saved):
    name = "model.enc_score_head.weight"
    rewritten(saved, lambda tensors: tensors | {name: tensors[name] * float("nan")})
    for is_whole in (True, False):
        with pytest.raises(ValueError, match=f"1 tensors hold NaN or infinite numbers, such as {name}"):
            open_detector(saved, is_whole)


def test_layers_that_are_not_there_are_told_where_they_are_trained_only(saved, capsys):
    gone = "model.enc_score_head."
    rewritten(saved, lambda tensors: {name: tensors[name] for name in tensors if not name.startswith(gone)})
    with pytest.raises(ValueError, match=f"lacks 2 tensors of its detector, such as {gone}bias"):
        open_detector(saved)
    open_detector(saved, is_whole=False)
    assert f"lacks 2 tensors of its detector, such as {gone}bias, which start from random" in capsys.readouterr().out


def test_half_precision_becomes_float32(saved):
    whole = open_detector(saved)
    whole.half().save_pretrained(saved)
    assert open_detector(saved).dtype == torch.float32
