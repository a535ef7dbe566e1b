"""The detection criterion: transformers' losses, vectorised, with normalisers that are right under any number of
processes.

transformers divides the box losses of the DETR line twice by the number of processes, and those of the RT-DETR line
by the boxes of each process alone. Here every normaliser is the mean over the processes, so that gradients, which
DistributedDataParallel averages, are those of one process with the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import box_losses, focal_class_loss, softmax_class_loss, varifocal_class_loss
from ..matching import Matching, match_queries
from .families import LossSettings, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Added to every normaliser by mmdetection (float32 machine epsilon): the recorded values depend on it.
NORMALIZER_EPSILON = 1.1920929e-07

CLASS_TERMS = {"softmax": "loss_ce", "focal": "loss_ce", "varifocal": "loss_vfl"}


def use_correct_loss(detector: PreTrainedModel) -> PreTrainedModel:
    """
    Makes a detector compute its loss with [`detection_loss`], in place.

    The loss equals transformers' own in one process, and is right in several. It is not part of a checkpoint: call
    this again after `from_pretrained`.

    Args:
        detector (`PreTrainedModel`): any supported `AutoModelForObjectDetection`.

    Returns:
        `PreTrainedModel`: the same detector.

    Raises:
        `ValueError`: if the detector's family is not supported.
    """
    family_of(detector.config)
    detector.loss_function = detection_loss
    return detector


def detection_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """
    Drop-in replacement for the loss functions of transformers' detectors.

    Args:
        args, kwargs: what a detector passes to its `loss_function`.

    Returns:
        `tuple`: the scalar loss, its named terms, and the predictions of the auxiliary layers (`None` without them).
    """
    predictions = _Predictions(*args, **kwargs)
    loss, terms = _losses(predictions, predictions.match())
    return loss, terms, predictions.auxiliary_outputs()


def loss_and_matching(
    *args: Any, normalize_class_loss_by: Literal["weights", "boxes"] = "weights", **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor], Matching]:
    """
    [`detection_loss`] that returns the decoder layers' matching in place of the auxiliary predictions.

    Args:
        args, kwargs: what a detector passes to its `loss_function`.
        normalize_class_loss_by (`str`, *optional*, defaults to `"weights"`):
            what a softmax class loss is divided by. "weights" is DETR's rule, the sum of the weights of all queries.
            "boxes" is what the official AlignDet code computes, the number of boxes.

    Returns:
        `tuple`: the scalar loss, its named terms, and the [`~aligndet_hf.matching.Matching`] of the decoder layers.
    """
    predictions = _Predictions(*args, **kwargs)
    matching = predictions.match()
    loss, terms = _losses(predictions, matching, normalize_class_loss_by)
    return loss, terms, matching.first_layers(predictions.num_layers, of=len(predictions.logits))


def matching_only(*args: Any, **kwargs: Any) -> tuple[None, None, Matching]:
    """
    A `loss_function` that only matches, for the momentum detector, whose losses nobody needs.

    Args:
        args, kwargs: what a detector passes to its `loss_function`.

    Returns:
        `tuple`: two `None`, and the [`~aligndet_hf.matching.Matching`] of the decoder layers.
    """
    predictions = _Predictions(*args, **kwargs)
    return None, None, predictions.match(predictions.num_layers)


class _Predictions:
    """
    What a detector passes to its loss, in one layout.

    `logits` `[sets, images, queries, classes]` and `boxes` `[sets, images, queries, 4]` hold the decoder layers and,
    after them, the encoder's proposals where a family trains them; `denoising_*` the same of denoising queries.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: list[dict[str, Tensor]],
        device: torch.device,
        pred_boxes: Tensor,
        config: PreTrainedConfig,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        enc_topk_logits: Tensor | None = None,
        enc_topk_bboxes: Tensor | None = None,
        denoising_meta_values: dict[str, Any] | None = None,
        **unused: Any,
    ):
        family = family_of(config)
        self.settings: LossSettings = family.losses(config)
        self.labels = labels
        self.classes = torch.cat([label["class_labels"] for label in labels])
        # Half precision is too coarse for sums over queries and for box differences.
        self.logits, self.boxes = _at_least_float32(logits[None]), _at_least_float32(pred_boxes[None])
        self.target_boxes = torch.cat([label["boxes"] for label in labels]).to(self.boxes.dtype)
        if config.auxiliary_loss:
            layer_logits = _at_least_float32(outputs_class.movedim(family.layer_dim, 0))
            layer_boxes = _at_least_float32(outputs_coord.movedim(family.layer_dim, 0))
            # The last layer is the detector's own output: some decoders give it one more norm than the others.
            self.logits = torch.cat([layer_logits[:-1], self.logits])
            self.boxes = torch.cat([layer_boxes[:-1], self.boxes])
        self.num_layers = len(self.logits)
        self.denoising = denoising_meta_values if config.auxiliary_loss else None
        if denoising_meta_values is not None:
            split = denoising_meta_values["dn_num_split"]
            self.denoising_logits, self.logits = self.logits.split(split, dim=2)
            self.denoising_boxes, self.boxes = self.boxes.split(split, dim=2)
        if config.auxiliary_loss and enc_topk_logits is not None:
            self.logits = torch.cat([self.logits, _at_least_float32(enc_topk_logits)[None]])
            self.boxes = torch.cat([self.boxes, _at_least_float32(enc_topk_bboxes)[None]])

    def match(self, num_sets: int | None = None) -> Matching:
        """Hungarian matching of the first `num_sets` sets, by default of all."""
        settings = self.settings
        return match_queries(
            self.logits[:num_sets].detach(),
            self.boxes[:num_sets].detach(),
            [label["class_labels"] for label in self.labels],
            [label["boxes"] for label in self.labels],
            class_cost=settings.class_cost,
            bbox_cost=settings.bbox_cost,
            giou_cost=settings.giou_cost,
            class_activation=settings.class_activation,
            alpha=settings.match_alpha,
            gamma=settings.match_gamma,
        )

    def denoising_matching(self) -> Matching:
        """The boxes that the positive denoising queries were made from; the same in every layer."""
        num_groups, queries = self.denoising["dn_num_group"], self.denoising["dn_positive_idx"]
        sizes = [len(label["class_labels"]) for label in self.labels]
        rows = torch.arange(sum(sizes), device=self.boxes.device).split(sizes)
        image = torch.cat([torch.full_like(query, i) for i, query in enumerate(queries)])
        query, target = torch.cat(queries), torch.cat([row.tile(num_groups) for row in rows])
        layer = torch.arange(self.num_layers, device=self.boxes.device).repeat_interleave(len(query))
        return Matching(layer, *(index.tile(self.num_layers) for index in (image, query, target)))

    def suffixes(self) -> list[str]:
        """Suffix of every set's terms in `loss_dict`, as transformers names them: none for the last decoder layer."""
        auxiliary = [self.settings.auxiliary_suffix.format(i) for i in range(len(self.logits) - 1)]
        last = self.num_layers - 1
        return [*auxiliary[:last], "", *auxiliary[last:]]

    def auxiliary_outputs(self) -> list[dict[str, Tensor]] | None:
        """All sets but the last decoder layer, as transformers returns them."""
        sets = [{"logits": logits, "pred_boxes": boxes} for logits, boxes in zip(self.logits, self.boxes, strict=True)]
        del sets[self.num_layers - 1]
        return sets or None


