"""Layouts of published checkpoints, and how a file of one becomes a detector: tensor by tensor, with a report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForObjectDetection

from ..build import detector_from_config, require_config_fields
from ..families import FAMILIES
from ..weight_files import flatten

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """
    How a published code base names the tensors of a family of detectors.

    Attributes:
        name (`str`): what it is called in reports.
        family (`str`): the family of [`~aligndet_hf.detectors.families.FAMILIES`] that it becomes.
        marks (`tuple[str, ...]`): names that every file of this layout has, and together no file of another.
        names (`tuple[tuple[str, str], ...]`): replacements that turn a name of ours into theirs, one after another:
            regular expression and template. A template may end in `#1/3`, the second third of the rows of their
            tensor, or join two names by ` + `, whose columns stand side by side.
        config (`Callable`): `(tensors, options) -> fields` of the detector's config, read off the shapes of the
            tensors, and of the options that a file may hold.
        aliases (`tuple[tuple[str, str], ...]`): replacements that turn names of older versions of the code base into
            the table's.
        prepare (`Callable`, *optional*): `(tensors, options) -> Prepared`, for what renaming cannot do:
            classes in another order, norms that the family has not.
        restore (`Callable`, *optional*): undoes it, `tensors -> tensors`, for files that are written.
        dropped (`tuple[tuple[str, str], ...]`): which of their tensors have no place in the detector, and why.
        absent (`tuple[tuple[str, str], ...]`): which of our tensors a file may lack, and why.
        refused (`tuple[tuple[str, str], ...]`): tensors of an architecture that the family does not have, and which.
        repository (`str`): where the code base is, on GitHub.
        license (`str`): the licence of its code.
        note (`str`): what differs from the published detector although every tensor fits.
    """

    name: str
    family: str
    marks: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    config: Callable[[Tensors, Mapping[str, Any]], dict[str, Any]]
    aliases: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[dict[str, Tensor], Mapping[str, Any]], Prepared] | None = None
    restore: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    dropped: tuple[tuple[str, str], ...] = ()
    absent: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    repository: str = ""
    license: str = "apache-2.0"
    note: str = ""

    def sources(self, name: str) -> list[Source]:
        """Where a layout keeps the content of a tensor of ours."""
        return [Source.parse(part) for part in renamed(name, self.names).split(" + ")]


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A name after the replacements of a layout's `names` or `aliases`, one after another."""
    for pattern, template in rules:
        name = re.sub(pattern, template, name)
    return name


class Prepared(NamedTuple):
    """
    The tensors of a file as a layout's table expects them.

    Attributes:
        tensors (`dict[str, Tensor]`): the tensors, some of them changed.
        changed (`dict[str, str]`): what was done to those that were changed, or where new ones come from.
        dropped (`dict[str, str]`): those that are no longer there, and why.
    """

    tensors: dict[str, Tensor]
    changed: dict[str, str]
    dropped: dict[str, str]


class Source(NamedTuple):
    """A tensor of a file, or one of several equal parts of its rows."""

    name: str
    part: int = 0
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> Source:
        """`name` or `name#part/parts`."""
        name, _, part = text.partition("#")
        return cls(name, *map(int, part.split("/"))) if part else cls(name)

    def read(self, tensors: Tensors) -> Tensor:
        """The rows meant."""
        tensor = tensors[self.name]
        return tensor if self.parts == 1 else tensor.chunk(self.parts)[self.part]

    def __str__(self) -> str:
        return self.name if self.parts == 1 else f"{self.name}, part {self.part + 1} of {self.parts} of the rows"


# What training saves beside the detector, in any layout.
UNUSED = ((r"(.*\.)?num_batches_tracked$", "a counter of training, which no output depends on"),)
COUNTERS = (r".*num_batches_tracked$", "a counter of training, which starts at 0")
# Networks around the detector: where the marks of a layout stand under one of these names, this one is read first.
WRAPPERS = ("", "module.", "backbone.", "module.backbone.", "detr.")
OUTSIDE = (
    (r"(module\.)?online_backbone\.", "AlignDet's second name for the tensors under `backbone.`"),
    (r"(module\.)?target_backbone\.", "AlignDet's momentum detector, which only pre-training needs"),
    (r"(module\.)?(mask_head|bbox_attention)\.", "predicts masks"),
    (r"(module\.)?ema_", "averaged weights beside those that were trained"),
)


