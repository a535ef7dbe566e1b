"""Configuration of AlignDet pre-training."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, require


@strict
class AlignDetConfig(PreTrainedConfig):
    r"""
    Configuration of [`AlignDetForPreTraining`]: a detector's config and the numbers of the method.

    Schedules (steps, learning rate, ...) are no part of it. The defaults are the official DETR recipe's (Li et
    al., ICCV 2023).

    Args:
        detector_config (`PreTrainedConfig` or `dict`, *optional*):
            config of the detector, of any family in [`~aligndet_hf.detectors.families.FAMILIES`]; a default DETR if
            missing.
        projection_dim (`int`, *optional*, defaults to 256):
            width of the embeddings that are contrasted.
        contrastive_temperature (`float`, *optional*, defaults to 0.5):
            temperature of the contrastive loss.
        contrastive_loss_coefficient (`float`, *optional*, defaults to 1.0):
            weight of the contrastive loss beside the detection loss; 0 switches it off.
        detection_loss (`str`, *optional*, defaults to `"all"`):
            which part of the detection loss on the proposals counts beside the contrast: "all"; "boxes", without the
            classes, as the official code has it for RetinaNet, FCOS, Faster and Mask R-CNN; or "none".
        gather_negatives (`bool`, *optional*, defaults to `False`):
            let the queries of all processes repel each other, as if one process had their images. Otherwise only
            the queries of one process and forward pass do, as in the official code.
        base_momentum (`float`, *optional*, defaults to 0.996):
            momentum of the first update of the momentum detector.
        end_momentum (`float`, *optional*, defaults to 1.0):
            momentum that the cosine schedule ends with.
        freeze_backbone (`bool`, *optional*, defaults to `True`):
            keep the backbone as it is. A frozen backbone exists once, in memory and in the checkpoint, and
            serves both detectors.
        trainable_backbone_stages (`int`, *optional*):
            train only this many of the backbone's stages, counted from the last, where it is not frozen. See
            [`~aligndet_hf.detectors.backbones.set_backbone_trainable`].
        normalize_class_loss_by (`str`, *optional*, defaults to `"weights"`):
            for families with a softmax class loss: "weights" as DETR does, "boxes" as the official AlignDet code
            does, which weighs the class loss about (queries / boxes) times more.

    Raises:
        `StrictDataclassFieldValidationError`: for a value of another type.
        `ValueError`: for a number out of its range, such as a temperature that is not positive.
    """

    model_type = "aligndet"
    sub_configs = {"detector_config": AutoConfig}

    detector_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    contrastive_temperature: float | int = 0.5
    contrastive_loss_coefficient: float | int = 1.0
    detection_loss: Literal["all", "boxes", "none"] = "all"
    gather_negatives: bool = False
    base_momentum: float | int = 0.996
    end_momentum: float | int = 1.0
    freeze_backbone: bool = True
    trainable_backbone_stages: int | None = None
    normalize_class_loss_by: Literal["weights", "boxes"] = "weights"

    def __post_init__(self, **kwargs: Any) -> None:
        require("projection_dim", self.projection_dim, COUNT)
        require("contrastive_temperature", self.contrastive_temperature, POSITIVE)
        require("contrastive_loss_coefficient", self.contrastive_loss_coefficient, NOT_NEGATIVE)
        require("base_momentum", self.base_momentum, SHARE)
        require("end_momentum", self.end_momentum, SHARE)
        if self.trainable_backbone_stages is not None:
            require("trainable_backbone_stages", self.trainable_backbone_stages, COUNT)
        if not isinstance(self.detector_config, PreTrainedConfig):
            fields = dict(self.detector_config or {})
            self.detector_config = AutoConfig.for_model(fields.pop("model_type", "detr"), **fields)
        super().__post_init__(**kwargs)
