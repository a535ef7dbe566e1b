import copy

import golden_cases
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny_detectors import NUM_QUERIES, WITH_QUERIES, random_batch, random_labels, tiny_config, tiny_detector
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import sigmoid_focal_loss
from transformers.loss.loss_utils import LOSS_MAPPING

from aligndet_hf.boxes import cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh
from aligndet_hf.detectors.criterion import loss_and_matching, matching_only, use_correct_loss
from aligndet_hf.detectors.families import family_of
from aligndet_hf.losses import object_contrastive_loss

aten = torch.ops.aten
DENOISING = [name for name in WITH_QUERIES if hasattr(tiny_config(name), "num_denoising")]
TWO_STAGE = ["deformable_detr two-stage"]
TOKEN_WEIGHTS = {"loss_ce_enc": 1, "loss_bbox_enc": 5, "loss_giou_enc": 2}  # what the stock loss lacks
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
    _, _, finish = matching_only(*inputs, case["online_cls"], case["online_bbox"])
    found = finish().scatter(torch.arange(60), (2, 3, 20), -1)
    by_class, by_id = case["match_category"][0], case["match_object"][0]
    rows = found.view(2, 3, 20) - torch.arange(0, 60, 20).view(1, 3, 1)
    queries = torch.full_like(by_class, -1).scatter_(2, rows, torch.arange(20).expand(2, 3, 20))
    assert torch.equal(queries, by_class) and not torch.equal(queries, by_id)


@pytest.mark.parametrize("counts", [[5, 3], [0, 4], [0, 0], [NUM_QUERIES + 3, 1]])
@pytest.mark.parametrize("auxiliary_loss", [True, False])
@pytest.mark.parametrize("name", WITH_QUERIES)
def test_loss_equals_the_stock_loss_in_one_process(name, auxiliary_loss, counts):
    if name == "yolos" and auxiliary_loss:
        pytest.skip("transformers cannot compute it")
    # Without denoising queries, which the stock loss of the oldest supported release takes for detections.
    fields = {"num_denoising": 0} if name in DENOISING else {}
    detector = tiny_detector(name, auxiliary_loss=auxiliary_loss, **fields).train()
    batch = random_batch(counts)
    stock, ours = run(detector, batch), run(use_correct_loss(detector), batch)
    torch.testing.assert_close(without_tokens(name, ours), stock.loss, rtol=1e-6, atol=1e-6)
    extra = set(TOKEN_WEIGHTS) if name in TWO_STAGE else set()
    assert ours.loss_dict.keys() - extra == stock.loss_dict.keys()
    for name, value in stock.loss_dict.items():
        torch.testing.assert_close(ours.loss_dict[name], value, rtol=1e-5, atol=1e-6)
    assert len(ours.auxiliary_outputs or []) == len(stock.auxiliary_outputs or [])
    for one, other in zip(ours.auxiliary_outputs or [], stock.auxiliary_outputs or [], strict=True):
        assert torch.equal(one["logits"], other["logits"]) and torch.equal(one["pred_boxes"], other["pred_boxes"])


@pytest.mark.parametrize("name", DENOISING)
def test_denoising_terms_equal_the_stock_ones(name):
    detector = tiny_detector(name).train()
    batch = random_batch([5, 3, 0])
    stock, ours = run(detector, batch), run(use_correct_loss(detector), batch)
    assert ours.loss_dict.keys() == stock.loss_dict.keys()
    terms = [term for term in stock.loss_dict if "_dn_" in term or "_aux_" in term]
    assert len(terms) == {"d_fine": 5 * 3 + 3, "deimv2": 5 * 3 + 3}.get(name, 3 * (2 + 2))
    # The oldest supported release counts denoising queries as detections, which changes the last layer's terms, and
    # through the union of all matchings in DEIMv2 the boxes' terms too.
    for term in terms:
        torch.testing.assert_close(ours.loss_dict[term], stock.loss_dict[term], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DENOISING)
