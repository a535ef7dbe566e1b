import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from tiny_detectors import NUM_LABELS, random_batch, tiny_detector

from aligndet_hf.detectors.backbones import get_backbone
from aligndet_hf.detectors.build import detector_from_config
from aligndet_hf.detectors.families import FAMILIES, family_of
from aligndet_hf.detectors.transfer import transfer_detector

ALL = sorted(FAMILIES)
PRESETS = ["everything", "keep-boxes", "paper", "encoder-only"]


def tied(detector) -> list[list[str]]:
    """Names of the tensors that have several, by tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in detector.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def perturbed(model_type: str):
    """A detector without a tensor that a new one could have by chance."""
    detector = tiny_detector(model_type)
    with torch.no_grad():
        for tensor in detector.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor += 0.01
    return detector


@pytest.mark.parametrize("preset, num_labels", [("everything", NUM_LABELS), *((preset, 7) for preset in PRESETS)])
@pytest.mark.parametrize("model_type", ALL)
def test_every_tensor_is_kept_or_new_as_the_report_says(model_type, num_labels, preset):
    source = perturbed(model_type)
    torch.manual_seed(1)
    detector, report = transfer_detector(source, num_labels, preset=preset)
    old, new = source.state_dict(), detector.state_dict()
    assert sorted(report.kept + report.reset + report.mismatched) == sorted(new)
    assert tied(detector) == tied(source)
    for name in report.kept:
        assert torch.equal(new[name], old[name]), name
    for name in report.reset + report.mismatched:
        assert (
            new[name].shape != old[name].shape
            or not new[name].is_floating_point()
            or not torch.equal(new[name], old[name])
        ), name
    if preset == "everything":
        assert not report.reset
    else:  # class layers, and so everything whose shape depends on the classes
        assert not report.mismatched and report.reset
    backbone = {id(tensor) for tensor in get_backbone(detector).state_dict(keep_vars=True).values()}
    for name, tensor in detector.state_dict(keep_vars=True).items():
        assert name in report.kept or id(tensor) not in backbone or "detection_tokens" in name
    detector.train()(**random_batch(num_labels=num_labels)).loss.backward()
    assert detector.config.num_labels == num_labels


@pytest.mark.parametrize("model_type", ALL)
def test_presets_reset_more_and_more(model_type):
    reset = [set(transfer_detector(tiny_detector(model_type), NUM_LABELS, preset=p)[1].reset) for p in PRESETS]
    assert reset[0] < reset[1] <= reset[2] < reset[3]
    classes, boxes = reset[1], reset[2] - reset[1]
    if model_type.endswith("rcnn"):  # whose boxes and masks are those of a class
        assert classes == reset[2] and {name.split(".")[2] for name in classes} <= {"box_predictor", "mask_predictor"}
        return
    assert all(re.search("class|score|cls", name) for name in classes)
    # The last layer of a box head: four numbers, or as many distributions; and how central a point is.
    state = tiny_detector(model_type).state_dict()
    assert boxes and all(re.search("bbox", name) for name in boxes)
    assert all(len(state[name]) % 4 == 0 or "ctrness" in name for name in boxes)


@pytest.mark.parametrize("model_type", ALL)
def test_encoder_only_keeps_what_stands_before_the_decoder(model_type):
    source = perturbed(model_type).eval()
    detector, report = transfer_detector(source, 7, preset="encoder-only")
    before = re.compile(r"backbone|conv_encoder|(^|\.)encoder\.|input_proj|level_embed|^vit\.")
    assert all(before.search(name) for name in report.kept)
    assert all("detection_tokens" in name or not before.search(name) for name in report.reset)
    for name, embedding in source.named_parameters():
        if any(part in name for part in FAMILIES[model_type].query_embeddings):
            assert name in report.reset, embedding.shape
    batch = random_batch()
    with torch.no_grad():
        outputs = [m.eval()(batch["pixel_values"], output_hidden_states=True) for m in (source, detector)]
    states = [getattr(output, "encoder_last_hidden_state", None) for output in outputs]
    if torch.is_tensor(states[0]):
        assert torch.equal(*states) and not torch.equal(outputs[0].pred_boxes, outputs[1].pred_boxes)


@pytest.mark.parametrize("model_type", ALL)
def test_every_tensor_that_depends_on_the_classes_is_a_class_tensor(model_type):
    small, large = tiny_detector(model_type).state_dict(), tiny_detector(model_type, num_labels=9).state_dict()
    _, report = transfer_detector(tiny_detector(model_type), NUM_LABELS)
    assert {name for name in small if small[name].shape != large[name].shape} <= set(report.reset)


@pytest.mark.parametrize("preset", ["keep-boxes", "encoder-only", "everything"])
@pytest.mark.parametrize("model_type", ALL)
def test_new_class_layers_start_as_the_family_starts_them(model_type, preset):
    num_labels = 7
    detector, report = transfer_detector(perturbed(model_type), num_labels, preset=preset)
    state, family = detector.state_dict(), FAMILIES[model_type]
    layers = [state[n] for n in report.reset + report.mismatched if re.match(family.class_heads, n)]
    biases = [tensor for tensor in layers if tensor.ndim == 1 and len(tensor) % num_labels == 0]
    if family.losses(detector.config).class_loss == "softmax":
        # As PyTorch starts layers, or at zero.
        scale = family.width(detector.config) ** -0.5 if family.starts_small or family.own_loss else 0
        assert all((tensor.abs() <= scale).all() for tensor in layers if tensor.ndim == 1)
    else:
        # One in a hundred, or what transformers sets for its families: one in the classes.
        priors = {round(tensor.sigmoid().mean().item(), 4) for tensor in biases}
        assert priors and priors <= {0.01, 1 / (num_labels + 1)}
        assert all(tensor.min() == tensor.max() for tensor in biases)
    weights = [tensor for tensor in layers if tensor.ndim > 1 and tensor.shape[2:] != (1, 1)]  # of masks: larger
    assert weights and all(tensor.abs().max() < 1.5 and abs(tensor.mean()) < 0.1 for tensor in weights)


@pytest.mark.parametrize("model_type", ["conditional_detr"])
def test_focal_losses_start_from_a_prior_of_one_in_a_hundred(model_type):
    source = tiny_detector(model_type)
    assert (source.class_labels_classifier.bias == 0).all()  # what transformers does: one half
    detector, _ = transfer_detector(source, 7)
    torch.testing.assert_close(detector.class_labels_classifier.bias, torch.full((7,), -math.log(99)))


@pytest.mark.parametrize(
    "model_type", ["detr", "table-transformer", "conditional_detr", "dab-detr", "deformable_detr"]
)
def test_encoder_decoder_and_queries_start_as_published(model_type):
    source = tiny_detector(model_type)
    torch.manual_seed(0)
    detector = detector_from_config(source.config)

    def layers(detector):
        return {
            name: module.weight
            for name, module in detector.named_modules()
            if isinstance(module, torch.nn.Linear) and re.match(r"model\.(encoder|decoder)\.layers\.", name)
        }

    def queries(detector):
        (name,) = family_of(detector.config).query_embeddings
        return detector.get_submodule(f"model.{name}").weight

    heads = [p for name, p in detector.named_parameters() if re.match(family_of(source.config).last_box_layers, name)]
    assert all(parameter.any() == (model_type in ("detr", "table-transformer")) for parameter in heads) and heads
    first = next(p for name, p in detector.named_parameters() if re.search(r"bbox\w*\.(0\.)?layers\.0\.weight", name))
    torch.testing.assert_close(first.std().item(), (3 * first.shape[1]) ** -0.5, rtol=0.15, atol=0)
    assert queries(source).std() < 0.03  # what transformers does
    assert 0.8 < queries(detector).std() < 1.2
    for name, weight in layers(detector).items():
        if name.endswith(("sampling_offsets", "attention_weights")):
            assert (weight == 0).all()
        else:
            torch.testing.assert_close(weight.std().item(), (2 / sum(weight.shape)) ** 0.5, rtol=0.15, atol=0)


@pytest.mark.parametrize("model_type", ["rt_detr", "rt_detr_v2"])
def test_batch_norms_start_with_a_scale_of_one(model_type):
    def scales(detector):
        own = set(get_backbone(detector).modules())
        norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d) and m not in own]
        return torch.cat([norm.weight for norm in norms])

    source = tiny_detector(model_type)
    assert scales(source).abs().max() < 0.1  # what transformers does
    assert (scales(detector_from_config(source.config)) == 1).all()
    kept, _ = transfer_detector(source, 7)
    torch.testing.assert_close(scales(kept), scales(source), rtol=0, atol=0)


def test_everything_keeps_all_that_fits_and_reports_the_rest():
    _, report = transfer_detector(tiny_detector("rt_detr"), NUM_LABELS, preset="everything")
    assert not report.reset and not report.mismatched
    _, report = transfer_detector(tiny_detector("rt_detr"), 7, preset="everything")
    assert len(report.mismatched) == 7


def test_names_folder_and_report(tmp_path):
    tiny_detector("detr").save_pretrained(tmp_path)
    detector, report = transfer_detector(tmp_path, 2, {0: "cat", 1: "dog"}, preset="paper")
    assert detector.config.id2label == {0: "cat", 1: "dog"} and detector.config.label2id == {"cat": 0, "dog": 1}
    assert json.loads(json.dumps(asdict(report)))["preset"] == "paper"
    assert str(report).splitlines()[0].endswith("4 reset, 0 mismatched")
    assert "  reset: class_labels_classifier.bias" in str(report).splitlines()
    _, report = transfer_detector(tmp_path, 2, preset="encoder-only")
    assert "  reset: model.decoder.layers.*.self_attn.v_proj.weight (2)" in str(report).splitlines()
    with pytest.raises(ValueError, match="unknown transfer preset 'all'; choose from .*encoder-only"):
        transfer_detector(tmp_path, 2, preset="all")
