"""DAB-DETR as IDEA-Research/DAB-DETR names it (Liu et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .detr import PRE_NORM, detr_fields, published_classes, thirds
from .layout import Layout, Tensors
from .resnet import resnet_config


def _config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    fields = detr_fields({**tensors, "query_embed.weight": tensors["refpoint_embed.weight"]}, options)
    patterns = tensors.get("transformer.patterns.weight")
    return {
        **fields,
        **published_classes(tensors["class_embed.bias"].shape[0]),
        "hidden_size": fields.pop("d_model"),
        "num_patterns": 0 if patterns is None else patterns.shape[0],
        "temperature_height": options.get("pe_temperatureH", 20),
        "temperature_width": options.get("pe_temperatureW", 20),
        "backbone_config": resnet_config(tensors, "backbone.0.body.", (4,), options.get("dilation", False)),
    }


DAB_DETR = Layout(
    name="DAB-DETR of IDEA-Research/DAB-DETR",
    repository="IDEA-Research/DAB-DETR",
    family="dab-detr",
    marks=("transformer.decoder.ref_anchor_head.layers.0.weight", "refpoint_embed.weight", "input_proj.weight"),
    names=(
        (r"^model\.backbone\.conv_encoder\.model\._backbone\.", "backbone.0.body."),
        (r"^model\.input_projection", "input_proj"),
        (r"^model\.query_refpoint_embeddings", "refpoint_embed"),
        (r"^model\.(encoder|decoder|patterns)\.", r"transformer.\1."),
        (r"^bbox_predictor", "bbox_embed"),
        (r"\.(self|cross)_attn\.\1_attn_(query|key)_content_proj", r".\1.\2content_proj"),
        (r"\.(self|cross)_attn\.\1_attn_(query|key)_pos_proj", r".\1.\2pos_proj"),
        (r"\.cross_attn\.cross_attn_query_pos_sine_proj", ".cross.querypos_sine_proj"),
        (r"\.(self|cross)_attn\.\1_attn_value_proj", r".\1.v_proj"),
        (r"\.self\.(?:(q)uery|(k)ey)?", r".sa_\1\2"),
        (r"\.cross\.(?:(q)uery|(k)ey)?", r".ca_\1\2"),
        (r"\.(self|cross)_attn\.\1_attn\.output_proj", r".\1_attn.out_proj"),
        *thirds("self_attn", "self_attn"),
        (r"(encoder\.layers\.\d+\.)final_layer_norm", r"\1norm2"),
        (r"(decoder\.layers\.\d+\.)mlp\.final_layer_norm", r"\1norm3"),
        (r"(decoder\.layers\.\d+\.)cross_attn\.cross_attn_layer_norm", r"\1norm2"),
        (r"\.self_attn\.self_attn_layer_norm", ".norm1"),
        (r"self_attn_layer_norm", "norm1"),
        (r"(layers\.\d+\.)(mlp\.)?fc(?=\d)", r"\1linear"),
        (r"(layers\.\d+\.)(mlp\.)?activation_fn", r"\1activation"),
        (r"decoder\.layernorm", "decoder.norm"),
    ),
    config=_config,
    refused=(PRE_NORM,),
)
