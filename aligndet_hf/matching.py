"""One-to-one assignment of decoder queries to boxes (Hungarian matching, Carion et al., ECCV 2020)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import cxcywh_to_xyxy, iou_and_giou

# Stands in for NaN and infinite costs: larger than any real cost, small enough that sums of it stay exact.
INVALID_COST = 1e8
# From this many costs on, a second thread is worth its trouble.
PARALLEL_COSTS = 200_000


class Matching(NamedTuple):
    """
    Matched (layer, image, query, target) quadruples, `M` in all, ordered by layer, image and query.

    Attributes:
        layer (`torch.LongTensor` of shape `[M]`): index of the decoder layer.
        image (`torch.LongTensor` of shape `[M]`): index of the image in the batch.
        query (`torch.LongTensor` of shape `[M]`): index of the query.
        target (`torch.LongTensor` of shape `[M]`): row of the target in the targets of all images, concatenated.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor

    @property
    def queries(self) -> tuple[Tensor, Tensor, Tensor]:
        """The index `(layer, image, query)` into tensors of shape `[layers, images, queries, ...]`."""
        return self.layer, self.image, self.query

    def to(self, device: torch.device) -> "Matching":
        """The same on another device, copied there at once and without a wait."""
        return Matching(*torch.stack(self).to(device, non_blocking=True).unbind())

    def layers(self, start: int, stop: int, of: int) -> "Matching":
        """The matches of layers `start` to `stop` `of` all, counted from 0; all layers have equally many matches."""
        matches = len(self.layer) // of
        part = Matching(*(index[start * matches : stop * matches] for index in self))
        return part._replace(layer=part.layer - start)

    def scatter(self, values: Tensor, shape: tuple[int, int, int], fill_value: float) -> Tensor:
        """
        Writes one value per target to the query it is matched with.

        Args:
            values (`torch.Tensor` of shape `[targets]`): a value for every target of the batch.
            shape (`tuple[int, int, int]`): (layers, images, queries) of the result.
            fill_value (`float`): value of the unmatched queries.

        Returns:
            `torch.Tensor` of the given shape and the dtype of `values`.
        """
        out = values.new_full(shape, fill_value)
        out[self.queries] = values[self.target]
        return out


def match_queries(logits: Tensor, *args: Any, **kwargs: Any) -> Matching:
    """
    Assigns the boxes of every image to queries, for all decoder layers and images of a batch at once.

    Args:
        logits, args, kwargs: see [`start_matching`].

    Returns:
        [`Matching`]: the assignment, on the device of `logits`.

    Raises:
        `ValueError`: if a target box is not finite or has a negative side; the message names image and box.
    """
    return start_matching(logits, *args, **kwargs)().to(logits.device)


