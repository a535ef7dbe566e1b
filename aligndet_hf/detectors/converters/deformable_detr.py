"""
Deformable DETR as fundamentalvision/Deformable-DETR names it (Zhu et al., ICLR 2021), with box refinement and in two
stages as well, and DETReg (Bar et al., CVPR 2022), which was trained with its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .detr import PRETEXT, TRANSFORMER, count, detr_fields, published_classes
from .layout import Layout, Tensors
from .resnet import resnet_config


def deformable_fields(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    """Levels and sampling points, and where the levels come from."""
    levels = tensors["transformer.level_embed"].shape[0]
    of_trunk = sum(tensors[f"input_proj.{level}.0.weight"].shape[-1] == 1 for level in range(levels))
    heads = options.get("nheads", 8)
    points = {
        part: tensors[f"transformer.{part}.layers.0.{attention}.attention_weights.bias"].shape[0] // (heads * levels)
        for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn"))
    }
    return {
        "num_feature_levels": levels,
        "encoder_n_points": points["encoder"],
        "decoder_n_points": points["decoder"],
        "backbone_config": resnet_config(
            tensors, "backbone.0.body.", (2, 3, 4)[-of_trunk:], options.get("dilation", False)
        ),
    }


def _config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    is_two_stage = "transformer.enc_output.weight" in tensors
    fields = detr_fields({"query_embed.weight": tensors["transformer.level_embed"], **tensors}, options)
    if is_two_stage:
        fields["two_stage_num_proposals"] = options.get("num_queries", 300)
        del fields["num_queries"]
    return {
        **fields,
        **deformable_fields(tensors, options),
        **published_classes(tensors["class_embed.0.bias"].shape[0]),
        "two_stage": is_two_stage,
        "with_box_refine": count(tensors, "transformer.decoder.bbox_embed.") > 0,
    }


DEFORMABLE = (
    (r"^model\.backbone\.model\.", "backbone.0.body."),
    (r"^model\.input_proj\.", "input_proj."),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.", "transformer."),
    (r"(decoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norm2"),
    (r"(decoder\.layers\.\d+\.)encoder_attn_layer_norm", r"\1norm1"),
    (r"encoder_attn\.", "cross_attn."),
)
DEFORMABLE_DETR = Layout(
    name="Deformable DETR of fundamentalvision/Deformable-DETR",
    repository="fundamentalvision/Deformable-DETR",
    family="deformable_detr",
    marks=("transformer.level_embed", "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
           "input_proj.0.0.weight", "class_embed.0.bias", "backbone.0.body.conv1.weight"),
    names=(*DEFORMABLE, *TRANSFORMER),
    config=_config,
    dropped=PRETEXT,
)  # fmt: skip
