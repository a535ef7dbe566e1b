"""The detection criterion: transformers' losses, vectorised, with normalisers that are right under any number of
processes.

transformers divides the box losses of the DETR line twice by the number of processes, and those of the RT-DETR line
by the boxes of each process alone. Here every normaliser is the mean over the processes, so that gradients, which
DistributedDataParallel averages, are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..boxes import cxcywh_to_xyxy, iou_and_giou
from ..losses import (
    box_losses,
    edge_bins,
    fine_grained_localization_loss,
    focal_class_loss,
    iou_aware_class_loss,
    localization_distillation,
    matchability_class_loss,
    softmax_class_loss,
    varifocal_class_loss,
)
from ..matching import Matching, start_matching
from ..processes import mean_over_processes
from .families import LossSettings, family_of, num_groups, require_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

# Added to every normaliser by mmdetection (float32 machine epsilon): the recorded values depend on it.
NORMALIZER_EPSILON = 1.1920929e-07
NUM_COUNTS = 4
# A query whose box overlaps an ignored one by this much is not taught that it sees background.
IGNORED_IOU = 0.5

CLASS_TERMS = {
    "softmax": "loss_ce",
    "focal": "loss_ce",
    "iou_aware": "loss_ce",
    "varifocal": "loss_vfl",
    "matchability": "loss_mal",
}


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
    predictions = _Predictions(*args, **kwargs)
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
    predictions = _Predictions(*args, **kwargs)
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
    predictions = _Predictions(*args, **kwargs)
    return None, None, predictions.start_matching(predictions.contrasted)


class _Edges(NamedTuple):
    """
    D-FINE's edge distributions of the first sets: `logits` `[sets, images, queries, 4, bins]`, the boxes they are
    offset from, and the distributions and best class scores of the last layer, which the others learn from.
    """

    logits: Tensor
    references: Tensor
    teacher: Tensor
    teacher_scores: Tensor


class _Sets(NamedTuple):
    """
    Predictions of the same queries by several layers: `logits` `[sets, images, queries, classes]`, `boxes`
    `[sets, images, queries, 4]`, and what transformers appends to the names of every set's terms in `loss_dict`.
    """

    logits: Tensor
    boxes: Tensor
    suffixes: list[str]
    edges: _Edges | None = None


class _Supervised(NamedTuple):
    """Sets and their targets: `classes` of all boxes, who learns which class and which box, and the normalisers."""

    sets: _Sets
    classes: Tensor
    class_matching: Matching
    box_matching: Matching
    num_boxes: int
    num_box_pairs: int
    box_weights: Tensor | None = None
    query_weights: Tensor | None = None


class _Predictions:
    """
    What a detector passes to its loss, in one layout.

    `detections` holds the decoder layers and, after them, the encoder's proposals where the family trains them;
    `denoising` the decoder layers' denoising queries; `tokens` the proposals of every encoder token.
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
        enc_outputs_class: Tensor | None = None,
        enc_outputs_coord: Tensor | None = None,
        enc_topk_logits: Tensor | None = None,
        enc_topk_bboxes: Tensor | None = None,
        denoising_meta_values: dict[str, Any] | None = None,
        predicted_corners: Tensor | None = None,
        initial_reference_points: Tensor | None = None,
        token_logits: Tensor | None = None,
        token_boxes: Tensor | None = None,
        **unused: Any,
    ):
        family = family_of(config)
        self.settings: LossSettings = family.losses(config)
        self.labels = labels
        self.classes = torch.cat([label["class_labels"] for label in labels])
        self.box_weights = _box_weights(labels)
        self.denoising_meta = denoising_meta_values
        split = None if denoising_meta_values is None else denoising_meta_values["dn_num_split"]

        def halves(tensor: Tensor | None, layer_dim: int) -> tuple[Tensor | None, Tensor | None]:
            """Denoising and real queries of a tensor, layers first."""
            if tensor is None:
                return None, None
            tensor = _at_least_float32(tensor.movedim(layer_dim, 0))
            return (None, tensor) if split is None else tensor.split(split, dim=2)

        def as_boxes(tensor: Tensor | None) -> Tensor | None:
            return tensor.clamp(0, 1) if self.settings.clamp_boxes and tensor is not None else tensor

        _, last_logits = halves(logits[None], 0)
        _, last_boxes = halves(as_boxes(pred_boxes)[None], 0)
        self.target_boxes = torch.cat([label["boxes"] for label in labels]).to(last_boxes.dtype)
        parts, suffixes = [(last_logits, last_boxes)], [""]
        edges = self.denoising = None
        if config.auxiliary_loss:
            dn_logits, layer_logits = halves(outputs_class, family.layer_dim)
            dn_boxes, layer_boxes = halves(as_boxes(outputs_coord), family.layer_dim)
            dn_edges, layer_edges = halves(predicted_corners, family.layer_dim)
            dn_references, references = halves(initial_reference_points, family.layer_dim)
            # D-FINE has one more layer of predictions than of edge distributions; transformers pairs them from the
            # first on and leaves out those left over.
            layers = len(layer_logits if layer_edges is None else layer_edges)
            if layers > 1:
                # The last layer is the detector's own output: some decoders give it one more norm than the others.
                parts.insert(0, (layer_logits[: layers - 1], layer_boxes[: layers - 1]))
                suffixes = [self.settings.auxiliary_suffix.format(layer) for layer in range(layers - 1)] + [""]
                edges = _edges(layer_edges, references, layer_logits, layers - 1)
            if split is not None:
                self.denoising = _Sets(
                    dn_logits[:layers],
                    dn_boxes[:layers],
                    [f"_dn_{layer}" for layer in range(layers)],
                    _edges(dn_edges, dn_references, dn_logits, layers),
                )
        self.num_layers = len(suffixes)
        if config.auxiliary_loss and enc_topk_logits is not None:
            parts.append(
                (_at_least_float32(enc_topk_logits)[None], as_boxes(_at_least_float32(enc_topk_bboxes))[None])
            )
            suffixes.append(self.settings.auxiliary_suffix.format(self.num_layers - 1))
        if enc_outputs_class is not None:
            parts.append((_at_least_float32(enc_outputs_class)[None], _at_least_float32(enc_outputs_coord)[None]))
            suffixes.append("_enc")
        self.detections = _Sets(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), suffixes, edges)
        self.contrasted = slice(self.num_layers - 1 if family.contrasts == "last" else 0, self.num_layers)
        self.num_groups = num_groups(config, self.detections.logits.shape[2])
        self.tokens = None
        if token_logits is not None:
            self.tokens = _Sets(_at_least_float32(token_logits)[None], _at_least_float32(token_boxes)[None], ["_enc"])

    def start_matching(self, sets: slice = slice(None)) -> Callable[[], Matching]:
        """
        Hungarian matching of some of the `detections`, by default of all; group by group where there are groups. See
        [`~aligndet_hf.matching.start_matching`].
        """
        groups, images = self.num_groups, len(self.labels)
        finish = self._start_matching(
            *(
                tensor[sets].unflatten(2, (groups, -1)).transpose(1, 2).flatten(1, 2)
                for tensor in (self.detections.logits, self.detections.boxes)
            ),
            [label["class_labels"] for label in self.labels] * groups,
            [label["boxes"] for label in self.labels] * groups,
        )
        if groups == 1:
            return finish
        queries = self.detections.logits.shape[2] // groups

        def ungrouped() -> Matching:
            layer, image, query, target = finish()
            query = query + image // images * queries
            return Matching(layer, image % images, query, target % max(len(self.classes), 1))

        return ungrouped

    def _start_matching(
        self, logits: Tensor, boxes: Tensor, classes: list[Tensor], target_boxes: list[Tensor]
    ) -> Callable[[], Matching]:
        settings = self.settings
        return start_matching(
            logits.detach(),
            boxes.detach(),
            classes,
            target_boxes,
            class_cost=settings.class_cost,
            bbox_cost=settings.bbox_cost,
            giou_cost=settings.giou_cost,
            class_activation=settings.class_activation,
            alpha=settings.match_alpha,
            gamma=settings.match_gamma,
        )

    def _target_rows(self) -> tuple[Tensor, ...]:
        """The rows of every image's boxes among those of the batch."""
        sizes = [len(label["class_labels"]) for label in self.labels]
        return torch.arange(sum(sizes), device=self.classes.device).split(sizes)

    def supervised(self, matching: Matching) -> list[_Supervised]:
        """All sets with their targets; `matching` is that of the `detections`, on the CPU."""
        device, num_boxes, num_sets = self.classes.device, len(self.classes), len(self.detections.logits)
        boxes = num_boxes * self.num_groups
        united = _united(matching, len(self.labels), num_sets) if self.settings.dense_matching else None
        pairs = matching = matching.to(device)
        num_pairs = boxes
        if united is not None:
            pairs, num_pairs = united.to(device), len(united.layer) // num_sets
        groups = [_Supervised(self.detections, self.classes, matching, pairs, boxes, num_pairs)]
        if self.denoising is not None:
            matching, boxes = self._denoising_matching(), num_boxes * self.denoising_meta["dn_num_group"]
            groups.append(_Supervised(self.denoising, self.classes, matching, matching, boxes, boxes))
        if self.tokens is not None:
            # Tokens only tell objects from background, by the score of class 0.
            classes = torch.zeros_like(self.classes)
            labels = [label["class_labels"] * 0 for label in self.labels]
            matching = self._start_matching(*self.tokens[:2], labels, [label["boxes"] for label in self.labels])()
            matching = matching.to(device)
            groups.append(_Supervised(self.tokens, classes, matching, matching, num_boxes, num_boxes))
        if self.box_weights is not None:
            groups = [group._replace(**self._weights(group)) for group in groups]
        return groups

    def _weights(self, group: _Supervised) -> dict[str, Tensor]:
        """
        The weights of the boxes, and those of the queries' class losses `[sets, images, queries]`: a matched query has
        the weight of its box, and an unmatched one that lies on an ignored box has none. It is not background.
        """
        weights = group.sets.logits.new_ones(group.sets.logits.shape[:3])
        for image, label in enumerate(self.labels):
            ignored = label.get("ignored_boxes")
            if ignored is not None and len(ignored):
                found = cxcywh_to_xyxy(group.sets.boxes[:, image].detach().unsqueeze(2))
                iou, _ = iou_and_giou(found, cxcywh_to_xyxy(ignored.to(found.dtype)))
                weights[:, image] = (iou.amax(2) < IGNORED_IOU).to(weights.dtype)
        matching, boxes = group.class_matching, self.box_weights.to(weights.dtype)
        weights[matching.queries] = boxes[matching.target]
        return {"box_weights": boxes, "query_weights": weights}

    def _denoising_matching(self) -> Matching:
        """The boxes that the positive denoising queries were made from; the same in every layer."""
        num_groups, queries = self.denoising_meta["dn_num_group"], self.denoising_meta["dn_positive_idx"]
        image = torch.cat([torch.full_like(query, i) for i, query in enumerate(queries)])
        target = torch.cat([rows.tile(num_groups) for rows in self._target_rows()])
        return _in_every_layer(image, torch.cat(queries), target, len(self.denoising.logits))

    def auxiliary_outputs(self) -> list[dict[str, Tensor]] | None:
        """The sets that transformers returns beside the last decoder layer."""
        outputs = [
            {"logits": logits, "pred_boxes": boxes}
            for logits, boxes, suffix in zip(*self.detections[:3], strict=True)
            if suffix not in ("", "_enc")
        ]
        return outputs or None


