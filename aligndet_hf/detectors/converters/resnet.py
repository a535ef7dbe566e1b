"""The trunk that nearly all published detectors have: a ResNet with torchvision's names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import TimmBackboneConfig

# Blocks of the four stages, and whether they have a third convolution.
RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def resnet_config(
    names: Iterable[str], prefix: str, out_indices: tuple[int, ...], is_dilated: bool = False
) -> TimmBackboneConfig:
    """
    timm's config of the ResNet in a checkpoint.

    Args:
        names (`Iterable[str]`): names of the checkpoint's tensors.
        prefix (`str`): what stands before the ResNet's.
        out_indices (`tuple[int, ...]`): the feature maps that the detector takes, 4 being the last.
        is_dilated (`bool`, *optional*, defaults to `False`): whether the last stage keeps the size of the map (DC5).

    Raises:
        `ValueError`: if it is another network.
    """
    return TimmBackboneConfig(
        backbone=resnet_name(names, prefix),
        out_indices=list(out_indices),
        freeze_batch_norm_2d=True,
        output_stride=16 if is_dilated else 32,
    )


def resnet_name(names: Iterable[str], prefix: str) -> str:
    """timm's and torchvision's name of a ResNet with torchvision's tensors under a prefix."""
    blocks = [set(), set(), set(), set()]
    is_deep = False
    for name in names:
        if found := re.match(re.escape(prefix) + r"layer([1-4])\.(\d+)\.conv([1-3])\.weight$", name):
            blocks[int(found[1]) - 1].add(int(found[2]))
            is_deep |= found[3] == "3"
    depth = tuple(map(len, blocks))
    if (depth, is_deep) not in RESNETS:
        raise ValueError(
            f"the trunk under {prefix!r} has {'/'.join(map(str, depth))} blocks in its stages: it is none of "
            + ", ".join(RESNETS.values())
        )
    return RESNETS[depth, is_deep]
