"""
The arguments that several commands have: each stands here once, with its help, its role and its range.

A command's dataclass inherits what it has, and says with [`again`] what is different: another default, or words that
fit the command better. Names are the ones of `transformers.TrainingArguments`, where it has one.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .flags import REQUIRED, TakesOldNames, default_of, flag, given_flags
from .objects import name_objects
from .ranges import COUNT, LIMIT, PART, PIXELS, POSITIVE, SEED, SHARE, check_values


@dataclass(kw_only=True)
class Arguments(metaclass=TakesOldNames):
    """
    What the arguments of all commands do first: objects get names, and values of another kind or range are refused.

    Attributes:
        given (`dict`): What was given, see [`~aligndet_hf.flags.given_flags`].
    """

    def __post_init__(self):
        name_objects(self)
        check_values(self)
        self.given = given_flags(self)


def again(mixin: type, name: str, **changes: Any) -> Any:
    """
    A field of a mixin, changed for one command.

    Args:
        mixin (`type`): The dataclass that has it.
        name (`str`): Its name.
        changes: `default`, and entries of the metadata, such as `help`, in place of those it has.
    """
    known = mixin.__dataclass_fields__[name]
    return flag(**{"default": default_of(known), **known.metadata, **changes})


def is_trained(backbone: str | None, weights: str | None) -> bool:
    """Whether a backbone has weights: some are named, or it is no timm name but a checkpoint, which brings its own."""
    name = (backbone or "").removeprefix("timm/")
    return bool(weights) or "/" in name or (name != "" and Path(name).is_dir())


def is_cpu(device: Any) -> bool:
    """What `use_cpu` is for a value of `device`, which it was called before."""
    kind, _, index = str(device or "cuda").partition(":")
    if index not in ("", "0"):
        raise ValueError(f"device {device} is chosen by the variable CUDA_VISIBLE_DEVICES={index} now")
    if kind not in ("cpu", "cuda", "gpu", "mps", "auto"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    return kind == "cpu"


def is_precision(name: str, value: Any) -> bool:
    """What `bf16` or `fp16` is for a value of `mixed_precision`, which they were called before."""
    if value not in (None, False, "False", "no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision must be no, bf16 or fp16, got {value!r}")
    return value == name


# ---- what is read ----


@dataclass(kw_only=True)
class DatasetArguments(Arguments):
    """The images that a command reads."""

    help_groups = {"dataset": "Data"}

    dataset: str = flag(
        REQUIRED,
        "data",
        "images with a `proposals` column: a folder or Hub id, as `aligndet proposals` writes it",
        is_path=True,
    )
    split: str | None = flag(None, "data", "split of the dataset; all of them if not given")


@dataclass(kw_only=True)
class LabelledArguments(DatasetArguments):
    """Images with their labels, which may come from a label file."""

    dataset: str = again(DatasetArguments, "dataset", help="labelled images: folder, label file or Hub id")
    image_dir: str | None = flag(
        None, "data", "folder of the images of a label file, if they are not found beside it", is_path=True
    )


@dataclass(kw_only=True)
class LabelShareArguments(Arguments):
    """A part of the labels."""

    help_groups = {"label_fraction": "Data"}

    label_fraction: float = flag(
        1.0, "data", "share of the labelled images to use; smaller ones lie inside larger ones", range=PART
    )
    label_seed: int = flag(0, "data", "seed of the choice of these images", range=SEED)


@dataclass(kw_only=True)
class PixelWindowArguments(Arguments):
    """How grey levels become pixels."""

    help_groups = {"pixel_window": "Data"}

    pixel_window: str = flag(
        "range",
        "data",
        "grey levels of images with more than 8 bits that become black and white, unless the detector or the dataset "
        "has them: range, the lowest and the highest of the data; percentile, 0.1 and 99.9 percent of the pixels; or "
        "two numbers such as 7000,9000",
    )


@dataclass(kw_only=True)
class ReadyDetectorArguments(Arguments):
    """A detector that is used as it is."""

    help_groups = {"detector": "Detector"}

    detector: str = flag(
        REQUIRED,
        "start",
        "folder, published file, Hub id or short name of a detector with its image processor",
        is_path=True,
    )


# ---- how images are seen ----


@dataclass(kw_only=True)
class ViewArguments(Arguments):
    """The size of the images that a detector sees in training."""

    help_groups = {"image_sizes": "Views"}

    image_sizes: list[int] | None = flag(
        None,
        "result",
        "sizes in pixels that images are resized to at random: the shorter side, or both sides; 480 512 ... 800 if "
        "not given, smaller ones for images whose shorter side is below 480",
        range=PIXELS,
    )
    max_size: int | None = flag(
        None, "result", "longest side in pixels; 5/3 of the drawn size if not given", range=PIXELS
    )


@dataclass(kw_only=True)
class AugmentationArguments(ViewArguments):
    """How images are changed at random in training."""

    flip_probability: float = flag(0.5, "result", "probability of a horizontal flip", range=SHARE)
    color: bool | None = flag(False, "result", "apply one random colour operation to each image")
    crop_scale: list[float] | None = flag(
        [0.3, 1.0],
        "result",
        "smallest and largest area of a random crop, as shares of the image; `1 1` for no crop",
        range=PART,
    )

    def check_crop_scale(self) -> None:
        """Refuses what is not an interval."""
        if self.crop_scale is not None and (len(self.crop_scale) != 2 or self.crop_scale[0] > self.crop_scale[1]):
            raise ValueError(f"crop_scale takes the smallest and the largest area, got {self.crop_scale}")


@dataclass(kw_only=True)
class FeatureArguments(Arguments):
    """What a frozen backbone says of boxes."""

    help_groups = {"strides": "Features"}

    # Strides, size and scaling were chosen by the agreement with the labels of blood cells and of photographs: fine
    # strides are best for the cells, coarse ones for the photographs, and both together lose little on either.
    strides: list[int] = flag(
        [16, 32], "result", "feature maps to use, by stride in pixels: fine ones tell small objects apart", range=COUNT
    )
    short_side: int = flag(448, "result", "shorter side in pixels of the images that the backbone sees", range=PIXELS)


@dataclass(kw_only=True)
class NeighborArguments(Arguments):
    """Objects that are told apart by their neighbours."""

    help_groups = {"max_objects": "Neighbours"}

    max_objects: int = flag(5000, "result", "look at a random choice of at most this many objects", range=COUNT)
    num_neighbors: int = flag(
        10,
        "result",
        "neighbours that vote for the class of an object",
        range=COUNT,
        was={"neighbors": None, "k": None},
    )


# ---- how a command runs ----


@dataclass(kw_only=True)
class ProgressArguments(Arguments):
    """Whether a command tells how far it is."""

    help_groups = {"disable_tqdm": "Run"}

    disable_tqdm: bool = flag(False, "output", "show no progress bar")


@dataclass(kw_only=True)
class DeviceArguments(ProgressArguments):
    """What a network runs on."""

    use_cpu: bool = flag(False, "run", "use the CPU even if there is a GPU", was={"device": is_cpu})


@dataclass(kw_only=True)
class LoadingArguments(DeviceArguments):
    """How a network gets its images."""

    dataloader_num_workers: int = flag(0, "run", "processes that load images", was="num_workers")


@dataclass(kw_only=True)
class InferenceArguments(LoadingArguments):
    """How a network sees images without learning from them."""

    per_device_eval_batch_size: int = flag(8, "run", "images per forward pass", range=COUNT, was="batch_size")


# ---- what a training is made of ----


@dataclass(kw_only=True)
class OptimisationArguments(Arguments):
    """How a network learns."""

    num_train_epochs: float = flag(50, "result", "epochs", range=POSITIVE)
    max_steps: int = flag(-1, "result", "optimizer steps; if positive, overrides the epochs", range=LIMIT)
    per_device_train_batch_size: int = flag(4, "batch", "images per process and forward pass", range=COUNT)
    gradient_accumulation_steps: int = flag(1, "batch", "forward passes per optimizer step", range=COUNT)
    learning_rate: float = flag(1e-4, "result", "peak learning rate")
    weight_decay: float = flag(1e-4, "result", "weight decay")
    max_grad_norm: float = flag(0.1, "result", "clip gradients to this norm")
    lr_scheduler_type: str = flag(
        "cosine", "result", "learning rate after the warm-up: cosine, linear, constant_with_warmup, ..."
    )
    lr_milestones: list[float] = flag(
        [], "result", "fractions of the run (below 1) or epochs at which the rate falls to a tenth", range=POSITIVE
    )
    warmup_steps: float = flag(0, "result", "steps of linear warm-up, or below 1 a share of the run")
    bf16: bool = flag(
        False,
        "result",
        "run forward passes in bfloat16 (autocast)",
        was={"mixed_precision": partial(is_precision, "bf16")},
    )
    fp16: bool = flag(
        False,
        "result",
        "run forward passes in float16 (autocast), with scaled losses",
        was={"mixed_precision": partial(is_precision, "fp16")},
    )
    torch_compile: bool = flag(
        False,
        "result",
        "compile the networks with torch.compile: minutes at the start, and again for new image sizes, for faster "
        "steps",
    )
    gradient_checkpointing: bool = flag(
        False, "run", "compute the layers again in the backward pass: slower, with less memory"
    )
    seed: int = flag(0, "result", "seed of new weights, the data and all noise", range=SEED)


# ---- what is written ----


@dataclass(kw_only=True)
class OutputArguments(Arguments):
    """Where a command writes to."""

    output_dir: str = flag(REQUIRED, "place", "folder of the run; the same command again resumes it")


@dataclass(kw_only=True)
class RunArguments(OutputArguments):
    """A folder that belongs to one run of a command."""

    overwrite_output_dir: bool = flag(
        False, "place", "start anew, and replace what another run of this command wrote to output_dir", was="overwrite"
    )


@dataclass(kw_only=True)
class MeasureArguments(OutputArguments):
    """A folder that a measuring command writes to if it is given one."""

    output_dir: str | None = again(OutputArguments, "output_dir", default=None)


@dataclass(kw_only=True)
class TrainingRunArguments(RunArguments):
    """What a training leaves in its folder."""

    save_steps: float = flag(500, "run", "steps between checkpoints", range=POSITIVE)
    save_total_limit: int | None = flag(2, "output", "keep this many checkpoints, besides the best", range=COUNT)
    logging_steps: float = flag(20, "run", "steps between entries of the log", range=POSITIVE)
    write_report: bool = flag(True, "output", "write report.html at the end; its curves need matplotlib")
