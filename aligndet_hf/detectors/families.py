"""THE table of detector families. Everything that differs between families stands here, and only here.

A family is one `model_type` of `AutoModelForObjectDetection`. Adding one means adding its row to `FAMILIES` (and a
tiny config to `tests/tiny_detectors.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

# This registers them, so that the mapping has them.
from ..convnets.modeling_torchvision import FasterRcnnConfig, FcosConfig, RetinaNetConfig, TorchvisionDetectorConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput


@dataclass(frozen=True)
class LossSettings:
    """
    The numbers of a family's matcher and criterion, read from a detector's config.

    Attributes:
        class_loss: which class loss the family trains with, a row of [`~aligndet_hf.detectors.class_losses`].
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        class_activation: class term of the matching cost, see [`~aligndet_hf.matching.match_queries`].
        match_alpha, match_gamma: focal parameters of the matching cost.
        class_weight, bbox_weight, giou_weight: weights of the loss terms in the total.
        alpha, gamma: parameters of the class loss.
        background_weight: weight of unmatched queries in the softmax loss.
        auxiliary_suffix: how transformers names the terms of the other decoder layers in `loss_dict`.
        weighted_terms: whether transformers reports the terms in `loss_dict` with their weights applied.
        clamp_boxes: whether predicted boxes are cut to 0..1 before matching and losses.
        dense_matching: whether all layers learn boxes from the union of their matchings (DEIM).
        fgl_weight, ddf_weight: weights of D-FINE's losses on edge distributions.
        num_bins, bins_up, bins_scale: the distributions' bins, see [`~aligndet_hf.box_losses.edge_bins`].
    """

    class_loss: Literal["softmax", "focal", "varifocal", "matchability", "iou_aware"]
    class_cost: float
    bbox_cost: float
    giou_cost: float
    class_activation: Literal["softmax", "sigmoid", "focal"]
    class_weight: float = 1.0
    bbox_weight: float = 1.0
    giou_weight: float = 1.0
    alpha: float | None = 0.25
    gamma: float = 2.0
    match_alpha: float = 0.25
    match_gamma: float = 2.0
    background_weight: float = 1.0
    auxiliary_suffix: str = "_{}"
    weighted_terms: bool = False
    clamp_boxes: bool = False
    dense_matching: bool = False
    fgl_weight: float = 0.0
    ddf_weight: float = 0.0
    num_bins: int = 0
    bins_up: float = 0.0
    bins_scale: float = 0.0


class ObjectRows(NamedTuple):
    """
    What a detector knows of objects, a row each: a query of a decoder layer, an anchor, a point or a region.

    Attributes:
        features (`torch.Tensor` of shape `[R, width]`): what enters the class head. Without labels the predictions'
            features, image by image, and layer before layer.
        ids (`torch.Tensor` of shape `[R]`, *optional*): the id of the proposal of each, -1 for background.
        slots (`torch.Tensor` of shape `[R]`, *optional*): which anchor of its location each is, 0 for what is none.
        last (`slice`): the rows of the last decoder layer; all rows of detectors without layers.
    """

    features: Tensor
    ids: Tensor | None
    slots: Tensor | None
    last: slice


@dataclass(frozen=True)
class Family:
    """
    What the package has to know of one detector family.

    Attributes:
        title (`str`): what people call it.
        backbones (`tuple[str, ...]`): path of the image network in the detector: pixels in, feature maps out. Of
            several, the one that the detector has; none where the whole detector is one network.
        class_heads (`str`): regular expression of the parameters whose shape or meaning depends on the classes.
        last_box_layers (`str`): regular expression of the last layer of every box head.
        object_rows (`Callable`): `(detector, outputs, labels) -> ObjectRows`: the features that enter the class heads
            and what they stand for, see [`ObjectRows`]. `outputs` come from a forward pass with
            `output_hidden_states`, and with these `labels`, if any.
        losses (`Callable`): `config -> LossSettings`.
        strides (`tuple[int, ...]`): strides of the feature maps the family takes from its backbone; none if it only
            works with an image network of its own, whose config is then a field of the detector's.
        backbone_fields (`Callable`): `(channels, strides, hidden_size) -> dict` of config fields that must agree with
            the backbone's feature maps.
        image_processor (`str`): name of the image processor class that detectors of the family are saved with.
        resize (`str`): "shortest_edge" keeps the aspect ratio and pads the batch, "square" gives one square size to
            the whole batch, for families that do not mask padding.
        layer_dim (`int`): dimension of the decoder layers in the tensors that the family hands to its loss.
        own_loss (`bool`): whether the model computes its loss itself, and rightly so under any number of processes.
            Many anchors, points or regions stand for one box then, where queries are matched one to one.
        contrasts (`str`): which decoder layers predict boxes in evaluation mode, and so have matched queries in the
            momentum detector: "all", or the "last" only.
        width (`Callable`): `config -> int`, width of the object rows.
        slots (`Callable`): `config -> int`, of how many kinds the rows are: anchors of a location.
        num_queries (`Callable`): `config -> int`, object queries without denoising queries and of one group; of
            families without queries the detections of an image.
        encoder (`str`): regular expression of what stands before the decoder: backbone, encoder and projections.
        query_embeddings (`tuple[str, ...]`): parts of the names of learned query embeddings.
        constants (`tuple[str, ...]`): parameters that are never trained; transformers forgets it on loading.
        untrained_tokens (`Callable`): `config -> bool`, whether the encoder proposes boxes with heads that
            transformers' loss does not train.
        query_groups (`Callable`): `config -> int`, the groups of queries in training mode, each matched by itself.
        has_auxiliary_heads (`bool`): whether the decoder layers before the last have heads, which the config field
            `auxiliary_loss` trains.
        masks (`bool`): whether the family is trained with the masks of objects, where the labels have them, and
            predicts them.
        size_multiple (`Callable`): `config -> int`, what the sides of the images must be divisible by.
        starts_small (`bool`): whether transformers starts matrices and query embeddings many times smaller than the
            family's paper, see [`~aligndet_hf.detectors.build.detector_from_config`].
        defaults (`tuple[tuple[str, Any], ...]`): config fields this package sets differently from transformers when
            it builds a detector.
    """

    title: str
    backbones: tuple[str, ...]
    class_heads: str
    last_box_layers: str
    object_rows: Callable[[PreTrainedModel, ModelOutput, list[dict[str, Tensor]] | None], ObjectRows]
    losses: Callable[[PreTrainedConfig], LossSettings]
    image_processor: str
    resize: Literal["shortest_edge", "square"]
    strides: tuple[int, ...] = ()
    backbone_fields: Callable[[list[int], list[int], int], dict[str, Any]] = lambda channels, strides, width: {}
    layer_dim: int = 0
    own_loss: bool = False
    contrasts: Literal["all", "last"] = "all"
    width: Callable[[PreTrainedConfig], int] = attrgetter("hidden_size")
    slots: Callable[[PreTrainedConfig], int] = lambda config: 1
    num_queries: Callable[[PreTrainedConfig], int] = attrgetter("num_queries")
    encoder: str = r"model\.(backbone|conv_encoder|encoder|level_embed|\w*input_proj\w*)(\.|$)"
    query_embeddings: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    untrained_tokens: Callable[[PreTrainedConfig], bool] = lambda config: False
    query_groups: Callable[[PreTrainedConfig], int] = lambda config: 1
    has_auxiliary_heads: bool = True
    masks: bool = False
    size_multiple: Callable[[PreTrainedConfig], int] = lambda config: 1
    starts_small: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()


# --- object rows -----------------------------------------------------------------------------------------------------


def _query_rows(
    hidden_states: Callable[[PreTrainedModel, ModelOutput], Tensor],
) -> Callable[[PreTrainedModel, ModelOutput, list[dict[str, Tensor]] | None], ObjectRows]:
    """
    The rows of a detector with queries, by its hidden states `[layers, images, queries, width]`, without denoising
    queries and with one group of queries only. With labels, the detector's criterion has to be one that returns its
    matching: [`~aligndet_hf.detectors.criterion.loss_and_matching`] or `matching_only`.
    """

    def object_rows(
        detector: PreTrainedModel, outputs: ModelOutput, labels: list[dict[str, Tensor]] | None = None
    ) -> ObjectRows:
        features = hidden_states(detector, outputs)
        layers, images, queries, _ = features.shape
        ids = slots = None
        if labels is not None:
            matching = (
                outputs.auxiliary_outputs() if callable(outputs.auxiliary_outputs) else outputs.auxiliary_outputs
            )
            ids = torch.cat([label["proposal_ids"] for label in labels])
            # Queries of further groups are matched as well; they come after the first group and are left out.
            shape = (layers, images, outputs.logits.shape[1])
            ids = matching.to(ids.device).scatter(ids, shape, -1)[..., :queries].flatten()
            slots = torch.zeros_like(ids)
        return ObjectRows(features.flatten(0, 2), ids, slots, slice((layers - 1) * images * queries, None))

    return object_rows


def _sampled_rows(
    detector: PreTrainedModel, outputs: ModelOutput, labels: list[dict[str, Tensor]] | None = None
) -> ObjectRows:
    """The rows that a convnet has sampled, or without labels the rows of its detections."""
    ids = index = outputs.object_index
    if labels is not None:
        # One more for background, which is where the index -1 leads.
        ids = torch.cat([*(label["proposal_ids"] for label in labels), index.new_full((1,), -1)])[index]
    return ObjectRows(outputs.object_features, ids, outputs.object_slots, slice(None))


def _recorded_hidden_states(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """
    Hidden states of all layers where only `output_hidden_states` gives them, preceded by the decoder's input.

    Without `config.auxiliary_loss` only the last layer has a head.
    """
    last = outputs.last_hidden_state[None]
    inner = outputs.decoder_hidden_states[1:-1] if detector.config.auxiliary_loss else ()
    return torch.cat([torch.stack(inner), last]) if inner else last


def _normed_hidden_states(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """The same where they are recorded before the decoder's norm, which the class head sees them after."""
    *inner, last = _recorded_hidden_states(detector, outputs)
    return torch.stack([*map(detector.model.decoder.layernorm, inner), last])


