import copy
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers.norm_act import FrozenBatchNormAct2d
from tiny_detectors import random_batch, tiny_config, tiny_detector
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MobileNetV2Config,
    PvtV2Config,
    PvtV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmBackboneConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from aligndet_hf import AlignDetForPreTraining
from aligndet_hf.detectors.backbone_weights import load_backbone_weights
from aligndet_hf.detectors.backbones import (
    build_backbone_config,
    check_backbone,
    eval_frozen,
    get_backbone,
    image_statistics,
    normalize_in_one_pass,
    set_backbone_trainable,
)
from aligndet_hf.detectors.build import DetectorArguments, build_detector, build_image_processor, load_detector
from aligndet_hf.detectors.families import FAMILIES
from aligndet_hf.detectors.transfer import transfer_detector

SMALL = {
    "rt_detr": {
        "d_model": 32,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": 20,
    },
    "detr": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "conditional_detr": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
}
TRANSFORMERS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic")
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, image_size=64)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_scale_init_value=0.5)
    ),
    "pvt_v2": lambda: PvtV2ForImageClassification(
        PvtV2Config(hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], depths=[1] * 4)
    ),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)
    ),
    "dinov3_vit": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    ),
}
WITH_BACKBONE = sorted(name for name, family in FAMILIES.items() if family.backbones)
PYRAMIDS = ["resnet", "swin", "convnext", "pvt_v2"]


def has_timm_backbone(model_type: str) -> bool:
    return isinstance(getattr(tiny_config(model_type), "backbone_config", None), TimmBackboneConfig)


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Norms, biases and scales that are not those of a new network, which hide much: as after training."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator)
        if key.endswith("running_var") or (tensor.ndim == 1 and key.endswith(("weight", "gamma"))):
            tensor.copy_(noise + 0.5)
        elif key.endswith(("running_mean", "bias")):
            tensor.copy_((noise - 0.5) * 0.3)
    return network.eval()


def feature_maps(backbone, pixels):
    """In float64: float32 sums differ with the order in which a library adds, by more than a wrong weight may."""
    with torch.no_grad():
        features = backbone.double()(pixels.double())
    return features.feature_maps if hasattr(features, "feature_maps") else features


def assert_same_features(detector, expected, pixels, folder):
    """Of the detector, and of what plain transformers makes of its checkpoint."""
    detector.save_pretrained(folder)
    for model in (detector.eval(), AutoModelForObjectDetection.from_pretrained(folder).eval()):
        actual = feature_maps(get_backbone(model), pixels)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert theirs.std() > 1e-3
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["detr", "rt_detr"])  # the one unwraps timm's network, the other does not
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "efficientnet_lite0", "convnext_atto"])
def test_backbone_features_equal_timm_fresh_and_after_save_and_load(name, model_type, tmp_path):
    network = randomise(timm.create_model(name, features_only=True))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    detector = build_detector(
        model_type, backbone=name, backbone_weights=tmp_path / "weights.safetensors", **SMALL[model_type]
    )
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = feature_maps(network, pixels)[-len(FAMILIES[model_type].strides) :]
    assert_same_features(detector, expected, pixels, tmp_path / "saved")


@pytest.mark.parametrize("model_type", filter(has_timm_backbone, sorted(FAMILIES)))
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_features_of_every_family_with_a_timm_backbone_equal_timm(name, model_type, tmp_path):
    config = tiny_config(model_type)
    levels = list(range(5 - len(config.backbone_config.out_indices), 5))
    config.backbone_config = TimmBackboneConfig(backbone=name, out_indices=levels, freeze_batch_norm_2d=True)
    detector = AutoModelForObjectDetection.from_config(config)
    network = randomise(timm.create_model(name, features_only=True, out_indices=levels))
    save_file(timm_weights := network.state_dict(), tmp_path / "weights.safetensors")
    report = load_backbone_weights(detector, tmp_path / "weights.safetensors")
    assert len(report.matched) == sum(not key.endswith("num_batches_tracked") for key in timm_weights)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    assert_same_features(detector, feature_maps(network, pixels), pixels, tmp_path / "saved")


