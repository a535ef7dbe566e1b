"""Published convnets: torchvision's, mmdet's, AlignDet's and Detectron2's give the same outputs here."""

import pickle

import pytest
import torch
from original_convnets import CLASSES, REGIONS, SHAPE, Detectron2Rcnn, MmdetFcos, MmdetRcnn, MmdetRetinaNet
from original_detectors import randomise, resnet
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from aligndet_hf.detectors.converters import LAYOUTS, convert_tensors, find_detector_in, read_detector
from aligndet_hf.detectors.converters.folder import export_tensors


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(seed))


def convert(content: dict, fields: dict | None = None, partial: bool = False):
    return convert_tensors(find_detector_in(content, LAYOUTS, "published.pth"), "published.pth", fields, partial)


@torch.no_grad()
def dense_outputs(detector) -> dict[str, torch.Tensor]:
    """Scores and boxes of all anchors or points, before any suppression."""
    maps = detector.detector.backbone(images())
    found = detector._predictions(maps, detector._towers(maps))
    anchors, _ = detector._anchors(ImageList(images(), [SHAPE, SHAPE]), maps)
    boxes = [detector.decode(own, anchors) for own in found["boxes"]]
    return {"scores": detector.scores(found), "boxes": torch.stack(boxes)}


@torch.no_grad()
def region_outputs(detector) -> dict[str, torch.Tensor]:
    """Of the first image: all proposals, and what is said of given regions."""
    maps = {name: one[:1] for name, one in detector.detector.backbone(images()).items()}
    rpn, roi = detector.detector.rpn, detector.detector.roi_heads
    anchors, _ = detector._anchors(ImageList(images(), [SHAPE]), maps)
    objectness, deltas = concat_box_prediction_layers(*rpn.head(list(maps.values())))
    proposals = rpn.box_coder.decode_single(deltas, anchors)
    logits, deltas = roi.box_predictor(roi.box_head(roi.box_roi_pool(maps, [REGIONS], [SHAPE])))
    found = {"objectness": objectness[None].sigmoid(), "proposals": proposals[None]}
    found["scores"] = logits.softmax(-1)[:, 1:]
    found["boxes"] = roi.box_coder.decode(deltas, [REGIONS])[:, 1:]
    if roi.has_mask():
        masks = roi.mask_predictor(roi.mask_head(roi.mask_roi_pool(maps, [REGIONS], [SHAPE])))
        found["masks"] = masks[:, 1:].sigmoid()
    return found


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.std() > 1e-3, name
        # Boxes are in pixels.
        tolerance = 1e-4 if name in ("boxes", "proposals") else 1e-5
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def calmed(model: nn.Module) -> nn.Module:
    """Random, with box layers that are small, lest boxes are astronomically large."""
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(layer in name for layer in ("reg", "bbox_pred", "anchor_deltas")) and "convs" not in name:
                parameter.mul_(0.1)
    return model


# ---- mmdet and Detectron2 ----

MMDET = {
    "retinanet": (lambda: MmdetRetinaNet(), "torchvision_retinanet"),
    "retinanet with norms": (lambda: MmdetRetinaNet(norm="bn"), "torchvision_retinanet"),
    "fcos": (lambda: MmdetFcos(), "torchvision_fcos"),
    "fcos with norms": (lambda: MmdetFcos(norm="bn"), "torchvision_fcos"),
    "faster r-cnn": (lambda: MmdetRcnn(), "torchvision_faster_rcnn"),
    "mask r-cnn": (lambda: MmdetRcnn(masks=True), "torchvision_mask_rcnn"),
    "mask r-cnn of aligndet": (lambda: MmdetRcnn(convs=True, masks=True, norm="bn"), "torchvision_mask_rcnn"),
}


@pytest.mark.parametrize("name", MMDET)
def test_mmdet(name):
    build, family = MMDET[name]
    original = calmed(build())
    meta = {"CLASSES": ("cat", "dog", "bird")}
    detector, report = convert({"meta": meta, "state_dict": original.state_dict()})
    assert detector.config.model_type == report.family == family
    assert detector.config.id2label == {0: "cat", 1: "dog", 2: "bird"} and not report.missing
    with torch.no_grad():
        expected = original(images())
    if isinstance(expected, dict):
        assert_same(region_outputs(detector), expected)
    else:
        assert_same(dense_outputs(detector), dict(zip(("scores", "boxes"), expected, strict=True)))
    with torch.no_grad():
        detections = detector(images())
    assert detections.logits.shape == (2, 100, CLASSES) and detections.pred_boxes.isfinite().all()

    # And back: what mmdet would load, but for norms that were folded.
    tensors = export_tensors(detector, "mmdet")
    again, _ = convert({"meta": meta, "state_dict": tensors})
    outputs = region_outputs if isinstance(expected, dict) else dense_outputs
    assert all(torch.equal(a, b) for a, b in zip(outputs(again).values(), outputs(detector).values(), strict=True))
    if "norms" not in name and "aligndet" not in name:
        theirs = {n for n in original.state_dict() if not n.endswith("num_batches_tracked")}
        assert theirs <= set(tensors)
        biases = set(tensors) - theirs
        assert not biases if "fcos" not in name else all(n.endswith("_convs." + n[-11] + ".conv.bias") for n in biases)


