"""SoCo's model: what it computes, what moves, what is saved, and who can load it."""

import copy
import json
import re

import golden_cases
import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from test_backbones import SMALL as SMALL_DETECTORS
from test_backbones import TRANSFORMERS, has_timm_backbone, randomise
from tiny_detectors import tiny_config
from tiny_soco import batch_for, tiny_soco
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForPreTraining

from aligndet_hf import SoCoConfig, SoCoForPreTraining
from aligndet_hf.detectors.backbone_weights import load_backbone_weights
from aligndet_hf.detectors.backbones import (
    build_backbone_config,
    get_backbone,
    image_statistics,
    split_network,
    tensors_of,
)
from aligndet_hf.detectors.build import DetectorArguments, build_detector, load_detector
from aligndet_hf.detectors.families import FAMILIES
from aligndet_hf.detectors.torchvision_weights import load_torchvision_weights
from aligndet_hf.losses import box_similarity_loss
from aligndet_hf.momentum import cosine_momentum

VARIANTS = ("fpn", "star", "c4")


# ---- what it computes ----


def test_the_momentum_schedule_is_the_official_one():
    _, case = golden_cases.load("e20_soco_momentum")
    for key, base in (("m_K10", 0.99), ("m_K1000", 0.99), ("m_K10_base0996", 0.996), ("m_K1000_star", 0.99)):
        total = len(case[key])
        values = torch.tensor([cosine_momentum(k, total, base) for k in range(total)], dtype=torch.float64)
        torch.testing.assert_close(values, case[key], rtol=0, atol=1e-9)
    resumed = [cosine_momentum(k, 10, SoCoConfig().base_momentum) for k in range(4, 10)]
    torch.testing.assert_close(torch.tensor(resumed, dtype=torch.float64), case["m_K10_from_k4"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_the_pairs_in_both_directions(variant):
    model = tiny_soco(variant).eval()
    torch.manual_seed(1)
    for parameter in model.momentum_encoder.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    batch = batch_for(model)
    views = list(zip(batch["pixel_values"], batch["boxes"], batch["levels"], strict=True))
    with torch.no_grad():
        q = [model.predictor(model.encoder(*view).flatten(0, 1)).view(2, -1, 8) for view in views]
        k = [model.momentum_encoder(*view) for view in views]
        outputs = model(**batch)
    same = torch.eye(3).expand(2, 3, 3)
    first = {"fpn": [0, 1], "star": [0, 1, 0], "c4": [0]}[variant]
    for view, index in enumerate(first, start=1):
        rows = slice(3 * index, 3 * index + 3)
        expected = box_similarity_loss(q[0][:, rows], k[view], same) + box_similarity_loss(
            q[view], k[0][:, rows], same
        )
        torch.testing.assert_close(outputs.loss_dict[f"loss_view{view + 1}"], expected)
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    assert [tuple(embedding.shape) for embedding in outputs.embeddings] == [tuple(value.shape) for value in q]


def test_boxes_are_pooled_from_their_own_level_and_in_their_order():
    encoder = tiny_soco().eval().encoder
    batch = batch_for(tiny_soco(), count=6)
    image, boxes, levels = batch["pixel_values"][1], batch["boxes"][1], torch.arange(12).view(2, 6) * 7 % 4
    together = encoder(image, boxes, levels)
    for row in range(2):
        for box in range(6):
            alone = encoder(
                image[row : row + 1], boxes[row : row + 1, box : box + 1], levels[row : row + 1, box : box + 1]
            )
            torch.testing.assert_close(alone[0, 0], together[row, box], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encoder(image, boxes, (levels + 1) % 4), together, atol=1e-3)


def test_boxes_without_a_level_or_a_partner_count_for_nothing():
    model = tiny_soco("c4")
    batch = batch_for(model)
    nothing = copy.deepcopy(batch)
    nothing["ids"][1] = nothing["ids"][1] + 100
    outputs = model(**nothing)
    assert outputs.loss.item() == 0 and outputs.metrics["positive_similarity"].isnan()
    outputs.loss.backward()  # still a graph, for the processes that have a loss
    model = tiny_soco("fpn").eval()
    batch = batch_for(model)
    batch["levels"][1][:, 0] = -1
    moved = copy.deepcopy(batch)
    moved["boxes"][1][:, 0] = torch.tensor([0.0, 0.0, 0.1, 0.1])
    with torch.no_grad():
        torch.testing.assert_close(model(**moved).loss, model(**batch).loss)


def test_copies_of_a_box_correspond_to_all_copies_in_the_other_view():
    model = tiny_soco("c4").eval()
    batch = batch_for(model, images=1)
    batch["ids"] = [torch.tensor([[1, 1, 2]]), torch.tensor([[1, 2, 2]])]
    with torch.no_grad():
        outputs = model(**batch)
        views = list(zip(batch["pixel_values"], batch["boxes"], batch["levels"], strict=True))
        k = [model.momentum_encoder(*view) for view in views]
    pairs = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 1]]])
    expected = box_similarity_loss(outputs.embeddings[0], k[1], pairs)
    expected = expected + box_similarity_loss(outputs.embeddings[1], k[0], pairs.mT)
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("views, boxes", [(2, 3), (3, 2)])
def test_other_views_than_those_of_the_variant_are_refused(views, boxes):
    model = tiny_soco("fpn")
    batch = {name: values[:views] for name, values in batch_for(model).items()}
    batch["boxes"][0] = batch["boxes"][0][:, : 2 * boxes]
    with pytest.raises(ValueError, match="variant 'fpn' takes 3 views, and in the first the boxes of 2 others; got"):
        model(**batch)


