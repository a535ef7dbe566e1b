"""The detection criterion: transformers' losses, vectorised, with normalisers that are right under any number of
processes.

transformers divides the box losses of the DETR line twice by the number of processes, and the RT-DETR line's by the
boxes of each process alone. Here every normaliser is the mean over the processes, so that gradients, which
DistributedDataParallel averages, equal the gradients of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..box_losses import box_losses, edge_bins, fine_grained_localization_loss, localization_distillation
from ..matching import Matching
from ..processes import mean_over_processes, number_of_processes
from .class_losses import CLASS_LOSSES
from .families import LossSettings, family_of, require_trainable
from .loss_inputs import Edges, LossInputs, Predictions, Supervised

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

# Added to every normaliser by mmdetection (float32 machine epsilon): the recorded values depend on it.
NORMALIZER_EPSILON = 1.1920929e-07
NUM_COUNTS = 4


def use_correct_loss(detector: PreTrainedModel, loss_function: Callable[..., Any] | None = None) -> PreTrainedModel:
    """
    Makes a detector compute its loss with [`detection_loss`], in place.

    The loss equals transformers' own in one process, and is right in several. Families whose own loss is right keep
    it. A two-stage Deformable DETR also trains
    the heads of its encoder, which transformers leaves as they are: terms `loss_*_enc`. The loss is not part of a
    checkpoint: call this again after `from_pretrained`.

    Args:
        detector (`PreTrainedModel`): any supported `AutoModelForObjectDetection`.
        loss_function (`Callable`, *optional*): another function of this module to install instead.

    Returns:
        `PreTrainedModel`: the same detector.

    Raises:
        `ValueError`: if the detector's family is not supported, or its config asks for auxiliary losses that it lacks
            heads for.
    """
    require_trainable(detector.config)
    if family_of(detector.config).own_loss:
        return detector
    loss_function = loss_function or detection_loss
    if family_of(detector.config).untrained_tokens(detector.config):
        loss_function = _TokenProposals(loss_function)
        detector.base_model.register_forward_hook(loss_function.keep)
    detector.loss_function = loss_function
    return detector


def use_pretraining_loss(
    detector: PreTrainedModel,
    *,
    classes: bool = True,
    normalize_class_loss_by: Literal["weights", "boxes"] = "weights",
) -> None:
    """
    Makes a detector compute the loss of pre-training and keep what its objects were matched with, in place.

    Args:
        detector (`PreTrainedModel`): any supported detector.
        classes (`bool`, *optional*, defaults to `True`): whether the class loss counts.
        normalize_class_loss_by (`str`, *optional*): see [`loss_and_matching`].
    """
    if family_of(detector.config).own_loss:
        detector.loss_weights["loss_ce"] = float(classes)
    loss = partial(loss_and_matching, classes=classes, normalize_class_loss_by=normalize_class_loss_by)
    use_correct_loss(detector, loss)


def use_no_loss(detector: PreTrainedModel) -> None:
    """Makes a detector only match its objects with the labels, in place: for the momentum detector."""
    if family_of(detector.config).own_loss:
        detector.rows_only = True
    else:
        detector.loss_function = matching_only


class _TokenProposals:
    """Hands the encoder's proposals of a two-stage detector to its loss, which transformers does not."""

    def __init__(self, loss_function: Callable[..., Any]):
        self.loss_function = loss_function
        self.proposals: dict[str, Tensor] = {}

    def keep(self, module: nn.Module, args: Any, outputs: ModelOutput) -> None:
        boxes = outputs.enc_outputs_coord_logits.sigmoid()
        self.proposals = {"token_logits": outputs.enc_outputs_class, "token_boxes": boxes}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proposals, self.proposals = self.proposals, {}  # no graph is kept beyond the step
        return self.loss_function(*args, **kwargs, **proposals)


def detection_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """
    Drop-in replacement for the loss functions of transformers' detectors.

    Args:
        args, kwargs: what a detector passes to its `loss_function`.

    Returns:
        `tuple`: the scalar loss, its named terms, and the predictions of the auxiliary layers (`None` without them).
    """
    predictions = Predictions(LossInputs.of(*args, **kwargs))
    loss, terms = _losses(predictions, predictions.start_matching()())
    return loss, terms, predictions.auxiliary_outputs()


