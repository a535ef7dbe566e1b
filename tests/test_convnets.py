"""torchvision's four detectors as transformers models: the same networks, losses and detections."""

import json
import subprocess
import sys
from functools import partial

import forks
import pytest
import torch
from safetensors.torch import save_file
from tiny_detectors import random_batch, timm_backbone
from torch import nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrImageProcessor,
    TimmBackboneConfig,
    Trainer,
    TrainingArguments,
)

from aligndet_hf.convnets import modeling_torchvision
from aligndet_hf.convnets.modeling_torchvision import (
    MODELS,
    DenseDetector,
    FasterRcnnForObjectDetection,
    FcosForObjectDetection,
    MaskRcnnForObjectDetection,
    RetinaNetForObjectDetection,
    sample,
    sampling_noise,
)

CLASSES, HEIGHT, WIDTH = 3, 96, 128
NETWORKS = [(model, version) for model in MODELS for version in (1, 2) if (model, version) != (MODELS[1], 2)]
each_network = pytest.mark.parametrize(
    ("model", "version"), NETWORKS, ids=lambda value: getattr(value, "__name__", value)
)
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
EVERY_ROW = {"rpn_batch_size": 10**6, "roi_batch_size": 10**6}
# How we and torchvision call the terms.
TERMS = {
    "loss_ce": ("classification", "loss_classifier"),
    "loss_bbox": ("bbox_regression", "loss_box_reg"),
    "loss_giou": ("bbox_regression",),
    "loss_centerness": ("bbox_ctrness",),
    "loss_objectness": ("loss_objectness",),
    "loss_rpn_bbox": ("loss_rpn_box_reg",),
    "loss_mask": ("loss_mask",),
}


def small(model, version=1, width=64, **fields):
    """A narrow network of a kind, with class and box layers that predict something."""
    torch.manual_seed(0)
    is_dense = issubclass(model, DenseDetector)
    defaults = {} if is_dense else {"box_head_size": 64, "pre_nms_top_k": 100}
    config = model.config_class(
        backbone_config=timm_backbone("resnet10t", (2, 3, 4) if is_dense else (1, 2, 3, 4)),
        hidden_size=width,
        num_labels=CLASSES,
        version=version,
        **defaults | fields,
    )
    detector = model(config)
    for name, parameter in detector.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight", "cls_score.weight", "bbox_pred.weight")):
            parameter.data.mul_((30 if is_dense or "rpn" in name else 5) / version**4)  # norms make theirs larger
        if name.endswith("cls_logits.bias"):
            parameter.data.fill_(-1.0)
    return detector


