"""
What transformers asks of its own models, asked of ours.

After the common tests of transformers: initialisation, missing and mismatched tensors, saving, outputs, configs.
"""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_detectors import random_batch, tiny_config, tiny_detector
from tiny_soco import batch_for, tiny_soco
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining

from aligndet_hf import AlignDetConfig, AlignDetForPreTraining, SoCoForPreTraining
from aligndet_hf.detectors.families import num_groups

KINDS = ["detr", "rt_detr", "lw_detr", "yolos", "fpn", "c4"]


def fresh(kind: str, seed: int = 0, **config):
    if kind in ("fpn", "c4"):
        return tiny_soco(kind, seed, **config)
    torch.manual_seed(seed)
    return AlignDetForPreTraining(AlignDetConfig(detector_config=tiny_config(kind), **config)).train()


def batch_of(kind: str, model) -> dict:
    if kind in ("fpn", "c4"):
        return batch_for(model)
    batch = random_batch([3, 2])
    return batch | {f"momentum_{name}": value for name, value in random_batch([3, 2], seed=1).items()}


def distant_twins(model) -> list[str]:
    """Tensors of momentum networks that differ from their online twins."""
    state = model.state_dict()
    return [
        name
        for momentum, online in model.momentum_networks.items()
        for name, value in state.items()
        if name.startswith(f"{momentum}.") and not torch.equal(value, state[name.replace(momentum, online, 1)])
    ]


def assert_started(model, new) -> None:
    """Constants are those of a new model, and random values as widely spread."""
    expected = new.state_dict()
    for name, value in model.state_dict().items():
        value, like = value.double(), expected[name].double()
        assert value.isfinite().all(), name
        if like.numel() < 2 or like.std() == 0:
            assert torch.equal(value, like), name
        elif like.numel() >= 64:
            assert value.std() == pytest.approx(like.std().item(), rel=0.35), name