def loss_and_matching(
    *args: Any,
    normalize_class_loss_by: Literal["weights", "boxes"] = "weights",
    classes: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor], Matching]:
    """
    [`detection_loss`] that returns the contrasted layers' matching in place of the auxiliary predictions.

    Args:
        args, kwargs: what a detector passes to its `loss_function`.
        normalize_class_loss_by (`str`, *optional*, defaults to `"weights"`):
            what a softmax class loss is divided by. "weights" is DETR's rule, the sum of the weights of all queries.
            "boxes" is what the official AlignDet code computes, the number of boxes.
        classes (`bool`, *optional*, defaults to `True`): whether the class loss counts in the sum.

    Returns:
        `tuple`: the scalar loss, its named terms, and the [`~aligndet_hf.matching.Matching`] of the
        contrasted decoder layers.
    """
    predictions = Predictions(LossInputs.of(*args, **kwargs))
    matching = predictions.start_matching()()
    if not classes:
        predictions.settings = replace(predictions.settings, class_weight=0.0)
    loss, terms = _losses(predictions, matching, normalize_class_loss_by)
    contrasted = predictions.contrasted
    return loss, terms, matching.layers(contrasted.start, contrasted.stop, of=len(predictions.detections.logits))


def matching_only(*args: Any, **kwargs: Any) -> tuple[None, None, Callable[[], Matching]]:
    """
    A `loss_function` that only starts to match, for the momentum detector, whose losses nobody needs.

    Args:
        args, kwargs: what a detector passes to its `loss_function`.

    Returns:
        `tuple`: two `None`, and a function without arguments that waits for the
        [`~aligndet_hf.matching.Matching`] of the contrasted decoder layers and returns it.
    """
    predictions = Predictions(LossInputs.of(*args, **kwargs))
    return None, None, predictions.start_matching(predictions.contrasted)


