import golden_cases
import pytest
import torch
from tiny_detectors import CONFIGS, NUM_QUERIES, random_batch, random_labels, tiny_config, tiny_detector
from transformers.loss.loss_utils import LOSS_MAPPING

from aligndet_hf.boxes import xyxy_to_cxcywh
from aligndet_hf.detectors.criterion import loss_and_matching, matching_only, use_correct_loss
from aligndet_hf.losses import object_contrastive_loss

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def golden_labels(info, case, view):
    sizes = case["num_proposals"].tolist()
    extent = case[f"{view}_img_shape"].flip(-1).repeat(1, 2)
    boxes = case[f"{view}_gt_bboxes"].split(sizes)
    return [
        {"class_labels": classes, "boxes": xyxy_to_cxcywh(box) / size}
        for classes, box, size in zip(case["gt_labels"].split(sizes), boxes, extent, strict=True)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", golden_cases.names("b"))
def test_head_loss_and_gradients_equal_the_official_ones(name, dtype):
    """Background weight 1 divided by the boxes (official), and 0.1 divided by the weights (plain DETR)."""
    info, case = golden_cases.load(name, dtype)
    leaves = {key: case[f"online_{key}"].requires_grad_() for key in ("cls", "bbox", "proj")}
    background_weight = info["bg_cls_weight"] or 1.0
    config = tiny_config("detr", num_labels=info["num_classes"], eos_coefficient=background_weight)
    loss, terms, _ = loss_and_matching(
        leaves["cls"][-1],
        golden_labels(info, case, "online"),
        torch.device("cpu"),
        leaves["bbox"][-1],
        config,
        leaves["cls"],
        leaves["bbox"],
        normalize_class_loss_by="boxes" if info["official"] else "weights",
    )
    layers = len(leaves["cls"])
    for layer in range(layers):
        prefix, suffix = ("", "") if layer == layers - 1 else (f"d{layer}.", f"_{layer}")
        for ours, theirs, weight in (("ce", "cls", 1), ("bbox", "bbox", 5), ("giou", "iou", 2)):
            expected = case[f"loss_dict.{prefix}loss_{theirs}"]
            torch.testing.assert_close(weight * terms[f"loss_{ours}{suffix}"], expected, rtol=0, atol=TOLERANCE[dtype])

    # The official labels of this term come from a second matching that takes instance ids for classes.
    ids = [case[f"{view}_obj_labels"].flatten() for view in ("online", "target")]
    ids = [torch.where(row == info["num_classes"], -1, row) for row in ids]
    contrast = object_contrastive_loss(leaves["proj"].flatten(0, -2), case["target_proj"].flatten(0, -2), *ids)
    torch.testing.assert_close(contrast, case["loss_dict.loss_contrastive"], rtol=0, atol=TOLERANCE[dtype])

    (loss + contrast).backward()
    torch.testing.assert_close(loss + contrast, case["total_loss"], rtol=0, atol=4 * TOLERANCE[dtype])
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, case[f"grad_online_{key}"], rtol=0, atol=TOLERANCE[dtype])


def test_instances_are_matched_by_their_classes_and_not_by_their_ids():
    """The official second matching reads the class score of column "instance id", and so differs here."""
    info, case = golden_cases.load("b05_L2_B3_Q20_D32_nc64_full")
    config = tiny_config("detr", num_labels=info["num_classes"])
    inputs = (case["online_cls"][-1], golden_labels(info, case, "online"), None, case["online_bbox"][-1], config)
    _, _, matching = matching_only(*inputs, case["online_cls"], case["online_bbox"])
    found = matching.scatter(torch.arange(60), (2, 3, 20), -1)
    by_class, by_id = case["match_category"][0], case["match_object"][0]
    rows = found.view(2, 3, 20) - torch.arange(0, 60, 20).view(1, 3, 1)
    queries = torch.full_like(by_class, -1).scatter_(2, rows, torch.arange(20).expand(2, 3, 20))
    assert torch.equal(queries, by_class) and not torch.equal(queries, by_id)


