"""torchvision's own detectors, of its builders of today and of before version 0.13: RetinaNet, FCOS, R-CNNs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .detr import COCO_CLASSES, coco_names, published_classes
from .layout import COUNTERS, Layout, Prepared, Tensors
from .resnet import resnet_config

BODY = "backbone.body."
NAMES = ((r"^detector\.backbone\.body\._backbone\.", BODY), (r"^detector\.", ""))
PYRAMID = (
    (r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"(^|\.)rpn\.head\.conv\.(weight|bias)$", r"\1rpn.head.conv.0.0.\2"),
)
OLD_RETINA = tuple((rf"(_head\.conv)\.{2 * i}\.(weight|bias)$", rf"\1.{i}.0.\2") for i in range(4))
OLD_MASKS = tuple((rf"(mask_head)\.mask_fcn{i + 1}\.(weight|bias)$", rf"\1.{i}.0.\2") for i in range(4))
# Only the published weights of the first versions of RetinaNet and of the R-CNNs run without epsilon.
EPSILON = 1e-5
NOTE = (
    "torchvision runs its weights COCO_V1 of RetinaNet and R-CNNs with norms without epsilon. Here it is 1e-5, but "
    "for files with the names of before version 0.13, whose variances are smaller by it"
)


def _without_epsilon(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Prepared:
    """Takes the epsilon that norms will add off the variances of a file of old names."""
    variances = [name for name in tensors if name.startswith(BODY) and name.endswith("running_var")]
    if not options["is_old"]:
        variances = []
    changed = dict.fromkeys(variances, "less the epsilon of norms, without which torchvision runs it")
    return Prepared(tensors | {name: tensors[name] - EPSILON for name in variances}, changed, {})


def _dense_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    anchors = tensors["head.regression_head.bbox_reg.bias"].shape[0] // 4
    classes = tensors["head.classification_head.cls_logits.bias"].shape[0] // anchors
    return {
        **published_classes(classes),
        "hidden_size": tensors["backbone.fpn.layer_blocks.0.0.weight"].shape[0],
        "version": 2 if "head.classification_head.conv.0.1.weight" in tensors else 1,
        "backbone_config": resnet_config(tensors, BODY, (2, 3, 4)),
    }


def _rcnn_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    classes = tensors["roi_heads.box_predictor.cls_score.bias"].shape[0] - 1  # without the background
    is_fc = "roi_heads.box_head.fc6.weight" in tensors
    return {
        **published_classes(classes, coco_names()[1:] if classes == COCO_CLASSES - 1 else ()),
        "hidden_size": tensors["backbone.fpn.layer_blocks.0.0.weight"].shape[0],
        "version": 2 if "backbone.fpn.inner_blocks.0.1.weight" in tensors else 1,
        "box_head": "fc" if is_fc else "conv",
        "box_head_size": tensors["roi_heads.box_predictor.cls_score.weight"].shape[1],
        "backbone_config": resnet_config(tensors, BODY, (1, 2, 3, 4)),
    }


def _layout(kind: str, family: str, *marks: str, config, **more: Any) -> Layout:
    return Layout(
        name=f"{kind} of torchvision",
        repository="pytorch/vision",
        license="bsd-3-clause",
        family=family,
        marks=("backbone.fpn.layer_blocks.0.0.weight", *marks),
        names=NAMES,
        config=config,
        absent=(COUNTERS,),
        **more,
    )


_RCNN = ("rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight")
_shifted = partial(_layout, prepare=_without_epsilon, note=NOTE)
TORCHVISION = (
    _layout(
        "FCOS", "torchvision_fcos", "head.regression_head.bbox_ctrness.weight", config=_dense_config, aliases=PYRAMID
    ),
    _shifted(
        "RetinaNet",
        "torchvision_retinanet",
        "head.classification_head.cls_logits.weight",
        config=_dense_config,
        aliases=(*PYRAMID, *OLD_RETINA),
    ),
    _shifted(
        "Mask R-CNN",
        "torchvision_mask_rcnn",
        *_RCNN,
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
        config=_rcnn_config,
        aliases=(*PYRAMID, *OLD_MASKS),
    ),
    _shifted("Faster R-CNN", "torchvision_faster_rcnn", *_RCNN, config=_rcnn_config, aliases=PYRAMID),
)