@torch.no_grad()
def start_matching(
    logits: Tensor,
    boxes: Tensor,
    class_labels: list[Tensor],
    target_boxes: list[Tensor],
    *,
    class_cost: float = 1.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    class_activation: Literal["softmax", "sigmoid", "focal"] = "softmax",
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Callable[[], Matching]:
    """
    [`match_queries`] in two halves: a GPU computes the costs, and may go on with other work before they are needed.

    The cost of a (query, box) pair is `class_cost * class + bbox_cost * L1 + giou_cost * (-GIoU)`, L1 on normalised
    `cxcywh`. All cost matrices are computed together and leave the device in one copy. A layer with fewer queries
    than boxes leaves boxes unmatched; NaN and infinite costs are matched only when nothing else is left.

    Args:
        logits (`torch.Tensor` of shape `[layers, images, queries, classes]`):
            class scores; with "softmax" the last class is "no object".
        boxes (`torch.Tensor` of shape `[layers, images, queries, 4]`): predicted normalised `cxcywh` boxes.
        class_labels (`list[torch.Tensor]` of shape `[boxes of the image]`): class of every box, one tensor an image.
        target_boxes (`list[torch.Tensor]` of shape `[boxes of the image, 4]`): normalised `cxcywh` boxes.
        class_cost, bbox_cost, giou_cost (`float`, *optional*): weights of the three terms.
        class_activation (`str`, *optional*, defaults to `"softmax"`):
            "softmax" and "sigmoid" take minus the probability of the box's class (DETR), "focal" the difference of
            the focal terms (Deformable DETR).
        alpha, gamma (`float`, *optional*): parameters of the focal terms.

    Returns:
        `Callable`: waits for the costs and returns the [`Matching`], on the CPU. It raises the `ValueError` of
        [`match_queries`].
    """
    num_layers, _, num_queries, _ = logits.shape
    sizes = [len(target) for target in target_boxes]
    if sum(sizes) == 0:
        empty = torch.zeros(0, dtype=torch.long)
        return lambda: Matching(empty, empty, empty, empty)

    dtype = torch.promote_types(boxes.dtype, torch.float32)
    padded_boxes = torch.nn.utils.rnn.pad_sequence(target_boxes, batch_first=True).to(dtype)  # [images, N, 4]
    padded_classes = torch.nn.utils.rnn.pad_sequence(class_labels, batch_first=True)  # [images, N]

    scores = logits.to(dtype)
    if class_activation == "softmax":
        class_term = -scores.softmax(-1)
    elif class_activation == "sigmoid":
        class_term = -scores.sigmoid()
    else:
        prob = scores.sigmoid()
        positive = alpha * (1 - prob) ** gamma * -(prob + 1e-8).log()
        negative = (1 - alpha) * prob**gamma * -(1 - prob + 1e-8).log()
        class_term = positive - negative
    index = padded_classes[None, :, None].expand(num_layers, -1, num_queries, -1)
    predicted, target = boxes.to(dtype).unsqueeze(-2), padded_boxes[None, :, None]
    _, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    l1 = (predicted - target).abs().sum(-1)
    cost = (
        class_cost * class_term.gather(-1, index) + bbox_cost * l1 - giou_cost * giou
    )  # [layers, images, queries, N]

    is_valid = padded_boxes.isfinite().all(-1) & (padded_boxes[..., 2:] >= 0).all(-1)
    cost = cost.masked_fill(~is_valid[None, :, None], torch.nan)

    # Into pinned memory, where a GPU writes while the CPU goes on.
    cost = cost.to("cpu", non_blocking=logits.is_cuda)
    copied = torch.cuda.current_stream(logits.device).record_event() if logits.is_cuda else None

    def finish() -> Matching:
        if copied is not None:
            copied.synchronize()
        return _assign(cost.numpy(), sizes, target_boxes)

    return finish


def _assign(cost: np.ndarray, sizes: list[int], target_boxes: list[Tensor]) -> Matching:
    """Assignment of the least cost `[layers, images, queries, boxes]`; an image has the first `sizes` boxes."""
    if np.isnan(cost).all((0, 2)).any():
        _require_valid(target_boxes)
    cost = np.nan_to_num(cost, nan=INVALID_COST, posinf=INVALID_COST, neginf=INVALID_COST)
    problems = list(np.ndindex(cost.shape[:2]))
    threads = torch.get_num_threads()
    solve = _pool(threads).map if threads > 1 and cost.size >= PARALLEL_COSTS else map  # scipy releases Python's lock
    found = list(solve(lambda at: linear_sum_assignment(cost[at][:, : sizes[at[1]]]), problems))
    layer, image = np.repeat(np.array(problems), [len(query) for query, _ in found], axis=0).T
    query, column = np.concatenate(found, axis=1)
    target = column + np.cumsum([0, *sizes])[image]
    return Matching(*torch.from_numpy(np.stack([layer, image, query, target])).unbind())


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "matching")


def _require_valid(target_boxes: list[Tensor]) -> None:
    """Names the first target box that cannot be matched; finds none where only predictions are NaN."""
    for image, boxes in enumerate(target_boxes):
        for number, (*_, width, height) in enumerate(rows := boxes.tolist()):
            if not np.isfinite(rows[number]).all() or width < 0 or height < 0:
                raise ValueError(
                    f"box {number} of image {image} of the batch is {rows[number]}: expected finite normalised "
                    "cxcywh numbers and no negative side"
                )