def _box_weights(labels: list[dict[str, Tensor]]) -> Tensor | None:
    """The weights of all boxes, or `None` if no label has any, and nothing is to be ignored."""
    if not any("weights" in label or "ignored_boxes" in label for label in labels):
        return None
    return torch.cat([label.get("weights", torch.ones_like(label["boxes"][:, 0])) for label in labels])


def _edges(logits: Tensor | None, references: Tensor | None, class_logits: Tensor, num_sets: int) -> _Edges | None:
    if logits is None:
        return None
    logits = logits.unflatten(-1, (4, -1))
    scores = class_logits[-1].detach().sigmoid().amax(-1)
    return _Edges(logits[:num_sets], references[:num_sets].detach(), logits[-1].detach(), scores)


def _in_every_layer(image: Tensor, query: Tensor, target: Tensor, num_layers: int) -> Matching:
    layer = torch.arange(num_layers, device=query.device).repeat_interleave(len(query))
    return Matching(layer, *(index.repeat(num_layers) for index in (image, query, target)))


def _united(matching: Matching, num_images: int, num_layers: int) -> Matching:
    """
    One matching for all layers out of theirs: every query that some layer matches keeps its most frequent target.

    DEIM's dense matching: a target may have several queries. Ties are broken as in transformers, by the order of an
    unstable sort, so that the losses are equal.
    """
    pairs = torch.stack([matching.query, matching.target], 1)
    images, kept = [], []
    for image in range(num_images):
        distinct, votes = torch.unique(pairs[matching.image == image], dim=0, return_counts=True)
        distinct = distinct[votes.argsort(descending=True)]
        distinct = distinct[distinct[:, 0].argsort(stable=True)]
        is_first = distinct[:, 0].diff(prepend=distinct.new_full((1,), -1)) != 0
        kept.append(distinct[is_first])
        images.append(torch.full_like(kept[-1][:, 0], image))
    return _in_every_layer(torch.cat(images), *torch.cat(kept).unbind(1), num_layers)