# ---- what moves ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_moves_everything_but_the_momentum_encoder(variant):
    model = randomise(tiny_soco(variant)).train()  # timm starts some norms at zero: what is before learns later
    before = copy.deepcopy(model.state_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    model(**batch_for(model, images=4, count=8)).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith("momentum_encoder.")}
    model.update_momentum_encoder(0.75)
    for name, value in model.momentum_encoder.named_parameters():
        old, online = before[f"momentum_encoder.{name}"], model.encoder.get_parameter(name)
        torch.testing.assert_close(value.data, 0.75 * old + 0.25 * online.data)
        assert not value.requires_grad


def test_the_update_after_a_step_is_the_official_one_within_the_next():
    """The official order: queries, update with m_k, keys, optimizer step; ours: step, then update with m_{k+1}."""
    official, ours = tiny_soco(), tiny_soco()
    total, losses = 4, {"official": [], "ours": []}
    for name, model in (("official", official), ("ours", ours)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)
        for step in range(total):
            if name == "official":
                model.update_momentum_encoder(cosine_momentum(step, total, 0.9))
            loss = model(**batch_for(model, seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if name == "ours":
                model.update_momentum_encoder(cosine_momentum(step + 1, total, 0.9))
            losses[name].append(loss.item())
    assert losses["official"] == losses["ours"]
    pairs = zip(official.named_parameters(), ours.named_parameters(), strict=True)
    assert all(torch.equal(value, same) for (_, value), (_, same) in pairs)


def test_the_momentum_encoder_has_the_statistics_of_its_own_batches():
    model = tiny_soco("c4")
    norm = model.momentum_encoder.projector[1]
    model(**batch_for(model))
    assert norm.num_batches_tracked == 2 and not torch.equal(norm.running_mean, torch.zeros(16))


def test_the_loss_falls_and_the_embeddings_stay_apart():
    model = tiny_soco("fpn", base_momentum=0.9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    batch, losses = batch_for(model, images=4, count=3), []
    for _ in range(25):
        outputs = model(**batch)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        model.update_momentum_encoder(0.9)
        losses.append(outputs.loss.item())
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 1 and outputs.metrics["embedding_spread"] > 0.3


# ---- what is saved ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_are_bit_equal(variant, tmp_path):
    model = randomise(tiny_soco(variant))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert isinstance(loaded, SoCoForPreTraining)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.momentum_encoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.encoder.parameters())
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SoCoConfig)
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    batch = batch_for(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).loss, model.eval()(**batch).loss)


def test_a_new_model_keeps_the_weights_that_its_parts_start_with():
    model = tiny_soco("c4")
    expected = timm.create_model("resnet10t", features_only=True).layer1[0].conv1.weight.std().item()
    assert model.encoder.backbone._backbone.layer1[0].conv1.weight.std().item() == pytest.approx(expected, rel=0.1)
    convolution = tiny_soco("fpn").encoder.head[0][0].weight
    assert convolution.std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.1)  # He et al., 2015


def test_impossible_configs_are_refused():
    with pytest.raises(StrictDataclassError, match=r"expected one of \('fpn', 'star', 'c4'\), got dc5"):
        SoCoConfig(variant="dc5")
    with pytest.raises(ValueError, match=r"level_sizes must ascend, got \[96"):
        SoCoConfig(level_sizes=[96, 48, 192, 224])