@pytest.mark.parametrize("model_type", ["detr", "rt_detr"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformers_checkpoint_is_a_backbone_with_its_weights(kind, model_type, tmp_path):
    torch.manual_seed(0)
    randomise(TRANSFORMERS[kind]()).save_pretrained(tmp_path / "checkpoint")
    ConvNextImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path / "checkpoint"
    )
    if model_type == "rt_detr" and kind not in PYRAMIDS:
        with pytest.raises(ValueError, match=r"needs \[8, 16, 32\].*Plain ViTs fit .* detr"):
            build_detector(model_type, backbone=str(tmp_path / "checkpoint"), **SMALL[model_type])
        return
    detector, report = load_detector(
        DetectorArguments(
            detector=model_type, backbone=str(tmp_path / "checkpoint"), detector_config=SMALL[model_type]
        ),
        num_labels=2,
    )
    config = detector.config.backbone_config
    assert report.matched and all("hidden_states_norms" in name for name in report.missing)
    assert config.out_features == (
        ["stage2", "stage3", "stage4"] if model_type == "rt_detr" else config.stage_names[-1:]
    )
    reference = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
        tmp_path / "checkpoint", out_features=config.out_features
    )
    # The first of a size that is a multiple of nothing, which families of square images never see.
    size = (64, 96) if model_type == "rt_detr" else (67, 97)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = feature_maps(reference.eval(), pixels)
    assert image_statistics(detector.config) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert_same_features(detector, expected, pixels, tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    loss = detector.float().train()(pixel_values=pixels, labels=random_batch(num_labels=2)["labels"]).loss
    loss.backward()
    assert loss.isfinite()


# --- the trap --------------------------------------------------------------------------------------------------------


def test_a_backbone_that_lost_its_activations_is_refused_wherever_it_comes_in(tmp_path):
    trap = ConditionalDetrConfig(
        backbone_config=TimmBackboneConfig(backbone="mobilenetv2_100", out_indices=[4]),
        **SMALL["conditional_detr"],
    )
    detector = AutoModelForObjectDetection.from_config(trap)
    with pytest.raises(ValueError, match="lost its activations"):
        check_backbone(detector)
    with pytest.raises(ValueError, match="lost its activations"):
        AlignDetForPreTraining.from_detector(detector)
    detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="freeze_batch_norm_2d=True"):
        load_detector(DetectorArguments(detector=str(tmp_path)), num_labels=1)
    with pytest.raises(ValueError, match="freeze_batch_norm_2d=True"):
        transfer_detector(tmp_path, 2)


