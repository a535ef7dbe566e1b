"""
SiameseDETR as Zx55/SiameseDETR publishes it (Chen et al., CVPR 2023), before its own conversion: DETR, Conditional and
Deformable DETR around a ResNet, with heads of its pre-training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .conditional_detr import CONDITIONAL_DETR
from .deformable_detr import DEFORMABLE_DETR, deformable_fields
from .detr import DETR, detr_fields
from .layout import Layout, Tensors

ALIASES = (
    (r"^(?:module\.)?backbone\.(?!0\.)", "backbone.0.body."),
    (r"^(?:module\.)?pred_head\.class_embed\.", "pretext_class_embed."),
    (r"^(?:module\.)?pred_head\.", ""),
    (r"^module\.", ""),
)
PRETEXT = (
    (r"pretext_class_embed\.", "tells matched queries from others in SiameseDETR's pre-training"),
    (r"(enc_head|dec_head)\.", "projects features of two views in SiameseDETR's pre-training"),
)
NO_CLASSES = (r"(model\.decoder\.)?class_(labels_classifier|embed)\.", "pre-training without labels has no classes")


def _deformable_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    return detr_fields(tensors, options) | deformable_fields(tensors, options)


def _of_siamese(layout: Layout, **changes: Any) -> Layout:
    return replace(
        layout,
        name=layout.name.split(" of ")[0] + " of SiameseDETR",
        repository="Zx55/SiameseDETR",
        aliases=ALIASES,
        dropped=(*PRETEXT, *layout.dropped),
        absent=(NO_CLASSES,),
        **changes,
    )


SIAMESE_DETR = (
    _of_siamese(CONDITIONAL_DETR, marks=(*CONDITIONAL_DETR.marks, "pretext_class_embed.weight")),
    _of_siamese(
        DEFORMABLE_DETR,
        marks=(*DEFORMABLE_DETR.marks[:3], "transformer.tgt_embed.weight", "pretext_class_embed.weight"),
        # One box head for all layers, and what the decoder starts from in a tensor of its own.
        names=(
            *DEFORMABLE_DETR.names,
            (r"^query_embed\.weight$", "query_embed.weight + transformer.tgt_embed.weight"),
            (r"^bbox_embed\.\d+\.", "bbox_embed."),
        ),
        config=_deformable_config,
    ),
    _of_siamese(DETR, marks=(*DETR.marks, "pretext_class_embed.weight")),
)
