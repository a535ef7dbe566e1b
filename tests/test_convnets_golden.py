"""AlignDet's heads for RetinaNet, FCOS and Mask R-CNN against values that the official code recorded."""

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder

from aligndet_hf.convnets.modeling_torchvision import match_boxes, match_points
from aligndet_hf.losses import object_contrastive_loss

EPSILON = 1.1920929e-07  # which mmdetection adds to its normalisers


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def as_ids(labels, background):
    return torch.where(labels == background, -1, labels)


def contrast(case, online, momentum, online_ids, momentum_ids, temperature, rows):
    """The loss of chosen rows of the online features, and its gradient in all of them."""
    online = online.clone().requires_grad_(True)
    loss = object_contrastive_loss(online[rows], momentum, online_ids, momentum_ids, temperature)
    return loss.detach(), torch.autograd.grad(loss, online)[0]


@pytest.mark.parametrize("name", golden_cases.names("d"))
def test_region_heads_contrast_the_rows_that_have_weight(name):
    info, case = golden_cases.load(name, torch.float64)
    background, temperature = info["background_id"], info["temperature"]
    rows, keys = case["online_label_weights"] > 0, case["target_label_weights"] > 0
    loss, gradient = contrast(
        case,
        case["online_cls"],
        case["target_cls"][keys],
        as_ids(case["online_labels"].long(), background)[rows],
        as_ids(case["target_labels"].long(), background)[keys],
        temperature,
        rows,
    )
    assert relative(loss, case["loss_cls"]) < 1e-9
    assert (gradient - case["grad_online_cls"]).abs().max() < 1e-9


@pytest.mark.parametrize("name", golden_cases.names("h"))
def test_retinanet_contrasts_each_anchor_with_its_own_box(name):
    """
    With two images the official code reads the features of other places than those that its labels are of: its value
    comes out of its own table of rows (7.406 in this case), and ours (7.366) of the right ones.
    """
    info, case = golden_cases.load(name, torch.float64)
    width, temperature = info["width"], info["temperature"]
    online, momentum = (case[f"{view}_features"].flatten(0, 1) for view in ("online", "momentum"))
    used, keys = (case[f"{view}_label_weights"].flatten() > 0 for view in ("online", "momentum"))
    ids, key_ids = (as_ids(case[f"{view}_labels"].flatten().long(), width) for view in ("online", "momentum"))
    tables = {
        "aligned": (torch.arange(len(online)), torch.arange(len(momentum))),
        "official": (case["official_row_of_label"].long(), case["official_momentum_row_of_label"].long()),
    }
    for kind, (rows, key_rows) in tables.items():
        loss, gradient = contrast(
            case, online, momentum[key_rows][keys], ids[used], key_ids[keys], temperature, rows[used]
        )
        assert relative(loss, case[f"loss_contrastive_{kind}"]) < 1e-9
        assert relative(gradient, case[f"grad_features_{kind}"].flatten(0, 1)) < 1e-9
    if info["images"] == 2:
        assert abs(case["loss_contrastive_aligned"] - case["loss_contrastive_official"]) > 0.03


@pytest.mark.parametrize("name", golden_cases.names("h"))
def test_retinanet_assigns_as_the_official_code_but_for_forced_matches(name):
    info, case = golden_cases.load(name, torch.float64)
    background, first, differing = info["background_id"], 0, 0
    for image in range(info["images"]):
        boxes = case[f"online_boxes_{image}"]
        found = match_boxes(case["online_anchors"].float(), boxes.float(), 0.4, 0.5, keep_best=True)
        found = torch.where(found >= 0, found + first, torch.where(found == -1, background, -2))
        official = case["online_labels"][image].long()
        official = torch.where(case["online_label_weights"][image] > 0, official, -2)
        different = found != official
        # Both take the anchor; torchvision gives it to its own best box, mmdetection to the box it is the best of.
        assert ((found[different] < background) & (official[different] < background)).all()
        differing += int(different.sum())
        first += len(boxes)
    assert differing <= 10
    positive = (case["box_weights"] > 0).all(-1)
    _, row = positive.nonzero(as_tuple=True)
    boxes = torch.cat([case[f"online_boxes_{image}"] for image in range(info["images"])])
    own = boxes[case["online_labels"][positive].long()]
    wanted = BoxCoder((1.0,) * 4).encode_single(own, case["online_anchors"][row].double())
    assert relative(wanted, case["box_targets"][positive]) < 1e-5
    loss = (case["box_predictions"][positive] - wanted).abs().sum() / (info["num_total_positive"] + EPSILON)
    assert relative(loss, case["loss_bbox"]) < 1e-5


