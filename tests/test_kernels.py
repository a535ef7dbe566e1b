"""The compiled kernels against hand-computed cases, slow copies in plain Python, and OpenCV's conversions."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.proposals import kernels
from aligndet_hf.proposals.filters import box_iou

SEEDS = st.integers(0, 2**32)
ALL = np.array([1, 1, 1, 1])


def noise(seed: int, height: int, width: int, step: int = 1) -> np.ndarray:
    """A random uint8 image [height, width, 3] with values in multiples of `step`."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3)) // step * step
    return values.astype(np.uint8)


def edges_of(image: np.ndarray) -> np.ndarray:
    """The sorted edges `[E, 3]` of integers `[H, W, 3]`, none pruned."""
    return kernels.sort_edges(kernels.edge_weights(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.int32)))


def segment(image: np.ndarray, scale: float, min_size: int):
    """The labels `[H, W]` of a segmentation, and the pairs of neighbours."""
    height, width = image.shape[:2]
    ones, zeros = np.ones(height * width, np.int32), np.zeros(height * width, np.int32)
    labels, sizes, _, edges = kernels.join_regions(ones, zeros, edges_of(image), scale)
    joined, number, neighbours = kernels.absorb_small(sizes, edges, min_size)
    assert number == joined.max() + 1
    return joined[labels].reshape(height, width), neighbours


# ---- pixels


def test_shrinking_averages_areas():
    image = np.array([[0, 10, 20], [30, 40, 50]], dtype=np.uint8)[:, :, None] + np.array([0, 100, 200], dtype=np.uint8)
    assert kernels.resize_area(image, 1, 1).tolist() == [[[25, 125, 225]]]
    assert kernels.resize_area(image, 2, 1)[:, :, 0].tolist() == [[10], [40]]
    # Two columns of one and a half each: (0 + 10 / 2) / 1.5 = 3.33 and (20 + 10 / 2) / 1.5 = 16.67.
    assert kernels.resize_area(image, 2, 2)[:, :, 2].tolist() == [[203, 217], [233, 247]]
    np.testing.assert_array_equal(kernels.resize_area(image, 2, 3), image)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 1), st.floats(0.1, 1))
def test_shrinking_follows_opencv(seed, height, width, scale_y, scale_x):
    image = noise(seed, height, width)
    new_height, new_width = max(1, round(height * scale_y)), max(1, round(width * scale_x))
    expected = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_AREA)
    assert abs(kernels.resize_area(image, new_height, new_width).astype(int) - expected).max() <= 1


def test_colour_spaces_follow_opencv():
    image = noise(0, 200, 200)
    hsv = kernels.to_hsv(image).astype(int) - cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    assert (abs((hsv[:, :, 0] + 128) % 256 - 128) <= 2).all() and (abs(hsv[:, :, 1:]) <= 1).all()
    lab = kernels.to_lab(image, *kernels.lab_tables()).astype(int) - cv2.cvtColor(image, cv2.COLOR_RGB2Lab)
    assert np.percentile(abs(lab), 99) <= 2 and abs(lab).mean() < 1
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    lab = kernels.to_lab(greys, *kernels.lab_tables()).astype(int)
    assert abs(lab[:, :, 1:] - 128).max() <= 1 and (np.diff(lab[0, :, 0]) >= 0).all() and lab[0, 255, 0] == 255


def test_smoothing_by_hand():
    image = np.zeros((3, 4, 2), dtype=np.uint8)
    image[1, 1, 0] = 10
    image[0, 3, 1] = 2
    first, second = kernels.smooth(image).tolist()
    assert first == [[10, 20, 10, 0], [20, 40, 20, 0], [10, 20, 10, 0]]
    assert second == [[0, 0, 6, 18], [0, 0, 2, 6], [0, 0, 0, 0]]  # the border is repeated
    for size in [(1, 3), (3, 1), (1, 1), (2, 2)]:
        assert (kernels.smooth(np.full((*size, 2), 7, dtype=np.uint8)) == 16 * 7).all()


