"""
Faster and Mask R-CNN on a ResNet with a pyramid as Detectron2 names them, and the pickles that SoCo (Wei et al.,
NeurIPS 2021) converted for it: trunk, pyramid and box head, with norms, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .detr import published_classes
from .layout import COUNTERS, Layout, Prepared, Tensors
from .mmdet_convnets import background_first
from .resnet import resnet_config

TRUNK = "backbone.bottom_up."
# SoCo's pickles leave it to Detectron2 to guess where each part belongs.
ALIASES = (
    (r"^(stem|res[2-5])\.", TRUNK + r"\1."),
    (r"^fpn_", "backbone.fpn_"),
    (r"^box_head\.", "roi_heads.box_head."),
)
NORM = {"0": "", "1": ".norm"}  # of a convolution with a norm in torchvision, and what Detectron2 calls them
NAMES = (
    (r"^detector\.backbone\.body\._backbone\.(conv1|bn1)\.", TRUNK + r"stem.\1."),
    *((rf"^detector\.backbone\.body\._backbone\.layer{i}\.", f"{TRUNK}res{i + 1}.") for i in range(1, 5)),
    (r"(bottom_up\.\w+(?:\.\d+)?)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"(bottom_up\.\w+\.\d+)\.downsample\.0\.", r"\1.shortcut."),
    (r"(bottom_up\.\w+\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
    *(
        (rf"^detector\.backbone\.fpn\.{ours}_blocks\.{i}\.{part}\.", f"backbone.fpn_{theirs}{i + 2}{norm}.")
        for ours, theirs in (("inner", "lateral"), ("layer", "output"))
        for i in range(4)
        for part, norm in NORM.items()
    ),
    (r"^detector\.rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^detector\.rpn\.head\.conv\.1\.0\.", "proposal_generator.rpn_head.identity."),
    (r"^detector\.rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"^detector\.rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"^detector\.roi_heads\.box_head\.fc6", "roi_heads.box_head.fc1"),
    (r"^detector\.roi_heads\.box_head\.fc7", "roi_heads.box_head.fc2"),
    *(
        (rf"^detector\.roi_heads\.box_head\.{i}\.{part}\.", f"roi_heads.box_head.conv{i + 1}{norm}.")
        for i in range(4)
        for part, norm in NORM.items()
    ),
    (r"^detector\.roi_heads\.box_head\.5\.", "roi_heads.box_head.fc1."),
    *(
        (rf"^detector\.roi_heads\.mask_head\.{i}\.{part}\.", f"roi_heads.mask_head.mask_fcn{i + 1}{norm}.")
        for i in range(4)
        for part, norm in NORM.items()
    ),
    (r"^detector\.roi_heads\.mask_predictor\.conv5_mask", "roi_heads.mask_head.deconv"),
    (r"^detector\.roi_heads\.mask_predictor\.mask_fcn_logits", "roi_heads.mask_head.predictor"),
    (r"^detector\.", ""),
)
NOT_TRAINED = (
    r"detector\.(rpn|roi_heads\.(box_predictor|mask_head|mask_predictor))\.",
    "SoCo's pre-training has trunk, pyramid and box head alone",
)


def _config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    if f"{TRUNK}stem.conv1.norm.num_batches_tracked" not in tensors:
        raise ValueError(
            "its trunk has frozen norms, as Detectron2's own models have: those are of the Caffe kind, with strides "
            "in other convolutions and colours in another order; nothing else in the file tells them from SoCo's"
        )
    if "pixel_mean" in tensors and tensors["pixel_mean"].flatten()[0] < tensors["pixel_mean"].flatten()[2]:
        raise ValueError("it takes images with blue first, as models of the Caffe kind do: give it RGB weights")
    classes = tensors.get("roi_heads.box_predictor.cls_score.bias")
    as_torchvision = {_trunk_name(name) for name in tensors if name.startswith(TRUNK)}
    return {
        **published_classes(1 if classes is None else len(classes) - 1),
        "conventions": "mmdet",
        "hidden_size": tensors["backbone.fpn_output2.weight"].shape[0],
        "version": 2 if "backbone.fpn_output2.norm.weight" in tensors else 1,
        "box_head": "conv" if "roi_heads.box_head.conv1.weight" in tensors else "fc",
        "box_head_size": tensors["roi_heads.box_head.fc1.weight"].shape[0],
        "rpn_post_nms_top_k": 1000,
        "backbone_config": resnet_config(as_torchvision, "", (1, 2, 3, 4)),
    }


def _trunk_name(name: str) -> str:
    return re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name.removeprefix(TRUNK))


def _prepare(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Prepared:
    box = "roi_heads.box_predictor"
    changed = background_first(tensors, f"{box}.cls_score", f"{box}.bbox_pred", "roi_heads.mask_head.predictor")
    rpn = "proposal_generator.rpn_head"
    if "backbone.fpn_output2.norm.weight" in tensors and f"{rpn}.conv.weight" in tensors:
        # torchvision's second version has two convolutions there. Behind a ReLU the identity changes nothing.
        width = len(tensors[f"{rpn}.conv.bias"])
        tensors[f"{rpn}.identity.weight"] = torch.zeros(width, width, 3, 3)
        tensors[f"{rpn}.identity.weight"][range(width), range(width), 1, 1] = 1
        tensors[f"{rpn}.identity.bias"] = torch.zeros(width)
        changed |= dict.fromkeys((f"{rpn}.identity.weight", f"{rpn}.identity.bias"), "Detectron2 has one convolution")
    return Prepared(tensors, changed, {})


def _layout(kind: str, family: str, *marks: str) -> Layout:
    return Layout(
        name=f"{kind} of Detectron2",
        repository="facebookresearch/detectron2",
        family=family,
        marks=("backbone.fpn_lateral2.weight", "roi_heads.box_head.fc1.weight", *marks),
        names=NAMES,
        config=_config,
        aliases=ALIASES,
        prepare=_prepare,
        dropped=(
            (r"pixel_(mean|std)$", "the image processor has them"),
            (r".*\.cell_anchors\.\d$", "anchors, which the config gives"),
        ),
        absent=(COUNTERS, NOT_TRAINED),
    )


DETECTRON2 = (
    _layout("Mask R-CNN", "torchvision_mask_rcnn", "roi_heads.mask_head.predictor.weight"),
    _layout("Faster R-CNN", "torchvision_faster_rcnn"),
    # By request: SoCo's pickles as the start of a Mask R-CNN.
    _layout("Mask R-CNN without mask head", "torchvision_mask_rcnn"),
)
