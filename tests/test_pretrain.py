"""Pre-training in this process: what moves, what is written, and how bad input ends."""

import json
import logging
import math
import shutil
from pathlib import Path

import datasets
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_detectors import CONFIGS, CONVNETS, timm_backbone
from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForPreTraining

from aligndet_hf.commands import pretrain as pretrain_module
from aligndet_hf.commands.pretrain import PretrainArguments, pretrain
from aligndet_hf.data.dataset import ProposalViews
from aligndet_hf.data.errors import DataError
from aligndet_hf.detectors.build import find_detector
from aligndet_hf.detectors.families import family_of
from aligndet_hf.models import AlignDetForPreTraining
from aligndet_hf.training import pretrain_aligndet, pretrain_loop, pretrain_setup
from aligndet_hf.training.pretrain_loop import MAX_SKIPPED_STEPS, _problem


@pytest.fixture
def arguments(proposal_folder, detector_folders, tmp_path):
    """A function that gives arguments of a short run, with any of them replaced."""

    def make(model_type="detr", fields=None, **kwargs):
        defaults = {
            "dataset": str(proposal_folder),
            "detector": str(detector_folders(model_type, **fields or {})),
            "output_dir": str(tmp_path / "out"),
            "image_sizes": [64],
            "max_steps": 2,
            "max_proposals": 4,
            "use_clusters": False,
            "logging_steps": 1,
            "write_report": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return PretrainArguments(**defaults | kwargs)

    return make


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    monkeypatch.setattr(pretrain_aligndet, "logger", logging.getLogger("pretrain"))
    return caplog


def log_of(result):
    return [json.loads(line) for line in (result.output_dir / "log.jsonl").read_text().splitlines()]


def weights_of(result):
    return load_file(result.output_dir / "model.safetensors")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_loss_falls_and_everything_moves_that_should_and_nothing_else(arguments, model_type, capsys):
    # Vision transformers start slowly, and the boxes of Group DETR have no bounds to hold them at a high rate.
    is_vit = model_type in ("lw_detr", "rf_detr", "yolos")
    is_slow = is_vit or model_type == "torchvision_retinanet"
    steps, rate = (80, 1e-3) if is_slow else (24, 1e-2 if model_type in CONVNETS else 3e-3)
    steps = 48 if model_type == "conditional_detr" else steps
    # The smallest backbone leaves the losses of an R-CNN, mostly chance, close to the bound.
    larger = {"backbone_config": timm_backbone("resnet10t", (1, 2, 3, 4))} if "rcnn" in model_type else {}
    fields = {"learning_rate": rate, "max_grad_norm": 1.0, "flip_probability": 0.0}
    run = arguments(model_type, larger, max_steps=steps, **fields)
    result = pretrain(run)
    assert ("may pass nothing on to a DETR" in capsys.readouterr().out) == (model_type not in CONVNETS)
    losses = [entry["loss"] for entry in log_of(result)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])

    model = AutoModelForPreTraining.from_pretrained(result.output_dir)
    assert isinstance(model, AlignDetForPreTraining)
    before = AutoModelForObjectDetection.from_pretrained(run.detector).state_dict()
    after = dict(model.online_detector.named_parameters())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    frozen = {name for name, parameter in after.items() if id(parameter) in backbone}
    assert frozen or model_type == "yolos"  # which is one network
    constants = family_of(model.config.detector_config).constants
    # Proposals have no masks: their head has weight decay alone, which leaves biases of zero.
    masks = {name for name in after if "roi_heads.mask" in name}
    assert moved - masks == after.keys() - frozen - set(constants) - masks


def test_the_momentum_detector_follows_by_its_momentum(arguments):
    run = arguments(max_steps=1, learning_rate=1e-2, aligndet_config={"base_momentum": 0.9})
    model = AutoModelForPreTraining.from_pretrained(pretrain(run).output_dir)
    before = AutoModelForObjectDetection.from_pretrained(run.detector).state_dict()
    online = model.online_detector.state_dict()
    for name, value in model.momentum_detector.named_parameters():
        expected = online[name] if "query_position" in name else before[name] + 0.1 * (online[name] - before[name])
        torch.testing.assert_close(value.data, expected)


