"""Box arithmetic on tensors. Every function names its box format; nothing here knows images, models or data sets.

Formats: `xywh` is the COCO format (left, top, width, height), `xyxy` two corners, `cxcywh` centre and size.
"""

import torch
from torch import Tensor

# Lower bound of areas in divisions: keeps empty boxes from producing NaN, far below any area that matters.
EPSILON = 1e-12


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Converts `cxcywh` boxes `[..., 4]` to `xyxy` boxes `[..., 4]`, in the same unit."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Converts `xyxy` boxes `[..., 4]` to `cxcywh` boxes `[..., 4]`, in the same unit."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def iou_and_giou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """
    IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of boxes paired by broadcasting.

    Degenerate boxes are valid input: areas are bounded from below instead of raising, so a diverging model is seen
    in its loss and not as a crash inside a helper.

    Args:
        boxes1 (`torch.Tensor` of shape `[..., 4]`): `xyxy` boxes in any unit.
        boxes2 (`torch.Tensor` of shape `[..., 4]`): `xyxy` boxes in the same unit; the leading dimensions broadcast.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: IoU in [0, 1] and GIoU in [-1, 1], of the broadcast shape without the
        last dimension.
    """
    size1 = (boxes1[..., 2:] - boxes1[..., :2]).clamp(min=0)
    size2 = (boxes2[..., 2:] - boxes2[..., :2]).clamp(min=0)
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    overlap = overlap.clamp(min=0)
    hull = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])
    intersection = overlap[..., 0] * overlap[..., 1]
    union = (size1[..., 0] * size1[..., 1] + size2[..., 0] * size2[..., 1] - intersection).clamp(min=EPSILON)
    enclosing = (hull[..., 0] * hull[..., 1]).clamp(min=EPSILON)
    iou = intersection / union
    return iou, iou - (enclosing - union) / enclosing