def test_live_norms_keep_their_activations_where_the_family_allows_them():
    detector = build_detector("rt_detr", backbone="mobilenetv2_100", freeze_batch_norm=False, **SMALL["rt_detr"])
    norms = [m for m in get_backbone(detector).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 51 and all(hasattr(norm, "act") for norm in norms)
    with pytest.raises(ValueError, match="lost its activations"):
        build_detector("detr", backbone="mobilenetv2_100", freeze_batch_norm=False, **SMALL["detr"])


@pytest.mark.parametrize("freeze", [True, False])
def test_norms_of_a_transformers_backbone_are_frozen_or_not(freeze):
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic")
    detector = build_detector("rt_detr", backbone=backbone, freeze_batch_norm=freeze, **SMALL["rt_detr"])
    live = [m for m in get_backbone(detector).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(live) != freeze


# --- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", WITH_BACKBONE)
def test_freezing_covers_the_whole_backbone_and_nothing_else(model_type):
    detector = tiny_detector(model_type)
    own = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}
    backbone = {id(p) for p in get_backbone(detector).parameters()}
    assert backbone
    for trainable in (False, True):
        set_backbone_trainable(detector, trainable)
        for name, parameter in detector.named_parameters():
            assert parameter.requires_grad == (trainable if id(parameter) in backbone else own[name])


@pytest.mark.parametrize(
    "name, stages, expected",
    [
        ("resnet18", 1, ["layer4"]),
        ("resnet18", 2, ["layer3", "layer4"]),
        ("resnet18", 4, ["layer1", "layer2", "layer3", "layer4"]),
        ("resnet18", 5, ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenetv2_100", 1, ["blocks.5", "blocks.6"]),  # the last stage of stride 32 has two of timm's blocks
        ("convnext_atto", 1, ["stages_3"]),
        ("convnext_atto", 4, ["stages_0", "stages_1", "stages_2", "stages_3", "stem_0", "stem_1"]),
        ("xcit_nano_12_p16_224", 2, ["model.blocks.10", "model.blocks.11"]),
    ],
)
def test_the_last_stages_of_timm_backbones_can_be_trained_alone(name, stages, expected):
    detector = build_detector("detr", backbone=name, **SMALL["detr"])
    set_backbone_trainable(detector, True, stages)
    trained = {n for n, p in get_backbone(detector).named_parameters() if p.requires_grad}
    depth = 3 if "model." in expected[0] else 2 if "." in expected[0] else 1
    assert sorted({".".join(n.split(".")[:depth]) for n in trained}) == expected
    assert all(p.requires_grad for n, p in detector.named_parameters() if "backbone" not in n)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_last_stages_of_transformers_backbones_can_be_trained_alone(kind):
    detector = build_detector("detr", backbone=TRANSFORMERS[kind]().config, **SMALL["detr"])
    backbone = get_backbone(detector)
    count = len(backbone.config.stage_names)
    sizes = []
    for stages in range(1, count + 1):
        set_backbone_trainable(detector, True, stages)
        sizes.append(sum(p.requires_grad for p in backbone.parameters()))
        trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
        blocks = {int(found[1]) for n in trained if (found := re.match(r"\D*\.?(?:layer|layers|stages)\.(\d+)\.", n))}
        last = count - 1 - (kind != "pvt_v2")  # the others count their stem
        assert blocks == set(range(max(0, last - stages + 1), last + 1))
    assert sizes == sorted(set(sizes)) and sizes[-1] == len(list(backbone.parameters()))
    with pytest.raises(ValueError, match=f"it has {count}"):
        set_backbone_trainable(detector, True, count + 1)


@pytest.mark.parametrize("model_type", WITH_BACKBONE)
def test_the_last_stage_alone_can_be_trained_in_every_family(model_type):
    detector = tiny_detector(model_type)
    set_backbone_trainable(detector, True, 1)
    trained = [parameter.requires_grad for parameter in get_backbone(detector).parameters()]
    assert any(trained) and not all(trained) and trained == sorted(trained)  # what comes last


@pytest.mark.parametrize("model_type", ["detr", "rt_detr"])
def test_partly_frozen_backbones_stay_so_when_an_aligndet_checkpoint_is_loaded(model_type, tmp_path):
    detector = tiny_detector(model_type)
    model = AlignDetForPreTraining.from_detector(detector, freeze_backbone=False, trainable_backbone_stages=1)
    model.save_pretrained(tmp_path)
    loaded = AlignDetForPreTraining.from_pretrained(tmp_path).train()
    flags = [[p.requires_grad for p in m.online_detector.parameters()] for m in (model, loaded)]
    assert flags[0] == flags[1]
    trained = [p.requires_grad for p in loaded.backbone.parameters()]
    assert any(trained) and not all(trained)
    assert not any(p.requires_grad for p in loaded.momentum_detector.parameters())
    with pytest.raises(ValueError, match="either frozen or"):
        AlignDetForPreTraining.from_detector(detector, trainable_backbone_stages=1)


def test_statistics_of_frozen_stages_stay_and_those_of_trained_ones_move():
    detector = build_detector("rt_detr", backbone="resnet10t", freeze_batch_norm=False, **SMALL["rt_detr"])
    model = AlignDetForPreTraining.from_detector(detector, freeze_backbone=False, trainable_backbone_stages=2).train()
    network = model.backbone._backbone
    before = copy.deepcopy(network.state_dict())
    model.online_detector(**{k: v for k, v in random_batch(num_labels=1).items() if k != "pixel_mask"})
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(("layer3.", "layer4.")) for name in moved)
    assert not network.layer2.training and network.layer3.training


def test_eval_frozen_leaves_what_is_trained_and_what_has_no_parameters():
    module = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()), torch.nn.Dropout(), torch.nn.Linear(2, 2)
    ).train()
    module[0].requires_grad_(False)
    eval_frozen(module)
    assert [m.training for m in (module, module[0], module[0][1], module[1], module[2])] == [
        True, False, False, True, True
    ]  # fmt: skip


