"""Backbones inside detectors: finding them, building their configs, freezing them, checking them."""

from __future__ import annotations

import copy
import difflib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, TimmBackboneConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_FOR_BACKBONE_MAPPING_NAMES

from .families import backbone_path, freeze_constants

# timm is imported where it is needed: the models import this module, and shall load quickly.

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Two sizes to try backbones with: multiples of every usual patch and window, and a size that is a multiple of nothing.
EVEN_SIZE, ODD_SIZE = (448, 896), (451, 899)


def get_backbone(detector: PreTrainedModel) -> nn.Module:
    """
    The image network inside a detector: pixels in, feature maps out.

    A detector without one, such as YOLOS, gives an empty module: there is nothing to freeze or to load.
    """
    path = backbone_path(detector)
    return nn.Module() if path is None else detector.get_submodule(path)


# --- freezing --------------------------------------------------------------------------------------------------------


def set_backbone_trainable(detector: PreTrainedModel, trainable: bool, stages: int | None = None) -> None:
    """
    Freezes or unfreezes the backbone of a detector or its first stages, overriding what transformers chose.

    transformers freezes some stems, nothing or everything, depending on the backbone's kind, and forgets about it in
    `from_pretrained`: call this after loading. It sets `requires_grad`; see [`eval_frozen`] for the statistics of
    norms that are not frozen by their kind.

    Args:
        detector (`PreTrainedModel`): the detector, changed in place.
        trainable (`bool`): whether the backbone's parameters shall receive gradients.
        stages (`int`, *optional*): train only this many stages, counted from the last; all of them by default. Stages
            are those that timm or transformers take feature maps from: of a ResNet the stem and four more, of a ViT
            its blocks.

    Raises:
        `ValueError`: if the backbone has fewer stages, or `trainable` is false and stages are given.
    """
    backbone = get_backbone(detector)
    freeze_constants(detector)
    if stages is None:
        backbone.requires_grad_(trainable)
        return
    if not trainable:
        raise ValueError(f"the backbone is either frozen or its last {stages} stages are trained")
    if backbone_path(detector) is None:
        raise ValueError(f"a detector of type {detector.config.model_type!r} has no backbone to train stages of")
    modules = list(_network(backbone).modules())
    starts = _stage_starts(backbone)
    if not 0 < stages <= len(starts):
        raise ValueError(f"the last {stages} stages of the backbone cannot be trained: it has {len(starts)}")
    backbone.requires_grad_(False)
    for module in modules[starts[-stages] :]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)


def freeze_batch_norms(backbone: nn.Module) -> None:
    """
    Freezes the live batch norms of a backbone; with [`eval_frozen`] their statistics stay as well.

    Detectors of the DETR family never have any: transformers replaces them by frozen ones.

    Args:
        backbone (`nn.Module`): changed in place.
    """
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)


def eval_frozen(module: nn.Module) -> None:
    """
    Puts the frozen parts of a module in evaluation mode: running statistics stay, and nothing is dropped.

    Args:
        module (`nn.Module`): changed in place. A part is frozen if it has parameters, and none of them is trained.
    """
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
    else:
        for child in module.children():
            eval_frozen(child)


def normalize_in_one_pass(module: nn.Module) -> None:
    """
    Makes frozen batch norms compute with PyTorch's own operator, in place.

    The norms of timm and transformers multiply and add in two passes over the feature map, and under autocast in
    float32, although the convolutions around them are in half precision.

    Args:
        module (`nn.Module`): a backbone, or what contains it.
    """
    for norm in module.modules():
        if type(norm).__name__.endswith(("FrozenBatchNorm2d", "FrozenBatchNormAct2d")):
            norm.forward = partial(_frozen_norm, norm)


def _frozen_norm(norm: nn.Module, x: Tensor) -> Tensor:
    # transformers' have no attribute for theirs.
    epsilon = getattr(norm, "eps", 1e-5)
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=epsilon)
    return norm.act(norm.drop(x)) if hasattr(norm, "act") else x


def _network(backbone: nn.Module) -> nn.Module:
    """The network itself: some families keep transformers' wrapper around timm's, and timm has a wrapper for ViTs."""
    network = getattr(backbone, "_backbone", backbone)
    return network.model if [name for name, _ in network.named_children()] == ["model"] else network


def _stage_starts(backbone: nn.Module) -> list[int]:
    """Where the stages of a backbone start, as indices into its network's modules."""
    names = [_flat(name) for name, _ in _network(backbone).named_modules()]
    info = getattr(getattr(backbone, "_backbone", backbone), "feature_info", None)
    if info is not None:  # timm names the modules whose output is a feature map
        ends = []
        for tap in (_flat(item["module"]) for item in info.info):
            inside = [index for index, name in enumerate(names) if name == tap or name.startswith(f"{tap}_")]
            ends += inside[-1:]  # timm removes stages that are not used
        return [0] + [end + 1 for end in ends[:-1]]
    # transformers has a list of stages or layers, with as many as the config names
    stage_names = getattr(backbone.config, "stage_names", None)
    has_stem = not stage_names or "stem" in stage_names
    count = len(stage_names) - has_stem if stage_names else backbone.config.num_hidden_layers
    for name, module in _network(backbone).named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            starts = [names.index(_flat(f"{name}.{index}")) for index in range(count)]
            return [0] + (starts if has_stem else starts[1:])
    raise ValueError(f"the stages of a {type(backbone).__name__} are not known: freeze or train all of it")