def test_problems_are_told_only_where_there_are_some():
    fine = {"embedding_spread": 0.63, "positive_similarity": 0.85, "negative_similarity": 0.05}
    fine |= {"best_box_sameness": 0.2, "best_box_borders": 0.1}
    assert _problem(fine) is None and _problem({}) is None
    assert _problem(fine | {"embedding_spread": 0.01}).startswith("the embeddings of all objects are alike")
    assert _problem(fine | {"negative_similarity": 0.85}).startswith("an object's two embeddings are no more")
    constant = _problem(fine | {"best_box_sameness": 0.97, "best_box_borders": 1.0})
    assert constant.startswith("the detector's best box is the same in all images (mean IoU 0.97, 100 % touch two")


def test_what_is_written(arguments):
    result = pretrain(
        arguments("rt_detr", max_steps=5, save_steps=2, save_total_limit=2, logging_steps=2, write_report=True)
    )
    names = {path.name for path in result.output_dir.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "detector", "log.jsonl", "pretrain_summary.json",
        "report.html", "boxes.jpg", "run.json", "checkpoint-4", "checkpoint-5",
    }  # fmt: skip
    entries = log_of(result)
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    assert [entry["epoch"] for entry in entries] == [0.5, 1.0, 1.25]
    diagnostics = {
        "positive_similarity",
        "negative_similarity",
        "rank_accuracy",
        "embedding_spread",
        "matched_proposals",
        "best_box_sameness",
        "best_box_borders",
    }
    expected = {
        "loss",
        "loss_contrastive",
        "learning_rate",
        "momentum",
        "gradient_norm",
        "skipped_steps",
        *diagnostics,
    }
    assert expected <= entries[0].keys() and all(map(math.isfinite, entries[0].values()))
    summary = json.loads((result.output_dir / "pretrain_summary.json").read_text())
    assert summary["metrics"] == entries[-1] == result.metrics
    assert (summary["steps"], summary["data"]) == (5, {"images": 8, "proposals": 32})
    assert AutoImageProcessor.from_pretrained(result.detector_dir).size == {"height": 64, "width": 64}


def test_the_export_is_the_online_detector(arguments):
    result = pretrain(arguments())
    model = AlignDetForPreTraining.from_pretrained(result.output_dir)
    detector = AutoModelForObjectDetection.from_pretrained(result.detector_dir)
    assert detector.config.id2label == {0: "object"}
    expected = model.online_detector.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in detector.state_dict().items())


def test_logged_values_are_means_over_the_steps_since_the_last_entry(arguments, tmp_path):
    each = log_of(pretrain(arguments(max_steps=4, logging_steps=1)))
    pairs = log_of(pretrain(arguments(max_steps=4, logging_steps=2, output_dir=str(tmp_path / "pairs"))))
    for key in ("loss", "loss_contrastive", "gradient_norm"):
        means = [(each[i][key] + each[i + 1][key]) / 2 for i in (0, 2)]
        assert [entry[key] for entry in pairs] == pytest.approx(means, rel=1e-12)
    assert [entry["learning_rate"] for entry in pairs] == [each[1]["learning_rate"], each[3]["learning_rate"]]


def test_accumulation_equals_the_whole_batch(arguments, tmp_path, monkeypatch):
    # Without dropout, with equally many boxes per image, and without the contrastive loss, whose negatives are those
    # of a micro-batch. Gradients, not weights: Adam turns rounding errors into steps of full length.
    gradients, step = [], torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        )
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    losses = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        run = arguments(
            fields={"dropout": 0.0},
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_grad_norm=1e9,
            aligndet_config={"contrastive_loss_coefficient": 0.0},
            output_dir=str(tmp_path / f"{size}x{parts}"),
        )
        losses.append(pretrain(run).metrics["loss"])
    whole, *others = gradients
    assert whole.norm() > 1
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_a_run_goes_on_with_another_spread_of_the_same_batch(arguments):
    first = arguments(max_steps=4, save_steps=2, per_device_train_batch_size=4)
    stop_after(2, first)
    spread = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert [entry["step"] for entry in log_of(pretrain(arguments(max_steps=4, **spread)))] == [1, 2, 3, 4]


