"""THE table of detector families. Everything that differs between families stands here, and only here.

A family is one `model_type` of `AutoModelForObjectDetection`. Adding one means adding its row to `FAMILIES` (and a
tiny config to `tests/tiny_detectors.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput


@dataclass(frozen=True)
class LossSettings:
    """
    The numbers of a family's matcher and criterion, read from a detector's config.

    Attributes:
        class_loss: which classification loss the family trains with.
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        class_activation: class term of the matching cost, see [`~aligndet_hf.matching.match_queries`].
        match_alpha, match_gamma: focal parameters of the matching cost.
        class_weight, bbox_weight, giou_weight: weights of the loss terms in the total.
        alpha, gamma: focal or varifocal parameters of the class loss.
        background_weight: weight of unmatched queries in the softmax loss.
        auxiliary_suffix: how transformers names the terms of the other decoder layers in `loss_dict`.
        weighted_terms: whether transformers reports the terms in `loss_dict` with their weights applied.
    """

    class_loss: Literal["softmax", "focal", "varifocal"]
    class_cost: float
    bbox_cost: float
    giou_cost: float
    class_activation: Literal["softmax", "sigmoid", "focal"]
    class_weight: float
    bbox_weight: float
    giou_weight: float
    alpha: float = 0.25
    gamma: float = 2.0
    match_alpha: float = 0.25
    match_gamma: float = 2.0
    background_weight: float = 1.0
    auxiliary_suffix: str = "_{}"
    weighted_terms: bool = False


@dataclass(frozen=True)
class Family:
    """
    What the package has to know of one detector family.

    Attributes:
        backbone (`str`): path of the image network in the detector: pixels in, feature maps out.
        class_heads (`str`): regular expression of the parameters whose shape or meaning depends on the classes.
        last_box_layers (`str`): regular expression of the last layer of every box head.
        query_embeddings (`tuple[str, ...]`): parts of the names of learned query embeddings.
        layer_dim (`int`): dimension of the decoder layers in the tensors that the family hands to its loss.
        decoder_features (`Callable`): `(detector, outputs) -> [layers, images, queries, width]`, the features that
            enter the class heads, without denoising queries.
        losses (`Callable`): `config -> LossSettings`.
        strides (`tuple[int, ...]`): strides of the feature maps the family takes from its backbone.
        backbone_fields (`Callable`): `(channels, strides, hidden_size) -> dict` of config fields that must agree with
            the backbone's feature maps.
        image_processor (`str`): name of the image processor class that detectors of the family are saved with.
        resize (`str`): "shortest_edge" keeps the aspect ratio and pads the batch, "square" gives one square size to
            the whole batch, for families that do not mask padding.
        defaults (`dict`): config fields this package sets differently from transformers when it builds a detector.
    """

    backbone: str
    class_heads: str
    last_box_layers: str
    layer_dim: int
    decoder_features: Callable[[PreTrainedModel, ModelOutput], Tensor]
    losses: Callable[[PreTrainedConfig], LossSettings]
    strides: tuple[int, ...]
    backbone_fields: Callable[[list[int], list[int], int], dict[str, Any]]
    image_processor: str
    resize: Literal["shortest_edge", "square"]
    query_embeddings: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()


# --- decoder features ------------------------------------------------------------------------------------------------


def _normed_hidden_states(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """
    DETR and its kin: what the class head sees after every layer, rebuilt from the recorded hidden states.

    The recorded states are those before the decoder's norm, preceded by the decoder's input. Without
    `config.auxiliary_loss` the decoder does not apply its norm between layers and only the last layer has a head.
    """
    last = outputs.last_hidden_state[None]
    if not detector.config.auxiliary_loss:
        return last
    inner = [detector.model.decoder.layernorm(state) for state in outputs.decoder_hidden_states[1:-1]]
    return torch.cat([torch.stack(inner), last]) if inner else last


def _intermediate_hidden_states(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """RT-DETR and its kin expose them; denoising queries, if any, come before the real ones."""
    return outputs.intermediate_hidden_states[:, :, -num_queries(detector.config) :].transpose(0, 1)


# --- losses ----------------------------------------------------------------------------------------------------------


def _detr_losses(config: PreTrainedConfig) -> LossSettings:
    return LossSettings(
        class_loss="softmax",
        class_activation="softmax",
        class_cost=config.class_cost,
        bbox_cost=config.bbox_cost,
        giou_cost=config.giou_cost,
        class_weight=1,
        bbox_weight=config.bbox_loss_coefficient,
        giou_weight=config.giou_loss_coefficient,
        background_weight=config.eos_coefficient,
    )


def _focal_detr_losses(config: PreTrainedConfig) -> LossSettings:
    return LossSettings(
        class_loss="focal",
        class_activation="focal",
        class_cost=config.class_cost,
        bbox_cost=config.bbox_cost,
        giou_cost=config.giou_cost,
        class_weight=1,
        bbox_weight=config.bbox_loss_coefficient,
        giou_weight=config.giou_loss_coefficient,
        alpha=config.focal_alpha,
    )


def _rt_detr_losses(config: PreTrainedConfig) -> LossSettings:
    return LossSettings(
        class_loss="varifocal",
        class_activation="focal" if config.use_focal_loss else "softmax",
        class_cost=config.matcher_class_cost,
        bbox_cost=config.matcher_bbox_cost,
        giou_cost=config.matcher_giou_cost,
        match_alpha=config.matcher_alpha,
        match_gamma=config.matcher_gamma,
        class_weight=config.weight_loss_vfl,
        bbox_weight=config.weight_loss_bbox,
        giou_weight=config.weight_loss_giou,
        alpha=config.focal_loss_alpha,
        gamma=config.focal_loss_gamma,
        auxiliary_suffix="_aux_{}",
        weighted_terms=True,
    )


# --- backbones -------------------------------------------------------------------------------------------------------


def _no_fields(channels: list[int], strides: list[int], hidden_size: int) -> dict[str, Any]:
    return {}


def _pyramid_fields(channels: list[int], strides: list[int], hidden_size: int) -> dict[str, Any]:
    return {
        "encoder_in_channels": channels,
        "feat_strides": strides,
        "encoder_hidden_dim": hidden_size,
        "decoder_in_channels": [hidden_size] * len(channels),
        "num_feature_levels": len(channels),
        "encode_proj_layers": [len(channels) - 1],
        # transformers would swap timm's norm-and-activation layers for plain norms and lose every activation; the
        # backbone's own config freezes its norms correctly.
        "freeze_backbone_batch_norms": False,
    }


# --- the table -------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "detr": Family(
        backbone="model.backbone.model",
        class_heads=r"class_labels_classifier\.",
        last_box_layers=r"bbox_predictor\.layers\.2\.",
        query_embeddings=("query_position_embeddings",),
        layer_dim=0,
        decoder_features=_normed_hidden_states,
        losses=_detr_losses,
        strides=(32,),
        backbone_fields=_no_fields,
        image_processor="DetrImageProcessor",
        resize="shortest_edge",
        defaults=(("auxiliary_loss", True),),
    ),
    "conditional_detr": Family(
        backbone="model.backbone.model",
        class_heads=r"class_labels_classifier\.",
        last_box_layers=r"bbox_predictor\.layers\.2\.",
        query_embeddings=("query_position_embeddings",),
        layer_dim=0,
        decoder_features=_normed_hidden_states,
        losses=_focal_detr_losses,
        strides=(32,),
        backbone_fields=_no_fields,
        image_processor="ConditionalDetrImageProcessor",
        resize="shortest_edge",
        defaults=(("auxiliary_loss", True),),
    ),
    "rt_detr": Family(
        backbone="model.backbone.model",
        class_heads=r"model\.decoder\.class_embed\.|model\.enc_score_head\.|model\.denoising_class_embed\.",
        last_box_layers=r"model\.decoder\.bbox_embed\.\d+\.layers\.2\.|model\.enc_bbox_head\.layers\.2\.",
        layer_dim=1,
        decoder_features=_intermediate_hidden_states,
        losses=_rt_detr_losses,
        strides=(8, 16, 32),
        backbone_fields=_pyramid_fields,
        image_processor="RTDetrImageProcessor",
        resize="square",
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """
    The row of a detector's family.

    Args:
        config (`PreTrainedConfig`): the config of a detector.

    Raises:
        `ValueError`: if the family is not in the table.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"detectors of type {config.model_type!r} are not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]


def num_queries(config: PreTrainedConfig) -> int:
    """Number of object queries of a detector, without denoising or group queries."""
    return config.num_queries
