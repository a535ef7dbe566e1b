"""Tiny random detectors, one config per family, for tests. None of them can detect anything."""

import torch
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    DetrConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrResNetConfig,
    TimmBackboneConfig,
)

NUM_LABELS, NUM_QUERIES = 3, 20


def timm_backbone(name: str = "resnet10t", out_indices: tuple[int, ...] = (4,)) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone=name, out_indices=list(out_indices), freeze_batch_norm_2d=True)


def _detr_fields() -> dict:
    return {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": NUM_QUERIES,
        "auxiliary_loss": True,
    }


def _rt_detr_backbone() -> RTDetrResNetConfig:
    return RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


CONFIGS = {
    "detr": lambda **kw: DetrConfig(backbone_config=timm_backbone(), **_detr_fields() | kw),
    "conditional_detr": lambda **kw: ConditionalDetrConfig(backbone_config=timm_backbone(), **_detr_fields() | kw),
    "rt_detr": lambda **kw: RTDetrConfig(
        backbone_config=_rt_detr_backbone(),
        **{
            "d_model": 32,
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [16, 24, 32],
            "decoder_in_channels": [32, 32, 32],
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "decoder_layers": 2,
            "num_queries": NUM_QUERIES,
            "num_denoising": 10,
        }
        | kw,
    ),
}


def tiny_config(model_type: str, **fields) -> PreTrainedConfig:
    """The tiny config of a family, with any field overridden."""
    return CONFIGS[model_type](**{"num_labels": NUM_LABELS} | fields)


def tiny_detector(model_type: str, seed: int = 0, **fields) -> PreTrainedModel:
    """A detector of the tiny config with seeded random weights."""
    torch.manual_seed(seed)
    return AutoModelForObjectDetection.from_config(tiny_config(model_type, **fields))


def random_labels(counts: list[int], seed: int = 0, num_labels: int = NUM_LABELS) -> list[dict[str, torch.Tensor]]:
    """Random labels with the given number of boxes an image; `proposal_ids` count on through the batch."""
    generator = torch.Generator().manual_seed(seed)
    labels, start = [], 0
    for count in counts:
        size = torch.rand(count, 2, generator=generator) * 0.3 + 0.05
        center = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
        labels.append(
            {
                "class_labels": torch.randint(0, num_labels, (count,), generator=generator),
                "boxes": torch.cat([center, size], 1),
                "proposal_ids": torch.arange(start, start + count),
            }
        )
        start += count
    return labels


def random_batch(counts: list[int] = (5, 3), size: int = 64, seed: int = 0, num_labels: int = NUM_LABELS) -> dict:
    """Keyword arguments of a detector's forward, with random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(len(counts), 3, size, size, generator=generator),
        "pixel_mask": torch.ones(len(counts), size, size, dtype=torch.long),
        "labels": random_labels(list(counts), seed, num_labels),
    }