def test_a_detector_that_is_one_network_has_nothing_to_freeze():
    detector = tiny_detector("yolos")
    set_backbone_trainable(detector, False)
    assert all(parameter.requires_grad for parameter in detector.parameters())
    with pytest.raises(ValueError, match="'yolos' has no backbone"):
        set_backbone_trainable(detector, True, 1)
    with pytest.raises(ValueError, match="'yolos' has no backbone"):
        load_backbone_weights(detector, "timm")


# --- configs and images ----------------------------------------------------------------------------------------------


def test_feature_maps_are_chosen_by_stride():
    config, channels, strides = build_backbone_config("convnext_atto", (8, 16, 32))
    assert (config.out_indices, channels, strides) == ([1, 2, 3], [80, 160, 320], [8, 16, 32])
    config, channels, strides = build_backbone_config("xcit_nano_12_p16_224", (32,), any_stride=True)
    assert (config.out_indices, channels, strides) == ([11], [128], [16])
    config, channels, strides = build_backbone_config("timm/resnet18", (4, 8))
    assert (config.backbone, config.out_indices, channels) == ("resnet18", [1, 2], [64, 128])
    config, channels, strides = build_backbone_config("swin", (4, 8, 16, 32))
    assert config.out_features == ["stage1", "stage2", "stage3", "stage4"] and channels == [96, 192, 384, 768]
    # A default config with tuples, which transformers itself cannot build a backbone of.
    assert build_backbone_config("convnext", (8, 16, 32))[1] == [192, 384, 768]


@pytest.mark.parametrize(
    "backbone, message",
    [
        ("convnext_atto", r"feature maps of stride \[4, 8, 16, 32\].*\[2\] is missing"),
        ("resnet19", "no timm model.*similar: .*resnet1"),
        ("vit_tiny_patch16_224", "does not take images of 448 x 896 pixels.*facebook/dinov2-small"),
        ("test_vit", "does not take images of 451 x 899 pixels"),
        ("test_mambaout", "channels last"),
        ("levit_128s", "does not take images"),
        (MobileNetV2Config(), "no backbone of type 'mobilenet_v2'"),
    ],
)
def test_backbones_that_cannot_serve_are_refused_with_the_reason(backbone, message):
    with pytest.raises(ValueError, match=message):
        build_backbone_config(backbone, (2,))


def test_a_run_of_soco_has_its_backbone_inside(tmp_path):
    """The folder around it is of a model that is none."""
    for folder in (tmp_path, tmp_path / "backbone"):
        MobileNetV2Config().save_pretrained(folder)
    with pytest.raises(ValueError, match=f"no backbone of type 'mobilenet_v2' .*: give {tmp_path / 'backbone'}$"):
        build_backbone_config(str(tmp_path), (32,))


def test_a_checkpoint_that_is_nowhere_is_one_clear_error():
    with pytest.raises(OSError, match="backbone 'someone/something' is not a folder with a config.json"):
        build_backbone_config("someone/something", (32,))


def test_mean_and_standard_deviation_are_the_backbones_own():
    detector = build_detector("rt_detr", backbone="tf_efficientnet_lite0", **SMALL["rt_detr"])
    assert image_statistics(detector.config) == ([0.5] * 3, [0.5] * 3)
    processor = build_image_processor(detector, 96)
    assert list(processor.image_mean) == [0.5] * 3 and processor.do_normalize
    assert (processor.size["height"], processor.size["width"]) == (96, 96)
    assert image_statistics(tiny_detector("rt_detr").config)[0] == [0.485, 0.456, 0.406]


