"""The arguments of pre-training: the flags of `aligndet pretrain` and the keys of its recipes."""

from dataclasses import dataclass
from typing import Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..arguments import (
    AugmentationArguments,
    DatasetArguments,
    LoadingArguments,
    OptimisationArguments,
    TrainingRunArguments,
    again,
)
from ..data.streaming import is_stream
from ..detectors.build import DetectorArguments
from ..flags import flag
from ..hub import HubModelArguments
from ..ranges import COUNT, POSITIVE
from .method_arguments import MethodArguments, join_config
from .trackers import require_trackers

# What is not given depends on the method.
DEFAULTS = {
    "aligndet": {
        "image_sizes": [640, 672, 704, 736, 768, 800],
        "max_proposals": 50,
        "proposal_sampling": "top",
        "color": False,
    },
    "soco": {
        "image_sizes": {"fpn": [224, 224, 112], "star": [224, 224, 192, 112], "c4": [224, 224]},
        "max_proposals": 4,
        "proposal_sampling": "random",
        "crop_scale": [0.5, 1.0],
        "color": True,
    },
}


@dataclass(kw_only=True)
class PretrainArguments(
    HubModelArguments,
    TrainingRunArguments,
    LoadingArguments,
    OptimisationArguments,
    MethodArguments,
    AugmentationArguments,
    DetectorArguments,
    DatasetArguments,
):
    """Arguments of [`pretrain`]: the flags of `aligndet pretrain` and the keys of its recipes."""

    help_groups = {"streaming": "Data", "preset": "Method", "optim": "Optimisation", "report_to": "Output"}

    split: str | None = again(DatasetArguments, "split", default="train", help="split of the dataset")
    streaming: bool = flag(False, "data", "read the dataset as a stream instead of downloading it; needs max_steps")
    stream_buffer: int = flag(
        256, "data", "streaming: shuffle this many images together, in each data loading process", range=COUNT
    )
    num_clusters: int | None = flag(
        None, "result", "streaming: clusters of the proposals, which are counted otherwise", range=COUNT
    )
    max_proposals: int | None = flag(
        None,
        "data",
        "proposals per image, never more than the detector has queries; 50 if not given. SoCo: per crop; 4",
        range=COUNT,
    )
    proposal_sampling: Literal["top", "random"] | None = flag(
        None,
        "data",
        "`top`: always the best by score; `random`: drawn anew each epoch; `top`, for SoCo `random`, if not given",
    )
    use_clusters: bool | None = flag(
        None,
        "data",
        "use the proposals' clusters as classes instead of one class `object`; where they have clusters, if not given",
    )

    dataloader_num_workers: int = again(
        LoadingArguments, "dataloader_num_workers", help="processes that load images, of each training process"
    )
    image_sizes: list[int] | None = again(
        AugmentationArguments,
        "image_sizes",
        help="sizes in pixels that images are resized to at random: the shorter side, or both sides; 640 672 ... 800 "
        "if not given, smaller ones for images whose shorter side is below 480. SoCo: both sides of each view, the "
        "whole image's first; 224 224 112",
    )
    color: bool | None = again(
        AugmentationArguments,
        "color",
        default=None,
        help="apply one random colour operation to each image: it teaches to overlook colours, which may tell classes "
        "apart; SoCo and the preset `paper` do, if not given",
    )
    crop_scale: list[float] | None = again(
        AugmentationArguments,
        "crop_scale",
        default=None,
        help="smallest and largest area of a random crop, as shares of the image; no crop if not given. SoCo: 0.5 1.0",
    )

    preset: Literal["suited", "paper"] = flag(
        "suited",
        "result",
        "where a value is not given, `suited` takes one that suits the number of steps and any images, `paper` the "
        "published one: `base_momentum` 0.996, no warm-up, image_sizes up to 800, and random colours",
    )
    method: Literal["aligndet", "soco"] = flag(
        "aligndet",
        "result",
        "`aligndet`: the whole detector; `soco`: a backbone, with a feature pyramid and a box head. Of the "
        "detector's flags SoCo takes `backbone` and `backbone_weights`",
    )
    aligndet_config: dict = flag(
        {}, "result", "fields of AlignDetConfig, several at once; each is a flag of its own as well"
    )
    soco_config: dict = flag({}, "result", "fields of SoCoConfig, several at once; each is a flag of its own as well")

    per_device_train_batch_size: int = again(OptimisationArguments, "per_device_train_batch_size", default=2)
    optim: Literal["adamw_torch_fused", "lars"] = flag(
        "adamw_torch_fused",
        "result",
        "optimizer; `lars` is for large batches: SGD with a rate for each layer",
        was={"optimizer": lambda value: {"adamw": "adamw_torch_fused"}.get(value, value)},
    )
    learning_rate: float = again(OptimisationArguments, "learning_rate", default=2e-4, range=POSITIVE)
    decay_norms_and_biases: bool = flag(True, "result", "decay one-dimensional parameters too")
    max_grad_norm: float = again(OptimisationArguments, "max_grad_norm", range=POSITIVE)
    lr_scheduler_type: Literal["constant", "step", "cosine"] = again(
        OptimisationArguments,
        "lr_scheduler_type",
        default="step",
        help="learning rate after the warm-up; `step` divides it by 10 at each of lr_milestones",
    )
    lr_milestones: list[float] = again(OptimisationArguments, "lr_milestones", default=[0.8])
    warmup_steps: float | None = again(
        OptimisationArguments,
        "warmup_steps",
        default=None,
        help="steps of linear warm-up, or below 1 a share of the run; a twentieth, at most 500 steps, if not given; "
        "none for SoCo and the preset `paper`",
    )

    save_steps: int = again(TrainingRunArguments, "save_steps", range=COUNT)
    save_total_limit: int = again(TrainingRunArguments, "save_total_limit", help="keep this many checkpoints")
    logging_steps: int = again(TrainingRunArguments, "logging_steps", default=50, range=COUNT)
    report_to: list[str] = flag([], "output", "trackers of Accelerate: tensorboard, wandb, ... (or none)")

    def __post_init__(self):
        super().__post_init__()
        join_config(self)
        self.streaming |= is_stream(self.dataset)
        defaults = DEFAULTS[self.method] | ({"color": True} if self.preset == "paper" else {})
        if self.method == "aligndet" and self.preset == "suited" and not self.streaming:
            del defaults["image_sizes"]  # which the images decide
        for name, value in defaults.items():
            if getattr(self, name) is None:
                by_variant = isinstance(value, dict)
                setattr(self, name, value.get(self.soco_config.get("variant", "fpn")) if by_variant else value)
        for name in ("streaming", "gradient_checkpointing"):
            if getattr(self, name) and self.method != "aligndet":
                raise ValueError(f"{name} is for --method aligndet, this is {self.method}")
        if self.streaming and self.max_steps <= 0:
            raise ValueError("streaming needs max_steps: the length of a stream is not known")
        if self.use_clusters is None and (self.streaming or self.method != "aligndet"):
            self.use_clusters = self.num_clusters is not None  # a stream's clusters are not looked for
        if self.streaming and self.use_clusters and self.num_clusters is None:
            raise ValueError("streaming with use_clusters needs num_clusters: a stream is not read to count them")
        self.check_crop_scale()
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are two precisions: give one of them")
        if self.lr_scheduler_type != "step" and self.lr_milestones and "lr_milestones" in self.given:
            raise ValueError(
                f"lr_milestones are for lr_scheduler_type step, this is {self.lr_scheduler_type}: give one"
            )
        if self.optim == "lars" and not self.weight_decay > 0:
            raise ValueError("LARS adapts the rates of the layers that decay: weight_decay must be positive")
        require_trackers(self.report_to, LOGGER_TYPE_TO_CLASS, {str(one) for one in get_available_trackers()})