def rectangle(seed=0, masks=False):
    """A batch of two images that are not square, of which torchvision's own transform changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch((5, 3), seed=seed)
    batch["pixel_values"] = torch.randn(2, 3, HEIGHT, WIDTH, generator=generator)
    del batch["pixel_mask"]
    if masks:
        for label in batch["labels"]:
            label["masks"] = torch.rand(len(label["boxes"]), HEIGHT, WIDTH, generator=generator) > 0.5
    return batch


def torchvisions(detector, batch):
    """Our network as torchvision runs it, with its targets."""
    reference = detector.detector
    reference.transform = GeneralizedRCNNTransform(HEIGHT, WIDTH, [0.0] * 3, [1.0] * 3).train(detector.training)
    reference.transform.torch_choice = lambda sizes: sizes[0]
    scale, first = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]), 0 if isinstance(detector, DenseDetector) else 1
    targets = [
        {
            "boxes": box_convert(label["boxes"] * scale, "cxcywh", "xyxy"),
            "labels": label["class_labels"] + first,
            "masks": label.get("masks", torch.zeros(0)).to(torch.uint8),
        }
        for label in batch["labels"]
    ]
    return lambda with_targets: reference(list(batch["pixel_values"]), *([targets] if with_targets else []))


def without_batch_statistics(detector):
    for module in detector.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return detector


@each_network
def test_losses_are_torchvisions(model, version):
    fields = {} if issubclass(model, DenseDetector) else EVERY_ROW
    detector, batch = without_batch_statistics(small(model, version, **fields)), rectangle(masks=True)
    ours = detector(**batch)
    theirs = torchvisions(detector, batch)(True)
    assert len(ours.loss_dict) == len(theirs)
    for name, term in ours.loss_dict.items():
        expected = next(theirs[key] for key in TERMS[name] if key in theirs)
        torch.testing.assert_close(term, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.loss, sum(theirs.values()), rtol=1e-5, atol=1e-6)


@each_network
def test_detections_are_torchvisions(model, version):
    detector, batch = small(model, version).eval(), rectangle()
    with torch.no_grad():
        outputs = detector(batch["pixel_values"], output_hidden_states=True)
        theirs = torchvisions(detector, batch)(False)
    processor = DeformableDetrImageProcessor()
    sizes = [(HEIGHT, WIDTH)] * 2
    for image, (ours, expected) in enumerate(
        zip(processor.post_process_object_detection(outputs, 1e-6, sizes), theirs, strict=True)
    ):
        count, first = len(expected["scores"]), 0 if isinstance(detector, DenseDetector) else 1
        assert count > 10 and len(ours["scores"]) == count
        torch.testing.assert_close(ours["scores"], expected["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(ours["labels"], expected["labels"] - first)
        if model is MaskRcnnForObjectDetection:
            masks = outputs.pred_masks[image, :count].sigmoid()[:, None]
            pasted = paste_masks_in_image(masks, ours["boxes"], (HEIGHT, WIDTH))
            torch.testing.assert_close(pasted, expected["masks"], rtol=1e-3, atol=1e-3)


@each_model
def test_the_arguments_for_torchvision_make_the_same_detector(model):
    """Anchors, thresholds and numbers, which are not in the tensors."""
    fields = {"nms_threshold": 0.3, "score_threshold": 0.02, "detections_per_image": 120, "pre_nms_top_k": 70}
    if model is FcosForObjectDetection:
        fields |= {"center_sampling_radius": None}
    else:
        sides = [[12, 20], [24, 40], [48, 80], [96, 160], [192, 320]]
        fields |= {"anchor_sizes": sides, "aspect_ratios": [0.7, 1.5]}
    if not issubclass(model, DenseDetector):
        fields |= {"box_head_size": 1024, "width": 256}  # torchvision's builders have no other
    detector, batch = small(model, **fields), rectangle()
    arguments = eval(f"dict({detector.torchvision_arguments()})", {"AnchorGenerator": AnchorGenerator})
    again = type(detector.detector)(detector.detector.backbone, **arguments)
    again.load_state_dict(detector.detector.state_dict(), strict=True)
    found = []
    for network in (detector.detector, again):
        detector.detector = network
        with torch.no_grad():
            found.append(torchvisions(detector.eval(), batch)(False))
    for ours, theirs in zip(*found, strict=True):
        assert len(ours["scores"]) > 10 and all(torch.equal(ours[name], theirs[name]) for name in ours)


def with_resnet18(kind, levels, extra):
    more = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if extra else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, **more)
    return kind(backbone, num_classes=CLASSES + (not extra))


RESNET50 = {"weights": None, "weights_backbone": None}
BUILDERS = {
    ("resnet18", RetinaNetForObjectDetection, 1): partial(with_resnet18, RetinaNet, (2, 3, 4), True),
    ("resnet18", FcosForObjectDetection, 1): partial(with_resnet18, FCOS, (2, 3, 4), True),
    ("resnet18", FasterRcnnForObjectDetection, 1): partial(with_resnet18, FasterRCNN, (1, 2, 3, 4), False),
    ("resnet18", MaskRcnnForObjectDetection, 1): partial(with_resnet18, MaskRCNN, (1, 2, 3, 4), False),
    ("resnet50", RetinaNetForObjectDetection, 1): retinanet_resnet50_fpn,
    ("resnet50", RetinaNetForObjectDetection, 2): retinanet_resnet50_fpn_v2,
    ("resnet50", FcosForObjectDetection, 1): fcos_resnet50_fpn,
    ("resnet50", FasterRcnnForObjectDetection, 1): fasterrcnn_resnet50_fpn,
    ("resnet50", FasterRcnnForObjectDetection, 2): fasterrcnn_resnet50_fpn_v2,
    ("resnet50", MaskRcnnForObjectDetection, 1): maskrcnn_resnet50_fpn,
    ("resnet50", MaskRcnnForObjectDetection, 2): maskrcnn_resnet50_fpn_v2,
}


@pytest.mark.parametrize(("backbone", "model", "version"), BUILDERS, ids=str)
def test_the_tensors_are_those_of_torchvisions_builders(backbone, model, version):
    """Names and shapes, which is what `strict=True` looks at; nothing of this size needs to be computed."""
    builder = BUILDERS[backbone, model, version]
    with torch.device("meta"):
        levels = model.config_class.levels
        config = TimmBackboneConfig(backbone=backbone, out_indices=levels, freeze_batch_norm_2d=True)
        ours = model(model.config_class(backbone_config=config, num_labels=CLASSES, version=version))
        if backbone == "resnet18":
            theirs = builder()
        else:
            theirs = builder(num_classes=CLASSES + (not issubclass(model, DenseDetector)), **RESNET50)
    assert {n: t.shape for n, t in ours.torchvision_state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }


def test_another_backbone_has_no_torchvision_names():
    with pytest.raises(ValueError, match="ResNets; this one has 'resnet10t'"):
        small(FcosForObjectDetection).torchvision_state_dict()


@each_model
def test_an_image_is_the_same_beside_a_larger_one(model):
    """Padding is no image: the mask gives the sizes that boxes are normalised with, and detections are cut to."""
    detector = small(model).eval()
    pixels, label = torch.randn(1, 3, 64, 96), random_batch((4,))["labels"]
    padded = torch.zeros(1, 3, 128, 128)
    padded[..., :64, :96] = pixels
    mask = torch.zeros(1, 128, 128, dtype=torch.long)
    mask[:, :64, :96] = 1
    with torch.no_grad():
        outputs = detector(padded, mask, label)
        boxes = box_convert(outputs.pred_boxes[0], "cxcywh", "xyxy")
        assert boxes.min() > -1e-6 and boxes.max() < 1 + 1e-6 and boxes.max() > 0.9
        # The same boxes in pixels give the same targets, whatever the size of the canvas.
        targets = detector._targets(label, [(64, 96)])
    expected = box_convert(label[0]["boxes"] * torch.tensor([96, 64, 96, 64]), "cxcywh", "xyxy")
    torch.testing.assert_close(targets[0]["pixels"], expected)


@each_model
def test_sizes_that_are_no_multiples_of_32_are_padded(model):
    detector = small(model).eval()
    pixels = torch.randn(1, 3, 70, 101)
    padded, mask = torch.zeros(1, 3, 96, 128), torch.zeros(1, 96, 128, dtype=torch.long)
    padded[..., :70, :101], mask[:, :70, :101] = pixels, 1
    with torch.no_grad():
        ours, expected = detector(pixels), detector(padded, mask)
    assert torch.equal(ours.logits, expected.logits) and torch.equal(ours.pred_boxes, expected.pred_boxes)


@each_model
def test_images_without_boxes_train(model):
    detector = small(model).train()
    for counts in ((0, 3), (0, 0)):
        loss = detector(**random_batch(counts), output_hidden_states=True).loss
        loss.backward()
        assert loss.isfinite()
        missing = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
        assert missing == []


@each_model
def test_an_image_in_which_nothing_is_found(model):
    detector = small(model, score_threshold=1.0).eval()
    if isinstance(detector, FasterRcnnForObjectDetection):
        detector.detector.rpn.score_thresh = 1.1  # not even a proposal
    with torch.no_grad():
        outputs = detector(torch.zeros(2, 3, 64, 64), output_hidden_states=True)
    # No threshold lets through what was not found, not even 0.
    assert not outputs.logits.sigmoid().any() and not outputs.pred_boxes.any() and not outputs.object_features.any()
    found = DeformableDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0)
    assert [len(one["scores"]) for one in found] == [0, 0]


@each_model
def test_without_a_dictionary_the_output_is_a_tuple_in_the_order_of_its_fields(model):
    """As of every model of transformers; unpacked, a dictionary would give its keys."""
    detector, batch = small(model).eval(), random_batch((5, 3))
    with torch.no_grad():
        whole = detector(batch["pixel_values"])
        logits, boxes, *_ = detector(batch["pixel_values"], return_dict=False)
        loss, terms, *_ = detector(**batch, return_dict=False)
    assert torch.equal(logits, whole.logits) and torch.equal(boxes, whole.pred_boxes)
    assert loss.ndim == 0 and isinstance(terms, dict)


@each_model
def test_rows_are_the_features_of_their_boxes(model):
    """What enters the class layer: put through it, the features give the logits of the detections."""
    detector = small(model).eval()
    batch = random_batch((5, 3))
    with torch.no_grad():
        rows = detector(**batch, output_hidden_states=True)
        found = detector(batch["pixel_values"], output_hidden_states=True)
    assert len(rows.object_features) == len(rows.object_index) == len(rows.object_slots)
    assert set(rows.object_index.tolist()) <= set(range(-1, 8)) and (rows.object_index >= 0).any()
    assert rows.object_slots.max() < detector.config.num_anchors
    count = int((found.logits[0].amax(-1) > -40).sum())
    features = found.object_features.view(2, 100, -1)[0, :count]
    if isinstance(detector, FasterRcnnForObjectDetection):
        scores = detector.detector.roi_heads.box_predictor.cls_score(features).softmax(-1)[:, 1:]
        best, label = found.logits[0, :count].max(-1)
        torch.testing.assert_close(scores[range(count), label], best.sigmoid())
    else:
        assert features.abs().sum(1).min() > 0


@each_model
def test_boxes_have_weights_and_ignored_boxes_are_no_background(model):
    detector, batch = small(model).train(), random_batch((4, 2))
    whole = detector(**batch).loss_dict
    for label in batch["labels"]:
        label["weights"] = torch.ones(len(label["boxes"]))
    assert all(torch.equal(term, whole[name]) for name, term in detector(**batch).loss_dict.items())
    for label in batch["labels"]:
        label["weights"] = torch.zeros(len(label["boxes"]))
    weightless = detector(**batch).loss_dict
    assert all(weightless[name] == 0 for name in weightless if "bbox" in name or "giou" in name or "center" in name)
    # Where everything is ignored, only objects are left.
    for label in batch["labels"]:
        label["ignored_boxes"] = torch.tensor([[0.5, 0.5, 4.0, 4.0]])
    nothing = detector(**batch).loss_dict
    assert all(term == 0 for term in nothing.values()), nothing
    assert weightless["loss_ce"] > 0


@each_network
def test_labels_of_other_types_are_the_same_and_unknown_classes_are_named(model, version):
    detector, batch = without_batch_statistics(small(model, version)), random_batch((4, 2))
    expected = detector(**batch).loss
    other = {"boxes": torch.float64, "class_labels": torch.int32}
    labels = [label | {name: label[name].to(dtype) for name, dtype in other.items()} for label in batch["labels"]]
    assert torch.equal(detector(**batch | {"labels": labels}).loss, expected)
    for wrong in (-1, CLASSES):
        labels[1]["class_labels"] = torch.tensor([0, wrong])
        with pytest.raises(
            ValueError, match=rf"labels\[1\] of this batch has class_labels .*{wrong}.* classes 0 to 2"
        ):
            detector(**batch | {"labels": labels})


@each_model
def test_only_rows_means_no_losses_and_the_same_rows(model):
    detector, batch = small(model).train(), random_batch((5, 3))
    full = detector(**batch, output_hidden_states=True)
    detector.rows_only = True
    for label in batch["labels"]:
        del label["class_labels"]  # which say nothing about rows
    rows = detector(**batch, output_hidden_states=True)
    assert rows.loss is None and rows.logits is None
    assert torch.equal(rows.object_features, full.object_features) and torch.equal(
        rows.object_index, full.object_index
    )


def test_samples_are_objects_first_and_no_more_than_asked():
    matched, noise = torch.tensor([0, 1, 2, -1, -1, -1, -2]), torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 1.0])
    assert sample(matched, noise, 100).tolist() == [1, 2, 0, 4, 5, 3]
    assert sample(matched, noise, 4, max_objects=2).tolist() == [1, 2, 4, 5]
    assert sample(matched, noise, 2).tolist() == [1, 2]


def test_noise_follows_from_the_boxes_and_not_from_the_batch_or_the_generator():
    labels = random_batch((5, 3, 0))["labels"]
    noise = sampling_noise(labels, 1000)
    torch.manual_seed(123)
    assert torch.equal(sampling_noise(labels[1:2], 500)[0], noise[1, :500])
    assert 0 <= noise.min() and noise.max() < 1 and noise[:2].std() > 0.28
    assert abs(torch.corrcoef(noise[:2])[0, 1]) < 0.1
    # In fine-tuning, where the same boxes come again, the generator has a say, too.
    plain = [{"boxes": label["boxes"]} for label in labels]
    torch.manual_seed(1)
    first, second = sampling_noise(plain, 1000), sampling_noise(plain, 1000)
    torch.manual_seed(1)
    assert torch.equal(sampling_noise(plain, 1000), first) and not torch.equal(first, second)


@each_model
def test_a_measured_loss_depends_on_the_weights_alone(model):
    """Or the checkpoint with the lowest `eval_loss` of the stock Trainer would be drawn by lot."""
    detector, batch = small(model, **{"roi_batch_size": 8} if model in MODELS[2:] else {}).eval(), random_batch((5, 3))
    del batch["labels"][0]["proposal_ids"], batch["labels"][1]["proposal_ids"]
    with torch.no_grad():
        state = torch.get_rng_state()
        losses = {float(detector(**batch).loss) for _ in range(3)}
    assert len(losses) == 1 and torch.equal(torch.get_rng_state(), state)


def test_regions_are_pooled_at_the_strides_of_the_maps_whatever_came_first():
    """torchvision infers scales from the first images, and wrongly where padding is much of a small one."""
    detector = small(FasterRcnnForObjectDetection).eval()
    pixels = torch.randn(1, 3, 66, 66)  # padded to 96: a quarter of 96 is nearer to a half of 66 than to its quarter
    with torch.no_grad():
        fresh = detector(pixels)
        assert detector.detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        other = small(FasterRcnnForObjectDetection).eval()
        other(torch.randn(1, 3, 128, 128))
        after = other(pixels)
    assert torch.equal(fresh.logits, after.logits) and torch.equal(fresh.pred_boxes, after.pred_boxes)


@pytest.mark.parametrize("conventions", ["torchvision", "mmdet"])
def test_half_precision_keeps_regions_exact(conventions):
    detector = small(FasterRcnnForObjectDetection, conventions=conventions)
    pool, half = detector.detector.roi_heads.box_roi_pool, torch.bfloat16
    maps = {str(level): torch.randn(1, 8, 200 // 2**level, 336 // 2**level).to(half) for level in range(4)}
    images = ImageList(torch.empty(1, 3, 800, 1344), [(800, 1344)])
    regions = [torch.tensor([[1150.3, 611.7, 1183.9, 650.2], [1203.0, 701.0, 1219.0, 719.0]])]
    with torch.autocast("cpu", half):
        found = detector._pooled(pool, maps, regions, images)
    exact = detector._pooled(pool, {name: each.float() for name, each in maps.items()}, regions, images)
    assert found.dtype == half and torch.equal(found, exact.to(half))


@pytest.mark.parametrize("model", MODELS[2:], ids=lambda model: model.__name__)
def test_regions_are_pooled_in_a_detector_of_half_precision(model):
    detector = small(model).to(torch.bfloat16).eval()
    with torch.no_grad():
        found = detector(torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.bfloat16))
    assert found.pred_boxes.isfinite().all() and (found.logits > modeling_torchvision.NO_LOGIT).any()


@each_model
def test_half_precision_keeps_anchors_exact(model):
    detector, batch = small(model).train(), random_batch((5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        half = detector(**batch).loss
    full = detector(**batch).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)


def test_masks_are_trained_when_labels_have_them():
    detector = small(MaskRcnnForObjectDetection).train()
    assert detector(**random_batch((5, 3))).loss_dict["loss_mask"] == 0
    batch = rectangle(masks=True)
    terms = detector(**batch)
    terms.loss.backward()
    assert detector.detector.roi_heads.mask_head[0][0].weight.grad.abs().sum() > 0
    for label in batch["labels"]:
        label["weights"] = torch.full([len(label["boxes"])], 0.25)
    torch.testing.assert_close(detector(**batch).loss_dict["loss_mask"], terms.loss_dict["loss_mask"] / 4)


def test_an_image_without_masks_trains_boxes_beside_one_with():
    """The mask loss leaves its regions out of the count, and its boxes count as ever."""
    detector = without_batch_statistics(small(MaskRcnnForObjectDetection, **EVERY_ROW))
    batch = rectangle(masks=True)
    whole = detector(**batch).loss_dict
    del batch["labels"][1]["masks"]
    half = detector(**batch).loss_dict
    alone = detector(batch["pixel_values"][:1], labels=batch["labels"][:1]).loss_dict["loss_mask"]
    assert half["loss_mask"] > 0 and half["loss_mask"] != whole["loss_mask"]
    torch.testing.assert_close(half["loss_mask"], alone)
    assert all(torch.equal(term, whole[name]) for name, term in half.items() if name != "loss_mask")


@each_model
def test_a_checkpoint_gets_other_classes_as_torchvision_starts_them(model, tmp_path):
    detector = small(model)
    detector.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(again) is model
    assert all(
        torch.equal(a, b) for a, b in zip(detector.state_dict().values(), again.state_dict().values(), strict=True)
    )
    labels = {index: str(index) for index in range(7)}
    other = AutoModelForObjectDetection.from_pretrained(tmp_path, id2label=labels, ignore_mismatched_sizes=True)
    for name, parameter in other.named_parameters():
        if name.endswith("classification_head.cls_logits.weight"):
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1)
        if name.endswith("classification_head.cls_logits.bias"):
            assert parameter.sigmoid().mean().item() == pytest.approx(0.01, rel=1e-4)
        if name.endswith(("box_predictor.cls_score.weight", "bbox_pred.weight")) and "roi_heads" in name:
            assert 0 < parameter.abs().max() <= 1 / 8 + 1e-6  # uniform, by the root of 64 inputs
        assert parameter.isfinite().all()


@each_model
def test_the_stock_trainer_trains(model, tmp_path):
    detector = small(model)
    samples = [
        {"pixel_values": torch.randn(3, 64, 64), "labels": random_batch((3,), seed=seed)["labels"][0]}
        for seed in range(4)
    ]

    def collate(rows):
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": [r["labels"] for r in rows]}

    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
    )
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    result = Trainer(detector, arguments, train_dataset=samples, data_collator=collate).train()
    assert result.training_loss > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


PLAIN_PROCESS = """
import json, sys
import numpy as np
from PIL import Image
from transformers import pipeline
found = {}
for folder in sys.argv[1:]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    detector = pipeline("object-detection", folder, trust_remote_code=True, device="cpu")
    found[folder] = detector(image, threshold=0.01)
