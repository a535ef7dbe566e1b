"""
DETR as facebookresearch/detr names it (Carion et al., ECCV 2020), and what others trained with its code: UP-DETR (Dai
et al., CVPR 2021), DETReg (Bar et al., CVPR 2022) on DETR, SiameseDETR after its own conversion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..classes import class_fields
from .layout import Layout, Tensors
from .resnet import resnet_config

# Names of COCO's 91 categories, which DETR's class layer counts by COCO's own ids, with gaps.
COCO_CLASSES = 91


def thirds(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Rules for the attention of PyTorch, which keeps queries, keys and values in one tensor."""
    return [(rf"{ours}\.{name}_proj\.(\w+)$", rf"{theirs}.in_proj_\1#{part}/3") for part, name in enumerate("qkv")]


# Our names of the encoder and the decoder.
TRANSFORMER = (
    *thirds("self_attn", "self_attn"),
    *thirds("encoder_attn", "multihead_attn"),
    (r"encoder_attn\.o_proj", "multihead_attn.out_proj"),
    (r"self_attn\.o_proj", "self_attn.out_proj"),
    (r"\.mlp\.fc", ".linear"),
    (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"(encoder\.layers\.\d+\.)final_layer_norm", r"\1norm2"),
    (r"(decoder\.layers\.\d+\.)final_layer_norm", r"\1norm3"),
    (r"decoder\.layernorm", "decoder.norm"),
)
AROUND = (
    (r"^model\.backbone\.model\.", "backbone.0.body."),
    (r"^model\.input_projection", "input_proj"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
)
PRETEXT = (
    (r"patch2query\.", "makes queries of crops in UP-DETR's and SiameseDETR's pre-training"),
    (r"(feature_align|feature_embed)\.", "reconstructs features in UP-DETR's and DETReg's pre-training"),
)
PRE_NORM = (r"transformer\.encoder\.norm\.", "norms before attention (--pre_norm)")
# transformers 5.24 overwrites the state between two decoder layers by its norm where it collects them for the loss.
NO_AUXILIARY_LOSS = {"auxiliary_loss": False}
NORMED_TWICE = (
    "the config has auxiliary_loss=false: with it transformers norms the output of every decoder layer before the "
    "next one, which the published detector does not"
)
NO_CLASSES = (r"class_labels_classifier\.", "pre-training without labels has no classes")


def detr_fields(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that DETR and its relatives share: sizes from the tensors, the number of heads from the options."""
    heads = options.get("nheads", 8)
    return {
        "d_model": tensors["transformer.encoder.layers.0.norm1.weight"].shape[0],
        "encoder_layers": count(tensors, "transformer.encoder.layers."),
        "decoder_layers": count(tensors, "transformer.decoder.layers."),
        "encoder_ffn_dim": tensors["transformer.encoder.layers.0.linear1.weight"].shape[0],
        "decoder_ffn_dim": tensors["transformer.decoder.layers.0.linear1.weight"].shape[0],
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "num_queries": tensors["query_embed.weight"].shape[0],
    }


def published_classes(count: int, names: Iterable[str] = ()) -> dict[str, Any]:
    """
    What [`class_fields`] gives for the classes of a published file.

    Args:
        count (`int`): number of classes.
        names (`Iterable[str]`, *optional*): their names, as the file tells them. 91 classes without names are COCO's,
            by their ids; an id that COCO does not use is called `unused 12`.
    """
    names = list(names) or (coco_names() if count == COCO_CLASSES else [])
    return class_fields(count, names if len(set(names)) == count else None)


def coco_names() -> list[str]:
    """COCO's categories by their ids, from 0 to 90."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [f"unused {i}" if name in ("N/A", "__background__") else name for i, name in enumerate(categories)]


def count(tensors: Iterable[str], prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def detr_config(tensors: Tensors, options: Mapping[str, Any], has_background: bool = True) -> dict[str, Any]:
    """The config of a DETR, or of a relative whose classes have no background among them."""
    classes = tensors["class_embed.bias"].shape[0] - has_background if "class_embed.bias" in tensors else 1
    return {
        **detr_fields(tensors, options),
        **published_classes(classes),
        **NO_AUXILIARY_LOSS,
        "backbone_config": resnet_config(tensors, "backbone.0.body.", (4,), options.get("dilation", False)),
    }


DETR = Layout(
    name="DETR of facebookresearch/detr",
    repository="facebookresearch/detr",
    family="detr",
    marks=("transformer.decoder.layers.0.multihead_attn.in_proj_weight", "input_proj.weight", "query_embed.weight"),
    names=(*AROUND, *TRANSFORMER),
    config=detr_config,
    dropped=PRETEXT,
    absent=(NO_CLASSES,),
    refused=(PRE_NORM,),
    note=NORMED_TWICE,
)