def test_a_run_does_not_go_on_with_another_batch(arguments):
    stop_after(2, arguments(max_steps=4, save_steps=2, per_device_train_batch_size=4))
    with pytest.raises(ValueError, match="images_per_step: 4 there, 2 now"):
        pretrain(arguments(max_steps=4))


def stop_after(step, run):
    """Interrupt a run after a step, as a crash would."""

    class Crash(Exception):
        pass

    update, calls = AlignDetForPreTraining.update_momentum_detector, []

    def crash(model, momentum):
        calls.append(momentum)
        if calls.count(0.0) < len(calls) - step:  # Models that are made copy with a momentum of 0.
            raise Crash
        update(model, momentum)

    AlignDetForPreTraining.update_momentum_detector = crash
    try:
        with pytest.raises(Crash):
            pretrain(run)
    finally:
        AlignDetForPreTraining.update_momentum_detector = update


def test_other_data_is_refused_on_resume(arguments, proposal_folder, tmp_path):
    stop_after(2, arguments(max_steps=4, save_steps=2))
    smaller = datasets.load_from_disk(proposal_folder).select(range(6))
    smaller.save_to_disk(tmp_path / "smaller")
    moved = proposal_folder.rename(proposal_folder.with_name("moved"))
    try:
        (tmp_path / "smaller").rename(proposal_folder)
        with pytest.raises(ValueError, match="images: 8 there, 6 now"):
            pretrain(arguments(max_steps=4))
    finally:
        proposal_folder.rename(tmp_path / "smaller")
        moved.rename(proposal_folder)


def test_a_changed_image_is_other_data(arguments, proposal_folder, tmp_path):
    rows = datasets.load_from_disk(proposal_folder)
    data, run = tmp_path / "data", {"max_steps": 4, "save_steps": 2, "dataset": str(tmp_path / "data")}
    rows.save_to_disk(data)
    stop_after(2, arguments(**run))
    shutil.rmtree(data)
    images = rows["image"][:]
    images[3] = {"path": None, "bytes": images[3]["bytes"] + b"0"}
    column = datasets.Dataset.from_dict({"image": images}, features=rows.select_columns(["image"]).features)
    datasets.concatenate_datasets([column, rows.remove_columns("image")], axis=1).save_to_disk(data)
    with pytest.raises(ValueError, match="of other data .content: "):
        pretrain(arguments(**run))


def test_a_run_is_lengthened(arguments, capsys):
    short = pretrain(arguments(max_steps=2, save_steps=1))
    assert "steps long now" not in capsys.readouterr().out
    record, summary = short.output_dir / "run.json", short.output_dir / "pretrain_summary.json"
    before = record.read_text()
    with pytest.raises(ValueError, match="checkpoint-2 is beyond the 1 steps.*at least --max_steps 2"):
        pretrain(arguments(max_steps=1))
    assert (short.output_dir / "pretrain_summary.json").exists() and before == (
        short.output_dir / "run.json"
    ).read_text()
    longer = pretrain(arguments(max_steps=4))
    told = capsys.readouterr().out
    assert "Resuming from" in told and "The run is 4 steps long now (max_steps: 2 before, 4 now). From step 2" in told
    assert [entry["step"] for entry in log_of(longer)] == [1, 2, 3, 4]
    assert json.loads(summary.read_text())["steps"] == 4
    pretrain(arguments(max_steps=4))
    assert "is finished" in capsys.readouterr().out