def test_texture_tells_direction_and_strength():
    ramp = np.arange(0, 16 * 90, 16 * 10, dtype=np.int32)  # 10 grey levels a pixel: a difference of 320 in 16ths
    rising = np.tile(ramp, (9, 1))
    indices = [kernels.texture(np.ascontiguousarray(image))[4, 4] for image in (rising, rising[:, ::-1], rising.T)]
    assert [index % kernels.MAGNITUDES for index in indices] == [2, 2, 2]
    assert [index // kernels.MAGNITUDES for index in indices] == [0, 4, 1]
    assert kernels.texture(np.zeros((2, 3), dtype=np.int32)).tolist() == [[0] * 3] * 2


# ---- segmentation


def test_edges_by_hand():
    image = np.array([[[0, 0, 0], [3, 4, 0]], [[6, 8, 0], [0, 0, 0]]])
    none = kernels.NO_EDGE
    weights = kernels.edge_weights(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.int32))
    right, below, falling, rising = weights.tolist()
    assert right == [[5, none], [10, none]] and below == [[10, 5], [none, none]]
    assert falling == [[0, none], [none, none]] and rising == [[none, 5], [none, none]]
    assert edges_of(image).tolist() == [[0, 3, 0], [0, 1, 5], [1, 3, 5], [1, 2, 5], [2, 3, 10], [0, 2, 10]]
    # Triangles: (0 1 3) 5 5 0, (0 2 3) 10 10 0, (0 1 2) 5 10 5: loses 10, (1 2 3) 5 5 10: loses 10.
    kept = kernels.sort_edges(kernels.prune_edges(weights))
    assert kept.tolist() == [[0, 3, 0], [0, 1, 5], [1, 3, 5], [1, 2, 5]]
    assert edges_of(np.zeros((1, 1, 3))).shape == (0, 3)


def spanning_weight(edges: np.ndarray, number: int) -> tuple[int, int]:
    """Sum of weights and number of edges of a minimum spanning forest."""
    parent, total, count = list(range(number)), 0, 0
    for a, b, weight in edges.tolist():
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        if a != b:
            parent[a], total, count = b, total + weight, count + 1
    return total, count


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 32, 128]))
def test_pruning_keeps_a_minimum_spanning_tree(seed, height, width, step):
    planes = np.ascontiguousarray(noise(seed, height, width, step).transpose(2, 0, 1), dtype=np.int32)
    weights = kernels.edge_weights(planes)
    edges, kept = kernels.sort_edges(weights), kernels.sort_edges(kernels.prune_edges(weights))
    assert len(edges) == height * (width - 1) + width * (height - 1) + 2 * (height - 1) * (width - 1)
    assert {tuple(row) for row in kept.tolist()} <= {tuple(row) for row in edges.tolist()}
    assert spanning_weight(kept, height * width) == spanning_weight(edges, height * width)
    if min(height, width) > 2:
        assert len(kept) < 0.8 * len(edges)
    for some in (edges, kept):
        assert (np.diff(some[:, 2]) >= 0).all()


def test_two_halves_are_two_segments():
    image = np.zeros((6, 10, 3))
    image[:, 4:] = 80
    labels, neighbours = segment(image, scale=100, min_size=1)
    assert (labels[:, :4] == 0).all() and (labels[:, 4:] == 1).all() and neighbours.tolist() == [[0, 1]]
    # They are joined where the edge, 80 * sqrt(3) = 138.6, is no heavier than scale / size of both: 138 <= scale / 36.
    assert segment(image, scale=138 * 36 - 1, min_size=1)[0].max() == 1
    assert segment(image, scale=138 * 36, min_size=1)[0].max() == 0
    # ... and where one of them is too small.
    assert segment(image, scale=100, min_size=24)[0].max() == 1
    assert segment(image, scale=100, min_size=25)[0].max() == 0