print(json.dumps(found))
"""


def test_a_folder_runs_in_a_pipeline_without_this_package(tmp_path):
    folders = {}
    processor = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    for model in MODELS:
        folders[model] = tmp_path / model.__name__
        small(model).save_pretrained(folders[model])
        processor.save_pretrained(folders[model])
        config = json.loads((folders[model] / "config.json").read_text())
        assert config["auto_map"]["AutoModelForObjectDetection"] == f"modeling_torchvision.{model.__name__}"
        source = (folders[model] / "modeling_torchvision.py").read_text()
        assert source == open(modeling_torchvision.__file__).read()
    printed = forks.run_alone(PLAIN_PROCESS, *folders.values(), folder=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert all(found[str(folder)] for folder in folders.values())


TORCHVISION_PROCESS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

for folder in map(Path, sys.argv[1:]):
    kind, backbone = folder.name.split("-")
    dense = kind in ("RetinaNet", "FCOS")
    plain = {"min_size": 64, "max_size": 96, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    plain |= {"num_classes": 3 if dense else 4}
    if dense:
        plain |= {"score_thresh": 0.01, "detections_per_img": 100}
    else:
        plain |= {"box_score_thresh": 0.01, "rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    if backbone == "resnet50":
        detector = getattr(detection, f"{kind.lower()}_resnet50_fpn")(weights=None, weights_backbone=None, **plain)
    else:
        more = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if dense else {}
        pyramid = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, **more)
        detector = getattr(detection, kind)(pyramid, **plain)
    detector.load_state_dict(load_file(folder / "torchvision.safetensors"), strict=True)
    case = load_file(folder / "case.safetensors")
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    target = {"boxes": case["pixels"], "labels": case["class_labels"] + int(not dense), "masks": case["masks"]}
    with torch.no_grad():
        losses = detector([case["image"]], [target])
        found = detector.eval()([case["image"]])[0]
    torch.testing.assert_close(sum(losses.values()), case["loss"], rtol=1e-5, atol=0)
    assert len(found["scores"]) == len(case["scores"]) > 10, (kind, len(found["scores"]), len(case["scores"]))
    for label in range(3):  # detections of other classes with nearly the same score may come in another order
        theirs, ours = found["labels"] == label + int(not dense), case["labels"] == label
        torch.testing.assert_close(found["scores"][theirs], case["scores"][ours], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["boxes"][theirs], case["boxes"][ours], rtol=1e-4, atol=1e-2)
assert not {"transformers", "aligndet_hf", "timm"} & set(sys.modules)
"""


