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


def segment(image: np.ndarray, scale: float, min_size: int, diagonals: bool = True):
    """`segment_pixels` of integers `[H, W, C]`, the labels as an image."""
    weights = kernels.edge_weights(image.astype(np.int32), diagonals)
    order, starts = kernels.sort_edges(weights)
    height, width = image.shape[:2]
    labels, internal, neighbours = kernels.segment_pixels(
        order, starts, weights.shape[1], width, height * width, scale, min_size
    )
    return labels.reshape(height, width), internal, neighbours


# ---- pixels


def test_shrinking_averages_areas():
    image = np.array([[0, 10, 20], [30, 40, 50]], dtype=np.uint8)[:, :, None]
    assert kernels.resize_area(image, 1, 1).ravel().tolist() == [25]
    assert kernels.resize_area(image, 2, 1).ravel().tolist() == [10, 40]
    # Two columns of one and a half each: (0 + 10 / 2) / 1.5 = 3.33 and (20 + 10 / 2) / 1.5 = 16.67.
    assert kernels.resize_area(image, 2, 2).ravel().tolist() == [3, 17, 33, 47]
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
    image = np.zeros((3, 4, 1), dtype=np.uint8)
    image[1, 1] = 10
    assert kernels.smooth(image)[:, :, 0].tolist() == [[10, 20, 10, 0], [20, 40, 20, 0], [10, 20, 10, 0]]
    assert (kernels.smooth(np.full((1, 3, 2), 7, dtype=np.uint8)) == 16 * 7).all()


def test_texture_tells_direction_and_strength():
    ramp = np.arange(0, 16 * 90, 16 * 10, dtype=np.int32)  # 10 grey levels a pixel: a difference of 320 in 16ths
    rising = np.tile(ramp, (9, 1))
    indices = [kernels.texture(np.ascontiguousarray(image))[4, 4] for image in (rising, rising[:, ::-1], rising.T)]
    assert [index % kernels.MAGNITUDES for index in indices] == [2, 2, 2]
    assert [index // kernels.MAGNITUDES for index in indices] == [0, 4, 1]
    assert kernels.texture(np.zeros((2, 3), dtype=np.int32)).tolist() == [[0] * 3] * 2


# ---- segmentation


def test_edges_by_hand():
    image = np.array([[[0, 0], [3, 4]], [[6, 8], [0, 0]]], dtype=np.int32)
    none = 65535
    assert kernels.edge_weights(image, True).tolist() == [
        [5, 10, 0, none],
        [none, 5, none, 5],
        [10, none, none, none],
        [none] * 4,
    ]
    order, starts = kernels.sort_edges(kernels.edge_weights(image, True))
    assert order.tolist() == [2, 0, 5, 7, 1, 8]  # the weights 0, 5, 5, 5, 10, 10
    assert starts[[0, 1, 5, 6, 10, 11]].tolist() == [0, 1, 1, 4, 4, 6]
    assert kernels.edge_weights(image, False).tolist() == [[5, 10], [none, 5], [10, none], [none, none]]


def test_two_halves_are_two_segments():
    image = np.zeros((6, 10, 3))
    image[:, 4:] = 80
    labels, internal, neighbours = segment(image, scale=100, min_size=1)
    assert (labels[:, :4] == 0).all() and (labels[:, 4:] == 1).all()
    assert internal.tolist() == [0, 0] and neighbours.tolist() == [[0, 1, 138]]  # 80 * sqrt(3) = 138.6
    # They are joined where the edge is no heavier than scale / size of both: 138 <= scale / 36.
    assert segment(image, scale=138 * 36 - 1, min_size=1)[0].max() == 1
    assert segment(image, scale=138 * 36, min_size=1)[0].max() == 0
    # ... and where one of them is too small.
    assert segment(image, scale=100, min_size=24)[0].max() == 1
    assert segment(image, scale=100, min_size=25)[0].max() == 0


def slow_segmentation(image, scale, min_size, diagonals):
    """F. algorithm 1 with sets of pixels."""
    height, width = image.shape[:2]
    steps = [(0, 1), (1, 0), (1, 1), (1, -1)][: 4 if diagonals else 2]
    edges = []
    for y in range(height):
        for x in range(width):
            for dy, dx in steps:
                if y + dy < height and 0 <= x + dx < width:
                    weight = int(np.sqrt(((image[y, x].astype(int) - image[y + dy, x + dx]) ** 2).sum()))
                    edges.append((weight, (y, x), (y + dy, x + dx)))
    edges.sort(key=lambda edge: edge[0])
    region = {(y, x): frozenset([(y, x)]) for y in range(height) for x in range(width)}
    internal = {pixels: 0 for pixels in region.values()}
    for final in (False, True):
        for weight, first, second in edges:
            a, b = region[first], region[second]
            small = min(len(a), len(b)) < min_size
            fits = all(weight <= np.float32(internal[r]) + np.float32(scale) / np.float32(len(r)) for r in (a, b))
            if a is not b and (small if final else fits):
                union = a | b
                internal[union] = max(internal[a], internal[b]) if final else weight
                region.update(dict.fromkeys(union, union))
    return region


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 8), st.integers(1, 8), st.floats(1, 2000), st.integers(1, 12), st.booleans())
def test_segmentation_follows_the_paper(seed, height, width, scale, min_size, diagonals):
    image = noise(seed, height, width, step=32)
    labels, _, neighbours = segment(image, scale, min_size, diagonals)
    expected = slow_segmentation(image, scale, min_size, diagonals)
    for region in set(expected.values()):
        assert len({labels[pixel] for pixel in region}) == 1
    assert labels.max() + 1 == len(set(expected.values()))
    assert np.bincount(labels.ravel()).min() >= min(min_size, labels.size)
    # Neighbours are the pairs of regions with an edge between them, lightest first.
    pairs = set()
    for a, b in [
        (labels[:, :-1], labels[:, 1:]),
        (labels[:-1], labels[1:]),
        *([(labels[:-1, :-1], labels[1:, 1:]), (labels[:-1, 1:], labels[1:, :-1])] if diagonals else []),
    ]:
        pairs |= {(min(p), max(p)) for p in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True) if p[0] != p[1]}
    assert {tuple(row[:2]) for row in neighbours.tolist()} == pairs and len(neighbours) == len(pairs)
    assert (np.diff(neighbours[:, 2]) >= 0).all()


