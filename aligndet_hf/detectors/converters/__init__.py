"""
Published checkpoints, read as detectors of transformers. One module per code base, with a table of its names; the
machinery that they share is in `layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..weight_files import read_checkpoint
from .conditional_detr import CONDITIONAL_DETR
from .dab_detr import DAB_DETR
from .deformable_detr import DEFORMABLE_DETR
from .detr import DETR
from .layout import ConversionReport, Layout, convert_tensors, find_detector_in
from .mmdet_detr import MMDET_2, MMDET_3

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By the name that `--layout` takes; the more special ones first, as a file is taken for the first that it fits.
LAYOUTS: dict[str, Layout] = {
    "dab_detr": DAB_DETR,
    "conditional_detr": CONDITIONAL_DETR,
    "deformable_detr": DEFORMABLE_DETR,
    "detr": DETR,
    "mmdet2_detr": MMDET_2,
    "mmdet3_detr": MMDET_3,
}


def is_weight_file(source: object) -> bool:
    """Whether a detector is named by a file of weights rather than by a folder, a Hub id or a family."""
    return isinstance(source, str | Path) and Path(source).is_file()


def read_detector(
    path: str | Path,
    layout: str | None = None,
    fields: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> tuple[PreTrainedModel, ConversionReport]:
    """
    Reads a published checkpoint as a detector of transformers.

    Args:
        path (`str` or `Path`): a file that [`~aligndet_hf.detectors.weight_files.read_checkpoint`] reads.
        layout (`str`, *optional*): a name of `LAYOUTS`, for a file that several could fit. By default the layout is
            recognised by the names of the tensors.
        fields (`Mapping[str, Any]`, *optional*): fields of the detector's config that a file does not tell: the
            number of attention heads if it is not 8, for instance.
        partial (`bool`, *optional*, defaults to `False`): accept a file that lacks tensors, or has unknown ones.

    Returns:
        `tuple[PreTrainedModel, ConversionReport]`: the detector in evaluation mode, and what became of every tensor.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is damaged, holds more than tensors, is of no known layout, lacks a tensor or has an
            unknown one.

    Example:

    ```python
    >>> from aligndet_hf.detectors.converters import read_detector

    >>> detector, report = read_detector("detr-r50-e632da11.pth")  # doctest: +SKIP
    >>> report.family  # doctest: +SKIP
    'detr'

    ```
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    layouts = LAYOUTS if layout is None else {layout: LAYOUTS[layout]}
    name = Path(path).name
    return convert_tensors(find_detector_in(read_checkpoint(path), layouts, name), name, fields, partial)