@pytest.mark.parametrize("counts", [[5, 3], [0, 4], [0, 0], [NUM_QUERIES + 3, 1]])
@pytest.mark.parametrize("auxiliary_loss", [True, False])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_loss_equals_the_stock_loss_in_one_process(model_type, auxiliary_loss, counts):
    # Without denoising queries, which the stock loss of the oldest supported release takes for detections.
    fields = {"num_denoising": 0} if model_type == "rt_detr" else {}
    detector = tiny_detector(model_type, auxiliary_loss=auxiliary_loss, **fields).train()
    batch = random_batch(counts)
    stock, ours = run(detector, batch), run(use_correct_loss(detector), batch)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-6, atol=1e-6)
    assert ours.loss_dict.keys() == stock.loss_dict.keys()
    for name, value in stock.loss_dict.items():
        torch.testing.assert_close(ours.loss_dict[name], value, rtol=1e-5, atol=1e-6)
    assert len(ours.auxiliary_outputs or []) == len(stock.auxiliary_outputs or [])
    for one, other in zip(ours.auxiliary_outputs or [], stock.auxiliary_outputs or [], strict=True):
        assert torch.equal(one["logits"], other["logits"]) and torch.equal(one["pred_boxes"], other["pred_boxes"])


def test_denoising_terms_equal_the_stock_ones():
    detector = tiny_detector("rt_detr").train()
    batch = random_batch([5, 3, 0])
    stock, ours = run(detector, batch), run(use_correct_loss(detector), batch)
    assert ours.loss_dict.keys() == stock.loss_dict.keys()
    terms = [name for name in stock.loss_dict if "_dn_" in name or "_aux_" in name]
    assert len(terms) == 3 * (2 + 2)
    for name in terms:
        torch.testing.assert_close(ours.loss_dict[name], stock.loss_dict[name], rtol=1e-5, atol=1e-6)


def test_denoising_queries_do_not_enter_the_detection_terms():
    plain, denoised = tiny_detector("rt_detr").train(), tiny_detector("rt_detr").train()
    plain.config.num_denoising = 0
    batch = random_batch([5, 3])
    for module in (*plain.modules(), *denoised.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    ours, expected = run(use_correct_loss(denoised), batch), run(use_correct_loss(plain), batch)
    for name, value in expected.loss_dict.items():
        torch.testing.assert_close(ours.loss_dict[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_gradients_equal_those_of_the_stock_loss(model_type):
    fields = {"num_denoising": 0} if model_type == "rt_detr" else {}
    gradients = []
    for install in (lambda detector: detector, use_correct_loss):
        detector = install(tiny_detector(model_type, **fields).train())
        run(detector, random_batch([5, 3])).loss.backward()
        gradients.append({n: p.grad for n, p in detector.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_momentum_matching_is_that_of_the_loss(model_type):
    detector = tiny_detector(model_type).eval()
    batch = random_batch([5, 3])
    detector.loss_function = loss_and_matching
    with torch.no_grad():
        full = detector(**batch).auxiliary_outputs
        detector.loss_function = matching_only
        only = detector(**batch)
    assert only.loss is None
    assert full.layer.max() == 1 and len(full.layer) == 2 * 8  # two decoder layers, without the encoder's proposals
    assert all(torch.equal(one, other) for one, other in zip(full, only.auxiliary_outputs, strict=True))


def test_unknown_family_is_refused():
    from transformers import YolosConfig

    with pytest.raises(ValueError, match="'yolos' are not supported"):
        use_correct_loss(type("Detector", (), {"config": YolosConfig()}))


def test_every_family_has_a_stock_loss_to_compare_with():
    for model_type in CONFIGS:
        assert tiny_detector(model_type).loss_type in LOSS_MAPPING


def run(detector, batch):
    torch.manual_seed(1)  # dropout and denoising noise
    return detector(**batch)


def test_labels_helper_counts_ids_through_the_batch():
    assert torch.cat([label["proposal_ids"] for label in random_labels([2, 0, 3])]).tolist() == [0, 1, 2, 3, 4]
