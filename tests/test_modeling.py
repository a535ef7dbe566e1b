import copy
import json
import re

import forks
import pytest
import torch
from safetensors.torch import load_file
from tiny_detectors import CONFIGS, CONVNETS, NUM_QUERIES, WITH_QUERIES, random_batch, tiny_config, tiny_detector
from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForPreTraining

from aligndet_hf import AlignDetConfig, AlignDetForPreTraining
from aligndet_hf.convnets.modeling_torchvision import RetinaNetConfig, RetinaNetForObjectDetection
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.detectors.families import FAMILIES, backbone_path, family_of
from aligndet_hf.detectors.transfer import transfer_detector
from aligndet_hf.training.pretrain_aligndet import enable_gradient_checkpointing

# Whose other layers predict no boxes in evaluation mode, see `Family.contrasts` and, for YOLOS, its loss.
LAST_LAYER_ONLY = ["d_fine", "deimv2", "yolos"]


def two_views(counts=(5, 3), seed: int = 0, size: int = 64) -> dict:
    batch, momentum = random_batch(counts, size, seed), random_batch(counts, size, seed)
    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(seed + 100))
    momentum["pixel_values"] = momentum["pixel_values"] + 0.1 * noise
    return batch | {f"momentum_{name}": value for name, value in momentum.items()}


def pretraining_model(model_type: str, **config) -> AlignDetForPreTraining:
    torch.manual_seed(0)
    return AlignDetForPreTraining.from_detector(tiny_detector(model_type), **config).train()


def step(model: AlignDetForPreTraining, momentum: float = 0.9, learning_rate: float = 1e-2) -> set[str]:
    """One signed gradient step; returns the parameters whose gradient is exactly zero."""
    torch.manual_seed(1)
    model(**two_views()).loss.backward()
    still = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad.sign()
                parameter.grad = None
    model.update_momentum_detector(momentum)
    return still


def clone(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("freeze_backbone", [True, False])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_step_moves_what_should_move_and_nothing_else(model_type, freeze_backbone, tmp_path):
    model = pretraining_model(model_type, freeze_backbone=freeze_backbone)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if freeze_backbone:  # A frozen one that is made from a detector takes its steps in test_pretrain.py.
        model.save_pretrained(tmp_path)
        model = AlignDetForPreTraining.from_pretrained(tmp_path).train()
    family = family_of(model.config.detector_config)
    still_by_design = {id(model.online_detector.get_parameter(name)) for name in family.constants}
    if freeze_backbone:
        still_by_design |= {id(parameter) for parameter in model.backbone.parameters()}
    online = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(("online_detector.", "projector.")) and id(parameter) not in still_by_design
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained == online

    with torch.no_grad():  # away from the initial zeros, behind which some heads get no gradient at first
        for parameter in model.online_detector.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        for buffer in model.backbone.buffers():  # timm starts the last norm of every block at zero
            buffer.clamp_(min=0.5)
    before = clone(model)
    still = step(model)
    # DETR's first decoder layer attends among equal queries: which ones it looks at makes no difference. Proposals
    # have no masks.
    assert all("decoder.layers.0.self_attn" in name or "roi_heads.mask" in name for name in still), still
    after = model.state_dict()
    parameters = dict(model.named_parameters())
    for name in online:
        twin = "momentum_" + name.removeprefix("online_")
        assert torch.equal(after[name], before[name]) == (name in still), name
        if any(part in name for part in family.query_embeddings):
            assert torch.equal(after[twin], after[name])
        else:
            torch.testing.assert_close(after[twin], torch.lerp(before[twin], after[name], 0.1))
    for name, parameter in parameters.items():
        if id(parameter) in still_by_design:
            assert torch.equal(after[name], before[name]), name
    if freeze_backbone:
        path = f"online_detector.{backbone_path(model.online_detector)}."
        buffers = [name for name in after if name not in parameters and name.startswith(path)]
        assert all(torch.equal(after[name], before[name]) for name in buffers)
    # The momentum detector never gets gradients and stays in evaluation mode, as a frozen backbone does.
    assert all(p.grad is None for p in (*model.momentum_detector.parameters(), *model.momentum_projector.parameters()))
    assert not any(module.training for module in model.momentum_detector.modules())
    if freeze_backbone and backbone_path(model.online_detector):
        assert not any(module.training for module in model.backbone.modules())
    assert model.online_detector.training and model.projector.training


@pytest.mark.parametrize("model_type", CONFIGS)
def test_images_may_have_their_channels_last_in_memory(model_type):
    """As the collator lays them out."""
    model, losses = pretraining_model(model_type).eval(), []  # dropout depends on the layout
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = two_views()
        for name in ("pixel_values", "momentum_pixel_values"):
            batch[name] = batch[name].contiguous(memory_format=layout)
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert model.train()(**batch).loss.isfinite()


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name != "yolos"])  # which is one network
def test_frozen_backbone_exists_once_in_memory_and_in_the_file(model_type, tmp_path):
    model = pretraining_model(model_type)
    own = pretraining_model(model_type, freeze_backbone=False)
    backbone_size = sum(p.numel() for p in model.backbone.parameters())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, own)]
    assert sizes[1] - sizes[0] == backbone_size > 0
    model.save_pretrained(tmp_path)
    path = backbone_path(model.online_detector)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if f"momentum_detector.{path}." in name]
    duplicate = copy.deepcopy(model)
    assert duplicate.momentum_detector.get_submodule(path)._owner[0] is duplicate.backbone