def _images_first(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """Hidden states of all layers as `[images, layers, queries, width]`; denoising queries come before the real."""
    states = outputs.intermediate_hidden_states[:, :, -num_queries(detector.config) :].transpose(0, 1)
    return states if detector.config.auxiliary_loss else states[-1:]


def _layers_first(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """Hidden states of all layers as `[layers, images, queries, width]`; the first group of queries is kept."""
    states = outputs.intermediate_hidden_states[:, :, : num_queries(detector.config)]
    return states if detector.config.auxiliary_loss else states[-1:]


def _last_hidden_state(detector: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """The last layer alone; real queries come after denoising queries, and after YOLOS' image tokens."""
    return outputs.last_hidden_state[None, :, -num_queries(detector.config) :]


# --- losses ----------------------------------------------------------------------------------------------------------


def _weighted_as_detr(config: PreTrainedConfig, class_loss: Literal["softmax", "focal"], **own: float) -> LossSettings:
    return LossSettings(
        class_loss=class_loss,
        class_activation=class_loss,
        class_cost=config.class_cost,
        bbox_cost=config.bbox_cost,
        giou_cost=config.giou_cost,
        bbox_weight=config.bbox_loss_coefficient,
        giou_weight=config.giou_loss_coefficient,
        **own,
    )


def _detr_losses(config: PreTrainedConfig) -> LossSettings:
    return _weighted_as_detr(config, "softmax", background_weight=config.eos_coefficient)


def _focal_detr_losses(config: PreTrainedConfig) -> LossSettings:
    return _weighted_as_detr(config, "focal", alpha=config.focal_alpha)


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


def _d_fine_losses(config: PreTrainedConfig) -> LossSettings:
    return replace(
        _rt_detr_losses(config),
        clamp_boxes=True,
        fgl_weight=config.weight_loss_fgl,
        ddf_weight=config.weight_loss_ddf,
        num_bins=config.max_num_bins,
        bins_up=config.up,
        bins_scale=config.reg_scale,
    )


def _deimv2_losses(config: PreTrainedConfig) -> LossSettings:
    return replace(
        _d_fine_losses(config),
        class_loss="matchability",
        class_weight=config.weight_loss_mal,
        alpha=config.mal_alpha,
        dense_matching=config.use_dense_one_to_one,
    )


def _lw_detr_losses(config: PreTrainedConfig) -> LossSettings:
    return replace(_focal_detr_losses(config), class_loss="iou_aware", class_weight=config.class_loss_coefficient)


def _convnet_losses(config: PreTrainedConfig, class_loss: str = "focal") -> LossSettings:
    """For the matching of detections with labels, where embeddings are looked at; the models have their own losses."""
    return LossSettings(
        class_loss=class_loss,
        class_activation="focal",
        class_cost=2.0,
        bbox_cost=5.0,
        giou_cost=2.0,
    )


# --- backbones -------------------------------------------------------------------------------------------------------


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


def _deformable_fields(channels: list[int], strides: list[int], hidden_size: int) -> dict[str, Any]:
    # One more level, made from the last map, as published.
    return {"num_feature_levels": len(channels) + (len(channels) > 1)}


def _anchor_fields(config_class: type[TorchvisionDetectorConfig]) -> Callable[[list[int], list[int], int], dict]:
    return lambda channels, strides, hidden_size: {"anchor_sizes": config_class.anchors_at(strides)}


# --- the table -------------------------------------------------------------------------------------------------------

_DETR = Family(
    title="DETR",
    backbones=("model.backbone.model",),
    class_heads=r"class_labels_classifier\.",
    last_box_layers=r"bbox_predictor\.layers\.2\.",
    query_embeddings=("query_position_embeddings",),
    object_rows=_query_rows(_normed_hidden_states),
    losses=_detr_losses,
    strides=(32,),
    image_processor="DetrImageProcessor",
    resize="shortest_edge",
    starts_small=True,
    defaults=(("auxiliary_loss", True),),
)

_RT_DETR = Family(
    title="RT-DETR",
    backbones=("model.backbone.model",),
    class_heads=r"(model\.decoder\.)?class_embed\.|model\.enc_score_head\.|model\.denoising_class_embed\.",
    last_box_layers=r"(model\.decoder\.)?bbox_embed\.\d+\.layers\.2\.|model\.enc_bbox_head\.layers\.2\.",
    layer_dim=1,
    object_rows=_query_rows(_images_first),
    losses=_rt_detr_losses,
    strides=(8, 16, 32),
    backbone_fields=_pyramid_fields,
    image_processor="RTDetrImageProcessor",
    resize="square",
    size_multiple=lambda config: max(config.feat_strides),
)

_D_FINE = replace(
    _RT_DETR,
    title="D-FINE",
    last_box_layers=_RT_DETR.last_box_layers + r"|model\.decoder\.pre_bbox_head\.layers\.2\.",
    object_rows=_query_rows(_last_hidden_state),
    losses=_d_fine_losses,
    contrasts="last",
    constants=("model.decoder.reg_scale", "model.decoder.up"),
)

_LW_DETR = Family(
    title="LW-DETR",
    backbones=("model.backbone.backbone",),
    class_heads=r"class_embed\.|model\.enc_out_class_embed\.",
    last_box_layers=r"bbox_embed\.layers\.2\.|model\.enc_out_bbox_embed\.\d+\.layers\.2\.",
    query_embeddings=("reference_point_embed", "query_feat"),
    object_rows=_query_rows(_layers_first),
    losses=_lw_detr_losses,
    image_processor="DeformableDetrImageProcessor",
    resize="square",
    width=attrgetter("d_model"),
    query_groups=attrgetter("group_detr"),
    size_multiple=lambda config: config.backbone_config.patch_size * config.backbone_config.num_windows_side,
)

_DENSE = Family(
    title="RetinaNet",
    backbones=("detector.backbone.body",),
    class_heads=r"detector\.head\.classification_head\.cls_logits\.",
    last_box_layers=r"detector\.head\.regression_head\.bbox_(reg|ctrness)\.",
    object_rows=_sampled_rows,
    losses=_convnet_losses,
    strides=(8, 16, 32),
    backbone_fields=_anchor_fields(RetinaNetConfig),
    image_processor="DeformableDetrImageProcessor",
    resize="shortest_edge",
    own_loss=True,
    slots=attrgetter("num_anchors"),
    num_queries=attrgetter("detections_per_image"),
    encoder=r"detector\.backbone\.",
)

_R_CNN = replace(
    _DENSE,
    title="Faster R-CNN",
    # Each class has its own boxes and masks.
    class_heads=r"detector\.roi_heads\.(box_predictor|mask_predictor\.mask_fcn_logits)\.",
    last_box_layers=r"detector\.roi_heads\.box_predictor\.bbox_pred\.",
    losses=partial(_convnet_losses, class_loss="softmax"),
    strides=(4, 8, 16, 32),
    backbone_fields=_anchor_fields(FasterRcnnConfig),
    width=attrgetter("box_head_size"),
    slots=lambda config: 1,
)

_ALL: dict[str, Family] = {
    "detr": _DETR,
    "table-transformer": replace(
        _DETR,
        title="Table Transformer",
        backbones=("model.backbone.conv_encoder.model",),
        object_rows=_query_rows(_recorded_hidden_states),
    ),
    "conditional_detr": replace(
        _DETR,
        title="Conditional DETR",
        losses=_focal_detr_losses,
        image_processor="ConditionalDetrImageProcessor",
    ),
    "dab-detr": replace(
        _DETR,
        title="DAB-DETR",
        backbones=("model.backbone.conv_encoder.model",),
        class_heads=r"class_embed\.",
        last_box_layers=r"(bbox_predictor|model\.decoder\.bbox_embed)\.layers\.2\.",
        query_embeddings=("query_refpoint_embeddings",),
        losses=_focal_detr_losses,
        image_processor="ConditionalDetrImageProcessor",
    ),
    "deformable_detr": replace(
        _DETR,
        title="Deformable DETR",
        class_heads=r"(model\.decoder\.)?class_embed\.",
        last_box_layers=r"(model\.decoder\.)?bbox_embed\.\d+\.layers\.2\.",
        object_rows=_query_rows(_images_first),
        losses=_focal_detr_losses,
        strides=(8, 16, 32),
        backbone_fields=_deformable_fields,
        image_processor="DeformableDetrImageProcessor",
        num_queries=lambda config: config.two_stage_num_proposals if config.two_stage else config.num_queries,
        untrained_tokens=attrgetter("two_stage"),
    ),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": replace(_RT_DETR, title="RT-DETRv2"),
    "d_fine": _D_FINE,
    "deimv2": replace(
        _D_FINE,
        title="DEIMv2",
        backbones=("model.conv_encoder.model", "model.conv_encoder.backbone"),
        losses=_deimv2_losses,
    ),
    # transformers' own default has no feature map at all; this is the one of LW-DETR tiny to medium.
    "lw_detr": replace(_LW_DETR, defaults=(("projector_scale_factors", [1.0]),)),
    "rf_detr": replace(
        _LW_DETR,
        title="RF-DETR",
        image_processor="RfDetrImageProcessor",
        size_multiple=lambda config: config.backbone_config.patch_size * config.backbone_config.num_windows,
    ),
    "yolos": replace(
        _DETR,
        title="YOLOS",
        backbones=(),
        class_heads=r"class_labels_classifier\.layers\.2\.",
        encoder=r"vit\.(?!embeddings\.detection_tokens)",
        query_embeddings=("detection_tokens",),
        object_rows=_query_rows(_last_hidden_state),
        strides=(),
        image_processor="YolosImageProcessor",
        resize="square",
        num_queries=attrgetter("num_detection_tokens"),
        size_multiple=attrgetter("patch_size"),
        starts_small=False,
        has_auxiliary_heads=False,
        defaults=(("auxiliary_loss", False),),
    ),
    "torchvision_retinanet": _DENSE,
    "torchvision_fcos": replace(_DENSE, title="FCOS", backbone_fields=_anchor_fields(FcosConfig)),
    "torchvision_faster_rcnn": _R_CNN,
    "torchvision_mask_rcnn": replace(_R_CNN, title="Mask R-CNN", masks=True),
}

# Those that the installed transformers has.
FAMILIES = {name: family for name, family in _ALL.items() if name in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES}


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


def require_trainable(config: PreTrainedConfig) -> None:
    """
    Refuses what a family cannot be trained with.

    Raises:
        `ValueError`: for an unsupported family, or `auxiliary_loss=True` of one whose last layer alone has heads.
    """
    if not family_of(config).has_auxiliary_heads and config.auxiliary_loss:
        raise ValueError(
            f"a {config.model_type} has heads on its last layer only, and no auxiliary loss: set auxiliary_loss to "
            "false in its config"
        )


def num_queries(config: PreTrainedConfig) -> int:
    """Number of object queries of a detector, without denoising queries and of one group."""
    return family_of(config).num_queries(config)


def num_groups(config: PreTrainedConfig, predictions: int) -> int:
    """
    Into how many groups of queries, each matched by itself, the predictions for an image fall.

    Raises:
        `ValueError`: if these are not the predictions of a detector with this config.
    """
    queries, groups = num_queries(config), family_of(config).query_groups(config)
    if predictions not in (queries, queries * groups):
        raise ValueError(
            f"the detector makes {predictions} predictions an image, but its config has {queries} queries"
            + (f" in {groups} groups" if groups > 1 else "")
        )
    return predictions // queries


def require_fitting_sizes(config: PreTrainedConfig, image_sizes: list[int]) -> None:
    """
    Refuses sizes that a detector cannot take.

    Args:
        config (`PreTrainedConfig`): the config of a detector.
        image_sizes (`list[int]`): sides of square images in pixels; other families take any size.

    Raises:
        `ValueError`: if a size is not a multiple of what the feature maps or the windows of attention need, or gives
            feature maps with fewer places than the detector takes queries from.
    """
    multiple = family_of(config).size_multiple(config)
    if uneven := [size for size in image_sizes if size % multiple]:
        nearest = sorted({max(multiple, round(size / multiple) * multiple) for size in image_sizes})
        raise ValueError(
            f"image_sizes: this {config.model_type} takes multiples of {multiple}, got {uneven}; the nearest that fit "
            f"are {' '.join(map(str, nearest))}"
        )
    places = sum((min(image_sizes) // stride) ** 2 for stride in getattr(config, "feat_strides", ()))
    if 0 < places < config.num_queries:
        raise ValueError(
            f"image_sizes: the feature maps of {min(image_sizes)} pixels have {places} places, and this "
            f"{config.model_type} takes the places of its {config.num_queries} queries from them: give larger sizes, "
            f"or fewer queries to a new detector, --detector_config '{{\"num_queries\": {places // 2}}}'"
        )


def backbone_path(detector: PreTrainedModel) -> str | None:
    """Where in a detector its image network is, `None` if it has none of its own."""
    for path in family_of(detector.config).backbones:
        parent, name = path.rsplit(".", 1)
        if hasattr(detector.get_submodule(parent), name):
            return path
    return None


def freeze_constants(detector: PreTrainedModel) -> None:
    """Freezes what is a parameter in name only; transformers forgets about it in `from_pretrained`."""
    for name in family_of(detector.config).constants:
        detector.get_parameter(name).requires_grad_(False)
