"""AlignDet: pre-training a whole detector on unlabelled images (Li et al., ICCV 2023, arXiv 2307.11077)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..detectors.backbones import (
    check_backbone,
    eval_frozen,
    get_backbone,
    normalize_in_one_pass,
    set_backbone_trainable,
)
from ..detectors.build import open_detector, require_config_fields, save_image_processor
from ..detectors.criterion import NORMALIZER_EPSILON, use_no_loss, use_pretraining_loss
from ..detectors.families import Family, ObjectRows, backbone_path, family_of
from ..losses import best_box_diagnostics, contrastive_diagnostics, count_ids, object_contrastive_loss
from ..processes import mean_over_processes, rows_of_other_processes
from .configuration_aligndet import AlignDetConfig
from .momentum_model import MomentumModel


@dataclass
class AlignDetOutput(ModelOutput):
    """
    Output of [`AlignDetForPreTraining`].

    Args:
        loss (`torch.Tensor` of shape `()`): detection loss plus weighted contrastive loss.
        loss_dict (`dict[str, torch.Tensor]`): terms of the detection loss, and `loss_contrastive`.
        metrics (`dict[str, torch.Tensor]`): diagnostics of the last decoder layer, detached: what
            [`~aligndet_hf.losses.contrastive_diagnostics`] measures, and `matched_proposals`, the share of proposals
            that have a query in the online view.
        logits (`torch.Tensor` of shape `[images, queries, classes]`): class scores of the online detector, with
            denoising queries first where the family has them.
        pred_boxes (`torch.Tensor` of shape `[images, queries, 4]`): normalised `cxcywh` boxes of the online detector.
        hidden_states (`tuple[torch.Tensor]`, only with `output_hidden_states=True`): for every decoder layer with
            heads, `[images, queries, width]`: what the online detector's class heads see, without denoising queries.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class SharedBackbone(nn.Module):
    """Calls a module that another module owns, and so adds no parameters, buffers or checkpoint keys of its own."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        # Past nn.Module's registration, in a tuple: the owner must not become a child of two parents.
        object.__setattr__(self, "_owner", (owner,))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner[0](*args, **kwargs)


def _projector(input_dim: int, output_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(input_dim, input_dim), nn.ReLU(), nn.Linear(input_dim, output_dim))


class AlignDetForPreTraining(MomentumModel):
    """
    Two detectors see two views of the same images; the online one learns boxes, classes and query embeddings.

    The online detector trains with its family's own detection loss on the proposals. Besides, its queries matched to
    a proposal are drawn to the momentum detector's queries of the same proposal in the other view, and pushed from
    all others, over all decoder layers. The momentum detector is an exponential moving average: call
    [`~AlignDetForPreTraining.update_momentum_detector`] after every optimizer step.

    The momentum detector runs in evaluation mode, without dropout and denoising queries; the official code leaves it
    in training mode.

    Args:
        config ([`AlignDetConfig`]): the configuration. The weights are random; see
            [`~AlignDetForPreTraining.from_detector`].

    Example:

    ```python
    >>> import torch
    >>> from transformers import RTDetrConfig, RTDetrForObjectDetection
    >>> from aligndet_hf import AlignDetForPreTraining

    >>> detector = RTDetrForObjectDetection(RTDetrConfig(decoder_layers=2, num_queries=30, num_labels=1))
    >>> model = AlignDetForPreTraining.from_detector(detector)
    >>> views = {name: torch.rand(1, 3, 64, 64) for name in ("pixel_values", "momentum_pixel_values")}
    >>> proposals = {
    ...     "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]]),
    ...     "class_labels": torch.tensor([0]),
    ...     "proposal_ids": torch.tensor([0]),
    ... }
    >>> outputs = model.train()(**views, labels=[proposals], momentum_labels=[proposals])
    >>> outputs.loss.backward()
    >>> model.update_momentum_detector(0.996)

    ```
    """

    config_class = AlignDetConfig
    supports_gradient_checkpointing = True
    momentum_networks = {"momentum_detector": "online_detector", "momentum_projector": "projector"}
    product = "detector"
    next_stage = "aligndet finetune --detector"

    def __init__(self, config: AlignDetConfig):
        super().__init__(config)
        family = family_of(config.detector_config)
        width, slots = family.width(config.detector_config), family.slots(config.detector_config)
        self.online_detector = AutoModelForObjectDetection.from_config(config.detector_config)
        check_backbone(self.online_detector)
        self.momentum_detector = AutoModelForObjectDetection.from_config(copy.deepcopy(config.detector_config))
        self.projector = _projector(width, config.projection_dim * slots)
        self.momentum_projector = _projector(width, config.projection_dim * slots)
        use_pretraining_loss(
            self.online_detector,
            classes=config.detection_loss == "all",
            normalize_class_loss_by=config.normalize_class_loss_by,
        )
        use_no_loss(self.momentum_detector)
        path = backbone_path(self.online_detector)
        if config.freeze_backbone and path is not None:
            self.momentum_detector.set_submodule(path, SharedBackbone(self.backbone))
        normalize_in_one_pass(self)
        self.post_init()
        self._update_momentum(0.0)
        self._freeze()

    @classmethod
    def from_detector(cls, detector: PreTrainedModel | str | Path, **config: Any) -> AlignDetForPreTraining:
        """
        Wraps a detector for pre-training; the momentum detector starts as its copy.

        Args:
            detector (`PreTrainedModel`, `str` or `Path`):
                a detector of a supported family, or what [`~aligndet_hf.detectors.build.find_detector`] takes.
            config: fields of [`AlignDetConfig`].

        Raises:
            `ValueError`: if the detector's family is not supported, or its modules differ from its config's, as
                after adding adapters.
        """
        if not isinstance(detector, PreTrainedModel):
            detector = open_detector(detector, is_whole=False)
        require_config_fields(AlignDetConfig(), config)
        detector_config = copy.deepcopy(detector.config)
        detector_config._name_or_path = ""  # inside another config it would be saved
        model = cls(AlignDetConfig(detector_config=detector_config, **config))
        tensors = detector.state_dict()
        if others := sorted(tensors.keys() ^ model.online_detector.state_dict().keys()):
            raise ValueError(
                f"the detector has other modules than its config makes, such as {others[0]}: merge or remove adapters "
                "before pre-training"
            )
        model.online_detector.load_state_dict(tensors)
        model.update_momentum_detector(0.0)
        return model.train(detector.training)

    @property
    def backbone(self) -> nn.Module:
        """The image network of the online detector; the momentum detector's too, if it is frozen."""
        return get_backbone(self.online_detector)

    def _freeze(self) -> None:
        super()._freeze()
        # Always set, never trusted: transformers freezes backbones by patterns that miss.
        set_backbone_trainable(
            self.online_detector, not self.config.freeze_backbone, self.config.trainable_backbone_stages
        )

    def train(self, mode: bool = True) -> AlignDetForPreTraining:
        """Sets training mode, except where nothing is trained: momentum networks, frozen parts of the backbone."""
        super().train(mode)
        self.momentum_detector.eval()
        self.momentum_projector.eval()
        eval_frozen(self.backbone)
        return self

    def networks(self) -> list[nn.Module]:
        """The two detectors without their heads, whose losses no compiler takes."""
        return [self.online_detector.base_model, self.momentum_detector.base_model]

    def update_momentum(self, momentum: float) -> None:
        """The same as [`~AlignDetForPreTraining.update_momentum_detector`]."""
        self.update_momentum_detector(momentum)

    @torch.no_grad()
    def update_momentum_detector(self, momentum: float) -> None:
        """
        Moves the momentum networks towards the online ones; to be called after every optimizer step.

        Args:
            momentum (`float`): share of the old values that stays, see
                [`~aligndet_hf.momentum.cosine_momentum`]; 0 copies.

        Raises:
            `ValueError`: if modules of an online network were wrapped or replaced, as by adapters, and would not reach
                their momentum copies.
        """
        self._update_momentum(momentum, copied=family_of(self.config.detector_config).query_embeddings)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        momentum_pixel_values: Tensor | None = None,
        momentum_pixel_mask: Tensor | None = None,
        momentum_labels: list[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> AlignDetOutput:
        """
        One step's losses, or without labels the predictions of the online detector.

        Args:
            pixel_values (`torch.FloatTensor` of shape `[images, 3, height, width]`): normalised images, first view.
            pixel_mask (`torch.LongTensor` of shape `[images, height, width]`, *optional*): 1 on the image, 0 on
                padding.
            labels (`list[dict]`, *optional*): per image `boxes`, float `[n, 4]`, `cxcywh` normalised to the image
                without padding; `class_labels`, int64 `[n]`; and `proposal_ids`, int64 `[n]`, non-negative and
                unique in the batch.
            momentum_pixel_values, momentum_pixel_mask, momentum_labels (*optional*): the same of the second view. A
                proposal has the same id in both; either view may lack it.
            output_hidden_states (`bool`, *optional*, defaults to the config's): whether to return `hidden_states`.
            kwargs: `return_dict`, which the config has as well: a tuple instead of the output if false; and further
                arguments for both detectors.

        Raises:
            `ValueError`: if there are labels, but no second view with its own, or labels that are not as said above.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        if labels is None:
            online = self.online_detector(pixel_values=pixel_values, pixel_mask=pixel_mask, **kwargs)
            hidden_states = None
            if output_hidden_states:
                rows = self._family.object_rows(self.online_detector, online, None)
                hidden_states = self._by_layer(rows, len(pixel_values))
            return AlignDetOutput(logits=online.logits, pred_boxes=online.pred_boxes, hidden_states=hidden_states)
        if momentum_pixel_values is None or momentum_labels is None:
            raise ValueError("pre-training needs two views: momentum_pixel_values and momentum_labels are missing")

        _require_labels(labels, len(pixel_values), "labels")
        _require_labels(momentum_labels, len(momentum_pixel_values), "momentum_labels")

        # The momentum detector comes first: its matching is done when the one wait for the other's is over.
        with torch.no_grad():
            momentum = self.momentum_detector(
                pixel_values=momentum_pixel_values, pixel_mask=momentum_pixel_mask, labels=momentum_labels, **kwargs
            )
        online = self.online_detector(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels, **kwargs)
        rows = self._family.object_rows(self.online_detector, online, labels)
        online_embeddings = self._project(self.projector, rows)
        with torch.no_grad():
            momentum_rows = self._family.object_rows(self.momentum_detector, momentum, momentum_labels)
            momentum_embeddings = self._project(self.momentum_projector, momentum_rows)

        assert rows.ids is not None and momentum_rows.ids is not None  # since there are labels
        loss_contrastive = object_contrastive_loss(
            online_embeddings,
            momentum_embeddings,
            rows.ids,
            momentum_rows.ids,
            self.config.contrastive_temperature,
            **(
                _from_all_processes(online_embeddings, momentum_embeddings, rows.ids)
                if self.config.gather_negatives
                else {}
            ),
            **({} if self._family.own_loss else _known_counts(rows, labels)),
        )
        last, momentum_last = rows.last, momentum_rows.last
        metrics = contrastive_diagnostics(
            online_embeddings[last].detach(),
            momentum_embeddings[momentum_last],
            rows.ids[last],
            momentum_rows.ids[momentum_last],
        )
        num_proposals = sum(len(label["proposal_ids"]) for label in labels)
        metrics["matched_proposals"] = count_ids(rows.ids[last]) / max(num_proposals, 1)
        if momentum.pred_boxes is not None and momentum.pred_boxes.shape[1]:
            # The momentum detector's, which has no denoising queries among its own.
            logits = momentum.logits.float()
            is_softmax = logits.shape[-1] > self.config.detector_config.num_labels  # with a class for "no object"
            scores = logits.softmax(-1)[..., :-1] if is_softmax else logits
            metrics |= best_box_diagnostics(scores.amax(-1), momentum.pred_boxes)
        detection = 0.0 if self.config.detection_loss == "none" else 1.0
        return AlignDetOutput(
            # Even without weight it keeps the gradients of all heads, which processes that train together wait for.
            loss=detection * online.loss + self.config.contrastive_loss_coefficient * loss_contrastive,
            loss_dict={**online.loss_dict, "loss_contrastive": loss_contrastive},
            metrics=metrics,
            logits=online.logits,
            pred_boxes=online.pred_boxes,
            hidden_states=self._by_layer(rows, len(labels)) if output_hidden_states else None,
        )

    @property
    def _family(self) -> Family:
        return family_of(self.config.detector_config)

    def _project(self, projector: nn.Module, rows: ObjectRows) -> Tensor:
        """Embeddings of rows, `[R, projection_dim]`; each slot has its own."""
        embeddings, slots = projector(rows.features), self._family.slots(self.config.detector_config)
        if slots == 1:
            return embeddings
        embeddings = embeddings.unflatten(1, (slots, -1))
        return embeddings[torch.arange(len(embeddings), device=embeddings.device), rows.slots]

    def _by_layer(self, rows: ObjectRows, images: int) -> tuple[Tensor, ...]:
        """The features of every layer, `[images, queries, width]`, or of sampled rows, `[R, width]`."""
        if self._family.own_loss and rows.ids is not None:
            return (rows.features,)
        layers = rows.features.split(len(rows.features[rows.last]))
        return tuple(layer.unflatten(0, (images, -1)) for layer in layers)

    def export(self, folder: Path, image_processor: BaseImageProcessor) -> None:
        """Saves the plain detector with its image processor to `folder/detector`."""
        self.export_detector(folder / self.product, image_processor)

    def export_detector(self, path: str | Path, image_processor: Any | None = None) -> None:
        """
        Saves the online detector as a plain transformers checkpoint, which needs nothing of this package.

        Args:
            path (`str` or `Path`): the folder to write.
            image_processor (*optional*): the image processor to save beside it, so that `pipeline` and
                `AutoImageProcessor` work on the folder.
        """
        self.online_detector.save_pretrained(path)
        if image_processor is not None:
            save_image_processor(image_processor, path)


def _require_labels(labels: list[dict[str, Tensor]], images: int, name: str) -> None:
    """Refuses labels of other images, or without what they need, where a detector would fail deep inside."""
    if isinstance(labels, dict) or len(labels) != images:
        got = "one dict" if isinstance(labels, dict) else len(labels)
        raise ValueError(f"{name} must be a list with a dict for each of the {images} images, got {got}")
    needed = ("boxes", "class_labels", "proposal_ids")
    for number, label in enumerate(labels):
        if missing := [key for key in needed if key not in label]:
            raise ValueError(f"{name}[{number}] must have {', '.join(needed)}, {missing[0]} is missing")
        if len({len(label[key]) for key in needed}) > 1:
            counts = ", ".join(f"{len(label[key])} {key}" for key in needed)
            raise ValueError(f"{name}[{number}] must have as many of each, got {counts}")


def _from_all_processes(online_rows: Tensor, momentum_rows: Tensor, online_ids: Tensor) -> dict[str, Tensor]:
    """
    What makes the contrastive loss count the images of all processes.

    Other processes have other images, so that all of their rows are negatives. As gradients are averaged over the
    processes, each divides its own sum by the mean of their numbers of ids.
    """
    return {
        "negatives": rows_of_other_processes(torch.cat([online_rows, momentum_rows])),
        "num_ids": mean_over_processes(count_ids(online_ids.flatten())).clamp(min=NORMALIZER_EPSILON),
    }


def _known_counts(rows: ObjectRows, labels: list[dict[str, Tensor]]) -> dict[str, int]:
    """What a GPU need not be asked for: in every layer a proposal has one query, if there are enough."""
    per_layer = len(rows.features[rows.last])
    layers, queries = len(rows.features) // per_layer, per_layer // len(labels)
    matched = sum(min(len(label["proposal_ids"]), queries) for label in labels)
    return {"num_anchors": layers * matched, "max_rows_per_id": 2 * layers}
