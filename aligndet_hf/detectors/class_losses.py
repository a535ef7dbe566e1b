"""The table of class losses: what tells one from another when a detector is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..losses import (
    focal_class_loss,
    iou_aware_class_loss,
    matchability_class_loss,
    softmax_class_loss,
    varifocal_class_loss,
)


class ClassLoss(NamedTuple):
    """
    A row of [`CLASS_LOSSES`].

    Attributes:
        function (`Callable`): Of [`~aligndet_hf.losses`]: takes logits, classes and `query_weights`.
        settings (`tuple[str, ...]`): The fields of [`~aligndet_hf.detectors.families.LossSettings`] that it takes too.
        term (`str`): The name of its value among the terms of the loss.
        has_background (`bool`): Whether the last class is "no object". The function then returns the sum of the
            weights as well.
        needs_iou (`bool`): Whether it takes as `quality` the IoU that each query's box has with its target.
        has_prior (`bool`): Whether class heads start from a small probability of every class.
    """

    function: Callable[..., Any]
    settings: tuple[str, ...]
    term: str = "loss_ce"
    has_background: bool = False
    needs_iou: bool = False
    has_prior: bool = False


CLASS_LOSSES = {
    "softmax": ClassLoss(softmax_class_loss, ("background_weight",), has_background=True),
    "focal": ClassLoss(focal_class_loss, ("alpha", "gamma"), has_prior=True),
    "varifocal": ClassLoss(varifocal_class_loss, ("alpha", "gamma"), "loss_vfl", needs_iou=True),
    "matchability": ClassLoss(matchability_class_loss, ("alpha", "gamma"), "loss_mal", needs_iou=True),
    "iou_aware": ClassLoss(iou_aware_class_loss, ("alpha",), needs_iou=True, has_prior=True),
}
