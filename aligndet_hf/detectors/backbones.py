"""Backbones inside detectors: finding them, building them from timm, loading their weights, freezing them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TimmBackboneConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .families import backbone_path, freeze_constants

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def get_backbone(detector: PreTrainedModel) -> nn.Module:
    """
    The image network inside a detector: pixels in, feature maps out.

    A detector without one, such as YOLOS, gives an empty module: there is nothing to freeze or to load.
    """
    path = backbone_path(detector)
    return nn.Module() if path is None else detector.get_submodule(path)


def set_backbone_trainable(detector: PreTrainedModel, trainable: bool) -> None:
    """
    Freezes or unfreezes the whole backbone of a detector, overriding what transformers chose.

    transformers freezes some stems, nothing or everything, depending on the backbone's kind, and forgets about it in
    `from_pretrained`: call this after loading. It sets `requires_grad`; norms keep their running statistics where the
    backbone was built with frozen norms, which is the default here.

    Args:
        detector (`PreTrainedModel`): the detector, changed in place.
        trainable (`bool`): whether the backbone's parameters shall receive gradients.
    """
    get_backbone(detector).requires_grad_(trainable)
    freeze_constants(detector)


def timm_backbone_config(
    name: str, strides: tuple[int, ...], freeze_batch_norm: bool = True
) -> tuple[TimmBackboneConfig, list[int], list[int]]:
    """
    The config of a timm backbone that returns the feature maps of the given strides.

    Args:
        name (`str`): a timm model with `features_only` support, such as `"resnet50"`.
        strides (`tuple[int, ...]`): wanted strides, ascending. A stride that the backbone lacks is an error.
        freeze_batch_norm (`bool`, *optional*, defaults to `True`): whether batch norms keep their statistics.

    Returns:
        `tuple`: the config, and the channels and strides of the feature maps.

    Raises:
        `ValueError`: if timm does not know the model or it has no such feature maps.
    """
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models()) or ["see timm.list_models()"]
        raise ValueError(f"timm has no model {name!r}; similar names: {', '.join(similar)}")
    with torch.device("meta"):  # only the shapes are wanted
        info = timm.create_model(name, features_only=True, pretrained=False).feature_info
    found = {reduction: index for index, reduction in enumerate(info.reduction())}
    missing = [stride for stride in strides if stride not in found]
    if missing:
        raise ValueError(
            f"backbone {name!r} has feature maps of stride {sorted(found)}, but the detector needs {list(strides)}"
        )
    levels = [found[stride] for stride in strides]
    config = TimmBackboneConfig(backbone=name, out_indices=levels, freeze_batch_norm_2d=freeze_batch_norm)
    return config, [info.channels()[level] for level in levels], list(strides)


def load_backbone_weights(detector: PreTrainedModel, weights: str | Path) -> list[str]:
    """
    Loads the weights of a timm backbone into a detector, strictly.

    Args:
        detector (`PreTrainedModel`): a detector with a timm backbone, changed in place.
        weights (`str` or `Path`):
            a `.safetensors` file with timm's parameter names, or `"timm"` for timm's own pre-trained weights.

    Returns:
        `list[str]`: tensors of the file that the backbone does not use, such as a classifier.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file lacks a tensor of the backbone or one has another shape.
    """
    backbone = get_backbone(detector)
    trunk = getattr(backbone, "_backbone", backbone)  # some families keep transformers' wrapper around timm's network
    if weights == "timm":
        name = detector.config.backbone_config.backbone
        tensors = timm.create_model(name, features_only=True, pretrained=True).state_dict()
    else:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"backbone weights {weights} not found: expected a .safetensors file or 'timm'")
        tensors = load_file(weights)
    available = {_flat(name): name for name in tensors}
    chosen: dict[str, Tensor] = {}
    problems = []
    for name, parameter in trunk.state_dict().items():
        source = available.pop(_flat(name), None)
        if source is None:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
        elif tensors[source].shape != parameter.shape:
            problems.append(f"{name} has shape {list(tensors[source].shape)}, expected {list(parameter.shape)}")
        else:
            chosen[name] = tensors[source]
    if problems:
        raise ValueError(
            f"{weights} does not fit backbone {detector.config.backbone_config.backbone!r}: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        )
    trunk.load_state_dict(chosen, strict=False)
    return sorted(name for name in available.values() if not name.endswith("num_batches_tracked"))


def _flat(name: str) -> str:
    """timm's feature extractors join the names of nested stages with underscores: `stages.0` becomes `stages_0`."""
    return name.replace(".", "_")


def image_statistics(config: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation, per channel in 0..1, that a detector's backbone expects its images normalised with.

    Args:
        config (`PreTrainedConfig`): the config of a detector. timm backbones name their own values; others get
            ImageNet's.
    """
    backbone = getattr(config, "backbone_config", None)
    if backbone is not None and backbone.model_type == "timm_backbone":
        pretrained = timm.get_pretrained_cfg(backbone.backbone, allow_unregistered=True)
        if pretrained is not None:
            return list(pretrained.mean), list(pretrained.std)
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


def check_backbone(detector: PreTrainedModel) -> None:
    """
    Refuses a detector whose timm backbone has silently lost its activations.

    Some timm networks keep their activations inside their norm layers, and transformers replaces live norm layers of
    a detector's backbone by plain frozen ones. Frozen timm norms, the default of
    [`~aligndet_hf.detectors.build.build_detector`], are left alone.

    Args:
        detector (`PreTrainedModel`): any detector.

    Raises:
        `ValueError`: if norm layers with activations are missing.
    """
    config = getattr(detector.config, "backbone_config", None)
    if config is None or config.model_type != "timm_backbone":
        return
    with torch.device("meta"):
        reference = timm.create_model(config.backbone, features_only=True, out_indices=config.out_indices)
    backbone = get_backbone(detector)
    if _count_activated_norms(backbone) < _count_activated_norms(reference):
        raise ValueError(
            f"the {config.backbone!r} backbone of this detector has lost its activations: transformers replaced norm "
            "layers that hold them. Set backbone_config.freeze_batch_norm_2d=True in the detector's config.json and "
            "load again"
        )


def _count_activated_norms(module: nn.Module) -> int:
    return sum(hasattr(child, "drop") and hasattr(child, "act") for child in module.modules())
