import json

import pytest
import torch
from tiny_detectors import CONFIGS, NUM_LABELS, random_batch, tiny_detector

from aligndet_hf.detectors.transfer import transfer_detector

CLASS_TENSORS = {"detr": 2, "conditional_detr": 2, "rt_detr": 7}
LAST_BOX_TENSORS = {"detr": 2, "conditional_detr": 2, "rt_detr": 6}


@pytest.mark.parametrize("preset", ["keep-boxes", "paper"])
@pytest.mark.parametrize("num_labels", [NUM_LABELS, 7])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_presets_reset_their_layers_and_keep_every_other_tensor(model_type, num_labels, preset):
    source = tiny_detector(model_type)
    torch.manual_seed(1)
    detector, report = transfer_detector(source, num_labels, preset=preset)
    expected = CLASS_TENSORS[model_type] + (LAST_BOX_TENSORS[model_type] if preset == "paper" else 0)
    assert len(report.reset) == expected and not report.mismatched
    assert sorted(report.kept + report.reset) == sorted(detector.state_dict())
    for name in report.kept:
        assert torch.equal(detector.state_dict()[name], source.state_dict()[name])
    weights = [name for name in report.reset if name.endswith("weight") and "layers.2" not in name]
    assert weights and all(
        detector.state_dict()[n].shape != source.state_dict()[n].shape
        or not torch.equal(detector.state_dict()[n], source.state_dict()[n])
        for n in weights
    )
    detector.train()(**random_batch(num_labels=num_labels)).loss.backward()
    assert detector.config.num_labels == num_labels


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_tensor_that_depends_on_the_classes_is_a_class_tensor(model_type):
    small, large = tiny_detector(model_type).state_dict(), tiny_detector(model_type, num_labels=9).state_dict()
    _, report = transfer_detector(tiny_detector(model_type), NUM_LABELS)
    assert {name for name in small if small[name].shape != large[name].shape} == set(report.reset)


def test_everything_keeps_all_that_fits_and_reports_the_rest():
    _, report = transfer_detector(tiny_detector("rt_detr"), NUM_LABELS, preset="everything")
    assert not report.reset and not report.mismatched
    _, report = transfer_detector(tiny_detector("rt_detr"), 7, preset="everything")
    assert len(report.mismatched) == CLASS_TENSORS["rt_detr"]


def test_names_folder_and_report(tmp_path):
    tiny_detector("detr").save_pretrained(tmp_path)
    detector, report = transfer_detector(tmp_path, 2, {0: "cat", 1: "dog"}, preset="paper")
    assert detector.config.id2label == {0: "cat", 1: "dog"} and detector.config.label2id == {"cat": 0, "dog": 1}
    assert json.loads(json.dumps(report.to_dict()))["preset"] == "paper"
    assert str(report).splitlines()[0].endswith("4 reset, 0 mismatched")
    assert "  reset: class_labels_classifier.bias" in str(report).splitlines()
    with pytest.raises(ValueError, match="unknown transfer preset 'all'"):
        transfer_detector(tmp_path, 2, preset="all")
