"""Values of arguments: every number of every command has a range, which neither the console nor Python gets past."""

import dataclasses
import importlib
import json
import math
from dataclasses import dataclass, field

import datasets
import numpy as np
import pytest

from aligndet_hf import AlignDetConfig, SoCoConfig
from aligndet_hf.cli import COMMANDS, run
from aligndet_hf.commands.predict import PredictArguments
from aligndet_hf.ranges import (
    ANY,
    BELOW_ONE,
    COUNT,
    LIMIT,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    _kinds,
    check_values,
)
from aligndet_hf.training.finetune_arguments import require_metric


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (ANY, [-1e9, 0], [], "finite"),
        (NOT_NEGATIVE, [0, 1e9], [-1e-9], "0 or more"),
        (COUNT, [1, 2], [0, 0.5], "positive"),
        (POSITIVE, [1e-9], [0, -1], "positive"),
        (SHARE, [0, 0.5, 1], [-0.1, 1.1], "from 0 to 1"),
        (PART, [0.1, 1], [0, 1.1], "above 0 and at most 1"),
        (BELOW_ONE, [0, 0.9], [1], "0 or more and below 1"),
        (LIMIT, [-1, 1], [0, -2], "positive, or -1"),
        (SEED, [0, 2**32 - 1], [-1, 2**32], "from 0 to 4294967295"),
        (Range(2), [2], [1.9], "2 or more"),
    ],
)
def test_a_range_holds_its_numbers_and_says_which(allowed, inside, outside, words):
    assert all(number in allowed for number in inside) and not any(number in allowed for number in outside)
    assert not any(number in allowed for number in (math.nan, math.inf, -math.inf))
    assert str(allowed) == words


