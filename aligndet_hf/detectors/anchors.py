"""Whether a dense detector has enough anchors on the objects to learn from."""

from collections import OrderedDict
from collections.abc import Iterable
from statistics import fmean

import torch
from torch.func import functional_call
from torchvision.models.detection.image_list import ImageList
from transformers import PreTrainedModel

from ..convnets.modeling_torchvision import MULTIPLE, DenseDetector, FcosForObjectDetection

# For each anchor shape in an image. A small RetinaNet with 0.4 of them hardly learnt, with 4 it did: docs/results.md.
ENOUGH_ANCHORS = 2


def anchors_on_objects(detector: DenseDetector, items: Iterable[dict]) -> float:
    """
    How many anchors of each shape, or points of FCOS, stand for an object in an image: the mean over the images.

    Only these teach the classes and boxes of their shape. A detector that keeps the official thresholds has 16 to 19
    on COCO.

    Args:
        detector (`DenseDetector`): A RetinaNet or FCOS.
        items (`Iterable[dict]`): Training images: `image` (uint8 [3, h, w]) and `labels`, whose `boxes` are cxcywh in
            0..1 (float32 [n, 4]).
    """
    backbone = detector.detector.backbone
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    counts, shapes = [], {}
    for item in items:
        height, width = item["image"].shape[-2:]
        padded = tuple(side + -side % MULTIPLE for side in (height, width))
        if padded not in shapes:
            # On the meta device only the sizes of the feature maps are found, not the maps.
            maps = functional_call(backbone, on_meta, torch.empty(1, 3, *padded, device="meta"))
            shapes[padded] = {name: level.shape[-2:] for name, level in maps.items()}
        images = ImageList(torch.empty(1, 3, *padded), [(height, width)])
        maps = OrderedDict((name, torch.empty(1, 1, *size)) for name, size in shapes[padded].items())
        anchors, _ = detector._anchors(images, maps)
        (target,) = detector._targets([item["labels"]], images.image_sizes)
        counts.append((detector.match(anchors, target["pixels"]) >= 0).sum().item() / detector.config.num_anchors)
    return fmean(counts)


def anchor_note(detector: PreTrainedModel, items: Iterable[dict]) -> str | None:
    """
    A line on a detector that has too few anchors on the objects; `None` if it has enough, or is no dense detector.

    Args:
        detector (`PreTrainedModel`): Any supported detector.
        items (`Iterable[dict]`): See [`anchors_on_objects`].
    """
    if not isinstance(detector, DenseDetector) or (found := anchors_on_objects(detector, items)) >= ENOUGH_ANCHORS:
        return None
    what, remedy, fields = "points", "Finer feature maps help", '"strides": [4, 8, 16, 32]'
    if not isinstance(detector, FcosForObjectDetection):
        what = f"anchors of each of {detector.config.num_anchors} shapes"
        remedy = "Fewer shapes and finer feature maps help"
        fields += ', "anchor_sizes": [[16], [32], [64], [128], [256], [512]], "aspect_ratios": [1.0]'
    return (
        f"this detector may learn slowly: in an image {found:.1f} {what} stand for an object, and fewer than "
        f"{ENOUGH_ANCHORS} are few. {remedy}. Add to --detector_config (in pre-training, if there was one) for "
        f"instance {fields}, or give larger --image_sizes."
    )
