"""
What is known of flags, without importing anything heavy.

A fact about a flag stands at the flag, in the metadata of its field: `help`; `role`, one of [`ROLES`]; `range` (see
`ranges`); `is_path`, where the value may be a path (see [`local_paths`]); `needed_on_console`, where only Python can
do without it; and `was`, what the last release called it: its old name, or several, each with what makes a value of
the old one, or `None` (see [`with_new_names`]).
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

Command = TypeVar("Command", bound=Callable)

# The roles of a flag. The first three make a run what it is, and may not change when it is resumed.
ROLES = {
    "result": "has an influence on what comes out; the role of a flag that names none",
    "data": "says what is read",
    "start": "says what training starts from, and how much of it is trained",
    "best": "has an influence only where the best weights are chosen by measuring",
    "batch": "cuts the images of one step into parts: their product counts, not the flag",
    "run": "changes speed, memory or what is logged, not the result",
    "place": "says where the output goes, or that it starts anew",
    "output": "says what is written beside the result, and who gets it; nobody else's business",
    "secret": "is neither stored nor told",
    "refused": "one of another package's that would have no effect here",
}
NOT_TOLD = ("place", "output", "secret")

# Names for the same thing: what other commands, and other libraries, call it.
SYNONYMS = [
    {"learning_rate", "lr", "lr0", "base_lr"},
    {"backbone_learning_rate", "lr_backbone", "backbone_lr"},
    {
        "per_device_train_batch_size", "per_device_eval_batch_size", "batch_size", "batch", "train_batch_size", "bs",
        "samples_per_gpu", "images_per_batch",
    },
    {"num_train_epochs", "epochs", "num_epochs", "max_epochs"},
    {"max_steps", "steps", "num_steps", "iterations", "max_iter", "max_train_steps"},
    {"bf16", "fp16", "mixed_precision", "precision", "amp", "half", "dtype"},
    {"use_cpu", "device", "cpu", "no_cuda", "accelerator"},
    {"dataloader_num_workers", "num_workers", "workers", "num_proc"},
    {"output_dir", "output", "out", "save_dir", "project", "work_dir", "out_dir"},
    {"overwrite_output_dir", "overwrite", "exist_ok", "force"},
    {"dataset", "data", "data_dir", "dataset_name", "train_dataset", "train_data_dir", "images"},
    {"eval_dataset", "val_dataset", "validation_dataset", "val"},
    {"detector", "model", "model_name_or_path", "checkpoint", "weights", "pretrained", "model_name", "source"},
    {"backbone", "arch", "encoder"},
    {"image_sizes", "image_size", "imgsz", "img_size", "img", "resolution", "short_side"},
    {"max_boxes", "max_proposals", "num_proposals", "top_k", "max_det"},
    {"score_threshold", "conf", "confidence", "threshold", "score_thr"},
    {"nms_threshold", "nms", "iou", "iou_threshold"},
    {"optim", "optimizer"},
    {"weight_decay", "wd"},
    {"lr_scheduler_type", "scheduler", "lr_schedule", "lr_scheduler"},
    {"warmup_steps", "warmup", "warmup_ratio", "num_warmup_steps"},
    {"max_grad_norm", "grad_clip", "clip_grad", "clip_max_norm", "gradient_clipping"},
    {"gradient_accumulation_steps", "accumulate", "accumulation_steps", "grad_accum"},
    {"label_fraction", "fraction", "fractions"},
    {"freeze_backbone", "freeze"},
    {"early_stopping_patience", "patience", "early_stopping"},
    {"save_total_limit", "keep_checkpoints", "max_checkpoints"},
    {"num_pictures", "plots", "visualize"},
    {"disable_tqdm", "quiet", "no_progress"},
    {"split", "eval_split", "subset"},
    {"push_to_hub", "push", "upload"},
    {"hub_model_id", "hub_dataset_id", "repo_id"},
    {"color", "color_jitter", "hsv"},
    {"crop_scale", "crop", "random_crop"},
    {"flip_probability", "flip", "fliplr"},
    {"num_neighbors", "neighbors", "k", "n_neighbors"},
]  # fmt: skip

REQUIRED = dataclasses.MISSING  # in place of a default


def flag(default: Any, role: str, help: str, **more: Any) -> Any:
    """
    A field of a dataclass of arguments, with what is known of it.

    Args:
        default: Its value if it is not given; lists and mappings are copied. [`REQUIRED`] for one that must be given.
        role (`str`): One of [`ROLES`].
        help (`str`): Its help.
        more: Further entries of the metadata, such as `range` and `was`.
    """
    start = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return dataclasses.field(**start, metadata={"role": role, "help": help, **more})


def default_of(item: dataclasses.Field) -> Any:
    """The value of a field that is not given, a fresh one of a list or a mapping; [`REQUIRED`] if it must be."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def roles(cls: type) -> dict[str, str]:
    """
    The role of every flag of a dataclass of arguments, by name.

    Fields of another package (`transformers.TrainingArguments`) have theirs in the class attribute `inherited_roles`;
    those that are not there are refused.
    """
    inherited = getattr(cls, "inherited_roles", {})
    default = "refused" if inherited else "result"
    fields = [item for item in dataclasses.fields(cls) if item.init]
    return {item.name: item.metadata.get("role") or inherited.get(item.name, default) for item in fields}


