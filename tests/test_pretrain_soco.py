"""`aligndet pretrain --method soco`: the same loop, with SoCo's model, views, momenta and exports."""

import json
import math

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_detectors import SMALL_DETR
from tiny_soco import SMALL, tiny_backbone, tiny_soco
from transformers import AutoModelForObjectDetection, AutoModelForPreTraining
from transformers.models.resnet.modeling_resnet import ResNetBackbone

from aligndet_hf import SoCoConfig, SoCoForPreTraining
from aligndet_hf.commands.pretrain import PretrainArguments, pretrain
from aligndet_hf.data.bit_depth import record_pixel_window
from aligndet_hf.detectors.backbones import get_backbone, tensors_of
from aligndet_hf.training.pretrain_setup import build_optimizer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a tiny backbone of transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    ResNetBackbone(tiny_backbone()).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(proposal_folder, backbone, tmp_path):
    """A function that gives arguments of a short run, with any of them replaced."""

    def make(**kwargs):
        defaults = {
            "method": "soco",
            "dataset": str(proposal_folder),
            "backbone": str(backbone),
            "output_dir": str(tmp_path / "out"),
            "image_sizes": [64, 64, 32],
            "soco_config": SMALL | {"level_sizes": [8, 16, 32, 64]},
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "write_report": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return PretrainArguments(**defaults | kwargs)

    return make


def log_of(result):
    return [json.loads(line) for line in (result.output_dir / "log.jsonl").read_text().splitlines()]


def weights_of(result):
    return load_file(result.output_dir / "model.safetensors")


def test_what_is_written(arguments, capsys):
    result = pretrain(arguments(max_steps=3, save_steps=2, logging_steps=2, write_report=True))
    names = {path.name for path in result.output_dir.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "backbone", "torchvision.safetensors", "log.jsonl",
        "report.html", "run.json",
        "pretrain_summary.json", "backbone_report.json", "checkpoint-2", "checkpoint-3",
    }  # fmt: skip
    assert result.backbone_dir == result.output_dir / "backbone"
    entries = log_of(result)
    assert [entry["step"] for entry in entries] == [2, 3]
    expected = {"loss", "loss_view2", "loss_view3", "learning_rate", "momentum", "embedding_spread", "rank_accuracy"}
    assert expected <= entries[0].keys() and all(map(math.isfinite, entries[0].values()))
    assert entries[0]["loss"] == pytest.approx(entries[0]["loss_view2"] + entries[0]["loss_view3"])
    report = json.loads((result.output_dir / "backbone_report.json").read_text())
    assert report["matched"] and not report["missing"]
    assert f"The backbone is in {result.backbone_dir}. Next: aligndet pretrain" in capsys.readouterr().out
    card = (result.output_dir / "README.md").read_text()
    assert "resnet pre-trained with SoCo on scenes" in card and "2106.02637" in card
    assert "plain `transformers` checkpoint" not in card and str(result.output_dir.parent) not in card


def test_the_log_has_the_momentum_of_the_next_step_and_the_model_follows_it(arguments, monkeypatch):
    momenta, update = [], SoCoForPreTraining.update_momentum_encoder
    monkeypatch.setattr(
        SoCoForPreTraining, "update_momentum_encoder", lambda self, m: (momenta.append(m), update(self, m))
    )
    result = pretrain(arguments(max_steps=3))
    cosine = [1 - 0.005 * (math.cos(math.pi * k / 3) + 1) for k in (1, 2, 3)]
    assert momenta == pytest.approx([0.0, *cosine])  # 0: the copy at the start.
    assert [entry["momentum"] for entry in log_of(result)] == pytest.approx(cosine)


def test_everything_is_trained(arguments, backbone):
    result = pretrain(arguments(max_steps=4, learning_rate=1e-2))
    model = AutoModelForPreTraining.from_pretrained(result.output_dir)
    before = load_file(backbone / "model.safetensors")
    assert all(not torch.equal(value, before[name]) for name, value in model.encoder.backbone.named_parameters())
    exported = load_file(result.backbone_dir / "model.safetensors")
    state = tensors_of(model.encoder.backbone)
    assert exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)
    whole = load_file(result.output_dir / "torchvision.safetensors")
    assert torch.equal(whole["backbone.fpn.inner_blocks.0.0.weight"], model.encoder.neck.inner_blocks[0][0].weight)


def test_the_loss_falls(arguments):
    settings = {"flip_probability": 0.0, "color": False, "max_steps": 40, "learning_rate": 3e-3, "max_grad_norm": 1.0}
    config = SMALL | {"level_sizes": [8, 16, 32, 64], "base_momentum": 0.9}
    entries = log_of(pretrain(arguments(per_device_train_batch_size=4, soco_config=config, **settings)))
    losses = [entry["loss"] for entry in entries]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.5
    assert entries[-1]["embedding_spread"] > 0.2


def stop_after(step, run, monkeypatch):
    """Interrupt a run after a step, as a crash would."""

    class Crash(Exception):
        pass

    update, calls = SoCoForPreTraining.update_momentum_encoder, []

    def crash(model, momentum):
        calls.append(momentum)
        if len(calls) > step + 1:  # The first call is that of the start.
            raise Crash
        update(model, momentum)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(SoCoForPreTraining, "update_momentum_encoder", crash)
        pretrain(run)


@pytest.mark.parametrize("optimizer, decay", [("adamw", 0.0), ("lars", 1e-4)])
def test_an_interrupted_run_ends_with_the_same_weights(arguments, tmp_path, monkeypatch, optimizer, decay):
    settings = {"optimizer": optimizer, "weight_decay": decay, "max_steps": 6, "save_steps": 2}
    whole = pretrain(arguments(**settings, output_dir=str(tmp_path / "whole")))
    stop_after(3, arguments(**settings), monkeypatch)
    resumed = pretrain(arguments(**settings))
    assert [entry["step"] for entry in log_of(resumed)] == [1, 2, 3, 4, 5, 6]
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed).items())


