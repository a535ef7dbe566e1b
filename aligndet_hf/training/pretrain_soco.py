"""SoCo's own part of a pre-training run: its model and its views."""

from collections.abc import Callable

import datasets
import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor, DetrImageProcessor

from ..data.collate import collate_soco
from ..data.dataset import SoCoViews
from ..detectors.backbone_weights import BackboneReport, load_weights
from ..detectors.backbones import build_backbone_config, image_statistics
from ..detectors.build import backbone_source
from ..models import SoCoConfig, SoCoForPreTraining
from ..processes import is_distributed, trains_on_cpu
from .pretrain_arguments import PretrainArguments


def build_model(
    arguments: PretrainArguments, dataset: datasets.Dataset
) -> tuple[SoCoForPreTraining, BaseImageProcessor, BackboneReport | None]:
    """The model to train, what normalises its images, and the report of the weights that its backbone got."""
    torch.manual_seed(arguments.seed)
    strides = (16, 32) if arguments.soco_config.get("variant") == "c4" else (4, 8, 16, 32)
    name, weights = backbone_source(arguments)
    backbone, _, _ = build_backbone_config(name, strides, freeze_batch_norm=False)
    checkpoint, backbone._name_or_path = backbone._name_or_path, ""
    config = SoCoConfig(backbone_config=backbone, **arguments.soco_config)
    config._name_or_path = checkpoint  # where the statistics are
    mean, std = image_statistics(config)
    config._name_or_path = ""
    model = SoCoForPreTraining(config).train().to(memory_format=torch.channels_last)  # on CPUs a fourth faster
    if arguments.backbone_weights is None:
        weights = checkpoint
    report = load_weights(model.encoder.backbone, backbone, weights) if weights else None
    model.update_momentum_encoder(0.0)
    if is_distributed() and not trains_on_cpu(arguments.use_cpu):
        from timm.layers import convert_sync_batchnorm

        # The statistics are the whole batch's, as in the official code; PyTorch has that for GPUs alone.
        model = convert_sync_batchnorm(model)
    return model, DetrImageProcessor(image_mean=mean, image_std=std), report


def build_views(
    arguments: PretrainArguments, accelerator: Accelerator, dataset: datasets.Dataset, config: SoCoConfig
) -> tuple[SoCoViews, Callable]:
    """The data set of views for a model of this config, and the function that makes batches of its items."""
    level_sizes = None if config.variant == "c4" else config.level_sizes
    if level_sizes and max(arguments.image_sizes) > level_sizes[-1]:
        raise ValueError(
            f"boxes in views of {max(arguments.image_sizes)} pixels can be larger than the last of level_sizes "
            f"{level_sizes}, and would be left out: raise it in --level_sizes"
        )
    views = SoCoViews(
        dataset,
        arguments.image_sizes,
        config.box_sets,
        level_sizes,
        seed=arguments.seed,
        max_proposals=arguments.max_proposals,
        proposal_sampling=arguments.proposal_sampling,
        crop_scale=tuple(arguments.crop_scale),
        flip_probability=arguments.flip_probability,
        color=arguments.color,
    )
    return views, collate_soco
