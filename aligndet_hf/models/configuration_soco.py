"""Configuration of SoCo pre-training."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..ranges import COUNT, SHARE, require

# Of each variant, which crop and set of boxes every view but the first shows; the first is the whole image.
BOX_SETS = {"fpn": (0, 1), "star": (0, 1, 0), "c4": (0,)}


@strict
class SoCoConfig(PreTrainedConfig):
    r"""
    Configuration of [`SoCoForPreTraining`]: a backbone's config and the numbers of the method.

    Schedules and the sizes of views are no part of it. The defaults are the official code's (Wei et al.,
    NeurIPS 2021).

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            config of a backbone of timm or transformers; it says which feature maps are taken, the finest first. See
            [`~aligndet_hf.detectors.backbones.build_backbone_config`]. A ResNet-50 of timm if missing.
        variant (`str`, *optional*, defaults to `"fpn"`):
            "fpn" trains backbone, feature pyramid and box head with three views, "star" with four; "c4" trains the
            backbone alone with two, its last stage being the box head.
        fpn_channels (`int`, *optional*, defaults to 256): channels of the feature pyramid and of the head's
            convolutions.
        head_dim (`int`, *optional*, defaults to 1024): width of the head's output.
        mlp_dim (`int`, *optional*, defaults to 4096): hidden width of projector and predictor.
        projection_dim (`int`, *optional*, defaults to 256): width of the embeddings that are compared.
        level_sizes (`list[int]`, *optional*, defaults to `[48, 96, 192, 224]`):
            for each feature map, the size in pixels of the view (the root of the area) up to which boxes are pooled
            from it. Unused by "c4".
        base_momentum (`float`, *optional*, defaults to 0.99): momentum that the cosine schedule starts with.
        end_momentum (`float`, *optional*, defaults to 1.0): momentum that it ends with.

    Raises:
        `StrictDataclassFieldValidationError`: for a value of another type, or an unknown variant.
        `ValueError`: for a number out of its range, or level sizes that do not ascend.
    """

    model_type = "soco"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    variant: Literal["fpn", "star", "c4"] = "fpn"
    fpn_channels: int = 256
    head_dim: int = 1024
    mlp_dim: int = 4096
    projection_dim: int = 256
    level_sizes: list[int] | None = None
    base_momentum: float | int = 0.99
    end_momentum: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            levels = [3, 4] if self.variant == "c4" else [1, 2, 3, 4]
            fields = dict(self.backbone_config or {"backbone": "resnet50", "out_indices": levels})
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type", "timm_backbone"), **fields)
        self.level_sizes = [48, 96, 192, 224] if self.level_sizes is None else list(self.level_sizes)
        for name in ("fpn_channels", "head_dim", "mlp_dim", "projection_dim"):
            require(name, getattr(self, name), COUNT)
        require("base_momentum", self.base_momentum, SHARE)
        require("end_momentum", self.end_momentum, SHARE)
        for size in self.level_sizes:
            require("level_sizes", size, COUNT)
        if sorted(set(self.level_sizes)) != self.level_sizes:
            raise ValueError(f"level_sizes must ascend, got {self.level_sizes}")
        super().__post_init__(**kwargs)

    @property
    def box_sets(self) -> tuple[int, ...]:
        """For each view but the first, the set of boxes that it shares with the first."""
        return BOX_SETS[self.variant]