def test_denoising_queries_do_not_enter_the_detection_terms(name):
    plain, denoised = tiny_detector(name).train(), tiny_detector(name).train()
    plain.config.num_denoising = 0
    batch = random_batch([5, 3])
    for detector in (plain, denoised):
        without_batch_statistics(detector)
    ours, expected = run(use_correct_loss(denoised), batch), run(use_correct_loss(plain), batch)
    for name, value in expected.loss_dict.items():
        torch.testing.assert_close(ours.loss_dict[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_gradients_equal_those_of_the_stock_loss(name):
    fields = {"num_denoising": 0} if name in DENOISING else {}
    gradients = []
    for install in (lambda detector: detector, use_correct_loss):
        detector = without_batch_statistics(install(tiny_detector(name, **fields).train()))
        without_tokens(name, run(detector, random_batch([5, 3]))).backward()
        gradients.append({n: p.grad for n, p in detector.named_parameters() if p.grad is not None and p.grad.any()})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-6 * largest)


def test_the_encoder_heads_of_a_two_stage_detector_learn():
    """transformers gives them no gradient. Tokens learn objectness at class 0, whatever the box's class."""
    # The heads are listed under the decoder, whose they are as well.
    heads = (
        "model.decoder.class_embed.2.",
        "model.decoder.bbox_embed.2.",
        "model.enc_output.",
        "model.enc_output_norm.",
    )
    trained = []
    for install in (lambda detector: detector, use_correct_loss):
        detector = install(tiny_detector("deformable_detr two-stage").train())
        outputs = run(detector, random_batch([5, 3]))
        outputs.loss.backward()
        parameters = dict(detector.named_parameters()).items()
        trained.append([n for n, p in parameters if n.startswith(heads) and p.grad is not None])
    assert trained[0] == [] and len(trained[1]) == 2 + 6 + 2 + 2

    changed = random_batch([5, 3])
    for label in changed["labels"]:
        label["class_labels"] = (label["class_labels"] + 1) % 3
    other = run(detector, changed)
    assert torch.equal(other.loss_dict["loss_ce_enc"], outputs.loss_dict["loss_ce_enc"])
    assert not torch.equal(other.loss_dict["loss_ce"], outputs.loss_dict["loss_ce"])


def test_token_terms_equal_a_hand_written_loss():
    detector = use_correct_loss(tiny_detector("deformable_detr two-stage").eval())
    batch = random_batch([2], size=128)
    outputs = detector(**batch)
    logits, boxes = outputs.enc_outputs_class[0], outputs.enc_outputs_coord_logits[0].sigmoid()
    targets = batch["labels"][0]["boxes"]
    prob = logits[:, :1].sigmoid()
    focal = 0.25 * (1 - prob) ** 2 * -(prob + 1e-8).log() - 0.75 * prob**2 * -(1 - prob + 1e-8).log()
    giou = iou_and_giou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(targets))[1]
    l1 = (boxes[:, None] - targets).abs().sum(-1)
    cost = detector.config.class_cost * focal + detector.config.bbox_cost * l1 - detector.config.giou_cost * giou
    query, column = linear_sum_assignment(cost.detach().numpy())
    torch.testing.assert_close(outputs.loss_dict["loss_bbox_enc"], l1[query, column].sum() / 2)
    torch.testing.assert_close(outputs.loss_dict["loss_giou_enc"], (1 - giou[query, column]).sum() / 2)
    target = torch.zeros_like(logits)
    target[query, 0] = 1
    expected = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2, reduction="sum") / 2
    torch.testing.assert_close(outputs.loss_dict["loss_ce_enc"], expected)


def test_a_two_stage_detector_can_be_copied_with_its_loss():
    detector = use_correct_loss(tiny_detector("deformable_detr two-stage").eval())
    twin, batch = copy.deepcopy(detector), random_batch([2], size=128)
    with torch.no_grad():
        twin.model.enc_output.weight.mul_(2)
        one, other = detector(**batch), twin(**batch)
    assert one.loss_dict["loss_ce_enc"] != other.loss_dict["loss_ce_enc"]


@pytest.mark.parametrize("name", ["lw_detr", "rf_detr"])
def test_loss_in_evaluation_mode_is_that_of_the_one_group(name):
    """The stock loss splits it into groups all the same, and so matches every object several times."""
    detector, batch = tiny_detector(name).eval(), random_batch([5, 3])
    with torch.no_grad():
        stock = detector(**batch)
        detector.config.group_detr = 1
        right = detector(**batch)
        detector.config.group_detr = 3
        ours = use_correct_loss(detector)(**batch)
    torch.testing.assert_close(ours.loss, right.loss, rtol=1e-6, atol=1e-6)
    assert abs(stock.loss - right.loss) > 0.05 * right.loss


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_momentum_matching_is_that_of_the_loss(name):
    detector = tiny_detector(name).eval()
    layers = 1 if family_of(detector.config).contrasts == "last" or not detector.config.auxiliary_loss else 2
    batch = random_batch([5, 3])
    with torch.no_grad():
        full = use_correct_loss(detector, loss_and_matching)(**batch).auxiliary_outputs
        only = use_correct_loss(detector, matching_only)(**batch)
    assert only.loss is None
    # Without the encoder's proposals.
    assert full.layer.max() == layers - 1 and len(full.layer) == layers * 8
    assert all(torch.equal(one, other) for one, other in zip(full, only.auxiliary_outputs(), strict=True))


