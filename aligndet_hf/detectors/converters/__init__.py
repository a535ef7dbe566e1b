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
from .detectron2 import DETECTRON2
from .detr import DETR
from .layout import ConversionReport, Layout, convert_tensors, find_detector_in
from .mmdet_convnets import MMDET_CONVNETS
from .mmdet_detr import MMDET_2, MMDET_3
from .siamese_detr import SIAMESE_DETR
from .torchvision import TORCHVISION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The more special ones first: a file is taken for the first that it fits.
LAYOUTS: tuple[Layout, ...] = (
    *SIAMESE_DETR,
    DAB_DETR,
    CONDITIONAL_DETR,
    DEFORMABLE_DETR,
    DETR,
    MMDET_2,
    MMDET_3,
    *MMDET_CONVNETS,
    *TORCHVISION,
    *DETECTRON2,
)


def read_detector(
    path: str | Path, family: str | None = None, fields: Mapping[str, Any] | None = None, partial: bool = False
) -> tuple[PreTrainedModel, ConversionReport]:
    """
    Reads a published checkpoint as a detector of transformers.

    Args:
        path (`str` or `Path`): a file that [`~aligndet_hf.detectors.weight_files.read_checkpoint`] reads.
        family (`str`, *optional*): the family that it shall become, where the names of its tensors leave a choice: a
            Faster R-CNN is also the first part of a Mask R-CNN.
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
    layouts = [layout for layout in LAYOUTS if family in (None, layout.family)]
    if not layouts:
        families = ", ".join(sorted({layout.family for layout in LAYOUTS}))
        raise ValueError(f"no published layout becomes a detector of family {family!r}; known are {families}")
    name = Path(path).name
    return convert_tensors(find_detector_in(read_checkpoint(path), layouts, name), name, fields, partial)
