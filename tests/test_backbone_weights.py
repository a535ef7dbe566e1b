"""Weights for backbones: found under any prefix, loaded whole or not at all, with a report."""

import argparse
import json
from dataclasses import asdict

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_backbones import SMALL, TRANSFORMERS, WITH_BACKBONE, has_timm_backbone, randomise
from tiny_detectors import timm_backbone, tiny_config, tiny_detector

from aligndet_hf.detectors.backbone_weights import load_backbone_weights, match_tensors
from aligndet_hf.detectors.backbones import get_backbone
from aligndet_hf.detectors.build import DetectorArguments, build_detector, load_detector
from aligndet_hf.detectors.families import FAMILIES

NAME = "resnet10t"


def network_of(detector) -> torch.nn.Module:
    backbone = get_backbone(detector)
    return getattr(backbone, "_backbone", backbone)


@pytest.fixture(scope="module")
def full() -> dict[str, torch.Tensor]:
    """The tensors of a trained classifier."""
    return randomise(timm.create_model(NAME, num_classes=3)).state_dict()


@pytest.fixture
def detector():
    return build_detector("detr", backbone=NAME, **SMALL["detr"])


def under(prefix: str, tensors: dict, offset: float = 0.0) -> dict:
    return {prefix + name: tensor + offset for name, tensor in tensors.items() if not name.startswith("fc.")}


# What the official code of each method saves, in its essentials. `full + 1` are the weights that must not be taken.
CHECKPOINTS = {
    "timm": lambda full: full,
    "torchvision in a wrapper": lambda full: {"model": under("module.", full) | {"module.fc.bias": full["fc.bias"]}},
    "moco v1 and v2": lambda full: {
        "epoch": 200,
        "arch": NAME,
        "state_dict": under("module.encoder_k.", full, 1)
        | under("module.encoder_q.", full)
        | {"module.encoder_q.fc.0.weight": torch.zeros(2, 2), "module.queue": torch.zeros(2, 8)},
    },
    "moco v3": lambda full: {
        "state_dict": under("module.momentum_encoder.", full, 1)
        | under("module.base_encoder.", full)
        | {"module.predictor.0.weight": torch.zeros(2, 2)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    },
    "swav": lambda full: under("module.", full) | {"module.prototypes.weight": torch.zeros(3, 2)},
    "dino": lambda full: {
        "student": under("module.backbone.", full, 1) | {"module.head.mlp.0.weight": torch.zeros(2, 2)},
        "teacher": under("backbone.", full) | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "args": argparse.Namespace(arch=NAME),
    },
    "soco": lambda full: {
        "opt": argparse.Namespace(arch=NAME),
        "model": under("module.encoder_k.", full, 1)
        | under("module.encoder.", full)
        | {"module.neck.lateral_convs.0.conv.weight": torch.zeros(2, 2, 1, 1)},
    },
}
PREFIXES = {
    "timm": "",
    "torchvision in a wrapper": "model.module.",
    "moco v1 and v2": "state_dict.module.encoder_q.",
    "moco v3": "state_dict.module.base_encoder.",
    "swav": "module.",
    "dino": "teacher.backbone.",
    "soco": "model.module.encoder.",
}


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_self_supervised_checkpoints_are_read_as_their_authors_meant(method, full, detector, tmp_path):
    torch.save(CHECKPOINTS[method](full), tmp_path / "checkpoint.pth")
    report = load_backbone_weights(detector, tmp_path / "checkpoint.pth")
    assert report.prefix == PREFIXES[method]
    state = get_backbone(detector).state_dict()
    assert sorted(report.matched) == sorted(state) and not report.missing and not report.mismatched
    assert all(torch.equal(tensor, full[name]) for name, tensor in state.items())
    outside = {"timm": 2, "torchvision in a wrapper": 1, "moco v1 and v2": 1, "swav": 1}
    assert len(report.unused) == outside.get(method, 0)
    assert json.loads(json.dumps(asdict(report)))["prefix"] == report.prefix
    assert str(report).endswith(
        f"{len(state)} tensors matched, 0 missing, 0 mismatched, {len(report.unused)} unused"
    ) and "\n" not in str(report)


@pytest.mark.parametrize("model_type", filter(has_timm_backbone, sorted(FAMILIES)))
def test_weights_reach_the_network_in_every_family(model_type, full, tmp_path):
    levels = tiny_config(model_type).backbone_config.out_indices
    detector = tiny_detector(model_type, backbone_config=timm_backbone(NAME, tuple(levels)))
    save_file(under("module.encoder_q.", full), tmp_path / "weights.safetensors")
    load_backbone_weights(detector, tmp_path / "weights.safetensors")
    assert all(torch.equal(tensor, full[name]) for name, tensor in network_of(detector).state_dict().items())


@pytest.mark.parametrize("model_type", WITH_BACKBONE)
def test_the_backbone_of_every_family_loads_what_it_saves(model_type, tmp_path):
    source, detector = tiny_detector(model_type), tiny_detector(model_type, seed=1)
    tensors = {f"module.{name}": tensor for name, tensor in get_backbone(source).state_dict().items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    report = load_backbone_weights(detector, tmp_path / "weights.safetensors")
    state = get_backbone(detector).state_dict()
    assert len(report.matched) == len(state) and not report.unused
    assert all(torch.equal(tensor, tensors[f"module.{name}"]) for name, tensor in state.items())


def test_vits_are_found_inside_timms_wrapper(tmp_path):
    vit = timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    torch.save({"teacher": {f"backbone.{name}": t for name, t in vit.state_dict().items()}}, tmp_path / "dino.pth")
    detector = build_detector("detr", backbone="xcit_nano_12_p16_224", **SMALL["detr"])
    report = load_backbone_weights(detector, tmp_path / "dino.pth")
    assert report.prefix == "teacher.backbone."
    for name, tensor in get_backbone(detector).model.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name])