def test_a_run_ends_early_and_each_checkpoint_is_a_detector(arguments, tmp_path):
    stop_after(2, arguments(max_steps=4, save_steps=1))
    result = pretrain(arguments(max_steps=2))
    ended = load_file(result.detector_dir / "model.safetensors")
    saved = [
        load_file(f"{find_detector(result.output_dir / f'checkpoint-{step}')}/model.safetensors") for step in (1, 2)
    ]
    assert all(torch.equal(ended[name], saved[1][name]) for name in ended)
    assert not all(torch.equal(ended[name], saved[0][name]) for name in ended)
    assert AutoImageProcessor.from_pretrained(find_detector(result.output_dir / "checkpoint-1"))
    again = pretrain(
        arguments(detector=str(result.output_dir / "checkpoint-1"), output_dir=str(tmp_path / "next"), max_steps=1)
    )
    assert again.detector_dir.is_dir()


def test_a_folder_of_others_is_refused(arguments):
    folder = Path(arguments().output_dir)
    (folder / "checkpoint-2").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds checkpoint-2, but no run.json"):
            pretrain(arguments(overwrite_output_dir=overwrite))


def test_overwriting_starts_anew_and_keeps_what_is_not_its_own(arguments):
    result = pretrain(arguments(max_steps=2))
    (result.output_dir / "notes.txt").touch()
    again = pretrain(arguments(max_steps=1, learning_rate=1e-3, overwrite_output_dir=True))
    assert [entry["step"] for entry in log_of(again)] == [1]
    assert (result.output_dir / "notes.txt").exists() and not (result.output_dir / "checkpoint-2").exists()


def test_the_schedules_reach_the_optimizer_and_the_momentum(arguments, monkeypatch):
    rates, momenta = [], []
    step, update = torch.optim.AdamW.step, AlignDetForPreTraining.update_momentum_detector
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: (rates.append([g["lr"] for g in self.param_groups]), step(self, *a)),
    )
    monkeypatch.setattr(
        AlignDetForPreTraining, "update_momentum_detector", lambda self, m: (momenta.append(m), update(self, m))
    )
    pretrain(
        arguments(
            max_steps=4,
            learning_rate=1e-3,
            lr_scheduler_type="step",
            lr_milestones=[0.75],
            warmup_steps=1,
            decay_norms_and_biases=False,
            aligndet_config={"base_momentum": 0.9, "end_momentum": 1.0},
        )  # fmt: skip
    )
    assert rates == [pytest.approx([rate, rate]) for rate in (5e-4, 1e-3, 1e-3, 1e-4)]
    cosine = [1 - 0.05 * (math.cos(math.pi * k / 4) + 1) for k in range(4)]
    assert momenta == pytest.approx([0.0, *cosine])  # 0: the copy at the start.


def test_norms_and_biases_need_not_decay(arguments):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    (everything,) = pretrain_setup.parameter_groups(model, arguments(weight_decay=0.1))
    assert everything["weight_decay"] == 0.1 and len(everything["params"]) == 3
    decayed, plain = pretrain_setup.parameter_groups(model, arguments(weight_decay=0.1, decay_norms_and_biases=False))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"] + plain["params"]] == [(3, 2), (3,), (3,)]


def test_workers_change_nothing(arguments, tmp_path):
    alone = pretrain(arguments(max_steps=5, proposal_sampling="random"))
    helped = {"dataloader_num_workers": 2, "output_dir": str(tmp_path / "helped")}
    weights = weights_of(pretrain(arguments(max_steps=5, proposal_sampling="random", **helped)))
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(alone).items())


def test_half_precision_trains_float32_weights(arguments):
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # Accelerate keeps the precision of the process's first run.
    try:
        result = pretrain(arguments("rt_detr", bf16=True))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {value.dtype for value in weights_of(result).values()} == {torch.float32, torch.int64}
    assert all(math.isfinite(entry["loss"]) for entry in log_of(result))
    summary = json.loads((result.output_dir / "pretrain_summary.json").read_text())
    assert summary["configuration"]["mixed_precision"] == "bf16"


