"""SoCo: pre-training a backbone, its feature pyramid and a box head on unlabelled images (arXiv 2106.02637)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from transformers import AutoBackbone, BaseImageProcessor
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..detectors.backbones import save_backbone, split_network, tensors_of
from ..losses import box_similarity_loss, contrastive_diagnostics
from .configuration_soco import SoCoConfig
from .momentum_model import MomentumModel

TORCHVISION = "torchvision.safetensors"


@dataclass
class SoCoOutput(ModelOutput):
    """
    Output of [`SoCoForPreTraining`].

    Args:
        loss (`torch.Tensor` of shape `()`): sum over the pairs of views, from -4 each when all boxes are alike.
        loss_dict (`dict[str, torch.Tensor]`): `loss_view2`, ...: the loss of the first view with each other.
        metrics (`dict[str, torch.Tensor]`): [`~aligndet_hf.losses.contrastive_diagnostics`] of the first and second
            view, detached.
        embeddings (`list[torch.Tensor]`): for each view `[images, boxes, projection_dim]`, predictions of the online
            encoder.
        hidden_states (`tuple[tuple[torch.Tensor]]`, only with `output_hidden_states=True`): for each view the feature
            maps of the online encoder that boxes are pooled from, `[images, channels, height, width]`.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None
    embeddings: list[Tensor] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None


def _mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, output_dim),
    )


class SoCoEncoder(nn.Module):
    """
    From an image and boxes to one embedding per box: backbone, feature pyramid, RoIAlign, box head, projector.

    All boxes of a view are pooled at once, each from its own level of the pyramid, and pass the head together, as in
    a detector. The official code pools each set of boxes from every level, calls the head for each, and compares only
    the boxes on their own level: the same embeddings, but for the statistics of the batch norms, which here are those
    of all boxes of the view on their own levels.

    Args:
        config ([`SoCoConfig`]): the configuration.
    """

    def __init__(self, config: SoCoConfig):
        super().__init__()
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        channels = list(self.backbone.channels)
        if config.variant == "c4":
            # The last stage is no module of its own: it stays in the backbone, under the backbone's names.
            self.neck = self.head = None
            self.projector = _mlp(channels[-1], config.mlp_dim, config.projection_dim)
            split_network(self.backbone)  # raises if that cannot be
        else:
            if len(channels) != len(config.level_sizes or []):
                raise ValueError(
                    f"the backbone gives {len(channels)} feature maps, but there are {len(config.level_sizes or [])} "
                    f"level_sizes: {config.level_sizes}"
                )
            width = config.fpn_channels
            self.neck = FeaturePyramidNetwork(channels, width, norm_layer=nn.BatchNorm2d)
            self.head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [config.head_dim], norm_layer=nn.BatchNorm2d)
            self.projector = _mlp(config.head_dim, config.mlp_dim, config.projection_dim)

    def forward(self, pixel_values: Tensor, boxes: Tensor, levels: Tensor) -> Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `[images, 3, height, width]`): normalised images.
            boxes (`torch.Tensor` of shape `[images, boxes, 4]`): corners xyxy, relative to the image.
            levels (`torch.Tensor` of shape `[images, boxes]`): the level of the pyramid to pool a box from. Boxes of
                level -1 are pooled from the last.

        Returns:
            `torch.Tensor` of shape `[images, boxes, projection_dim]`.
        """
        return self.embed(self.feature_maps(pixel_values), boxes, levels)

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The levels of the pyramid, or the map before the last stage, of images `[images, 3, height, width]`."""
        if self.neck is None:
            return [split_network(self.backbone)[0](pixel_values)]
        maps = self.backbone(pixel_values).feature_maps
        return list(self.neck(OrderedDict(enumerate(maps))).values())

    def embed(self, maps: Sequence[Tensor], boxes: Tensor, levels: Tensor) -> Tensor:
        """The embeddings of boxes, as [`~SoCoEncoder.forward`] takes them, in these feature maps."""
        images, count, _ = boxes.shape
        index = torch.arange(images, device=boxes.device).repeat_interleave(count)
        rois = torch.cat([index[:, None], boxes.flatten(0, 1)], dim=1)
        if self.head is None:
            pooled = split_network(self.backbone)[1](_pool(maps[0], rois, 14)).mean((2, 3))
        else:
            pooled = self.head(_pool_levels(maps, rois, levels.flatten()))
        return self.projector(pooled).unflatten(0, (images, count))


def _pool(feature_map: Tensor, rois: Tensor, size: int) -> Tensor:
    """RoIAlign of `[R, 5]` rois, image index and relative corners xyxy: `[R, channels, size, size]`."""
    height, width = feature_map.shape[2:]
    return roi_align(feature_map, rois * rois.new_tensor([1, width, height, width, height]), size, aligned=True)