def test_mean_and_standard_deviation_of_a_checkpoint_are_those_of_its_image_processor(tmp_path):
    detector = tiny_detector("rt_detr")
    detector.save_pretrained(tmp_path)
    processor = build_image_processor(detector, 64)
    for normalize, expected in ((False, ([0.0] * 3, [1.0] * 3)), (True, ([0.3] * 3, [0.2] * 3))):
        processor.do_normalize, processor.image_mean, processor.image_std = normalize, [0.3] * 3, [0.2] * 3
        processor.save_pretrained(tmp_path)
        loaded, _ = load_detector(DetectorArguments(detector=str(tmp_path)), 1)
        assert image_statistics(loaded.config) == expected
        assert image_statistics(transfer_detector(tmp_path, 7)[0].config) == expected
    AlignDetForPreTraining.from_detector(loaded).save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_shortest_edge_families_bound_the_longest_edge():
    processor = build_image_processor(tiny_detector("detr"), 800)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (800, 1333)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_is_built_around_a_new_backbone_or_its_own(model_type):
    known, of_the_backbone = AutoConfig.for_model(model_type), {"id2label", "label2id", "encoder_in_channels"}
    of_tiny = tiny_config(model_type).to_diff_dict()
    of_tiny = {name: of_tiny[name] for name in of_tiny.keys() - of_the_backbone if hasattr(known, name)}
    del of_tiny["model_type"]
    if FAMILIES[model_type].strides:
        del of_tiny["backbone_config"]
        detector = build_detector(model_type, backbone="test_efficientnet", num_labels=3, **of_tiny)
        assert detector.config.backbone_config.backbone == "test_efficientnet"
        assert detector.config.backbone_config.freeze_batch_norm_2d
    else:
        detector = build_detector(model_type, num_labels=3, **of_tiny)
        with pytest.raises(
            ValueError, match="has an image network of its own and takes no backbone such as 'resnet50'"
        ):
            build_detector(model_type, backbone="resnet50")
    loss = detector.train()(**random_batch()).loss
    loss.backward()
    assert loss.isfinite()


def test_build_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown detector family 'detrr'"):
        build_detector("detrr")
    with pytest.raises(ValueError, match="unknown detector family None. Supported are"):
        build_detector(None)
    with pytest.raises(ValueError, match="no config field num_querries"):
        build_detector("detr", backbone="resnet10t", num_querries=3)


def test_fields_of_a_backbone_go_without_its_model_type():
    config = build_detector("rf_detr", backbone_config={"num_hidden_layers": 3}).config.backbone_config
    assert (config.model_type, config.num_hidden_layers) == ("rf_detr_dinov2", 3)


def test_build_gives_as_many_classes_as_names():
    for names in (["cat", "dog"], {0: "cat", 1: "dog"}, {"0": "cat", "1": "dog"}):
        config = build_detector("detr", backbone="resnet10t", id2label=names).config
        assert (config.num_labels, config.id2label[1], config.label2id["dog"]) == (2, "dog", 1)
    with pytest.raises(ValueError, match="num_labels is 3, and id2label has 2 names"):
        build_detector("detr", backbone="resnet10t", num_labels=3, id2label=["cat", "dog"])
    for names in ("ab", ["cat", "cat"], {1: "cat", 2: "dog"}):
        with pytest.raises(
            ValueError, match="id2label must have a name of its own for each of the classes 0 to 1, got"
        ):
            build_detector("detr", backbone="resnet10t", id2label=names)
    for number in (0, "3", 2.0, True):
        with pytest.raises(ValueError, match="num_labels must be a positive whole number"):
            build_detector("detr", backbone="resnet10t", num_labels=number)


def test_load_detector_builds_a_family_or_loads_a_folder(tmp_path):
    new = DetectorArguments(detector="detr", backbone="resnet10t", detector_config=SMALL["detr"] | {"num_queries": 7})
    detector, report = load_detector(new, num_labels=2, id2label={0: "cat", 1: "dog"})
    assert detector.config.num_queries == 7 and detector.config.label2id == {"cat": 0, "dog": 1} and report is None
    detector.save_pretrained(tmp_path)
    loaded, report = load_detector(DetectorArguments(detector=str(tmp_path)), num_labels=9)
    assert loaded.config.num_labels == 2 and report is None
    assert all(torch.equal(t, detector.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_frozen_norms_in_one_pass_compute_the_same():
    kinds = (torchvision.ops.FrozenBatchNorm2d, FrozenBatchNormAct2d, DetrFrozenBatchNorm2d, nn.BatchNorm2d)
    norms = nn.Sequential(*(kind(64) for kind in kinds)).eval()
    for buffer in norms.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    x = torch.randn(2, 64, 5, 6)
    expected = norms(x)
    normalize_in_one_pass(norms)
    duplicate = copy.deepcopy(norms)
    torch.testing.assert_close(norms(x), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert norms[:3](x.bfloat16()).dtype == torch.bfloat16
    norms[0].weight.zero_()  # a copy has norms of its own
    torch.testing.assert_close(duplicate(x), expected, rtol=1e-4, atol=1e-5)
    assert ["forward" in vars(norm) for norm in norms] == [True, True, True, False]