@pytest.mark.parametrize("model_type", CONFIGS)
def test_save_and_load_are_bit_equal(model_type, tmp_path):
    model = pretraining_model(model_type)
    step(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(loaded, AlignDetForPreTraining)
    tensors, expected = loaded.state_dict(), model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    torch.manual_seed(1)
    expected = model(**two_views()).loss
    torch.manual_seed(1)
    assert torch.equal(loaded.train()(**two_views()).loss, expected)


@pytest.fixture(scope="module")
def plain_process(tmp_path_factory):
    """What a process without this package makes of the exports of all families: "" or what is wrong, by name."""
    folder = tmp_path_factory.mktemp("exports")
    for model_type in CONFIGS:
        path = folder / model_type
        model = pretraining_model(model_type)
        step(model)
        model.export_detector(path, build_image_processor(model.online_detector, 64))
        pixels = random_batch()["pixel_values"]
        with torch.no_grad():
            expected = model.eval().online_detector(pixel_values=pixels)
        torch.save({"pixels": pixels, "logits": expected.logits, "boxes": expected.pred_boxes}, path / "expected.pt")
    script = """
import json, pathlib, sys, numpy as np, torch
from PIL import Image
from transformers import AutoModelForObjectDetection, pipeline
def check(folder):
    options = {"trust_remote_code": folder.name.startswith("torchvision")}  # which is not in transformers
    detector, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    case = torch.load(folder / "expected.pt", weights_only=True)
    with torch.no_grad():
        outputs = detector.eval()(pixel_values=case["pixels"])
    assert torch.equal(outputs.logits, case["logits"]), "logits"
    assert torch.equal(outputs.pred_boxes, case["boxes"]), "boxes"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))
    found = pipeline("object-detection", model=str(folder), threshold=0.0, **options)(image)
    assert found and set(found[0]) == {"score", "label", "box"}, found[:1]
results = {}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    try:
        check(folder)
        results[folder.name] = ""
    except Exception as error:
        results[folder.name] = repr(error)
pathlib.Path(sys.argv[1], "results.json").write_text(json.dumps(results))
"""
    forks.run_alone(script, folder, folder=tmp_path_factory.mktemp("alone"))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_export_is_a_plain_detector_for_a_process_without_this_package(plain_process, model_type):
    assert plain_process[model_type] == ""


@pytest.mark.parametrize("model_type", WITH_QUERIES)
def test_contrast_runs_over_all_decoder_layers_without_denoising_queries(model_type, monkeypatch):
    seen = {}

    def record(online, momentum, online_ids, momentum_ids, temperature, num_anchors, max_rows_per_id):
        assert num_anchors == (online_ids >= 0).sum()
        seen.update(online=online, momentum=momentum, online_ids=online_ids, momentum_ids=momentum_ids)
        return online.sum() * 0

    monkeypatch.setattr("aligndet_hf.models.modeling_aligndet.object_contrastive_loss", record)
    model = pretraining_model(model_type)
    model(**two_views())
    layers = 1 if model_type in LAST_LAYER_ONLY else 2
    assert seen["online"].shape == seen["momentum"].shape == (layers * 2 * NUM_QUERIES, 256)
    for ids in (seen["online_ids"], seen["momentum_ids"]):
        per_layer = ids.view(layers, 2, NUM_QUERIES)
        for layer in per_layer:  # every proposal once a layer, in its own image
            assert sorted(layer[0][layer[0] >= 0].tolist()) == [0, 1, 2, 3, 4]
            assert sorted(layer[1][layer[1] >= 0].tolist()) == [5, 6, 7]


@pytest.mark.parametrize("model_type", WITH_QUERIES)
def test_contrasted_features_are_what_the_class_heads_see(model_type):
    """Each layer's features, put through the class head, give the logits that the detector hands to its loss."""
    detector = tiny_detector(model_type).eval()
    family = family_of(detector.config)
    handed = {}

    def record(logits, labels, device, boxes, config, outputs_class=None, *args, **kwargs):
        handed["class"] = logits[None] if outputs_class is None else outputs_class.movedim(family.layer_dim, 0)
        handed["last"] = logits
        return logits.sum(), {}, None

    detector.loss_function = record
    with torch.no_grad():
        outputs = detector(**random_batch(), output_hidden_states=True)
        features = family.object_rows(detector, outputs, None).features.view(
            -1, 2, NUM_QUERIES, family.width(detector.config)
        )
        heads = class_heads(detector, model_type)[-len(features) :]
        logits = [head(feature) for head, feature in zip(heads, features, strict=True)]
        if model_type in ("d_fine", "deimv2"):  # which add the quality of the box's edges to the scores
            decoder = detector.model.decoder
            logits = [decoder.lqe_layers[-1](logits[0], outputs.intermediate_predicted_corners[:, -1])]
    assert len(logits) == (1 if model_type in LAST_LAYER_ONLY else 2)
    torch.testing.assert_close(logits[0], handed["class"][0 if len(logits) > 1 else -1])
    torch.testing.assert_close(logits[-1], handed["last"])


@pytest.mark.parametrize("model_type", CONVNETS)
def test_convnets_contrast_rows_of_both_views_each_slot_with_its_projector(model_type, monkeypatch):
    seen = {}

    def record(online, momentum, online_ids, momentum_ids, temperature):
        seen.update(online=online, momentum=momentum, online_ids=online_ids, momentum_ids=momentum_ids)
        return online.sum() * 0

    monkeypatch.setattr("aligndet_hf.models.modeling_aligndet.object_contrastive_loss", record)
    model = pretraining_model(model_type)
    family, config = family_of(model.config.detector_config), model.config.detector_config
    slots = family.slots(config)
    assert slots == (9 if model_type == "torchvision_retinanet" else 1)
    views = two_views()
    model(**views)
    for view in ("online", "momentum"):
        ids = seen[f"{view}_ids"]
        assert seen[view].shape == (len(ids), 256)
        assert set(ids.tolist()) <= set(range(-1, 8)) and len(set(ids.tolist())) > 2
        if "rcnn" in model_type.replace("_", ""):  # the boxes themselves are among the regions
            assert set(range(8)) <= set(ids.tolist())
    # By hand: each row through the part of the last layer that belongs to its slot.
    labels = views["labels"]
    torch.manual_seed(0)
    outputs = model.online_detector(views["pixel_values"], views["pixel_mask"], labels, output_hidden_states=True)
    rows = family.object_rows(model.online_detector, outputs, labels)
    assert torch.equal(rows.ids, seen["online_ids"])
    hidden = model.projector[1](model.projector[0](rows.features))
    weight, bias = model.projector[2].weight.view(slots, 256, -1), model.projector[2].bias.view(slots, 256)
    expected = (weight[rows.slots] @ hidden[..., None])[..., 0] + bias[rows.slots]
    torch.testing.assert_close(seen["online"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["detr", "rt_detr", "torchvision_fcos"])
def test_of_the_detection_loss_all_counts_or_the_boxes_or_nothing(model_type):
    losses, terms = {}, {}
    for part in ("all", "boxes", "none"):
        model = pretraining_model(model_type, detection_loss=part).eval()
        torch.manual_seed(1)
        outputs = model(**two_views())
        losses[part], terms[part] = outputs.loss, outputs.loss_dict
        outputs.loss.backward()
        reached = {name for name, p in model.online_detector.named_parameters() if p.grad is not None and p.grad.any()}
        is_class_head = re.compile(family_of(model.config.detector_config).class_heads).match
        assert any(map(is_class_head, reached)) == (part == "all")
    assert losses["none"] == terms["none"]["loss_contrastive"]
    assert losses["none"] < losses["boxes"] < losses["all"]


def class_heads(detector, model_type):
    """Its class head after each of the two layers."""
    if hasattr(detector, "class_labels_classifier"):
        return [detector.class_labels_classifier] * 2
    if model_type == "rt_detr":
        return detector.model.decoder.class_embed
    heads = detector.class_embed
    return heads[:2] if isinstance(heads, torch.nn.ModuleList) else [heads] * 2


@pytest.mark.parametrize("model_type", CONFIGS)
def test_images_without_proposals_train(model_type):
    # The official code fails on an empty image unless it is the last of several.
    model = pretraining_model(model_type)
    for counts in ([0, 4], [0, 0], [4]):
        # A single image has to be larger: Deformable DETR's group norm needs more than one position a channel.
        outputs = model(**two_views(counts, size=128 if len(counts) == 1 else 64))
        outputs.loss.backward()
        assert outputs.loss.isfinite(), counts
        assert (outputs.loss_dict["loss_contrastive"] == 0) == (sum(counts) == 0), counts


def test_a_proposal_missing_in_one_view_shifts_no_other():
    model = pretraining_model("detr").eval()
    batch = two_views((5, 3))
    for name in ("labels", "momentum_labels"):
        batch[name] = [dict(label) for label in batch[name]]
    dropped = {key: value[1:] for key, value in batch["momentum_labels"][0].items()}
    batch["momentum_labels"][0] = dropped
    batch["momentum_pixel_values"] = batch["pixel_values"]
    assert model(**batch).metrics["matched_proposals"] == 1
    # Both views are the same image: every pair that is left is paired with itself.
    torch.testing.assert_close(model(**batch).metrics["positive_similarity"], torch.tensor(1.0))


def test_loss_is_detection_plus_weighted_contrast():
    batch = two_views()
    outputs = [pretraining_model("detr", contrastive_loss_coefficient=c).eval()(**batch) for c in (0.0, 2.0)]
    contrast = outputs[1].loss_dict["loss_contrastive"]
    assert contrast > 0
    torch.testing.assert_close(outputs[1].loss - outputs[0].loss, 2 * contrast)


def test_official_class_normaliser_is_queries_over_boxes_larger():
    batch = two_views((5, 5))
    terms = [
        pretraining_model("detr", normalize_class_loss_by=rule).eval()(**batch).loss_dict["loss_ce"]
        for rule in ("weights", "boxes")
    ]
    weights = 10 + 0.1 * (2 * NUM_QUERIES - 10)
    torch.testing.assert_close(terms[1], terms[0] * weights / 10)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_bfloat16_autocast_trains(model_type):
    model = pretraining_model(model_type)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**two_views())
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and outputs.loss.isfinite()


def test_one_view_alone_is_refused_and_no_labels_mean_prediction():
    model = pretraining_model("detr")
    with pytest.raises(ValueError, match="two views"):
        model(**random_batch())
    batch = random_batch()
    for change, message in (
        (lambda labels: labels[:1], "labels must be a list with a dict for each of the 2 images, got 1"),
        (lambda labels: labels[0], "labels must be a list with a dict for each of the 2 images, got one dict"),
        (lambda labels: [{}, labels[1]], r"labels\[0\] must have boxes, .*, boxes is missing"),
        (
            lambda labels: [labels[0], labels[1] | {"proposal_ids": torch.zeros(0)}],
            r"labels\[1\] must have as many of each, got \d boxes, \d class_labels, 0 proposal_ids",
        ),
    ):
        labels = [label | {"proposal_ids": torch.arange(len(label["boxes"]))} for label in batch["labels"]]
        for view in ("labels", "momentum_labels"):
            both = {"labels": labels, "momentum_labels": labels} | {view: change(labels)}
            with pytest.raises(ValueError, match=f"^{'momentum_' if view != 'labels' else ''}{message}"):
                model(**batch | {"momentum_pixel_values": batch["pixel_values"]} | both)
    with pytest.raises(ValueError, match="no config field projection_dims; did you mean 'projection_dim'"):
        AlignDetForPreTraining.from_detector(model.online_detector, projection_dims=3)
    outputs = model(pixel_values=random_batch()["pixel_values"])
    assert outputs.loss is None and outputs.logits.shape == (2, NUM_QUERIES, 4)


def test_config_nests_any_detector_config_and_survives_a_round_trip(tmp_path):
    config = AlignDetConfig(detector_config=tiny_config("rt_detr"), projection_dim=64, base_momentum=0.99)
    config.save_pretrained(tmp_path)
    loaded = AlignDetConfig.from_pretrained(tmp_path)
    assert loaded.detector_config.model_type == "rt_detr" and loaded.detector_config.num_queries == NUM_QUERIES
    assert (loaded.projection_dim, loaded.base_momentum) == (64, 0.99)
    assert AlignDetConfig().detector_config.model_type == "detr"


def test_from_detector_takes_a_folder(tmp_path):
    detector = tiny_detector("detr")
    detector.save_pretrained(tmp_path)
    model = AlignDetForPreTraining.from_detector(tmp_path)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(model.online_detector.state_dict()[name], tensor)
    assert isinstance(AutoModelForObjectDetection.from_pretrained(tmp_path), type(model.online_detector))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(model_type):
    found = {}
    for checkpointing in (False, True):
        model = pretraining_model(model_type)
        if checkpointing:
            try:
                enable_gradient_checkpointing(model)
            except ValueError as error:
                assert "transformers has none" in str(error)
                assert model_type in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2") or model_type in CONVNETS
                return
        torch.manual_seed(1)
        model(**two_views()).loss.backward()
        found[checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(
        module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
    )
    assert found[False].keys() == found[True].keys()
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-4, atol=1e-6)


class FifthConfig(RetinaNetConfig):
    model_type = "torchvision_fifth"


class FifthForObjectDetection(RetinaNetForObjectDetection):
    config_class = FifthConfig


def test_a_fifth_convnet_costs_one_row_and_one_config(monkeypatch, tmp_path):
    """Pre-training, export, new classes and fine-tuning of a family that nothing but its row knows."""
    AutoConfig.register("torchvision_fifth", FifthConfig)
    AutoModelForObjectDetection.register(FifthConfig, FifthForObjectDetection)
    monkeypatch.setitem(FAMILIES, "torchvision_fifth", FAMILIES["torchvision_retinanet"])
    fields = tiny_config("torchvision_retinanet").to_dict()
    del fields["model_type"]
    monkeypatch.setitem(CONFIGS, "torchvision_fifth", lambda **changes: FifthConfig(**fields | changes))

    model = pretraining_model("torchvision_fifth", freeze_backbone=True)
    before = clone(model)
    step(model)
    assert not torch.equal(before["projector.0.weight"], model.projector[0].weight)
    processor = build_image_processor(model.online_detector, 64)
    model.export_detector(tmp_path / "detector", processor)

    detector, report = transfer_detector(tmp_path / "detector", 2, {0: "a", 1: "b"})
    assert type(detector) is FifthForObjectDetection and detector.config.num_labels == 2
    assert not report.mismatched and any("cls_logits" in name for name in report.reset)
    loss = detector.train()(**random_batch(num_labels=2)).loss
    loss.backward()
    assert loss.isfinite()