@dataclass
class ConversionReport:
    """
    What became of every tensor of a published file, and where every tensor of the detector comes from.

    Attributes:
        source (`str`): the file's name.
        layout (`str`): the layout that it was recognised as.
        family (`str`): the family of the detector.
        kept (`dict[str, str]`): tensors of the detector that were taken as they are, and their names in the file.
        reshaped (`dict[str, str]`): those that were cut out of a tensor of the file, or put together of several.
        dropped (`dict[str, str]`): tensors of the file that were left out, and why.
        missing (`dict[str, str]`): tensors of the detector that were initialised anew, and why.
        note (`str`): what differs from the published detector although every tensor fits.
        repository (`str`): where the code base of the layout is, on GitHub.
        license (`str`): the licence of its code.
    """

    file_name: ClassVar[str] = "conversion_report.json"

    source: str
    layout: str
    family: str
    kept: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    note: str = ""
    repository: str = ""
    license: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.source} is {self.layout} and becomes {self.family}: {len(self.kept)} tensors kept, "
            f"{len(self.reshaped)} reshaped, {len(self.dropped)} dropped, {len(self.missing)} missing"
        ]
        for title in ("dropped", "missing"):
            reasons = Counter(getattr(self, title).values())
            lines += [f"  {title}: {count} ({reason})" for reason, count in reasons.items()]
        return "\n".join(lines + ([f"  note: {self.note}"] if self.note else []))


# --- recognising -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The detector in a file."""

    layout: Layout
    tensors: dict[str, Tensor]  # without what stands before all of their names
    outside: dict[str, Tensor]  # other tensors beside it
    options: dict[str, Any]  # of the training; `is_old` says whether names of an older version were replaced


def find_detector_in(content: Mapping, layouts: Iterable[Layout], source: str) -> Found:
    """
    Finds a detector in what a file holds, by the names of its tensors.

    Args:
        content (`Mapping`): see [`~aligndet_hf.detectors.weight_files.read_checkpoint`].
        layouts (`Iterable[Layout]`): the layouts to look for, the more special ones first.
        source (`str`): the file's name, for messages.

    Raises:
        `ValueError`: if there is none.
    """
    for named in _state_dicts(content):
        for layout in layouts:
            tensors = {renamed(name, layout.aliases): tensor for name, tensor in named.items()}
            first = layout.marks[0]
            found = {name.removesuffix(first) for name in tensors if name.endswith(first)}
            prefixes = sorted(
                found, key=lambda prefix: WRAPPERS.index(prefix) if prefix in WRAPPERS else len(WRAPPERS)
            )
            for prefix in prefixes:
                inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                if all(mark in inside for mark in layout.marks):
                    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
                    return Found(
                        layout, inside, outside, _options(content) | {"is_old": tensors.keys() != named.keys()}
                    )
    count = len(flatten(content))
    names = ", ".join(list(flatten(content))[:3])
    raise ValueError(
        f"{source} is no layout of a detector that is known here: "
        + (f"it has {count} tensors, such as {names}" if count else "it has no tensors")
        + ". Known are: "
        + "; ".join(dict.fromkeys(layout.name for layout in layouts))
        + ". A trunk alone is given as --backbone_weights"
    )


def _state_dicts(content: Mapping) -> list[dict[str, Tensor]]:
    """The dictionaries in a file that hold tensors by name, the outermost first."""
    here = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    found = [here] if here else []
    for name, value in content.items():
        if isinstance(value, Mapping) and "optimizer" not in str(name):
            found += _state_dicts(value)
    return found


def _options(content: Mapping) -> dict[str, Any]:
    """What a file says of how it was trained: the options of DETR's code, the `meta` of OpenMMLab's."""
    options = dict(vars(content["args"])) if hasattr(content.get("args"), "__dict__") else {}
    meta = content.get("meta")
    return options | (dict(meta) if isinstance(meta, Mapping) else {})


# --- converting ------------------------------------------------------------------------------------------------------


