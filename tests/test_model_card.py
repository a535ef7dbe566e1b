"""Model cards: valid Hub metadata, what was measured and nothing else, no secrets and no paths of this machine."""

import ast
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from tiny_detectors import tiny_detector
from transformers import AutoConfig, DetrConfig, DetrImageProcessor

from aligndet_hf.cards import merge_card
from aligndet_hf.commands.finetune import settings_of
from aligndet_hf.evaluation.coco_metrics import SUMMARY
from aligndet_hf.evaluation.speed import measure_speed
from aligndet_hf.flags import told_of
from aligndet_hf.models import AlignDetConfig
from aligndet_hf.parser import parse_arguments
from aligndet_hf.reporting.model_card import eval_results, model_card
from aligndet_hf.reporting.run_record import RunRecord
from aligndet_hf.training.finetune_arguments import FinetuneArguments
from aligndet_hf.training.pretrain_arguments import PretrainArguments

SETTINGS = {"learning_rate": 1e-4, "seed": 3, "hub_token": "secret"}


@pytest.fixture
def record():
    """A function that makes a record."""
    config = DetrConfig(id2label={0: "red cell", 1: "white|cell", 2: "platelet"})

    def make(kind="finetune", dataset="someone/cells", **fields):
        return RunRecord(**{"kind": kind, "config": config, "dataset": dataset, "settings": SETTINGS} | fields)

    return make


def blocks(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card.text, re.DOTALL)


def test_finetuning_card(tmp_path, record):
    metrics = {key: index / 100 + 0.0012 for index, key in enumerate(SUMMARY)}
    metrics |= {"APs": -1.0, "per_class": {"red cell": 0.5, "white|cell": 0.25, "platelet": -1.0}}
    data = tmp_path / "private" / "blood"
    data.mkdir(parents=True)
    text = model_card(
        record(
            dataset=str(data),
            settings=SETTINGS | {"detector": str(tmp_path / "private" / "start")},
            metrics=metrics,
            evaluation={"dataset": "blood", "split": "validation", "images": 72},
            images=205,
            steps=1800,
            base_model="someone/detr-pretrained",
            license="apache-2.0",
            command="aligndet finetune --dataset blood",
            versions={"Python": "3.12", "torch": "2.15"},
            transfer={
                "kept": ["a.weight", "b.weight"],
                "reset": ["head.weight"],
                "mismatched": [],
                "frozen": ["a.weight"],
            },
        ),
        "me/blood-detr",
    )
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "object-detection"
    assert card.data.base_model == "someone/detr-pretrained" and card.data.license == "apache-2.0"
    assert card.data.datasets is None  # a folder is no data set of the Hub
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured == {"AP (IoU 0.50:0.95)": 0.12, "AP50": 1.12, "AP75": 2.12, "AR (100 detections)": 8.12}
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {
        ("blood", "validation")
    }
    assert "| AP50 | 1.1 |" in card.text and "| APs | no such object |" in card.text
    assert "| white\\|cell | 25.0 |" in card.text and "| platelet | no such object |" in card.text
    assert "205 images, 1,800 optimizer steps" in card.text and "split `validation`, 72 images" in card.text
    assert "| kept | 2 | `a.weight`, `b.weight` |" in card.text and "| reset | 1 | `head.weight` |" in card.text
    assert yaml.safe_load(blocks(card, "yaml")[0]) == {
        "learning_rate": 1e-4, "seed": 3, "detector": "start", "output_dir": "outputs/finetune",
    }  # fmt: skip
    assert blocks(card, "bash") == ["aligndet finetune --dataset blood"] and "Python 3.12, torch 2.15" in card.text
    assert str(tmp_path) not in text and "private" not in text and "secret" not in text
    assert r"red cell, white\|cell, platelet" in card.text and 'model="me/blood-detr"' in blocks(card, "python")[0]
    titles = "".join(blocks(card, "bibtex"))
    assert "2307.11077" in titles and "2005.12872" in titles  # AlignDet and DETR