def _flat(name: str) -> str:
    """timm's feature extractors join the names of nested stages with underscores: `stages.0` becomes `stages_0`."""
    return name.replace(".", "_")


# --- configs ---------------------------------------------------------------------------------------------------------


def find_backbone(backbone: str | PreTrainedConfig) -> PreTrainedConfig:
    """
    The config of a backbone of timm or transformers.

    Args:
        backbone (`str` or `PreTrainedConfig`): a config, or a name:

            - a timm model with `features_only` support, such as `"resnet50"` (also as its Hub id, `"timm/resnet50"`),
            - the folder or Hub id of a transformers checkpoint, such as `"facebook/dinov2-small"`,
            - a transformers model type, such as `"swin"`, for its default config.

    Returns:
        `PreTrainedConfig`: the config. `_name_or_path` is set if there is a checkpoint with weights.

    Raises:
        `ValueError`: if there is no such backbone, or transformers has no backbone class for it.
        `OSError`: if a Hub id cannot be loaded.
    """
    import timm

    if isinstance(backbone, PreTrainedConfig):
        config = copy.deepcopy(backbone)
    elif (Path(backbone) / "config.json").is_file():
        config = AutoConfig.from_pretrained(backbone)
    elif timm.is_model(str(backbone).removeprefix("timm/")):
        config = TimmBackboneConfig(backbone=str(backbone).removeprefix("timm/"))
    elif backbone in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        config = AutoConfig.for_model(backbone)
    elif "/" in str(backbone):
        try:
            config = AutoConfig.from_pretrained(backbone)
        except (OSError, ValueError) as error:
            raise OSError(
                f"backbone {backbone!r} is not a folder with a config.json, and could not be loaded from the Hub: "
                f"{str(error).splitlines()[0]}"
            ) from error
    else:
        known = [*timm.list_models(), *MODEL_FOR_BACKBONE_MAPPING_NAMES]
        similar = difflib.get_close_matches(str(backbone), known) or ["see timm.list_models()"]
        raise ValueError(
            f"{backbone!r} is no timm model, transformers model type or checkpoint; similar: {', '.join(similar)}"
        )
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        inside = Path(backbone, "backbone") if isinstance(backbone, str | Path) else None
        hint = f": give {inside}" if inside and (inside / "config.json").is_file() else ""  # a run of SoCo
        raise ValueError(f"transformers has no backbone of type {config.model_type!r} (from {backbone!r}){hint}")
    name = config._name_or_path
    # Through JSON: some defaults are tuples where the models need lists, as they are in every saved config.
    config = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    config._name_or_path = name
    return config


def build_backbone_config(
    backbone: str | PreTrainedConfig,
    strides: tuple[int, ...],
    *,
    freeze_batch_norm: bool = True,
    any_stride: bool = False,
    any_size: bool = True,
) -> tuple[PreTrainedConfig, list[int], list[int]]:
    """
    The config of a backbone that returns the feature maps of the given strides.

    Strides and channels are seen in a forward pass of the backbone without data, on the meta device.

    Args:
        backbone (`str` or `PreTrainedConfig`): see [`find_backbone`].
        strides (`tuple[int, ...]`): wanted strides, ascending.
        freeze_batch_norm (`bool`, *optional*, defaults to `True`): whether batch norms of a timm backbone keep their
            statistics. The statistics of transformers backbones are up to the detector's config.
        any_stride (`bool`, *optional*, defaults to `False`): take the deepest feature map of a backbone that lacks the
            strides, such as a ViT, instead of failing.
        any_size (`bool`, *optional*, defaults to `True`): whether the images can have any size, and not only multiples
            of 32 pixels.

    Returns:
        `tuple`: the config, and the channels and strides of the feature maps.

    Raises:
        `ValueError`: if there is no such backbone, it has no such feature maps, or it takes images of one size only.
    """
    config = find_backbone(backbone)
    name = getattr(config, "backbone", None) or config._name_or_path or config.model_type
    maps = _probe(config, name, [EVEN_SIZE, ODD_SIZE] if any_size else [EVEN_SIZE])
    found = {}
    for level, (channels, stride) in maps.items():
        found[stride] = level, channels  # of several with one stride the deepest
    if any_stride and not set(strides) <= set(found):
        strides = (max(found),)
    if missing := [stride for stride in strides if stride not in found]:
        raise ValueError(
            f"backbone {name!r} has feature maps of stride {sorted(found)}, but the detector needs {list(strides)}: "
            f"{missing} is missing. "
            + (
                "Plain ViTs fit detectors with a single feature map, such as detr and conditional_detr"
                if len(found) == 1
                else "Set `strides` to ones that it has, if the detector's family allows"
            )
        )
    levels = [found[stride][0] for stride in strides]
    if isinstance(config, TimmBackboneConfig):
        config.out_indices, config.freeze_batch_norm_2d = levels, freeze_batch_norm
    else:
        config.out_features = levels
    return config, [found[stride][1] for stride in strides], list(strides)


