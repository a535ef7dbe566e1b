"""The arguments of pre-training: the flags of `aligndet pretrain` and the keys of its recipes."""

from dataclasses import dataclass, field
from typing import Literal

from datasets import IterableDataset
from huggingface_hub.errors import StrictDataclassError

from ..detectors.build import DetectorArguments
from ..hub import HubArguments
from ..models import AlignDetConfig, SoCoConfig
from ..objects import name_objects
from ..ranges import COUNT, LIMIT, PART, POSITIVE, SEED, SHARE, check_values

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
class PretrainArguments(DetectorArguments, HubArguments):
    """Arguments of [`pretrain`]: the flags of `aligndet pretrain` and the keys of its recipes."""

    help_groups = {
        "dataset": "Data",
        "image_sizes": "Views",
        "preset": "Method",
        "num_train_epochs": "Optimisation",
        "output_dir": "Run",
        "hub_model_id": "Hub",
    }

    dataset: str = field(
        metadata={
            "role": "data",
            "help": "images with a `proposals` column: a folder or Hub id, as `aligndet proposals` writes it",
        }
    )
    split: str = field(default="train", metadata={"role": "data", "help": "split of the dataset"})
    streaming: bool = field(
        default=False,
        metadata={"role": "data", "help": "read the dataset as a stream instead of downloading it; needs max_steps"},
    )
    stream_buffer: int = field(
        default=256,
        metadata={
            "help": "streaming: images that are shuffled together, of each data loading process",
            "range": COUNT,
        },
    )
    num_clusters: int | None = field(
        default=None,
        metadata={"help": "streaming: clusters of the proposals, which are counted otherwise", "range": COUNT},
    )
    max_proposals: int | None = field(
        default=None,
        metadata={
            "help": "proposals per image, never more than the detector has queries; 50 if not given. SoCo: per crop; "
            "4",
            "range": COUNT,
        },
    )
    proposal_sampling: Literal["top", "random"] | None = field(
        default=None,
        metadata={
            "help": "`top`: always the best by score; `random`: drawn anew each epoch; `top`, for SoCo `random`, if "
            "not given"
        },
    )
    use_clusters: bool = field(
        default=False, metadata={"help": "use the proposals' clusters as classes instead of one class `object`"}
    )

    image_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "sizes in pixels that views are resized to at random: the shorter side, or both sides; 640 672 "
            "... 800 if not given. SoCo: both sides of each view, that of the whole image first; 224 224 112",
            "range": COUNT,
        },
    )
    max_size: int | None = field(
        default=None,
        metadata={"help": "longest side of a view in pixels; 5/3 of the drawn size if not given", "range": COUNT},
    )
    flip_probability: float = field(default=0.5, metadata={"help": "probability of a horizontal flip", "range": SHARE})
    color: bool | None = field(
        default=None,
        metadata={
            "help": "apply one random colour operation to each view: it teaches to overlook colours, which may tell "
            "classes apart; SoCo and the preset `paper` do, if not given"
        },
    )
    crop_scale: list[float] | None = field(
        default=None,
        metadata={
            "help": "smallest and largest area of a random crop; no crop if not given. SoCo: 0.5 1.0",
            "range": PART,
        },
    )

    preset: Literal["suited", "paper"] = field(
        default="suited",
        metadata={
            "help": "where a value is not given, `suited` takes one that suits the number of steps and any images, "
            "`paper` the published one: `base_momentum` 0.996, and random colours"
        },
    )
    method: Literal["aligndet", "soco"] = field(
        default="aligndet",
        metadata={
            "help": "`aligndet`: the whole detector; `soco`: a backbone, with a feature pyramid and a box head. Of "
            "the detector's flags SoCo takes `backbone` and `backbone_weights`"
        },
    )
    aligndet_config: dict = field(
        default_factory=dict,
        metadata={"help": "fields of AlignDetConfig to set, e.g. contrastive_loss_coefficient, freeze_backbone"},
    )
    soco_config: dict = field(
        default_factory=dict, metadata={"help": "fields of SoCoConfig to set, e.g. variant, level_sizes, mlp_dim"}
    )

    num_train_epochs: float = field(default=50, metadata={"help": "epochs", "range": POSITIVE})
    max_steps: int = field(
        default=-1, metadata={"help": "optimizer steps; if positive, overrides the epochs", "range": LIMIT}
    )
    per_device_train_batch_size: int = field(
        default=2, metadata={"role": "batch", "help": "images per process and forward pass", "range": COUNT}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"role": "batch", "help": "forward passes per optimizer step", "range": COUNT}
    )
    optimizer: Literal["adamw", "lars"] = field(
        default="adamw", metadata={"help": "`lars` is for large batches: SGD with a rate for each layer"}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate", "range": POSITIVE})
    weight_decay: float = field(default=1e-4, metadata={"help": "weight decay"})
    decay_norms_and_biases: bool = field(default=True, metadata={"help": "decay one-dimensional parameters too"})
    max_grad_norm: float = field(
        default=0.1, metadata={"help": "gradients are clipped to this norm", "range": POSITIVE}
    )
    lr_scheduler_type: Literal["constant", "step", "cosine"] = field(
        default="step", metadata={"help": "learning rate after the warm-up; `step` divides it by 10 at each milestone"}
    )
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.8],
        metadata={"help": "fractions of the run (below 1) or epochs, for `step`", "range": POSITIVE},
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"role": "run", "help": "compute the layers again in the backward pass: slower, with less memory"},
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None,
        metadata={"role": "run", "help": "precision of the forward pass; what `accelerate launch` says if not given"},
    )
    torch_compile: bool = field(
        default=False,
        metadata={
            "help": "compile the networks with torch.compile: minutes at the start, and again for new image sizes, "
            "for faster steps; a network that cannot be compiled runs without"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the weights, the data and all noise", "range": SEED})

    output_dir: str = field(metadata={"role": "place", "help": "folder of the run; the same command again resumes it"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"role": "place", "help": "start anew, and remove the old checkpoints"}
    )
    save_steps: int = field(default=500, metadata={"role": "run", "help": "steps between checkpoints", "range": COUNT})
    save_total_limit: int = field(
        default=2, metadata={"role": "output", "help": "checkpoints to keep", "range": COUNT}
    )
    logging_steps: int = field(
        default=50,
        metadata={"role": "run", "help": "steps between entries of the log (log.jsonl, trackers)", "range": COUNT},
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"role": "output", "help": "trackers of Accelerate: tensorboard, wandb, ... (or none)"},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"role": "run", "help": "data loading processes per training process"}
    )
    use_cpu: bool = field(default=False, metadata={"role": "run", "help": "train on the CPU even if there is a GPU"})
    disable_tqdm: bool = field(default=False, metadata={"role": "output", "help": "show no progress bar"})
    write_report: bool = field(
        default=True, metadata={"role": "output", "help": "write report.html at the end; its curves need matplotlib"}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"role": "output", "help": "Hub repository, `user/name`; the name of output_dir if not given"},
    )

    def __post_init__(self):
        name_objects(self)
        check_values(self)
        defaults = DEFAULTS[self.method] | ({"color": True} if self.preset == "paper" else {})
        for name, value in defaults.items():
            if getattr(self, name) is None:
                by_variant = isinstance(value, dict)
                setattr(self, name, value.get(self.soco_config.get("variant", "fpn")) if by_variant else value)
        for name in ("streaming", "gradient_checkpointing"):
            if getattr(self, name) and self.method != "aligndet":
                raise ValueError(f"{name} is for --method aligndet, this is {self.method}")
        self.streaming |= isinstance(getattr(self.dataset, "value", None), IterableDataset)
        if self.streaming and self.max_steps <= 0:
            raise ValueError("streaming needs max_steps: the length of a stream is not known")
        if self.streaming and self.use_clusters and self.num_clusters is None:
            raise ValueError("streaming with use_clusters needs num_clusters: a stream is not read to count them")
        if self.crop_scale is not None and (len(self.crop_scale) != 2 or self.crop_scale[0] > self.crop_scale[1]):
            raise ValueError(f"crop_scale takes the smallest and the largest area, got {self.crop_scale}")
        if self.optimizer == "lars" and not self.weight_decay > 0:
            raise ValueError("LARS adapts the rates of the layers that decay: weight_decay must be positive")
        for method, config in (("aligndet", AlignDetConfig), ("soco", SoCoConfig)):
            name = f"{method}_config"
            known = set(config.__annotations__) - {"detector_config", "backbone_config", "model_type"}
            if unknown := set(getattr(self, name)) - known:
                raise ValueError(f"{name}: unknown {sorted(unknown)}; there are {sorted(known)}")
            if getattr(self, name) and method != self.method:
                raise ValueError(f"{name} is for --method {method}, this is {self.method}")
            try:
                config(**getattr(self, name))
            except StrictDataclassError as error:
                raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