@pytest.mark.parametrize("use_clusters", [True, None])
def test_clusters_are_classes(arguments, use_clusters):
    """Where the proposals have clusters and nothing else is said, too."""
    result = pretrain(arguments("rt_detr", use_clusters=use_clusters))
    detector = AutoModelForObjectDetection.from_pretrained(result.detector_dir)
    assert detector.config.id2label == {0: "cluster_0", 1: "cluster_1", 2: "cluster_2"}


def test_fewer_queries_than_proposals(arguments, capsys, monkeypatch):
    counts = []
    forward = AlignDetForPreTraining.forward

    def count(model, **batch):
        counts.extend(len(label["boxes"]) for label in batch["labels"])
        return forward(model, **batch)

    monkeypatch.setattr(AlignDetForPreTraining, "forward", count)
    pretrain(arguments(fields={"num_queries": 3}))
    assert counts == [3, 3, 3, 3]
    assert "The detector has 3 queries: at most 3 proposals per image are used." in capsys.readouterr().out


def test_sizes_with_fewer_places_than_queries_are_told_before_any_forward_pass(arguments):
    run = arguments("rt_detr", {"num_queries": 100}, write_report=True)
    with pytest.raises(ValueError, match="image_sizes: the feature maps of 64 pixels have 84 places"):
        pretrain(run)


def test_sizes_that_suit_the_images_are_chosen_once(arguments, capsys):
    given = arguments(image_sizes=None, max_steps=2)
    result = pretrain(given)
    assert "image_sizes 96, since the shorter side of half of the images is at most 64" in capsys.readouterr().out
    assert json.loads((result.output_dir / "run.json").read_text())["data"]["image_sizes"] == [96]
    summary = json.loads((result.output_dir / "pretrain_summary.json").read_text())
    assert summary["arguments"]["image_sizes"] == [96] and given.image_sizes is None
    (result.output_dir / "pretrain_summary.json").unlink()
    assert pretrain(given).metrics == result.metrics and "Resuming from" in capsys.readouterr().out
    assert arguments(image_sizes=None, preset="paper").image_sizes[0] == 640


def test_a_random_backbone_is_trained_and_a_random_frozen_one_refused(arguments, warnings_of):
    config = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    new = {"detector": "detr", "backbone": "resnet10t", "detector_config": config, "max_steps": 1}
    for frozen in ({"freeze_backbone": True}, {"trainable_backbone_stages": 1}):
        with pytest.raises(ValueError, match="what stays frozen of it teaches the detector nothing"):
            pretrain(arguments(**new, aligndet_config=frozen))
    result = pretrain(arguments(**new))
    assert "starts from random numbers, so all of it is trained" in warnings_of.text
    assert "otherwise give --freeze_batch_norm false too" in warnings_of.text
    assert not AutoModelForPreTraining.from_pretrained(result.output_dir).config.freeze_backbone


def test_weights_of_the_backbone_and_a_transfer_are_reported(arguments, tmp_path, capsys, warnings_of):
    config = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    new = {"detector": "detr", "backbone": "resnet10t", "detector_config": config, "max_steps": 1}
    result = pretrain(arguments(**new, backbone_weights=str(tmp_path / "weights.pth")))
    report = json.loads((result.output_dir / "backbone_report.json").read_text())
    assert report["matched"] and not report["missing"] and "tensors matched" in capsys.readouterr().out
    assert "random numbers" not in warnings_of.text

    other = {"detector": str(result.detector_dir), "use_clusters": True, "overwrite_output_dir": True, "max_steps": 1}
    result = pretrain(arguments(**other, output_dir=str(tmp_path / "again")))
    report = json.loads((result.output_dir / "transfer_report.json").read_text())
    assert report["reset"] == ["class_labels_classifier.weight", "class_labels_classifier.bias"]


def poison(monkeypatch, steps):
    """Make the gradients of some forward passes NaN."""
    forward, calls = AlignDetForPreTraining.forward, []

    def poisoned(model, **batch):
        calls.append(None)
        output = forward(model, **batch)
        if len(calls) - 1 in steps:
            output.loss = output.loss * math.nan
        return output

    monkeypatch.setattr(AlignDetForPreTraining, "forward", poisoned)


