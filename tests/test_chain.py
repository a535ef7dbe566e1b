"""`aligndet chain`: real stages on small data, resuming, and what is refused before anything runs."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import datasets
import forks
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_detectors import CONFIGS, SMALL_DETR, timm_backbone
from tiny_soco import SMALL

from aligndet_hf import cli
from aligndet_hf.commands.chain import ChainArguments, plan_chain, run_chain
from aligndet_hf.data.synthetic import write_synthetic_folder
from aligndet_hf.detectors.backbones import get_backbone
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.recipes import find_recipe

ROOT = Path(__file__).parents[1]
FINETUNE = {
    "command": "finetune", "dataset": "${data}", "save_strategy": "no", "do_eval": False, "max_steps": 1,
    "per_device_train_batch_size": 4, "report_to": "none",
}  # fmt: skip
# AlignDet at low resolution, a supervised stage at low resolution, then fine-tuning at full resolution.
CHAIN = {
    "variables": {"data": None, "start": None},
    "common": {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0, "write_report": False},
    "stages": {
        "proposals": {
            "dataset": "${data}",
            "split": "train",
            "source": "random",
            "dataloader_num_workers": 0,
            "max_boxes": 5,
        },
        "pretrain": {"dataset": "${proposals}", "detector": "${start}", "image_sizes": [64], "max_steps": 1},
        "direct": FINETUNE | {"detector": "${pretrain}/detector", "image_sizes": [64], "learning_rate": 1e-3},
        # No learning: what comes out is what the stage before passed on.
        "finetune": FINETUNE
        | {"detector": "${direct}", "transfer": "everything", "image_sizes": [96], "learning_rate": 0}
        | {"freeze_backbone_norms": True},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "data"
    write_synthetic_folder(folder, {"train": 8, "validation": 2}, seed=0, image_size=(64, 64))
    return folder


@pytest.fixture
def argv(data, tmp_path):
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(CHAIN, sort_keys=False))
    return [
        "chain", "--config", str(tmp_path / "chain.yaml"), "--output_dir", str(tmp_path / "out"),
        "--in_this_process", "--set", f"data={data}",
    ]  # fmt: skip


def changed(first: Path, second: Path) -> set[str]:
    """The tensors in which two detectors differ."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    return {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}


@pytest.fixture
def ran(monkeypatch):
    """The commands that the stages run."""
    commands, run = [], cli.run

    def record(command, argv):
        commands.extend([command] if command != "chain" else [])
        return run(command, argv)

    monkeypatch.setattr(cli, "run", record)
    return commands


def test_stages_hand_on_what_they_made_and_are_run_once(argv, ran, detector_folders, tmp_path, capsys):
    start, out = detector_folders("rt_detr", freeze_backbone_batch_norms=False), tmp_path / "out"
    assert cli.main([*argv, f"start={start}"]) == 0
    assert ran == ["proposals", "pretrain", "finetune", "finetune"]
    report = json.loads((out / "finetune" / "transfer_report.json").read_text())
    assert report["reset"] == report["mismatched"] == []
    assert report["frozen"] and all("backbone" in name and "normalization" in name for name in report["frozen"])
    # A step without learning moves only the statistics of live norms: not those of the backbone, which are frozen.
    moved = changed(out / "direct", out / "finetune")
    assert moved and all(re.search("running_|num_batches", name) and "backbone" not in name for name in moved)
    sizes = [
        json.loads((out / name / "preprocessor_config.json").read_text())["size"]["height"]
        for name in ("direct", "finetune")
    ]
    assert sizes == [64, 96]

    capsys.readouterr()
    assert cli.main([*argv, f"start={start}"]) == 0
    assert len(ran) == 4 and capsys.readouterr().out.count("finished before") == 4
    recipe = str(out / "finetune.yaml")  # each stage can be run alone
    assert cli.main(["finetune", "--config", recipe]) == 0 and "is finished" in capsys.readouterr().out


def test_the_road_from_random_weights(argv, ran, tmp_path):
    """SoCo, AlignDet on its backbone, Direct Pre-training, fine-tuning."""
    stages, out = dict(CHAIN["stages"]), tmp_path / "out"
    backbone = {"backbone": "resnet10t"}
    soco = {"command": "pretrain", "method": "soco", "dataset": "${proposals}", "image_sizes": [64, 64, 32]}
    soco |= {"soco_config": SMALL | {"level_sizes": [8, 16, 32, 64]}, "max_steps": 1, **backbone}
    pretrain = stages["pretrain"] | {"detector": "detr", "detector_config": SMALL_DETR, **backbone}
    pretrain["backbone_weights"] = "${soco}/backbone"
    stages = {"proposals": stages.pop("proposals"), "soco": soco} | stages | {"pretrain": pretrain}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(CHAIN | {"stages": stages}, sort_keys=False))
    assert cli.main(argv) == 0
    assert ran == ["proposals", "pretrain", "pretrain", "finetune", "finetune"]
    trained = load_file(out / "soco" / "backbone" / "model.safetensors")
    used = [t for t in load_file(out / "pretrain" / "detector" / "model.safetensors").values() if t.ndim == 4]
    filters = [tensor for tensor in trained.values() if tensor.ndim == 4]
    assert len(filters) > 10 and all(any(torch.equal(t, tensor) for t in used) for tensor in filters)