@pytest.mark.parametrize("name", WITH_QUERIES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -0.1])
def test_an_impossible_box_is_named(name, value):
    detector, batch = use_correct_loss(tiny_detector(name).train()), random_batch([2, 3], size=64)
    batch["labels"][1]["boxes"][2, 3] = value
    # Denoising queries of a two-stage detector are made of the boxes before the loss sees them.
    with pytest.raises(ValueError, match="box 2 of image 1 of the batch is"):
        run(detector, batch)


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_predictions_that_are_not_finite_do_not_crash(name):
    detector, batch = use_correct_loss(tiny_detector(name).eval()), random_batch([2, 3])
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.fill_(torch.nan)
        assert detector(**batch).loss.isnan()


def test_unknown_family_is_refused():
    from transformers import GroundingDinoConfig

    with pytest.raises(ValueError, match="'grounding-dino' are not supported"):
        use_correct_loss(type("Detector", (), {"config": GroundingDinoConfig()}))


def test_every_family_has_a_stock_loss_to_compare_with():
    for model_type in WITH_QUERIES:
        assert tiny_detector(model_type).loss_type in LOSS_MAPPING


def without_batch_statistics(detector):
    """Those of a tiny random network on two images magnify rounding beyond measure."""
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return detector


def without_tokens(name, outputs):
    """The loss without the terms that a two-stage detector has beyond those of transformers."""
    if name not in TWO_STAGE:
        return outputs.loss
    return outputs.loss - sum(
        weight * outputs.loss_dict[term] for term, weight in TOKEN_WEIGHTS.items() if term in outputs.loss_dict
    )


def run(detector, batch):
    torch.manual_seed(1)  # dropout and denoising noise
    return detector(**batch)


def test_labels_helper_counts_ids_through_the_batch():
    assert torch.cat([label["proposal_ids"] for label in random_labels([2, 0, 3])]).tolist() == [0, 1, 2, 3, 4]


class Waits(TorchDispatchMode):
    """Records the operators for which a GPU's user would have to wait: their result decides what comes next."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        by_mask = operator is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or operator.overloadpacket in (
            aten._local_scalar_dense,
            aten.nonzero,
            aten._unique2,
            aten.unique_dim,
        ):
            self.found.append(str(operator))
        return operator(*args, **(kwargs or {}))


# DEIMv2 unites the matchings of its layers on the CPU, where they are made.
@pytest.mark.parametrize("name", [name for name in WITH_QUERIES if name != "deimv2"])
def test_nothing_but_the_matching_waits_for_the_device(name, monkeypatch):
    detector, inputs = tiny_detector(name).train(), {}
    detector.loss_function = lambda *args, **kwargs: (inputs.update(args=args, kwargs=kwargs), {}, None)
    detector(**random_batch())
    # On a CPU it looks at the smallest and the largest value.
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda classes, count: torch.eye(count).long()[classes])
    with Waits() as waits:
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    assert len(waits.found) == 2
    with Waits() as waits:
        for loss_function in (loss_and_matching, matching_only):
            loss_function(*inputs["args"], **inputs["kwargs"])
    assert not waits.found


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr", "d_fine", "deimv2", "lw_detr"])
def test_boxes_weigh_and_ignored_ones_are_not_background(name):
    """One of each class loss. Weights of one change nothing, those of zero take a box out of every sum."""
    detector = use_correct_loss(tiny_detector(name)).eval()
    batch = random_batch()
    ones = [label | {"weights": torch.ones(len(label["boxes"]))} for label in batch["labels"]]
    plain, weighted = (detector(**batch | {"labels": labels}) for labels in (batch["labels"], ones))
    torch.testing.assert_close(weighted.loss, plain.loss)

    def terms(labels):
        return {key: float(value) for key, value in detector(**batch | {"labels": labels}).loss_dict.items()}

    halves = terms([label | {"weights": torch.full((len(label["boxes"]),), 0.5)} for label in batch["labels"]])
    nothing = terms([label | {"weights": torch.zeros(len(label["boxes"]))} for label in batch["labels"]])
    whole = terms(batch["labels"])
    for term in ("loss_bbox", "loss_giou"):
        assert halves[term] == pytest.approx(whole[term] / 2, rel=1e-5) and nothing[term] == 0
    class_term = next(term for term in ("loss_ce", "loss_vfl", "loss_mal") if term in whole)
    if name != "detr":  # whose class loss is a mean by weights
        assert halves[class_term] == pytest.approx((whole[class_term] + nothing[class_term]) / 2, rel=1e-5)

    # Where the detector sees something, ignore just that: its queries there learn nothing any more.
    seen = detector(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    empty = [{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.int64)}] * 2
    ignored = [label | {"ignored_boxes": boxes.detach()} for label, boxes in zip(empty, seen.pred_boxes, strict=True)]
    assert terms(empty)[class_term] > 0 and terms(ignored)[class_term] == 0
