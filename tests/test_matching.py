import itertools
import threading

import golden_cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf import matching as matching_module
from aligndet_hf.boxes import cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh
from aligndet_hf.matching import match_queries, start_matching


def random_boxes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    size = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.05
    return torch.cat([torch.rand(*shape, 2, generator=generator), size], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden_cases.names("b"))
@pytest.mark.parametrize("view", ["online", "target"])
def test_matching_equals_the_official_category_matching(name, view, dtype):
    info, case = golden_cases.load(name, dtype)
    sizes = case["num_proposals"].tolist()
    extent = case[f"{view}_img_shape"].flip(-1).repeat(1, 2)  # (w, h, w, h) of every image
    boxes = [
        xyxy_to_cxcywh(box) / size for box, size in zip(case[f"{view}_gt_bboxes"].split(sizes), extent, strict=True)
    ]
    matching = match_queries(case[f"{view}_cls"], case[f"{view}_bbox"], case["gt_labels"].split(sizes), boxes)
    official = case["match_category"][["online", "target"].index(view)]  # [layers, images, proposals] -> query
    expected = [
        (layer, image, official[layer, image, row].item(), sum(sizes[:image]) + row)
        for layer, image in itertools.product(range(len(official)), range(len(sizes)))
        for row in range(sizes[image])
        if official[layer, image, row] >= 0
    ]
    assert sorted(zip(*(index.tolist() for index in matching), strict=True)) == sorted(expected)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    activation=st.sampled_from(["softmax", "sigmoid", "focal"]),
    seed=st.integers(0, 1000),
)
def test_matching_has_the_least_cost_of_all_assignments(sizes, activation, seed):
    generator = torch.Generator().manual_seed(seed)
    num_queries = 4
    logits = torch.randn(2, len(sizes), num_queries, 5, generator=generator)
    boxes = random_boxes(2, len(sizes), num_queries, generator=generator)
    classes = [torch.randint(0, 4, (size,), generator=generator) for size in sizes]
    targets = [random_boxes(size, generator=generator) for size in sizes]
    matching = match_queries(logits, boxes, classes, targets, class_activation=activation)

    def cost(layer, image, query, row):
        score = logits[layer, image, query]
        if activation == "softmax":
            class_term = -score.softmax(-1)[classes[image][row]]
        else:
            p = score.sigmoid()[classes[image][row]]
            focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            class_term = -p if activation == "sigmoid" else focal
        box, target = boxes[layer, image, query], targets[image][row]
        _, giou = iou_and_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target))
        return (class_term + 5 * (box - target).abs().sum() - 2 * giou).item()

    offsets = np.cumsum([0, *sizes])
    found = list(zip(*(index.tolist() for index in matching), strict=True))
    assert len(found) == 2 * sum(sizes)
    for layer, image in itertools.product(range(2), range(len(sizes))):
        pairs = [(q, t - offsets[image]) for la, im, q, t in found if (la, im) == (layer, image)]
        assert sorted(row for _, row in pairs) == list(range(sizes[image]))
        total = sum(cost(layer, image, query, row) for query, row in pairs)
        orders = itertools.permutations(range(num_queries), sizes[image])
        best = min(sum(cost(layer, image, q, row) for row, q in enumerate(order)) for order in orders)
        assert total == pytest.approx(best, abs=1e-5)


def test_more_boxes_than_queries_leaves_boxes_unmatched():
    generator = torch.Generator().manual_seed(0)
    targets = random_boxes(5, generator=generator)
    boxes = targets[None, None, [3, 1]]
    matching = match_queries(torch.zeros(1, 1, 2, 2), boxes, [torch.zeros(5, dtype=torch.long)], [targets])
    assert matching.query.tolist() == [0, 1] and matching.target.tolist() == [3, 1]


def test_invalid_predictions_are_matched_last():
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(1, 1, 3, generator=generator)
    boxes[0, 0, 0] = float("nan")
    boxes[0, 0, 1] = float("inf")
    target = boxes[0, 0, 2:].clone()
    matching = match_queries(torch.zeros(1, 1, 3, 2), boxes, [torch.zeros(1, dtype=torch.long)], [target])
    assert matching.query.tolist() == [2]


def test_batch_without_boxes_has_an_empty_matching():
    none = [torch.zeros(0, dtype=torch.long)] * 2, [torch.zeros(0, 4)] * 2
    matching = match_queries(torch.zeros(3, 2, 4, 2), torch.rand(3, 2, 4, 4), *none)
    assert all(len(index) == 0 for index in matching)
    assert torch.equal(matching.scatter(torch.zeros(0), (3, 2, 4), -1), torch.full((3, 2, 4), -1.0))


def test_scatter_and_a_part_of_the_layers():
    generator = torch.Generator().manual_seed(0)
    targets = random_boxes(2, generator=generator)
    boxes = torch.stack([targets, targets.flip(0)])[:, None]
    classes = [torch.zeros(2, dtype=torch.long)]
    matching = match_queries(torch.zeros(2, 1, 2, 2), boxes, classes, [targets])
    values = matching.scatter(torch.tensor([7, 9]), (2, 1, 2), -1)
    assert values.tolist() == [[[7, 9]], [[9, 7]]]
    first = matching.layers(0, 1, of=2)
    assert first.layer.tolist() == [0, 0] and first.target.tolist() == [0, 1]
    second = matching.layers(1, 2, of=2)
    assert second.layer.tolist() == [0, 0] and second.queries[1].tolist() == first.queries[1].tolist()


def test_threads_and_a_late_finish_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(3, 4, 12, 5, generator=generator), random_boxes(3, 4, 12, generator=generator)
    classes = [torch.zeros(size, dtype=torch.long) for size in (5, 0, 12, 1)]
    targets = [random_boxes(len(each), generator=generator) for each in classes]
    serial = match_queries(logits, boxes, classes, targets)
    finish = start_matching(logits, boxes, classes, targets)
    logits.zero_()  # the costs were computed when the matching was started
    monkeypatch.setattr(matching_module, "PARALLEL_COSTS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    threads = []
    solve = matching_module.linear_sum_assignment
    monkeypatch.setattr(
        matching_module, "linear_sum_assignment", lambda cost: (threads.append(threading.get_ident()), solve(cost))[1]
    )
    assert all(torch.equal(one, other) for one, other in zip(serial, finish(), strict=True))
    assert len(serial.layer) == 3 * (5 + 12 + 1) and threading.get_ident() not in threads
