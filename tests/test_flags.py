"""Facts about flags: what each is for, what else it is called, and which would have no effect."""

import importlib
import inspect
import pydoc
import re
from dataclasses import MISSING, dataclass, field, fields

import pytest
import yaml
from transformers import TrainingArguments
from transformers.utils import logging

from aligndet_hf.cli import COMMANDS
from aligndet_hf.flags import ROLES, SYNONYMS, names_of, nearest, roles, takes_arguments, told_of
from aligndet_hf.parser import parse_arguments
from aligndet_hf.ranges import _kinds
from aligndet_hf.training.finetune_arguments import FinetuneArguments
from aligndet_hf.training.pretrain_arguments import PretrainArguments

CLASSES = {name: getattr(importlib.import_module(row.module), row.arguments) for name, row in COMMANDS.items()}
REQUIRED = ["--dataset", "d", "--output_dir", "o"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_role(command):
    found = roles(CLASSES[command])
    assert set(found.values()) <= set(ROLES)
    assert all(role == "place" for name, role in found.items() if name in ("output_dir", "overwrite_output_dir"))
    assert {found[name] for name in ("push_to_hub", "disable_tqdm", "card_license") if name in found} <= {"output"}


@dataclass
class Demo:
    source: str = field(metadata={"role": "data"})
    rate: float = field(default=0.5)
    sizes: list[int] = field(default_factory=list)
    output_dir: str = field(default="here", metadata={"role": "place"})
    key: str = field(default="k", metadata={"role": "secret"})


def test_roles_decide_what_is_told():
    assert roles(Demo) == {
        "source": "data",
        "rate": "result",
        "sizes": "result",
        "output_dir": "place",
        "key": "secret",
    }
    assert names_of(Demo, "data", "place") == {"source", "output_dir"}
    assert told_of(Demo("x")) == {"source": "x", "rate": 0.5, "sizes": []}


@pytest.mark.parametrize(
    "command, flag, meant",
    [
        ("finetune", "--lr", "'--learning_rate'"),
        ("finetune", "--batch_size", "'--per_device_train_batch_size'"),
        ("pretrain", "--epochs", "'--num_train_epochs'"),
        ("finetune", "--amp", "'--bf16'"),
        ("pretrain", "--cpu", "'--use_cpu'"),
        ("finetune", "--model", "'--detector'"),
        ("pretrain", "--workers", "'--dataloader_num_workers'"),
        ("evaluate", "--bs", "'--per_device_eval_batch_size'"),
        ("evaluate", "--detectr", "'--detector'"),
    ],
)
def test_the_names_of_others_are_known(command, flag, meant):
    given = [*REQUIRED, *(["--detector", "m"] if command == "evaluate" else []), flag, "1"]
    with pytest.raises(ValueError, match=f"did you mean .*{meant}"):
        parse_arguments(CLASSES[command], given)


def test_a_synonym_stands_for_one_thing():
    names = [name for group in SYNONYMS for name in group]
    assert len(names) == len(set(names))
    assert nearest("zzz", ["alpha"]) == ""
    assert nearest("--wd", ["--seed", "--weight_decay"]) == "; did you mean '--weight_decay'?"
    assert nearest("--wd", ["--seed"]) == nearest("--resume", ["--run_name"]) == ""  # dashes make nothing alike


def test_required_flags_come_first(capsys):
    for command in ("proposals", "finetune"):
        with pytest.raises(SystemExit):
            parse_arguments(CLASSES[command], ["--help"])
        text = capsys.readouterr().out
        assert max(text.index("--dataset"), text.index("--output_dir")) < text.index("--split")


@pytest.mark.parametrize(
    "given",
    [
        {"do_train": False}, {"do_predict": True}, {"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"}, {"resume_from_checkpoint": "elsewhere/checkpoint-7"},
        {"prediction_loss_only": True},
    ],
)  # fmt: skip
def test_fine_tuning_refuses_what_would_have_no_effect(given, tmp_path):
    with pytest.raises(ValueError, match=next(iter(given))):
        FinetuneArguments(dataset="d", output_dir=str(tmp_path), **given)


def test_what_is_known_of_inherited_flags_is_up_to_date():
    inherited = set(TrainingArguments.__dataclass_fields__)
    assert set(FinetuneArguments.inherited_roles) <= inherited | {"logging_dir", "local_rank"}
    assert roles(FinetuneArguments)["hub_token"] == "secret" and roles(FinetuneArguments)["optim"] == "result"


# What the last release called a flag, by command: the flag, its value then, and what becomes of it now.
OLD = [
    ("evaluate", "batch_size", "4", {"per_device_eval_batch_size": 4}),
    ("evaluate", "device", "cpu", {"use_cpu": True}),
    ("evaluate", "device", "cuda", {"use_cpu": False}),
    ("proposals", "num_workers", "3", {"dataloader_num_workers": 3}),
    ("proposals", "overwrite", "true", {"overwrite_output_dir": True}),
    ("pretrain", "mixed_precision", "bf16", {"bf16": True, "fp16": False}),
    ("pretrain", "mixed_precision", "fp16", {"bf16": False, "fp16": True}),
    ("pretrain", "mixed_precision", "no", {"bf16": False, "fp16": False}),
    ("pretrain", "optimizer", "adamw", {"optim": "adamw_torch_fused"}),
    ("knn", "k", "7", {"num_neighbors": 7}),
    ("embeddings", "neighbors", "7", {"num_neighbors": 7}),
    ("convert", "source", "a.pth", {"detector": "a.pth"}),
    ("convert", "image_size", "640", {"eval_size": 640}),
]


def given(command: str, without=()) -> dict:
    """What a command must be given."""
    values = {
        item.name: ["x"] if str(item.type).startswith("list") else "x"
        for item in fields(CLASSES[command])
        if item.init and item.default is item.default_factory is MISSING
    }
    values |= {"backbone_weights": "w"} if command == "knn" else {}  # a backbone of random ones is refused
    return {name: value for name, value in values.items() if name not in without}


@pytest.mark.parametrize(("command", "old", "text", "expected"), OLD)
def test_old_names_are_accepted_with_a_notice(command, old, text, expected, tmp_path, capsys):
    values = given(command, without=expected)
    words = [word for name, value in values.items() for word in (f"--{name}", *value)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values | {old: yaml.safe_load(text)}))
    for flags in (
        [*words, f"--{old}", text],
        [*words, f"--{old.replace('_', '-')}={text}"],
        ["--config", str(recipe)],
    ):
        found = parse_arguments(CLASSES[command], flags)
        assert {name: getattr(found, name) for name in expected} == expected
        assert f"note: {old} is called {' or '.join(expected)} now" in capsys.readouterr().err
    found = CLASSES[command](**values, **{old: yaml.safe_load(text)})
    assert {name: getattr(found, name) for name in expected} == expected
    assert f"{old} is called {' or '.join(expected)} now" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_a_notebook_shows_every_flag_that_has_an_effect(command):
    cls = CLASSES[command]
    text = pydoc.plain(pydoc.render_doc(cls)).split("Method resolution order")[0]
    shown = set(re.findall(r"^ \|      (\w+) \(`", text, re.MULTILINE))
    assert shown == {name for name, role in roles(cls).items() if role != "refused"}
    assert inspect.cleandoc(vars(cls)["__doc__"]).split("\n")[0] in text


