import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_detectors import tiny_detector
from transformers import AutoModelForObjectDetection, ConditionalDetrConfig, TimmBackboneConfig

from aligndet_hf.detectors.backbones import (
    build_backbone_config,
    check_backbone,
    get_backbone,
    image_statistics,
    load_backbone_weights,
    set_backbone_trainable,
)
from aligndet_hf.detectors.build import DetectorArguments, build_detector, build_image_processor, load_detector

SMALL = {
    "rt_detr": {"d_model": 32, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "detr": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "conditional_detr": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
}


def randomised(name: str):
    """A timm network with norm statistics that are not the identity, as after training."""
    network = timm.create_model(name, features_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif key.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network


def feature_maps(backbone, pixels):
    features = backbone(pixels)
    return features.feature_maps if hasattr(features, "feature_maps") else features


@pytest.mark.parametrize("model_type", SMALL)
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_backbone_features_equal_timm_fresh_and_after_save_and_load(name, model_type, tmp_path):
    network = randomised(name)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    detector = build_detector(
        model_type, backbone=name, backbone_weights=tmp_path / "weights.safetensors", **SMALL[model_type]
    )
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [network(pixels)[i] for i in detector.config.backbone_config.out_indices]
        detector.save_pretrained(tmp_path / "saved")
        for model in (detector.eval(), AutoModelForObjectDetection.from_pretrained(tmp_path / "saved").eval()):
            actual = feature_maps(get_backbone(model), pixels)
            assert len(actual) == len(expected) == (3 if model_type == "rt_detr" else 1)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_a_backbone_that_lost_its_activations_is_refused(tmp_path):
    trap = ConditionalDetrConfig(
        backbone_config=TimmBackboneConfig(backbone="mobilenetv2_100", out_indices=[4]),
        **SMALL["conditional_detr"],
    )
    detector = AutoModelForObjectDetection.from_config(trap)
    with pytest.raises(ValueError, match="lost its activations"):
        check_backbone(detector)
    detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="freeze_batch_norm_2d=True"):
        load_detector(DetectorArguments(detector=str(tmp_path)), num_labels=1)


def test_live_norms_keep_their_activations_where_the_family_allows_them():
    detector = build_detector("rt_detr", backbone="mobilenetv2_100", freeze_batch_norm=False, **SMALL["rt_detr"])
    norms = [m for m in get_backbone(detector).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 51 and all(hasattr(norm, "act") for norm in norms)
    with pytest.raises(ValueError, match="lost its activations"):
        build_detector("detr", backbone="mobilenetv2_100", freeze_batch_norm=False, **SMALL["detr"])


@pytest.mark.parametrize("model_type", SMALL)
def test_freezing_covers_the_whole_backbone_and_nothing_else(model_type):
    detector = tiny_detector(model_type)
    backbone = {id(p) for p in get_backbone(detector).parameters()}
    for trainable in (False, True):
        set_backbone_trainable(detector, trainable)
        for parameter in detector.parameters():
            assert parameter.requires_grad == (trainable or id(parameter) not in backbone)


def test_backbone_weights_are_loaded_strictly(tmp_path):
    tensors = timm.create_model("resnet10t", features_only=True).state_dict() | {"fc.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "good.safetensors")
    detector = build_detector("detr", backbone="resnet10t", **SMALL["detr"])
    assert load_backbone_weights(detector, tmp_path / "good.safetensors") == ["fc.weight"]
    for name, tensor in get_backbone(detector).state_dict().items():
        assert torch.equal(tensor, tensors[name])

    del tensors["layer1.0.conv1.weight"]
    tensors["layer2.0.conv1.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight is missing.*layer2\.0\.conv1\.weight has shape"):
        load_backbone_weights(detector, tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_backbone_weights(detector, tmp_path / "none.safetensors")


def test_nested_stage_names_of_timm_are_found(tmp_path):
    full = timm.create_model("convnext_atto")  # stages.0.…, where the feature extractor says stages_0.…
    save_file(full.state_dict(), tmp_path / "weights.safetensors")
    detector = build_detector("detr", backbone="convnext_atto", **SMALL["detr"])
    unused = load_backbone_weights(detector, tmp_path / "weights.safetensors")
    assert unused and all(name.startswith("head.") for name in unused)
    assert torch.equal(get_backbone(detector).state_dict()["stem_0.weight"], full.state_dict()["stem.0.weight"])


def test_feature_maps_are_chosen_by_stride():
    config, channels, strides = build_backbone_config("convnext_atto", (8, 16, 32))
    assert (config.out_indices, channels, strides) == ([1, 2, 3], [80, 160, 320], [8, 16, 32])
    with pytest.raises(ValueError, match="stride"):
        build_backbone_config("convnext_atto", (2,))
    with pytest.raises(ValueError, match="similar names: resnet1"):
        build_backbone_config("resnet19", (32,))


def test_mean_and_standard_deviation_are_the_backbones_own():
    detector = build_detector("rt_detr", backbone="tf_efficientnet_lite0", **SMALL["rt_detr"])
    assert image_statistics(detector.config) == ([0.5] * 3, [0.5] * 3)
    processor = build_image_processor(detector, 96)
    assert list(processor.image_mean) == [0.5] * 3 and processor.do_normalize
    assert (processor.size["height"], processor.size["width"]) == (96, 96)
    assert image_statistics(tiny_detector("rt_detr").config)[0] == [0.485, 0.456, 0.406]


def test_shortest_edge_families_bound_the_longest_edge():
    processor = build_image_processor(tiny_detector("detr"), 800)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (800, 1333)


def test_build_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown detector family 'detrr'"):
        build_detector("detrr")
    with pytest.raises(ValueError, match="no config field num_querries"):
        build_detector("detr", backbone="resnet10t", num_querries=3)


def test_load_detector_builds_a_family_or_loads_a_folder(tmp_path):
    new = DetectorArguments("detr", backbone="resnet10t", detector_config=SMALL["detr"] | {"num_queries": 7})
    detector = load_detector(new, num_labels=2, id2label={0: "cat", 1: "dog"})
    assert detector.config.num_queries == 7 and detector.config.label2id == {"cat": 0, "dog": 1}
    detector.save_pretrained(tmp_path)
    loaded = load_detector(DetectorArguments(str(tmp_path)), num_labels=9)
    assert loaded.config.num_labels == 2
    assert all(torch.equal(t, detector.state_dict()[n]) for n, t in loaded.state_dict().items())