def _losses(
    predictions: _Predictions, matching: Matching, normalize_class_loss_by: str = "weights"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss and its terms, every term named and weighted in the report as transformers does."""
    settings, num_boxes = predictions.settings, len(predictions.classes)
    sums = _sums(predictions, predictions.logits, predictions.boxes, matching)
    groups, suffixes, counts = [sums], [predictions.suffixes()], [num_boxes]
    if predictions.denoising is not None:
        groups.append(
            _sums(
                predictions,
                predictions.denoising_logits,
                predictions.denoising_boxes,
                predictions.denoising_matching(),
            )
        )
        suffixes.append([f"_dn_{i}" for i in range(predictions.num_layers)])
        counts.append(num_boxes * predictions.denoising["dn_num_group"])

    by_weights = settings.class_loss == "softmax" and normalize_class_loss_by == "weights"
    local = torch.cat([sums["normalizer"], sums["normalizer"].new_tensor(counts)])
    normalizers = _mean_over_processes(local)
    class_weights, num_boxes = normalizers.split([len(sums["normalizer"]), len(counts)])
    num_boxes = num_boxes.clamp(min=1) + NORMALIZER_EPSILON

    class_term = CLASS_TERMS[settings.class_loss]
    weights = {class_term: settings.class_weight, "loss_bbox": settings.bbox_weight, "loss_giou": settings.giou_weight}
    total, terms = predictions.logits.new_zeros(()), {}
    for group, group_suffixes, count in zip(groups, suffixes, num_boxes, strict=True):
        class_normalizer = class_weights + NORMALIZER_EPSILON if by_weights else count
        values = {
            class_term: group["class"] / class_normalizer,
            "loss_bbox": group["l1"] / count,
            "loss_giou": group["giou"] / count,
        }
        for name, value in values.items():
            weighted = value * weights[name]
            total = total + weighted.sum()
            shown = weighted if settings.weighted_terms else value
            terms |= {name + suffix: shown[i] for i, suffix in enumerate(group_suffixes)}
    if not settings.weighted_terms:
        errors = _cardinality_error(predictions)
        terms |= {"cardinality_error" + suffix: errors[i] for i, suffix in enumerate(suffixes[0])}
    return total, terms


def _sums(predictions: _Predictions, logits: Tensor, boxes: Tensor, matching: Matching) -> dict[str, Tensor]:
    """Sums of the `class`, `l1` and `giou` losses of every set, and the softmax loss's `normalizer`; each `[sets]`."""
    settings, num_sets = predictions.settings, len(logits)
    l1, giou, iou = box_losses(boxes[matching.queries], predictions.target_boxes[matching.target])
    background = logits.shape[-1] - 1 if settings.class_loss == "softmax" else logits.shape[-1]
    classes = matching.scatter(predictions.classes, logits.shape[:3], background)
    weights = logits.new_zeros(num_sets)
    if settings.class_loss == "softmax":
        class_sum, weights = softmax_class_loss(logits, classes, settings.background_weight)
    elif settings.class_loss == "focal":
        class_sum = focal_class_loss(logits, classes, settings.alpha, settings.gamma)
    else:
        quality = logits.new_zeros(logits.shape[:3])
        quality[matching.queries] = iou.to(quality.dtype)
        class_sum = varifocal_class_loss(logits, classes, quality, settings.alpha, settings.gamma)
    # Every set has the same number of matches, and they are ordered by set.
    return {
        "class": class_sum,
        "l1": l1.view(num_sets, -1).sum(1),
        "giou": giou.view(num_sets, -1).sum(1),
        "normalizer": weights,
    }


@torch.no_grad()
def _mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every number over all processes, or the numbers themselves in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


@torch.no_grad()
def _cardinality_error(predictions: _Predictions) -> Tensor:
    """Mean absolute error of the number of objects found in every set, `[sets]`; DETR's diagnostic, not a loss."""
    logits = predictions.logits
    if predictions.settings.class_loss == "softmax":
        is_object = logits.argmax(-1) != logits.shape[-1] - 1
    else:
        is_object = logits.max(-1).values > 0
    sizes = logits.new_tensor([len(label["class_labels"]) for label in predictions.labels])
    return (is_object.sum(-1) - sizes).abs().mean(-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