def write_case(model, backbone, place):
    """A detector by torchvision's names, an image with labels, and its loss and detections as we have them."""
    torch.manual_seed(0)
    is_dense = issubclass(model, DenseDetector)
    config = TimmBackboneConfig(backbone=backbone, out_indices=model.config_class.levels, freeze_batch_norm_2d=True)
    fields = {} if is_dense else EVERY_ROW
    detector = model(model.config_class(backbone_config=config, num_labels=CLASSES, **fields))
    for name, parameter in detector.named_parameters():
        if name.endswith(("classification_head.cls_logits.weight", "cls_score.weight")):
            parameter.data.mul_(30 if is_dense else 3)
        if name.endswith("classification_head.cls_logits.bias"):
            parameter.data.fill_(-1.0)
    image, label = torch.randn(3, 64, 96), random_batch((4,))["labels"][0]
    label["masks"] = (torch.rand(4, 64, 96) > 0.5).to(torch.uint8)
    pixels = box_convert(label["boxes"] * torch.tensor([96, 64, 96, 64]), "cxcywh", "xyxy")
    with torch.no_grad():
        loss = without_batch_statistics(detector)(image[None], labels=[label]).loss
        outputs = detector.eval()(image[None])
    found = DeformableDetrImageProcessor().post_process_object_detection(outputs, 0.01, [(64, 96)])[0]
    case = {"image": image, "pixels": pixels, "loss": loss, **found}
    case |= {name: label[name] for name in ("masks", "class_labels")}
    folder = place / f"{type(detector.detector).__name__}-{backbone}"
    folder.mkdir()
    save_file(detector.torchvision_state_dict(), folder / "torchvision.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in case.items()}, folder / "case.safetensors")
    return folder


def test_exported_files_load_strictly_and_do_the_same_in_torchvision_alone(tmp_path):
    """Loss and detections; `write_case` and the process take a ResNet-50 as well, which costs a suite too much."""
    folders = [write_case(model, "resnet18", tmp_path) for model in MODELS]
    subprocess.run([sys.executable, "-c", TORCHVISION_PROCESS, *map(str, folders)], check=True)