def slow_segmentation(image, scale, min_size):
    """F. algorithm 1 with sets of pixels."""
    region = {pixel: frozenset([pixel]) for pixel in range(image.shape[0] * image.shape[1])}
    internal = dict.fromkeys(region.values(), 0)
    for final in (False, True):
        for first, second, weight in edges_of(image).tolist():
            a, b = region[first], region[second]
            small = min(len(a), len(b)) < min_size
            fits = all(weight <= np.float32(internal[r]) + np.float32(scale) / np.float32(len(r)) for r in (a, b))
            if a is not b and (small if final else fits):
                union = a | b
                internal[union] = weight
                region.update(dict.fromkeys(union, union))
    return set(region.values())


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 8), st.integers(1, 8), st.floats(1, 2000), st.integers(1, 12))
def test_segmentation_follows_the_paper(seed, height, width, scale, min_size):
    image = noise(seed, height, width, step=32)
    labels, neighbours = segment(image, scale, min_size)
    expected = slow_segmentation(image, scale, min_size)
    assert {
        frozenset(np.flatnonzero(labels.ravel() == label).tolist()) for label in range(labels.max() + 1)
    } == expected
    pairs = {frozenset(labels.ravel()[edge[:2]].tolist()) for edge in edges_of(image)}
    assert {frozenset(pair) for pair in neighbours.tolist()} == {pair for pair in pairs if len(pair) == 2}
    assert len(neighbours) == len({frozenset(pair) for pair in neighbours.tolist()})


def test_joining_continues_with_a_larger_scale():
    sizes, internal = np.array([10, 20, 40], np.int32), np.array([1, 2, 3], np.int32)
    edges = np.array([[0, 1, 5], [1, 2, 6]], np.int32)
    # 5 <= 1 + scale / 10 and 5 <= 2 + scale / 20: from 60. Then 6 <= 5 + scale / 30 and 6 <= 3 + scale / 40: from 120.
    for scale, expected, left in [
        (59, ([0, 1, 2], [10, 20, 40], [1, 2, 3]), [[0, 1, 5], [1, 2, 6]]),
        (60, ([0, 0, 1], [30, 40], [5, 3]), [[0, 1, 6]]),
        (119, ([0, 0, 1], [30, 40], [5, 3]), [[0, 1, 6]]),
        (120, ([0, 0, 0], [70], [6]), []),
    ]:
        *found, found_left = kernels.join_regions(sizes, internal, edges, scale)
        assert tuple(values.tolist() for values in found) == expected and found_left.tolist() == left


def described(labels: np.ndarray, image: np.ndarray):
    gradients = kernels.texture(kernels.smooth(image)[0])
    return kernels.describe_regions(labels.ravel(), int(labels.max()) + 1, image, gradients)


def test_joined_descriptions_are_those_of_the_joined_regions():
    image = noise(1, 20, 30)
    labels = np.repeat(np.repeat(np.arange(6, dtype=np.int32).reshape(2, 3), 10, axis=0), 10, axis=1)
    mapping = np.array([0, 0, 1, 2, 0, 1], np.int32)
    sizes, boxes, counts = kernels.join_descriptions(mapping, 3, *described(labels, image))
    for actual, expected in zip((sizes, boxes, counts), described(mapping[labels], image), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert counts[:, : kernels.COLOUR_BINS].sum(axis=1).tolist() == sizes.tolist()


# ---- grouping


def three_columns(seed: int = 0):
    """Regions 0, 1 (alike) and 2 (unlike) side by side in an image of 10 x 30."""
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20], image[:, 20:] = 10, 200
    labels = np.repeat(np.arange(3, dtype=np.int32), 10)[None].repeat(10, axis=0)
    return described(labels, image), np.array([[0, 1], [1, 2]], np.int32)


def test_the_most_alike_are_joined_first():
    regions, neighbours = three_columns()
    boxes, sizes, made, used, parents = kernels.group_regions(*regions, neighbours, 300, np.array([1, 0, 0, 0]))
    assert boxes.tolist() == [[0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10], [0, 0, 20, 10], [0, 0, 30, 10]]
    assert sizes.tolist() == [100, 100, 100, 200, 300] and parents.tolist() == [3, 3, 4, 4, -1]
    one = pytest.approx(kernels.ONE, abs=3)  # the same colour bins
    assert made.tolist() == [-1, -1, -1, one, 0] and used.tolist() == [one, one, 0, 0, -1]