def test_help_in_a_notebook_tells_types_defaults_and_meanings():
    told = PretrainArguments.__doc__
    assert "    dataset (`str`):\n        images with a `proposals` column" in told
    assert "    max_steps (`int`, *optional*, defaults to `-1`):\n        optimizer steps; if positive" in told
    assert "    report_to (`list[str]`, *optional*, defaults to `[]`):" in told


def test_an_old_name_beside_the_new_one_is_an_error():
    values = given("evaluate")
    with pytest.raises(ValueError, match="batch_size=4 is called per_device_eval_batch_size now, and .*=8: give one"):
        CLASSES["evaluate"](**values, batch_size=4, per_device_eval_batch_size=8)
    with pytest.raises(ValueError, match="mixed_precision must be no, bf16 or fp16, got 'int8'"):
        CLASSES["pretrain"](**given("pretrain"), mixed_precision="int8")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        CLASSES["evaluate"](**values, device="cuda:1")
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'cdua'"):
        CLASSES["evaluate"](**values, device="cdua")
    with pytest.raises(TypeError, match="has no 'num_worker'; did you mean 'dataloader_num_workers'"):
        CLASSES["evaluate"](**values, num_worker=1)


def test_without_progress_bars_transformers_shows_none_either():
    seen, cls = [], CLASSES["evaluate"]

    @takes_arguments
    def command(arguments: cls):
        seen.append(logging.is_progress_bar_enabled())

    for disable_tqdm in (True, False):
        command(cls(**given("evaluate"), disable_tqdm=disable_tqdm))
    assert seen == [False, True]


