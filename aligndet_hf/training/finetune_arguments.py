"""The arguments of fine-tuning: the flags of `aligndet finetune` and the keys of its recipes."""

from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..arguments import (
    AugmentationArguments,
    InferenceArguments,
    LabelledArguments,
    LabelShareArguments,
    LoadingArguments,
    OptimisationArguments,
    PixelWindowArguments,
    TrainingRunArguments,
    again,
)
from ..data.augmentations import AUGMENTATIONS
from ..data.bit_depth import parse_rule
from ..detectors.build import DetectorArguments, has_random_backbone
from ..evaluation.coco_metrics import MASK_SUMMARY, SUMMARY
from ..flags import flag, names_of, nearest
from ..hub import HubModelArguments
from ..processes import trains_on_cpu
from ..ranges import ANY, BELOW_ONE, COUNT, PART, PIXELS, POSITIVE, SEED, SHARE, Range
from .trackers import require_trackers


@dataclass(kw_only=True)
class FinetuneArguments(
    HubModelArguments,
    TrainingRunArguments,
    LoadingArguments,
    OptimisationArguments,
    AugmentationArguments,
    DetectorArguments,
    PixelWindowArguments,
    LabelShareArguments,
    LabelledArguments,
    TrainingArguments,
):
    """
    Arguments of [`finetune`]: the flags of `aligndet finetune` and the keys of its recipes.

    All of `transformers.TrainingArguments` with defaults that suit detectors, and what is ours.
    """

    help_groups = {
        "pseudo_dataset": "Data",
        "per_device_eval_batch_size": "Run",
        "eval_size": "Views",
        "transfer": "Transfer",
        "backbone_learning_rate": "Optimisation",
        "do_train": "Measuring",
        "save_strategy": "Output",
        "hub_strategy": "Hub",
    }
    # Of numbers that transformers declares; others of them are finite and not negative.
    inherited_ranges = {
        "adam_beta1": BELOW_ONE,
        "adam_beta2": BELOW_ONE,
        "adam_epsilon": POSITIVE,
        "torch_empty_cache_steps": COUNT,
        "eval_steps": POSITIVE,
        "eval_accumulation_steps": COUNT,
        "data_seed": SEED,
        "dataloader_prefetch_factor": COUNT,
        "ddp_bucket_cap_mb": COUNT,
        "ddp_timeout": COUNT,
        "local_rank": ANY,
    }

    # Of what TrainingArguments bring: the flags that have an effect here. All others are refused.
    inherited_roles = dict.fromkeys(
        [
            "adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "lr_scheduler_kwargs", "optim", "optim_args",
        ],
        "result",
    ) | dict.fromkeys(["eval_steps", "eval_delay", "greater_is_better"], "best") | dict.fromkeys(
        [
            "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs",
            "auto_find_batch_size",
            "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_pin_memory",
            "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
            "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "eval_on_start",
            "fsdp", "fsdp_config", "full_determinism", "gradient_checkpointing_kwargs", "local_rank", "log_level",
            "log_level_replica", "log_on_each_node", "logging_first_step", "logging_strategy", "parallelism_config",
            "restore_callback_states_from_checkpoint", "save_on_each_node", "skip_memory_metrics", "tf32",
            "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps",
        ],
        "run",
    ) | dict.fromkeys(
        [
            "hub_always_push", "logging_dir", "project", "report_to", "run_name", "trackio_bucket_id",
            "trackio_space_id", "trackio_static_space_id",
        ],
        "output",
    ) | {"hub_token": "secret"}  # fmt: skip

    split: str | None = again(LabelledArguments, "split", default="train", help="split of the dataset")
    pseudo_dataset: str | None = flag(
        None,
        "data",
        "learn from the images that `aligndet pseudolabel` has labelled as well: its output folder",
        is_path=True,
    )
    pseudo_split: str | None = flag(None, "data", "its split, if there are several")
    labelled_share: float = flag(
        0.5,
        "data",
        "share of labelled images in each batch, beside pseudo-labelled ones",
        range=Range(0, 1, above=True, below=True),
    )
    dataloader_num_workers: int = again(
        LoadingArguments,
        "dataloader_num_workers",
        default=2,
        help="processes that load images, of each training process",
    )
    per_device_eval_batch_size: int = again(InferenceArguments, "per_device_eval_batch_size", was={})
    dataloader_persistent_workers: bool = flag(True, "run", "keep these processes from one epoch to the next")
    dataloader_drop_last: bool = flag(
        True, "result", "leave out the images of an epoch that do not fill a batch, others each time"
    )

    eval_size: int | None = flag(
        None, "result", "size to measure and to deploy with; the largest of image_sizes if not given", range=PIXELS
    )
    augmentations: list[str] = flag(
        [],
        "result",
        "apply these before the view is drawn, in this order: mosaic, mixup, copy_paste, zoom_out, rotate (by up to "
        "10 degrees), quarter_turn, photometric",
    )
    augmentation_probability: float = flag(
        0.5, "result", "apply each of the augmentations with this probability", range=SHARE
    )

    transfer: Literal["keep-boxes", "paper", "encoder-only", "everything"] = flag(
        "keep-boxes",
        "start",
        "what a checkpoint passes on: all but its class layers, `paper` not the last box layers either, "
        "`encoder-only` nothing of the decoder, queries and heads, `everything` all that fits",
    )
    freeze_backbone: bool = flag(False, "start", "keep the backbone as it is")
    trainable_backbone_stages: int | None = flag(
        None, "start", "train only this many of the backbone's stages, counted from the last", range=COUNT
    )
    freeze_backbone_norms: bool = flag(
        False, "start", "keep weights and statistics of the backbone's batch norms, a checkpoint's too"
    )

    learning_rate: float = again(
        OptimisationArguments, "learning_rate", help="peak learning rate of all but the backbone"
    )
    backbone_learning_rate: float | None = flag(
        None,
        "start",
        "peak learning rate of the backbone; if not given a tenth of the other, or the same for a random backbone",
    )
    transferred_learning_rate: float | None = flag(
        None,
        "result",
        "peak learning rate of what the checkpoint passed on, the backbone apart; learning_rate if not given",
    )
    layer_decay: float = flag(
        1.0,
        "result",
        "multiply the learning rate by this factor from each layer to the one before it, in the backbone and in what "
        "the checkpoint passed on; 1: do not",
        range=PART,
    )
    ema_decay: float | None = flag(
        None,
        "result",
        "average the weights over the steps with this momentum, such as 0.999; keep the average",
        range=Range(0, 1, above=True, below=True),
    )
    weight_decay: float = again(OptimisationArguments, "weight_decay", help="weight decay; never of norms and biases")

    # transformers warns of its old name wherever it is not None.
    gradient_checkpointing: bool | None = again(OptimisationArguments, "gradient_checkpointing", default=None)

    do_train: bool = flag(True, "run", "always true: `aligndet evaluate` measures without training")
    do_eval: bool = flag(True, "run", "measure on eval_dataset, at the end at least")
    eval_dataset: str | None = flag(None, "best", "what to measure on; `dataset` if not given", is_path=True)
    eval_split: str | None = flag(None, "best", "its split; of `dataset` `validation` if not given")
    eval_image_dir: str | None = flag(None, "best", "as image_dir", is_path=True)
    eval_strategy: str = flag("epoch", "best", "when to measure: epoch, steps, or no (at the end)")
    metric_for_best_model: str | None = flag("AP", "best", "what load_best_model_at_end goes by, e.g. AP50 or APs")
    early_stopping_patience: int | None = flag(
        None,
        "result",
        "stop after this many measurements in a row without a better metric_for_best_model, and end with the best",
        range=COUNT,
    )
    load_best_model_at_end: bool | None = flag(
        None,
        "result",
        "end with the best measured weights instead of the last: chosen on eval_dataset; true with "
        "early_stopping_patience and else false if not given",
    )

    save_strategy: str = flag("epoch", "run", "when to save a checkpoint: epoch, steps, best or no")
    logging_nan_inf_filter: bool = flag(False, "run", "hide losses that are not finite")
    remove_unused_columns: bool = flag(False, "run", "not for detectors: there are no columns")
    num_pictures: int = flag(
        4, "output", "draw predictions beside ground truth for this many images of eval_dataset, in the report"
    )
    hub_strategy: str = flag("end", "output", "when to upload: end; or what transformers does during training as well")

    def __post_init__(self):
        super().__post_init__()
        parse_rule(self.pixel_window)
        require_metric(self.metric_for_best_model)
        if not self.do_eval:
            self.eval_strategy = "no"
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = self.learning_rate / (1 if has_random_backbone(self) else 10)
        if self.eval_size is None and self.image_sizes is not None:
            self.eval_size = max(self.image_sizes)
        if self.do_eval and self.eval_dataset is None and isinstance(getattr(self.dataset, "value", None), Dataset):
            raise ValueError("the data set is one split: give eval_dataset to measure on, or do_eval=False")
        if self.eval_split is None and self.eval_dataset is None:
            self.eval_split = "validation"
        if self.eval_dataset is None:
            self.eval_dataset = self.dataset
        if self.freeze_backbone and self.trainable_backbone_stages is not None:
            raise ValueError("freeze_backbone keeps all of the backbone: give it or trainable_backbone_stages")
        self.check_crop_scale()
        if self.crop_scale is not None and min(self.crop_scale) == 1:
            self.crop_scale = None
        if unknown := sorted(set(self.augmentations) - set(AUGMENTATIONS)):
            raise ValueError(f"augmentations: there is no {unknown[0]!r}, choose from {', '.join(AUGMENTATIONS)}")
        if self.early_stopping_patience is not None:
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience needs measurements during training: set eval_strategy")
            self.restore_callback_states_from_checkpoint = True  # a resumed run must not count anew
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.early_stopping_patience is not None
        if self.load_best_model_at_end and self.save_strategy not in ("best", self.eval_strategy):
            raise ValueError(
                f"the best weights must be saved when they are measured (eval_strategy {self.eval_strategy}): set "
                "save_strategy to best; or load_best_model_at_end to false, to end with the last weights"
            )
        if self.lr_milestones and "lr_scheduler_type" in self.given:
            raise ValueError(
                f"lr_milestones are a schedule, and lr_scheduler_type {self.lr_scheduler_type} is another: give one "
                "(lr_milestones: [] takes away what a recipe has)"
            )
        self._refuse_what_has_no_effect()
        self.use_cpu = trains_on_cpu(self.use_cpu)
        TrainingArguments.__post_init__(self)
        require_trackers(self.report_to, INTEGRATION_TO_CALLBACK, get_available_reporting_integrations())

    @property
    def is_led_by_measurements(self) -> bool:
        """Whether the weights at the end depend on what is measured during training."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def _refuse_what_has_no_effect(self):
        """Accepted and then ignored would be worse than refused."""
        if not self.do_train:
            raise ValueError("do_train false: to measure without training, use `aligndet evaluate`")
        if self.resume_from_checkpoint is not None:
            raise ValueError(
                "resume_from_checkpoint: the same command again resumes from the last checkpoint in output_dir by "
                "itself. To start from a checkpoint of another run, give its folder as --detector"
            )
        for name in sorted(names_of(type(self), "refused") & set(self.given)):
            raise ValueError(_NO_EFFECT.format(name))


_NO_EFFECT = "{} has no effect on the training of detectors here: leave it out"
# Of `TrainingArguments` what changes how language models are trained; its defaults do nothing.
_OF_LANGUAGE_MODELS = ("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "use_liger_kernel")


def require_effect(arguments: TrainingArguments) -> None:
    """
    Refuses arguments of somebody's own that detectors cannot be trained with, or that would do nothing.

    Raises:
        ValueError: one of them is given.
    """
    for name in _OF_LANGUAGE_MODELS:
        if getattr(arguments, name, None) not in (None, getattr(TrainingArguments, name, None)):
            raise ValueError(_NO_EFFECT.format(name))


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
    numbers = [*SUMMARY, *MASK_SUMMARY]
    known = [*numbers, *(f"AP_{category}" for category in categories or ())]
    if metric not in known and (categories is not None or not metric.startswith("AP_")):
        raise ValueError(
            f"metric_for_best_model: there is no {metric!r}{nearest(metric, known)}. There are {', '.join(numbers)}, "
            "and AP_<class>"
        )
