"""`aligndet compare`: a real comparison on small data, what is shared, resumed, refused and reported."""

import csv
import json
import os
import re
import runpy
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from aligndet_hf import cli
from aligndet_hf.commands import compare as module
from aligndet_hf.commands.compare import CompareArguments, compare, plan_jobs
from aligndet_hf.data import leakage
from aligndet_hf.data.synthetic import write_synthetic_folder
from aligndet_hf.evaluation.image_matches import MATCHES, ImageMatches
from aligndet_hf.pipelines.outcomes import results_of
from aligndet_hf.pipelines.stages import Stage
from aligndet_hf.recipes import find_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "data"
    write_synthetic_folder(folder, {"train": 4, "validation": 3}, seed=0, image_size=(64, 64))
    return folder


@pytest.fixture(scope="module")
def settings(data, detector_folders):
    """Two arms that finish and one that cannot, two label fractions, two seeds, two steps of everything."""
    common = {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0, "image_sizes": [64], "max_steps": 2}
    common["write_report"] = False
    finetune = {"dataset": "${data}", "detector": "${pretrain}/detector", "per_device_train_batch_size": 2}
    finetune |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "report_to": "none"}
    finetune["num_pictures"] = 0
    proposals = {
        "dataset": "${data}",
        "split": "train",
        "source": "random",
        "dataloader_num_workers": 0,
        "max_boxes": 5,
    }
    return {
        "variables": {"data": str(data)},
        "common": common,
        "stages": {
            "proposals": proposals,
            "pretrain": {"dataset": "${proposals}", "detector": str(detector_folders("rt_detr"))},
            "finetune": finetune,
        },
        "arms": {"plain": {"pretrain": None}, "aligndet": {}, "lost": {"finetune": {"detector": "nowhere/at_all"}}},
        "fractions": [0.5, 1.0],
        "seeds": [0, 3],
        "target_ap": [0.9],
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of the comparison, and what it said at its end."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.raises(ChildProcessError) as failed, redirect_stdout(open(folder / "said", "w")):
        compare(CompareArguments(**settings, output_dir=str(folder / "out"), num_parallel=0))
    return folder / "out", str(failed.value)


def plan(settings, **changes) -> dict[str, list[str]]:
    """The folders of the stages of each run, for arms without failures."""
    jobs = plan_jobs(CompareArguments(**settings | {"output_dir": "out"} | changes))
    return {str(job): [str(stage.folder) for stage in job.stages] for job in jobs}


# ---- planning ----


def test_what_runs_share_is_planned_once(settings):
    no_contrast = {"aligndet_config": {"contrastive_loss_coefficient": 0}}
    direct = {"command": "finetune", "dataset": "${data}", "detector": "detr"}
    arms = {
        "aligndet": {},
        "plain": {"pretrain": None},
        "no_contrast": {"pretrain": no_contrast},
        "again": {"pretrain": no_contrast, "finetune": {"transfer": "paper"}},
        "low": {"direct": direct, "finetune": {"detector": "${direct}"}},
    }
    found = plan(settings, arms=arms, seeds=[4], fractions=[0.5, 1.0])
    shared = ["out/shared/proposals", "out/shared/pretrain-seed-4"]
    assert found["aligndet, 50 % of the labels, seed 4"] == [*shared, "out/aligndet/finetune-fraction-0.5-seed-4"]
    assert found["aligndet, 100 % of the labels, seed 4"] == [*shared, "out/aligndet/finetune-fraction-1-seed-4"]
    assert found["plain, 50 % of the labels, seed 4"] == ["out/plain/finetune-fraction-0.5-seed-4"]
    assert found["no_contrast, 50 % of the labels, seed 4"][:2] == [shared[0], "out/no_contrast/pretrain-seed-4"]
    # The same settings again: the stage of the arm before.
    assert found["again, 50 % of the labels, seed 4"][:2] == [shared[0], "out/no_contrast/pretrain-seed-4"]
    # A supervised stage depends on the labels, and needs no pre-training here.
    assert found["low, 50 % of the labels, seed 4"][0] == "out/low/direct-fraction-0.5-seed-4"
    assert len(found["low, 50 % of the labels, seed 4"]) == 2


def test_a_stage_with_a_seed_of_its_own_is_run_once(settings):
    stages = settings["stages"] | {"pretrain": settings["stages"]["pretrain"] | {"seed": 0}}
    found = plan(settings, stages=stages, arms={"aligndet": {}}, seeds=[4, 5])
    pretrained = {folders[1] for folders in found.values()}
    assert pretrained == {"out/shared/pretrain"} and len(found) == 4


def test_labels_and_seeds_reach_every_supervised_stage(settings):
    arms = {"low": {"direct": {"command": "finetune", "dataset": "${data}"}, "finetune": {"detector": "${direct}"}}}
    for job in plan_jobs(CompareArguments(**settings | {"arms": arms, "output_dir": "out"})):
        for stage in job.stages:
            chosen = [stage.settings[name] for name in ("label_fraction", "label_seed", "seed")]
            assert chosen == [job.fraction, job.seed, job.seed]
    arms["low"]["direct"]["label_fraction"] = 1.0
    with pytest.raises(ValueError, match="'direct' would learn from other labels of the same data"):
        plan_jobs(CompareArguments(**settings | {"arms": arms, "output_dir": "out"}))


@pytest.mark.parametrize("knows_more", ["teacher", "pseudolabel"])
@pytest.mark.parametrize("spelling", [{}, {"split": "train"}, {"split": None}, {"dataset": "${data}/"}])
def test_no_stage_knows_more_labels_however_its_data_is_written(settings, spelling, knows_more):
    stages = {
        "teacher": {"command": "finetune", "dataset": "${data}", "detector": "detr"},
        "pseudolabel": {"dataset": "photos", "labelled_dataset": "${data}", "detector": "${teacher}"},
        "finetune": {"dataset": "${data}", "detector": "${teacher}", "pseudo_dataset": "${pseudolabel}"},
    }
    changes = {"stages": stages, "arms": {"student": {}}, "fractions": [0.5], "output_dir": "out"}
    names = {key: f"labelled_{key}" if knows_more == "pseudolabel" else key for key in spelling}
    stages[knows_more] |= {names[key]: value for key, value in spelling.items()}
    assert plan_jobs(CompareArguments(**settings | changes))
    stages[knows_more]["label_fraction"] = 1.0
    with pytest.raises(ValueError, match=f"'{knows_more}' would learn from other labels of the same data"):
        plan_jobs(CompareArguments(**settings | changes))
    stages[knows_more][names.get("dataset", "dataset" if knows_more == "teacher" else "labelled_dataset")] = "other"
    assert plan_jobs(CompareArguments(**settings | changes))


def test_last_stages_with_the_same_settings_are_run_once(settings):
    arms = {"plain": {"pretrain": None}, "again": {"pretrain": None}, "ceiling": {"pretrain": None, "fraction": 1.0}}
    found = plan(settings, arms=arms, seeds=[4], fractions=[0.5, 1.0])
    assert found["again, 50 % of the labels, seed 4"] == ["out/plain/finetune-fraction-0.5-seed-4"]
    whole = [f"{arm}, 100 % of the labels, seed 4" for arm in arms] + ["ceiling, 50 % of the labels, seed 4"]
    assert {tuple(found[run]) for run in whole} == {("out/plain/finetune-fraction-1-seed-4",)}


def test_longer_arms_of_the_baseline(settings):
    stages = settings["stages"] | {"pretrain": settings["stages"]["pretrain"] | {"max_steps": 7}}
    arms = {"plain": {"pretrain": None, "finetune": {"transfer": "paper"}}, "aligndet": {}}
    changes = {"stages": stages, "arms": arms, "output_dir": "out", "fractions": [0.5]}
    arguments = CompareArguments(**settings | changes, baseline_long=True, baseline_all_compute=True)
    jobs = [job for job in plan_jobs(arguments) if job.seed == 3]
    steps = {job.arm: job.measured.settings["max_steps"] for job in jobs}
    # 7 steps of 2 images (the default of pre-training), and 2 of 2: 18 images.
    assert steps == {"plain": 2, "aligndet": 2, "plain_long": 4, "plain_all_compute": 9}
    for job in jobs:
        if job.arm.startswith("plain"):
            assert [stage.name for stage in job.stages] == ["finetune"]
            assert job.measured.settings["transfer"] == "paper"
    # From now on the arms are the configuration's: what is published has them without the flags.
    again = CompareArguments(**settings | changes | {"arms": arguments.arms})
    assert {job.arm: job.measured.settings["max_steps"] for job in plan_jobs(again)} == steps
    epochs = settings["common"] | {"max_steps": -1}
    arguments = CompareArguments(**settings | changes | {"common": epochs}, baseline_long=True)
    long = next(job for job in plan_jobs(arguments) if job.arm == "plain_long").measured
    assert long.settings["num_train_epochs"] == 100 and long.settings["max_steps"] == -1
    with pytest.raises(ValueError, match="baseline_all_compute: stage 'finetune' has no max_steps"):
        plan_jobs(CompareArguments(**settings | changes | {"common": epochs}, baseline_all_compute=True))


def test_a_teacher_that_is_an_arm_is_trained_once():
    """The recipe of self-training: its arms, what they share, and what each student learns from."""
    content = yaml.safe_load(find_recipe("compare_selftrain").read_text())
    arguments = CompareArguments(
        **content, set=["dataset=photos", "weights=file", "steps=3", "long_steps=6"], output_dir="out"
    )
    jobs = {job.arm: job for job in plan_jobs(arguments) if job.seed == 1}
    folders = {arm: [str(stage.folder).removeprefix("out/") for stage in job.stages] for arm, job in jobs.items()}
    name = "-fraction-0.1-seed-1"
    assert folders["plain"] == [f"plain/finetune{name}"]
    assert folders["aligndet"] == [
        "shared/proposals", "shared/clusters", "shared/pretrain", f"aligndet/finetune{name}",
    ]  # fmt: skip
    assert folders["selftrain"] == [
        f"plain/finetune{name}", f"plain/pseudolabel{name}", f"selftrain/finetune{name}",
    ]  # fmt: skip
    assert folders["selftrain_shuffled"] == [
        f"plain/finetune{name}", f"selftrain_shuffled/pseudolabel{name}", f"selftrain_shuffled/finetune{name}",
    ]  # fmt: skip
    assert folders["aligndet+selftrain"] == [
        *folders["aligndet"], f"shared/pseudolabel{name}", f"aligndet+selftrain/finetune{name}",
    ]  # fmt: skip
    assert folders["full"] == ["full/finetune-fraction-1-seed-1"]
    assert jobs["full"].measured.settings["label_fraction"] == 1.0 and jobs["full"].fraction == 0.1
    pseudolabel = jobs["selftrain_shuffled"].stages[1].settings
    assert pseudolabel["shuffle_classes"] and pseudolabel["detector"] == f"out/plain/finetune{name}"
    assert (pseudolabel["label_fraction"], pseudolabel["label_seed"]) == (0.1, 1)
    student = jobs["selftrain"].measured.settings
    assert student["pseudo_dataset"] == f"out/plain/pseudolabel{name}" and student["transfer"] == "everything"
    steps = {arm: job.measured.settings["max_steps"] for arm, job in jobs.items()}
    assert {arm for arm, count in steps.items() if count == 6} == {"plain_long", "plain_long_aug", "aligndet_long"}


def test_each_arm_of_the_recipe_of_augmentations_changes_one_thing():
    content = yaml.safe_load(find_recipe("compare_augmentations").read_text())
    arguments = CompareArguments(**content, set=["dataset=photos", "weights=file", "steps=3"], output_dir="out")
    settings = {job.arm: job.measured.settings for job in plan_jobs(arguments) if job.seed == 0}
    assert arguments.baseline == "crops" and len(settings) == 11
    for arm, own in settings.items():
        assert own["max_steps"] == 3 and own["label_fraction"] == 0.1
        changed = {name for name in own if own[name] != settings["crops"].get(name)} - {"output_dir"}
        if arm == "early_stopping":
            changed.remove("save_strategy")  # the best weights, which it ends with, must have been saved
        assert len(changed) == (arm != "crops")


def test_checkpoints_and_chains_are_arms(settings, tmp_path):
    chain = tmp_path / "chain.yaml"
    content = {
        "variables": {"data": "other", "size": 64},
        "common": {"image_sizes": ["${size}"], "learning_rate": 0.5},
        "stages": {
            "direct": {
                "command": "finetune",
                "dataset": "${data}",
                "detector": "detr",
                "seed": 1,
                "label_fraction": 1.0,
            },
            "last": {"command": "finetune", "detector": "${direct}", "transfer": "everything", "max_steps": 99},
        },
    }
    chain.write_text(yaml.safe_dump(content, sort_keys=False))
    changes = {"arms": {"road": {"chain": str(chain)}}, "checkpoints": ["coco=some/model"], "output_dir": "out"}
    arguments = CompareArguments(**settings | changes)
    assert arguments.baseline == "road"
    jobs = {job.arm: job for job in plan_jobs(arguments) if job.fraction == 0.5 and job.seed == 3}
    (coco,) = jobs["coco"].stages
    assert coco.settings["detector"] == "some/model"
    direct, last = jobs["road"].stages
    assert direct.settings["label_fraction"] == 0.5 and direct.settings["seed"] == 1
    assert direct.settings["image_sizes"] == [64] and direct.settings["learning_rate"] == 0.5
    assert direct.settings["dataset"] == settings["variables"]["data"]  # our variables win
    # The common last stage, from where the chain's own last one starts.
    differing = {key for key in last.settings if last.settings[key] != coco.settings.get(key)}
    assert differing == {"detector", "transfer", "output_dir"}
    assert last.settings["detector"] == str(direct.folder) and last.settings["max_steps"] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": {"pretrain": {}}}, "the last stage, 'pretrain', must be a `finetune`"),
        ({"common": {"seed": 1}}, "common: seed is set by the comparison"),
        ({"arms": {"shared": {}}}, "none of them called `shared`"),
        ({"arms": {"a": 1}}, "arm 'a' must be a mapping"),
        ({"baseline": "plan"}, "no arm 'plan'; did you mean 'plain'"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"fractions": []}, "fractions must not be empty"),
        ({"checkpoints": ["x"]}, "NAME=DETECTOR"),
        ({"checkpoints": ["aligndet=some/model"]}, "--checkpoints would replace the arm 'aligndet'"),
        ({"checkpoints": ["a=some/model", "a=other"]}, "--checkpoints would replace the arm 'a'"),
        ({"arms": {"plain": {}, "plain_long": {}}, "baseline_long": True}, "--baseline_long would replace the arm"),
        ({"arms": {"a": {"finetune": {"do_eval": False}}}}, "arm 'a': do_eval false leaves nothing to compare"),
        ({"num_parallel": -1}, "num_parallel"),
        ({"arms": {"a": {"finetune": None}}}, "arm 'a': stage 'finetune' is what is measured"),
        ({"arms": {"a": {"finetune": {"label_seed": 1}}}}, "arm 'a': .*label_seed is set by the comparison"),
        ({"arms": {"a": {"pretrian": {"seed": 1}}}}, "arm 'a': .*no command 'pretrian'; did you mean"),
        ({"arms": {"a": {"chain": "nowhere.yaml"}}}, "nowhere.yaml"),
    ],
)
def test_wrong_comparisons(settings, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        plan_jobs(CompareArguments(**settings | {"output_dir": "out"} | changes))


def test_without_a_file_there_is_a_comparison_with_the_defaults():
    arguments = CompareArguments(output_dir="out", set=["dataset=photos", "weights=file"], seeds=[0], fractions=[1.0])
    plain, ours = plan_jobs(arguments)
    assert plain.measured.settings["detector"] == "rt_detr" and plain.measured.settings["backbone_weights"] == "file"
    assert [stage.command for stage in ours.stages] == ["proposals", "pretrain", "finetune"]
    assert ours.stages[0].settings["dataset"] == "photos"


# ---- running ----


def test_results_are_those_of_the_runs(finished):
    folder, message = finished
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader(open(folder / "results.csv")))
    assert [(row["arm"], row["fraction"], row["seed"]) for row in rows] == [
        (arm, fraction, seed) for seed in "03" for fraction in ("0.5", "1.0") for arm in ("plain", "aligndet")
    ]
    for row, run in zip(rows, results["runs"], strict=True):
        own = folder / run["arm"] / f"finetune-fraction-{run['fraction']:g}-seed-{run['seed']}"
        metrics = json.loads((own / "results.json").read_text())["metrics"]
        assert float(row["AP"]) == run["metrics"]["AP"] == metrics["AP"]
        assert float(row["AP_square"]) == metrics["per_class"]["square"]
        assert [point["step"] for point in run["curve"]] == [1, 2]
        assert run["curve"][-1]["AP"] == metrics["AP"]
        assert run["curve"][-1]["per_class"] == metrics["per_class"]
    statistics = results["statistics"]["0.5"]
    assert statistics["aligndet"]["gain"]["seeds"] == [0, 3] and list(statistics) == ["plain", "aligndet"]
    assert results["arms"]["aligndet"] == {"start": {"detector": "shared/pretrain-seed-0/detector"}, "protocol": {}}
    assert results["seconds"]["aligndet"]["before"] > 0 == results["seconds"]["plain"]["before"]
    # Two steps of pre-training and two of fine-tuning, each of two images.
    costs = {
        arm: {name: cost[name] for name in ("steps_before", "steps", "images")}
        for arm, cost in results["costs"].items()
        if cost
    }
    assert costs["plain"] == {"steps_before": 0, "steps": 2, "images": 4}
    assert costs["aligndet"] == {"steps_before": 2, "steps": 2, "images": 8} and results["costs"]["lost"] is None
    # Of a run the AP of its saved matches is the one that was measured.
    for run in results["runs"]:
        own = folder / run["arm"] / f"finetune-fraction-{run['fraction']:g}-seed-{run['seed']}"
        assert ImageMatches.load(own / MATCHES).average_precision() == pytest.approx(run["metrics"]["AP"], abs=1e-9)
    low, high = statistics["aligndet"]["gain"]["image_interval"]
    assert low <= high