def test_joining_continues_with_a_larger_scale():
    sizes, internal = np.array([10, 20, 40], np.int32), np.array([1, 2, 3], np.int32)
    neighbours = np.array([[0, 1, 5], [1, 2, 6]], np.int32)
    # 5 <= 1 + scale / 10 and 5 <= 2 + scale / 20: from 60. Then 6 <= 5 + scale / 30 and 6 <= 3 + scale / 40: from 120.
    for scale, expected in [(59, [0, 1, 2]), (60, [0, 0, 1]), (119, [0, 0, 1]), (120, [0, 0, 0])]:
        labels, number = kernels.join_regions(sizes, internal, neighbours, scale)
        assert labels.tolist() == expected and number == max(expected) + 1


def described(labels: np.ndarray, image: np.ndarray):
    gradients = kernels.texture(np.ascontiguousarray(kernels.smooth(image)[:, :, 0]))
    return kernels.describe_regions(labels.ravel(), int(labels.max()) + 1, image, gradients)


def test_joined_descriptions_are_those_of_the_joined_regions():
    image = noise(1, 20, 30)
    labels = np.repeat(np.repeat(np.arange(6, dtype=np.int32).reshape(2, 3), 10, axis=0), 10, axis=1)
    neighbours = np.array([[0, 1, 3], [1, 2, 4], [0, 3, 5], [1, 4, 6], [2, 5, 7], [3, 4, 8], [4, 5, 9]], np.int32)
    mapping = np.array([0, 0, 1, 2, 0, 1], np.int32)
    sizes, boxes, counts, joined = kernels.join_descriptions(mapping, 3, *described(labels, image), neighbours)
    for actual, expected in zip((sizes, boxes, counts), described(mapping[labels], image), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert joined.tolist() == [[0, 1, 4], [0, 2, 5]]
    assert counts[:, : kernels.COLOUR_BINS].sum(axis=1).tolist() == sizes.tolist()


# ---- grouping


def three_columns(seed: int = 0):
    """Regions 0, 1 (alike) and 2 (unlike) side by side in an image of 10 x 30."""
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20], image[:, 20:] = 10, 200
    labels = np.repeat(np.arange(3, dtype=np.int32), 10)[None].repeat(10, axis=0)
    return described(labels, image), np.array([[0, 1, 5], [1, 2, 99]], np.int32)


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
    labels, _, neighbours = segment(image, 3000, 10)
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
    edges = {frozenset(map(int, pair)) for pair in neighbours[:, :2]}
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
    hierarchy = rng.integers(0, 5, number)
    votes = kernels.count_votes(boxes, hierarchy, 5)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(float)
    for index in range(number):
        assert votes[index] == len(set(hierarchy[box_iou(xywh[index], xywh) >= 0.75 - 1e-12]))


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
