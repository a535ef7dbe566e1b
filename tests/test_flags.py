"""Facts about flags: what each is for, what else it is called, and which would have no effect."""

import importlib
from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from aligndet_hf.cli import COMMANDS
from aligndet_hf.flags import ROLES, SYNONYMS, names_of, nearest, roles, told_of
from aligndet_hf.parser import parse_arguments
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
        ("finetune", "--mixed_precision", "'--bf16'"),
        ("pretrain", "--bf16", "'--mixed_precision'"),
        ("pretrain", "--device", "'--use_cpu'"),
        ("finetune", "--model", "'--detector'"),
        ("pretrain", "--num-workers", "'--dataloader_num_workers'"),
        ("evaluate", "--use_cpu", "'--device'"),
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
        {"auto_find_batch_size": True}, {"prediction_loss_only": True},
    ],
)  # fmt: skip
def test_fine_tuning_refuses_what_would_have_no_effect(given, tmp_path):
    with pytest.raises(ValueError, match=next(iter(given))):
        FinetuneArguments(dataset="d", output_dir=str(tmp_path), **given)


def test_what_is_known_of_inherited_flags_is_up_to_date():
    inherited = set(TrainingArguments.__dataclass_fields__)
    assert set(FinetuneArguments.inherited_roles) <= inherited | {"logging_dir", "local_rank"}
    assert roles(FinetuneArguments)["hub_token"] == "secret" and roles(FinetuneArguments)["optim"] == "result"
    assert roles(PretrainArguments)["mixed_precision"] == "run"