def test_the_failed_arm_is_reported_and_the_others_are_done(finished):
    folder, message = finished
    assert message.startswith("4 of 15 stages failed; the same command again tries them anew:")
    assert (
        f"  {folder}/lost/finetune-fraction-0.5-seed-0: detector 'nowhere/at_all': no such folder here, no family"
        in message
    )
    report = (folder / "report.md").read_text()
    assert "8 of 12 runs are finished, 4 stages failed" in report and "## What failed" in report


def test_what_begins_ends_and_fails_is_told_as_it_happens(finished):
    folder, _ = finished
    said = (folder.parent / "said").read_text().splitlines()
    # Two pre-trainings and twelve fine-tunings, each of two steps.
    assert said[0] == ("12 runs of 3 arms, 15 stages; 0 are finished. The others train for about 28 steps in all.")
    assert f"shared/proposals: proposals begins, its log is {folder}/shared/proposals.log" in said
    ended = [line for line in said if line.startswith("[")]
    assert [line.split("]")[0] for line in ended] == [f"[{number}/15" for number in range(1, 16)]
    first = next(line for line in ended if "plain, 50 % of the labels, seed 0" in line)
    assert re.search(
        r": \d+ s, AP \d+\.\d, about 0:\d\d:\d\d left, proposals not counted, pretrain not counted$", first
    )
    assert re.search(r": \d+ s, AP \d+\.\d, about 0:\d\d:\d\d left$", ended[-3])
    failed = next(line for line in ended if "lost, 50 % of the labels, seed 0" in line)
    assert ": finetune failed: detector 'nowhere/at_all': no such folder here, no family, and from the" in failed
    assert failed.endswith(f"; its log is {folder}/lost/finetune-fraction-0.5-seed-0.log")


