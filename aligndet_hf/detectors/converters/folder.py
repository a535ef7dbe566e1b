"""A published checkpoint as a folder that transformers loads, and a detector as a file that other code bases load."""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..build import build_image_processor
from . import read_detector
from .layout import Layout
from .mmdet_convnets import MMDET_CONVNETS
from .mmdet_detr import MMDET_3
from .torchvision import TORCHVISION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shorter side of the images that the published detectors were evaluated with; the longer one is at most 1333.
PUBLISHED_SIZE = 800


def detector_folder(path: Path) -> Path:
    """
    A published checkpoint as a detector with its image processor, in a folder that lasts as long as the process.

    Args:
        path (`Path`): the file; see [`~aligndet_hf.detectors.converters.read_detector`], also for the errors.
    """
    state = path.stat()
    return _detector_folder(path.absolute(), state.st_mtime_ns, state.st_size)


@functools.cache
def _detector_folder(path: Path, *version: int) -> Path:
    detector, report = read_detector(path)
    print(report)
    folder = tempfile.TemporaryDirectory(prefix="aligndet-")
    atexit.register(folder.cleanup)
    save_detector(detector, Path(folder.name))
    return Path(folder.name)


def save_detector(detector: PreTrainedModel, folder: Path, size: int = PUBLISHED_SIZE) -> None:
    """Writes a detector with the image processor of the published one."""
    detector.save_pretrained(folder)
    build_image_processor(detector, size).save_pretrained(folder)


def export_detector(detector: PreTrainedModel, code_base: str, path: Path) -> None:
    """
    Writes a detector as a file that another code base loads.

    Args:
        detector (`PreTrainedModel`): the detector.
        code_base (`str`): "mmdet", for version 3, or "torchvision".
        path (`Path`): the file: for mmdet a `.pth` of tensors and the names of the classes, as its own checkpoints
            are; for torchvision a `.safetensors` with the names of its builders.

    Raises:
        `ValueError`: if that code base has no such detector, or one that computes otherwise.
    """
    tensors = export_tensors(detector, code_base)
    if code_base == "mmdet":
        names = [detector.config.id2label[label] for label in sorted(detector.config.id2label)]
        torch.save({"state_dict": tensors, "meta": {"dataset_meta": {"classes": names}}}, path)
    else:
        save_file(tensors, path)


def export_tensors(detector: PreTrainedModel, code_base: str) -> dict[str, Tensor]:
    """The tensors of [`export_detector`] by the names of the code base."""
    if code_base == "torchvision" and hasattr(detector, "torchvision_state_dict"):
        return detector.torchvision_state_dict()
    layout = _layout(detector, code_base)
    if getattr(detector.config, "auxiliary_loss", False):
        raise ValueError(
            f"this {detector.config.model_type} norms the output of every decoder layer before the next one, as "
            f"transformers does with auxiliary_loss=true; {code_base} does not, and would detect other things"
        )
    if getattr(detector.config, "conventions", "mmdet") != "mmdet":
        raise ValueError(
            f"this {detector.config.model_type} computes by the conventions of torchvision, and mmdet's does "
            "not. Write it for torchvision, or train one with the config field conventions=mmdet"
        )
    tensors = invert(layout, detector.state_dict())
    return layout.restore(tensors) if layout.restore else tensors


def _layout(detector: PreTrainedModel, code_base: str) -> Layout:
    layouts = {"mmdet": (MMDET_3, *MMDET_CONVNETS), "torchvision": TORCHVISION}
    if code_base not in layouts:
        raise ValueError(f"detectors are written for {', '.join(layouts)}, not for {code_base!r}")
    family = detector.config.model_type
    for layout in layouts[code_base]:
        if layout.family == family:
            return layout
    known = ", ".join(layout.family for layout in layouts[code_base])
    raise ValueError(f"a {family} cannot be written for {code_base}; these can: {known}")


def invert(layout: Layout, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Tensors of ours by the names of a layout.

    Args:
        layout ([`Layout`]): one whose rules join no columns.
        state (`dict[str, Tensor]`): the detector's tensors.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        (source,) = layout.sources(name)
        parts.setdefault(source.name, {})[source.part] = tensor.detach().cpu()
    return {
        name: torch.cat([found[part] for part in sorted(found)]) if len(found) > 1 else found[0].contiguous()
        for name, found in parts.items()
    }
