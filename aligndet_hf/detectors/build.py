"""Building and loading detectors: one function for checkpoints and for new detectors around a timm backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoModelForObjectDetection

from .backbones import check_backbone, image_statistics, load_backbone_weights, timm_backbone_config
from .families import FAMILIES, family_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


@dataclass
class DetectorArguments:
    """The detector a command works on."""

    detector: str = field(
        default="rt_detr",
        metadata={
            "help": "Folder or Hub id of a detector checkpoint, or a family to build a new detector of: "
            + ", ".join(sorted(FAMILIES))
            + "."
        },
    )
    backbone: str | None = field(
        default="resnet50", metadata={"help": "timm name of a new detector's backbone. Ignored for checkpoints."}
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of a new detector's backbone: a .safetensors file with timm's names, or 'timm' to "
            "download timm's own. Without it the backbone is random, which only makes sense if it is trained."
        },
    )
    freeze_batch_norm: bool = field(
        default=True,
        metadata={
            "help": "Keep the statistics of a new detector's backbone norms. Set to false when a random backbone is "
            "to be trained."
        },
    )
    detector_config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Fields of a new detector's config as JSON (a mapping in YAML), e.g. '{\"num_queries\": 60}'."
        },
    )


def build_detector(
    model_type: str,
    *,
    backbone: str = "resnet50",
    backbone_weights: str | Path | None = None,
    freeze_batch_norm: bool = True,
    num_labels: int = 1,
    id2label: dict[int, str] | None = None,
    **config: Any,
) -> PreTrainedModel:
    """
    A new detector with random weights around a timm backbone.

    Args:
        model_type (`str`): a family of [`~aligndet_hf.detectors.families.FAMILIES`].
        backbone (`str`, *optional*, defaults to `"resnet50"`): timm name of the backbone.
        backbone_weights (`str` or `Path`, *optional*): see
            [`~aligndet_hf.detectors.backbones.load_backbone_weights`].
        freeze_batch_norm (`bool`, *optional*, defaults to `True`): whether the backbone's norms keep their statistics.
        num_labels (`int`, *optional*, defaults to 1): number of classes.
        id2label (`dict[int, str]`, *optional*): their names.
        config: further fields of the family's config. `strides` replaces the strides of the feature maps taken from
            the backbone, for instance `strides=[16]` for a DETR on a finer map.

    Raises:
        `ValueError`: for an unknown family, backbone or config field.

    Example:

    ```python
    >>> from aligndet_hf.detectors.build import build_detector

    >>> detector = build_detector("conditional_detr", backbone="resnet10t", num_labels=3, d_model=64)
    >>> detector.config.num_labels, detector.config.auxiliary_loss
    (3, True)

    ```
    """
    if model_type not in FAMILIES:
        raise ValueError(f"unknown detector family {model_type!r}; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    backbone_config, channels, strides = timm_backbone_config(
        backbone, tuple(config.pop("strides", family.strides)), freeze_batch_norm
    )
    defaults = AutoConfig.for_model(model_type)
    unknown = sorted(name for name in config if not hasattr(defaults, name))
    if unknown:
        raise ValueError(f"{model_type} has no config field {', '.join(unknown)}")
    hidden_size = config.get("d_model", config.get("hidden_size", defaults.hidden_size))
    names = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}} if id2label else {}
    detector = AutoModelForObjectDetection.from_config(
        AutoConfig.for_model(
            model_type,
            **{
                **dict(family.defaults),
                **family.backbone_fields(channels, strides, hidden_size),
                **config,
                "backbone_config": backbone_config,
                "num_labels": num_labels,
                **names,
            },
        )
    )
    check_backbone(detector)
    if backbone_weights is not None:
        load_backbone_weights(detector, backbone_weights)
    return detector


def load_detector(
    arguments: DetectorArguments, num_labels: int, id2label: dict[int, str] | None = None
) -> PreTrainedModel:
    """
    The detector that a command's arguments name: a new one, or a checkpoint's.

    A checkpoint keeps its weights and classes, whatever their number; to give it other classes use
    [`~aligndet_hf.detectors.transfer.transfer_detector`].

    Args:
        arguments ([`DetectorArguments`]): the arguments.
        num_labels (`int`): number of classes of a new detector.
        id2label (`dict[int, str]`, *optional*): their names.

    Raises:
        `ValueError`: if the checkpoint's family is not supported, or the backbone has lost its activations.
    """
    if is_new(arguments):
        return build_detector(
            arguments.detector,
            backbone=arguments.backbone,
            backbone_weights=arguments.backbone_weights,
            freeze_batch_norm=arguments.freeze_batch_norm,
            num_labels=num_labels,
            id2label=id2label,
            **(arguments.detector_config or {}),
        )
    detector = AutoModelForObjectDetection.from_pretrained(arguments.detector)
    family_of(detector.config)
    check_backbone(detector)
    return detector


def is_new(arguments: DetectorArguments) -> bool:
    """Whether the arguments name a family to build rather than a checkpoint; a folder of that name is a checkpoint."""
    return arguments.detector in FAMILIES and not Path(arguments.detector).is_dir()


def build_image_processor(detector: PreTrainedModel, size: int, max_size: int | None = None) -> BaseImageProcessor:
    """
    The image processor to save with a detector, so that `pipeline` prepares images as training did.

    Args:
        detector (`PreTrainedModel`): the detector; its backbone gives mean and standard deviation.
        size (`int`): shortest edge in pixels, or side of the square for families that resize to squares.
        max_size (`int`, *optional*): bound of the longest edge, by default 1333 / 800 of `size`; unused for squares.
    """
    family = family_of(detector.config)
    mean, std = image_statistics(detector.config)
    if family.resize == "square":
        extent = {"height": size, "width": size}
    else:
        extent = {"shortest_edge": size, "longest_edge": max_size or round(size * 1333 / 800)}
    processor_class = getattr(transformers, family.image_processor)
    return processor_class(size=extent, do_normalize=True, image_mean=mean, image_std=std)