@pytest.mark.parametrize("name", golden_cases.names("i"))
def test_fcos_contrasts_sampled_points(name):
    info, case = golden_cases.load(name, torch.float64)
    width, temperature = info["width"], info["temperature"]
    rows, keys = (
        torch.cat([case[f"{view}_sampled_positive"], case[f"{view}_sampled_negative"]]).long()
        for view in ("online", "momentum")
    )
    loss, gradient = contrast(
        case,
        case["online_features"],
        case["momentum_features"][keys],
        as_ids(case["online_labels"].long(), width)[rows],
        as_ids(case["momentum_labels"].long(), width)[keys],
        temperature,
        rows,
    )
    assert relative(loss, case["loss_contrastive"]) < 1e-9
    assert relative(gradient, case["grad_features"]) < 1e-9
    # Left, top, right, bottom.
    sides = case["box_targets"][case["online_sampled_positive"].long()].unflatten(-1, (2, 2))
    centerness = (sides.amin(1) / sides.amax(1)).prod(-1).sqrt()
    assert relative(centerness, case["centerness_targets"]) < 1e-5
    logits = case["centerness_predictions"][case["online_sampled_positive"].long()]
    loss = F.binary_cross_entropy_with_logits(logits, centerness, reduction="sum") / (len(logits) + EPSILON)
    assert relative(loss, case["loss_centerness"]) < 1e-5


@pytest.mark.parametrize("name", golden_cases.names("j"))
def test_regions_are_assigned_as_in_the_official_code(name):
    info, case = golden_cases.load(name, torch.float64)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    for view in ("online", "momentum"):
        found = []
        for image in range(info["images"]):
            boxes, ids = case[f"{view}_boxes_{image}"], case[f"{view}_ids_{image}"].long()
            candidates = torch.cat([boxes, case[f"{view}_proposals_{image}"]])
            matched = match_boxes(candidates, boxes, 0.5, 0.5)
            rows = matched >= 0
            own = boxes[matched[rows]]
            columns = [
                torch.full((len(own), 1), float(image)),
                candidates[rows],
                ids[matched[rows], None].double(),
                coder.encode_single(own, candidates[rows]),
            ]
            found.append(torch.cat(columns, 1))
        found = torch.cat(found)
        labels = case[f"{view}_labels"][:, None].double()
        expected = torch.cat([case[f"{view}_rois"], labels], 1)
        order, expected_order = (
            torch.tensor(sorted(range(len(x)), key=lambda i, x=x: x[i].tolist())) for x in (found, expected)
        )
        assert relative(found[order, :6], expected[expected_order]) < 1e-9
        if view == "online":
            assert relative(found[order, 6:], case["box_targets"][expected_order]) < 1e-5
    rows = torch.arange(len(case["online_features"]))
    loss, gradient = contrast(
        case,
        case["online_features"],
        case["momentum_features"],
        case["online_labels"].long(),
        case["momentum_labels"].long(),
        info["temperature"],
        rows,
    )
    assert relative(loss, case["loss_contrastive"]) < 1e-9
    assert relative(gradient, case["grad_features"]) < 1e-9


def test_fcos_points_by_hand():
    """A box of 40 pixels: no point of its edge, of its neighbours the smaller, and only those of its level."""
    points = torch.tensor([[20.0, 20.0], [4.0, 20.0], [0.0, 20.0], [36.0, 36.0], [20.0, 20.0]])
    sizes = torch.tensor([8.0, 8.0, 8.0, 8.0, 16.0])
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0], [10.0, 10.0, 30.0, 31.0]])
    assert match_points(points, sizes, boxes, None).tolist() == [1, 0, -1, 0, -1]
    # Within 1.5 strides of the centre, 12 pixels.
    assert match_points(points, sizes, boxes, 1.5).tolist() == [1, -1, -1, -1, -1]
    assert match_points(points, sizes, boxes[:0], 1.5).tolist() == [-1] * 5


def test_anchors_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 101.0, 101.0], [50.0, 50.0, 50.0, 50.0]])
    anchors = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 4.5], [0.0, 0.0, 10.0, 3.0], [90.0, 90.0, 110.0, 110.0]]
    )
    assert match_boxes(anchors, boxes, 0.4, 0.5).tolist() == [0, -2, -1, -1]
    # The second box is best met by the last anchor; the third, without an area, by none.
    assert match_boxes(anchors, boxes, 0.4, 0.5, keep_best=True).tolist() == [0, -2, -1, 1]
    assert match_boxes(anchors, boxes[:0], 0.4, 0.5, keep_best=True).tolist() == [-1] * 4
