"""The arguments of fine-tuning: the flags of `aligndet finetune` and the keys of its recipes."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from datasets import Dataset
from transformers import TrainingArguments

from ..data.augmentations import AUGMENTATIONS
from ..data.bit_depth import parse_rule
from ..detectors.build import DetectorArguments
from ..evaluation.coco_metrics import SUMMARY
from ..flags import nearest, roles
from ..objects import name_objects
from ..ranges import ANY, BELOW_ONE, COUNT, LIMIT, PART, POSITIVE, SEED, SHARE, Range, check_values


@dataclass(kw_only=True)
class FinetuneArguments(DetectorArguments, TrainingArguments):
    """
    Arguments of [`finetune`]: the flags of `aligndet finetune` and the keys of its recipes.

    All of `transformers.TrainingArguments` with defaults that suit detectors, and what is ours.
    """

    help_groups = {
        "dataset": "Data",
        "image_sizes": "Views",
        "transfer": "Transfer",
        "num_train_epochs": "Optimisation",
        "do_eval": "Measuring",
        "output_dir": "Run",
    }
    # Of numbers that transformers declares; others of them are finite and not negative.
    inherited_ranges = {
        "adam_beta1": BELOW_ONE,
        "adam_beta2": BELOW_ONE,
        "adam_epsilon": POSITIVE,
        "torch_empty_cache_steps": COUNT,
        "eval_steps": POSITIVE,
        "per_device_eval_batch_size": COUNT,
        "eval_accumulation_steps": COUNT,
        "save_steps": POSITIVE,
        "data_seed": SEED,
        "dataloader_prefetch_factor": COUNT,
        "ddp_bucket_cap_mb": COUNT,
        "ddp_timeout": COUNT,
        "local_rank": ANY,
    }

    # Of what TrainingArguments bring: the flags that have an effect here. All others are refused.
    inherited_roles = dict.fromkeys(
        [
            "adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "fp16", "lr_scheduler_kwargs", "optim",
            "optim_args",
        ],
        "result",
    ) | dict.fromkeys(["eval_steps", "eval_delay", "greater_is_better"], "best") | dict.fromkeys(
        [
            "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs",
            "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_pin_memory",
            "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
            "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "eval_on_start",
            "fsdp", "fsdp_config", "full_determinism", "gradient_checkpointing", "gradient_checkpointing_kwargs",
            "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
            "logging_strategy", "parallelism_config", "per_device_eval_batch_size",
            "restore_callback_states_from_checkpoint", "save_on_each_node", "save_steps", "skip_memory_metrics",
            "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps",
            "use_cpu",
        ],
        "run",
    ) | dict.fromkeys(
        [
            "disable_tqdm", "hub_always_push", "hub_private_repo", "hub_revision", "logging_dir", "project",
            "report_to", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
        ],
        "output",
    ) | {"hub_token": "secret"}  # fmt: skip

    dataset: str = field(metadata={"role": "data", "help": "labelled images: folder, COCO-JSON file or Hub id"})
    split: str = field(default="train", metadata={"role": "data", "help": "split of the dataset"})
    image_dir: str | None = field(
        default=None,
        metadata={"role": "data", "help": "folder of the images of a COCO file, if they are not found beside it"},
    )
    label_fraction: float = field(
        default=1.0,
        metadata={"help": "share of the training images to use; smaller ones lie inside larger ones", "range": PART},
    )
    label_seed: int = field(default=0, metadata={"help": "seed of the choice of these images", "range": SEED})
    pseudo_dataset: str | None = field(
        default=None,
        metadata={
            "role": "data",
            "help": "learn from the images that `aligndet pseudolabel` has labelled as well: its output folder",
        },
    )
    pseudo_split: str | None = field(
        default=None, metadata={"role": "data", "help": "its split, if there are several"}
    )
    labelled_share: float = field(
        default=0.5,
        metadata={
            "help": "share of labelled images in each batch, beside pseudo-labelled ones",
            "range": Range(0, 1, above=True, below=True),
        },
    )
    dataloader_num_workers: int = field(
        default=2, metadata={"role": "run", "help": "data loading processes per training process"}
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"role": "run", "help": "keep these processes from one epoch to the next"}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "leave out the images of an epoch that do not fill a batch, others each time"}
    )

    pixel_window: str = field(
        default="range",
        metadata={
            "help": "grey levels of images with more than 8 bits that become black and white, unless the detector or "
            "the dataset has them: range, the lowest and the highest of the data; percentile, 0.1 and 99.9 percent of "
            "the pixels; or two numbers such as 7000,9000"
        },
    )

    image_sizes: list[int] = field(
        default_factory=lambda: list(range(480, 801, 32)),
        metadata={
            "help": "sizes in pixels that images are resized to at random: the shorter side, or both sides",
            "range": COUNT,
        },
    )
    max_size: int | None = field(
        default=None, metadata={"help": "longest side in pixels; 5/3 of the drawn size if not given", "range": COUNT}
    )
    eval_size: int | None = field(
        default=None,
        metadata={
            "help": "size to measure and to deploy with; the largest of image_sizes if not given",
            "range": COUNT,
        },
    )
    flip_probability: float = field(default=0.5, metadata={"help": "probability of a horizontal flip", "range": SHARE})
    color: bool = field(default=False, metadata={"help": "apply one random colour operation to each image"})
    crop_scale: list[float] | None = field(
        default_factory=lambda: [0.3, 1.0],
        metadata={
            "help": "smallest and largest area of a random crop, as shares of the image; `1 1` for no crop",
            "range": PART,
        },
    )
    augmentations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "apply these before the view is drawn, in this order: mosaic, mixup, copy_paste, zoom_out, rotate "
            "(by up to 10 degrees), quarter_turn, photometric"
        },
    )
    augmentation_probability: float = field(
        default=0.5, metadata={"help": "apply each of the augmentations with this probability", "range": SHARE}
    )

    transfer: Literal["keep-boxes", "paper", "encoder-only", "everything"] = field(
        default="keep-boxes",
        metadata={
            "role": "start",
            "help": "what a checkpoint passes on: all but its class layers, `paper` not the last box layers either, "
            "`encoder-only` nothing of the decoder, queries and heads, `everything` all that fits",
        },
    )
    freeze_backbone: bool = field(default=False, metadata={"role": "start", "help": "keep the backbone as it is"})
    trainable_backbone_stages: int | None = field(
        default=None,
        metadata={
            "role": "start",
            "help": "train only so many of the backbone's stages, counted from the last",
            "range": COUNT,
        },
    )
    freeze_backbone_norms: bool = field(
        default=False,
        metadata={
            "role": "start",
            "help": "keep weights and statistics of the backbone's batch norms, also those of a checkpoint",
        },
    )

    num_train_epochs: float = field(default=50, metadata={"help": "epochs", "range": POSITIVE})
    max_steps: int = field(
        default=-1, metadata={"help": "optimizer steps; if positive, overrides the epochs", "range": LIMIT}
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"role": "batch", "help": "images per process and forward pass", "range": COUNT}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"role": "batch", "help": "forward passes per optimizer step", "range": COUNT}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of all but the backbone"})
    backbone_learning_rate: float | None = field(
        default=None,
        metadata={"role": "start", "help": "peak learning rate of the backbone; a tenth of the other if not given"},
    )
    transferred_learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak learning rate of what the checkpoint passed on, the backbone apart; learning_rate"},
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "multiply the learning rate by this factor from each layer to the one before it; 1: do not",
            "range": PART,
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "average the weights over the steps with this momentum, such as 0.999; keep the average",
            "range": Range(0, 1, above=True, below=True),
        },
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "weight decay; never of norms and biases"})
    max_grad_norm: float = field(default=0.1, metadata={"help": "gradients are clipped to this norm"})
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "learning rate after the warm-up: cosine, linear, constant_with_warmup, ..."},
    )
    lr_milestones: list[float] = field(
        default_factory=list,
        metadata={
            "help": "fractions of the run (below 1) or epochs at which the rate falls to a tenth, instead",
            "range": POSITIVE,
        },
    )
    warmup_steps: float = field(default=0, metadata={"help": "steps of linear warm-up, or below 1 a share of the run"})

    bf16: bool = field(
        default=False, metadata={"help": "forward passes in bfloat16 (autocast); fp16 is there as well"}
    )
    seed: int = field(default=0, metadata={"help": "seed of new layers, the data and all noise", "range": SEED})

    do_train: bool = field(
        default=True, metadata={"role": "run", "help": "always true: `aligndet evaluate` measures without training"}
    )
    do_eval: bool = field(
        default=True, metadata={"role": "run", "help": "measure on eval_dataset, at the end at least"}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"role": "best", "help": "what to measure on; `dataset` if not given"}
    )
    eval_split: str | None = field(
        default=None, metadata={"role": "best", "help": "its split; of `dataset` `validation` if not given"}
    )
    eval_image_dir: str | None = field(default=None, metadata={"role": "best", "help": "as image_dir"})
    eval_strategy: str = field(
        default="epoch", metadata={"role": "best", "help": "when to measure: epoch, steps, or no (at the end)"}
    )
    metric_for_best_model: str | None = field(
        default="AP", metadata={"role": "best", "help": "what load_best_model_at_end goes by, e.g. AP50 or APs"}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "stop after this many measurements in a row without a better metric_for_best_model",
            "range": COUNT,
        },
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "end with the best measured weights instead of the last: chosen on eval_dataset"},
    )

    output_dir: str = field(metadata={"role": "place", "help": "folder of the run; the same command again resumes it"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"role": "place", "help": "start anew, and remove the old checkpoints"}
    )
    save_strategy: str = field(
        default="epoch", metadata={"role": "run", "help": "when to save a checkpoint: epoch, steps, best or no"}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"role": "output", "help": "checkpoints to keep, besides the best", "range": COUNT}
    )
    logging_steps: float = field(
        default=20, metadata={"role": "run", "help": "steps between entries of the log", "range": POSITIVE}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"role": "run", "help": "hide losses that are not finite"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"role": "run", "help": "not for detectors: there are no columns"}
    )
    write_report: bool = field(
        default=True, metadata={"role": "output", "help": "write report.html at the end; its curves need matplotlib"}
    )
    num_pictures: int = field(
        default=4,
        metadata={"role": "output", "help": "images of eval_dataset in the report, predictions beside ground truth"},
    )
    push_to_hub: bool = field(default=False, metadata={"role": "output", "help": "upload the result to the Hub"})
    push_pictures: bool = field(
        default=False,
        metadata={"role": "output", "help": "upload the pictures of your images in the report as well"},
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"role": "output", "help": "Hub repository, `user/name`; the name of output_dir if not given"},
    )
    hub_strategy: str = field(
        default="end",
        metadata={"role": "output", "help": "when to upload: end; or what transformers does during training as well"},
    )
    card_license: str | None = field(
        default=None,
        metadata={
            "role": "output",
            "help": "licence of the weights for the model card, by its Hub name, e.g. apache-2.0",
        },
    )

    def __post_init__(self):
        name_objects(self)
        check_values(self)
        parse_rule(self.pixel_window)
        require_metric(self.metric_for_best_model)
        if not self.do_eval:
            self.eval_strategy = "no"
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = self.learning_rate / 10
        if self.eval_size is None:
            self.eval_size = max(self.image_sizes)
        if self.do_eval and self.eval_dataset is None and isinstance(getattr(self.dataset, "value", None), Dataset):
            raise ValueError("the data set is one split: give eval_dataset to measure on, or do_eval=False")
        if self.eval_split is None and self.eval_dataset is None:
            self.eval_split = "validation"
        if self.eval_dataset is None:
            self.eval_dataset = self.dataset
        if self.freeze_backbone and self.trainable_backbone_stages is not None:
            raise ValueError("freeze_backbone keeps all of the backbone: give it or trainable_backbone_stages")
        if self.crop_scale is not None and (len(self.crop_scale) != 2 or self.crop_scale[0] > self.crop_scale[1]):
            raise ValueError(f"crop_scale takes the smallest and the largest area, got {self.crop_scale}")
        if self.crop_scale is not None and min(self.crop_scale) == 1:
            self.crop_scale = None
        if unknown := sorted(set(self.augmentations) - set(AUGMENTATIONS)):
            raise ValueError(f"augmentations: there is no {unknown[0]!r}, choose from {', '.join(AUGMENTATIONS)}")
        if self.early_stopping_patience is not None:
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience needs measurements during training: set eval_strategy")
            self.restore_callback_states_from_checkpoint = True  # a resumed run must not count anew
        self._refuse_what_has_no_effect()
        super().__post_init__()

    def _refuse_what_has_no_effect(self):
        """Accepted and then ignored would be worse than refused."""
        if not self.do_train:
            raise ValueError("do_train false: to measure without training, use `aligndet evaluate`")
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "resume_from_checkpoint: the same command again resumes from the last checkpoint in output_dir by "
                "itself. To start from a checkpoint of another run, give its folder as --detector"
            )
        for item in fields(TrainingArguments):
            if item.init and roles(type(self))[item.name] == "refused" and not _is_default(self, item):
                raise ValueError(f"{item.name} has no effect on the training of detectors here: leave it out")


def require_metric(name: str | None, categories: list[str] | None = None) -> None:
    """
    Refuses a `metric_for_best_model` that no measurement will have, before the first epoch.

    Args:
        name (`str`, *optional*): A COCO number, or `AP_<class>`; with or without `eval_`.
        categories (`list[str]`, *optional*): The classes, where they are known.

    Raises:
        ValueError: there is no such number.
    """
    metric = (name or "AP").removeprefix("eval_")
    known = [*SUMMARY, *(f"AP_{category}" for category in categories or ())]
    if metric not in known and (categories is not None or not metric.startswith("AP_")):
        raise ValueError(
            f"metric_for_best_model: there is no {metric!r}{nearest(metric, known)}. There are {', '.join(SUMMARY)}, "
            "and AP_<class>"
        )


def _is_default(arguments, item) -> bool:
    default = item.default if item.default is not MISSING else item.default_factory()
    # The parser of transformers makes a boolean of the default "no".
    return getattr(arguments, item.name) in (default, False if default == "no" else default)