def test_fcos_of_mmdet_trains_and_starts_scales_at_one():
    detector, _ = convert({"state_dict": calmed(MmdetFcos()).state_dict()})
    labels = [{"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]]), "class_labels": torch.tensor([1])}] * 2
    detector.train()(images(), labels=labels).loss.backward()
    gradients = [scale.scale.grad for scale in detector.detector.head.regression_head.scales]
    assert any(gradient is not None and gradient != 0 for gradient in gradients)
    state = {name: tensor for name, tensor in detector.state_dict().items() if ".scales." not in name}
    again = type(detector).from_pretrained(None, config=detector.config, state_dict=state)
    assert all(scale.scale == 1 for scale in again.detector.head.regression_head.scales)


def test_norms_are_folded_and_told():
    _, report = convert({"state_dict": MmdetRetinaNet(norm="bn").state_dict()})
    key = "detector.backbone.fpn.extra_blocks.p7.bias"
    assert report.reshaped[key] == "neck.fpn_convs.4.conv.bias: its norm was folded into it"
    assert report.dropped["neck.fpn_convs.4.bn.running_mean"] == "folded into neck.fpn_convs.4.conv"


def aligndet(online: nn.Module, heads: dict) -> dict:
    state = {n: t for n, t in online.state_dict().items() if not any(n.startswith(head) for head in heads)}
    state |= {f"{head}.{i}.weight": torch.zeros(2, 2) for head, count in heads.items() for i in range(0, count, 2)}
    return {"state_dict": {f"{p}_backbone.{n}": t for p in ("online", "target") for n, t in state.items()}
            | {f"backbone.{n}": t for n, t in state.items()}}  # fmt: skip


@pytest.mark.parametrize(
    "build, heads, family",
    [
        (lambda: MmdetRetinaNet(), {"bbox_head.retina_cls": 3}, "torchvision_retinanet"),
        (lambda: MmdetFcos(), {"bbox_head.conv_cls": 3}, "torchvision_fcos"),
        (lambda: MmdetRcnn(convs=True), {"roi_head.bbox_head.fc_cls": 3}, "torchvision_faster_rcnn"),
    ],
)
def test_pre_training_of_aligndet(build, heads, family):
    online = calmed(build())
    detector, report = convert(aligndet(online, heads))
    assert detector.config.model_type == family and detector.config.num_labels == 1
    missing = {name for name in report.missing if not name.endswith("num_batches_tracked")}
    assert missing and all("cls" in name or "bbox_pred" in name for name in missing)
    weight = online.neck.fpn_convs[0].conv.weight
    assert torch.equal(detector.detector.backbone.fpn.layer_blocks[0][0].weight, weight)
    if not family.endswith("rcnn"):  # whose box layer is there, beside a new class layer
        with torch.no_grad():
            _, boxes = online(images())
        assert_same({"boxes": dense_outputs(detector)["boxes"]}, {"boxes": boxes})
    assert set(report.dropped.values()) >= {
        "AlignDet's momentum detector, which only pre-training needs",
        "AlignDet's projector in place of the class layer, which only pre-training needs",
    }


def test_detectron2():
    original = calmed(Detectron2Rcnn())
    content = {"model": original.state_dict() | {"pixel_mean": torch.tensor([123.675, 116.28, 103.53])[:, None, None]}}
    detector, report = convert(content)
    assert report.family == "torchvision_mask_rcnn" and detector.config.version == 2 and not report.missing
    with torch.no_grad():
        assert_same(region_outputs(detector), original(images()))
    content["model"]["pixel_mean"] = content["model"]["pixel_mean"].flip(0)
    with pytest.raises(ValueError, match="takes images with blue first"):
        convert(content)
    frozen = {n: t for n, t in original.state_dict().items() if not n.endswith("num_batches_tracked")}
    with pytest.raises(ValueError, match="its trunk has frozen norms, as Detectron2's own models have"):
        convert({"model": frozen})


def test_the_pickles_of_soco(tmp_path):
    """Trunk, pyramid and box head, as its converter writes them."""
    original = calmed(Detectron2Rcnn())
    arrays = {}
    for name, tensor in original.state_dict().items():
        for part in ("backbone.bottom_up.", "backbone.", "roi_heads."):
            if name.startswith(part) and "predictor" not in name and "mask_head" not in name:
                arrays[name.removeprefix(part)] = tensor.numpy()
                break
    path = tmp_path / "current_detectron2_Head.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Yue", "matching_heuristics": True}))
    for family in ("torchvision_faster_rcnn", "torchvision_mask_rcnn"):
        detector, report = read_detector(path, family)
        assert detector.config.model_type == family
        missing = [name for name in report.missing if not name.endswith("num_batches_tracked")]
        assert all(name.startswith(("detector.rpn.", "detector.roi_heads.")) for name in missing)
        assert not any("box_head" in name for name in missing)
        with torch.no_grad():
            pooled = torch.randn(2, 64, 7, 7)
            x = pooled
            for i in range(1, 5):
                conv = getattr(original.roi_heads.box_head, f"conv{i}")
                x = conv.norm(conv(x)).relu()
            x = original.roi_heads.box_head.fc1(x.flatten(1)).relu()
            torch.testing.assert_close(detector.detector.roi_heads.box_head(pooled), x, atol=1e-5, rtol=1e-5)