def test_a_step_with_nan_is_skipped_counted_and_told(arguments, monkeypatch, warnings_of):
    poison(monkeypatch, {1})
    result = pretrain(arguments(max_steps=3))
    assert [entry["skipped_steps"] for entry in log_of(result)] == [0, 1, 1]
    assert all(value.isfinite().all() for value in weights_of(result).values())
    assert "step 2: infinite or NaN gradients, from the images of rows [" in warnings_of.text
    assert json.loads((result.output_dir / "pretrain_summary.json").read_text())["skipped_steps"] == 1


def test_skipped_steps_are_counted_across_an_interruption(arguments, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {0})
        stop_after(2, arguments(max_steps=3, save_steps=2))
    assert [entry["skipped_steps"] for entry in log_of(pretrain(arguments(max_steps=3)))] == [1, 1, 1]


def test_nan_without_end_is_an_error_that_names_step_and_images(arguments, monkeypatch):
    poison(monkeypatch, range(2, 1000))
    seen, views = [], ProposalViews.__getitem__
    monkeypatch.setattr(ProposalViews, "__getitem__", lambda self, key: (seen.append(key.index), views(self, key))[1])
    with pytest.raises(FloatingPointError) as error:
        pretrain(arguments(max_steps=MAX_SKIPPED_STEPS + 10))
    assert f"step {MAX_SKIPPED_STEPS + 2}: " in str(error.value)
    assert f"rows {seen[-2:]}" in str(error.value)


def test_broken_statistics_are_not_saved(arguments, monkeypatch):
    forward = AlignDetForPreTraining.forward

    def break_statistics(model, **batch):
        norm = next(module for module in model.online_detector.modules() if isinstance(module, torch.nn.BatchNorm2d))
        norm.running_mean.fill_(math.inf)
        return forward(model, **batch)

    monkeypatch.setattr(AlignDetForPreTraining, "forward", break_statistics)
    with pytest.raises(FloatingPointError, match="running_mean.*infinite or NaN; nothing was saved"):
        pretrain(arguments("rt_detr"))


def test_collapse_is_reported_once(arguments, monkeypatch, warnings_of):
    forward = AlignDetForPreTraining.forward

    def collapsed(model, **batch):
        output = forward(model, **batch)
        output.metrics["embedding_spread"] = torch.tensor(0.001)
        return output

    monkeypatch.setattr(AlignDetForPreTraining, "forward", collapsed)
    monkeypatch.setattr(pretrain_loop, "SETTLED_STEPS", 2)
    pretrain(arguments(max_steps=3))
    assert warnings_of.text.count("the embeddings of all objects are alike (spread 0.001") == 1


def test_an_unwritable_output_folder_is_found_before_any_work(arguments, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pretrain_module, "load_dataset_source", lambda *args: pytest.fail("loaded data"))
    with pytest.raises(OSError, match="cannot write to the output folder"):
        pretrain(arguments(output_dir=str(tmp_path / "file" / "out")))


def test_no_proposals_column(arguments, proposal_folder, tmp_path):
    datasets.load_from_disk(proposal_folder).remove_columns("proposals").save_to_disk(tmp_path / "bare")
    with pytest.raises(DataError, match="no column 'proposals'.*aligndet proposals"):
        pretrain(arguments(dataset=str(tmp_path / "bare")))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_exactly(arguments, tmp_path, workers):
    run = {"streaming": True, "stream_buffer": 3, "max_steps": 7, "save_steps": 3, "dataloader_num_workers": workers}
    whole = pretrain(arguments(**run, output_dir=str(tmp_path / "whole")))
    assert [entry["epoch"] for entry in log_of(whole)][-1] == 1.0
    stop_after(5, arguments(**run))
    result = pretrain(arguments(**run))
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(result).items())
    assert "images" not in (result.output_dir / "README.md").read_text().split("aligndet pretrain")[1].split("\n")[0]
    if workers:
        with pytest.raises(ValueError, match=r"readers: \[1, 2\] there, \[1, 3\] now"):
            pretrain(arguments(**run | {"dataloader_num_workers": 3}))


