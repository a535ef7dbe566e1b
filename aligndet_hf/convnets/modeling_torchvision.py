"""
torchvision's RetinaNet, FCOS, Faster R-CNN and Mask R-CNN as models of transformers.

Below `detector.` is torchvision's own module tree, so that weights go to torchvision and come from it by name. Images
arrive padded and normalised, as every image processor makes them; torchvision's own transform is never called. Losses
are torchvision's, with normalisers that are right under any number of processes.

This file needs nothing but torch, torchvision and transformers: it is saved beside the weights, and runs with
`trust_remote_code=True` where this package is not installed.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    batched_nms,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    remove_small_boxes,
    roi_align,
    sigmoid_focal_loss,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from transformers import AutoBackbone, AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

Maps = OrderedDict[str, Tensor]  # of the levels of a pyramid
Targets = list[dict[str, Tensor]]  # labels, and the boxes as `pixels`, xyxy
BACKGROUND, IGNORED = -1, -2  # in place of the index of a box
MULTIPLE = 32  # pixels: images are padded to multiples of it, as in torchvision; the strides are quotients of sizes
NO_LOGIT = -1000.0  # of a class that a detection is not of: a probability of 0, which no threshold lets through
CLASS_PRIOR = 0.01  # Lin et al., ICCV 2017, 3.3
# How torchvision starts the convolutions of the parts of a detector. By name: on loading, transformers puts functions
# in the place of these that leave alone what a checkpoint has.
STARTS = {
    "backbone.fpn.": ("kaiming_uniform_", {"a": 1}),
    "head.": ("normal_", {"std": 0.01}),
    "rpn.head.": ("normal_", {"std": 0.01}),
    "roi_heads.": ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "relu"}),
}


# --- configs ---------------------------------------------------------------------------------------------------------


class TorchvisionDetectorConfig(PreTrainedConfig):
    r"""
    What the four have in common. The defaults are torchvision's, but for a lower `score_threshold`, which
    decides what average precision sees, and RetinaNet's `detections_per_image`, which are 300 there.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): a backbone of timm or transformers with three
            feature maps (strides 8 to 32; RetinaNet and FCOS) or four (4 to 32; Faster and Mask R-CNN). A ResNet-50
            of timm by default.
        hidden_size (`int`, *optional*, defaults to 256): channels of the feature pyramid.
        version (`int`, *optional*, defaults to 1): 2 for the networks of torchvision's `*_fpn_v2` builders: norms in
            the heads, and in the pyramid of R-CNNs. FCOS has one version.
        anchor_sizes (`list[list[float]]`, *optional*): sides of the square anchors in pixels, a list for each level:
            one more than the backbone has maps (R-CNNs), or two more.
        aspect_ratios (`list[float]`, *optional*): height of an anchor divided by its width.
        score_threshold, nms_threshold (`float`): detections with a lower score, or a larger IoU with a better one of
            their class, are left out.
        detections_per_image (`int`, *optional*, defaults to 100): keep at most this many detections. The pipelines of
            transformers show 100 whatever it is.
        pre_nms_top_k (`int`, *optional*, defaults to 1000): look at this many of each level (R-CNN: proposals of each
            level in evaluation mode).
        rows_per_image (`int`, *optional*, defaults to 256): anchors or points of an image whose features are handed
            out in pre-training; of R-CNNs these are the RoIs that are trained on.
        conventions (`str`, *optional*, defaults to `"torchvision"`): "mmdet" computes as mmdetection and Detectron2
            do, which their checkpoints count on: anchors with fractions of pixels, regions shifted by half a pixel,
            RetinaNet's sixth level of the backbone and no ReLU before the seventh, FCOS' points in the middle of
            pixels, exponential distances with a scale for each level, and centerness beside the classes.
    """

    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig}
    levels: ClassVar[list[int]] = [2, 3, 4]  # of timm's ResNets: strides 8 to 32
    extra_levels: ClassVar[int] = 2  # of the pyramid, above the maps of the backbone

    backbone_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 256
    version: int = 1
    anchor_sizes: list | None = None
    aspect_ratios: list | tuple = (0.5, 1.0, 2.0)
    score_threshold: float = 0.01
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    pre_nms_top_k: int = 1000
    rows_per_image: int = 256
    conventions: str = "torchvision"

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            default = {"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": list(self.levels)}
            fields = dict(self.backbone_config or default | {"freeze_batch_norm_2d": True})
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if self.version not in (1, 2):
            raise ValueError(f"version is the one of torchvision's builders, 1 or 2, got {self.version}")
        if self.conventions not in ("torchvision", "mmdet"):
            raise ValueError(f"conventions are torchvision's or mmdet's, got {self.conventions!r}")
        if self.anchor_sizes is None:
            self.anchor_sizes = self.anchors_at([2 ** (level + 1) for level in self.levels])
        super().__post_init__(**kwargs)

    @classmethod
    def anchors_at(cls, strides: list[int]) -> list[list[int]]:
        """`anchor_sizes` for maps of these strides: torchvision's begin with 32 at its own first level."""
        ratio = 32 // 2 ** (cls.levels[0] + 1)
        above = [strides[-1] * 2 ** (level + 1) for level in range(cls.extra_levels)]
        return [cls.default_anchors(ratio * stride) for stride in [*strides, *above]]

    @staticmethod
    def default_anchors(size: int) -> list[int]:
        """Sides of the anchors of a level, by the largest side that is a power of two."""
        return [size]

    @property
    def num_anchors(self) -> int:
        """Anchors of a location."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)


class RetinaNetConfig(TorchvisionDetectorConfig):
    """RetinaNet (Lin et al., ICCV 2017); see [`TorchvisionDetectorConfig`]."""

    model_type = "torchvision_retinanet"

    @staticmethod
    def default_anchors(size: int) -> list[int]:
        return [size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))]


class FcosConfig(TorchvisionDetectorConfig):
    """
    FCOS (Tian et al., ICCV 2019); see [`TorchvisionDetectorConfig`]. `hidden_size` must be a multiple of 32, and 64 at
    least: the heads have group norms. `anchor_sizes` are the strides of the levels, and `aspect_ratios` is `[1]`.

    Args:
        center_sampling_radius (`float`, *optional*, defaults to 1.5): points of an object are this many strides around
            its centre; `None` takes all points of its box, as the official AlignDet code does.
    """

    model_type = "torchvision_fcos"
    aspect_ratios: list | tuple = (1.0,)
    nms_threshold: float = 0.6
    center_sampling_radius: float | None = 1.5

    @staticmethod
    def default_anchors(size: int) -> list[int]:
        return [size // 4]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_anchors != 1 or any(len(level) != 1 for level in self.anchor_sizes):
            raise ValueError(
                "FCOS has one point at a location: anchor_sizes takes the stride of each level alone, such as [[8], "
                f"[16], [32], [64], [128]], and aspect_ratios is [1], got {self.anchor_sizes} and {self.aspect_ratios}"
            )


class FasterRcnnConfig(TorchvisionDetectorConfig):
    """
    Faster R-CNN (Ren et al., NeurIPS 2015; Lin et al., CVPR 2017); see [`TorchvisionDetectorConfig`].

    Args:
        box_head (`str`, *optional*): "fc" for two fully connected layers (the default of version 1), "conv" for four
            convolutions and one fully connected layer (as in version 2, and AlignDet's).
        box_head_size (`int`, *optional*, defaults to 1024): width of the fully connected layers.
        rpn_batch_size, roi_batch_size (`int`): anchors and RoIs of an image that are trained on.
        rpn_positive_fraction, roi_positive_fraction (`float`): share of objects among them at most.
        rpn_pre_nms_top_k, rpn_post_nms_top_k (`int`): proposals of a level before, and of an image after their
            suppression, in training.
    """

    model_type = "torchvision_faster_rcnn"
    levels: ClassVar[list[int]] = [1, 2, 3, 4]
    extra_levels: ClassVar[int] = 1

    box_head: str | None = None
    box_head_size: int = 1024
    rpn_batch_size: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_pre_nms_top_k: int = 2000
    rpn_post_nms_top_k: int = 2000
    roi_batch_size: int = 512
    roi_positive_fraction: float = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.box_head is None:
            self.box_head = "fc" if self.version == 1 else "conv"


class MaskRcnnConfig(FasterRcnnConfig):
    """Mask R-CNN (He et al., ICCV 2017); see [`FasterRcnnConfig`]."""

    model_type = "torchvision_mask_rcnn"


@dataclass
class TorchvisionDetectorOutput(ModelOutput):
    """
    Output of the four models. N is `detections_per_image`.

    Args:
        loss (`torch.Tensor` of shape `()`): weighted sum of the terms.
        loss_dict (`dict[str, torch.Tensor]`): the terms without weights.
        logits (`torch.Tensor` of shape `[images, N, classes]`): detections after non-maximum suppression, best first:
            the logit of the score at the class that was found, -1000 elsewhere. A sigmoid gives the scores back.
            Only without labels, or in evaluation mode.
        pred_boxes (`torch.Tensor` of shape `[images, N, 4]`): their boxes, `cxcywh` normalised to the image without
            padding.
        pred_masks (`torch.Tensor` of shape `[images, N, 28, 28]`): Mask R-CNN: logits of the masks, each in its box.
        object_features (`torch.Tensor` of shape `[R, width]`): what enters the class layer. Without labels of every
            detection, `R = images * N`; with labels of sampled anchors, points or RoIs. Only with
            `output_hidden_states`.
        object_index (`torch.Tensor` of shape `[R]`): the box that each stands for, as its row among the boxes of the
            whole batch; -1 for background.
        object_slots (`torch.Tensor` of shape `[R]`): which anchor of its location it is.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    object_features: Tensor | None = None
    object_index: Tensor | None = None
    object_slots: Tensor | None = None


# --- tensors in, tensors out -----------------------------------------------------------------------------------------


def match_boxes(anchors: Tensor, boxes: Tensor, low: float, high: float, keep_best: bool = False) -> Tensor:
    """
    The box that every anchor stands for, by their IoU.

    Args:
        anchors (`torch.Tensor` of shape `[N, 4]`): `xyxy`.
        boxes (`torch.Tensor` of shape `[G, 4]`): `xyxy` in the same unit.
        low, high (`float`): from `high` on an anchor stands for its best box, below `low` for background.
        keep_best (`bool`, *optional*): whether an anchor that is some box's best counts, too. It stands for its own
            best box, as in torchvision; in mmdetection for the box that it is the best of.

    Returns:
        `torch.Tensor` of shape `[N]`: index of the box, -1 for background, -2 for neither.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    iou = box_iou(boxes, anchors)
    best, index = iou.max(0)
    counts = best >= high
    if keep_best and len(anchors):
        highest = iou.amax(1, keepdim=True)
        counts |= ((iou == highest) & (highest > 0)).any(0)
    return torch.where(counts, index, torch.where(best < low, BACKGROUND, IGNORED))


def match_points(points: Tensor, sizes: Tensor, boxes: Tensor, radius: float | None) -> Tensor:
    """
    The box that every point of FCOS stands for: of those around it that fit its level the smallest.

    Args:
        points (`torch.Tensor` of shape `[N, 2]`): x and y.
        sizes (`torch.Tensor` of shape `[N]`): stride of the point's level. A box fits a level if its farthest side is
            4 to 8 strides away; anything less fits the first, anything more the last.
        boxes (`torch.Tensor` of shape `[G, 4]`): `xyxy`.
        radius (`float`, *optional*): in strides: how far from the centre of the box a point may be.

    Returns:
        `torch.Tensor` of shape `[N]`: index of the box, -1 for background.
    """
    if not len(boxes):
        return torch.full((len(points),), BACKGROUND, device=points.device)
    sides = torch.cat([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], -1)
    low = torch.where(sizes == sizes.min(), 0, sizes * 4)[:, None]
    high = torch.where(sizes == sizes.max(), torch.inf, sizes * 8)[:, None]
    farthest = sides.amax(-1)
    fits = (sides.amin(-1) > 0) & (farthest > low) & (farthest < high)
    if radius is not None:
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        fits &= (points[:, None] - centers).abs().amax(-1) < radius * sizes[:, None]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).expand_as(fits)
    smallest, index = area.masked_fill(~fits, torch.inf).min(1)
    return torch.where(smallest.isfinite(), index, BACKGROUND)


def ignore(matched: Tensor, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
    """The same, but what lies on an ignored box is no background: by an IoU of a half, or with its centre."""
    if "ignored_pixels" not in target or not len(target["ignored_pixels"]):
        return matched
    boxes, centers = target["ignored_pixels"], (anchors[:, :2] + anchors[:, 2:]) / 2
    inside = ((centers[:, None] > boxes[:, :2]) & (centers[:, None] < boxes[:, 2:])).all(-1).any(1)
    lies_on = box_iou(anchors, boxes).amax(1) >= 0.5
    return torch.where((matched == BACKGROUND) & (inside | lies_on), IGNORED, matched)


def weights_of(matched: Tensor, target: dict[str, Tensor]) -> Tensor:
    """The weight of the box of each row `[N]`, 1 for background."""
    weights = target.get("weights", torch.ones_like(target["pixels"][:, 0]))
    return torch.cat([weights, weights.new_ones(1)])[matched.clamp(min=BACKGROUND)]


def sample(matched: Tensor, noise: Tensor, count: int, max_objects: int | None = None) -> Tensor:
    """
    Rows to train on: objects first, then background.

    Args:
        matched (`torch.Tensor` of shape `[N]`): as [`match_boxes`] returns it.
        noise (`torch.Tensor` of shape `[>= N]`): random numbers; the largest are taken.
        count (`int`): rows at most.
        max_objects (`int`, *optional*): objects among them at most.

    Returns:
        `torch.Tensor`: their indices.
    """

    def chosen(is_candidate: Tensor, number: int) -> Tensor:
        rows = is_candidate.nonzero().squeeze(1)
        return rows[noise[rows].topk(min(number, len(rows))).indices]

    objects = chosen(matched >= 0, count if max_objects is None else min(count, max_objects))
    return torch.cat([objects, chosen(matched == BACKGROUND, count - len(objects))])


def sampling_noise(labels: list[dict[str, Tensor]], length: int, training: bool = True) -> Tensor:
    """
    Random numbers in 0..1 for the rows of every image, `[images, length]`.

    They follow from the image's boxes, and so are the same whichever process has the image. In pre-training the boxes
    of an image change with its view: with every crop, and without crops with the size and the flip. In fine-tuning the
    same boxes return every epoch, and one number of torch's generator is mixed in; not to measure a loss, which is
    then the same for the same weights.
    """
    bits = torch.stack([label["boxes"].float().contiguous().view(torch.int32).sum() for label in labels])
    if training and any("proposal_ids" not in label for label in labels):
        bits = bits + torch.randint(2**31, ()).to(bits.device, non_blocking=True)
    x = bits[:, None] * 2654435761 + torch.arange(length, device=bits.device)
    for _ in range(3):  # the rounds of a hash of 32 bits
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x45D9F3B
    return ((x >> 8) & 0xFFFFFF) / 2**24


def mean_count(count: Tensor) -> Tensor:
    """The mean of a count over all processes, which in all is 1 at least: they divide as a single one would."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        count = count.detach().clone()
        dist.all_reduce(count)
    return count.clamp(min=1) / processes


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is too coarse for losses and boxes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- what mmdetection and Detectron2 compute otherwise ---------------------------------------------------------------


class ExactAnchors(AnchorGenerator):
    """Anchors whose corners are not rounded to pixels, at strides that do not depend on the size of the image."""

    offset = 0.0  # of the centre, in sides of a square anchor
    first_stride = 8

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of every image, `[N, 4]`."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        strides = [torch.tensor(self.first_stride * 2**level) for level in range(len(feature_maps))]
        shapes = [list(one.shape[-2:]) for one in feature_maps]
        anchors = torch.cat(self.grid_anchors(shapes, [[stride, stride] for stride in strides]))
        return [anchors] * len(image_list.image_sizes)

    def generate_anchors(
        self,
        scales: list[float],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Anchors of a location, `[ratios * scales, 4]`, around its corner."""
        height = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sides = torch.tensor(scales, dtype=dtype, device=device)
        width, height = (sides / height).flatten(), (sides * height).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2 + self.offset * sides[0]


class PixelCentres(ExactAnchors):
    """The points of FCOS in the middle of the pixels of their map."""

    offset = 0.5


class AlignedRoIAlign(MultiScaleRoIAlign):
    """Regions shifted by half a pixel of their map, with a sample for each pixel."""

    def forward(self, x: Maps, boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Features of the regions of all images, `[sum, channels, size, size]`, of maps with strides 4 to 32."""
        index = [torch.full_like(own[:, :1], image) for image, own in enumerate(boxes)]
        regions = torch.cat([torch.cat(index), torch.cat(boxes)], 1)
        side = (regions[:, 3:] - regions[:, 1:3]).prod(1).sqrt()
        level = torch.floor(torch.log2(side / (self.canonical_scale / 4) + 1e-6)).clamp(0, len(self.featmap_names) - 1)
        pooled = x[self.featmap_names[0]].new_zeros(len(regions), x[self.featmap_names[0]].shape[1], *self.output_size)
        for number, name in enumerate(self.featmap_names):
            own = (level == number).nonzero().squeeze(1)
            found = roi_align(
                x[name], regions[own].to(x[name].dtype), self.output_size, 0.25 / 2**number, aligned=True
            )
            pooled[own] = found.to(pooled.dtype)
        return pooled


class PlainP6P7(LastLevelP6P7):
    """RetinaNet's sixth level of the backbone's last map, and the seventh of the sixth as it is."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The maps with two more."""
        p6 = self.p6(c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class LevelScale(nn.Module):
    """What the distances of a level of FCOS are multiplied by before the exponential."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


# --- models ----------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """A backbone of timm or transformers under a feature pyramid, with torchvision's interface."""

    def __init__(self, config: TorchvisionDetectorConfig, extra: Callable[[list[int]], nn.Module], norm=None):
        super().__init__()
        self.body = AutoBackbone.from_config(config.backbone_config)
        self.out_channels = config.hidden_size
        channels = self.body.channels
        if len(config.anchor_sizes) != len(channels) + config.extra_levels:
            raise ValueError(
                f"anchor_sizes has {len(config.anchor_sizes)} lists, and this detector {len(channels)} levels of the "
                f"backbone and {config.extra_levels} above: give a list of sides for each"
            )
        # Regions are taken from these levels, and mmdetection's anchors count on their strides.
        is_fixed = config.conventions == "mmdet" or isinstance(config, FasterRcnnConfig)
        if is_fixed and len(channels) != len(config.levels):
            raise ValueError(f"this detector takes {len(config.levels)} maps of its backbone, not {len(channels)}")
        self.fpn = FeaturePyramidNetwork(channels, config.hidden_size, extra(channels), norm_layer=norm)

    def forward(self, pixel_values: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(pixel_values).feature_maps
        return self.fpn(OrderedDict((str(level), feature_map) for level, feature_map in enumerate(maps)))


class TorchvisionDetector(PreTrainedModel):
    """
    What the four models have in common; see [`TorchvisionDetectorConfig`] and [`TorchvisionDetectorOutput`].

    Attributes:
        loss_weights (`dict[str, float]`): of terms that do not count once.
        rows_only (`bool`): whether labels only ask for `object_features`: then nothing runs that they do not need.
    """

    config_class = TorchvisionDetectorConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    rows_only = False
    smallest_detection = 0.0  # pixels

    def __init__(self, config: TorchvisionDetectorConfig):
        super().__init__(config)
        self.loss_weights: dict[str, float] = {}
        self.detector = self.build(config)
        self.post_init()

    def build(self, config: TorchvisionDetectorConfig) -> nn.Module:
        """torchvision's detector."""
        raise NotImplementedError

    def get_input_embeddings(self) -> None:
        """None: the inputs are pixels."""

    def _init_weights(self, module: nn.Module) -> None:
        """As torchvision starts its layers: what a checkpoint lacks, such as a class layer of other classes."""
        if isinstance(module, nn.Linear | nn.BatchNorm2d | nn.GroupNorm):
            module.reset_parameters()
        elif isinstance(module, LevelScale):
            nn.init.ones_(module.scale)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            name = next(name for name, found in self.detector.named_modules() if found is module)
            start, options = next(start for part, start in STARTS.items() if name.startswith(part))
            getattr(nn.init, start)(module.weight, **options)
            is_class_layer = name == "head.classification_head.cls_logits"
            if module.bias is not None:
                nn.init.constant_(module.bias, math.log(CLASS_PRIOR / (1 - CLASS_PRIOR)) if is_class_layer else 0.0)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> TorchvisionDetectorOutput:
        """
        Losses in training, detections in evaluation.

        Args:
            pixel_values (`torch.FloatTensor` of shape `[images, 3, height, width]`): normalised images.
            pixel_mask (`torch.LongTensor` of shape `[images, height, width]`, *optional*): 1 on the image, 0 on
                padding, which is right and below.
            labels (`list[dict]`, *optional*): per image `boxes`, float `[n, 4]`, `cxcywh` normalised to the image
                without padding, and `class_labels`, int64 `[n]`; optionally `weights` `[n]` of the boxes in the loss,
                and `ignored_boxes` `[m, 4]`, where nothing is taught to be background; for Mask R-CNN `masks`
                `[n, h, w]` of the image's size, with or without padding, if masks are to be trained; images without
                train boxes alone.
            output_hidden_states (`bool`, *optional*): whether to return `object_features`.
            kwargs: `return_dict`, a tuple instead of the output if false; others are ignored.
        """
        height, width = pixel_values.shape[-2:]
        if pixel_mask is None:
            sizes = [(height, width)] * len(pixel_values)
        else:
            sizes = torch.stack([pixel_mask.amax(2).sum(1), pixel_mask.amax(1).sum(1)], 1).tolist()
        pixel_values = F.pad(pixel_values, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        images = ImageList(pixel_values, [tuple(size) for size in sizes])
        maps = self.detector.backbone(pixel_values)
        wants_rows = bool(output_hidden_states)
        if labels is None:
            return self.detect(images, maps, wants_rows)
        outputs = self.learn(images, maps, self._targets(labels, images.image_sizes), wants_rows)
        if outputs.loss_dict is not None:
            outputs.loss = sum(self.loss_weights.get(name, 1.0) * term for name, term in outputs.loss_dict.items())
        if not self.training and not self.rows_only:
            found = self.detect(images, maps, False)
            outputs.logits, outputs.pred_boxes, outputs.pred_masks = found.logits, found.pred_boxes, found.pred_masks
        return TorchvisionDetectorOutput(**outputs)  # in the order of its fields, as a tuple has them

    def _targets(self, labels: list[dict[str, Tensor]], sizes: list[tuple[int, int]]) -> Targets:
        """The labels with boxes in pixels, `xyxy`, of the type of the losses; classes are int64."""
        dtype, classes = torch.promote_types(self.dtype, torch.float32), self.config.num_labels
        targets = []
        for image, (label, (height, width)) in enumerate(zip(labels, sizes, strict=True)):
            target = dict(label)
            if "class_labels" in label:  # which the rows of a momentum detector do without
                target["class_labels"] = ids = label["class_labels"].long()
                # On another device than the CPU this would wait for it.
                if ids.device.type == "cpu" and ((ids < 0) | (ids >= classes)).any():
                    raise ValueError(
                        f"labels[{image}] of this batch has class_labels from {ids.min()} to {ids.max()}, and the "
                        f"detector the classes 0 to {classes - 1}: count from 0, and build it with num_labels of them"
                    )
            scale = torch.tensor([width, height, width, height], dtype=dtype, device=label["boxes"].device)
            for boxes, pixels in (("boxes", "pixels"), ("ignored_boxes", "ignored_pixels")):
                if boxes in label:
                    target[pixels] = box_convert(label[boxes].to(dtype).reshape(-1, 4) * scale, "cxcywh", "xyxy")
            targets.append(target)
        return targets

    def _anchors(self, images: ImageList, maps: Maps) -> tuple[Tensor, list[int]]:
        """Anchors of an image `[N, 4]`, and how many of them each level has."""
        # In float32 whatever the maps are: anchors of half precision are rounded to 8 pixels.
        like = [m.new_empty(1, *m.shape[-2:], dtype=torch.float32) for m in maps.values()]
        parts = self.detector.rpn if hasattr(self.detector, "rpn") else self.detector
        anchors = parts.anchor_generator(images, like)[0]
        return anchors, [m.shape[-2] * m.shape[-1] * self.config.num_anchors for m in maps.values()]

    @staticmethod
    def rows_of_batch(matched: list[Tensor], targets: Targets) -> Tensor:
        """Indices of each image's boxes as indices among the boxes of the whole batch; background stays -1."""
        index, first = [], 0
        for own, target in zip(matched, targets, strict=True):
            index.append(torch.where(own >= 0, own + first, BACKGROUND))
            first += len(target["boxes"])
        return torch.cat(index)

    def detections(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, rows: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The best of an image's candidates after suppression; `rows` says where each comes from."""
        boxes = clip_boxes_to_image(boxes, size)
        keep = remove_small_boxes(boxes, self.smallest_detection)
        boxes, scores, labels, rows = (values[keep] for values in (boxes, scores, labels, rows))
        keep = batched_nms(boxes, scores, labels, self.config.nms_threshold)[: self.config.detections_per_image]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep], "rows": rows[keep]}

    def as_queries(self, found: list[dict[str, Tensor]], sizes: list[tuple[int, int]]) -> TorchvisionDetectorOutput:
        """Detections of images as predictions of as many "queries"; the last ones may be empty."""
        shape = (len(found), self.config.detections_per_image)
        logits = found[0]["scores"].new_full((*shape, self.config.num_labels), NO_LOGIT)
        boxes = logits.new_zeros(*shape, 4)
        for image, (item, (height, width)) in enumerate(zip(found, sizes, strict=True)):
            place = torch.arange(len(item["scores"]), device=logits.device)
            logits[image, place, item["labels"]] = item["scores"].logit(1e-7)
            scale = boxes.new_tensor([width, height, width, height])
            boxes[image, place] = box_convert(item["boxes"], "xyxy", "cxcywh") / scale
        return TorchvisionDetectorOutput(logits=logits, pred_boxes=boxes)

    def in_queries(self, values: Tensor, found: list[dict[str, Tensor]]) -> Tensor:
        """What belongs to the detections of all images, `[sum, ...]`, in their queries, `[images, N, ...]`."""
        padded = values.new_zeros(len(found), self.config.detections_per_image, *values.shape[1:])
        for image, own in enumerate(values.split([len(item["rows"]) for item in found])):
            padded[image, : len(own)] = own
        return padded

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """
        The tensors by the names of torchvision's own detector of the same kind and backbone, of a ResNet of timm.

        Raises:
            `ValueError`: if the backbone is another, which torchvision has no such detector of, or if it computes by
                the conventions of mmdetection.
        """
        if self.config.conventions != "torchvision":
            raise ValueError("this detector computes by the conventions of mmdetection, and torchvision's does not")
        backbone = getattr(self.config.backbone_config, "backbone", self.config.backbone_config.model_type)
        if not hasattr(resnet, backbone.split(".")[0]):
            raise ValueError(f"torchvision's detectors are built around its ResNets; this one has {backbone!r} inside")
        tensors = {}
        for name, tensor in self.detector.state_dict().items():
            name = name.replace("body._backbone.", "body.")
            tensors[name] = tensor.detach().contiguous()
            if name.endswith("running_var"):  # frozen norms do not count batches, and torchvision's do
                tensors.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
        return tensors

    def torchvision_arguments(self) -> str:
        """The arguments of torchvision's builder, as Python text, that say what its tensors do not."""
        sizes = tuple(map(tuple, self.config.anchor_sizes))
        anchors = f"AnchorGenerator({sizes}, {(tuple(self.config.aspect_ratios),) * len(sizes)})"
        fields = {"num_classes": self.config.num_labels + isinstance(self.config, FasterRcnnConfig)}
        fields |= _fields(self.config)
        texts = [anchors if isinstance(value, AnchorGenerator) else repr(value) for value in fields.values()]
        return ", ".join(f"{name}={text}" for name, text in zip(fields, texts, strict=True)).replace("=inf", "=1e9")


class DenseDetector(TorchvisionDetector):
    """RetinaNet and FCOS: every location of every level predicts."""

    def _towers(self, maps: Maps) -> list[Tensor]:
        """What enters the class layer."""
        return [self.detector.head.classification_head.conv(feature_map) for feature_map in maps.values()]

    def _predictions(self, maps: Maps, towers: list[Tensor]) -> dict[str, Tensor]:
        """Class logits `[images, N, classes]`, deltas `[images, N, 4]`, and of FCOS centerness `[images, N, 1]`."""
        head = self.detector.head.classification_head
        logits = [self._rows(head.cls_logits(tower), head.num_classes) for tower in towers]
        boxes = self.detector.head.regression_head(list(maps.values()))
        names = ("boxes", "centerness") if isinstance(boxes, tuple) else ("boxes",)
        found = dict(zip(names, boxes if isinstance(boxes, tuple) else (boxes,), strict=True))
        found["logits"] = torch.cat(logits, 1)
        return {name: at_least_float32(value) for name, value in found.items()}

    @staticmethod
    def _rows(values: Tensor, width: int) -> Tensor:
        """`[images, A * width, h, w]` -> `[images, h * w * A, width]`."""
        images, _, height, columns = values.shape
        values = values.view(images, -1, width, height, columns).permute(0, 3, 4, 1, 2)
        return values.reshape(images, -1, width)

    def detect(self, images: ImageList, maps: Maps, wants_rows: bool) -> TorchvisionDetectorOutput:
        """The detections."""
        anchors, levels = self._anchors(images, maps)
        towers = self._towers(maps)
        predictions = self._predictions(maps, towers)
        scores = self.scores(predictions)
        found = []
        for image, size in enumerate(images.image_sizes):
            rows, labels, best = [], [], []
            first = 0
            for level in scores[image].split(levels):
                top = level.flatten().topk(min(self.config.pre_nms_top_k, level.numel()))
                keep = top.values > self.config.score_threshold
                index = top.indices[keep]
                rows.append(first + index // level.shape[1])
                labels.append(index % level.shape[1])
                best.append(top.values[keep])
                first += len(level)
            rows = torch.cat(rows)
            boxes = self.decode(predictions["boxes"][image, rows], anchors[rows])
            found.append(self.detections(boxes, torch.cat(best), torch.cat(labels), rows, size))
        outputs = self.as_queries(found, images.image_sizes)
        if wants_rows:
            flat = torch.cat([tower.flatten(2) for tower in towers], 2)
            rows = [item["rows"] // self.config.num_anchors for item in found]
            features = torch.cat([flat[image, :, row].T for image, row in enumerate(rows)])
            outputs.object_features = self.in_queries(at_least_float32(features), found).flatten(0, 1)
        return outputs

    def learn(self, images: ImageList, maps: Maps, targets: Targets, wants_rows: bool) -> TorchvisionDetectorOutput:
        """The terms of the loss, and features of sampled anchors."""
        anchors, _ = self._anchors(images, maps)
        towers = self._towers(maps)
        matched = [ignore(self.match(anchors, target["pixels"]), anchors, target) for target in targets]
        matched = torch.stack(matched)
        outputs = TorchvisionDetectorOutput()
        if not self.rows_only:
            outputs.loss_dict = self.losses(self._predictions(maps, towers), anchors, matched, targets)
        if wants_rows:
            noise = sampling_noise(targets, len(anchors), self.training)
            rows = [sample(*pair, self.config.rows_per_image) for pair in zip(matched, noise, strict=True)]
            flat = torch.cat([tower.flatten(2) for tower in towers], 2)  # [images, width, locations]
            features = [flat[image, :, row // self.config.num_anchors].T for image, row in enumerate(rows)]
            outputs.object_features = at_least_float32(torch.cat(features))
            chosen = [own[row] for own, row in zip(matched, rows, strict=True)]
            outputs.object_index = self.rows_of_batch(chosen, targets)
            outputs.object_slots = torch.cat(rows) % self.config.num_anchors
        return outputs

    @staticmethod
    def _class_losses(logits: Tensor, matched: Tensor, targets: Targets) -> Tensor:
        """Focal losses of the images, `[images]`."""
        wanted = torch.zeros_like(logits)
        for row, own, target in zip(wanted, matched, targets, strict=True):
            places = (own >= 0).nonzero().squeeze(1)
            row[places, target["class_labels"][own[places]]] = 1
        weights = torch.stack([weights_of(own, target) for own, target in zip(matched, targets, strict=True)])
        loss = sigmoid_focal_loss(logits, wanted).sum(2)
        return (loss * weights * (matched != IGNORED)).sum(1)

    @staticmethod
    def _boxes_of(matched: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The boxes of all rows that have one, image by image, and their weights."""
        pairs = [(own[own >= 0], target) for own, target in zip(matched, targets, strict=True)]
        boxes = torch.cat([target["pixels"][own] for own, target in pairs])
        return boxes, torch.cat([weights_of(own, target) for own, target in pairs])


class RetinaNetForObjectDetection(DenseDetector):
    """RetinaNet of torchvision. See [`RetinaNetConfig`] and [`TorchvisionDetectorOutput`]."""

    config_class = RetinaNetConfig

    def build(self, config: RetinaNetConfig) -> RetinaNet:
        # Version 2 makes the sixth level of the backbone's last map.
        width = config.hidden_size
        last_levels = PlainP6P7 if config.conventions == "mmdet" else LastLevelP6P7
        is_of_pyramid = config.version == 1 and config.conventions == "torchvision"
        pyramid = Pyramid(config, lambda channels: last_levels(width if is_of_pyramid else channels[-1], width))
        norm = partial(nn.GroupNorm, 32) if config.version == 2 else None
        head = RetinaNetHead(width, config.num_anchors, config.num_labels, norm_layer=norm)
        head.regression_head._loss_type = "l1" if config.version == 1 else "giou"
        return RetinaNet(pyramid, config.num_labels, head=head, **_fields(config))

    def match(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """See [`match_boxes`]."""
        return match_boxes(anchors, boxes, 0.4, 0.5, keep_best=True)

    def scores(self, predictions: dict[str, Tensor]) -> Tensor:
        """Scores of the classes, `[images, N, classes]`."""
        return predictions["logits"].sigmoid()

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes in pixels, `xyxy`."""
        return self.detector.box_coder.decode_single(deltas, anchors)

    def losses(
        self, predictions: dict[str, Tensor], anchors: Tensor, matched: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Each image by its own number of objects, then the mean over the images of all processes."""
        count = (matched >= 0).sum(1).clamp(min=1)
        image, row = (matched >= 0).nonzero(as_tuple=True)
        deltas, (wanted, weights) = predictions["boxes"][image, row], self._boxes_of(matched, targets)
        if self.config.version == 1:
            name, error = "loss_bbox", deltas - self.detector.box_coder.encode_single(wanted, anchors[row])
            error = error.abs().sum(1)
        else:
            name, error = "loss_giou", generalized_box_iou_loss(self.decode(deltas, anchors[row]), wanted)
        by_image = {
            "loss_ce": self._class_losses(predictions["logits"], matched, targets),
            name: error.new_zeros(len(targets)).index_add(0, image, error * weights),
        }
        images = mean_count(error.new_tensor(len(targets)))
        return {name: (values / count).sum() / images for name, values in by_image.items()}


class FcosForObjectDetection(DenseDetector):
    """FCOS of torchvision. See [`FcosConfig`] and [`TorchvisionDetectorOutput`]."""

    config_class = FcosConfig

    def build(self, config: FcosConfig) -> FCOS:
        width = config.hidden_size
        pyramid = Pyramid(config, lambda channels: LastLevelP6P7(width, width))
        fcos = FCOS(pyramid, config.num_labels, **_fields(config))
        if config.conventions == "mmdet":
            fcos.head.regression_head.scales = nn.ModuleList([LevelScale() for _ in config.anchor_sizes])
        return fcos

    def _predictions(self, maps: Maps, towers: list[Tensor]) -> dict[str, Tensor]:
        """As of any dense detector; by the conventions of mmdetection from other layers."""
        if self.config.conventions == "torchvision":
            return super()._predictions(maps, towers)
        head = self.detector.head.regression_head
        boxes = [
            # In strides, as torchvision has them.
            (level.scale * at_least_float32(head.bbox_reg(head.conv(feature_map)))).exp() / stride
            for feature_map, level, (stride,) in zip(maps.values(), head.scales, self.config.anchor_sizes, strict=True)
        ]
        logits = [self.detector.head.classification_head.cls_logits(tower) for tower in towers]
        centerness = [head.bbox_ctrness(tower) for tower in towers]
        found = {"boxes": (boxes, 4), "centerness": (centerness, 1), "logits": (logits, self.config.num_labels)}
        return {
            name: at_least_float32(torch.cat([self._rows(level, width) for level in levels], 1))
            for name, (levels, width) in found.items()
        }

    def match(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """See [`match_points`]."""
        points, sizes = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2] - anchors[:, 0]
        return match_points(points, sizes, boxes, self.config.center_sampling_radius)

    def scores(self, predictions: dict[str, Tensor]) -> Tensor:
        """Geometric means of class score and centerness, or by mmdetection's conventions the products."""
        products = predictions["logits"].sigmoid() * predictions["centerness"].sigmoid()
        return products if self.config.conventions == "mmdet" else products.sqrt()

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes in pixels, `xyxy`."""
        return self.detector.head.box_coder.decode(deltas, anchors)

    def losses(
        self, predictions: dict[str, Tensor], anchors: Tensor, matched: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """All by the number of objects' points, in the mean of the processes."""
        image, row = (matched >= 0).nonzero(as_tuple=True)
        wanted, weights = self._boxes_of(matched, targets)
        found = self.decode(predictions["boxes"][image, row], anchors[row])
        # Left, top, right, bottom.
        sides = self.detector.head.box_coder.encode(anchors[row], wanted).unflatten(-1, (2, 2))
        centerness = (sides.amin(1) / sides.amax(1)).prod(-1).clamp(min=0).sqrt()
        logits = predictions["centerness"][image, row, 0]
        sums = {
            "loss_ce": self._class_losses(predictions["logits"], matched, targets).sum(),
            "loss_giou": (generalized_box_iou_loss(found, wanted) * weights).sum(),
            "loss_centerness": F.binary_cross_entropy_with_logits(logits, centerness, weights, reduction="sum"),
        }
        count = mean_count((matched >= 0).sum().to(logits.dtype))
        return {name: value / count for name, value in sums.items()}


class Regions(NamedTuple):
    """Regions of an image: `boxes` `[r, 4]`, the box that each stands for or -1 (`matched`), the image's target."""

    boxes: Tensor
    matched: Tensor
    target: dict[str, Tensor]

    @property
    def is_object(self) -> Tensor:
        """Which of them stand for a box."""
        return self.matched >= 0

    @property
    def labels(self) -> Tensor:
        """Class of each; 0 is background."""
        labels = torch.zeros_like(self.matched)
        labels[self.is_object] = self.target["class_labels"][self.matched[self.is_object]] + 1
        return labels


class FasterRcnnForObjectDetection(TorchvisionDetector):
    """Faster R-CNN of torchvision. See [`FasterRcnnConfig`] and [`TorchvisionDetectorOutput`]."""

    config_class = FasterRcnnConfig
    network = FasterRCNN
    smallest_detection = 1e-2

    def build(self, config: FasterRcnnConfig) -> FasterRCNN:
        width, norm = config.hidden_size, nn.BatchNorm2d if config.version == 2 else None
        if config.box_head == "fc":
            box_head = TwoMLPHead(width * 49, config.box_head_size)
        else:
            box_head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [config.box_head_size], norm_layer=norm)
        return self.network(
            Pyramid(config, lambda channels: LastLevelMaxPool(), norm),
            rpn_head=RPNHead(width, config.num_anchors, conv_depth=config.version),
            box_head=box_head,
            box_roi_pool=self._roi_pool(config, 7),
            # The first class is background.
            box_predictor=FastRCNNPredictor(config.box_head_size, config.num_labels + 1),
            **_fields(config),
            **self._mask_parts(config, norm),
        )

    @staticmethod
    def _roi_pool(config: FasterRcnnConfig, size: int) -> MultiScaleRoIAlign:
        pool = AlignedRoIAlign if config.conventions == "mmdet" else MultiScaleRoIAlign
        return pool(["0", "1", "2", "3"], size, sampling_ratio=2)

    @staticmethod
    def _pooled(pool: MultiScaleRoIAlign, maps: Maps, boxes: list[Tensor], images: ImageList) -> Tensor:
        """
        Features of boxes, which are cut out in float32: coordinates in half precision are pixels off.

        `pool` infers scales from the first sizes: padded ones, which the strides divide.
        """
        exact = {name: at_least_float32(maps[name]) for name in pool.featmap_names}
        return pool(exact, boxes, [tuple(images.tensors.shape[-2:])] * len(boxes)).to(maps["0"].dtype)

    def _mask_parts(self, config: FasterRcnnConfig, norm: type[nn.Module] | None) -> dict[str, nn.Module]:
        return {}

    def detect(self, images: ImageList, maps: Maps, wants_rows: bool) -> TorchvisionDetectorOutput:
        """The detections."""
        roi, sizes = self.detector.roi_heads, images.image_sizes
        proposals, _ = self._propose(images, maps)
        features = roi.box_head(self._pooled(roi.box_roi_pool, maps, proposals, images))
        logits, deltas = map(at_least_float32, roi.box_predictor(features))
        counts = [len(boxes) for boxes in proposals]
        scores = logits.softmax(-1)[:, 1:].split(counts)
        boxes = roi.box_coder.decode_single(deltas, torch.cat(proposals))
        boxes = boxes.view(len(logits), self.config.num_labels + 1, 4)[:, 1:].split(counts)
        rows = torch.arange(len(features), device=features.device).split(counts)
        found = []
        for own_boxes, own_scores, own_rows, size in zip(boxes, scores, rows, sizes, strict=True):
            row, label = (own_scores > self.config.score_threshold).nonzero(as_tuple=True)
            found.append(self.detections(own_boxes[row, label], own_scores[row, label], label, own_rows[row], size))
        outputs = self.as_queries(found, sizes)
        if wants_rows:
            features = features[torch.cat([item["rows"] for item in found])]
            outputs.object_features = self.in_queries(at_least_float32(features), found).flatten(0, 1)
        if roi.mask_head is not None:
            masks = self._masks(maps, [item["boxes"] for item in found], images)
            label = torch.cat([item["labels"] for item in found]) + 1
            outputs.pred_masks = self.in_queries(masks[torch.arange(len(label)), label], found)
        return outputs

    def learn(self, images: ImageList, maps: Maps, targets: Targets, wants_rows: bool) -> TorchvisionDetectorOutput:
        """The terms of the loss, and features of the sampled regions."""
        roi, anchors = self.detector.roi_heads, self._anchors(images, maps)[0]
        proposals, rpn_outputs = self._propose(images, maps)
        longest = max(map(len, [anchors, *proposals])) + max(len(target["boxes"]) for target in targets)
        noise = sampling_noise(targets, longest, self.training)
        regions = [self._sample(*item) for item in zip(proposals, targets, noise, strict=True)]
        features = roi.box_head(self._pooled(roi.box_roi_pool, maps, [own.boxes for own in regions], images))
        outputs = TorchvisionDetectorOutput()
        if not self.rows_only:
            outputs.loss_dict = self._rpn_losses(*rpn_outputs, anchors, targets, noise)
            outputs.loss_dict |= self._roi_losses(*map(at_least_float32, roi.box_predictor(features)), regions)
            if roi.mask_head is not None:
                outputs.loss_dict["loss_mask"] = self._mask_loss(images, maps, regions)
        if wants_rows:
            outputs.object_features = at_least_float32(features)
            outputs.object_index = self.rows_of_batch([own.matched for own in regions], targets)
            outputs.object_slots = torch.zeros_like(outputs.object_index)
        return outputs

    def _propose(self, images: ImageList, maps: Maps) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Proposals of every image, and objectness `[images, N]` and deltas `[images, N, 4]` of the anchors."""
        rpn, count = self.detector.rpn, len(images.image_sizes)
        objectness, deltas = rpn.head(list(maps.values()))
        levels = [level[0].numel() for level in objectness]
        objectness, deltas = map(at_least_float32, concat_box_prediction_layers(objectness, deltas))
        anchors = self._anchors(images, maps)[0].repeat(count, 1)
        boxes = rpn.box_coder.decode_single(deltas.detach(), anchors).view(count, -1, 4)
        objectness, deltas = objectness.view(count, -1), deltas.view(count, -1, 4)
        return rpn.filter_proposals(boxes, objectness, images.image_sizes, levels)[0], (objectness, deltas)

    def _sample(self, proposals: Tensor, target: dict[str, Tensor], noise: Tensor) -> Regions:
        """Regions of an image, of its proposals and boxes."""
        count, share = self.config.roi_batch_size, self.config.roi_positive_fraction
        candidates = torch.cat([proposals, target["pixels"].to(proposals.dtype)])
        matched = ignore(match_boxes(candidates, target["pixels"], 0.5, 0.5), candidates, target)
        rows = sample(matched, noise, count, int(count * share))
        return Regions(candidates[rows], matched[rows], target)

    def _rpn_losses(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets, noise: Tensor
    ) -> dict[str, Tensor]:
        """All by the number of sampled anchors, in the mean of the processes."""
        count, share = self.config.rpn_batch_size, self.config.rpn_positive_fraction
        terms = {"loss_rpn_bbox": [], "loss_objectness": []}
        number = objectness.new_zeros(())
        for own_scores, own_deltas, own_noise, target in zip(objectness, deltas, noise, targets, strict=True):
            boxes = target["pixels"]
            matched = ignore(match_boxes(anchors, boxes, 0.3, 0.7, keep_best=True), anchors, target)
            rows = sample(matched, own_noise, count, int(count * share))
            objects, is_object = rows[matched[rows] >= 0], (matched[rows] >= 0).to(own_scores.dtype)
            wanted = self.detector.rpn.box_coder.encode_single(boxes[matched[objects]], anchors[objects])
            terms["loss_rpn_bbox"].append(
                _smooth_l1(own_deltas[objects], wanted, weights_of(matched[objects], target))
            )
            weights = weights_of(matched[rows], target).to(own_scores.dtype)
            objectness_loss = F.binary_cross_entropy_with_logits(own_scores[rows], is_object, weights, reduction="sum")
            terms["loss_objectness"].append(objectness_loss)
            number = number + len(rows)
        number = mean_count(number)
        return {name: sum(values) / number for name, values in terms.items()}

    def _roi_losses(self, logits: Tensor, deltas: Tensor, regions: list[Regions]) -> dict[str, Tensor]:
        """All by the number of regions, in the mean of the processes."""
        labels = torch.cat([own.labels for own in regions])
        pairs = [(own.target["pixels"][own.matched[own.is_object]], own.boxes[own.is_object]) for own in regions]
        wanted = self.detector.roi_heads.box_coder.encode(*map(list, zip(*pairs, strict=True)))
        deltas = deltas.unflatten(1, (-1, 4))[labels > 0, labels[labels > 0]]
        weights = torch.cat([weights_of(own.matched, own.target) for own in regions])
        number = mean_count(logits.new_tensor(len(labels)))
        return {
            "loss_ce": (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / number,
            "loss_bbox": _smooth_l1(deltas, torch.cat(wanted), weights[labels > 0]) / number,
        }

    def _masks(self, maps: Maps, boxes: list[Tensor], images: ImageList) -> Tensor:
        """Mask logits of all boxes and classes, `[sum, classes + 1, 28, 28]`."""
        roi = self.detector.roi_heads
        pooled = self._pooled(roi.mask_roi_pool, maps, boxes, images)
        return at_least_float32(roi.mask_predictor(roi.mask_head(pooled)))

    def _mask_loss(self, images: ImageList, maps: Maps, regions: list[Regions]) -> Tensor:
        """Of the regions of objects, in the images whose labels have masks; 0, with a graph, if there are none."""
        objects = []
        for own in regions:
            rows = own.is_object if "masks" in own.target else torch.zeros_like(own.is_object)
            objects.append(Regions(own.boxes[rows], own.matched[rows], own.target))
        labels = torch.cat([own.labels for own in objects])
        number = mean_count(regions[0].boxes.new_tensor(len(labels)))
        if not len(labels):
            roi = self.detector.roi_heads
            unused = [*roi.mask_head.parameters(), *roi.mask_predictor.parameters()]
            return 0 * sum(parameter.sum() for parameter in unused)
        logits = self._masks(maps, [own.boxes for own in objects], images)[torch.arange(len(labels)), labels]
        wanted = []
        for boxes, matched, target in (own for own in objects if len(own.boxes)):
            places = torch.cat([matched[:, None].to(boxes.dtype), boxes], 1)
            wanted.append(roi_align(target["masks"][:, None].to(boxes.dtype), places, tuple(logits.shape[-2:]))[:, 0])
        error = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="none").mean((1, 2))
        weights = torch.cat([weights_of(own.matched, own.target) for own in objects])
        return (error * weights).sum() / number


def _smooth_l1(found: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    return (F.smooth_l1_loss(found, wanted, beta=1 / 9, reduction="none").sum(1) * weights).sum()


class MaskRcnnForObjectDetection(FasterRcnnForObjectDetection):
    """Mask R-CNN of torchvision; images without `masks` in their labels train boxes alone. See [`MaskRcnnConfig`]."""

    config_class = MaskRcnnConfig
    network = MaskRCNN

    def _mask_parts(self, config: MaskRcnnConfig, norm: type[nn.Module] | None) -> dict[str, nn.Module]:
        width = config.hidden_size
        return {
            "mask_roi_pool": self._roi_pool(config, 14),
            "mask_head": MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
            "mask_predictor": MaskRCNNPredictor(width, width, config.num_labels + 1),
        }


def _fields(config: TorchvisionDetectorConfig) -> dict[str, Any]:
    """The arguments of torchvision's detectors that follow from a config alone."""
    if isinstance(config, FasterRcnnConfig):
        return {
            "rpn_anchor_generator": _anchor_generator(config),
            "rpn_pre_nms_top_n_train": config.rpn_pre_nms_top_k,
            "rpn_post_nms_top_n_train": config.rpn_post_nms_top_k,
            "rpn_pre_nms_top_n_test": config.pre_nms_top_k,
            "rpn_post_nms_top_n_test": config.pre_nms_top_k,
            "rpn_batch_size_per_image": config.rpn_batch_size,
            "rpn_positive_fraction": config.rpn_positive_fraction,
            "box_batch_size_per_image": config.roi_batch_size,
            "box_positive_fraction": config.roi_positive_fraction,
            "box_score_thresh": config.score_threshold,
            "box_nms_thresh": config.nms_threshold,
            "box_detections_per_img": config.detections_per_image,
        }
    fields = {
        "anchor_generator": _anchor_generator(config),
        "score_thresh": config.score_threshold,
        "nms_thresh": config.nms_threshold,
        "detections_per_img": config.detections_per_image,
        "topk_candidates": config.pre_nms_top_k,
    }
    if isinstance(config, FcosConfig):
        radius = config.center_sampling_radius
        fields["center_sampling_radius"] = math.inf if radius is None else radius
    return fields


def _anchor_generator(config: TorchvisionDetectorConfig) -> AnchorGenerator:
    sizes = tuple(tuple(level) for level in config.anchor_sizes)
    generator = AnchorGenerator
    if config.conventions == "mmdet":
        generator = PixelCentres if isinstance(config, FcosConfig) else ExactAnchors
    found = generator(sizes, (tuple(config.aspect_ratios),) * len(sizes))
    found.first_stride = 2 ** (config.levels[0] + 1)
    return found


MODELS = (
    RetinaNetForObjectDetection,
    FcosForObjectDetection,
    FasterRcnnForObjectDetection,
    MaskRcnnForObjectDetection,
)

for _model in MODELS:
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForObjectDetection")
    if _model.config_class.model_type not in CONFIG_MAPPING:
        AutoConfig.register(_model.config_class.model_type, _model.config_class)
        AutoModelForObjectDetection.register(_model.config_class, _model)
        # What `pipeline` asks for models that it knows.
        MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[_model.config_class.model_type] = _model.__name__