@pytest.mark.parametrize("model_type", ["detr", "d_fine", "lw_detr", "yolos"])
def test_low_resolution_first_in_other_families(argv, ran, detector_folders, tmp_path, model_type):
    assert model_type in CONFIGS
    start, out = detector_folders(model_type), tmp_path / "out"
    assert cli.main([*argv, f"start={start}", "--skip", "proposals", "pretrain"]) == 0
    assert ran == ["finetune", "finetune"]
    assert json.loads((out / "finetune" / "transfer_report.json").read_text())["reset"] == []
    assert all(re.search("running_|num_batches", name) for name in changed(out / "direct", out / "finetune"))


def test_direct_pretraining_on_a_convnet(argv, ran, detector_folders, tmp_path):
    """Norms of backbone, pyramid and heads are trained at low resolution; then the backbone's stay as they are."""
    backbone = timm_backbone("test_resnet", (1, 2, 3, 4))
    backbone.freeze_batch_norm_2d = False
    start = detector_folders("torchvision_faster_rcnn", version=2, backbone_config=backbone)
    out, of_norm = tmp_path / "out", r"detector\.({}).*(running_var|\.1\.weight|bn\d\.weight)$"
    assert cli.main([*argv, f"start={start}", "--skip", "proposals", "pretrain"]) == 0 and ran == ["finetune"] * 2
    trained = changed(start, out / "direct")
    for part in (r"backbone\.body", r"backbone\.fpn", r"roi_heads\.box_head"):
        kinds = {match[2] for name in trained if (match := re.match(of_norm.format(part), name))}
        assert "running_var" in kinds and len(kinds) > 1, (part, kinds)
    moved = changed(out / "direct", out / "finetune")  # at a learning rate of 0
    assert moved and all(re.search("running_|num_batches", name) and "backbone.body" not in name for name in moved)
    report = json.loads((out / "finetune" / "transfer_report.json").read_text())
    assert report["frozen"] and all("backbone.body" in name for name in report["frozen"]) and not report["reset"]


def test_nothing_runs_before_all_settings_are_right(argv, ran, tmp_path, capsys):
    assert cli.main([*argv, "start=detr", "finetune.learning_rat=1"]) == 2
    assert f"error: stage 'finetune', for {tmp_path / 'out' / 'finetune'}: " in capsys.readouterr().err
    assert cli.main([*argv, "start=detr", "direct.dataset='${nothing}'"]) == 2
    assert "error: stage 'direct', dataset: ${nothing} is neither" in capsys.readouterr().err
    assert ran == []


def test_a_failed_stage_is_named_and_ends_the_chain(argv, ran, tmp_path, capsys):
    assert cli.main([*argv, f"start={tmp_path / 'nowhere'}"]) == 2
    assert ran == ["proposals", "pretrain"]
    assert "error: stage 'pretrain' (aligndet pretrain --config " in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "variable=1",
            "no variable 'variable'. The variables are data, start; a flag of a stage is set by STAGE.FLAG=VALUE",
        ),
        ("max_steps=2", "a flag of a stage is set by STAGE.FLAG=VALUE, here finetune.max_steps=2"),
        ("proposal.seed=1", "no stage 'proposal'; did you mean 'proposals'"),
        ("data", "takes NAME=VALUE"),
        ("data={", "--set data: while parsing"),
    ],
)
def test_wrong_assignments(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ChainArguments(**CHAIN, output_dir="out", set=[text])


def test_assignments_reach_into_mappings_and_keep_types():
    stages = {"pretrain": {"aligndet_config": {"a": 1, "b": 2}}}
    arguments = ChainArguments(
        stages=stages, output_dir="out", variables={"x": None}, set=["x=[1, 2]", "pretrain.aligndet_config.b=0.5"]
    )
    assert arguments.variables == {"x": [1, 2]}
    assert arguments.stages == {"pretrain": {"aligndet_config": {"a": 1, "b": 0.5}}}
    assert stages["pretrain"]["aligndet_config"]["b"] == 2
    with pytest.raises(ValueError, match="no stages"):
        ChainArguments(output_dir="out")
    with pytest.raises(ValueError, match="--launcher 'acelerate launch': there is no program 'acelerate' on the PATH"):
        ChainArguments(stages={"proposals": {}}, output_dir="out", launcher="acelerate launch")


def run_command(argv):
    sys.exit(cli.main(argv))


def test_an_interrupted_chain_goes_on_where_it_was(argv, proposal_folder, detector_folders, tmp_path, capsys):
    """In processes of their own, as users run it: the stage saves, and the same command resumes it."""
    argv += [f"start={detector_folders('rt_detr')}", f"proposals.dataset={proposal_folder}"]
    argv += ["pretrain.max_steps=20", "pretrain.logging_steps=1", "--skip", "proposals", "direct", "finetune"]
    log, console = tmp_path / "out" / "pretrain" / "log.jsonl", tmp_path / "console"
    words = [word for word in argv if word != "--in_this_process"]
    chain = forks.start(run_command, words, console=console, environment={"PYTHONPATH": str(ROOT)})
    while not log.exists() or not log.read_text():
        assert chain.is_alive(), console.read_text()
        time.sleep(0.05)
    chain.terminate()
    chain.join()
    assert chain.exitcode == 128 + signal.SIGTERM
    said = console.read_text()
    assert "SIGTERM: stopped after step" in said and "same command again to go on" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "pretrain.json").exists()
    assert cli.main(argv) == 0
    assert "Resuming from " in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 21))


