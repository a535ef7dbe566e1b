"""What a file of stages means: references, stages left out, common settings, recipes, errors that name the stage."""

from pathlib import Path

import pytest
import yaml

from aligndet_hf.pipelines.progress import Progress
from aligndet_hf.pipelines.stages import Stage, merged, resolve_stages, without_secrets

ROOT = Path(__file__).parents[1]


def resolve(stages, variables=None, **kwargs):
    return resolve_stages(stages, variables or {}, lambda name, *_: f"out/{name}", **kwargs)


ROAD = {
    "proposals": {"dataset": "${images}", "split": "train"},
    "clusters": {"dataset": "${proposals}", "num_clusters": "${count}"},
    "pretrain": {"dataset": "${clusters}", "detector": "rt_detr", "backbone": "resnet18"},
    "direct": {"command": "finetune", "dataset": "${images}", "detector": "${pretrain}/detector"},
    "finetune": {"dataset": "${images}", "detector": "${direct}", "transfer": "everything"},
}
VARIABLES = {"images": "data", "count": 7, "unused": None}


def test_references_are_folders_of_earlier_stages_and_variables_with_their_type():
    stages = resolve(ROAD, VARIABLES)
    assert list(stages) == list(ROAD)
    assert stages["clusters"].settings == {"dataset": "out/proposals", "num_clusters": 7, "output_dir": "out/clusters"}
    assert stages["direct"].command == "finetune" and stages["direct"].settings["detector"] == "out/pretrain/detector"
    assert [need.name for need in stages["finetune"].needs] == ["direct"]
    assert stages["proposals"].uses == {"images"}
    assert stages["pretrain"].uses == {"images", "count"}  # through the stages before


@pytest.mark.parametrize(
    "skip, stage, key, expected",
    [
        ({"clusters"}, "pretrain", "dataset", "out/proposals"),
        ({"proposals", "clusters"}, "pretrain", "dataset", "data"),
        ({"direct"}, "finetune", "detector", "out/pretrain/detector"),
        ({"pretrain", "direct"}, "finetune", "detector", "rt_detr"),
        ({"pretrain"}, "direct", "detector", "rt_detr"),
    ],
)
def test_a_flag_that_refers_to_a_left_out_stage_takes_the_value_it_has_there(skip, stage, key, expected):
    stages = resolve(ROAD, VARIABLES, skip=skip)
    assert not set(stages) & skip and stages[stage].settings[key] == expected


def test_a_flag_that_the_left_out_stage_does_not_have_is_dropped():
    stages = {"soco": None, "pretrain": {"dataset": "d", "detector": "detr", "backbone_weights": "${soco}/backbone"}}
    assert resolve(stages)["pretrain"].settings == {"dataset": "d", "detector": "detr", "output_dir": "out/pretrain"}


def test_own_settings_win_over_common_ones_and_these_over_recipes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nseed: 5\nmax_steps: 9\nflip_probability: 0\ndetector_config: {a: 1, b: 1}")
    stages = {
        "proposals": {"dataset": "d"},
        "pretrain": {"config": str(recipe), "dataset": "d", "max_steps": 2, "detector_config": {"b": 2}},
    }
    found = resolve(
        stages,
        {"s": 3},
        common={"learning_rate": 0.1, "warmup_steps": 4},
        injected={"seed": "${s}", "warmup_steps": 5, "max_steps": 5},
    )
    assert found["proposals"].settings == {"dataset": "d", "output_dir": "out/proposals"}  # knows none of them
    expected = {"learning_rate": 0.1, "warmup_steps": 4, "seed": 3, "max_steps": 2, "flip_probability": 0}
    expected |= {"detector_config": {"a": 1, "b": 2}, "dataset": "d", "output_dir": "out/pretrain"}
    assert found["pretrain"].settings == expected


def test_a_variable_chooses_the_recipe(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"dataset: {name}\ndetector: ${{folder}}/{name}")
    stages = {"evaluate": {"config": str(tmp_path / "${recipe}.yaml")}}
    evaluate = resolve(stages, {"recipe": "b", "folder": "f"})["evaluate"]
    assert evaluate.settings == {"dataset": "b", "detector": "f/b", "output_dir": "out/evaluate"}
    assert evaluate.uses == {"recipe", "folder"}
    with pytest.raises(ValueError, match="stage 'evaluate', config: the variable 'recipe' has no value"):
        resolve(stages, {"recipe": None})