def test_without_measurements_the_card_has_no_numbers(record):
    backbone = {"source": "timm", "matched": ["a", "b"], "missing": []}
    settings = SETTINGS | {"backbone": "vit_base_patch16_224.mae"}
    card = ModelCard(model_card(record(settings=settings, backbone=backbone), "cells"))
    assert card.data.eval_results is None and card.data.datasets == ["someone/cells"]
    assert "## Results" not in card.text and "Nothing was measured" in card.text
    assert "license" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert "started from timm (2 tensors loaded, 0 missing)" in card.text
    titles = "".join(blocks(card, "bibtex"))  # a detector built from nothing owes AlignDet nothing
    assert "2307.11077" not in titles and "2111.06377" in titles and "2005.12872" in titles


@pytest.mark.parametrize("subfolder", [None, "detector"])
def test_pretraining_card(record, subfolder):
    proposals = {"settings": {"source": "opencv", "mode": "fast", "clusters": {"num_clusters": 64}}, "boxes": 1234}
    metrics = {"loss": 3.0}  # of the log: no result
    text = model_card(record("pretrain", steps=10, proposals=proposals, metrics=metrics), "me/start", subfolder)
    card = ModelCard(text)
    assert {"self-supervised-learning", "aligndet"} <= set(card.data.tags)
    assert card.data.datasets == ["someone/cells"] and card.data.eval_results is None
    assert "not a detector" in card.text and "## Results" not in card.text
    assert (
        "The 1,234 proposals are boxes of OpenCV's selective search, mode fast; their 64 pseudo-classes" in card.text
    )
    assert len(blocks(card, "bibtex")) == 3
    (usage,) = blocks(card, "python")
    assert ('subfolder="detector"' in usage) == (subfolder is not None) and 'path = "me/start"' in usage


@pytest.mark.parametrize("variant, subfolder", [("fpn", None), ("fpn", "backbone"), ("c4", None)])
def test_soco_card(record, variant, subfolder):
    config = SimpleNamespace(
        model_type="soco", variant=variant, backbone_config=SimpleNamespace(backbone="resnet18", model_type="timm")
    )
    card = ModelCard(model_card(record("pretrain", method="soco", config=config), "me/trunk", subfolder))
    assert "# resnet18 pre-trained with SoCo on someone/cells" in card.text
    assert card.data.pipeline_tag == "image-feature-extraction" and "soco" in card.data.tags
    assert "aligndet pretrain --method soco" in card.text and "plain `transformers` checkpoint" not in card.text
    (usage,) = blocks(card, "python")
    ast.parse(usage)
    assert f'backbone="me/trunk{"/backbone" if subfolder else ""}"' in usage
    assert ("torchvision.safetensors" in usage) == (variant == "fpn")
    assert ("hf_hub_download" in usage) == (variant == "fpn" and subfolder is None)
    titles = "".join(blocks(card, "bibtex"))
    assert "2106.02637" in titles and "2307.11077" not in titles


def test_the_code_on_the_cards_parses(record):
    for kind in ("pretrain", "finetune"):
        (usage,) = blocks(ModelCard(model_card(record(kind), "d")), "python")
        assert "aligndet_hf" not in usage
        ast.parse(usage)