def test_backbones_that_do_not_fit_the_variant_are_refused():
    with pytest.raises(ValueError, match=r"4 feature maps, but there are 3 level_sizes: \[48, 96, 192\]"):
        tiny_soco("fpn", level_sizes=[48, 96, 192])
    with pytest.raises(ValueError, match="cannot be divided before its last stage: take a ResNet"):
        tiny_soco("c4", backbone_config=build_backbone_config("mobilenetv2_035", (16, 32))[0])


def test_a_network_is_divided_after_its_first_feature_map():
    backbone = tiny_soco("c4").eval().encoder.backbone
    trunk, last = split_network(backbone)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        c4, c5 = backbone(image).feature_maps
        assert torch.equal(trunk(image), c4) and torch.equal(last(trunk(image)), c5)
    assert backbone._backbone.layer4 in list(last) and len(list(last)) == 1


# ---- who can load it ----


def timm_soco(variant: str = "fpn", name: str = "resnet10t") -> SoCoForPreTraining:
    strides = (16, 32) if variant == "c4" else (4, 8, 16, 32)
    config, _, _ = build_backbone_config(name, strides, freeze_batch_norm=False)
    return randomise(tiny_soco(variant, backbone_config=config))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A SoCo around the backbone of the tiny detectors, its folder, and the folder of its backbone."""
    model, folder = timm_soco(), tmp_path_factory.mktemp("soco")
    model.save_pretrained(folder)
    model.export_backbone(folder / "backbone", [0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    return model, folder


@pytest.mark.parametrize("model_type", filter(has_timm_backbone, sorted(FAMILIES)))
@pytest.mark.parametrize("part", ["backbone", ""])
def test_every_family_takes_the_whole_backbone(model_type, part, exported):
    model, folder = exported
    config = tiny_config(model_type)
    config.backbone_config.backbone = "resnet10t"
    detector = AutoModelForObjectDetection.from_config(config)
    report = load_backbone_weights(detector, folder / part)
    assert not report.missing and not report.mismatched
    expected = tensors_of(model.encoder.backbone)
    state = tensors_of(get_backbone(detector))
    assert state and all(torch.equal(value, expected[name]) for name, value in state.items())


def test_the_folder_of_the_backbone_is_a_backbone_of_its_own(exported):
    model, folder = exported
    detector = build_detector("detr", backbone=str(folder / "backbone"), **SMALL_DETECTORS["detr"])
    expected = tensors_of(model.encoder.backbone)
    assert all(torch.equal(value, expected[name]) for name, value in tensors_of(get_backbone(detector)).items())
    assert image_statistics(detector.config) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert "_name_or_path" not in json.loads((folder / "backbone" / "config.json").read_text())
    names = timm.create_model("resnet10t", features_only=True).state_dict().keys()
    assert load_file(folder / "backbone" / "model.safetensors").keys() == names


@pytest.mark.parametrize("kind", ["resnet", "swin", "pvt_v2", "mobilenetv2_035", "convnext_atto"])
def test_other_backbones_go_the_same_way(kind, tmp_path):
    source = TRANSFORMERS[kind]().config if kind in TRANSFORMERS else kind
    config, _, _ = build_backbone_config(source, (4, 8, 16, 32), freeze_batch_norm=False)
    model = tiny_soco("fpn", backbone_config=config)
    model(**batch_for(model)).loss.backward()
    idle = [name for name, parameter in model.encoder.backbone.named_parameters() if parameter.grad is None]
    assert not [name for name in idle if "layernorm" not in name.lower()], idle  # transformers' Swin has one to spare
    randomise(model).export_backbone(tmp_path, [0.5] * 3, [0.5] * 3)
    detector = build_detector("detr", backbone=str(tmp_path), **SMALL_DETECTORS["detr"])
    expected = tensors_of(model.encoder.backbone)
    state = tensors_of(get_backbone(detector))
    assert state and all(torch.equal(value, expected[name]) for name, value in state.items())


def faster_rcnn(norm=torch.nn.BatchNorm2d, trunk=resnet18) -> FasterRCNN:
    """torchvision's second Faster R-CNN, small: norms in the pyramid, four convolutions in the box head."""
    layers = {f"layer{stage}": str(stage) for stage in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(trunk(), layers, [64, 128, 256, 512], 8, norm_layer=norm)
    head = FastRCNNConvFCHead((8, 7, 7), [8] * 4, [16], norm_layer=norm)
    return FasterRCNN(
        backbone,
        box_head=head,
        box_predictor=torch.nn.Linear(16, 3),
        num_classes=None,
        min_size=64,
        max_size=96,
    )


def test_torchvisions_detector_takes_backbone_pyramid_and_head(tmp_path):
    model = timm_soco(name="resnet18")
    model.export_torchvision(tmp_path / "torchvision.safetensors")
    detector = faster_rcnn()
    report = load_torchvision_weights(detector, tmp_path / "torchvision.safetensors")
    state, tensors = detector.state_dict(), load_file(tmp_path / "torchvision.safetensors")
    assert set(report.kept) == set(tensors) and not report.mismatched and not report.frozen
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in report.reset} == {
        "rpn.head", "roi_heads.box_predictor",
    }  # fmt: skip
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("rpn.", "roi_heads.box_predictor"))}
    assert kept.keys() == tensors.keys()  # all of the trunk, the pyramid and the head
    assert str(report).startswith(f"transfer 'soco': {len(tensors)} tensors kept")

    # The same maps and box features, not only the same names.
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours = model.eval().encoder.backbone(image).feature_maps
        theirs = list(detector.eval().backbone.body(image).values())
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
        maps = model.encoder.neck(dict(enumerate(ours)))
        assert torch.allclose(maps[0], detector.backbone(image)["1"], atol=1e-4)
        pooled = torch.rand(2, 8, 7, 7)
        assert torch.allclose(model.encoder.head(pooled), detector.roi_heads.box_head(pooled), atol=1e-5)