def test_merging_replaces_all_but_mappings():
    assert merged({"a": {"x": 1, "y": [1]}, "b": 1}, {"a": {"y": [2]}, "c": None}) == {
        "a": {"x": 1, "y": [2]}, "b": 1, "c": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "stages, message",
    [
        ({"pretrian": {}}, r"stage 'pretrian': there is no command 'pretrian'; did you mean 'pretrain'\?"),
        ({"a": {"command": "chain"}}, "there is no command 'chain'"),
        ({"evaluate": {"dataset": "${proposal}"}, "proposals": {}}, "'evaluate', dataset: .*neither an earlier stage"),
        ({"evaluate": {"dataset": "${unset}"}}, "no value: give --set unset=..."),
        ({"evaluate": {"dataset": "${set_}"}}, "did you mean 'set'"),
        ({"evaluate": {"output_dir": "x"}}, "stage 'evaluate': output_dir cannot be set"),
        ({"evaluate": {"config": "nowhere.yaml"}}, "stage 'evaluate', config: .*nowhere.yaml"),
        ({"soco": None, "evaluate": {"config": "${soco}/e.yaml"}}, "'evaluate', config: the stage soco is left out"),
        ({"evaluate": ["x"]}, "must be a mapping"),
        ({"set": {"command": "evaluate"}}, "name of a stage and of a variable"),
    ],
)
def test_errors_name_the_stage(stages, message):
    with pytest.raises(ValueError, match=message):
        resolve(stages, {"unset": None, "set": 1})


def test_what_no_stage_knows_is_refused():
    with pytest.raises(ValueError, match="no stage has a setting 'max_step'; did you mean"):
        resolve({"finetune": {}}, common={"max_step": 1})
    with pytest.raises(ValueError, match="no stage 'finetun' to skip; did you mean 'finetune'"):
        resolve({"finetune": {}}, skip={"finetun"})


def test_the_recipe_of_a_stage_is_checked_by_its_command(tmp_path):
    (stage,) = resolve_stages(
        {"finetune": {"dataset": "d", "learning_rate": "1e-3"}}, {}, lambda *_: tmp_path / "finetune"
    ).values()
    assert stage.write_recipe().learning_rate == 1e-3
    assert yaml.safe_load(stage.beside(".yaml").read_text()) == stage.settings
    stage.settings["learning_rat"] = 1
    with pytest.raises(
        ValueError, match="stage 'finetune', for .*/finetune: .*unknown key 'learning_rat'; did you mean 'learning_"
    ):
        stage.write_recipe()


def test_tokens_are_kept_apart_from_settings_which_are_stored():
    token = "hf_" + "x" * 34
    stages = {"finetune": {"dataset": "d", "hub_token": "${token}"}, "evaluate": {"dataset": "d", "detector": "e"}}
    found = resolve(stages, {"token": token})
    assert found["finetune"].secrets == {"hub_token": token} and found["evaluate"].secrets == {}
    assert "hub_token" not in found["finetune"].settings and token not in repr(found["finetune"].settings)
    given = {"stages": stages, "variables": {"token": token, "steps": 3}, "arms": [token, f"Bearer {token}", "plain"]}
    cleaned = {"stages": stages, "variables": {"steps": 3}, "arms": ["plain"]}
    assert without_secrets(given, found.values()) == cleaned
    assert without_secrets({"hub_token": token, "a": {"hub_token": token}}, found.values()) == {"a": {}}


@pytest.mark.parametrize("name", ["../finetune", "a/finetune", "a\\finetune", "..", ".hidden", "", "line\nbreak"])
def test_a_stage_cannot_leave_the_folder_of_the_chain(name):
    with pytest.raises(ValueError, match=r"stage .*must hold no slash and start with no dot"):
        resolve({name: {"command": "finetune", "dataset": "d"}})


def test_the_forecast_of_a_stage_that_runs_is_passed_on_once(tmp_path, capsys, monkeypatch):
    stage = Stage("pretrain", "pretrain", {"output_dir": str(tmp_path / "pretrain")})
    log, line = stage.beside(".log"), "step 9 of 90: 9 steps a minute, up to 1.0 GB of memory; the run ends in 0:09:00"
    log.write_text(f"{line}, of the part before\n")  # which was interrupted
    told = Progress([stage], {stage: "aligndet"}, {stage: 90}, num_parallel=1)
    told.begin(stage)
    monkeypatch.setattr(Progress, "_SECONDS", 0)
    for more, expected in (
        ("loss 1\n" + line, ""),
        (", at 12:00.\n", f"aligndet: {line}, at 12:00.\n"),
        (f"{line}\n", ""),
    ):
        capsys.readouterr()
        with open(log, "a") as file:
            file.write(more)
        told.wait(stage)
        assert capsys.readouterr().out == expected
