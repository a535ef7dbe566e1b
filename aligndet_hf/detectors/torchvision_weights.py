"""Weights for torchvision's detectors: what SoCo trained beside the backbone, and a report of what was taken."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .transfer import TransferReport
from .weight_files import read_tensors


def load_torchvision_weights(detector: nn.Module, weights: str | Path) -> TransferReport:
    """
    Loads backbone, feature pyramid and box head into a detector of torchvision.

    Args:
        detector (`nn.Module`): a detector of torchvision with the same trunk, changed in place. Faster and Mask R-CNN
            in their second version (`fasterrcnn_resnet50_fpn_v2`) have the same pyramid and head, with norms.
        weights (`str` or `Path`): a file with the detector's names, as
            [`~aligndet_hf.SoCoForPreTraining.export_torchvision`] writes it.

    Returns:
        [`~aligndet_hf.detectors.transfer.TransferReport`]: `kept` are the tensors that were taken; `reset` those that
        the file does not have, which stay as they are: RPN and predictors; `mismatched` the tensors of another shape.

    Raises:
        `ValueError`: if the file has a tensor that the detector has not: it is another trunk, or a detector without
            norms in its pyramid or head.

    Example:

    ```python
    >>> from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
    >>> from aligndet_hf.detectors.torchvision_weights import load_torchvision_weights

    >>> detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)
    >>> print(load_torchvision_weights(detector, "outputs/soco/torchvision.safetensors"))  # doctest: +SKIP
    transfer 'soco': 369 tensors kept (0 of them frozen), 12 reset, 0 mismatched

    ```
    """
    tensors, report = read_tensors(weights), TransferReport("soco")
    target = detector.state_dict(keep_vars=True)
    if unknown := [name for name in tensors if name not in target and not name.endswith("num_batches_tracked")]:
        raise ValueError(
            f"{weights} has {len(unknown)} of {len(tensors)} tensors that this {type(detector).__name__} does not "
            f"have, such as {unknown[0]}: it takes the same trunk, and norms in pyramid and box head"
        )
    chosen = {}
    for name, tensor in target.items():
        if name not in tensors:
            report.reset.append(name)
        elif tensors[name].shape != tensor.shape:
            report.mismatched.append(name)
        else:
            chosen[name] = tensors[name]
            report.kept.append(name)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                report.frozen.append(name)
    detector.load_state_dict(chosen, strict=False)
    return report