def _losses(
    predictions: Predictions, matching: Matching, normalize_class_loss_by: str = "weights"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss and its terms, every term named and weighted in the report as transformers does."""
    settings = predictions.settings
    groups = predictions.supervised(matching)
    sums = [_sums(settings, group, predictions.target_boxes) for group in groups]
    # A process without a box has no denoising queries, yet takes part in the mean of those who have.
    normalizers = [group_sums["normalizers"] for group_sums in sums]
    missing = normalizers[0].new_zeros((2 - len(normalizers)) * NUM_COUNTS)
    means = mean_over_processes(torch.cat([*normalizers, missing]))
    normalizers = means.split([len(vector) for vector in normalizers] + [len(missing)])[: len(sums)]

    class_loss = CLASS_LOSSES[settings.class_loss]
    weights = {
        class_loss.term: settings.class_weight,
        "loss_bbox": settings.bbox_weight,
        "loss_giou": settings.giou_weight,
        "loss_fgl": settings.fgl_weight,
        "loss_ddf": settings.ddf_weight,
    }
    total, terms = predictions.detections.logits.new_zeros(()), dict[str, Tensor]()
    for group, group_sums, normalizer in zip(groups, sums, normalizers, strict=True):
        (num_boxes, num_pairs, pair_edges, other_edges), class_weights = (
            normalizer[:NUM_COUNTS],
            normalizer[NUM_COUNTS:],
        )
        # In all processes together 1 at least: the mean of images without boxes is then the loss of one process.
        least = 1 / number_of_processes()
        num_boxes, num_pairs = (count.clamp(min=least) + NORMALIZER_EPSILON for count in (num_boxes, num_pairs))
        by_weights = class_loss.has_background and normalize_class_loss_by == "weights"
        values = {
            class_loss.term: group_sums["class"] / (class_weights + NORMALIZER_EPSILON if by_weights else num_boxes),
            "loss_bbox": group_sums["l1"] / num_pairs,
            "loss_giou": group_sums["giou"] / num_pairs,
        }
        if group.sets.edges is not None:
            values["loss_fgl"] = group_sums["fgl"] / num_pairs
            # The mean over each of the two kinds of edges, weighted by the root of their number.
            roots = torch.stack([pair_edges, other_edges]).sqrt()
            values["loss_ddf"] = (group_sums["ddf"] / roots.clamp(min=NORMALIZER_EPSILON)).sum(-1) / roots.sum()
        for name, value in values.items():
            weighted = value * weights[name]
            total = total + weighted.sum()
            shown = weighted if settings.weighted_terms else value
            # Edge terms belong to the first sets only.
            terms |= {name + suffix: term for suffix, term in zip(group.sets.suffixes, shown, strict=False)}
    if not settings.weighted_terms:
        errors = _cardinality_error(predictions)
        terms |= {
            "cardinality_error" + suffix: error
            for suffix, error in zip(predictions.detections.suffixes, errors, strict=True)
        }
    return total, terms


def _sums(settings: LossSettings, group: Supervised, target_boxes: Tensor) -> dict[str, Tensor]:
    """
    Sums of the `class`, `l1`, `giou` and `fgl` losses of every set, `[sets]`, of `ddf` over matched and other queries,
    `[sets, 2]`, and the `normalizers` of this process: boxes, pairs, matched and other edges, which are `NUM_COUNTS`
    numbers, and the weights of a softmax loss.
    """
    (logits, boxes, _, edges), pairs = group.sets, group.box_matching
    num_sets = len(logits)
    l1, giou, iou = box_losses(boxes[pairs.queries], target_boxes[pairs.target])
    if group.box_weights is not None:
        l1, giou = l1 * group.box_weights[pairs.target], giou * group.box_weights[pairs.target]
    # Every set has the same number of matches, and they are ordered by set.
    sums = {"l1": l1.view(num_sets, -1).sum(1), "giou": giou.view(num_sets, -1).sum(1)}

    sums["class"], class_weights = _class_sums(settings, group, target_boxes, iou)
    if edges is not None:
        sums |= _edge_sums(settings, edges, group, target_boxes, iou)
    matched_edges = 4 * (len(pairs.query) // num_sets)
    counts = [group.num_boxes, group.num_box_pairs, matched_edges, 4 * logits[0, ..., 0].numel() - matched_edges]
    sums["normalizers"] = torch.cat([_copied_to(logits, counts), class_weights])
    return sums


def _class_sums(settings: LossSettings, group: Supervised, target_boxes: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """The class loss of every set, `[sets]`, and of a loss with background the weights `[sets]` to divide it by."""
    loss, logits, matching = CLASS_LOSSES[settings.class_loss], group.sets.logits, group.class_matching
    classes = matching.scatter(group.classes, logits.shape[:3], logits.shape[-1] - int(loss.has_background))
    arguments = {name: getattr(settings, name) for name in loss.settings}
    if loss.needs_iou:
        if group.box_matching is not matching:
            iou = box_losses(group.sets.boxes[matching.queries], target_boxes[matching.target])[2]
        arguments["quality"] = logits.new_zeros(logits.shape[:3])
        arguments["quality"][matching.queries] = iou.to(logits.dtype)
    sums = loss.function(logits, classes, query_weights=group.query_weights, **arguments)
    return sums if loss.has_background else (sums, logits.new_zeros(0))


def _edge_sums(
    settings: LossSettings, edges: Edges, group: Supervised, target_boxes: Tensor, iou: Tensor
) -> dict[str, Tensor]:
    """D-FINE's losses of the sets that have edge distributions: `fgl`, and `ddf` of matched and of other queries."""
    num_layers = len(edges.logits)
    first = group.box_matching.layers(0, num_layers, of=len(group.sets.logits))
    bins = edge_bins(settings.num_bins, settings.bins_up, settings.bins_scale, edges.logits.device)
    weight = iou[: len(first.query)]
    if group.box_weights is not None:
        weight = weight * group.box_weights[first.target]
    fgl = fine_grained_localization_loss(
        edges.logits[first.queries],
        edges.references[first.queries],
        target_boxes[first.target],
        weight,
        bins.to(group.sets.logits.dtype),
        settings.bins_scale,
    )
    weights = edges.teacher_scores.repeat(num_layers, 1, 1)
    weights[first.queries] = weight.to(weights.dtype)
    is_pair = torch.zeros_like(weights, dtype=torch.bool)
    is_pair[first.queries] = True
    divergence = localization_distillation(edges.logits, edges.teacher, weights)
    ddf = torch.stack([divergence * is_pair, divergence * ~is_pair], -1).flatten(1, 2).sum(1)
    return {"fgl": fgl.view(num_layers, -1).sum(1), "ddf": ddf}


@torch.no_grad()
def _cardinality_error(predictions: Predictions) -> Tensor:
    """Mean absolute error of the number of objects found in every set, `[sets]`; DETR's diagnostic, not a loss."""
    logits = predictions.detections.logits
    if CLASS_LOSSES[predictions.settings.class_loss].has_background:
        is_object = logits.argmax(-1) != logits.shape[-1] - 1
    else:
        is_object = logits.max(-1).values > 0
    sizes = _copied_to(logits, [len(label["class_labels"]) for label in predictions.labels])
    return (is_object.sum(-1) - sizes).abs().mean(-1)


def _copied_to(like: Tensor, numbers: list[int]) -> Tensor:
    """The numbers as a tensor on the device of another; `new_tensor` would wait for the device."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)
