"""Filters, NMS and selection of proposals; the golden cases come from SoCo's own code."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.proposals.filters import (
    borders_touched,
    box_iou,
    filter_proposals,
    nms,
    parse_strategy,
    select_proposals,
    unique_boxes,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "f_filters.json").read_text())
CASES = [(index, strategy) for index, case in enumerate(GOLDEN) for strategy in case["kept"]]


def random_boxes(seed: int, number: int, side: float = 100) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, side, (number, 2)), rng.uniform(1, side, (number, 2))], axis=1)


@pytest.mark.parametrize(("index", "strategy"), CASES)
def test_golden_strategies(index, strategy):
    case = GOLDEN[index]
    mask = filter_proposals(np.array(case["rects_xywh"]), case["image_hw"], **parse_strategy(strategy))
    assert np.flatnonzero(mask).tolist() == case["kept"][strategy]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_post_rule(case):
    mask = filter_proposals(np.array(case["rects_xywh"]), case["image_hw"], **parse_strategy("ratio3size0308post"))
    assert np.flatnonzero(mask).tolist() == case.get("after_post", case["kept"]["ratio3size0308"])


def test_filter_defaults_bound_only_the_ratio():
    boxes = [[0, 0, 1, 1], [0, 0, 3, 1], [0, 0, 1, 3], [0, 0, 3.01, 1], [0, 0, 10, 20], [5, 5, 0, 4], [5, 5, 4, 0]]
    assert filter_proposals(boxes, (20, 10)).tolist() == [True, True, True, False, True, False, False]


def test_filter_of_no_boxes():
    assert filter_proposals(np.zeros((0, 4)), (10, 10), relax_if_empty=True).shape == (0,)


def test_bounds_are_inclusive():
    boxes = [[0, 0, 99, 33], [0, 0, 33, 99], [0, 0, 50, 50], [0, 0, 100, 100]]
    bounds = {"min_side": 33, "min_relative_size": 0.25, "max_relative_size": 0.5}
    assert filter_proposals(boxes, (200, 200), **bounds).tolist() == [True, True, True, True]
    tighter = {"min_side": 34, "min_relative_size": 0.251, "max_relative_size": 0.499}
    for name, kept in zip(tighter, [[2, 3], [0, 1, 3], [0, 1, 2]], strict=True):
        mask = filter_proposals(boxes, (200, 200), **{**bounds, name: tighter[name]})
        assert np.flatnonzero(mask).tolist() == kept


def test_borders_by_hand():
    boxes = [
        [10, 10, 50, 20],
        [1, 10, 50, 20],
        [2.1, 10, 50, 20],
        [0, 1, 50, 20],
        [390, 50, 10, 49.5],
        [0, 0, 400, 100],
    ]
    # 0.5 % of an image of 400 x 100 pixels: 2 pixels at the sides, half a pixel above and below.
    assert borders_touched(np.array(boxes, float), (100, 400)).tolist() == [0, 1, 0, 1, 2, 4]
    for most, kept in ((0, [0, 2]), (1, [0, 1, 2, 3]), (4, [0, 1, 2, 3, 4, 5])):
        mask = filter_proposals(boxes, (100, 400), max_aspect_ratio=float("inf"), max_borders=most)
        assert np.flatnonzero(mask).tolist() == kept
    assert filter_proposals(boxes[4:], (100, 400), 9, max_borders=1, relax_if_empty=True).tolist() == [True, True]


@pytest.mark.parametrize("strategy", ["", "ratio", "size3", "ratio3size0308pos", "post3", "Ratio3"])
def test_unknown_strategies_are_refused(strategy):
    with pytest.raises(ValueError, match="filter strategy"):
        parse_strategy(strategy)


def test_iou_by_hand():
    iou = box_iou(
        np.array([0, 0, 10, 10.0]), np.array([[0, 0, 10, 10.0], [5, 0, 10, 10], [10, 0, 5, 5], [2, 2, 5, 4]])
    )
    np.testing.assert_allclose(iou, [1, 50 / 150, 0, 0.2])


def test_nms_by_hand():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 5, 5]], float)
    # IoU with the best box (9 high): 0.9 with the 10 high, 8/9 with the 8 high; those two overlap by 0.8.
    assert nms(boxes, [0.5, 0.9, 0.7, 0.6], 0.85).tolist() == [1, 3]
    assert nms(boxes, [0.5, 0.9, 0.7, 0.6], 0.89).tolist() == [1, 2, 3]
    assert nms(boxes, [0.5, 0.9, 0.7, 0.6], 0.9).tolist() == [1, 2, 3, 0]
    assert nms(boxes, [0.5, 0.9, 0.7, 0.6], 0.9, max_boxes=2).tolist() == [1, 2]
    assert nms(boxes, [1, 1, 1, 1], 0.85).tolist() == [0, 2, 3]  # ties: the earlier box wins
    assert nms(np.zeros((0, 4)), [], 0.5).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.floats(0.05, 0.95))
def test_nms_keeps_exactly_the_boxes_no_better_one_covers(seed, number, threshold):
    boxes = random_boxes(seed, number)
    scores = np.random.default_rng(seed).integers(0, 5, number)
    kept = nms(boxes, scores, threshold).tolist()
    assert (np.diff(scores[kept]) <= 0).all()
    for index in range(number):
        better = [k for k in kept if (-scores[k], k) < (-scores[index], index)]
        covered = bool(better) and box_iou(boxes[index], boxes[better]).max() > threshold
        assert covered == (index not in kept)


def test_unique_boxes_depend_on_the_set_only():
    boxes = random_boxes(0, 20).round(-1)
    shuffled = np.concatenate([boxes, boxes[:7]])[np.random.default_rng(1).permutation(27)]
    np.testing.assert_array_equal(unique_boxes(boxes), unique_boxes(shuffled))
    assert len(np.unique(unique_boxes(shuffled), axis=0)) == len(unique_boxes(shuffled))


def test_selection_filters_first_then_suppresses_then_cuts():
    boxes = np.array([[0, 0, 90, 9], [0, 0, 20, 20], [0, 0, 20, 19], [40, 40, 20, 20], [70, 70, 10, 10], [0, 0, 3, 3]])
    scores = np.array([9, 8, 7, 6, 5, 99])
    kept, kept_scores = select_proposals(boxes, scores, (100, 100))
    assert kept.dtype == kept_scores.dtype == np.float32
    assert kept.tolist() == boxes[[1, 3, 4]].tolist() and kept_scores.tolist() == [8, 6, 5]
    assert select_proposals(boxes, scores, (100, 100), max_boxes=1)[1].tolist() == [8]
    assert select_proposals(boxes, scores, (100, 100), nms_threshold=1.0, max_boxes=None)[1].tolist() == [8, 7, 6, 5]
    # Only the long box is left: the ratio gives way, min_side does not.
    assert select_proposals(boxes[:1], scores[:1], (100, 100))[0].tolist() == [[0, 0, 90, 9]]
    assert select_proposals(boxes[:1], scores[:1], (100, 100), relax_if_empty=False)[0].shape == (0, 4)
    assert select_proposals(boxes[:1], scores[:1], (100, 100), min_side=10)[0].shape == (0, 4)