def test_nested_stage_names_of_timm_are_found(tmp_path):
    full = timm.create_model("convnext_atto")  # stages.0.…, where the feature extractor says stages_0.…
    save_file(full.state_dict(), tmp_path / "weights.safetensors")
    detector = build_detector("detr", backbone="convnext_atto", **SMALL["detr"])
    report = load_backbone_weights(detector, tmp_path / "weights.safetensors")
    assert report.unused and all(name.startswith("head.") for name in report.unused)
    assert torch.equal(get_backbone(detector).state_dict()["stem_0.weight"], full.state_dict()["stem.0.weight"])


def test_weights_that_lack_something_are_refused_whole(full, detector, tmp_path):
    before = {name: tensor.clone() for name, tensor in get_backbone(detector).state_dict().items()}
    tensors = under("module.encoder_q.", full)
    tensors["module.encoder_q.layer1.0.convolution1.weight"] = tensors.pop("module.encoder_q.layer1.0.conv1.weight")
    tensors["module.encoder_q.layer2.0.conv1.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError,
        match=r"does not fit backbone 'resnet10t' \(best prefix 'module\.encoder_q\.'\): layer1\.0\.conv1\.weight is "
        r"missing \(closest: module\.encoder_q\.layer1\.0\.convolution1\.weight\); layer2\.0\.conv1\.weight has shape "
        r"\[1\], expected \[128, 64, 3, 3\]",
    ):
        load_backbone_weights(detector, tmp_path / "bad.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_backbone(detector).state_dict().items())


def test_weights_of_another_network_are_refused(detector, tmp_path):
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"conv1\.0\.weight is missing \(closest: encoder\.weight\).* and \d+ more"):
        load_backbone_weights(detector, tmp_path / "other.safetensors")


def test_files_that_are_no_weights_are_one_clear_error(detector, tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("loaded",)

    torch.save({"state_dict": {}, "hook": Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth holds more than tensors.*safetensors"):
        load_backbone_weights(detector, tmp_path / "code.pth")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=name):
            load_backbone_weights(detector, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors not found: expected .* or 'timm'"):
        load_backbone_weights(detector, tmp_path / "none.safetensors")
    with pytest.raises(OSError, match="'someone/trunk' are neither a file nor a folder, and could not be loaded from"):
        load_backbone_weights(detector, "someone/trunk")


def test_weights_that_cannot_be_downloaded_are_one_clear_error(detector, monkeypatch):
    create_model = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise RuntimeError("no connection\nand more")
        return create_model(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"timm's weights of 'resnet10t' could not be loaded \(no connection\). .*FILE"):
        load_backbone_weights(detector, "timm")


def test_timms_own_weights(detector, full, monkeypatch):
    create_model = timm.create_model

    def pretrained_model(*args, pretrained=False, **kwargs):
        network = create_model(*args, **kwargs)
        return randomise(network) if pretrained else network

    monkeypatch.setattr(timm, "create_model", pretrained_model)
    report = load_backbone_weights(detector, "timm")
    assert report.source == "timm" and len(report.matched) == len(get_backbone(detector).state_dict())
    assert torch.equal(get_backbone(detector).state_dict()["bn1.running_var"], full["bn1.running_var"])


@pytest.mark.parametrize("kind", ["swin", "dinov2"])
def test_transformers_weights_for_transformers_backbones(kind, tmp_path):
    source = randomise(TRANSFORMERS[kind]())
    source.save_pretrained(tmp_path / "checkpoint")
    detector = build_detector("detr", backbone=source.config, **SMALL["detr"])
    report = load_backbone_weights(detector, tmp_path / "checkpoint")
    assert all("hidden_states_norms" in name for name in report.missing)
    assert report.unused == (["classifier.bias", "classifier.weight"] if kind == "swin" else [])
    state, tensors = get_backbone(detector).state_dict(), source.state_dict()
    assert len(report.matched) + len(report.missing) == len(state)
    assert all(torch.equal(state[name], tensors[name]) for name in report.matched)
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="neither a file nor a folder with a transformers checkpoint"):
        load_backbone_weights(detector, tmp_path / "checkpoint")


def test_the_report_of_a_commands_backbone_is_returned(full, tmp_path):
    save_file(full, tmp_path / "weights.safetensors")
    arguments = DetectorArguments(
        detector="detr",
        backbone=NAME,
        backbone_weights=str(tmp_path / "weights.safetensors"),
        detector_config=SMALL["detr"],
    )
    detector, report = load_detector(arguments, num_labels=2)
    assert report.source == arguments.backbone_weights and report.unused == ["fc.bias", "fc.weight"]
    assert torch.equal(get_backbone(detector).state_dict()["conv1.0.weight"], full["conv1.0.weight"])


def test_match_tensors_takes_the_network_with_the_most_tensors():
    target = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(2)}
    tensors = {"x.a.weight": torch.ones(1), "y.a.weight": torch.ones(1) * 2, "y.b.weight": torch.ones(2)}
    report, chosen = match_tensors(target, tensors)
    assert report.prefix == "y." and chosen["a.weight"] == 2 and report.matched == ["a.weight", "b.weight"]
    report, chosen = match_tensors(target, {"x.a.weight": torch.ones(3)})
    assert (report.mismatched, report.missing, chosen) == (["a.weight"], ["b.weight"], {})
