"""Published checkpoints: every layout is built as its authors did, and gives the same outputs here."""

import argparse
import json
from dataclasses import asdict

import pytest
import torch
import torchvision
from original_detectors import (
    QUERIES,
    ConditionalDetr,
    DabDetr,
    DeformableDetr,
    Detr,
    MmdetDetr,
    randomise,
)

from aligndet_hf.detectors.converters import LAYOUTS, convert_tensors, find_detector_in, read_detector
from aligndet_hf.detectors.converters.resnet import RESNETS, resnet_name

# Every architecture, what its file says beside the tensors, the fields it does not tell, and the family it becomes.
ORIGINALS = {
    "detr": (lambda: Detr(91), {}, {}, "detr"),
    "detr dilated": (
        lambda: Detr(5, "resnet50", 2048, dilated=True),
        {"args": argparse.Namespace(dilation=True, nheads=8)},
        {},
        "detr",
    ),
    "conditional_detr": (lambda: ConditionalDetr(), {}, {}, "conditional_detr"),
    "dab_detr": (lambda: DabDetr(), {}, {}, "dab-detr"),
    "dab_detr patterns": (lambda: DabDetr(patterns=3), {}, {}, "dab-detr"),
    "deformable_detr": (lambda: DeformableDetr(), {}, {}, "deformable_detr"),
    "deformable_detr refined": (lambda: DeformableDetr(refine=True), {}, {}, "deformable_detr"),
    "deformable_detr two-stage": (
        lambda: DeformableDetr(refine=True, two_stage=True),
        {},
        {"two_stage_num_proposals": QUERIES},
        "deformable_detr",
    ),
    "deformable_detr one level": (lambda: DeformableDetr(levels=1), {}, {}, "deformable_detr"),
    "mmdet 2": (lambda: MmdetDetr(2), {"meta": {"CLASSES": tuple("abcde")}}, {}, "detr"),
    "mmdet 3": (lambda: MmdetDetr(3), {"meta": {"dataset_meta": {"classes": list("abcde")}}}, {}, "detr"),
}


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def convert(content: dict, fields: dict | None = None, partial: bool = False):
    return convert_tensors(find_detector_in(content, LAYOUTS, "published.pth"), "published.pth", fields, partial)


@pytest.mark.parametrize(("build", "points"), [(lambda: Detr(91), None), (lambda: DeformableDetr(), 8)])
def test_the_heads_that_are_given_are_of_both_parts(build, points):
    """Half of them have twice as many sampling points each, in tensors of the same shape."""
    config = convert({"model": build().state_dict()}, {"encoder_attention_heads": 4})[0].config
    assert config.encoder_attention_heads == config.decoder_attention_heads == 4
    assert points is None or config.encoder_n_points == config.decoder_n_points == points


@pytest.mark.parametrize("name", ORIGINALS)
def test_outputs_are_those_of_the_original(name):
    build, beside, fields, family = ORIGINALS[name]
    original = randomise(build())
    detector, report = convert({"state_dict" if "mmdet" in name else "model": original.state_dict()} | beside, fields)
    assert detector.config.model_type == report.family == family and not detector.training
    with torch.no_grad():
        logits, boxes = original(images())
        outputs = detector(images())
    assert logits.std() > 0.1 and boxes.std() > 0.01
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, boxes, atol=1e-5, rtol=1e-5)
    assert not report.missing and len(report.kept) + len(report.reshaped) == len(detector.state_dict())
    if "mmdet" in name:
        assert detector.config.id2label == dict(enumerate("abcde"))


@pytest.fixture(scope="module")
def detr() -> Detr:
    return randomise(Detr(91))


@pytest.fixture
def published(detr) -> dict:
    """What DETR's authors publish."""
    return {"model": dict(detr.state_dict())}


