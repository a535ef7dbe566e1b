import importlib
import re
from pathlib import Path

import pytest
import torch
from tiny_detectors import CONFIGS, random_batch, tiny_config, tiny_detector
from transformers import AutoModelForObjectDetection, RTDetrConfig
from transformers.models.auto import modeling_auto

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.detectors import families
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.detectors.criterion import use_correct_loss
from aligndet_hf.detectors.families import FAMILIES, family_of, require_fitting_sizes

DOCS = Path(__file__).parents[1] / "docs"


def test_every_family_of_the_table_is_tested_and_documented():
    assert {tiny_config(name).model_type for name in CONFIGS} == set(FAMILIES)
    table, *_ = (DOCS / "families.md").read_text().split("| name |")  # of published checkpoints
    rows = re.findall(r"^\| (\S+(?: two-stage)?) \|", table, re.MULTILINE)
    assert rows == ["family", *CONFIGS]


def test_a_family_that_transformers_lacks_is_not_offered(monkeypatch):
    names = {name: value for name, value in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.items()}
    del names["deimv2"]
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", names)
    try:
        offered = importlib.reload(families).FAMILIES
        assert set(FAMILIES) - set(offered) == {"deimv2"}
    finally:
        monkeypatch.undo()
        importlib.reload(families)


def test_adding_a_family_takes_one_row(monkeypatch):
    """RT-DETRv2 as if it were new: refused without its row; with it, it pre-trains and has its stock loss."""
    detector = tiny_detector("rt_detr_v2", num_denoising=0).train()
    table = family_of.__globals__["FAMILIES"]
    monkeypatch.delitem(table, "rt_detr_v2")
    with pytest.raises(ValueError, match="'rt_detr_v2' are not supported"):
        AlignDetForPreTraining.from_detector(detector)

    monkeypatch.setitem(table, "rt_detr_v2", table["rt_detr"])
    batch = random_batch()
    expected = detector(**batch).loss
    torch.testing.assert_close(use_correct_loss(detector)(**batch).loss, expected, rtol=1e-6, atol=1e-6)
    model = AlignDetForPreTraining.from_detector(detector).train()
    model(**batch, **{f"momentum_{name}": value for name, value in random_batch().items()}).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize(
    ("name", "multiple"), [("detr", 1), ("rt_detr", 32), ("lw_detr", 16), ("rf_detr", 16), ("yolos", 16)]
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(name, multiple):
    config = tiny_config(name)
    require_fitting_sizes(config, [multiple, 4 * multiple])
    if multiple > 1:
        message = rf"this {name} takes multiples of {multiple}, got \[{4 * multiple + 3}\]; .* are {4 * multiple}$"
        with pytest.raises(ValueError, match=message):
            require_fitting_sizes(config, [4 * multiple, 4 * multiple + 3])


def test_images_with_fewer_places_than_queries_are_refused():
    config = RTDetrConfig(num_queries=100)
    require_fitting_sizes(config, [96, 128])  # 12 * 12 + 6 * 6 + 3 * 3 = 189 places
    with pytest.raises(ValueError, match="64 pixels have 84 places, and this rt_detr .* its 100 queries .* 42}'$"):
        require_fitting_sizes(config, [64, 128])


@pytest.mark.parametrize("name", ["lw_detr", "rf_detr"])
def test_the_multiple_is_what_the_network_needs(name):
    detector = tiny_detector(name).eval()
    with torch.no_grad():
        assert detector(torch.rand(1, 3, 80, 80)).logits.shape[0] == 1
        with pytest.raises(RuntimeError):
            detector(torch.rand(1, 3, 72, 72))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_detector_takes_another_size_than_it_was_trained_with(model_type, tmp_path):
    """Anchors and position embeddings are those of the images at hand, whatever sizes came before."""
    images = {size: random_batch(size=size)["pixel_values"] for size in (64, 128)}
    detector = tiny_detector(model_type).train()
    detector(images[64], labels=random_batch()["labels"]).loss.backward()  # pre-training at a low resolution
    detector.eval().save_pretrained(tmp_path)
    fresh = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        low, high = detector(images[64]), detector(images[128])
        expected = fresh(images[128])
        again = detector(images[64])
    for outputs, reference in ((high, expected), (again, low)):
        torch.testing.assert_close(outputs.pred_boxes, reference.pred_boxes)
        torch.testing.assert_close(outputs.logits, reference.logits)


@pytest.mark.parametrize("model_type", ["lw_detr", "rf_detr"])
def test_the_default_of_a_family_with_a_network_of_its_own_works(model_type):
    detector = build_detector(model_type).eval()
    multiple = FAMILIES[model_type].size_multiple(detector.config)
    size = 320 // multiple * multiple
    with torch.no_grad():
        boxes = detector(pixel_values=torch.zeros(1, 3, size, size)).pred_boxes
    assert boxes.shape == (1, detector.config.num_queries, 4) and boxes.isfinite().all()