def test_label_subsets_are_nested_and_those_of_the_runs(finished):
    folder, _ = finished
    subsets = json.loads((folder / "label_subsets.json").read_text())["rows"]
    assert list(subsets) == ["0", "3"] and list(subsets["0"]) == ["0.5", "1"]
    for by_fraction in subsets.values():
        assert len(by_fraction["0.5"]) == 2 and set(by_fraction["0.5"]) < set(by_fraction["1"]) == set(range(4))
    recipe = yaml.safe_load((folder / "plain" / "finetune-fraction-0.5-seed-3.yaml").read_text())
    assert (recipe["label_fraction"], recipe["label_seed"], recipe["seed"]) == (0.5, 3, 3)


def test_the_report_states_commands_versions_seeds_and_protocol(finished):
    folder, _ = finished
    report = (folder / "report.md").read_text()
    for text in (
        "COCO average precision, IoU 0.50:0.95", "Seeds: 0, 3;", "torch 2.", "| 50 % of the labels | 2 |",
        "`aligndet finetune --config FOLDER/aligndet/finetune-fraction-1-seed-3.yaml`", "per_device_train_batch_",
        "Of 3 evaluation images 0 are, byte for byte, among the 4 training images", "with 2 seeds it covers",
        "| lost | detector: nowhere/at_all |", "Whether plain is trained to its end was not looked at",
        "bootstrap over images", "| aligndet | 2 | 2 | 8 |",
        "| arm | start | minutes before fine-tuning | minutes of fine-tuning |",
    ):  # fmt: skip
        assert text in report, text
    assert "Not under the same protocol" not in report
    pictures = {line[line.index("(") + 1 : -1] for line in report.splitlines() if line.startswith("![")}
    assert pictures == {"learning_curves.png", "labels.png", "ap-0.5.png", "ap-1.png"}
    assert all((folder / name).stat().st_size > 5000 for name in pictures)
    page = (folder / "report.html").read_text()  # the same, the plots, and what both arms find with either share
    assert page.count("data:image/") == 4 + 2 and {"arms-0.5.jpg", "arms-1.jpg"} <= set(os.listdir(folder))
    assert "<figcaption>Average precision in the course of fine-tuning</figcaption>" in page
    assert "nothing can be concluded" in page and "<h2>Protocol</h2>" in page
    config = yaml.safe_load(report.split("runs it again, where what it names is:\n\n```yaml\n")[1].split("```")[0])
    assert plan_jobs(CompareArguments(**config, output_dir="out"))