def test_a_file_becomes_a_folder_that_transformers_reads(published, tmp_path):
    refined = randomise(DeformableDetr(refine=True))
    torch.save({"model": refined.state_dict()}, tmp_path / "refined.pth")
    detector, report = read_detector(tmp_path / "refined.pth")
    detector.save_pretrained(tmp_path / "detector")
    again = type(detector).from_pretrained(tmp_path / "detector")
    with torch.no_grad():
        first, second = detector(images()), again(images())
    # The heads of its layers differ, which transformers would tie in a new detector.
    assert not torch.equal(again.bbox_embed[0].layers[2].weight, again.bbox_embed[1].layers[2].weight)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.pred_boxes, second.pred_boxes)
    assert json.loads(json.dumps(asdict(report)))["source"] == "refined.pth"


def test_the_report_says_what_became_of_every_tensor(published):
    published["model"]["patch2query.weight"] = torch.zeros(2, 2)
    published["model"]["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    detector, report = convert(published)
    assert report.kept["class_labels_classifier.weight"] == "class_embed.weight"
    key = "model.encoder.layers.1.self_attn.k_proj.bias"
    assert report.reshaped[key] == "transformer.encoder.layers.1.self_attn.in_proj_bias, part 2 of 3 of the rows"
    assert set(report.dropped) == {"patch2query.weight", "backbone.0.body.bn1.num_batches_tracked"}
    assert "queries of crops" in report.dropped["patch2query.weight"]
    assert str(report).startswith("published.pth is DETR of facebookresearch/detr and becomes detr: 161 tensors kept")
    assert "  dropped: 1 (makes queries of crops" in str(report) and "auxiliary_loss=false" in str(report)
    # COCO's names by COCO's own ids.
    assert detector.config.id2label[1] == "person" and detector.config.id2label[90] == "toothbrush"
    assert detector.config.id2label[12] == "unused 12" and detector.config.num_labels == 91


def test_pre_training_of_other_authors_with_this_code(published):
    # DETReg and UP-DETR have heads of their own, and SiameseDETR's conversion leaves the class layer out.
    model = published["model"]
    model["feature_embed.layers.0.weight"] = model["feature_align.layers.1.bias"] = torch.zeros(2)
    for name in ("class_embed.weight", "class_embed.bias"):
        del model[name]
    detector, report = convert(published)
    assert detector.config.num_labels == 1 and len(report.dropped) == 2
    assert set(report.missing) == {"class_labels_classifier.weight", "class_labels_classifier.bias"}


@pytest.mark.parametrize(
    "build, own",
    [
        (lambda: Detr(3), ["patch2query", "feature_align.layers.0", "feature_align.layers.1"]),  # UP-DETR
        (lambda: Detr(2), ["feature_embed.layers.0", "feature_embed.layers.1"]),  # DETReg
        (lambda: DeformableDetr(refine=True), ["feature_embed.0.layers.0", "feature_embed.0.layers.1"]),  # DETReg
    ],
)
def test_pre_trained_detectors_of_other_authors_give_the_same_outputs(build, own):
    original = randomise(build())
    state = original.state_dict() | {f"{n}.{part}": torch.zeros(3, 3)[0] for n in own for part in ("weight", "bias")}
    detector, report = convert({"model": state})
    assert {name.rsplit(".", 1)[0] for name in report.dropped} == set(own) and not report.missing
    with torch.no_grad():
        logits, boxes = original(images())
        outputs = detector(images())
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, boxes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [Detr, ConditionalDetr, DeformableDetr])
def test_siamese_detr_before_its_own_conversion(build):
    original = randomise(build())
    state = {n.replace("backbone.0.body.", "backbone."): t for n, t in original.state_dict().items()}
    state = {n: t for n, t in state.items() if not n.startswith(("class_embed", "bbox_embed"))}
    if build is DeformableDetr:
        state["query_embed.weight"], state["transformer.tgt_embed.weight"] = original.query_embed.weight.chunk(2, 1)
    heads = original.bbox_embed[0] if build is DeformableDetr else original.bbox_embed
    state |= {f"pred_head.bbox_embed.{n}": t for n, t in heads.state_dict().items()}
    for name in (
        "pred_head.class_embed",
        "pred_head.feature_align.layers.0",
        "patch2query",
        "enc_head.0.projector.fc",
    ):
        state |= {f"{name}.weight": torch.zeros(3, 64), f"{name}.bias": torch.zeros(3)}
    detector, report = convert({"state_dict": {f"module.{n}": t for n, t in state.items()}})
    assert report.layout.endswith("of SiameseDETR") and len(report.dropped) == 8
    assert report.missing and all("class" in name for name in report.missing)
    with torch.no_grad():
        torch.testing.assert_close(detector(images()).pred_boxes, original(images())[1], atol=1e-5, rtol=1e-5)


