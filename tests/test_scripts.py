"""The scripts as a user runs them: two processes, and an export that needs nothing of this package."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file

from aligndet_hf import cli
from aligndet_hf.commands.pretrain import PretrainArguments, pretrain
from aligndet_hf.parser import ArgumentParser, parse_arguments

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "generate_proposals": "proposals",
    "pretrain": "pretrain",
    "finetune": "finetune",
    "evaluate": "evaluate",
}


@pytest.fixture(scope="module")
def recipe(proposal_folder, detector_folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        f"dataset: {proposal_folder}\ndetector: {detector_folders('detr')}\nimage_sizes: [48, 64]\nmax_steps: 6\n"
        "use_clusters: false\n"
        "logging_steps: 4\nsave_steps: 3\nlearning_rate: 1e-3\nuse_cpu: true\ndisable_tqdm: true\n"
        "write_report: false\n"
    )
    return path


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory):
    """A run of one process with micro-batches of 2, two a step."""
    output = tmp_path_factory.mktemp("one_process")
    argv = ["--config", str(recipe), "--gradient_accumulation_steps", "2", "--output_dir", str(output)]
    pretrain(parse_arguments(PretrainArguments, argv))
    return output


def run(command, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_equal_one_with_the_same_batch(recipe, one_process, tmp_path):
    # Not `--cpu`, with which Accelerate starts one process whatever --num_processes says; the recipe says `use_cpu`.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = [str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe), "--output_dir", str(tmp_path)]
    output = run([*launch, *script])
    assert output.count("Finished.") == 1  # Only the main process talks.
    expected, weights = load_file(one_process / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert expected.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert json.loads((tmp_path / "pretrain_summary.json").read_text())["world_size"] == 2
    alone, together = (log_of(folder) for folder in (one_process, tmp_path))
    assert [entry["step"] for entry in together] == [4, 6]
    for one, other in zip(alone, together, strict=True):
        for key in ("loss", "loss_contrastive", "gradient_norm", "positive_similarity"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


FRESH_PROCESS = """
import sys

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, pipeline

folder, recorded = sys.argv[1:]
expected = load_file(recorded)
detector = AutoModelForObjectDetection.from_pretrained(folder).eval()
with torch.no_grad():
    outputs = detector(expected["pixel_values"], pixel_mask=expected["pixel_mask"])
assert torch.equal(outputs.logits, expected["logits"])
assert torch.equal(outputs.pred_boxes, expected["pred_boxes"])
found = pipeline("object-detection", model=folder, threshold=0.0)(Image.new("RGB", (90, 70), "orange"))
print(len(found), sorted({box["label"] for box in found}))
"""


def test_the_export_runs_where_this_package_is_not(one_process, tmp_path):
    from aligndet_hf import AlignDetForPreTraining

    detector = AlignDetForPreTraining.from_pretrained(one_process).online_detector.eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 96, generator=generator)}
    inputs["pixel_mask"] = torch.ones(2, 64, 96, dtype=torch.long)
    inputs["pixel_mask"][1, :, 70:] = 0
    with torch.no_grad():
        outputs = detector(**inputs)
    recorded = tmp_path / "recorded.safetensors"
    save_file({**inputs, "logits": outputs.logits, "pred_boxes": outputs.pred_boxes}, recorded)
    printed = forks.run_alone(FRESH_PROCESS, one_process / "detector", recorded, folder=tmp_path)
    assert printed.split()[-1] == "['object']"


@pytest.mark.parametrize("script, command", SCRIPTS.items())
def test_every_script_is_its_command(script, command, monkeypatch, capsys):
    path = ROOT / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: aligndet {command} ") and "--output" in text


RECIPES = sorted((ROOT / "aligndet_hf" / "recipes").glob("*.yaml"))
LAUNCHES = [path for path in RECIPES if path.stem.startswith("accelerate_")]


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_configuration_of_accelerate_is_one(path):
    config = load_config_from_file(str(path))
    fsdp = config.distributed_type == "FSDP"
    assert config.num_processes == 8 and fsdp == (config.fsdp_config.get("fsdp_version") == 2)


@pytest.mark.parametrize("path", sorted({*RECIPES} - {*LAUNCHES}), ids=lambda path: path.stem)
def test_every_recipe_is_valid_for_a_command(path):
    problems = []
    for row in cli.COMMANDS.values():
        arguments = getattr(importlib.import_module(row.module), row.arguments)
        try:
            ArgumentParser(arguments).set_defaults_from(str(path))
            return
        except ValueError as error:
            problems.append(str(error))
    pytest.fail("\n".join(problems))