def _losses(
    predictions: _Predictions, matching: Matching, normalize_class_loss_by: str = "weights"
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

    class_term = CLASS_TERMS[settings.class_loss]
    weights = {
        class_term: settings.class_weight,
        "loss_bbox": settings.bbox_weight,
        "loss_giou": settings.giou_weight,
        "loss_fgl": settings.fgl_weight,
        "loss_ddf": settings.ddf_weight,
    }
    total, terms = predictions.detections.logits.new_zeros(()), {}
    for group, group_sums, normalizer in zip(groups, sums, normalizers, strict=True):
        (num_boxes, num_pairs, pair_edges, other_edges), class_weights = (
            normalizer[:NUM_COUNTS],
            normalizer[NUM_COUNTS:],
        )
        num_boxes, num_pairs = (count.clamp(min=1) + NORMALIZER_EPSILON for count in (num_boxes, num_pairs))
        by_weights = settings.class_loss == "softmax" and normalize_class_loss_by == "weights"
        values = {
            class_term: group_sums["class"] / (class_weights + NORMALIZER_EPSILON if by_weights else num_boxes),
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


def _sums(settings: LossSettings, group: _Supervised, target_boxes: Tensor) -> dict[str, Tensor]:
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

    matching = group.class_matching
    background = logits.shape[-1] - 1 if settings.class_loss == "softmax" else logits.shape[-1]
    classes = matching.scatter(group.classes, logits.shape[:3], background)
    class_weights = logits.new_zeros(0)
    if settings.class_loss == "softmax":
        sums["class"], class_weights = softmax_class_loss(
            logits, classes, settings.background_weight, group.query_weights
        )
    elif settings.class_loss == "focal":
        sums["class"] = focal_class_loss(logits, classes, settings.alpha, settings.gamma, group.query_weights)
    else:
        own = pairs is matching
        own_iou = iou if own else box_losses(boxes[matching.queries], target_boxes[matching.target])[2]
        quality = logits.new_zeros(logits.shape[:3])
        quality[matching.queries] = own_iou.to(quality.dtype)
        of_query = {"quality": quality, "query_weights": group.query_weights}
        if settings.class_loss == "varifocal":
            sums["class"] = varifocal_class_loss(
                logits, classes, alpha=settings.alpha, gamma=settings.gamma, **of_query
            )
        elif settings.class_loss == "matchability":
            sums["class"] = matchability_class_loss(
                logits, classes, alpha=settings.alpha, gamma=settings.gamma, **of_query
            )
        else:
            sums["class"] = iou_aware_class_loss(logits, classes, alpha=settings.alpha, **of_query)

    if edges is not None:
        num_layers = len(edges.logits)
        first = pairs.layers(0, num_layers, of=num_sets)
        bins = edge_bins(settings.num_bins, settings.bins_up, settings.bins_scale, logits.device)
        weight = iou[: len(first.query)]
        if group.box_weights is not None:
            weight = weight * group.box_weights[first.target]
        fgl = fine_grained_localization_loss(
            edges.logits[first.queries],
            edges.references[first.queries],
            target_boxes[first.target],
            weight,
            bins.to(logits.dtype),
            settings.bins_scale,
        )
        sums["fgl"] = fgl.view(num_layers, -1).sum(1)
        weights = edges.teacher_scores.repeat(num_layers, 1, 1)
        weights[first.queries] = weight.to(weights.dtype)
        is_pair = torch.zeros_like(weights, dtype=torch.bool)
        is_pair[first.queries] = True
        divergence = localization_distillation(edges.logits, edges.teacher, weights)
        sums["ddf"] = torch.stack([divergence * is_pair, divergence * ~is_pair], -1).flatten(1, 2).sum(1)
    matched_edges = 4 * (len(pairs.query) // num_sets)
    counts = [group.num_boxes, group.num_box_pairs, matched_edges, 4 * logits[0, ..., 0].numel() - matched_edges]
    sums["normalizers"] = torch.cat([_copied_to(logits, counts), class_weights])
    return sums


@torch.no_grad()
def _cardinality_error(predictions: _Predictions) -> Tensor:
    """Mean absolute error of the number of objects found in every set, `[sets]`; DETR's diagnostic, not a loss."""
    logits = predictions.detections.logits
    if predictions.settings.class_loss == "softmax":
        is_object = logits.argmax(-1) != logits.shape[-1] - 1
    else:
        is_object = logits.max(-1).values > 0
    sizes = _copied_to(logits, [len(label["class_labels"]) for label in predictions.labels])
    return (is_object.sum(-1) - sizes).abs().mean(-1)


def _copied_to(like: Tensor, numbers: list[int]) -> Tensor:
    """The numbers as a tensor on the device of another; `new_tensor` would wait for the device."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
