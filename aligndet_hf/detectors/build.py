"""Building and loading detectors: one function for checkpoints and for new detectors around a backbone."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForObjectDetection
from transformers.utils import cached_file

from ..arguments import Arguments, is_trained
from ..checkpoint import open_checkpoint, open_processor
from ..convnets.modeling_torchvision import TorchvisionDetector
from ..files import similar_path, write_json
from ..flags import flag, nearest
from ..objects import Given, as_source, copy_of
from ..runs import RECORD
from .backbone_weights import BackboneReport, load_backbone_weights
from .backbones import build_backbone_config, check_backbone, get_backbone, image_statistics
from .class_losses import CLASS_LOSSES
from .classes import class_fields
from .families import FAMILIES, Family, backbone_path, family_of
from .published import hub_id

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

    from .transfer import TransferReport

# Probability of every class that focal losses start from.
CLASS_PRIOR = 0.01


@dataclass(kw_only=True)
class DetectorArguments(Arguments):
    """The detector that a training starts from."""

    detector: str = flag(
        "rt_detr",
        "start",
        "folder, published file or Hub id of a detector, or a short name such as `rt_detr_r18` "
        "(docs/families.md has all), or a family to build a new detector of: " + ", ".join(sorted(FAMILIES)),
        is_path=True,
    )
    backbone: str | None = flag(
        None,
        "start",
        "a new detector's backbone: a timm name, or a folder or Hub id of a transformers checkpoint "
        "(`facebook/dinov2-small`), whose weights come with it. resnet50 if not given; not for "
        + ", ".join(sorted(name for name, family in FAMILIES.items() if not family.strides))
        + ", which have their own. Ignored for checkpoints",
        is_path=True,
    )
    backbone_weights: str | None = flag(
        None,
        "start",
        "weights of a new detector's backbone: a .safetensors or .pth file, also of MoCo, SwAV, DINO or SoCo (whose "
        "torchvision.safetensors gives detectors of torchvision pyramid and box head, too), `timm` to download timm's "
        "own, or `none` for random ones. If not given: `timm` for the default backbone, those that come with a "
        "transformers checkpoint, and random ones for another timm name",
        is_path=True,
    )
    freeze_batch_norm: bool = flag(
        True,
        "start",
        "keep the statistics of a new detector's backbone norms. Set to false when a random backbone is to be trained",
    )
    detector_config: dict[str, Any] | None = flag(
        None, "start", "fields of a new detector's config as JSON (a mapping in YAML), e.g. '{\"num_queries\": 60}'"
    )


def build_detector(
    model_type: str,
    *,
    backbone: str | PreTrainedConfig | None = None,
    backbone_weights: str | Path | None = None,
    freeze_batch_norm: bool = True,
    num_labels: int | None = None,
    id2label: dict[int, str] | list[str] | None = None,
    **config: Any,
) -> PreTrainedModel:
    """
    A new detector with random weights around a backbone of timm or transformers.

    Args:
        model_type (`str`): a family of [`~aligndet_hf.detectors.families.FAMILIES`].
        backbone (`str` or `PreTrainedConfig`, *optional*): a timm name, a transformers checkpoint or model type, or a
            config: see [`~aligndet_hf.detectors.backbones.find_backbone`]. A ResNet-50 by default. Families without
            `strides` in the table take none; the field `backbone_config` changes theirs.
        backbone_weights (`str` or `Path`, *optional*): see
            [`~aligndet_hf.detectors.backbone_weights.load_backbone_weights`]. By default the weights of a transformers
            checkpoint; other backbones are random.
        freeze_batch_norm (`bool`, *optional*, defaults to `True`): whether the backbone's norms keep their statistics.
        num_labels (`int`, *optional*): number of classes; as many as there are names, or one, if not given.
        id2label (`dict[int, str]` or `list[str]`, *optional*): their names.
        config: further fields of the family's config. `strides` replaces the strides of the feature maps taken from
            the backbone, for instance `strides=[16]` for a DETR on a finer map.

    Raises:
        `ValueError`: for an unknown family, backbone or config field, or another number of classes than of names.

    Example:

    ```python
    >>> from aligndet_hf.detectors.build import build_detector

    >>> detector = build_detector("conditional_detr", backbone="resnet10t", num_labels=3, d_model=64)
    >>> detector.config.num_labels, detector.config.auxiliary_loss
    (3, True)

    ```
    """
    return _build(model_type, backbone, backbone_weights, freeze_batch_norm, num_labels, id2label, config)[0]


def _build(
    model_type: str,
    backbone: str | PreTrainedConfig | None,
    backbone_weights: str | Path | None,
    freeze_batch_norm: bool,
    num_labels: int | None,
    id2label: dict[int, str] | list[str] | None,
    fields: dict[str, Any],
) -> tuple[PreTrainedModel, BackboneReport | TransferReport | None]:
    """[`build_detector`] with the report of the weights, if it has any: of SoCo's pyramid and head a transfer's."""
    if model_type not in FAMILIES:
        advice = f"{nearest(str(model_type), FAMILIES)}. Supported are {', '.join(sorted(FAMILIES))}"
        raise ValueError(f"unknown detector family {model_type!r}{advice}")
    family, defaults = FAMILIES[model_type], AutoConfig.for_model(model_type)
    require_config_fields(defaults, fields.keys() - {"strides"})
    fields = dict(family.defaults) | fields | class_fields(num_labels, id2label)
    if isinstance(own := fields.get("backbone_config"), dict):
        fields["backbone_config"] = {"model_type": defaults.backbone_config.model_type} | own
    checkpoint = ""
    if family.strides:
        of_backbone = _backbone_fields(family, defaults, backbone or "resnet50", freeze_batch_norm, fields)
        # Where `image_statistics` will look. On the backbone's config it would be saved: a path of this machine.
        checkpoint = of_backbone["backbone_config"]._name_or_path
        of_backbone["backbone_config"]._name_or_path = ""
        fields = of_backbone | fields
    elif backbone is not None:
        raise ValueError(
            f"{model_type} has an image network of its own and takes no backbone such as {backbone!r}: fields of its "
            "config say what it is like"
        )
    detector = detector_from_config(AutoConfig.for_model(model_type, **fields))
    detector.config._name_or_path = checkpoint
    check_backbone(detector)
    weights = backbone_weights or checkpoint or None
    if weights and isinstance(detector, TorchvisionDetector):
        from .torchvision_weights import is_socos, load_torchvision_weights  # which report as transfers do

        if is_socos(weights):
            return detector, load_torchvision_weights(detector, weights)
    return detector, load_backbone_weights(detector, weights) if weights else None


def _backbone_fields(
    family: Family,
    defaults: PreTrainedConfig,
    backbone: str | PreTrainedConfig,
    freeze_batch_norm: bool,
    fields: dict[str, Any],
) -> dict[str, Any]:
    """The config fields of a detector that its backbone determines; takes `strides` out of the given fields."""
    given = tuple(fields.pop("strides", ()))
    if given not in ((), family.strides) and fields.get("conventions") == "mmdet":
        raise ValueError(f"by the conventions of mmdet the strides are {family.strides}, got {given}")
    config, channels, strides = build_backbone_config(
        backbone,
        given or family.strides,
        freeze_batch_norm=freeze_batch_norm,
        any_stride=not given and len(family.strides) == 1,
        any_size=family.resize == "shortest_edge",
    )
    hidden_size = fields.get("d_model", fields.get("hidden_size", defaults.hidden_size))
    found = {"backbone_config": config, **family.backbone_fields(channels, strides, hidden_size)}
    if config.model_type != "timm_backbone" and hasattr(defaults, "freeze_backbone_batch_norms"):
        found["freeze_backbone_batch_norms"] = freeze_batch_norm  # timm's are frozen by the backbone's config
    return found


def detector_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """
    A detector with random weights, as transformers makes it, but for three things.

    transformers draws the scales of the batch norms of RT-DETR and RT-DETRv2 from a normal distribution around 0 with
    a standard deviation of 0.01, which silences the encoder's convolutions for hundreds of steps. Here they start at
    1 (Ioffe & Szegedy, ICML 2015).

    It draws nearly all matrices and embeddings from a normal distribution with a standard deviation of 0.02, as
    language models have it. The attention of DETR and its nearest relatives hardly sees the image then, and their
    queries start at one point. Here the matrices of the encoder and decoder start as Glorot & Bengio (AISTATS 2010)
    have it, the query embeddings with a standard deviation of 1, projections and heads as PyTorch starts layers, and
    the last layers of the box heads at zero (not DETR's own), as in DETR's paper (Carion et al., ECCV 2020,
    section 4) and the code of its relatives.

    It starts the class layers of Conditional and Deformable DETR at a probability of one half, and DAB-DETR's at one
    in the classes (older versions also some of LW-DETR at one half). The focal loss of their papers counts on
    one in a hundred (Lin et al., ICCV 2017, 3.3): otherwise the background drowns the first steps.

    Args:
        config (`PreTrainedConfig`): the config of a detector of a supported family.
    """
    detector = AutoModelForObjectDetection.from_config(config)
    family = family_of(config)
    is_class_head, is_last_box_layer = re.compile(family.class_heads).match, re.compile(family.last_box_layers).match
    has_prior = CLASS_LOSSES[family.losses(config).class_loss].has_prior
    of_backbone = set(get_backbone(detector).modules())
    for name, module in detector.named_modules():
        if module in of_backbone:
            continue
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif family.starts_small and name.endswith(family.query_embeddings):
            nn.init.normal_(module.weight)
        elif family.starts_small and isinstance(module, nn.Linear | nn.Conv2d) and module.weight.any():
            # What starts at zero, such as the offsets of deformable attention, does so on purpose.
            if re.match(r"model\.(encoder|decoder)\.", name) and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif name != "model.reference_points":
                module.reset_parameters()
    for name, parameter in detector.named_parameters(remove_duplicate=False):
        if family.starts_small and has_prior and is_last_box_layer(name):
            nn.init.zeros_(parameter)  # all but DETR itself begin with the queries' reference points
        if has_prior and is_class_head(name) and name.endswith("bias"):
            nn.init.constant_(parameter, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
    return detector


def load_detector(
    arguments: DetectorArguments, num_labels: int, id2label: dict[int, str] | None = None
) -> tuple[PreTrainedModel, BackboneReport | TransferReport | None]:
    """
    The detector that a command's arguments name: a new one, or a checkpoint's.

    A checkpoint keeps its weights and classes, whatever their number; to give it other classes use
    [`~aligndet_hf.detectors.transfer.transfer_detector`].

    Args:
        arguments ([`DetectorArguments`]): the arguments.
        num_labels (`int`): number of classes of a new detector.
        id2label (`dict[int, str]`, *optional*): their names.

    Returns:
        `tuple[PreTrainedModel, BackboneReport | TransferReport | None]`: the detector, and which weights a new one
        got, `None` if it is random.

    Raises:
        `ValueError`: if there is no detector, its family is not supported, or the backbone has lost its activations.
    """
    if is_new(arguments):
        return _build(
            arguments.detector,
            arguments.backbone,
            _weights_of(arguments),
            arguments.freeze_batch_norm,
            num_labels,
            id2label,
            arguments.detector_config or {},
        )
    detector = open_detector(arguments.detector, is_whole=False)
    family_of(detector.config)
    check_backbone(detector)
    return detector, None


def open_detector(source: str | Path | PreTrainedModel, is_whole: bool = True) -> PreTrainedModel:
    """The detector of a path or Hub id ([`open_checkpoint`]), or a copy of one given as a model; in float32."""
    detector = copy_of(source := as_source(source))
    if detector is None:
        detector = open_checkpoint(find_detector(source), is_whole)
    elif detector.dtype in (torch.float16, torch.bfloat16):
        detector.float().config.dtype = torch.float32  # also of what is built like it
    return detector


def open_image_processor(source: str | Path | BaseImageProcessor) -> BaseImageProcessor:
    """The image processor of a path or Hub id ([`open_processor`]), or the one that is given."""
    source = as_source(source)
    given = copy_of(source)
    if isinstance(given, nn.Module):
        raise ValueError(
            "a detector given as an object has no image processor with it: give `image_processor` as well, or the "
            "folder that both are saved in"
        )
    return open_processor(find_detector(source)) if given is None else given


def _weights_of(arguments: DetectorArguments) -> str | None:
    """`timm`'s for the backbone that nobody chose; `none` stands for random ones."""
    if arguments.backbone_weights is None:
        has_backbone_of_choice = FAMILIES[arguments.detector].strides and arguments.backbone is None
        return "timm" if has_backbone_of_choice else None
    return None if arguments.backbone_weights == "none" else arguments.backbone_weights


def require_config_fields(defaults: PreTrainedConfig, names: Iterable[str]) -> None:
    """Raises a `ValueError` that names the fields that a config does not have, and what may be meant."""
    if unknown := sorted(name for name in names if not hasattr(defaults, name)):
        near = nearest(unknown[0], defaults.to_dict())
        raise ValueError(f"{defaults.model_type} has no config field {', '.join(unknown)}{near}")


def require_useful_backbone(
    detector: PreTrainedModel, is_random: bool, is_frozen: bool, freeze_batch_norm: bool
) -> str | None:
    """
    The rule of all commands for a backbone that starts from random numbers: it is trained, and that is told.

    Args:
        detector (`PreTrainedModel`): with the backbone, if its family has one.
        is_random (`bool`): whether nothing gave the backbone weights.
        is_frozen (`bool`): whether some of it is asked to stay as it is.
        freeze_batch_norm (`bool`): whether its norms are frozen, which suits trained ones.

    Returns:
        `str`, *optional*: what to tell.

    Raises:
        `ValueError`: a random backbone shall stay as it is, in part or as a whole.
    """
    if not is_random or backbone_path(detector) is None:
        return None
    fix = "Give --backbone_weights (`timm`, or a file)"
    if is_frozen:
        raise ValueError(
            f"the backbone starts from random numbers, and what stays frozen of it teaches the detector nothing. {fix}"
            ", or leave out freeze_backbone and trainable_backbone_stages"
        )
    return (
        f"the backbone starts from random numbers, so all of it is trained. {fix} to start from ImageNet's, which is "
        "better unless there are very many images"
        + ("; otherwise give --freeze_batch_norm false too" if freeze_batch_norm else "")
    )


def ignored_note(arguments: DetectorArguments) -> str | None:
    """What to tell of flags for a new detector that are given beside one that is there already."""
    ignored = sorted({"backbone", "backbone_weights", "freeze_batch_norm", "detector_config"} & set(arguments.given))
    if is_new(arguments) or not ignored:
        return None
    return f"{', '.join(ignored)}: for a new detector, without effect on {arguments.detector}, which keeps its own"


def has_random_backbone(arguments: DetectorArguments) -> bool:
    """Whether the arguments name a new detector and nothing that gives its backbone weights."""
    return is_new(arguments) and not is_trained(arguments.backbone, _weights_of(arguments))


def backbone_source(arguments: Any) -> tuple[str, str | None] | None:
    """
    Which backbone the arguments of a command name, and which weights for it; `None` where it comes with a detector.

    Args:
        arguments ([`DetectorArguments`], or others with `backbone` and `backbone_weights`): the arguments.
    """
    if not hasattr(arguments, "backbone_weights"):
        return None
    weights = None if arguments.backbone_weights == "none" else arguments.backbone_weights
    if isinstance(arguments, DetectorArguments) and getattr(arguments, "method", "aligndet") == "aligndet":
        if not is_new(arguments) or not FAMILIES[arguments.detector].strides:
            return None
        weights = _weights_of(arguments)
    return arguments.backbone or "resnet50", weights


def find_detector(source: str | Path) -> str:
    """
    What `from_pretrained` takes of a detector that a command names.

    Args:
        source (`str` or `Path`): the folder of a detector, of a run of `aligndet pretrain` or `aligndet finetune`, or
            of one of its checkpoints (`checkpoint-<step>`); a published checkpoint, see
            [`~aligndet_hf.detectors.converters.read_detector`]; a Hub id; or a short name of
            [`~aligndet_hf.detectors.published.PUBLISHED`].

    Returns:
        `str`: the folder of the detector, for a published checkpoint one that lasts as long as the process; or the Hub
        id.

    Raises:
        `ValueError`: there is no detector. The message says what is there instead.
        `OSError`: there is no folder of this name, and the Hub has none or cannot be asked.
    """
    if isinstance(source, Given):
        raise ValueError("a folder of a detector and its image processor is needed: save both with `save_pretrained`")
    folder = Path(source).expanduser()
    if not folder.exists() and len(Path(source).parts) <= 2 and not str(source).startswith((".", "/", "~")):
        return _on_hub(str(source))
    if folder.is_file():
        from .converters.folder import detector_folder  # which builds detectors

        return str(detector_folder(folder))
    found = {place: _said(place / "config.json", "model_type") for place in (folder / "detector", folder)}
    for place, model_type in found.items():
        if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in AutoModelForObjectDetection._model_mapping:
            return str(place)
    raise ValueError(f"{source} is not a detector: {_what_is_there(folder, found[folder])}")


@functools.cache
def _on_hub(source: str) -> str:
    """The Hub id of a detector whose config is there by now."""
    name = hub_id(source)
    try:
        cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        of_family = f"a family (what `build_detector({source!r})` builds is taken, and checkpoints)"
        kind = of_family if source in FAMILIES else f"no family{nearest(source, FAMILIES)}"
        raise OSError(
            f"detector {source!r}: no such folder here{similar_path(source)}, {kind}, "
            f"and from the Hub it could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    return name


def _said(path: Path, key: str) -> str | None:
    """A text in a JSON file, `None` where it has none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def _what_is_there(folder: Path, model_type: str | None) -> str:
    """What a folder without a detector is, and what to take instead."""
    if not folder.exists():
        return f"there is no such folder{similar_path(folder)}"
    if _said(folder / "backbone" / "config.json", "model_type"):
        return f"it holds a backbone. A detector gets it by --backbone {folder / 'backbone'}"
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if checkpoints:
        return f"it holds a run that is not finished. Give a checkpoint of it, such as {checkpoints[-1]}"
    if command := _said(folder / RECORD, "command"):
        what = "has no checkpoint yet" if command in ("pretrain", "finetune") else "makes no detector"
        return f"it holds a run of `aligndet {command}`, which {what}"
    if model_type:
        return f"it holds a model of the type {model_type!r}, which AutoModelForObjectDetection does not load"
    return "it has no config.json of one. Give the folder of a detector, or of a run that made one"


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
    edges = {"shortest_edge": size, "longest_edge": max_size or round(size * 1333 / 800)}
    extent = {"height": size, "width": size} if family.resize == "square" else edges
    processor_class = getattr(transformers, family.image_processor)
    return processor_class(size=extent, do_normalize=True, image_mean=mean, image_std=std)


def save_image_processor(image_processor: BaseImageProcessor, folder: str | Path) -> None:
    """
    Saves the image processor beside a detector that is saved already.

    If the images have more than 8 bits, the folder gets a pipeline of its own for `object-detection`, which scales
    them as training did. It needs `trust_remote_code=True`. The pipeline of transformers, which would cut the levels,
    is refused.

    Args:
        image_processor (`BaseImageProcessor`): With `pixel_window`, if the images have more than 8 bits.
        folder (`str` or `Path`): With the `config.json` of the detector.
    """
    image_processor.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    inherited = config.pop("custom_pipelines", None)
    if getattr(image_processor, "pixel_window", None) is not None:
        source = Path(__file__).with_name("deep_images.py")
        shutil.copyfile(source, Path(folder) / source.name)
        pipeline = {"impl": f"{source.stem}.DeepImagesPipeline", "pt": ["AutoModelForObjectDetection"]}
        config["custom_pipelines"] = {"object-detection": pipeline}
    elif inherited is None:
        return
    write_json(path, config)