@pytest.fixture(scope="module")
def models():
    return {kind: fresh(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp("saved") / kind for kind in KINDS}
    for kind, folder in folders.items():
        models[kind].save_pretrained(folder)
    return folders


def without(folder, tmp_path, is_lacking):
    """A copy of a checkpoint that lacks some tensors, and their names."""
    tensors = load_file(folder / "model.safetensors")
    lacking = {name for name in tensors if is_lacking(name)}
    save_file(
        {name: value for name, value in tensors.items() if name not in lacking},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path, lacking


# ---- a new model, and what a checkpoint lacks ----


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_networks_of_a_new_model_equal_the_online_ones(kind, models):
    assert distant_twins(models[kind]) == []
    assert not any(
        parameter.requires_grad
        for name in models[kind].momentum_networks
        for parameter in models[kind].get_submodule(name).parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_any_saved_tensor_starts_as_a_new_one(kind, models, tmp_path):
    config = copy.deepcopy(models[kind].config)
    with torch.random.fork_rng():
        loaded = type(models[kind]).from_pretrained(None, config=config, state_dict={})
    assert distant_twins(loaded) == []
    assert_started(loaded, models[kind])


@pytest.mark.parametrize("kind", ["detr", "lw_detr", "fpn"])
def test_what_a_checkpoint_lacks_starts_equal_in_both_networks_and_the_rest_is_kept(kind, models, saved, tmp_path):
    twin, online = list(models[kind].momentum_networks.items())[-1]
    model = copy.deepcopy(models[kind])
    model.save_pretrained(tmp_path / "moved")
    moved = tmp_path / "moved"
    tensors = load_file(moved / "model.safetensors")
    save_file(
        {name: value + (name.startswith(f"{twin}.")) for name, value in tensors.items()},
        moved / "model.safetensors",
        metadata={"format": "pt"},
    )
    for lost in (online, twin):
        (folder := tmp_path / lost).mkdir()
        without(moved, folder, lambda name, lost=lost: name.startswith(f"{lost}.") and name.endswith("0.weight"))
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        lacking = info["missing_keys"]
        assert lacking and all(name.startswith(f"{lost}.") for name in lacking)
        state, before = loaded.state_dict(), load_file(moved / "model.safetensors")
        for name, value in state.items():
            pair = name.replace(twin, online, 1) if name.startswith(f"{twin}.") else None
            if pair in lacking or (pair and name in lacking):
                assert torch.equal(value, state[pair]), name
            elif name not in lacking and name in before:
                assert torch.equal(value, before[name]), name


def test_another_projection_dim_starts_anew_in_both_networks(saved):
    loaded = AlignDetForPreTraining.from_pretrained(saved["detr"], projection_dim=16, ignore_mismatched_sizes=True)
    assert loaded.projector[2].out_features == 16 and distant_twins(loaded) == []
    with pytest.raises(RuntimeError, match="mismatch|size"):
        AlignDetForPreTraining.from_pretrained(saved["detr"], projection_dim=16)


def test_a_backbone_that_thaws_gets_its_momentum_copy(saved):
    """The checkpoint of a frozen backbone has it once."""
    loaded = AlignDetForPreTraining.from_pretrained(saved["detr"], freeze_backbone=False)
    names = [name for name in loaded.state_dict() if name.startswith("momentum_detector.model.backbone.")]
    assert len(names) > 10 and distant_twins(loaded) == []


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_lost_layers_of_a_soco_start_as_new_ones(kind, saved, tmp_path):
    def is_lacking(name):
        return name.startswith("predictor.") or "conv1.weight" in name or name.endswith(("0.0.weight", "running_var"))

    folder, lacking = without(saved[kind], tmp_path, is_lacking)
    junk = [torch.full((256,), float("nan")) for _ in range(200)]  # for the memory that is free next
    del junk
    loaded, info = SoCoForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) >= lacking and len(lacking) > 10
    state, like = loaded.state_dict(), tiny_soco(kind, seed=3).state_dict()
    for name in lacking:
        assert state[name].isfinite().all(), name
        if like[name].numel() >= 64 and like[name].std() > 0:
            assert state[name].std() == pytest.approx(like[name].std().item(), rel=0.35), name


def test_weights_that_were_never_set_can_be_started(models):
    with torch.device("meta"):
        model = SoCoForPreTraining(copy.deepcopy(models["fpn"].config))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.init_weights()
    assert_started(model, models["fpn"])


# ---- wrapped modules ----


class Adapter(nn.Module):
    """What adapters do to a linear layer: it becomes a module of theirs, which shows its weight."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, nn.Linear(base_layer.in_features, 2, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_A(x).sum(-1, keepdim=True)


def with_adapter(detector):
    detector.class_labels_classifier = Adapter(detector.class_labels_classifier)
    return detector


def test_adapters_which_the_momentum_detector_would_never_see_are_refused(models):
    with pytest.raises(ValueError, match=r"other modules than its config makes, such as class_labels.*: merge"):
        AlignDetForPreTraining.from_detector(with_adapter(tiny_detector("detr")))
    model = copy.deepcopy(models["detr"])
    with_adapter(model.online_detector)
    with pytest.raises(ValueError, match=r"class_labels_classifier\.\(Adapter\) holds other .*'lora_A'"):
        model.update_momentum_detector(0.9)


def test_auxiliary_losses_of_a_family_without_heads_are_refused():
    config = AlignDetConfig(detector_config=tiny_config("yolos", auxiliary_loss=True))
    with pytest.raises(ValueError, match="a yolos has heads on its last layer only.*set auxiliary_loss to false"):
        AlignDetForPreTraining(config)


def test_queries_that_the_config_does_not_know_are_not_taken_for_groups():
    model = fresh("detr")
    for detector in (model.online_detector, model.momentum_detector):
        detector.config.num_queries = 10
    with pytest.raises(ValueError, match="makes 20 predictions an image, but its config has 10 queries"):
        model(**batch_of("detr", model))
    assert [num_groups(tiny_config("lw_detr"), predictions) for predictions in (20, 60)] == [1, 3]
    with pytest.raises(ValueError, match="makes 40 predictions an image, but its config has 20 queries in 3 groups"):
        num_groups(tiny_config("lw_detr"), 40)


# ---- outputs ----


@pytest.mark.parametrize("kind", KINDS)
def test_tuples_hold_what_the_output_holds(kind, models):
    model = copy.deepcopy(models[kind]).eval()
    calls = [batch_of(kind, model)]
    if kind not in ("fpn", "c4"):
        calls.append({"pixel_values": calls[0]["pixel_values"]})
    for arguments in calls:
        with torch.no_grad():
            outputs = model(**arguments, return_dict=True)
            in_tuple = model(**arguments, return_dict=False)
            model.config.return_dict = False
            by_config = model(**arguments)
            model.config.return_dict = True
        for other in (in_tuple, by_config):
            assert isinstance(other, tuple) and len(other) == len(outputs.to_tuple())
            torch.testing.assert_close(other, outputs.to_tuple(), rtol=0, atol=0, equal_nan=True)
        assert "hidden_states" not in outputs


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_come_when_they_are_asked_for(kind, models):
    model = copy.deepcopy(models[kind])
    batch = batch_of(kind, model)
    torch.manual_seed(1)
    outputs = model(**batch, output_hidden_states=True)
    model.config.output_hidden_states = True
    torch.manual_seed(1)
    by_config = model(**batch)
    if kind in ("fpn", "c4"):
        sizes = [view.shape[-1] for view in batch["pixel_values"]]
        for view, size, maps in zip(outputs.embeddings, sizes, outputs.hidden_states, strict=True):
            assert len(maps) == (4 if kind == "fpn" else 1) and len(maps[0]) == len(view)
            assert maps[0].shape[-1] == size // (4 if kind == "fpn" else 16)
    else:
        layers = {"yolos": 1}.get(kind, 2)
        assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 20, 32)] * layers
        predicted = model(pixel_values=batch["pixel_values"])
        assert len(predicted.hidden_states) == layers and predicted.loss is None
    assert len(by_config.hidden_states) == len(outputs.hidden_states)


# ---- training, saving, configs ----


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_trained_gets_a_gradient(kind, models):
    model = copy.deepcopy(models[kind])
    model(**batch_of(kind, model)).loss.backward()
    without_gradient = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without_gradient == []


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_changes_nothing_and_the_output_stays(kind, models, saved, tmp_path):
    loaded = AutoModelForPreTraining.from_pretrained(saved[kind])
    loaded.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (saved[kind], tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    model = copy.deepcopy(models[kind]).eval()
    batch = batch_of(kind, model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)


# transformers makes some parameters of an LW-DETR elsewhere.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lw_detr"])
def test_a_model_can_be_made_without_memory(kind, models):
    with torch.device("meta"):
        model = type(models[kind])(copy.deepcopy(models[kind].config))
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_in_another_precision(kind, saved):
    loaded = AutoModelForPreTraining.from_pretrained(saved[kind], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters() if parameter.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["detr", "fpn"])
def test_forward_has_the_usual_signature(kind, models):
    names = list(inspect.signature(models[kind].forward).parameters)
    assert names[0] == models[kind].main_input_name == "pixel_values" and "output_hidden_states" in names
    assert models[kind].get_input_embeddings() is None


@pytest.mark.parametrize("kind", ["detr", "fpn"])
def test_configs_take_what_every_config_takes(kind, models, tmp_path):
    """Common fields, JSON and back, no arguments at all."""
    config = models[kind].config
    fields = {"output_hidden_states": True, "return_dict": False, "id2label": {0: "a", 1: "b"}, "dtype": "bfloat16"}
    network = next(iter(config.sub_configs))
    changed = type(config)(**{network: getattr(config, network)}, **fields)
    changed.save_pretrained(tmp_path)
    back = AutoConfig.from_pretrained(tmp_path)
    assert type(back) is type(config) and back.output_hidden_states and not back.return_dict
    assert back.id2label == {0: "a", 1: "b"} and back.num_labels == 2 and back.dtype == torch.bfloat16
    assert json.loads(back.to_json_string())["model_type"] == config.model_type
    assert back.to_dict() == changed.to_dict() | {"_name_or_path": back._name_or_path}
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert type(config)().to_dict()["model_type"] == config.model_type