def test_the_same_command_tries_only_what_failed(finished, settings, monkeypatch, capsys):
    folder, _ = finished
    commands, run = [], cli.run
    monkeypatch.setattr(cli, "run", lambda command, argv: commands.append(argv[1]) or run(command, argv))
    monkeypatch.setattr(leakage, "fingerprints", None)  # nor are the images compared again
    with pytest.raises(ChildProcessError, match="4 of 15"):
        compare(CompareArguments(**settings, output_dir=str(folder), num_parallel=0))
    assert len(commands) == 4 and all("/lost/" in command for command in commands)

    del commands[:]
    arms = {name: settings["arms"][name] for name in ("plain", "aligndet")}
    results = compare(CompareArguments(**settings | {"arms": arms}, output_dir=str(folder), num_parallel=0))
    assert commands == [] and results["failures"] == {} and len(results["runs"]) == 8


def test_runs_of_two_lengths_are_not_compared(finished, settings, monkeypatch):
    """Lengthened, a run has had the learning rates of another schedule than one that begins now."""
    monkeypatch.setattr(module, "run_stages", None)
    longer = settings | {"common": settings["common"] | {"max_steps": 3}}
    with pytest.raises(ValueError, match="was begun with max_steps 2, and now it is 3: .* Give another output_dir"):
        compare(CompareArguments(**longer, output_dir=str(finished[0]), num_parallel=0))


