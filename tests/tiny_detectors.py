"""Tiny random detectors, one config per family, for tests. None of them can detect anything."""

import torch
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    Deimv2Config,
    DetrConfig,
    DFineConfig,
    HGNetV2Config,
    LwDetrConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RfDetrConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
    TableTransformerConfig,
    TimmBackboneConfig,
    YolosConfig,
)
from transformers.models.lw_detr.configuration_lw_detr import LwDetrViTConfig
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from aligndet_hf.convnets.modeling_torchvision import FasterRcnnConfig, FcosConfig, MaskRcnnConfig, RetinaNetConfig

NUM_LABELS, NUM_QUERIES = 3, 20

# `detector_config` of a small DETR, and the flags of a fine-tuning of a new one that takes one step and leaves little.
SMALL_DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
ONE_STEP = {
    "detector": "detr", "backbone": "resnet10t", "image_sizes": [48], "max_steps": 1, "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0, "dataloader_persistent_workers": False, "report_to": "none", "save_strategy": "no",
    "num_pictures": 0, "write_report": False, "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def timm_backbone(name: str = "test_resnet", out_indices: tuple[int, ...] = (4,)) -> TimmBackboneConfig:
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


def _hgnet() -> HGNetV2Config:
    return HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_indices=[2, 3, 4],
    )


def _deformable_fields() -> dict:
    return _detr_fields() | {"backbone_config": timm_backbone(out_indices=(2, 3, 4))}


def _rt_detr_fields(channels: list[int]) -> dict:
    return {
        "d_model": 32,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": channels,
        "decoder_in_channels": [32, 32, 32],
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_layers": 2,
        "num_queries": NUM_QUERIES,
        "num_denoising": 10,
    }


def _group_detr_fields() -> dict:
    return {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "num_queries": NUM_QUERIES,
        "group_detr": 3,
        "c2f_num_blocks": 1,
    }


def _vit_fields() -> dict:
    return {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2, "out_indices": [2, 4]}


def _lw_detr_backbone() -> LwDetrViTConfig:
    return LwDetrViTConfig(
        **_vit_fields(),
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        num_windows=4,
        window_block_indices=[0, 2],
    )


def _rf_detr_backbone() -> RfDetrDinov2Config:
    return RfDetrDinov2Config(**_vit_fields(), image_size=64, patch_size=8, num_windows=2, use_mask_token=False)


def _dense_fields() -> dict:
    return {
        "backbone_config": timm_backbone(out_indices=(2, 3, 4)),
        "hidden_size": 64,
        "detections_per_image": NUM_QUERIES,
        "rows_per_image": 64,
    }


def _r_cnn_fields() -> dict:
    return {
        "backbone_config": timm_backbone(out_indices=(1, 2, 3, 4)),
        "hidden_size": 32,
        "box_head_size": 32,
        "anchor_sizes": [[8], [16], [32], [64], [128]],
        "detections_per_image": NUM_QUERIES,
        "rpn_batch_size": 64,
        "rpn_pre_nms_top_k": 100,
        "rpn_post_nms_top_k": 100,
        "pre_nms_top_k": 100,
        "roi_batch_size": 64,
    }


CONFIGS = {
    "detr": lambda **kw: DetrConfig(**{"backbone_config": timm_backbone(), **_detr_fields()} | kw),
    "table-transformer": lambda **kw: TableTransformerConfig(
        **{"backbone_config": timm_backbone(), **_detr_fields()} | kw
    ),
    "conditional_detr": lambda **kw: ConditionalDetrConfig(
        **{"backbone_config": timm_backbone(), **_detr_fields()} | kw
    ),
    "dab-detr": lambda **kw: DabDetrConfig(
        **{"backbone_config": timm_backbone(), "hidden_size": 32, **_detr_fields()} | kw
    ),
    "deformable_detr": lambda **kw: DeformableDetrConfig(**_deformable_fields() | kw),
    "deformable_detr two-stage": lambda **kw: DeformableDetrConfig(
        **_deformable_fields()
        | {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": NUM_QUERIES}
        | kw
    ),
    "rt_detr": lambda **kw: RTDetrConfig(
        **{"backbone_config": _rt_detr_backbone()} | _rt_detr_fields([16, 24, 32]) | kw
    ),
    "rt_detr_v2": lambda **kw: RTDetrV2Config(
        **{"backbone_config": _rt_detr_backbone()} | _rt_detr_fields([16, 24, 32]) | kw
    ),
    "d_fine": lambda **kw: DFineConfig(**{"backbone_config": _hgnet()} | _rt_detr_fields([16, 16, 16]) | kw),
    "deimv2": lambda **kw: Deimv2Config(**{"backbone_config": _hgnet()} | _rt_detr_fields([16, 16, 16]) | kw),
    "lw_detr": lambda **kw: LwDetrConfig(
        **{"backbone_config": _lw_detr_backbone(), "projector_scale_factors": [1.0]} | _group_detr_fields() | kw
    ),
    "rf_detr": lambda **kw: RfDetrConfig(**{"backbone_config": _rf_detr_backbone()} | _group_detr_fields() | kw),
    "yolos": lambda **kw: YolosConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": [64, 64],
            "patch_size": 16,
            "num_detection_tokens": NUM_QUERIES,
        }
        | kw
    ),
    "torchvision_retinanet": lambda **kw: RetinaNetConfig(
        **_dense_fields()
        | {"anchor_sizes": [[8, 10, 12], [16, 20, 24], [32, 40, 48], [64, 80, 96], [128, 160, 192]]}
        | kw
    ),
    "torchvision_fcos": lambda **kw: FcosConfig(**_dense_fields() | kw),
    "torchvision_faster_rcnn": lambda **kw: FasterRcnnConfig(**_r_cnn_fields() | kw),
    "torchvision_mask_rcnn": lambda **kw: MaskRcnnConfig(**_r_cnn_fields() | kw),
}

CONVNETS = [name for name in CONFIGS if name.startswith("torchvision_")]
WITH_QUERIES = [name for name in CONFIGS if name not in CONVNETS]


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
