"""Random boxes and a grid: seeded, inside the image, of the announced sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.proposals.controls import grid_boxes, random_boxes

SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(0, 2**32))
def test_controls_lie_inside_the_image(size, seed):
    for boxes in (random_boxes(size, 40, seed), grid_boxes(size)[:500]):
        assert boxes.dtype == np.float32 and boxes.shape[1] == 4
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size[::-1]) * (1 + 1e-6)).all()


def test_random_boxes_are_a_function_of_the_seed():
    boxes = random_boxes((200, 300), 100, 3)
    np.testing.assert_array_equal(boxes, random_boxes((200, 300), 100, 3))
    np.testing.assert_array_equal(boxes[:10], random_boxes((200, 300), 10, 3))
    assert not np.array_equal(boxes, random_boxes((200, 300), 100, 4))
    assert random_boxes((200, 300), 0, 3).shape == (0, 4)


def test_random_boxes_have_the_announced_shapes():
    boxes = random_boxes((300, 300), 20000, 0)
    relative = np.sqrt(boxes[:, 2:].prod(axis=1)) / 300
    ratio = boxes[:, 2] / boxes[:, 3]
    assert 0.039 < relative.min() < 0.042 and 0.9 < relative.max() <= 1
    assert 1 / 3 - 1e-3 < ratio.min() < 0.34 and 2.9 < ratio.max() < 3 + 1e-3
    assert np.median(relative) == pytest.approx(0.2, abs=0.01)  # the geometric mean of 0.04 and 1
    centres = (boxes[:, :2] + boxes[:, 2:] / 2).mean(axis=0)
    np.testing.assert_allclose(centres, 150, atol=2)


def test_grid_is_large_first_and_covers_the_image():
    boxes = grid_boxes((200, 200))
    # 0.8 of the image in steps of half a box: two places along each side.
    np.testing.assert_allclose(boxes[:4], [[0, 0, 160, 160], [40, 0, 160, 160], [0, 40, 160, 160], [40, 40, 160, 160]])
    areas = boxes[:, 2:].prod(axis=1)
    assert (np.diff(np.round(areas)) <= 0).mean() > 0.99 and areas[0] > 60 * areas[-1]
    smallest = boxes[-9:]
    np.testing.assert_array_equal(boxes[:17], grid_boxes((200, 200), 17))
    np.testing.assert_allclose((smallest[:, :2] + smallest[:, 2:]).max(axis=0), 200, rtol=1e-6)