def test_a_finished_comparison_is_published(finished, settings, data, tmp_path):
    """What `model_cards/` holds: results, report and cards, which agree and name no place of this machine."""
    folder, _ = finished
    script = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "tools" / "model_cards.py"))
    shown = tmp_path / "model_cards" / "scenes"
    if json.loads((folder / "results.json").read_text())["failures"]:
        with pytest.raises(ValueError, match="is not finished"):
            script["publish"](folder, shown)
        arms = {name: settings["arms"][name] for name in ("plain", "aligndet")}
        compare(CompareArguments(**settings | {"arms": arms}, output_dir=str(folder), num_parallel=0))

    for own in ("shared/pretrain-seed-0", "aligndet/finetune-fraction-0.5-seed-0"):
        assert "## Beside other starting points" in (folder / own / "README.md").read_text()
    cards = script["publish"](folder, shown, "apache-2.0")
    names = ("shared-pretrain-seed-0", "aligndet-finetune-fraction-0.5-seed-0", "aligndet-finetune-fraction-1-seed-0")
    assert sorted(card.name for card in cards) == sorted(f"scenes-{name}.md" for name in names)
    for path in shown.iterdir():
        if path.suffix != ".png":
            assert str(data.parents[1]) not in path.read_text() and str(folder.parent) not in path.read_text(), path
    start, tenth, _ = (ModelCard((shown / f"scenes-{name}.md").read_text()) for name in names)
    assert all(card.data.license == "apache-2.0" for card in (start, tenth))
    # The source of the proposals, not the folder `proposals`.
    assert "# RT-DETR pre-trained with AlignDet on data" in start.text and "Nothing was measured" not in start.text
    results = json.loads((shown / "results.json").read_text())
    run = next(run for run in results["runs"] if (run["arm"], run["fraction"], run["seed"]) == ("aligndet", 0.5, 0))
    assert tenth.data.eval_results[0].metric_value == round(100 * run["metrics"]["AP"], 2)
    for words in (
        "```bash\naligndet finetune --", "--dataset data ", "label_fraction: 0.5", "From pretrain-seed-0, by tensor",
        "| kept | ", "COCO box metrics in percent on data, split `validation`, 3 images", "| class | AP |",
        "## Limits", "2307.11077", "after 2 steps of fine-tuning from 2 starting points, seeds 0, 3.",
        "Difference to plain on the same labels",
    ):  # fmt: skip
        assert words in tenth.text, words
    assert "seed-0.yaml" in (shown / "report.md").read_text()

    page = "Before.\n<!-- results of model_cards/scenes/results.json -->\nold\n<!-- end of results -->\nAfter.\n"
    filled = script["fill"](page, tmp_path)
    means = [results["statistics"]["0.5"][arm]["metrics"]["AP"] for arm in ("plain", "aligndet")]
    cells = [f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f} (2)" for found in means]
    assert filled.startswith("Before.\n<!-- ") and filled.endswith("<!-- end of results -->\nAfter.\n")
    assert "old" not in filled and f"| 50 % of the labels | 2 | {' | '.join(cells)} |" in filled
    assert script["fill"](filled, tmp_path) == filled


