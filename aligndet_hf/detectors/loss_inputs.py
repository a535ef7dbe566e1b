"""What a detector passes to its loss: the predictions of all layers in one layout, and the targets of each set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..boxes import cxcywh_to_xyxy, iou_and_giou
from ..matching import Matching, start_matching
from .families import LossSettings, family_of, num_groups

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A query whose box overlaps an ignored one by this much is not taught that it sees background.
IGNORED_IOU = 0.5


class Edges(NamedTuple):
    """
    D-FINE's edge distributions of the first sets: `logits` `[sets, images, queries, 4, bins]`, the boxes they are
    offset from, and the distributions and best class scores of the last layer, which the others learn from.
    """

    logits: Tensor
    references: Tensor
    teacher: Tensor
    teacher_scores: Tensor


class Sets(NamedTuple):
    """
    Predictions of the same queries by several layers: `logits` `[sets, images, queries, classes]`, `boxes`
    `[sets, images, queries, 4]`, and what transformers appends to the names of every set's terms in `loss_dict`.
    """

    logits: Tensor
    boxes: Tensor
    suffixes: list[str]
    edges: Edges | None = None


class Supervised(NamedTuple):
    """Sets and their targets: `classes` of all boxes, who learns which class and which box, and the normalisers."""

    sets: Sets
    classes: Tensor
    class_matching: Matching
    box_matching: Matching
    num_boxes: int
    num_box_pairs: int
    box_weights: Tensor | None = None
    query_weights: Tensor | None = None


@dataclass
class LossInputs:
    """What a detector passes to its `loss_function`, by the names of transformers; and [`Predictions`]' `tokens`."""

    logits: Tensor
    labels: list[dict[str, Tensor]]
    device: torch.device
    pred_boxes: Tensor
    config: PreTrainedConfig
    outputs_class: Tensor | None = None
    outputs_coord: Tensor | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord: Tensor | None = None
    enc_topk_logits: Tensor | None = None
    enc_topk_bboxes: Tensor | None = None
    denoising_meta_values: dict[str, Any] | None = None
    predicted_corners: Tensor | None = None
    initial_reference_points: Tensor | None = None
    token_logits: Tensor | None = None
    token_boxes: Tensor | None = None

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> LossInputs:
        """The arguments of a loss function; those that no loss here needs are left out."""
        needed = {entry.name for entry in fields(cls)}
        return cls(*args, **{name: value for name, value in kwargs.items() if name in needed})