def test_a_stream_needs_what_it_cannot_know(arguments, tmp_path):
    with pytest.raises(ValueError, match="needs max_steps"):
        arguments(streaming=True, max_steps=-1)
    with pytest.raises(ValueError, match="streaming is for --method aligndet, this is soco"):
        arguments(streaming=True, method="soco")
    with pytest.raises(ValueError, match="needs num_clusters"):
        arguments(streaming=True, use_clusters=True)
    with pytest.raises(DataError, match="of cluster 2, expected 0 to 1: num_clusters"):
        pretrain(arguments(streaming=True, use_clusters=True, num_clusters=2, max_steps=8))
    proposals = datasets.load_from_disk(arguments().dataset)
    lists = proposals["proposals"][:]
    noise = [entry | {"cluster": [-1] * len(entry["cluster"])} for entry in lists]
    column = datasets.Dataset.from_dict({"proposals": noise}, features=proposals.select_columns("proposals").features)
    noisy = datasets.concatenate_datasets([proposals.remove_columns("proposals"), column], axis=1)
    noisy.save_to_disk(tmp_path / "noisy")
    run = {"streaming": True, "use_clusters": True, "num_clusters": 3, "overwrite_output_dir": True}
    with pytest.raises(DataError, match="of cluster -1, expected 0 to 2"):
        pretrain(arguments(**run, dataset=str(tmp_path / "noisy"), max_steps=8))
    result = pretrain(arguments(**run, max_steps=1))
    detector = AutoModelForObjectDetection.from_pretrained(result.detector_dir)
    assert detector.config.id2label == {0: "cluster_0", 1: "cluster_1", 2: "cluster_2"}


def test_gradient_checkpointing_changes_nothing_but_memory(arguments, tmp_path):
    plain = weights_of(pretrain(arguments(output_dir=str(tmp_path / "plain"))))
    result = pretrain(arguments(gradient_checkpointing=True))
    for name, value in weights_of(result).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_that_a_family_lacks(arguments):
    with pytest.raises(ValueError, match="transformers has none for rt_detr"):
        pretrain(arguments("rt_detr", gradient_checkpointing=True))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_grad_norm": 0}, "max_grad_norm must be positive"),
        ({"aligndet_config": {"contrastive_temperature": "1e-1"}}, "aligndet_config: .* expected .*float.*, got str"),
        ({"aligndet_config": {"contrastive_temperature": 0}}, "contrastive_temperature must be positive, got 0"),
        ({"aligndet_config": {"normalize_class_loss_by": "box"}}, "expected one of .*'boxes'.*, got box"),
        ({"aligndet_config": {"gather_negatives": "false"}}, "expected bool, got str"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be positive"),
        ({"crop_scale": [0.5]}, "crop_scale takes"),
        ({"aligndet_config": {"contrastive_temprature": 1}}, "contrastive_temprature.*contrastive_temperature"),
        ({"aligndet_config": {"detector_config": {}}}, "unknown .'detector_config'"),
    ],
)
def test_arguments_are_checked_at_once(arguments, wrong, message):
    with pytest.raises(ValueError, match=message):
        arguments(**wrong)


def test_sizes_that_a_family_cannot_take(arguments):
    with pytest.raises(ValueError, match=r"rt_detr takes multiples of 32, got \[48, 80\]"):
        pretrain(arguments("rt_detr", image_sizes=[48, 64, 80]))


def test_several_gpus_need_a_launcher(arguments, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="accelerate launch --num_processes 4"):
        pretrain(arguments(use_cpu=False))


def test_trackers(arguments, monkeypatch):
    result = pretrain(arguments(report_to=["tensorboard"], max_steps=1))
    assert list(result.output_dir.rglob("events.out.tfevents*"))


def test_none_is_no_tracker(arguments):
    result = pretrain(arguments(report_to=["none"], max_steps=1))
    assert (result.output_dir / "log.jsonl").exists() and not list(result.output_dir.rglob("events.out.tfevents*"))