def test_aligndet_holds_the_detector_three_times():
    online, target = randomise(MmdetDetr(2)), randomise(MmdetDetr(2), seed=1)
    projector = {"bbox_head.projector.0.weight": torch.zeros(2, 2)}
    states = {"target_backbone.": target.state_dict(), "online_backbone.": online.state_dict() | projector}
    states["backbone."] = states["online_backbone."]
    content = {"meta": {}, "state_dict": {p + n: t for p, state in states.items() for n, t in state.items()}}
    detector, report = convert(content)
    with torch.no_grad():
        logits, boxes = online(images())
        outputs = detector(images())
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, boxes, atol=1e-5, rtol=1e-5)
    reasons = {why.split(",")[0] for why in report.dropped.values()}
    assert reasons == {
        "AlignDet's second name for the tensors under `backbone.`",
        "AlignDet's momentum detector",
        "AlignDet's projector",
        "a counter of training",
    }
    # Its own extraction leaves out the class layer and the last box layer.
    extracted = {n: t for n, t in online.state_dict().items() if "fc_cls" not in n and "fc_reg" not in n}
    _, report = convert({"state_dict": extracted})
    assert {name.rsplit(".", 1)[0] for name in report.missing} == {
        "class_labels_classifier",
        "bbox_predictor.layers.2",
    }


def test_a_tensor_too_few_or_too_many_is_refused_unless_told_otherwise(published):
    model = published["model"]
    del model["transformer.decoder.norm.bias"]
    model["stranger.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        convert(published)
    assert str(error.value) == (
        "published.pth is DETR of facebookresearch/detr, but has 1 unknown tensors, such as stranger.weight and lacks "
        "1 tensors, such as transformer.decoder.norm.bias: it is another model, or was cut. `aligndet convert "
        "--partial` takes what fits"
    )
    detector, report = convert(published, partial=True)
    assert report.missing == {"model.decoder.layernorm.bias": "the file lacks transformer.decoder.norm.bias"}
    assert report.dropped["stranger.weight"] == "unknown, and left out as `partial` asks"
    assert torch.equal(detector.model.decoder.layernorm.bias, torch.zeros(64))


def test_a_tensor_of_another_shape_is_refused(published):
    published["model"]["bbox_embed.layers.1.bias"] = torch.zeros(65)
    with pytest.raises(ValueError, match=r"bbox_embed\.layers\.1\.bias has shape \[65\], expected \[64\]"):
        convert(published, partial=True)


def test_another_architecture_is_refused(published):
    model = published["model"] | {"transformer.encoder.norm.weight": torch.ones(64)}
    with pytest.raises(ValueError, match=r"with norms before attention \(--pre_norm\), which detr of transformers"):
        convert({"model": model}, partial=True)
    model = {name: t for name, t in published["model"].items() if "layer2.1" not in name}
    with pytest.raises(ValueError, match="has 2/1/2/2 blocks in its stages: it is none of resnet18"):
        convert({"model": model})
    caffe = {"state_dict": MmdetDetr(2).state_dict(), "meta": {"config": "backbone=dict(style='caffe')"}}
    with pytest.raises(ValueError, match="its trunk is of the Caffe kind"):
        convert(caffe)


def test_a_file_of_something_else_is_refused(published):
    with pytest.raises(ValueError, match="published.pth is no layout of a detector that is known here: it has 2 te"):
        convert({"model": {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}})
    with pytest.raises(ValueError, match="it has no tensors"):
        convert({"epoch": 3})
    with pytest.raises(ValueError, match="detr has no config field num_query; did you mean 'num_queries'"):
        convert(published, {"num_query": 3})


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_are_told_apart_by_their_names(name):
    with torch.device("meta"):
        names = torchvision.models.get_model(name).state_dict()
    assert resnet_name(names, "") == name and name in RESNETS.values()
