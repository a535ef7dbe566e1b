"""Conditional DETR as Atten4Vis/ConditionalDETR names it (Meng et al., ICCV 2021)."""

from __future__ import annotations

from functools import partial

from .detr import AROUND, NO_CLASSES, NORMED_TWICE, PRE_NORM, PRETEXT, TRANSFORMER, detr_config
from .layout import Layout

# Projections of the decoder, which are modules of their own there; before the rules of DETR.
DECODER = (
    (r"(decoder\.layers\.\d+\.)self_attn\.([qk])_(content|pos)_proj", r"\1sa_\2\3_proj"),
    (r"(decoder\.layers\.\d+\.)self_attn\.v_proj", r"\1sa_v_proj"),
    (r"(decoder\.layers\.\d+\.)encoder_attn\.([qk])_(content|pos)_proj", r"\1ca_\2\3_proj"),
    (r"(decoder\.layers\.\d+\.)encoder_attn\.q_pos_sine_proj", r"\1ca_qpos_sine_proj"),
    (r"(decoder\.layers\.\d+\.)encoder_attn\.v_proj", r"\1ca_v_proj"),
    (r"(decoder\.layers\.\d+\.)encoder_attn\.o_proj", r"\1cross_attn.out_proj"),
)
CONDITIONAL_DETR = Layout(
    name="Conditional DETR of Atten4Vis/ConditionalDETR",
    repository="Atten4Vis/ConditionalDETR",
    family="conditional_detr",
    marks=("transformer.decoder.ref_point_head.layers.0.weight", "input_proj.weight", "query_embed.weight"),
    names=(*AROUND, *DECODER, *TRANSFORMER),
    config=partial(detr_config, has_background=False),
    dropped=PRETEXT,
    absent=(NO_CLASSES,),
    refused=(PRE_NORM,),
    note=NORMED_TWICE,
)
