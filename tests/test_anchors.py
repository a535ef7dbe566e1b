"""Whether a dense detector has enough anchors on the objects."""

import pytest
import torch
from tiny_detectors import ONE_STEP, timm_backbone, tiny_detector

from aligndet_hf.commands.finetune import finetune
from aligndet_hf.commands.pretrain import pretrain
from aligndet_hf.convnets.modeling_torchvision import (
    FcosConfig,
    FcosForObjectDetection,
    RetinaNetConfig,
    RetinaNetForObjectDetection,
)
from aligndet_hf.data.synthetic import write_synthetic_folder
from aligndet_hf.detectors.anchors import anchor_note, anchors_on_objects
from aligndet_hf.detectors.build import build_detector
from aligndet_hf.training.finetune_arguments import FinetuneArguments
from aligndet_hf.training.pretrain_arguments import PretrainArguments

SIDES = [[16], [32], [64], [128], [256]]
FEW = {"anchor_sizes": SIDES, "aspect_ratios": [0.05, 0.1, 1.0, 10.0, 20.0]}
ADVICE = {"strides": [4, 8, 16, 32], "anchor_sizes": [*SIDES, [512]], "aspect_ratios": [1.0]}


def retinanet(levels=(2, 3, 4), **fields):
    backbone = timm_backbone("resnet10t", levels)
    return RetinaNetForObjectDetection(RetinaNetConfig(backbone_config=backbone, hidden_size=32, version=2, **fields))


