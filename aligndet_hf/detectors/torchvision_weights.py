"""Weights for torchvision's detectors: what SoCo trained beside the backbone, and a report of what was taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .transfer import TransferReport, take_over
from .weight_files import read_tensors

_PARTS = ("backbone.body.", "backbone.fpn.", "roi_heads.box_head.")  # of SoCo's encoder
_EPSILON = 1e-5  # of its norms


def is_socos(weights: str | Path) -> bool:
    """Whether a path is a file of backbone, pyramid and box head, as SoCo's pre-training writes it."""
    if not Path(weights).is_file() or Path(weights).suffix != ".safetensors":
        return False
    names = read_tensors(weights).keys()
    return any(name.startswith(_PARTS[1]) for name in names) and all(name.startswith(_PARTS) for name in names)


def load_torchvision_weights(detector: nn.Module, weights: str | Path) -> TransferReport:
    """
    Loads backbone, feature pyramid and box head into a detector of torchvision.

    Args:
        detector (`nn.Module`): a detector of torchvision with the same trunk, changed in place. Faster and Mask R-CNN
            in their second version (`fasterrcnn_resnet50_fpn_v2`) have the same pyramid and head, with norms. Or one
            of [`~aligndet_hf.convnets`]. A pyramid or head without norms gets convolutions that do what convolution
            and norm did together in evaluation mode; a pyramid without stride 4, RetinaNet's, the other levels, and
            a detector without regions no box head.
        weights (`str` or `Path`): a file with the detector's names, as
            [`~aligndet_hf.SoCoForPreTraining.export_torchvision`] writes it.

    Returns:
        [`~aligndet_hf.detectors.transfer.TransferReport`]: `kept` are the tensors that were taken; `reset` those that
        the file does not have, which stay as they are: RPN and predictors; `mismatched` the tensors of another shape.

    Raises:
        `ValueError`: if the file has another tensor that the detector has not: it is another trunk, or the box head
            has no four convolutions.

    Example:

    ```python
    >>> from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
    >>> from aligndet_hf.detectors.torchvision_weights import load_torchvision_weights

    >>> detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)
    >>> print(load_torchvision_weights(detector, "outputs/soco/torchvision.safetensors"))  # doctest: +SKIP
    transfer 'soco': 369 tensors kept (0 of them frozen), 12 reset, 0 mismatched

    ```
    """
    # In a model of transformers torchvision's own is `detector`, and a backbone of timm is wrapped.
    own_names = {
        name.removeprefix("detector.").replace("body._backbone.", "body."): name for name in detector.state_dict()
    }
    tensors, report = _fitted(read_tensors(weights), own_names), TransferReport("soco")
    if unknown := [name for name in tensors if name not in own_names and not name.endswith("num_batches_tracked")]:
        raise ValueError(
            f"{weights} has {len(unknown)} of {len(tensors)} tensors that this {type(detector).__name__} does not "
            f"have, such as {unknown[0]}: it takes the same trunk, and four convolutions in the box head, which "
            "`box_head: conv` in the detector's config gives"
        )
    report.reset += [name for plain, name in own_names.items() if plain not in tensors]
    take_over(detector, {name: tensors[plain] for plain, name in own_names.items() if plain in tensors}, report)
    frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    report.frozen += [name for name in report.kept if name in frozen]
    return report


def _fitted(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors for a detector with these names: only its parts and levels, and norms in the convolutions."""
    if not any(name.startswith("roi_heads.") for name in names):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("roi_heads.")}
    surplus = _levels(tensors) - _levels(names)
    fitted = {}
    for name, tensor in tensors.items():
        level = re.match(r"(backbone\.fpn\.\w+_blocks\.)(\d+)(.*)", name)
        if level is None:
            fitted[name] = tensor
        elif int(level[2]) >= surplus:  # the coarser levels are those that all pyramids have
            fitted[f"{level[1]}{int(level[2]) - surplus}{level[3]}"] = tensor
    for name in [name for name in fitted if name.endswith(".0.weight") and name in names]:
        part = name.removesuffix("0.weight")
        if f"{part}1.running_var" in fitted and f"{part}1.running_var" not in names:
            norm = {key: fitted.pop(f"{part}1.{key}") for key in ("weight", "bias", "running_mean", "running_var")}
            fitted.pop(f"{part}1.num_batches_tracked", None)
            scale = norm["weight"] / torch.sqrt(norm["running_var"] + _EPSILON)
            fitted[name] = fitted[name] * scale[:, None, None, None]
            fitted[f"{part}0.bias"] = norm["bias"] - norm["running_mean"] * scale
    return fitted


def _levels(names) -> int:
    return sum(bool(re.fullmatch(r"backbone\.fpn\.inner_blocks\.\d+\.0\.weight", name)) for name in names)