def test_weights_that_cannot_be_had_are_told_before_the_first_stage(argv, ran, tmp_path, capsys):
    stages = CHAIN["stages"] | {
        "pretrain": CHAIN["stages"]["pretrain"] | {"detector": "detr", "backbone": "resnet10t"}
    }
    stages["pretrain"]["backbone_weights"] = "${weights}"
    content = CHAIN | {"stages": stages, "variables": CHAIN["variables"] | {"weights": "timm"}}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert cli.main(argv) == 2 and not ran  # the Hub is offline
    error = capsys.readouterr().err
    assert "stage 'pretrain': timm's weights of 'resnet10t' could not be loaded" in error
    assert "--backbone_weights FILE" in error and error.rstrip().endswith("Here that is --set weights=...")
    assert cli.main([*argv, f"weights={tmp_path}/none.safetensors"]) == 2 and not ran
    assert "none.safetensors not found" in capsys.readouterr().err
    assert cli.main([*argv, "pretrain.backbone=someone/net", "pretrain.backbone_weights=null"]) == 2 and not ran
    assert capsys.readouterr().err.rstrip().endswith("Here that is --set pretrain.backbone=...")


def test_a_round_of_self_training(data, ran, tmp_path):
    """The recipe as it is, with tiny sizes: each stage learns from what the one before has made."""
    torch.manual_seed(0)
    backbone = get_backbone(build_detector("detr", backbone="resnet10t"))
    network = getattr(backbone, "_backbone", backbone)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    content = yaml.safe_load(find_recipe("chain_selftrain").read_text())
    common = {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0, "report_to": "none"}
    common |= {"write_report": False, "per_device_train_batch_size": 2}
    given = [
        f"dataset={data}", f"weights={tmp_path / 'w.safetensors'}", "backbone=resnet10t", "label_fraction=0.25",
        "steps=1", "student_steps=1", "pretrain_steps=1", "image_sizes=[64]",
        "clusters.num_clusters=2", "proposals.preset=tiny",
        "pseudolabel.score_threshold=0", "pseudolabel.ignore_threshold=0", "pseudolabel.class_check=none",
        "teacher.eval_strategy='no'", "finetune.eval_strategy='no'",
    ]  # fmt: skip
    arguments = ChainArguments(
        **content, common=common, set=given, output_dir=str(tmp_path / "out"), in_this_process=True
    )
    stages = run_chain(arguments)
    assert ran == ["proposals", "clusters", "pretrain", "finetune", "pseudolabel", "finetune"]
    clusters = datasets.load_from_disk(str(stages["clusters"].folder))
    assert max(len(row["bbox"]) for row in clusters["proposals"]) <= 10 and "cluster" in clusters["proposals"][0]
    pseudo = datasets.load_from_disk(str(stages["pseudolabel"].folder))
    assert 0 < len(pseudo) <= 6  # of 8 images 2 have labels
    student = json.loads((stages["finetune"].folder / "results.json").read_text())
    assert student["steps"] == 1 and student["images"] == 2 and "AP" in student["metrics"]
    kept = json.loads((stages["finetune"].folder / "transfer_report.json").read_text())
    assert kept["reset"] == kept["mismatched"] == []  # all of the teacher


@pytest.mark.parametrize(
    "path", sorted((ROOT / "aligndet_hf" / "recipes").glob("chain_*.yaml")), ids=lambda path: path.stem
)
@pytest.mark.parametrize("left_out", [0, 1, 2, 3])
def test_recipes_are_valid_with_and_without_their_first_stages(path, left_out, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    skip = list(content["stages"])[1:-1][:left_out]
    given = [f"{name}=data" for name, value in content["variables"].items() if value is None]
    stages = plan_chain(ChainArguments(**content, output_dir=str(tmp_path), set=given, skip=skip))
    for stage in stages.values():
        stage.write_recipe()
    assert stages["finetune"].settings["detector"] and not set(stages) & set(skip)
