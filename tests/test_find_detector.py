"""What a command takes as a detector: every folder that holds one, by whatever command, and nothing else."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForObjectDetection

from aligndet_hf.detectors import build
from aligndet_hf.detectors.build import DetectorArguments, find_detector, load_detector
from aligndet_hf.detectors.families import FAMILIES
from aligndet_hf.detectors.published import PUBLISHED
from aligndet_hf.detectors.transfer import transfer_detector


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
