"""The fields of AlignDetConfig and SoCoConfig as flags of `pretrain`, what it chooses, and what `proposals` keeps."""

from types import SimpleNamespace

import pytest

from aligndet_hf import AlignDetConfig, FinetuneArguments, PretrainArguments, ProposalsArguments, SoCoConfig
from aligndet_hf.parser import parse_arguments
from aligndet_hf.training import finetune_arguments, pretrain_arguments
from aligndet_hf.training.schedules import Schedules

GIVEN = {"dataset": "d", "output_dir": "o"}
WORDS = ["--dataset", "d", "--output_dir", "o"]


def test_every_field_of_the_configs_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(PretrainArguments, ["--help"])
    text = capsys.readouterr().out
    sections = {part.split(":\n")[0]: part for part in text.split("\n\n")}
    for config, title in ((AlignDetConfig, "AlignDet"), (SoCoConfig, "SoCo")):
        for name in set(config.__annotations__) - set(config.sub_configs):
            assert f"--{name} " in sections[title] + sections["AlignDet"]
    assert "(AlignDet: 256; SoCo: 256)" in " ".join(sections["AlignDet"].split())
    assert "channels of the feature pyramid" in " ".join(sections["SoCo"].split())


def test_flags_and_json_are_one(tmp_path):
    flags = parse_arguments(
        PretrainArguments,
        [*WORDS, "--base_momentum", "0.9", "--freeze_backbone", "false", "--detection_loss", "boxes"],
    )
    fields = {"base_momentum": 0.9, "freeze_backbone": False, "detection_loss": "boxes"}
    assert flags.aligndet_config == fields and flags.base_momentum is None
    assert flags == PretrainArguments(**GIVEN, aligndet_config=fields)
    (tmp_path / "recipe.yaml").write_text("base_momentum: 0.9\naligndet_config: {detection_loss: boxes}\n")
    recipe = parse_arguments(
        PretrainArguments, ["--config", str(tmp_path / "recipe.yaml"), *WORDS, "--freeze_backbone", "false"]
    )
    assert recipe.aligndet_config == fields
    star = PretrainArguments(**GIVEN, method="soco", variant="star", level_sizes=[8, 16])
    assert star.soco_config == {"variant": "star", "level_sizes": [8, 16]} and len(star.image_sizes) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"projection_dim": 8, "aligndet_config": {"projection_dim": 16}}, "8, and 16 in aligndet_config: give one"),
        ({"variant": "c4"}, "variant is for --method soco, this is aligndet"),
        ({"method": "soco", "freeze_backbone": True}, "freeze_backbone is for --method aligndet, this is soco"),
        ({"contrastive_temperature": 0.0}, "contrastive_temperature must be positive"),
        ({"base_momentum": -1.0}, "^base_momentum must be 0 or more"),
        ({"lr_scheduler_type": "cosine", "lr_milestones": [0.5]}, "lr_milestones are for lr_scheduler_type step"),
    ],
)
def test_what_does_not_go_together_is_one_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        PretrainArguments(**GIVEN, **wrong)


def schedules(**settings) -> Schedules:
    model = SimpleNamespace(config=AlignDetConfig())
    return Schedules(PretrainArguments(**GIVEN, **settings), model, steps_per_epoch=10)


def test_what_was_chosen_is_told_in_one_line():
    # 2,000 steps: momentum 1 - 50 / 2000, and a twentieth of them as warm-up.
    suited = schedules(max_steps=2000)
    assert str(suited).startswith("2000 steps, so base_momentum 0.975, warmup_steps 100 ")
    assert suited.learning_rate(0) == pytest.approx(2e-4 / 101) and suited.learning_rate(100) == pytest.approx(2e-4)
    assert schedules(max_steps=100_000).warmup_steps == 500
    assert schedules(max_steps=1000, warmup_steps=0.1).warmup_steps == 100
    paper = schedules(max_steps=2000, preset="paper")
    assert paper.warmup_steps == 0 and paper.model.config.base_momentum == 0.996
    assert str(paper) == "2000 steps; nothing was left to choose."


@pytest.mark.parametrize(
    ("settings", "boxes", "overlap", "sizes"),
    [
        ({}, 10, 0.2, (0, 0.04, 0.8)),
        ({"source": "opencv", "max_boxes": 40}, 40, 0.2, (0, 0.04, 0.8)),
        ({"source": "column"}, 300, 0.7, (0, 0.04, 1.0)),  # what others chose stays
        ({"preset": "paper"}, 300, 0.7, (32, 0.0, 0.8)),
        ({"preset": "paper", "source": "random", "nms_threshold": 0.5}, 300, 0.5, (32, 0.0, 0.8)),
        ({"preset": "tiny"}, 10, 0.2, (0, 0.04, 0.8)),
    ],
)
def test_few_boxes_that_are_apart(settings, boxes, overlap, sizes):
    arguments = ProposalsArguments(**GIVEN, **settings)
    kept = arguments.selection()
    assert (kept["max_boxes"], kept["nms_threshold"]) == (boxes, overlap)
    assert (kept["min_side"], kept["min_relative_size"], kept["max_relative_size"]) == sizes
    assert arguments.preset == {"tiny": "tiny"}.get(
        settings.get("preset"), None if "source" in settings else "default"
    )


@pytest.mark.parametrize(
    "arguments, module, installed",
    [
        (PretrainArguments, pretrain_arguments, "get_available_trackers"),
        (FinetuneArguments, finetune_arguments, "get_available_reporting_integrations"),
    ],
)
def test_trackers_that_are_not_installed_are_refused_before_any_work(
    arguments, module, installed, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, installed, lambda: ["tensorboard"])
    given = {"dataset": "x", "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="^report_to: wandb is not installed; installed are tensorboard. Install it"):
        arguments(**given, report_to=["tensorboard", "wandb"])
    for names in (["tensorboard"], ["none"], []):
        arguments(**given, report_to=names)
