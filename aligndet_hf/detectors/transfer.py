"""What fine-tuning keeps from pre-training: a new detector with other classes, filled tensor by tensor."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from transformers import PreTrainedModel

from .backbones import check_backbone
from .build import detector_from_config, open_detector
from .classes import class_fields
from .families import Family, family_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Preset = Literal["everything", "keep-boxes", "paper", "encoder-only"]


@dataclass
class TransferReport:
    """
    What became of every tensor of a detector.

    Attributes:
        preset (`str`): the preset that was applied.
        kept (`list[str]`): tensors taken over from the source.
        reset (`list[str]`): tensors that the preset initialises anew.
        mismatched (`list[str]`): tensors initialised anew because the source's has another shape or none.
        frozen (`list[str]`): kept parameters that will not be trained.
    """

    file_name: ClassVar[str] = "transfer_report.json"

    preset: str
    kept: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"transfer {self.preset!r}: {len(self.kept)} tensors kept ({len(self.frozen)} of them frozen), "
            f"{len(self.reset)} reset, {len(self.mismatched)} mismatched"
        ]
        for title in ("reset", "mismatched"):
            layers = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in getattr(self, title))
            lines += [f"  {title}: {name}" + (f" ({count})" if count > 1 else "") for name, count in layers.items()]
        return "\n".join(lines)


def transfer_detector(
    source: PreTrainedModel | str | Path,
    num_labels: int,
    id2label: dict[int, str] | list[str] | None = None,
    preset: Preset = "keep-boxes",
) -> tuple[PreTrainedModel, TransferReport]:
    """
    A detector for other classes that starts from a pre-trained one.

    Args:
        source (`PreTrainedModel`, `str` or `Path`): the pre-trained detector, or what
            [`~aligndet_hf.detectors.build.find_detector`] takes.
        num_labels (`int`): number of classes of the new detector.
        id2label (`dict[int, str]` or `list[str]`, *optional*): their names.
        preset (`str`, *optional*, defaults to `"keep-boxes"`): "keep-boxes" initialises the class layers anew;
            "paper" also the last layer of the box heads, as AlignDet's published transfer does; "encoder-only" keeps
            the backbone, the encoder and the projections around it, and initialises the decoder, the queries and all
            heads anew; "everything" keeps all that fits, for a source with the same classes. Layers that are tied to
            one of these are treated as it is.

    Returns:
        `tuple[PreTrainedModel, TransferReport]`: the new detector, in training mode, and what became of its tensors.

    Raises:
        `ValueError`: for an unknown preset or family, another number of classes than of names, or a backbone that has
            lost its activations.
    """
    if not isinstance(source, PreTrainedModel):
        source = open_detector(source, is_whole=False)
    is_reset = _reset_rule(family_of(source.config), preset)
    check_backbone(source)
    config = copy.deepcopy(source.config)
    for name, value in class_fields(num_labels, id2label).items():
        setattr(config, name, value)
    detector = detector_from_config(config).train()

    report, target = TransferReport(preset), detector.state_dict(keep_vars=True)
    # Tied tensors have several names, and a pattern may know only one of them.
    reset = {id(tensor) for name, tensor in target.items() if is_reset(name)}
    report.reset += [name for name, tensor in target.items() if id(tensor) in reset]
    take_over(detector, source.state_dict(), report)
    return detector, report


def take_over(detector: nn.Module, weights: Mapping[str, Tensor], report: TransferReport) -> None:
    """Loads what fits of weights with a detector's names, but for what the report calls `reset`, and completes it."""
    reset = set(report.reset)
    for name, tensor in detector.state_dict().items():
        if name not in reset:
            fits = name in weights and weights[name].shape == tensor.shape
            (report.kept if fits else report.mismatched).append(name)
    detector.load_state_dict({name: weights[name] for name in report.kept}, strict=False)


def _reset_rule(family: Family, preset: Preset) -> Callable[[str], bool]:
    """Whether a preset initialises a tensor anew, by its name."""
    patterns = {
        "everything": r"(?!)",  # matches nothing
        "keep-boxes": family.class_heads,
        "paper": f"{family.class_heads}|{family.last_box_layers}",
        "encoder-only": f"(?!{family.encoder})",  # all but
    }
    if preset not in patterns:
        raise ValueError(f"unknown transfer preset {preset!r}; choose from {', '.join(patterns)}")
    pattern = re.compile(patterns[preset])
    return lambda name: pattern.match(name) is not None