def item(*boxes, height=64, width=64):
    """A training image with boxes in pixels, `cxcywh`."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / torch.tensor([width, height, width, height])
    labels = {"boxes": boxes, "class_labels": torch.zeros(len(boxes), dtype=torch.int64)}
    return {"image": torch.zeros(3, height, width, dtype=torch.uint8), "labels": labels}


@pytest.mark.parametrize(
    ("levels", "sides", "expected"),
    [
        # At stride 8 only the anchor with its centre meets the object: the next has an IoU of 1/3. At stride 4 four
        # neighbours do, too, with 3/5; those at the corners have 9/23.
        ((2, 3, 4), SIDES, 1),
        ((1, 2, 3, 4), [*SIDES, [512]], 5),
    ],
)
def test_anchors_are_counted_by_hand(levels, sides, expected):
    detector = retinanet(levels, anchor_sizes=sides, aspect_ratios=[1.0])
    assert anchors_on_objects(detector, [item((24, 24, 16, 16))]) == expected
    assert anchors_on_objects(detector, [item((24, 24, 16, 16), (40, 40, 16, 16)), item()]) == expected
    # Three shapes share them.
    assert anchors_on_objects(
        retinanet(levels, anchor_sizes=sides, aspect_ratios=[0.25, 1.0, 4.0]), [item((24, 24, 16, 16))]
    ) == pytest.approx(expected / 3)


@pytest.mark.parametrize("conventions", ["torchvision", "mmdet"])
@pytest.mark.parametrize("model", [RetinaNetForObjectDetection, FcosForObjectDetection])
def test_the_count_is_what_the_loss_counts(model, conventions):
    config = {RetinaNetForObjectDetection: RetinaNetConfig, FcosForObjectDetection: FcosConfig}[model]
    backbone = timm_backbone("resnet10t", (2, 3, 4))
    fields = {"hidden_size": 64, "rows_per_image": 10**6, "conventions": conventions}
    detector = model(config(backbone_config=backbone, **fields)).eval()
    one = item((30, 40, 33, 21), (70, 31, 55, 40), (90, 50, 9, 60), height=75, width=130)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    found = anchors_on_objects(detector, [one])
    outputs = detector(
        torch.nn.functional.pad(one["image"][None].float(), (0, 30, 0, 21)),
        pixel_mask=torch.nn.functional.pad(torch.ones(1, 75, 130, dtype=torch.int64), (0, 30, 0, 21)),
        labels=[one["labels"]],
        output_hidden_states=True,
    )
    assert found == (outputs.object_index >= 0).sum() / detector.config.num_anchors > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in detector.state_dict().values())


def test_the_note_says_how_many_and_what_helps():
    small = [item((24, 24, 16, 16)), item()]
    elongated = retinanet(anchor_sizes=SIDES, aspect_ratios=[0.25, 1.0, 4.0])
    assert anchor_note(elongated, small) == (
        "this detector may learn slowly: in an image 0.2 anchors of each of 3 shapes stand for an object, and "
        "fewer than 2 are few. Fewer shapes and finer feature maps help. Add to --detector_config "
        '(in pre-training, if there was one) for instance "strides": [4, 8, 16, 32], "anchor_sizes": [[16], [32], '
        '[64], [128], [256], [512]], "aspect_ratios": [1.0], or give larger --image_sizes.'
    )
    assert anchor_note(retinanet((1, 2, 3, 4), anchor_sizes=[*SIDES, [512]], aspect_ratios=[1.0]), small) is None
    # FCOS has points, of no size and shape.
    fcos = tiny_detector("torchvision_fcos")
    assert anchor_note(fcos, [item((24, 24, 2, 2))]) == (
        "this detector may learn slowly: in an image 1.0 points stand for an object, and fewer than 2 are few. Finer "
        'feature maps help. Add to --detector_config (in pre-training, if there was one) for instance "strides": '
        "[4, 8, 16, 32], or give larger --image_sizes."
    )
    # Other detectors are not asked, and their images not looked at.
    assert anchor_note(tiny_detector("detr"), iter(pytest.fail, None)) is None


@pytest.mark.parametrize(("fields", "is_told"), [(FEW, True), (ADVICE, False)])
def test_both_trainings_tell_it_and_the_advice_ends_it(proposal_folder, tmp_path, capsys, fields, is_told):
    write_synthetic_folder(tmp_path / "scenes", {"train": 4}, seed=0, image_size=(64, 80))
    shared = ONE_STEP | {"detector": "torchvision_retinanet", "detector_config": {"hidden_size": 32} | fields}
    labelled = {"dataset": str(tmp_path / "scenes"), "do_eval": False, "output_dir": str(tmp_path / "finetune")}
    finetune(FinetuneArguments(**shared | labelled))
    told = [capsys.readouterr().out]
    unlabelled = {"dataset": str(proposal_folder), "max_proposals": 4, "output_dir": str(tmp_path / "pretrain")}
    known = {name: value for name, value in shared.items() if name in PretrainArguments.__dataclass_fields__}
    pretrain(PretrainArguments(**known | unlabelled))
    told.append(capsys.readouterr().out)
    assert [text.count("note: this detector may learn slowly") for text in told] == [int(is_told)] * 2


@pytest.mark.parametrize("family", ["torchvision_retinanet", "torchvision_fcos"])
def test_anchors_follow_the_strides(family):
    fields = {"backbone": "resnet10t", "hidden_size": 64}
    finer, usual = build_detector(family, strides=[4, 8, 16, 32], **fields), build_detector(family, **fields)
    assert finer.config.anchor_sizes[1:] == usual.config.anchor_sizes
    assert [max(sides) for sides in finer.config.anchor_sizes] == {
        "torchvision_retinanet": [25, 50, 101, 203, 406, 812],
        "torchvision_fcos": [4, 8, 16, 32, 64, 128],
    }[family]
    assert finer.eval()(torch.zeros(1, 3, 64, 64)).logits.isfinite().all()
    with pytest.raises(ValueError, match="anchor_sizes has 5 lists, and this detector 4 levels of the backbone and 2"):
        build_detector(family, strides=[4, 8, 16, 32], anchor_sizes=usual.config.anchor_sizes, **fields)
    for strides in ([4, 8, 16, 32], [4, 8, 16]):
        with pytest.raises(ValueError, match=r"by the conventions of mmdet the strides are \(8, 16, 32\), got \(4, 8"):
            build_detector(family, strides=strides, conventions="mmdet", **fields)


@pytest.mark.parametrize("fields", [{"anchor_sizes": [[8, 16]] * 5}, {"aspect_ratios": [0.5, 1.0]}])
def test_points_have_one_shape(fields):
    with pytest.raises(ValueError, match="FCOS has one point at a location: anchor_sizes takes the stride of each"):
        FcosConfig(**fields)


def test_regions_are_of_four_maps():
    fields = {"backbone": "resnet10t", "hidden_size": 64, "box_head_size": 16}
    assert build_detector("torchvision_faster_rcnn", **fields).config.anchor_sizes == [[32], [64], [128], [256], [512]]
    with pytest.raises(ValueError, match="this detector takes 4 maps of its backbone, not 3"):
        build_detector("torchvision_faster_rcnn", strides=[8, 16, 32], **fields)