def _probe(config: PreTrainedConfig, name: str, sizes: list[tuple[int, int]]) -> dict[int | str, tuple[int, int]]:
    """Channels and stride of the feature maps of every level of a backbone, by its index (timm) or stage name."""
    import timm

    with torch.device("meta"), torch.no_grad():  # only the shapes are wanted
        try:
            if isinstance(config, TimmBackboneConfig):
                network = timm.create_model(config.backbone, features_only=True)
                levels = list(network.feature_info.out_indices)
            else:
                config = copy.deepcopy(config)
                levels = config.out_features = list(config.stage_names)
                network = AutoBackbone.from_config(config).to("meta")  # some parameters are made elsewhere
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(f"backbone {name!r} gives no feature maps: {error}") from error
        for height, width in sizes:
            try:
                outputs = network.eval()(torch.zeros(1, 3, height, width))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"backbone {name!r} does not take images of {height} x {width} pixels ({error}), and detectors "
                    "see many sizes. Take one that is free of size, such as a CNN, or a ViT of transformers like "
                    "facebook/dinov2-small"
                ) from error
            maps = getattr(outputs, "feature_maps", outputs)
            if height == EVEN_SIZE[0]:
                shapes = [tuple(feature_map.shape[1:]) for feature_map in maps]
    if any(height * EVEN_SIZE[1] != width * EVEN_SIZE[0] for _, height, width in shapes):
        raise ValueError(f"the feature maps of backbone {name!r} have their channels last, detectors need them first")
    return {
        level: (channels, round(EVEN_SIZE[0] / height))
        for level, (channels, height, _) in zip(levels, shapes, strict=True)
    }


# --- parts and files -------------------------------------------------------------------------------------------------


def split_network(backbone: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """
    A backbone in two parts: from the image to its first feature map, and from there on.

    Args:
        backbone (`nn.Module`): a backbone of timm whose modules follow one another, as in ResNets. The parts
            are its own modules, not copies.

    Raises:
        `ValueError`: for any other backbone.
    """
    network = getattr(backbone, "_backbone", backbone)
    taps = getattr(network, "return_layers", None)
    if not taps or not isinstance(network, nn.ModuleDict):  # timm's feature extractors for such networks
        raise ValueError(
            f"a {type(network).__name__} cannot be divided before its last stage: take a ResNet or RegNet of timm"
        )
    modules = list(network.values())
    cut = list(network).index(next(iter(taps))) + 1
    return nn.Sequential(*modules[:cut]), nn.Sequential(*modules[cut:])


def tensors_of(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a backbone by the names that timm or transformers gives them, without any wrapper's."""
    return {name: tensor.contiguous() for name, tensor in _network(backbone).state_dict().items()}


def save_backbone(
    backbone: PreTrainedModel, path: str | Path, image_mean: list[float], image_std: list[float]
) -> None:
    """
    Saves a backbone as a folder that `--backbone` and `--backbone_weights` of every command take.

    Args:
        backbone (`PreTrainedModel`): a backbone of transformers, or its wrapper of one of timm.
        path (`str` or `Path`): the folder to write: `config.json`, `model.safetensors` ([`tensors_of`] it) and
            `preprocessor_config.json` with mean and standard deviation.
        image_mean, image_std (`list[float]`): what its images are normalised with, per channel, in 0..1.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(backbone.config)
    config._name_or_path = ""  # a path of this machine
    config.save_pretrained(path)
    save_file(tensors_of(backbone), path / "model.safetensors", metadata={"format": "pt"})
    processor = {"do_normalize": True, "image_mean": list(image_mean), "image_std": list(image_std)}
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


# --- images ----------------------------------------------------------------------------------------------------------


def image_statistics(config: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation, per channel in 0..1, that a detector expects its images normalised with.

    Args:
        config (`PreTrainedConfig`): the config of a detector. What counts is the image processor of the checkpoint
            that it, or its backbone, was loaded from, then timm's values for the backbone, then ImageNet's.
    """
    if config._name_or_path:
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(config._name_or_path)
        except OSError:  # the checkpoint has none
            processor = {}
        if not processor.get("do_normalize", True):
            return [0.0] * 3, [1.0] * 3
        if processor.get("image_mean") and processor.get("image_std"):
            return list(processor["image_mean"]), list(processor["image_std"])
    backbone = getattr(config, "backbone_config", None)
    if backbone is not None and backbone.model_type == "timm_backbone":
        import timm

        pretrained = timm.get_pretrained_cfg(backbone.backbone, allow_unregistered=True)
        if pretrained is not None:
            return list(pretrained.mean), list(pretrained.std)
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


# --- the activation trap ---------------------------------------------------------------------------------------------


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
    import timm

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
