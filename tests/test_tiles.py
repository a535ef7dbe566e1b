"""Tiles cover an image, and what is found in them becomes one list: numbers by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.evaluation.tiles import merge_views, tile_corners


def view(*objects):
    """Detections from (box, score, label)."""
    boxes, scores, labels = zip(*objects, strict=True) if objects else ((), (), ())
    return {
        "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "scores": np.array(scores, dtype=np.float32),
        "labels": np.array(labels, dtype=np.int64),
    }


def test_corners_by_hand():
    assert tile_corners(100, 250, 100, 0.0).tolist() == [[0, 0, 100, 100], [75, 0, 175, 100], [150, 0, 250, 100]]
    assert tile_corners(50, 60, 100).tolist() == [[0, 0, 60, 50]]
    assert tile_corners(180, 100, 100, 0.2).tolist() == [[0, 0, 100, 100], [0, 80, 100, 180]]


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(16, 300), st.floats(0, 0.9))
def test_tiles_cover_every_pixel_with_the_overlap(height, width, size, overlap):
    corners = tile_corners(height, width, size, overlap)
    for low, high, length in ((corners[:, 0], corners[:, 2], width), (corners[:, 1], corners[:, 3], height)):
        starts, ends = np.unique(low), np.unique(high)
        assert starts[0] == 0 and ends[-1] == length and (ends - starts == min(size, length)).all()
        assert (ends[:-1] - starts[1:] >= np.floor(overlap * size) - 1).all()


def test_an_object_in_two_tiles_is_reported_once():
    corners = np.array([[0, 0, 100, 100], [60, 0, 160, 100]])
    # 70..90 in the image: in the second tile 10..30
    views = [view(([70, 20, 90, 40], 0.8, 1)), view(([10, 20, 30, 40], 0.9, 1), ([50, 50, 70, 70], 0.5, 0))]
    merged = merge_views(views, corners, (100, 160))
    assert merged["boxes"].tolist() == [[70, 20, 90, 40], [110, 50, 130, 70]]
    assert merged["scores"].tolist() == pytest.approx([0.9, 0.5]) and merged["labels"].tolist() == [1, 0]


def test_other_classes_and_boxes_of_one_view_stay():
    corners = np.array([[0, 0, 100, 100], [60, 0, 160, 100]])
    same = [70, 20, 90, 40]
    views = [view((same, 0.8, 1), (same, 0.7, 1)), view(([10, 20, 30, 40], 0.6, 2))]
    assert merge_views(views, corners, (100, 160))["labels"].tolist() == [1, 1, 2]


def test_a_part_at_the_edge_of_a_tile_gives_way_to_the_whole_even_with_a_higher_score():
    corners = np.array([[0, 0, 100, 100], [60, 0, 160, 100], [0, 0, 160, 100]])
    # an object of 80..120 is cut at 100 by the first tile; the second and the whole image see all of it
    views = [view(([80, 20, 100, 40], 0.95, 1)), view(([20, 20, 60, 40], 0.7, 1)), view(([80, 20, 120, 40], 0.6, 1))]
    merged = merge_views(views, corners, (100, 160))
    assert merged["boxes"].tolist() == [[80, 20, 120, 40]] and merged["scores"].tolist() == pytest.approx([0.7])
    # at the edge of the image nothing is cut
    at_border = merge_views([view(([0, 20, 20, 40], 0.9, 1)), view(), view()], corners, (100, 160))
    assert at_border["boxes"].tolist() == [[0, 20, 20, 40]]


def test_a_small_object_inside_a_large_one_of_its_class_stays():
    corners = np.array([[0, 0, 100, 100], [0, 0, 200, 200]])
    views = [view(([40, 40, 50, 50], 0.6, 1)), view(([10, 10, 190, 190], 0.9, 1))]
    assert len(merge_views(views, corners, (200, 200))["boxes"]) == 2


def test_nothing_found():
    merged = merge_views([view(), view()], np.array([[0, 0, 9, 9], [5, 0, 14, 9]]), (9, 14))
    assert merged["boxes"].shape == (0, 4) and len(merged["scores"]) == 0