# ---- torchvision ----


def fpn(norm=None, levels: int = 4, p6=None) -> nn.Module:
    body = resnet(norm=FrozenBatchNorm2d)
    stages = [f"layer{i}" for i in range(5 - levels, 5)]
    channels = [64, 128, 256, 512][4 - levels :]
    return BackboneWithFPN(
        body, {stage: str(i) for i, stage in enumerate(stages)}, channels, 64, p6 or LastLevelMaxPool(), norm
    )


def faster(network=FasterRCNN, norm: bool = False) -> nn.Module:
    parts = {}
    if norm:
        parts["rpn_head"] = RPNHead(64, 3, conv_depth=2)
        parts["box_head"] = FastRCNNConvFCHead((64, 7, 7), [64] * 4, [80], norm_layer=nn.BatchNorm2d)
        parts["box_predictor"] = FastRCNNPredictor(80, CLASSES + 1)
        return network(fpn(nn.BatchNorm2d), **parts)
    if network is MaskRCNN:
        parts["mask_head"] = MaskRCNNHeads(64, [64] * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(64, 64, CLASSES + 1)
        return network(fpn(), box_predictor=FastRCNNPredictor(1024, CLASSES + 1), **parts)
    return network(fpn(), CLASSES + 1)


TORCHVISION = {
    "retinanet": lambda: RetinaNet(
        fpn(levels=3, p6=LastLevelP6P7(64, 64)), CLASSES, anchor_generator=_default_anchorgen()
    ),
    "fcos": lambda: FCOS(fpn(levels=3, p6=LastLevelP6P7(64, 64)), CLASSES),
    "faster_rcnn": faster,
    "faster_rcnn version 2": lambda: faster(norm=True),
    "mask_rcnn": lambda: faster(MaskRCNN),
}


@torch.no_grad()
def torchvision_outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    maps = model.backbone(images())
    if hasattr(model, "head"):
        found = model.head(list(maps.values()))
        anchors = model.anchor_generator(ImageList(images(), [SHAPE, SHAPE]), list(maps.values()))[0]
        scores = found["cls_logits"].sigmoid()
        if "bbox_ctrness" in found:
            scores = (scores * found["bbox_ctrness"].sigmoid()).sqrt()
            boxes = [model.box_coder.decode(own, anchors) for own in found["bbox_regression"]]
        else:
            boxes = [model.box_coder.decode_single(own, anchors) for own in found["bbox_regression"]]
        return {"scores": scores, "boxes": torch.stack(boxes)}

    class View:
        detector = model

        @staticmethod
        def _anchors(image_list, maps):
            return model.rpn.anchor_generator(image_list, list(maps.values()))[0], None

    return region_outputs(View)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    original = calmed(TORCHVISION[name]())
    detector, report = convert(dict(original.state_dict()))
    assert detector.config.model_type == f"torchvision_{name.split()[0]}" and detector.config.num_labels == CLASSES
    assert not [n for n in report.missing if not n.endswith("num_batches_tracked")]
    outputs = dense_outputs if hasattr(original, "head") else region_outputs
    assert_same(outputs(detector), torchvision_outputs(original))
    # And back, strictly.
    tensors = export_tensors(detector, "torchvision")
    again = TORCHVISION[name]()
    again.load_state_dict(tensors)
    for key, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with pytest.raises(ValueError, match="computes by the conventions of torchvision"):
        export_tensors(detector, "mmdet")


def test_torchvision_before_version_013():
    """Old names, and norms without epsilon, as torchvision runs these files."""
    original = calmed(faster(MaskRCNN))
    old = {}
    for name, tensor in original.state_dict().items():
        name = name.replace("_blocks.", "_blocks#").replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            name = name.replace(f"_blocks#{i}.0.", f"_blocks.{i}.")
            name = name.replace(f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
        old[name.replace("_blocks#", "_blocks.")] = tensor
    assert "rpn.head.conv.weight" in old and "backbone.fpn.inner_blocks.0.weight" in old
    detector, report = convert(old)
    for module in original.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    assert_same(region_outputs(detector), torchvision_outputs(original))
    assert "less the epsilon of norms" in report.reshaped["detector.backbone.body._backbone.bn1.running_var"]
