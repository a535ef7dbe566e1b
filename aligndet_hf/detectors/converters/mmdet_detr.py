"""
DETR as OpenMMLab's mmdet names it, in versions 2 and 3. AlignDet's DETR (Li et al., ICCV 2023) is of version 2; its
pre-training checkpoints hold the detector under `backbone.`, and a momentum detector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .detr import NO_AUXILIARY_LOSS, NORMED_TWICE, count, published_classes, thirds
from .layout import Layout, Tensors
from .resnet import resnet_config


def refuse_caffe(options: Mapping[str, Any]) -> None:
    """Refuses mmdet's Caffe trunks: they have torchvision's names and other strides, which only the config tells."""
    config = options.get("config", options.get("cfg", ""))
    if isinstance(config, str) and re.search(r"style\s*=\s*['\"]caffe['\"]", config):
        raise ValueError(
            "its trunk is of the Caffe kind (style='caffe' in its config), with strides in other convolutions and "
            "colours in another order: timm and torchvision have no such trunk"
        )


def class_names(options: Mapping[str, Any]) -> list[str]:
    """Names of the classes that mmdet stores with a checkpoint; version 3 in `dataset_meta`."""
    meta = options.get("dataset_meta") or options
    names = meta.get("CLASSES") or meta.get("classes") or ()
    return list(map(str, names)) if isinstance(names, list | tuple) else [str(names)]


def _config(tensors: Tensors, options: Mapping[str, Any], transformer: str, ffn: str, queries: str) -> dict[str, Any]:
    refuse_caffe(options)
    classes = tensors["bbox_head.fc_cls.bias"].shape[0] - 1 if "bbox_head.fc_cls.bias" in tensors else 1
    return {
        "d_model": tensors[f"{transformer}decoder.post_norm.weight"].shape[0],
        "encoder_layers": count(tensors, f"{transformer}encoder.layers."),
        "decoder_layers": count(tensors, f"{transformer}decoder.layers."),
        "encoder_ffn_dim": tensors[f"{transformer}encoder.layers.0.{ffn}.layers.0.0.weight"].shape[0],
        "decoder_ffn_dim": tensors[f"{transformer}decoder.layers.0.{ffn}.layers.0.0.weight"].shape[0],
        "num_queries": tensors[queries].shape[0],
        **published_classes(classes, class_names(options)),
        **NO_AUXILIARY_LOSS,
        "backbone_config": resnet_config(tensors, "backbone.", (4,)),
    }


def _names(transformer: str, self_attention: str, cross_attention: str, ffn: str) -> tuple[tuple[str, str], ...]:
    """The rules of both versions, which differ in the names of the parts of a layer."""
    return (
        (r"^model\.backbone\.model\.", "backbone."),
        (r"^class_labels_classifier", "bbox_head.fc_cls"),
        (r"^bbox_predictor\.layers\.0", "bbox_head.reg_ffn.layers.0.0"),
        (r"^bbox_predictor\.layers\.1", "bbox_head.reg_ffn.layers.1"),
        (r"^bbox_predictor\.layers\.2", "bbox_head.fc_reg"),
        (r"self_attn_layer_norm", "norms.0"),
        (r"encoder_attn_layer_norm", "norms.1"),
        (r"(encoder\.layers\.\d+\.)final_layer_norm", r"\1norms.1"),
        (r"(decoder\.layers\.\d+\.)final_layer_norm", r"\1norms.2"),
        *thirds("self_attn", f"{self_attention}.attn"),
        *thirds("encoder_attn", f"{cross_attention}.attn"),
        (r"\bself_attn\.o_proj", f"{self_attention}.attn.out_proj"),
        (r"encoder_attn\.o_proj", f"{cross_attention}.attn.out_proj"),
        (r"mlp\.fc1", f"{ffn}.layers.0.0"),
        (r"mlp\.fc2", f"{ffn}.layers.1"),
        (r"decoder\.layernorm", "decoder.post_norm"),
        (r"^model\.(encoder|decoder)\.", rf"{transformer}\1."),
    )


PROJECTOR = (r"bbox_head\.projector\.", "AlignDet's projector, which only pre-training needs")
HEADS = (r"(class_labels_classifier|bbox_predictor\.layers\.2)\.", "AlignDet's extraction leaves out the last layers")

MMDET_2 = Layout(
    name="DETR of mmdet 2",
    repository="open-mmlab/mmdetection",
    family="detr",
    marks=("bbox_head.transformer.decoder.post_norm.weight", "bbox_head.query_embedding.weight"),
    names=(
        (r"^model\.input_projection", "bbox_head.input_proj"),
        (r"^model\.query_position_embeddings", "bbox_head.query_embedding"),
        *_names("bbox_head.transformer.", "attentions.0", "attentions.1", "ffns.0"),
    ),
    config=lambda tensors, options: _config(
        tensors, options, "bbox_head.transformer.", "ffns.0", "bbox_head.query_embedding.weight"
    ),
    dropped=(PROJECTOR,),
    absent=(HEADS,),
    note=NORMED_TWICE,
)
MMDET_3 = Layout(
    name="DETR of mmdet 3",
    repository="open-mmlab/mmdetection",
    family="detr",
    marks=("decoder.post_norm.weight", "query_embedding.weight", "bbox_head.reg_ffn.layers.0.0.weight"),
    names=(
        (r"^model\.input_projection", "neck.convs.0.conv"),
        (r"^model\.query_position_embeddings", "query_embedding"),
        *_names("", "self_attn", "cross_attn", "ffn"),
    ),
    config=lambda tensors, options: _config(tensors, options, "", "ffn", "query_embedding.weight"),
    note=NORMED_TWICE,
)
