"""Model cards: valid Hub metadata, what was measured and nothing else, no secrets and no paths of this machine."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import DetrConfig, IntervalStrategy

from aligndet_hf.reporting.model_card import COCO_KEYS, told_settings, write_finetuning_card, write_pretraining_card

NAMES = {0: "red cell", 1: "white cell", 2: "platelet"}
SETTINGS = {"learning_rate": 1e-4, "seed": 3, "eval_strategy": IntervalStrategy.EPOCH, "hub_token": "secret"}


@pytest.fixture
def config():
    return DetrConfig(id2label=NAMES)


def blocks(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card.text, re.DOTALL)


def test_finetuning_card(tmp_path, config):
    results = {key: index / 100 + 0.0012 for index, key in enumerate(COCO_KEYS)}
    results |= {"APs": -1.0, "per_class": {"red cell": 0.5, "white cell": 0.25, "platelet": -1.0}}
    data = tmp_path / "private" / "blood"
    data.mkdir(parents=True)
    path = write_finetuning_card(
        tmp_path,
        detector_config=config,
        dataset=str(data),
        settings=SETTINGS | {"detector": str(tmp_path / "private" / "detector")},
        results=results,
        eval_split="validation",
        num_images=205,
        num_eval_images=72,
        steps=1800,
        base_model="someone/detr-pretrained",
        license="apache-2.0",
        transfer={
            "kept": ["a.weight", "b.weight"],
            "reset": ["head.weight"],
            "mismatched": [],
            "frozen": ["a.weight"],
        },
    )
    assert path == tmp_path / "README.md"
    card = ModelCard.load(path)

    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "object-detection"
    assert card.data.base_model == "someone/detr-pretrained" and card.data.license == "apache-2.0"
    assert card.data.datasets is None  # a folder is no data set of the Hub
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured == {"AP (IoU 0.50:0.95)": 0.12, "AP50": 1.12, "AP75": 2.12, "AR (100 detections)": 8.12}
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}

    assert "| AP50 | 1.1 |" in card.text and "| APs | no such object |" in card.text
    assert "| white cell | 25.0 |" in card.text and "| platelet | no such object |" in card.text
    assert "205 images, 1,800 optimizer steps" in card.text and "72 images" in card.text
    assert "| kept | 2 | `a.weight`, `b.weight` |" in card.text and "| reset | 1 | `head.weight` |" in card.text
    settings = yaml.safe_load(blocks(card, "yaml")[0])
    assert settings == {"learning_rate": 1e-4, "seed": 3, "eval_strategy": "epoch", "detector": "detector"}
    assert str(tmp_path) not in path.read_text() and "private" not in path.read_text()
    assert "secret" not in path.read_text()
    assert "red cell, white cell, platelet" in card.text
    assert "2307.11077" in blocks(card, "bibtex")[0]


def test_without_measurements_the_card_has_no_numbers(tmp_path, config):
    path = write_finetuning_card(tmp_path, detector_config=config, dataset="someone/cells", settings=SETTINGS)
    card = ModelCard.load(path)
    assert "someone/cells" in card.text
    assert card.data.eval_results is None and card.data.datasets == ["someone/cells"]
    assert "## Results" not in card.text and "Nothing was measured" in card.text
    assert "license" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert not blocks(card, "bibtex")  # a detector built from nothing owes AlignDet nothing


@pytest.mark.parametrize("subfolder", [None, "detector"])
def test_pretraining_card(tmp_path, config, subfolder):
    path = write_pretraining_card(
        tmp_path,
        detector_config=config,
        dataset="someone/images",
        settings=SETTINGS,
        steps=10,
        proposals="Selective search, fast mode.",
        subfolder=subfolder,
    )
    card = ModelCard.load(path)
    assert {"self-supervised-learning", "aligndet"} <= set(card.data.tags)
    assert card.data.datasets == ["someone/images"] and card.data.eval_results is None
    assert "not a detector" in card.text and "Selective search, fast mode." in card.text
    assert len(blocks(card, "bibtex")) == 2
    (usage,) = blocks(card, "python")
    assert ('subfolder="detector"' in usage) == (subfolder is not None)


def test_the_code_on_the_cards_parses(tmp_path, config):
    for write in (write_finetuning_card, write_pretraining_card):
        card = ModelCard.load(write(tmp_path, detector_config=config, dataset="d", settings={}))
        (usage,) = blocks(card, "python")
        assert "aligndet_hf" not in usage
        ast.parse(usage)


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, config, monkeypatch):
    (tmp_path / "someone" / "cells").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = write_finetuning_card(tmp_path, detector_config=config, dataset="someone/cells", settings={})
    card = ModelCard.load(path)
    assert card.data.datasets is None and "someone" not in path.read_text()


def test_settings_are_plain_and_private():
    told = told_settings(
        {
            "output_dir": "/home/me/run",
            "backbone_weights": Path("/data/mobilenet.safetensors"),
            "detector": "someone/detector",
            "image_sizes": (480, 512),
            "detector_config": {"num_queries": 60},
            "hub_token": "secret",
            "some_other_token": "secret",
            "max_size": None,
        }
    )
    assert told == {
        "backbone_weights": "mobilenet.safetensors",
        "detector": "someone/detector",
        "image_sizes": [480, 512],
        "detector_config": {"num_queries": 60},
    }