def test_old_names_are_not_listed(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(CLASSES["evaluate"], ["--help"])
    text = capsys.readouterr().out
    assert "--per_device_eval_batch_size" in text and "--batch_size" not in text and "--device " not in text
    with pytest.raises(ValueError, match="did you mean '--per_device_eval_batch_size'"):
        parse_arguments(CLASSES["evaluate"], ["--detector", "d", "--dataset", "d", "--bs", "1"])


# Why a flag is not the same in every command that has it.
ANOTHER_DEFAULT = {
    "split": "training reads train, measuring validation, and the rest all that there is",
    "output_dir": "what only measures needs no folder",
    "images": "to look at they are required, to compare on they are not",
    "detector": "a training without one starts from a new one; what takes a backbone may take it from elsewhere",
    "backbone": "a new detector has one by default; features must come from somewhere",
    "num_pictures": "where pictures are what the command is for, some are drawn",
    "score_threshold": "a label must be surer than a box to look at, and a box to compare less sure",
    "nms_threshold": "tiles repeat a box, classes repeat it more, proposals are to differ",
    "short_side": "OpenCV's search is slow; None where another source is chosen",
    "max_objects": "t-SNE is slow",
    "dataloader_num_workers": "fine-tuning is fast enough to wait for images; a search wants every core",
    "per_device_eval_batch_size": "None where another source is chosen",
    "per_device_train_batch_size": "pre-training has two views of each image",
    "learning_rate": "pre-training starts from random weights",
    "lr_scheduler_type": "the paper's schedule of pre-training; transformers' others are for fine-tuning",
    "warmup_steps": "pre-training chooses it by the number of steps",
    "gradient_checkpointing": "transformers warns of its old name wherever it is not None",
    "freeze_backbone": "pre-training freezes it unless it is random, as AlignDetConfig has it",
    "lr_milestones": "the paper's schedule of pre-training",
    "logging_steps": "pre-training is longer",
    "color": "the default of pre-training depends on method and preset",
    "crop_scale": "the default of pre-training depends on the method",
    "preset": "speed of selective search; numbers of pre-training",
    "eval_size": "a training measures at the largest size of its own; a published detector at its own",
}
ANOTHER_TYPE = {
    "save_steps": "fine-tuning takes a share of the run as well",
    "logging_steps": "fine-tuning takes a share of the run as well",
    "lr_scheduler_type": "fine-tuning takes all of transformers' schedules",
    "preset": "speed of selective search; numbers of pre-training",
}
ANOTHER_ROLE = {
    "score_threshold": "it decides which boxes there are, or only which are drawn or compared",
}
# Flags whose help says what they are for this command; all others begin alike.
ANOTHER_HELP = {
    "backbone", "backbone_weights", "dataset", "detector", "detector_config", "fp16", "images", "num_clusters",
    "label_fraction", "num_pictures", "output_dir", "per_device_eval_batch_size", "preset",
    "streaming", "score_threshold", "seed", "short_side", "nms_threshold",
}  # fmt: skip


def test_a_thing_has_one_name_and_a_name_is_one_thing():
    by_name: dict[str, list] = {}
    for command, cls in CLASSES.items():
        for item in fields(cls):
            if item.init and item.metadata.get("help") and item.metadata.get("role"):
                by_name.setdefault(item.name, []).append((command, cls, item))
    unlike = {"default": set(), "type": set(), "role": set(), "help": set()}
    for name, found in by_name.items():
        kinds = {frozenset(_kinds(cls)[name]) - {type(None), list} for _, cls, _ in found}
        defaults = {
            str(item.default if item.default_factory is MISSING else item.default_factory()) for *_, item in found
        }
        unlike["default"] |= {name} if len(defaults) > 1 else set()
        unlike["type"] |= {name} if len(kinds) > 1 else set()
        unlike["role"] |= {name} if len({item.metadata["role"] for *_, item in found}) > 1 else set()
        unlike["help"] |= {name} if len({item.metadata["help"][:12] for *_, item in found}) > 1 else set()
    assert unlike == {
        "default": set(ANOTHER_DEFAULT),
        "type": set(ANOTHER_TYPE),
        "role": set(ANOTHER_ROLE),
        "help": ANOTHER_HELP,
    }


def test_what_is_said_once_has_one_name():
    # The same help under two names would be one thing with two names.
    names: dict[str, set] = {}
    for cls in CLASSES.values():
        for item in fields(cls):
            if item.init and item.metadata.get("role"):
                names.setdefault(item.metadata["help"], set()).add(item.name)
    assert {frozenset(found) for found in names.values() if len(found) > 1} <= {
        frozenset({"hub_model_id", "hub_dataset_id"}),
        frozenset({"labelled_split", "eval_split"}),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_names_its_role(command):
    inherited = getattr(CLASSES[command], "inherited_roles", {})
    own = [
        item
        for item in fields(CLASSES[command])
        if item.init and item.name not in TrainingArguments.__dataclass_fields__
    ]
    assert [item.name for item in own if "role" not in item.metadata and item.name not in inherited] == []
