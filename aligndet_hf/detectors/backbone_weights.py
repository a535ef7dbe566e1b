"""Weights for the backbone of a detector: timm's own, transformers checkpoints, and files of self-supervised runs."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import cached_file

from ..cards import hub_ids
from .backbones import _flat, _network, get_backbone
from .families import backbone_path
from .weight_files import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Networks that a self-supervised checkpoint holds beside the one that is meant to be used: the momentum encoders of
# MoCo (v1 to v3) and SoCo, and DINO's student.
SECOND_CHOICE = ("encoder_k.", "momentum_encoder.", "student.")
# What to do about weights that cannot be downloaded.
OFFLINE = (
    "Without a connection to the Hub give a file, --backbone_weights FILE (.safetensors or .pth); pretrain and "
    "finetune also start from random ones, with --backbone_weights none"
)
# Layers that a transformers backbone adds to the checkpoint's network: norms of its feature maps, which start neutral.
ADDED = "hidden_states_norms."


@dataclass
class BackboneReport:
    """
    What became of the tensors of a backbone and of the weights for it.

    Attributes:
        source (`str`): where the weights come from.
        prefix (`str`): what stands before the backbone's names in the source.
        matched (`list[str]`): tensors of the backbone that were loaded.
        missing (`list[str]`): tensors of the backbone that the source lacks.
        mismatched (`list[str]`): tensors of the backbone that have another shape in the source.
        unused (`list[str]`): tensors of the source with the prefix that the backbone does not have, such as heads.
    """

    file_name: ClassVar[str] = "backbone_report.json"

    source: str
    prefix: str = ""
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        under = f" under {self.prefix!r}" if self.prefix else ""
        return (
            f"backbone from {self.source}{under}: {len(self.matched)} tensors matched, {len(self.missing)} missing, "
            f"{len(self.mismatched)} mismatched, {len(self.unused)} unused"
        )


def load_backbone_weights(detector: PreTrainedModel, weights: str | Path) -> BackboneReport:
    """
    Loads weights into the backbone of a detector, strictly.

    Args:
        detector (`PreTrainedModel`): any supported detector, changed in place.
        weights (`str` or `Path`): one of

            - a `.safetensors` file, or a `.pth` file of tensors, with the names that the backbone has in timm (for
              ResNets torchvision's). Names may have any prefix, and the file other networks, as the checkpoints
              of MoCo, SwAV, DINO and SoCo do: the network that has the backbone's tensors is found, momentum encoders
              and students last;
            - a folder as [`~aligndet_hf.detectors.backbones.save_backbone`] writes it, or its Hub id;
            - the folder or Hub id of a transformers checkpoint, for a backbone of transformers;
            - `"timm"` for timm's own weights, for a backbone of timm.

    Returns:
        [`BackboneReport`]: what was found. Only batch counters and norms that transformers adds may be missing.

    Raises:
        `FileNotFoundError`: if there are no such weights.
        `OSError`: if they cannot be downloaded.
        `ValueError`: if they lack a tensor of the backbone, or one has another shape; or if a `.pth` file holds more
            than tensors.
    """
    if backbone_path(detector) is None:
        raise ValueError(f"a detector of type {detector.config.model_type!r} has no backbone to load {weights} into")
    return load_weights(get_backbone(detector), detector.config.backbone_config, weights)


def load_weights(backbone: nn.Module, config: PreTrainedConfig, weights: str | Path) -> BackboneReport:
    """[`load_backbone_weights`] for a backbone outside a detector, and its config."""
    tensors, unused = read_weights(config, weights)
    network = _network(backbone)
    report, chosen = match_tensors(network.state_dict(), tensors, str(weights))
    lost = [name for name in report.missing if not name.endswith("num_batches_tracked") and ADDED not in name]
    if lost or report.mismatched:
        name = getattr(config, "backbone", None) or config.model_type
        raise ValueError(
            f"{weights} does not fit backbone {name!r} (best prefix {report.prefix!r}): "
            + "; ".join(_problems(report, lost, network.state_dict(), tensors))
        )
    network.load_state_dict(chosen, strict=False)
    report.unused += unused
    return report


def read_weights(config: PreTrainedConfig, weights: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """
    The tensors of weights for a backbone of this config, see [`load_backbone_weights`].

    Returns:
        `tuple[dict[str, Tensor], list[str]]`: the tensors by name, and the names of those that it has no place for.

    Raises:
        `FileNotFoundError`: if there are no such weights.
        `OSError`: if they cannot be downloaded.
    """
    is_timm = config.model_type == "timm_backbone"
    if weights == "timm" and is_timm:
        return _timm_weights(config.backbone), []
    if Path(weights).is_file():
        return read_tensors(Path(weights)), []
    if is_timm and (Path(weights) / "model.safetensors").is_file():
        return read_tensors(Path(weights) / "model.safetensors"), []
    if is_timm and hub_ids(weights):
        return read_tensors(_hub_file(weights)), []
    if not is_timm and ((Path(weights) / "config.json").is_file() or not Path(weights).exists()):
        return _transformers_weights(str(weights), config)
    raise FileNotFoundError(
        f"backbone weights {weights} not found: expected a .safetensors or .pth file"
        + (", a folder or Hub id of a saved backbone, or 'timm'" if is_timm else " or a transformers checkpoint")
    )


def match_tensors(
    target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str = ""
) -> tuple[BackboneReport, dict[str, Tensor]]:
    """
    Finds the tensors of a network in a checkpoint that may hold several, under any prefix.

    Args:
        target (`Mapping[str, Tensor]`): the network's state dictionary.
        tensors (`Mapping[str, Tensor]`): the checkpoint's tensors by name.
        source (`str`, *optional*): what to call the checkpoint in the report.

    Returns:
        `tuple[BackboneReport, dict[str, Tensor]]`: the report, and the tensors that fit by the network's names.
    """
    flat, prefixes = {key: _flat(key) for key in tensors}, Counter()
    for name in map(_flat, target):
        for key, flat_key in flat.items():
            prefix = key[: -len(name)]
            if flat_key.endswith(name) and (not prefix or prefix.endswith(".")):
                prefixes[prefix] += 1
    # Of those with the most tensors the first, and rather none of the second choice.
    prefix = max(prefixes, key=lambda prefix: (prefixes[prefix], not _is_second_choice(prefix)), default="")
    names = {_flat(key.removeprefix(prefix)): key for key in tensors if key.startswith(prefix)}
    report, chosen = BackboneReport(source, prefix), {}
    for name, tensor in target.items():
        found = names.pop(_flat(name), None)
        if found is None:
            report.missing.append(name)
        elif tensors[found].shape != tensor.shape:
            report.mismatched.append(name)
        else:
            report.matched.append(name)
            chosen[name] = tensors[found]
    report.unused = sorted(name for name in names.values() if not name.endswith("num_batches_tracked"))
    return report, chosen


def _is_second_choice(prefix: str) -> bool:
    return any(part in prefix for part in SECOND_CHOICE)


def _problems(report: BackboneReport, lost: list[str], target: Mapping, tensors: Mapping) -> list[str]:
    problems = []
    for name in lost[:3]:
        closest = difflib.get_close_matches(report.prefix + name, report.unused or tensors, n=1, cutoff=0)
        problems.append(f"{name} is missing (closest: {closest[0] if closest else 'the file has no tensors'})")
    flat = {_flat(name): tensor for name, tensor in tensors.items()}
    for name in report.mismatched[:3]:
        shape = list(flat[_flat(report.prefix + name)].shape)
        problems.append(f"{name} has shape {shape}, expected {list(target[name].shape)}")
    more = len(lost) + len(report.mismatched) - len(problems)
    return problems + ([f"and {more} more"] if more else [])


def _timm_weights(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, features_only=True, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"timm's weights of {name!r} could not be loaded ({str(error).splitlines()[0]}). {OFFLINE}"
        ) from error


def _hub_file(repo_id: str) -> Path:
    """The file of a backbone that [`~aligndet_hf.detectors.backbones.save_backbone`] wrote, from the Hub."""
    try:
        return Path(cached_file(repo_id, "model.safetensors"))
    except OSError as error:
        raise OSError(
            f"backbone weights {repo_id!r} are neither a file nor a folder, and could not be loaded from the Hub: "
            f"{str(error).splitlines()[0]}. {OFFLINE}"
        ) from error


def _transformers_weights(source: str, config) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint by the names of the backbone, and the names of those it does not have."""
    try:
        # Not AutoBackbone, which asks the Hub for the names of folders.
        backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        model, info = backbone_class.from_pretrained(source, config=config, output_loading_info=True)
    except OSError as error:
        raise OSError(
            f"backbone weights {source!r} are neither a file nor a folder with a transformers checkpoint, and could "
            f"not be loaded from the Hub: {str(error).splitlines()[0]}. {OFFLINE}"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit backbone {config.model_type!r}: {error}") from error
    missing = set(info["missing_keys"])
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    return tensors, sorted(info["unexpected_keys"])
