"""Losses of matched boxes, and of the edge distributions that D-FINE predicts boxes by: tensors in, tensors out."""

import torch
from torch import Tensor

from .boxes import cxcywh_to_xyxy, iou_and_giou

TEMPERATURE = 5.0  # softness of the distributions that D-FINE distils


def box_losses(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    L1 and GIoU losses of matched boxes, one value a pair.

    Args:
        boxes (`torch.Tensor` of shape `[M, 4]`): predicted normalised `cxcywh` boxes.
        target_boxes (`torch.Tensor` of shape `[M, 4]`): their targets in the same format.

    Returns:
        `tuple` of three `torch.Tensor` of shape `[M]`: L1 distance (sum over the four numbers), `1 - GIoU`, and the
        detached IoU.
    """
    iou, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return (boxes - target_boxes).abs().sum(-1), 1 - giou, iou.detach()


def edge_bins(num_bins: int, up: float, scale: float, device: torch.device | None = None) -> Tensor:
    """
    The offsets that the bins of D-FINE's edge distributions stand for: dense around zero, sparse at the ends.

    Args:
        num_bins (`int`): number of intervals, even; there is one value more.
        up (`float`): reach of the second outermost bin; the outermost reach twice as far.
        scale (`float`): curvature; larger is flatter around zero.
        device (`torch.device`, *optional*): where to put it.

    Returns:
        `torch.Tensor` of shape `[num_bins + 1]`: ascending offsets (D-FINE, Peng et al., ICLR 2025).
    """
    reach = abs(up) * abs(scale)
    steps = (reach + 1) ** (2 / (num_bins - 2) * torch.arange(1, num_bins // 2, device=device)) - 1
    ends = torch.full((1,), 2 * reach, device=device)  # which waits for no GPU, unlike a copy of a list
    return torch.cat([-ends, -steps.flip(0), torch.zeros(1, device=device), steps, ends])


def fine_grained_localization_loss(
    edge_logits: Tensor, reference_boxes: Tensor, target_boxes: Tensor, iou: Tensor, bins: Tensor, scale: float
) -> Tensor:
    """
    Cross-entropy between edge distributions and the bins on either side of the true edge, one value a pair (FGL).

    Args:
        edge_logits (`torch.Tensor` of shape `[M, 4, bins]`): distributions of left, top, right and bottom edge.
        reference_boxes (`torch.Tensor` of shape `[M, 4]`): normalised `cxcywh` boxes that the edges are offset from.
        target_boxes (`torch.Tensor` of shape `[M, 4]`): true boxes in the same format.
        iou (`torch.Tensor` of shape `[M]`): detached IoU of prediction and target, the weight of the pair.
        bins (`torch.Tensor` of shape `[bins]`): see [`edge_bins`].
        scale (`float`): the `scale` they were made with.

    Returns:
        `torch.Tensor` of shape `[M]`: sum over the four edges (D-FINE, Peng et al., ICLR 2025).
    """
    scale = abs(scale)
    corners = cxcywh_to_xyxy(target_boxes)
    center, size = reference_boxes[:, :2], reference_boxes[:, 2:] / scale + 1e-16
    distance = torch.cat([(center - corners[:, :2]) / size, (corners[:, 2:] - center) / size], 1) - 0.5 * scale
    distance = distance.clamp(bins[0], bins[-1]).contiguous()
    left = (torch.searchsorted(bins, distance, right=True) - 1).clamp(max=len(bins) - 2)
    right_share = (distance - bins[left]) / (bins[left + 1] - bins[left])
    log_prob = edge_logits.log_softmax(-1)
    at_left, at_right = (log_prob.gather(-1, (left + i)[..., None]).squeeze(-1) for i in (0, 1))
    return -((1 - right_share) * at_left + right_share * at_right).sum(1) * iou


def localization_distillation(edge_logits: Tensor, teacher_edge_logits: Tensor, weight: Tensor) -> Tensor:
    """
    How far the edge distributions of the layers are from the last layer's, one value a query (DDF).

    Args:
        edge_logits (`torch.Tensor` of shape `[sets, images, queries, 4, bins]`): distributions of the layers.
        teacher_edge_logits (`torch.Tensor` of shape `[images, queries, 4, bins]`): the last layer's; no
            gradient flows into them.
        weight (`torch.Tensor` of shape `[sets, images, queries]`): detached weight of a query.

    Returns:
        `torch.Tensor` of shape `[sets, images, queries]`: weighted Kullback-Leibler divergence times the squared
        temperature, summed over the four edges (D-FINE, Peng et al., ICLR 2025).
    """
    student = (edge_logits / TEMPERATURE).log_softmax(-1)
    teacher = (teacher_edge_logits.detach() / TEMPERATURE).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum((-2, -1))
    return weight * TEMPERATURE**2 * divergence