@dataclass
class Example:
    output_dir: str
    count: int = field(default=1, metadata={"range": COUNT})
    rates: list[float] = field(default_factory=lambda: [0.5], metadata={"range": PART})
    size: int | None = None
    sizes: list[int] | None = None
    note: str = ""
    switch: bool = False
    text_or_number: float | str = "auto"

    inherited_ranges = {"size": Range(3)}

    def __post_init__(self):
        check_values(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dir": ""}, "output_dir must not be empty"),
        ({"output_dir": "  "}, "output_dir must not be empty"),
        ({"count": 0}, "count must be positive, got 0"),
        ({"count": 1.5}, "count must be a whole number, got 1.5"),
        ({"count": "2"}, "count must be a whole number, got '2'"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"rates": [0.5, 0]}, "rates must be above 0 and at most 1, got 0"),
        ({"rates": []}, "rates must not be empty"),
        ({"sizes": []}, "sizes must not be empty"),
        ({"rates": ["x"]}, "rates must be a number, got 'x'"),
        ({"size": 2}, "size must be 3 or more, got 2"),
        ({"text_or_number": -1}, "text_or_number must be 0 or more, got -1"),
    ],
)
def test_the_first_value_out_of_range_is_named(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Example(**{"output_dir": "x"} | values)


def test_everything_else_passes():
    Example("x", count=3, rates=[1, 0.1], size=None, note="", switch=True)
    Example("x", size=3, text_or_number="none")


def numbers_of_commands():
    for command, row in COMMANDS.items():
        cls = getattr(importlib.import_module(row.module), row.arguments)
        for item in dataclasses.fields(cls):
            if item.init and {int, float} & _kinds(cls)[item.name]:
                yield pytest.param(cls, item, id=f"{command}-{item.name}")


def required(cls) -> dict:
    """Something for every argument that must be given."""
    missing = [
        item
        for item in dataclasses.fields(cls)
        if item.init and item.default is item.default_factory is dataclasses.MISSING
    ]
    return {item.name: ["x"] if "list" in str(item.type) else "x" for item in missing}


@pytest.mark.parametrize(("cls", "item"), numbers_of_commands())
def test_no_command_takes_a_number_that_is_none(cls, item):
    is_list = "list" in str(item.type).lower()
    for number in (math.nan, math.inf, -math.inf, -1e12):
        # Launchers set `local_rank`, and no limit of the aspect ratio is infinite.
        if (item.name, number) in (("local_rank", -1e12), ("max_aspect_ratio", math.inf)):
            continue
        number = int(number) if number == -1e12 and float not in _kinds(cls)[item.name] else number
        with pytest.raises(ValueError, match=f"^{item.name} must be "):
            cls(**required(cls) | {item.name: [number] if is_list else number})


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("finetune", ["--learning_rate", "inf"], "learning_rate must be 0 or more, got inf"),
        ("finetune", ["--weight_decay", "nan"], "weight_decay must be 0 or more, got nan"),
        ("pretrain", ["--warmup_steps", "-3"], "warmup_steps must be 0 or more, got -3"),
        ("clusters", ["--seed", "-1"], "seed must be from 0 to 4294967295, got -1"),
        ("finetune", ["--num_train_epochs", "inf"], "num_train_epochs must be positive, got inf"),
        ("pretrain", ["--output_dir", ""], "output_dir must not be empty"),
        ("finetune", ["--output_dir", ""], "output_dir must not be empty"),
        ("evaluate", ["--split", ""], "split must not be empty"),
        ("proposals", ["--split", " "], "split must not be empty: leave it out"),
        ("predict", ["--images", "a", "", "--output_dir", "o"], "images must not be empty"),
        ("export", ["--images", ""], "images must not be empty: leave it out"),
        ("finetune", ["--adam_beta2", "1"], "adam_beta2 must be 0 or more and below 1, got 1.0"),
        ("proposals", ["--min_relative_size", "0.5", "--max_relative_size", "0.2"], "no box has a relative size from"),
        ("pretrain", ["--image_sizes", "100000000"], "image_sizes must be from 1 to 32767, got 100000000"),
        ("pretrain", ["--crop_scale", "0.9", "0.5"], "crop_scale takes the smallest and the largest area"),
        ("pretrain", ["--aligndet_config", '{"base_momentum": 1.5}'], "base_momentum must be from 0 to 1, got 1.5"),
        ("finetune", ["--metric_for_best_model", "mAP"], "there is no 'mAP'; did you mean 'AP'?"),
        ("finetune", ["--label_smoothing_factor", "0.1"], "label_smoothing_factor has no effect on the training"),
        ("compare", ["--fractions", "0"], "fractions must be above 0 and at most 1, got 0.0"),
    ],
)
def test_the_console_says_so_before_any_work(command, flags, message, tmp_path, capsys):
    row = COMMANDS[command]
    cls = getattr(importlib.import_module(row.module), row.arguments)
    given = {name: str(tmp_path / name) for name in required(cls)}
    assert run(command, [*(part for name, value in given.items() for part in (f"--{name}", value)), *flags]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (AlignDetConfig, {"projection_dim": 0}, "projection_dim must be positive, got 0"),
        (AlignDetConfig, {"contrastive_temperature": math.inf}, "contrastive_temperature must be positive, got inf"),
        (AlignDetConfig, {"contrastive_loss_coefficient": math.nan}, "contrastive_loss_coefficient must be 0 or more"),
        (AlignDetConfig, {"end_momentum": 1.01}, "end_momentum must be from 0 to 1, got 1.01"),
        (SoCoConfig, {"mlp_dim": -1}, "mlp_dim must be positive, got -1"),
        (SoCoConfig, {"level_sizes": [0, 1, 2, 3]}, "level_sizes must be positive, got 0"),
        (SoCoConfig, {"base_momentum": -0.1}, "base_momentum must be from 0 to 1, got -0.1"),
    ],
)
def test_configs_of_models_have_ranges_too(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("name", [None, "AP", "eval_AP50", "AP_cat", "eval_AP_dog"])
def test_the_best_model_is_chosen_by_what_is_measured(name):
    require_metric(name)
    require_metric(name, ["cat", "dog"])


def test_an_unknown_class_is_refused_before_the_first_epoch():
    require_metric("AP_cta")  # classes are not known yet
    with pytest.raises(ValueError, match="there is no 'AP_cta'; did you mean 'AP_cat'"):
        require_metric("AP_cta", ["cat", "dog"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "aligndetr"}, "method must be aligndet or soco, got 'aligndetr'"),
        ({"image_sizes": 64}, r"image_sizes must be a list, such as \[64\], got 64"),
        ({"dataset": None}, "dataset must be given"),
        ({"detector": None}, "detector must be given"),
        ({"freeze_batch_norm": "false"}, "freeze_batch_norm must be True or False, got 'false'"),
        ({"detector_config": '{"num_queries": 12}'}, "detector_config must be a dict, got '{\"num_queries\": 12}'"),
        ({"dataset": {"image": []}}, "dataset must be text, got a dict"),
        ({"split": 3}, "split must be text, got 3"),
        ({"dataset": {}}, "dataset must be text, got a dict"),
        ({"dataset": ["a.jpg"]}, "a data set or a model is expected, got a list. A data set is made of images or"),
    ],
)
def test_values_of_another_kind_are_refused_in_python_too(values, message):
    cls = getattr(importlib.import_module(COMMANDS["pretrain"].module), COMMANDS["pretrain"].arguments)
    with pytest.raises(ValueError, match=message):
        cls(**{"dataset": "images", "output_dir": "out"} | values)


def test_numbers_of_numpy_are_numbers():
    """Which records hold as JSON."""
    cls = getattr(importlib.import_module(COMMANDS["pretrain"].module), COMMANDS["pretrain"].arguments)
    numbers = {"max_steps": np.int64(3), "learning_rate": np.float32(0.5), "image_sizes": list(np.array([64, 96]))}
    made = cls(dataset="images", output_dir="out", **numbers)
    expected = {"max_steps": 3, "learning_rate": 0.5, "image_sizes": [64, 96]}
    assert json.loads(json.dumps({name: getattr(made, name) for name in numbers})) == expected
    assert json.loads(json.dumps({name: made.given[name] for name in numbers})) == expected


def test_one_text_is_a_list_of_one():
    cls = getattr(importlib.import_module(COMMANDS["pretrain"].module), COMMANDS["pretrain"].arguments)
    assert cls(dataset="images", output_dir="out", report_to="none").report_to == ["none"]
    assert PredictArguments(detector="d", images="a.jpg", output_dir="out", formats="coco").formats == ["coco"]


def test_a_data_set_in_memory_is_taken_for_a_list_of_paths():
    images = datasets.Dataset.from_dict({"image": []})
    assert PredictArguments(detector="d", images=images, output_dir="out").images is images
