"""
RetinaNet, FCOS, Faster and Mask R-CNN as OpenMMLab's mmdet names them, in versions 2 and 3 alike, and AlignDet's (Li
et al., ICCV 2023). They compute otherwise than torchvision's: see the config field `conventions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .detr import published_classes
from .layout import COUNTERS, Layout, Prepared, Tensors
from .mmdet_detr import class_names, refuse_caffe
from .resnet import resnet_config

CONVENTIONS = {"conventions": "mmdet"}
SIZES = (32, 64, 128, 256, 512)  # largest power of two among the sides of a level's anchors
EPSILON = 1e-5
TRUNK = (r"^detector\.backbone\.body\._backbone\.", "backbone.")
PYRAMID = (
    (r"^detector\.backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^detector\.backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^detector\.backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
    (r"^detector\.backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
)
CLASSES = r"(bbox_head|roi_head\.bbox_head)\.(retina_cls|conv_cls|fc_cls)\.\d\."
PROJECTOR = (CLASSES, "AlignDet's projector in place of the class layer, which only pre-training needs")
NO_HEADS = (
    r"detector\.(head\.classification_head\.cls_logits|head\.regression_head\.bbox_|roi_heads\.box_predictor)",
    "AlignDet's pre-training has no classes, and its extraction leaves out the last layers",
)
FOLDED = "its norm was folded into it"


# ---- what renaming cannot do ----


def fold_norms(tensors: dict[str, Tensor]) -> Prepared:
    """
    Folds the norms beside convolutions of pyramid and heads into them, where there are any: the family has none.

    A norm by running statistics is a factor and a summand for each channel, as long as the statistics stay.
    """
    changed, dropped = {}, {}
    for name in [name for name in tensors if re.match(r"(neck|bbox_head|rpn_head|roi_head)\..*\.conv\.weight$", name)]:
        place = name.removesuffix("conv.weight")
        parts = {part: tensors.get(f"{place}bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")}
        if any(part is None for part in parts.values()):
            continue
        factor = parts["weight"] / (parts["running_var"] + EPSILON).sqrt()
        bias = tensors.get(f"{place}conv.bias", torch.zeros_like(factor))
        tensors[name] = tensors[name] * factor[:, None, None, None]
        tensors[f"{place}conv.bias"] = (bias - parts["running_mean"]) * factor + parts["bias"]
        changed |= {name: FOLDED, f"{place}conv.bias": FOLDED}
        for part in (*parts, "num_batches_tracked"):
            if tensors.pop(f"{place}bn.{part}", None) is not None:
                dropped[f"{place}bn.{part}"] = f"folded into {place}conv"
    return Prepared(tensors, changed, dropped)


def background_first(tensors: dict[str, Tensor], classes: str, boxes: str, masks: str) -> dict[str, str]:
    """
    Moves the background from the last to the first row of the class layer, and adds rows for it where it has none.

    Changes the tensors in place, and returns what was done.
    """
    changed = {}
    for kind in ("weight", "bias"):
        if f"{classes}.{kind}" in tensors:
            tensors[f"{classes}.{kind}"] = tensors[f"{classes}.{kind}"].roll(1, 0)
            changed[f"{classes}.{kind}"] = "the background comes first"
        for layer, rows in ((boxes, 4), (masks, 1)):
            tensor = tensors.get(f"{layer}.{kind}")
            if tensor is not None:
                tensors[f"{layer}.{kind}"] = torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])
                changed[f"{layer}.{kind}"] = "with zeros for the background"
    return changed


def _prepare(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Prepared:
    return fold_norms(tensors)


def _prepare_fcos(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Prepared:
    prepared = fold_norms(tensors)
    for name in [name for name in tensors if re.match(r"bbox_head\.(cls|reg)_convs\.\d\.conv\.weight$", name)]:
        bias = name.replace("weight", "bias")
        if bias not in tensors:
            tensors[bias] = tensors[name].new_zeros(len(tensors[name]))
            prepared.changed[bias] = "zeros, the published convolution has no bias"
    return prepared


def _prepare_rcnn(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Prepared:
    prepared = fold_norms(tensors)
    head = "roi_head.bbox_head"
    if f"{head}.fc_cls.weight" not in tensors:
        for name in [name for name in tensors if name.startswith(f"{head}.fc_reg.")]:
            del tensors[name]
            prepared.dropped[name] = "boxes of AlignDet's pre-training, whose classes are the instances of a batch"
    changed = background_first(tensors, f"{head}.fc_cls", f"{head}.fc_reg", "roi_head.mask_head.conv_logits")
    return prepared._replace(changed=prepared.changed | changed)


def _restore_rcnn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    restored = dict(tensors)
    for name in tensors:
        if ".fc_cls." in name:
            restored[name] = tensors[name].roll(-1, 0)
        elif ".fc_reg." in name or ".conv_logits." in name:
            restored[name] = tensors[name][4 if ".fc_reg." in name else 1 :].contiguous()
    return restored


# ---- configs ----


def _fields(tensors: Tensors, options: Mapping[str, Any], maps: tuple[int, ...], classes: int) -> dict[str, Any]:
    refuse_caffe(options)
    return {
        **CONVENTIONS,
        **published_classes(classes, class_names(options)),
        "hidden_size": tensors["neck.fpn_convs.0.conv.weight"].shape[0],
        "backbone_config": resnet_config(tensors, "backbone.", maps),
    }


def _retina_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    classes = tensors.get("bbox_head.retina_cls.bias")
    return {
        **_fields(tensors, options, (2, 3, 4), 1 if classes is None else len(classes) // 9),
        "anchor_sizes": [[size * 2 ** (third / 3) for third in range(3)] for size in SIZES],
    }


def _fcos_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    config = str(options.get("config", options.get("cfg", "")))
    if other := re.search(r"(norm_on_bbox|centerness_on_reg|dcn_on_last_conv)\s*=\s*True", config):
        raise ValueError(f"its config has {other[1]}=True: such a head of FCOS is not known here")
    classes = tensors.get("bbox_head.conv_cls.bias")
    return {
        **_fields(tensors, options, (2, 3, 4), 1 if classes is None else len(classes)),
        "center_sampling_radius": 1.5 if re.search(r"center_sampling\s*=\s*True", config) else None,
        "nms_threshold": 0.5,
    }


def _rcnn_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    head = "roi_head.bbox_head"
    classes = tensors.get(f"{head}.fc_cls.bias")
    return {
        **_fields(tensors, options, (1, 2, 3, 4), 1 if classes is None else len(classes) - 1),
        "box_head": "conv" if f"{head}.shared_convs.0.conv.weight" in tensors else "fc",
        "box_head_size": tensors[f"{head}.shared_fcs.0.weight"].shape[0],
        "rpn_post_nms_top_k": 1000,
    }


# ---- the table ----

HEADS = (
    *((rf"^detector\.head\.classification_head\.conv\.{i}\.0\.", f"bbox_head.cls_convs.{i}.conv.") for i in range(4)),
    *((rf"^detector\.head\.regression_head\.conv\.{i}\.0\.", f"bbox_head.reg_convs.{i}.conv.") for i in range(4)),
    (r"^detector\.head\.classification_head\.cls_logits", "bbox_head.retina_cls"),
    (r"^detector\.head\.regression_head\.bbox_reg", "bbox_head.retina_reg"),
)
FCOS_HEADS = (
    *(
        (rf"^detector\.head\.{ours}_head\.conv\.{3 * i + part}\.", f"bbox_head.{theirs}_convs.{i}.{layer}.")
        for ours, theirs in (("classification", "cls"), ("regression", "reg"))
        for i in range(4)
        for part, layer in enumerate(("conv", "gn"))
    ),
    (r"^detector\.head\.classification_head\.cls_logits", "bbox_head.conv_cls"),
    (r"^detector\.head\.regression_head\.bbox_reg", "bbox_head.conv_reg"),
    (r"^detector\.head\.regression_head\.bbox_ctrness", "bbox_head.conv_centerness"),
    (r"^detector\.head\.regression_head\.scales", "bbox_head.scales"),
)
RCNN = (
    (r"^detector\.rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^detector\.rpn\.head\.cls_logits", "rpn_head.rpn_cls"),
    (r"^detector\.rpn\.head\.bbox_pred", "rpn_head.rpn_reg"),
    (r"^detector\.roi_heads\.box_head\.fc6", "roi_head.bbox_head.shared_fcs.0"),
    (r"^detector\.roi_heads\.box_head\.fc7", "roi_head.bbox_head.shared_fcs.1"),
    (r"^detector\.roi_heads\.box_head\.(\d)\.0\.", r"roi_head.bbox_head.shared_convs.\1.conv."),
    (r"^detector\.roi_heads\.box_head\.5\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^detector\.roi_heads\.box_predictor\.cls_score", "roi_head.bbox_head.fc_cls"),
    (r"^detector\.roi_heads\.box_predictor\.bbox_pred", "roi_head.bbox_head.fc_reg"),
    (r"^detector\.roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^detector\.roi_heads\.mask_predictor\.conv5_mask", "roi_head.mask_head.upsample"),
    (r"^detector\.roi_heads\.mask_predictor\.mask_fcn_logits", "roi_head.mask_head.conv_logits"),
)


def _layout(kind: str, family: str, *marks: str, names, config, prepare=_prepare, restore=None) -> Layout:
    return Layout(
        name=f"{kind} of mmdet",
        repository="open-mmlab/mmdetection",
        family=family,
        marks=("neck.fpn_convs.0.conv.weight", *marks),
        names=(TRUNK, *PYRAMID, *names),
        config=config,
        prepare=prepare,
        restore=restore,
        dropped=(PROJECTOR,),
        absent=(COUNTERS, NO_HEADS),
    )


_RCNN_MARKS = ("rpn_head.rpn_conv.weight", "roi_head.bbox_head.shared_fcs.0.weight")
MMDET_CONVNETS = (
    _layout("FCOS", "torchvision_fcos", "bbox_head.cls_convs.0.gn.weight", "bbox_head.scales.0.scale",
            names=FCOS_HEADS, config=_fcos_config, prepare=_prepare_fcos),
    _layout("RetinaNet", "torchvision_retinanet", "bbox_head.cls_convs.3.conv.weight", "neck.fpn_convs.4.conv.weight",
            names=HEADS, config=_retina_config),
    _layout("Mask R-CNN", "torchvision_mask_rcnn", *_RCNN_MARKS, "roi_head.mask_head.conv_logits.weight",
            names=RCNN, config=_rcnn_config, prepare=_prepare_rcnn, restore=_restore_rcnn),
    _layout("Faster R-CNN", "torchvision_faster_rcnn", *_RCNN_MARKS,
            names=RCNN, config=_rcnn_config, prepare=_prepare_rcnn, restore=_restore_rcnn),
)  # fmt: skip