def test_the_code_on_the_card_of_a_convnet_loads_it(record, tmp_path):
    detector = tiny_detector("torchvision_fcos")
    detector.save_pretrained(tmp_path)
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(tmp_path)
    card = ModelCard(model_card(record("pretrain", config=AutoConfig.from_pretrained(tmp_path)), str(tmp_path)))
    assert "modeling_torchvision.py" in card.text and "It is a plain" not in card.text
    (usage,) = blocks(card, "python")
    exec(usage, found := {})
    assert found["detector"].config.id2label == {0: "cat", 1: "dog"}
    kept = dict(found["detector"].named_parameters())
    name = next(name for name in kept if "regression_head" in name)
    assert torch.equal(kept[name], dict(detector.named_parameters())[name])


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_recipe_on_a_card_runs(record, kind, tmp_path):
    given = {"dataset": "someone/cells", "detector": "detr", "backbone": "resnet18", "output_dir": str(tmp_path)}
    if kind == "pretrain":
        arguments = PretrainArguments(**given, max_steps=7)
        numbers = {name: getattr(AlignDetConfig(), name) for name in AlignDetConfig.__annotations__}
        numbers = {name: value for name, value in numbers.items() if name not in AlignDetConfig.sub_configs}
        settings = told_of(arguments) | {"aligndet_config": numbers}
    else:
        arguments = FinetuneArguments(
            **given, max_steps=7, per_device_train_batch_size=3, gradient_accumulation_steps=2
        )
        settings = settings_of(arguments)
    text = blocks(ModelCard(model_card(record(kind, settings=settings), "me/run")), "yaml")[0]
    assert "None" not in text and str(tmp_path) not in text
    (tmp_path / "card.yaml").write_text(text)
    again = parse_arguments(type(arguments), ["--config", str(tmp_path / "card.yaml")])
    assert (again.dataset, again.backbone, again.max_steps) == ("someone/cells", "resnet18", 7)
    assert again.learning_rate == arguments.learning_rate and again.image_sizes == arguments.image_sizes
    if kind == "finetune":
        assert again.per_device_train_batch_size == 6


def test_a_card_can_be_bought_from(record):
    """Size, speed, threshold, what came before, a picture if there may be one, and results in the Hub's new form."""
    pretrained = record(
        "pretrain", dataset="someone/photos", images=1000, steps=300, base_model="someone/coco-detr",
        proposals={"settings": {"source": "selective_search"}, "boxes": 5000},
    )  # fmt: skip
    speed = {"milliseconds": 12.34, "height": 480, "width": 640, "dtype": "float32", "device": "cpu", "threads": 2}
    best = {name: {"best_threshold": 0.25, "f1": 0.5} for name in ("red cell", "white|cell", "platelet")}
    metrics = dict.fromkeys(SUMMARY, 0.5) | {"per_class": dict.fromkeys(best, 0.5)}
    made = record(
        metrics=metrics, evaluation={"dataset": "someone/cells", "split": "test", "images": 9}, pretrained=pretrained,
        base_model="outputs/pretrained/detector", parameters=41_300_000, speed=speed,
        input_size={"shortest_edge": 480, "longest_edge": 800},
        diagnosis={"best_threshold": 0.37, "f1": 0.8, "per_class": best},
    )  # fmt: skip
    text = model_card(made, "me/cells", picture="predictions.jpg")
    card = ModelCard(text)
    for words in (
        "![Detections beside the truth](predictions.jpg)", "| parameters | 41.3 million |",
        "| input | shorter side 480 pixels, longer at most 800 |", "| threshold | 0.37, where F1 was highest",
        "| latency | 12.3 ms: forward pass of one image (480 × 640, float32) on cpu, 2 threads, the device of this",
        "| red cell | 50.0 | 0.25 |", "`aligndet pretrain` on someone/photos (1,000 images, 300 optimizer steps).",
        'detect("image.jpg", threshold=0.37)',
    ):  # fmt: skip
        assert words in card.text, words
    assert card.data.base_model == "someone/coco-detr"
    (entry,) = parse_eval_result_entries(yaml.safe_load(eval_results(made)))
    assert (entry.dataset_id, entry.value) == ("someone/cells", 50.0) and "split test" in entry.notes
    assert merge_card(text, text) == text
    plain = record(metrics=metrics, evaluation={"dataset": "cells"}, diagnosis={"best_threshold": 1.0, "f1": 0.0})
    assert eval_results(plain) is None and "threshold=0.3)" in model_card(plain, "d")
    assert "![" not in model_card(plain, "d") and "| | |" not in model_card(plain, "d")


def test_speed_is_measured_on_the_input_that_the_processor_makes():
    detector = tiny_detector("detr").train()
    found = measure_speed(detector, DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}))
    assert (found["height"], found["width"], found["dtype"], found["device"]) == (48, 64, "float32", "cpu")
    assert found["milliseconds"] > 0 and 1 <= found["runs"] <= 20 and found["threads"] >= 1
    assert not detector.training