def test_other_settings_of_the_common_stage_are_told(settings, tmp_path, monkeypatch):
    """Reports made before anything is finished, too."""
    arms = {"plain": {"pretrain": None}, "long": {"finetune": {"max_steps": 7, "transfer": "paper"}}}
    monkeypatch.setattr(module, "run_stages", lambda stages, **_: {})
    results = compare(CompareArguments(**settings | {"arms": arms}, output_dir=str(tmp_path)))
    assert results["arms"]["long"]["protocol"] == {"max_steps": 7} and "transfer" in results["arms"]["long"]["start"]
    report = (tmp_path / "report.md").read_text()
    assert "**Not under the same protocol**" in report and "| long | max_steps: 7 |" in report
    assert "Nothing is finished yet." in report


@pytest.mark.parametrize("fractions", [[0.5, 1.0], [1.0, 0.5]])
def test_an_arm_with_more_labels_is_told_in_any_order(settings, tmp_path, monkeypatch, fractions):
    arms = {"plain": {"pretrain": None}, "ceiling": {"pretrain": None, "fraction": 1.0}}
    monkeypatch.setattr(module, "run_stages", lambda stages, **_: {})
    run = settings | {"arms": arms, "fractions": fractions, "output_dir": str(tmp_path)}
    found = compare(CompareArguments(**run))["arms"]
    assert found["ceiling"] == {"start": {}, "protocol": {"label_fraction": 1.0}}
    assert found["plain"] == {"start": {}, "protocol": {}}