@pytest.mark.parametrize("weights, expected", [((0, 0, 1, 0), 1 / 3), ((0, 0, 0, 1), 1), ((0, 0, 1, 1), 4 / 3)])
def test_similarity_in_size_and_fill_by_hand(weights, expected):
    (sizes, boxes, counts), neighbours = three_columns()
    made = kernels.group_regions(sizes, boxes, counts, neighbours, 300, np.array(weights))[2]
    assert made[3] == pytest.approx(expected * kernels.ONE, abs=2)
    # Half of the hull of two neighbours is empty: (400 - 200) / 300 of the image.
    boxes[1, 3] = 20
    made = kernels.group_regions(sizes, boxes, counts, neighbours[:1], 300, np.array([0, 0, 0, 1]))[2]
    assert made[3] == pytest.approx(kernels.ONE / 3, abs=2)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([(1, 1, 1, 1), (0, 1, 1, 1), (0, 0, 0, 1), (1, 0, 0, 0)]))
def test_grouping_always_takes_the_most_similar_pair(seed, weights):
    image = cv2.resize(noise(seed, 6, 6), (48, 36), interpolation=cv2.INTER_NEAREST)
    labels, neighbours = segment(image, 3000, 10)
    (sizes, boxes, counts), area = described(labels, image), labels.size
    found = kernels.group_regions(sizes, boxes, counts, neighbours, area, np.array(weights))

    def similarity(a, b):
        (size_a, box_a, counts_a), (size_b, box_b, counts_b) = a, b
        common = np.minimum(counts_a / size_a, counts_b / size_b)
        colours = 3 * kernels.COLOUR_BINS
        hull = np.prod(np.maximum(box_a[2:], box_b[2:]) - np.minimum(box_a[:2], box_b[:2]))
        terms = [common[:colours].sum() / 3, common[colours:].sum(), 1 - (size_a + size_b) / area]
        return np.dot(weights, [*terms, 1 - (hull - size_a - size_b) / area])

    present = {i: (sizes[i], boxes[i], counts[i]) for i in range(len(sizes))}
    edges = {frozenset(map(int, pair)) for pair in neighbours}
    for node in range(len(sizes), len(found[0])):
        a, b = (int(i) for i in np.flatnonzero(found[4] == node))
        values = {pair: similarity(*(present[i] for i in pair)) for pair in edges}
        assert values[frozenset([a, b])] >= max(values.values()) - 0.006  # fixed point against exact
        assert found[2][node] / kernels.ONE == pytest.approx(values[frozenset([a, b])], abs=0.006)
        (size_a, box_a, counts_a), (size_b, box_b, counts_b) = present.pop(a), present.pop(b)
        hull = np.concatenate([np.minimum(box_a[:2], box_b[:2]), np.maximum(box_a[2:], box_b[2:])])
        present[node] = (size_a + size_b, hull, counts_a + counts_b)
        assert found[0][node].tolist() == hull.tolist() and found[1][node] == size_a + size_b
        edges = {frozenset(node if i in (a, b) else i for i in pair) for pair in edges - {frozenset([a, b])}}
    assert len(present) == 1 and len(found[0]) == 2 * len(sizes) - 1


# ---- boxes


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 80))
def test_votes_count_hierarchies(seed, number):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.integers(0, 4, (number, 2)), rng.integers(8, 14, (number, 2))], axis=1)
    boxes = boxes[np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")]
    holders = rng.integers(1, 2**5, number)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(float)
    expected = [int(np.bitwise_or.reduce(holders[box_iou(box, xywh) >= 0.75 - 1e-12])).bit_count() for box in xywh]
    assert kernels.collect_votes(boxes, holders).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 60), st.floats(0, 1), st.sampled_from([0, 1, 7, 1000]))
def test_suppression_equals_its_numpy_form(seed, number, threshold, max_boxes):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.integers(0, 9, (number, 2)), rng.integers(0, 9, (number, 2))], axis=1).astype(float)
    remaining, kept = rng.permutation(number), []
    order = remaining.copy()
    while remaining.size and len(kept) < max_boxes:
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        remaining = remaining[box_iou(boxes[best], boxes[remaining]) <= threshold]
    assert kernels.suppress(boxes, order, threshold, max_boxes).tolist() == kept
