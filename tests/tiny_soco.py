"""A tiny SoCo and batches for it, for tests."""

import torch
from transformers import PreTrainedConfig, ResNetConfig, TimmBackboneConfig

from aligndet_hf import SoCoConfig, SoCoForPreTraining

SMALL = {"fpn_channels": 8, "head_dim": 16, "mlp_dim": 16, "projection_dim": 8}
SIZES = {"fpn": (64, 64, 32), "star": (64, 64, 48, 32), "c4": (64, 64)}


def tiny_backbone(variant: str = "fpn") -> PreTrainedConfig:
    if variant == "c4":
        return TimmBackboneConfig(backbone="resnet10t", out_indices=[3, 4])
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def tiny_soco(variant: str = "fpn", seed: int = 0, **config) -> SoCoForPreTraining:
    torch.manual_seed(seed)
    fields = {"backbone_config": tiny_backbone(variant), "variant": variant, "level_sizes": [8, 16, 32, 64]}
    return SoCoForPreTraining(SoCoConfig(**fields | SMALL | config)).train()


def batch_for(model: SoCoForPreTraining, images: int = 2, count: int = 3, seed: int = 0) -> dict:
    """Random images; each proposal has the same relative box in all views, and a level as random as its size."""
    generator = torch.Generator().manual_seed(seed)
    sets, sizes = model.config.box_sets, SIZES[model.config.variant]
    corners = torch.rand(max(sets) + 1, images, count, 2, generator=generator) * 0.5
    boxes = torch.cat([corners, corners + 0.1 + 0.4 * torch.rand(corners.shape, generator=generator)], -1)
    num_levels = 1 if model.config.variant == "c4" else 4
    views = [boxes.transpose(0, 1).flatten(1, 2), *(boxes[index] for index in sets)]
    levels = [torch.randint(num_levels, view.shape[:2], generator=generator) for view in views]
    ids = torch.arange(1, count + 1).expand(images, count)
    return {
        "pixel_values": [torch.rand(images, 3, size, size, generator=generator) for size in sizes],
        "boxes": views,
        "levels": levels,
        "ids": [ids.repeat(1, max(sets) + 1), *(ids for _ in sets)],
    }