def names_of(cls: type, *wanted: str) -> set[str]:
    """The names of the flags that have one of these roles."""
    return {name for name, role in roles(cls).items() if role in wanted}


def local_paths(arguments) -> set[str]:
    """
    The names of the flags whose values are paths of files and folders that are there.

    What decides whose run it is is their content, which commands hash, and not where it lies.
    """
    given = {
        item.name: getattr(arguments, item.name)
        for item in dataclasses.fields(arguments)
        if item.metadata.get("is_path")
    }
    return {name for name, value in given.items() if isinstance(value, str) and Path(value).expanduser().exists()}


def old_names(cls: type) -> dict[str, dict[str, Callable | None]]:
    """
    What the last release called the flags of a dataclass of arguments.

    Returns:
        `dict[str, dict[str, Callable | None]]`: for every old name the flags that it stands for, and what makes the
        value of each from the value of the old one, `None` where it is the same.
    """
    found: dict[str, dict[str, Callable | None]] = {}
    for item in dataclasses.fields(cls):
        was = item.metadata.get("was", {})
        for name, convert in ({was: None} if isinstance(was, str) else was).items():
            found.setdefault(name, {})[item.name] = convert
    return found


def with_new_names(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Values by the names that the flags of a dataclass have now; on stderr it says which are not called so any more.

    Raises:
        ValueError: an old name and a new one have different values.
    """
    given, old = dict(given), old_names(cls)
    for name in sorted(given.keys() & old.keys()):
        value = given.pop(name)
        for now, convert in old[name].items():
            new = convert(value) if convert else value
            if given.setdefault(now, new) != new:
                raise ValueError(f"{name}={value!r} is called {now} now, and {now}={given[now]!r}: give one")
        now = " or ".join(old[name])
        print(f"note: {name} is called {now} now; the next release refuses {name}", file=sys.stderr)
    return given


class TakesOldNames(type):
    """
    The class of the dataclasses of arguments: they take the names of the last release as well, with a notice, and
    their docstrings end with their flags, so that `help` shows in a notebook what `--help` shows on a console.
    """

    @property
    def __doc__(cls) -> str:
        lines = [inspect.cleandoc(cls.__dict__.get("__doc__") or ""), "", "Args:"]
        items = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        role = roles(cls) if items else {}
        for item in items:
            if "help" in item.metadata and role.get(item.name, "refused") != "refused":
                kind = item.type if isinstance(item.type, str) else inspect.formatannotation(item.type)
                default = default_of(item)
                rest = "" if default is REQUIRED else f", *optional*, defaults to `{default!r}`"
                text = textwrap.fill(item.metadata["help"], break_on_hyphens=False)
                lines += [f"    {item.name} (`{kind}`{rest}):", textwrap.indent(text, " " * 8)]
        return "\n".join(lines)

    def __call__(cls, *args, **given):
        given, known = with_new_names(cls, given), inspect.signature(cls.__init__).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
        if unknown := next((name for name in given if name not in known and not takes_any), None):
            raise TypeError(f"{cls.__name__} has no {unknown!r}{nearest(unknown, known)}")
        return super().__call__(*args, **given)


def given_flags(arguments) -> dict[str, Any]:
    """
    The values of the flags that are not at their defaults: in `__post_init__`, before it fills in what follows from
    others, those that were given.
    """
    given = {}
    for item in dataclasses.fields(arguments):
        default = default_of(item)
        value = getattr(arguments, item.name) if item.init else default
        # What must be given may be an array, which does not compare. The parser of transformers makes a boolean of
        # the default "no".
        if (default is REQUIRED or value != default) and not (value is False and default == "no"):
            given[item.name] = value
    return given


def takes_arguments(command: Command) -> Command:
    """
    Has the function of a command say what it takes, where it is given anything but its arguments; and has transformers
    show no progress bars where the command is to show none.

    Raises:
        TypeError: by the function.
    """
    takes = command.__annotations__["arguments"]

    @functools.wraps(command)
    def checked(arguments=None, **settings):
        if settings or not isinstance(arguments, takes):
            got = f"the arguments {', '.join(settings)}" if settings else f"a {type(arguments).__name__}"
            name = takes.__name__
            raise TypeError(f"{command.__name__} takes {name}, got {got}: {command.__name__}({name}(...))")
        with _without_bars() if getattr(arguments, "disable_tqdm", False) else contextlib.nullcontext():
            return command(arguments)

    return cast(Command, checked)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging  # not above: it takes a second

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def told_of(arguments) -> dict:
    """The settings that may be told: all but those whose role is in [`NOT_TOLD`], as the dataclass has them."""
    hidden = names_of(type(arguments), *NOT_TOLD)
    return {key: value for key, value in dataclasses.asdict(arguments).items() if key not in hidden}


def nearest(name: str, valid: Iterable[str]) -> str:
    """What to add to a message about a name that does not exist: the valid one that it is closest to, if any."""
    names = {}
    for one in valid:
        names.setdefault(one.lstrip("-").replace("-", "_"), one)  # of two spellings the first
    plain = name.lstrip("-").replace("-", "_")
    meant = [names[one] for group in SYNONYMS if plain in group for one in sorted(group & set(names))]
    alike = [names[one] for one in difflib.get_close_matches(plain, names, 1, 0.6)]
    close = [names[plain]] if plain in names else meant or alike
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