class Predictions:
    """
    What a detector passes to its loss, in one layout.

    `detections` holds the decoder layers and, after them, the encoder's proposals where the family trains them;
    `denoising` the decoder layers' denoising queries; `tokens` the proposals of every encoder token.
    """

    def __init__(self, given: LossInputs):
        family = family_of(given.config)
        self.settings: LossSettings = family.losses(given.config)
        self.labels = given.labels
        self.classes = torch.cat([label["class_labels"] for label in self.labels])
        self.box_weights = _box_weights(self.labels)
        self.denoising_meta = given.denoising_meta_values
        decoder, self.denoising = self._of_decoder(given, family.layer_dim)
        self.num_layers = sum(len(part.suffixes) for part in decoder)
        self.detections = _joined([*decoder, *self._of_encoder(given)])
        self.tokens = None if given.token_logits is None else _one_set(given.token_logits, given.token_boxes, "_enc")
        self.target_boxes = torch.cat([label["boxes"] for label in self.labels]).to(decoder[-1].boxes.dtype)
        self.contrasted = slice(self.num_layers - 1 if family.contrasts == "last" else 0, self.num_layers)
        self.num_groups = num_groups(given.config, self.detections.logits.shape[2])

    def _of_decoder(self, given: LossInputs, layer_dim: int) -> tuple[list[Sets], Sets | None]:
        """The predictions of all decoder layers, in parts, and for denoising queries if there are any."""
        boxes, split = self._cut(given.pred_boxes), self.denoising_meta and self.denoising_meta["dn_num_split"]
        # The last layer is the detector's own output: some decoders give it one more norm than the others.
        last = Sets(*(_kinds(tensor[None], 0, split)[1] for tensor in (given.logits, boxes)), [""])
        if not given.config.auxiliary_loss:
            return [last], None
        tensors = (given.outputs_class, self._cut(given.outputs_coord))
        tensors += (given.predicted_corners, given.initial_reference_points)
        noised, real = (_Layers(*kind) for kind in zip(*(_kinds(t, layer_dim, split) for t in tensors), strict=True))
        # D-FINE has one more layer of predictions than of edge distributions; transformers pairs them from the first
        # on, and leaves out the last predictions.
        layers = len(real.logits if real.edges is None else real.edges)
        inner = [self.settings.auxiliary_suffix.format(layer) for layer in range(layers - 1)]
        parts = [real.first(inner), last] if inner else [last]
        return parts, None if split is None else noised.first([f"_dn_{layer}" for layer in range(layers)])

    def _of_encoder(self, given: LossInputs) -> list[Sets]:
        """The proposals of the encoder that the family trains."""
        parts = []
        if given.config.auxiliary_loss and given.enc_topk_logits is not None:
            suffix = self.settings.auxiliary_suffix.format(self.num_layers - 1)
            parts.append(_one_set(given.enc_topk_logits, self._cut(given.enc_topk_bboxes), suffix))
        if given.enc_outputs_class is not None:
            parts.append(_one_set(given.enc_outputs_class, given.enc_outputs_coord, "_enc"))
        return parts

    def _cut(self, boxes: Tensor | None) -> Tensor | None:
        return boxes.clamp(0, 1) if self.settings.clamp_boxes and boxes is not None else boxes

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
        """The rows of every image's boxes among the boxes of the batch."""
        sizes = [len(label["class_labels"]) for label in self.labels]
        return torch.arange(sum(sizes), device=self.classes.device).split(sizes)

    def supervised(self, matching: Matching) -> list[Supervised]:
        """All sets with their targets; `matching` is for the `detections`, on the CPU."""
        device, num_boxes, num_sets = self.classes.device, len(self.classes), len(self.detections.logits)
        boxes = num_boxes * self.num_groups
        united = _united(matching, len(self.labels), num_sets) if self.settings.dense_matching else None
        pairs = matching = matching.to(device)
        num_pairs = boxes
        if united is not None:
            pairs, num_pairs = united.to(device), len(united.layer) // num_sets
        groups = [Supervised(self.detections, self.classes, matching, pairs, boxes, num_pairs)]
        if self.denoising is not None:
            matching, boxes = self._denoising_matching(), num_boxes * self.denoising_meta["dn_num_group"]
            groups.append(Supervised(self.denoising, self.classes, matching, matching, boxes, boxes))
        if self.tokens is not None:
            # Tokens only tell objects from background, by the score of class 0.
            classes = torch.zeros_like(self.classes)
            labels = [label["class_labels"] * 0 for label in self.labels]
            matching = self._start_matching(*self.tokens[:2], labels, [label["boxes"] for label in self.labels])()
            matching = matching.to(device)
            groups.append(Supervised(self.tokens, classes, matching, matching, num_boxes, num_boxes))
        if self.box_weights is not None:
            groups = [group._replace(**self._weights(group)) for group in groups]
        return groups

    def _weights(self, group: Supervised) -> dict[str, Tensor]:
        """
        The weights of the boxes, and of the queries' class losses `[sets, images, queries]`: a matched query has
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


class _Layers(NamedTuple):
    """What all decoder layers predict for queries of one kind, each `[layers, images, queries, ...]`."""

    logits: Tensor
    boxes: Tensor
    edges: Tensor | None
    references: Tensor | None

    def first(self, suffixes: list[str]) -> Sets:
        """The first layers, one for each suffix."""
        count, edges = len(suffixes), None
        if self.edges is not None:
            logits = self.edges.unflatten(-1, (4, -1))
            scores = self.logits[-1].detach().sigmoid().amax(-1)
            edges = Edges(logits[:count], self.references[:count].detach(), logits[-1].detach(), scores)
        return Sets(self.logits[:count], self.boxes[:count], suffixes, edges)


def _kinds(tensor: Tensor | None, layer_dim: int, split: list[int] | None) -> tuple[Tensor | None, Tensor | None]:
    """Denoising and real queries of a tensor, layers first; `split` is how many there are of either."""
    if tensor is None:
        return None, None
    tensor = _at_least_float32(tensor.movedim(layer_dim, 0))
    return (None, tensor) if split is None else tensor.split(split, dim=2)


def _one_set(logits: Tensor, boxes: Tensor, suffix: str) -> Sets:
    return Sets(_at_least_float32(logits)[None], _at_least_float32(boxes)[None], [suffix])


def _joined(parts: list[Sets]) -> Sets:
    """Sets one after the other, with the edges of the first."""
    logits, boxes = (torch.cat(tensors) for tensors in ([p.logits for p in parts], [p.boxes for p in parts]))
    return Sets(logits, boxes, [suffix for part in parts for suffix in part.suffixes], parts[0].edges)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