def test_torchvision_detectors_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "torchvision.safetensors"
    timm_soco(name="resnet18").export_torchvision(path)
    timm_soco(name="resnet34").export_torchvision(tmp_path / "deeper.safetensors")
    with pytest.raises(ValueError, match=r"does not have, such as backbone\.body\..*it takes the same trunk"):
        load_torchvision_weights(faster_rcnn(), tmp_path / "deeper.safetensors")
    arguments = DetectorArguments(
        detector="torchvision_faster_rcnn", backbone="resnet18", backbone_weights=str(path),
        detector_config={"hidden_size": 8},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"such as roi_heads\.box_head.*`box_head: conv`"):
        load_detector(arguments, 3)
    with pytest.raises(ValueError, match="'c4' trains no feature pyramid"):
        tiny_soco("c4").export_torchvision(tmp_path / "c4.safetensors")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("family", ["torchvision_faster_rcnn", "torchvision_mask_rcnn", "torchvision_retinanet"])
def test_our_convnets_take_pyramid_and_head_by_the_report_of_transfers(family, version, tmp_path):
    """What they compute is SoCo's: with its norms, or, where a detector has none, with norms in the convolutions."""
    if (family, version) == ("torchvision_retinanet", 2):
        return  # takes its sixth level from the backbone; its pyramid is the pyramid of version 1
    model, path = timm_soco(), tmp_path / "torchvision.safetensors"
    model.export_torchvision(path)
    fields = {"hidden_size": 8, "version": version}
    if family != "torchvision_retinanet":
        fields |= {"box_head": "conv", "box_head_size": 16}
    arguments = DetectorArguments(
        detector=family, backbone="resnet10t", backbone_weights=str(path), detector_config=fields
    )
    detector, report = load_detector(arguments, 3)
    assert report.preset == "soco" and not report.mismatched and report.file_name == "transfer_report.json"
    assert {name.split(".")[1] for name in report.kept} <= {"backbone", "roi_heads"}
    new = r"detector\.(rpn\.|head\.|backbone\.fpn\.extra_blocks\.|roi_heads\.(box_predictor|mask_))"
    assert report.reset and all(re.match(new, name) for name in report.reset)
    assert set(report.kept) | set(report.reset) == set(detector.state_dict())

    image, pooled = torch.rand(1, 3, 64, 64), torch.rand(2, 8, 7, 7)
    model.eval(), detector.eval()
    with torch.no_grad():
        maps = list(model.encoder.feature_maps(image))
        ours = list(detector.detector.backbone(image).values())
        missing = 1 if family == "torchvision_retinanet" else 0  # it has no level of stride 4
        for expected, found in zip(maps[missing:], ours, strict=False):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if not missing:
            found = detector.detector.roi_heads.box_head(pooled)
            torch.testing.assert_close(found, model.encoder.head(pooled), rtol=1e-4, atol=1e-4)