def convert_tensors(
    found: Found, source: str, fields: Mapping[str, Any] | None = None, partial: bool = False
) -> tuple[PreTrainedModel, ConversionReport]:
    """
    A detector with the tensors of a published file.

    Args:
        found ([`Found`]): the detector in the file.
        source (`str`): the file's name.
        fields (`Mapping[str, Any]`, *optional*): fields of the config that the file does not tell, such as the number
            of attention heads.
        partial (`bool`, *optional*, defaults to `False`): accept a file that lacks tensors, or has unknown ones.

    Returns:
        `tuple[PreTrainedModel, ConversionReport]`: the detector in evaluation mode, and what became of every tensor.

    Raises:
        `ValueError`: if a tensor has another shape than the others let expect, or, unless `partial`, one is missing
            or unknown.
    """
    layout, tensors = found.layout, found.tensors
    for pattern, why in layout.refused:
        if any(re.match(pattern, name) for name in tensors):
            raise ValueError(f"{source} is {layout.name} with {why}, which {layout.family} of transformers lacks")
    config = _config(layout, found, source, fields or {})
    prepared = layout.prepare(dict(tensors), found.options) if layout.prepare else Prepared(tensors, {}, {})
    tensors = prepared.tensors
    with torch.device("meta"):
        blank = AutoModelForObjectDetection.from_config(config)  # names and shapes
    report = ConversionReport(
        source, layout.name, layout.family, note=layout.note, repository=layout.repository, license=layout.license
    )
    state, used = {}, set()
    for name, expected in blank.state_dict().items():
        sources = layout.sources(name)
        if lost := [part.name for part in sources if part.name not in tensors]:
            report.missing[name] = _reason(layout.absent, name) or f"the file lacks {lost[0]}"
            continue
        tensor = (
            torch.cat([part.read(tensors) for part in sources], 1) if len(sources) > 1 else sources[0].read(tensors)
        )
        used.update(part.name for part in sources)
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{source}: {sources[0]} has shape {list(tensor.shape)}, expected {list(expected.shape)} beside the "
                f"other tensors of a {layout.family}"
            )
        state[name] = tensor.to(expected.dtype, copy=True).contiguous()
        is_whole = len(sources) == 1 and sources[0].parts == 1 and sources[0].name not in prepared.changed
        told = " + ".join(map(str, sources))
        told += "".join(f": {prepared.changed[part.name]}" for part in sources if part.name in prepared.changed)
        (report.kept if is_whole else report.reshaped)[name] = told
    rest = [name for name in tensors if name not in used]
    report.dropped = {name: _reason((*UNUSED, *layout.dropped), name) or "" for name in rest}
    report.dropped |= {name: _reason((*UNUSED, *OUTSIDE), name) or "" for name in found.outside} | prepared.dropped
    _refuse(report, layout, source, partial)
    if report.missing:
        anew = detector_from_config(config).state_dict()
        state |= {name: anew[name] for name in report.missing}
    # Not `load_state_dict`: heads of several layers are tied until a file says that they differ.
    return type(blank).from_pretrained(None, config=config, state_dict=state), report


_HEADS = "encoder_attention_heads"  # that no tensor tells


def _config(layout: Layout, found: Found, source: str, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The detector's config: the family's defaults, what the file says, what the user says."""
    require_config_fields(AutoConfig.for_model(layout.family), fields)
    if _HEADS in fields and (type(fields[_HEADS]) is not int or fields[_HEADS] < 1):
        raise ValueError(f"{_HEADS} must be a positive whole number, got {fields[_HEADS]!r}")
    heads = {"nheads": fields[_HEADS]} if _HEADS in fields else {}  # of the decoder, too, and sampling points follow
    try:
        of_file = layout.config(found.tensors, found.options | heads)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{source} is {layout.name}, but its tensors say no size: {error} is missing") from error
    return AutoConfig.for_model(layout.family, **{**dict(FAMILIES[layout.family].defaults), **of_file, **fields})


def _reason(rules: tuple[tuple[str, str], ...], name: str) -> str | None:
    """The reason that the first of several rules gives for a name."""
    return next((why for pattern, why in rules if re.match(pattern, name)), None)


def _refuse(report: ConversionReport, layout: Layout, source: str, partial: bool) -> None:
    """Refuses what no rule explains, unless told otherwise."""
    unknown = [name for name, why in report.dropped.items() if not why]
    lost = [name for name in report.missing if _reason(layout.absent, name) is None]
    if partial:
        report.dropped |= dict.fromkeys(unknown, "unknown, and left out as `partial` asks")
    elif unknown or lost:
        problems = [f"has {len(unknown)} unknown tensors, such as {unknown[0]}"] if unknown else []
        problems += [f"lacks {len(lost)} tensors, such as {report.missing[lost[0]].split()[-1]}"] if lost else []
        raise ValueError(
            f"{source} is {layout.name}, but " + " and ".join(problems) + ": it is another model, or was cut. "
            "`aligndet convert --partial` takes what fits"
        )