def _pool_levels(maps: Sequence[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """RoIAlign to 7 x 7 of each roi from its own feature map, in the order of the rois."""
    levels = torch.where(levels < 0, len(maps) - 1, levels)
    order = levels.argsort(stable=True)
    counts = levels.bincount(minlength=len(maps)).tolist()
    parts = rois[order].split(counts)
    pooled = torch.cat([_pool(feature_map, part, 7) for feature_map, part in zip(maps, parts, strict=True)])
    return pooled[order.argsort()]


class SoCoForPreTraining(MomentumModel):
    """
    Two encoders see views of the same images; the online one learns to predict the momentum one's embeddings of the
    same boxes in other views.

    There are no negatives: see [`~aligndet_hf.losses.box_similarity_loss`]. The momentum encoder is an exponential
    moving average of the online one: call [`~SoCoForPreTraining.update_momentum_encoder`] before each step but the
    first. It runs in training mode, with the statistics of its own batches, as in the official code.

    Args:
        config ([`SoCoConfig`]): the configuration. The weights are random.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig
    >>> from aligndet_hf import SoCoConfig, SoCoForPreTraining

    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
    ...                         out_features=["stage1", "stage2", "stage3", "stage4"])
    >>> config = SoCoConfig(backbone_config=backbone, fpn_channels=16, head_dim=32, mlp_dim=32, projection_dim=8)
    >>> model = SoCoForPreTraining(config).train()
    >>> sizes, counts = (64, 64, 32), (2, 1, 1)  # the first view shares one box with each of the two others
    >>> outputs = model(
    ...     pixel_values=[torch.rand(2, 3, size, size) for size in sizes],
    ...     boxes=[torch.tensor([0.1, 0.2, 0.7, 0.8]).repeat(2, count, 1) for count in counts],
    ...     levels=[torch.zeros(2, count, dtype=torch.int64) for count in counts],
    ...     ids=[torch.ones(2, count, dtype=torch.int64) for count in counts],
    ... )
    >>> outputs.loss.backward()
    >>> model.update_momentum_encoder(0.99)

    ```
    """

    config_class = SoCoConfig
    momentum_networks = {"momentum_encoder": "encoder"}
    momentum_delay = 1  # see `update_momentum_encoder`
    product = "backbone"
    next_stage = "aligndet pretrain --detector rt_detr --backbone"

    def __init__(self, config: SoCoConfig):
        super().__init__(config)
        self.encoder = SoCoEncoder(config)
        self.predictor = _mlp(config.projection_dim, config.mlp_dim, config.projection_dim)
        self.momentum_encoder = copy.deepcopy(self.encoder)
        self.post_init()
        self._update_momentum(0.0)
        self._freeze()

    def _init_weights(self, module: nn.Module) -> None:
        """Starts pyramids and heads as torchvision does (He et al., ICCV 2015), norms and the rest as PyTorch does."""
        convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        if isinstance(module, FeaturePyramidNetwork):
            for convolution in convolutions:
                nn.init.kaiming_uniform_(convolution.weight, a=1)
        elif isinstance(module, FastRCNNConvFCHead):
            for convolution in convolutions:
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            super()._init_weights(module)

    def networks(self) -> list[nn.Module]:
        """The two encoders."""
        return [self.encoder, self.momentum_encoder]

    def update_momentum(self, momentum: float) -> None:
        """The same as [`~SoCoForPreTraining.update_momentum_encoder`]."""
        self.update_momentum_encoder(momentum)

    @torch.no_grad()
    def update_momentum_encoder(self, momentum: float) -> None:
        """
        Moves the momentum encoder towards the online one.

        The official code does so within a step, before it embeds the keys; at its first step nothing moves. That is an
        update after every optimizer step, with the momentum of the *next* step.

        Args:
            momentum (`float`): share of the old values that stays, see
                [`~aligndet_hf.momentum.cosine_momentum`]; 0 copies.

        Raises:
            `ValueError`: if modules of the online encoder were wrapped or replaced.
        """
        self._update_momentum(momentum)

    @can_return_tuple
    def forward(
        self,
        pixel_values: list[Tensor],
        boxes: list[Tensor],
        levels: list[Tensor],
        ids: list[Tensor],
        output_hidden_states: bool | None = None,
    ) -> SoCoOutput:
        """
        One step's losses. Each argument is a list over the views, the one of the whole images first.

        Args:
            pixel_values (`list[torch.FloatTensor]` of shape `[images, 3, size, size]`): normalised images.
            boxes (`list[torch.FloatTensor]` of shape `[images, boxes, 4]`): corners xyxy, relative to the view. Those
                of the first view are one set after the other: see [`SoCoConfig.box_sets`].
            levels (`list[torch.LongTensor]` of shape `[images, boxes]`): the level of the pyramid to pool a box from;
                boxes of level -1 correspond to none.
            ids (`list[torch.LongTensor]` of shape `[images, boxes]`): which proposal of its image a box shows.
            output_hidden_states (`bool`, *optional*, defaults to the config's): whether to return `hidden_states`.
            return_dict (`bool`, *optional*, defaults to the config's): a tuple instead of the output if false.

        Raises:
            `ValueError`: if there are not as many views, or boxes in the first, as the variant has.
        """
        sets = self.config.box_sets
        count = boxes[1].shape[1] if len(boxes) > 1 else 0
        if len(pixel_values) != len(sets) + 1 or boxes[0].shape[1] != count * (max(sets) + 1):
            raise ValueError(
                f"variant {self.config.variant!r} takes {len(sets) + 1} views, and in the first the boxes of "
                f"{max(sets) + 1} others; got {len(pixel_values)} views with {[view.shape[1] for view in boxes]} boxes"
            )
        views = list(zip(pixel_values, boxes, levels, strict=True))
        hidden_states = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            hidden_states = tuple(tuple(self.encoder.feature_maps(view)) for view in pixel_values)
            embeddings = [self.encoder.embed(*view) for view in zip(hidden_states, boxes, levels, strict=True)]
        else:
            embeddings = [self.encoder(*view) for view in views]
        with torch.no_grad():
            momentum = [self.momentum_encoder(*view) for view in views]
        outputs = self.compare([self.predict(view) for view in embeddings], momentum, levels, ids)
        outputs.hidden_states = hidden_states
        return outputs

    def predict(self, embeddings: Tensor) -> Tensor:
        """What the momentum encoder is expected to say of these boxes: `[images, boxes, projection_dim]`, both."""
        return self.predictor(embeddings.flatten(0, 1)).view_as(embeddings)

    def compare(
        self, online: list[Tensor], momentum: list[Tensor], levels: list[Tensor], ids: list[Tensor]
    ) -> SoCoOutput:
        """The losses of predictions and momentum embeddings, one of each for each view; the rest as in `forward`."""
        losses, count = {}, levels[1].shape[1]
        for view, index in enumerate(self.config.box_sets, start=1):
            shared = slice(index * count, (index + 1) * count)
            is_placed = (levels[0][:, shared, None] >= 0) & (levels[view][:, None] >= 0)
            pairs = (ids[0][:, shared, None] == ids[view][:, None]) & is_placed
            forwards = box_similarity_loss(online[0][:, shared], momentum[view], pairs)
            backwards = box_similarity_loss(online[view], momentum[0][:, shared], pairs.mT)
            losses[f"loss_view{view + 1}"] = forwards + backwards
        return SoCoOutput(
            loss=sum(losses.values()),
            loss_dict=losses,
            metrics=contrastive_diagnostics(
                online[0][:, :count].detach().flatten(0, 1),
                momentum[1].flatten(0, 1),
                _ids_in_batch(ids[0][:, :count], levels[0][:, :count]),
                _ids_in_batch(ids[1], levels[1]),
            ),
            embeddings=online,
        )

    def export(self, folder: Path, image_processor: BaseImageProcessor) -> None:
        """
        Saves the backbone to `folder/backbone`, for `--backbone_weights`, and with pyramid and head to
        `folder/torchvision.safetensors`.
        """
        self.export_backbone(folder / self.product, image_processor.image_mean, image_processor.image_std)
        if self.encoder.head is not None:
            self.export_torchvision(folder / TORCHVISION)

    def export_backbone(self, path: str | Path, image_mean: list[float], image_std: list[float]) -> None:
        """
        Saves the backbone for detectors; see [`~aligndet_hf.detectors.backbones.save_backbone`].

        Args:
            path (`str` or `Path`): the folder to write.
            image_mean, image_std (`list[float]`): what the images were normalised with, per channel.
        """
        save_backbone(self.encoder.backbone, path, image_mean, image_std)

    def export_torchvision(self, path: str | Path) -> None:
        """
        Saves backbone, feature pyramid and box head under the names of torchvision's Faster R-CNN with norms.

        Args:
            path (`str` or `Path`): the safetensors file to write. See
                [`~aligndet_hf.detectors.torchvision_weights.load_torchvision_weights`].

        Raises:
            `ValueError`: for the variant "c4", which has neither a pyramid nor such a head.
        """
        if self.encoder.neck is None or self.encoder.head is None:
            raise ValueError("variant 'c4' trains no feature pyramid and no box head: export the backbone")
        parts = {
            "backbone.body.": tensors_of(self.encoder.backbone),
            "backbone.fpn.": self.encoder.neck.state_dict(),
            "roi_heads.box_head.": self.encoder.head.state_dict(),
        }
        tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _ids_in_batch(ids: Tensor, levels: Tensor) -> Tensor:
    """Ids of boxes `[images, boxes]` made unique in the batch, -1 for boxes without a level: `[images * boxes]`."""
    offset = (ids.max() + 1) * torch.arange(len(ids), device=ids.device)
    return torch.where(levels < 0, -1, ids + offset[:, None]).flatten()