def test_best_weights_are_told_and_are_no_point_of_the_curve(settings, tmp_path, monkeypatch):
    arms = {"plain": {"pretrain": None}, "early": {"pretrain": None, "finetune": {"early_stopping_patience": 1}}}
    arms["early"]["finetune"]["save_strategy"] = "best"
    monkeypatch.setattr(module, "run_stages", lambda stages, **_: {})
    run = settings | {"arms": arms, "output_dir": str(tmp_path)}
    assert compare(CompareArguments(**run))["best_weights"] == ["early"]
    log = [(100, 0.2), (200, 0.4), (300, 0.3), (300, 0.4)]  # the last is measured again, with the weights of step 200
    history = [{"step": step, "eval_AP": ap, "eval_AP_a": ap} for step, ap in log]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    metrics = {"AP": 0.4, "per_class": {"a": 0.4}}
    (tmp_path / "results.json").write_text(json.dumps({"metrics": metrics, "steps": 300}))
    found = results_of(Stage("finetune", "finetune", {"output_dir": str(tmp_path)}))
    assert [(point["step"], point["AP"]) for point in found["curve"]] == log[:3] and found["metrics"] == metrics


def test_pseudo_labelled_images_are_training_images(settings, data, tmp_path, monkeypatch):
    """A student that learns from evaluation images, and a published set of them."""
    detector = settings["stages"]["pretrain"]["detector"]
    stages = {
        "teacher": settings["stages"]["finetune"] | {"command": "finetune", "detector": detector},
        "pseudolabel": {
            "dataset": "${data}", "split": "validation", "labelled_dataset": "${data}", "detector": "${teacher}"
        },
        "finetune": {"dataset": "${data}", "detector": "${teacher}", "pseudo_dataset": "${pseudolabel}"},
    }  # fmt: skip
    monkeypatch.setattr(module, "run_stages", lambda stages, **_: {})
    run = settings | {"stages": stages, "arms": {"student": {}}, "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="3 of 3 evaluation images are training images"):
        compare(CompareArguments(**run))
    stages["finetune"] |= {"pseudo_dataset": str(data), "pseudo_split": "validation"}
    with pytest.raises(ValueError, match="3 of 3 evaluation images are training images"):
        compare(CompareArguments(**run))
    stages["finetune"]["pseudo_split"] = "train"
    assert compare(CompareArguments(**run))["leakage"]["training_images"] == [4]


def test_leaked_images_are_refused_unless_told_otherwise(settings, data, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    names = [sorted((copy / split).glob("*.jpg"))[0] for split in ("train", "validation")]
    names[0].write_bytes(names[1].read_bytes())
    monkeypatch.setattr(module, "run_stages", lambda stages, **_: {})
    run = settings | {"variables": {"data": str(copy)}, "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="1 of 3 evaluation images are training images, such as .*0"):
        compare(CompareArguments(**run))
    compare(CompareArguments(**run | {"allow_leakage": True}))
    assert "warning: of 3 evaluation images 1 are training images and 0 look like one" in capsys.readouterr().out
    assert "1 are, byte for byte, among" in (tmp_path / "out" / "report.md").read_text()