def test_workers_and_micro_batches_change_no_image(arguments, tmp_path):
    alone = pretrain(arguments(max_steps=3))
    helped = pretrain(arguments(max_steps=3, dataloader_num_workers=2, output_dir=str(tmp_path / "helped")))
    expected = weights_of(alone)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(helped).items())


@pytest.mark.parametrize(
    "variant, config, settings",
    [
        ("star", {"level_sizes": [8, 16, 32, 64]}, {"image_sizes": [64, 64, 48, 32]}),
        ("c4", {}, {"image_sizes": [64, 64], "backbone": "test_resnet"}),
    ],
)
def test_the_other_variants_run(arguments, variant, config, settings):
    result = pretrain(arguments(soco_config=SMALL | config | {"variant": variant}, max_steps=1, **settings))
    assert math.isfinite(result.metrics["loss"])
    assert (result.output_dir / "torchvision.safetensors").exists() == (variant != "c4")


def test_straight_into_the_box_domain_stage(arguments, tmp_path):
    soco = pretrain(arguments())
    common = {
        "dataset": arguments().dataset,
        "image_sizes": [64],
        "max_steps": 2,
        "write_report": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    new = {"detector": "detr", "backbone": str(soco.backbone_dir), "detector_config": SMALL_DETR}
    aligned = pretrain(PretrainArguments(**common, **new, output_dir=str(tmp_path / "aligned")))
    report = json.loads((aligned.output_dir / "backbone_report.json").read_text())
    assert not report["missing"] and not report["mismatched"] and not report["unused"]
    detector = AutoModelForObjectDetection.from_pretrained(aligned.detector_dir)
    expected = tensors_of(AutoModelForPreTraining.from_pretrained(soco.output_dir).encoder.backbone)
    state = tensors_of(get_backbone(detector))  # frozen in this stage
    assert state and all(torch.equal(value, expected[name]) for name, value in state.items())


def test_images_with_more_than_8_bits(arguments, proposal_folder, tmp_path):
    dataset = datasets.load_from_disk(proposal_folder)
    record_pixel_window(dataset, (0, 255))
    dataset.save_to_disk(tmp_path / "deep")
    result = pretrain(arguments(dataset=str(tmp_path / "deep"), max_steps=1))
    assert math.isfinite(result.metrics["loss"])


def test_what_is_not_given_depends_on_the_method_and_its_variant():
    base = {"dataset": "data", "output_dir": "out"}
    assert PretrainArguments(**base).image_sizes is None  # the images decide
    assert PretrainArguments(**base, preset="paper").image_sizes == [640, 672, 704, 736, 768, 800]
    assert PretrainArguments(**base).max_proposals == 50 and PretrainArguments(**base).crop_scale is None
    soco = PretrainArguments(**base, method="soco")
    assert (soco.image_sizes, soco.max_proposals, soco.proposal_sampling) == ([224, 224, 112], 4, "random")
    assert soco.crop_scale == [0.5, 1.0]
    star = PretrainArguments(**base, method="soco", soco_config={"variant": "star"}, max_proposals=2)
    assert (star.image_sizes, star.max_proposals) == ([224, 224, 192, 112], 2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"soco_config": {"levels": 3}}, "soco_config: unknown .'levels'.*level_sizes"),
        ({"soco_config": {"backbone_config": {}}}, "unknown .'backbone_config'"),
        ({"method": "aligndet"}, "soco_config is for --method soco, this is aligndet"),
        ({"aligndet_config": {"projection_dim": 8}}, "aligndet_config is for --method aligndet, this is soco"),
        ({"optimizer": "lars", "weight_decay": 0.0}, "weight_decay must be positive"),
    ],
)
def test_arguments_are_checked_at_once(arguments, wrong, message):
    with pytest.raises(ValueError, match=message):
        arguments(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_sizes": [96, 96, 64]}, r"views of 96 pixels can be larger than the last of level_sizes \[8, 16, 32,"),
        ({"image_sizes": [64, 64]}, r"one size for each of the 3 views, .* got \[64, 64\]"),
        ({"soco_config": {"variant": "dc5"}}, "dc5"),
    ],
)
def test_settings_that_cannot_run(arguments, wrong, message):
    with pytest.raises(ValueError, match=message):
        pretrain(arguments(**wrong))


def test_lars_has_a_rate_for_each_layer(arguments):
    """A step by hand: trust 0.001 * |w| / (|g| + decay * |w|) for matrices, the common rate for the rest."""
    model = torch.nn.Linear(3, 2)
    run = arguments(optim="lars", learning_rate=2.0, weight_decay=0.1, decay_norms_and_biases=False)
    optimizer = build_optimizer(model, run)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    model.weight.grad, model.bias.grad = torch.full((2, 3), 0.5), torch.full((2,), 0.25)
    optimizer.step()
    trust = 0.001 * weight.norm() / (model.weight.grad.norm() + 0.1 * weight.norm())
    torch.testing.assert_close(model.bias.detach(), bias - 2 * 0.25)
    torch.testing.assert_close(model.weight.detach(), weight - 2 * trust * (0.5 + 0.1 * weight), rtol=1e-4, atol=1e-6)


def test_defaults_are_those_of_the_paper():
    config = SoCoConfig()
    assert (config.fpn_channels, config.head_dim, config.mlp_dim, config.projection_dim) == (256, 1024, 4096, 256)
    assert (config.base_momentum, config.level_sizes, config.box_sets) == (0.99, [48, 96, 192, 224], (0, 1))
    assert tiny_soco("star").config.box_sets == (0, 1, 0)
