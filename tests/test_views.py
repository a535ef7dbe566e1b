import cv2
import golden_cases
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv
from transformers.image_transforms import get_size_with_aspect_ratio

from aligndet_hf.data import views
from aligndet_hf.data.views import ViewConfig, make_view

PLAIN = {"flip_probability": 0.0, "color": False}


def photograph(height=240, width=320, seed=0):
    """Something with edges, gradients and fine texture."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(
        rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    for _ in range(20):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(5, 40)
        cv2.circle(image, (int(x), int(y)), int(r), rng.integers(0, 256, 3).tolist(), -1, cv2.LINE_AA)
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def white_rectangle(image):
    """x1, y1, x2, y2 of what is brighter than half."""
    ys, xs = np.nonzero(image[:, :, 0] > 127)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


# ---- the official pipeline (golden g) ----

OFFICIAL, OFFICIAL_TENSORS = golden_cases.load("g_aligndet_view_boxes")


@pytest.mark.parametrize("number", range(len(OFFICIAL["rows"])))
def test_boxes_of_the_official_pipeline(number):
    """Relative to the unpadded view, where the rounding of the size does not matter, all boxes agree."""
    row, key = OFFICIAL["rows"][number], f"{number // 2}_{number % 2}"
    corners = OFFICIAL_TENSORS[f"{key}.in"].numpy()
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float32)
    config = ViewConfig([row["target_short"]], max_size=1333, flip_probability=float(row["flip"]), color=False)
    image, boxes, kept = make_view(np.zeros((*row["hw"], 3), np.uint8), boxes, rng(), config, row["target_short"])
    assert kept.tolist() == list(range(6))
    assert np.abs(np.array(image.shape[:2]) - OFFICIAL_TENSORS[f"{key}.img_shape"].numpy()).max() <= 1
    ours = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / np.tile(image.shape[1::-1], 2)
    height, width = OFFICIAL_TENSORS[f"{key}.img_shape"].tolist()
    np.testing.assert_allclose(
        ours, OFFICIAL_TENSORS[f"{key}.out"].numpy() / (width, height, width, height), atol=1e-6
    )


@pytest.mark.parametrize("number", range(len(OFFICIAL["rows"])))
def test_flip_before_pad_the_official_shift_is_not_reproduced(number):
    """
    The official code pads to a multiple of 32, then flips: the picture of a flipped object lies beside its box by as
    much as the padding is wide. Ours lies in its box, in all rows.
    """
    row, key = OFFICIAL["rows"][number], f"{number // 2}_{number % 2}"
    padding = row["pad_shape"][1] - row["img_shape"][1]
    official_shift = row["white_rectangle_in_image"][0] - row["gt_box0"][0]
    assert abs(official_shift - padding * row["flip"]) < 1.5  # 0 if not flipped or if the width is a multiple of 32

    x1, y1, x2, y2 = OFFICIAL_TENSORS[f"{key}.in"][0].round().int().tolist()
    image = np.zeros((*row["hw"], 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    config = ViewConfig([row["target_short"]], max_size=1333, flip_probability=float(row["flip"]), color=False)
    view, boxes, _ = make_view(image, np.array([[x1, y1, x2 - x1, y2 - y1]]), rng(), config, row["target_short"])
    box = np.concatenate([boxes[0, :2], boxes[0, :2] + boxes[0, 2:]])
    assert np.abs(white_rectangle(view) - box).max() < 1.5


# ---- geometry ----


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 900), st.integers(0, 900))
@example(height=1, width=11, size=16, more=0)  # less than a pixel from its size
def test_size_of_a_view_is_that_of_the_image_processors(height, width, size, more):
    shape = views.view_shape(height, width, "shortest_edge", size, size + more)
    expected = get_size_with_aspect_ratio((height, width), size, size + more)
    if max(expected) <= size + more:  # those may exceed the bound by less than a pixel of the short side
        assert shape == tuple(max(1, side) for side in expected)
    assert max(shape) <= size + more and min(shape) >= 1


def test_size_is_always_bounded():
    assert views.view_shape(480, 640, "shortest_edge", 800) == (800, 1066)
    assert views.view_shape(8000, 50, "shortest_edge", 800) == (1333, 8)
    assert views.view_shape(50, 8000, "shortest_edge", 800, 1000) == (6, 1000)
    assert views.view_shape(1, 8000, "shortest_edge", 320, 400) == (1, 400)
    assert views.view_shape(8000, 50, "square", 256) == (256, 256)


@pytest.mark.parametrize(
    "side, sizes",
    [
        (1000, views.PUBLISHED_SIZES), (480, views.PUBLISHED_SIZES),
        (224, [224, 256, 288, 320, 352, 384]),  # 480 and 800 times 224 / 480, to multiples of 32
        (128, [128, 160, 192, 224]), (30, [64]),
    ],
)  # fmt: skip
def test_sizes_are_to_images_as_the_published_ones_are_to_cocos(side, sizes):
    images = np.array([[0, 0], [side, 2 * side], [side + 9, side], [9000, 5000], [side, side]])
    chosen, line = views.choose_sizes(views.PUBLISHED_SIZES, images)
    assert chosen == sizes and f"is at most {side} pixels" in line
    assert views.choose_sizes([100], np.zeros((1, 2), dtype=int))[0] == [96]


@pytest.mark.parametrize("shape", [(1, 1), (8000, 50), (50, 8000)])
@pytest.mark.parametrize("resize", ["shortest_edge", "square"])
def test_extreme_images(shape, resize):
    image = np.full((*shape, 3), 90, np.uint8)
    config = ViewConfig([64], max_size=100, resize=resize, flip_probability=1.0, crop_scale=(0.5, 1.0))
    whole = np.array([[0, 0, shape[1], shape[0]]], np.float32)
    for seed in range(10):
        crop = views.draw_crop(*shape, rng(seed), config.crop_scale)
        view, boxes, _ = make_view(image, whole, rng(seed), config, 64, crop)
        assert view.dtype == np.uint8 and view.ndim == 3 and max(view.shape[:2]) <= 100
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array(view.shape[1::-1]) + 1e-3).all()


@pytest.mark.parametrize("shape", [(120, 160), (200, 267), (90, 300), (300, 200), (480, 640), (239, 400)])
def test_resize_is_close_to_the_antialiased_bilinear_of_the_image_processors(shape):
    image = photograph()
    expected = (
        tv.resize(torch.from_numpy(image).permute(2, 0, 1), list(shape), antialias=True).permute(1, 2, 0).numpy()
    )
    ours = views.resize_image(image, *shape)
    assert ours.shape == (*shape, 3)
    assert np.abs(ours.astype(int) - expected).mean() < 2.5


def test_resize_does_not_alias():
    """Stripes finer than the new pixels become grey; plain bilinear sampling would keep stripes."""
    image = np.zeros((240, 320, 3), np.uint8)
    image[:, ::2] = 255
    for shape in [(60, 80), (240, 80), (480, 80)]:
        small = views.resize_image(image, *shape)
        assert 120 <= small.min() and small.max() <= 135


@given(st.integers(20, 100), st.integers(20, 100), st.booleans(), st.integers(0, 10**6))
def test_boxes_follow_the_picture(height, width, flip, seed):
    draw = rng(seed)
    w, h = draw.integers(6, width // 2), draw.integers(6, height // 2)
    x, y = draw.integers(0, width - w), draw.integers(0, height - h)
    image = np.zeros((height, width, 3), np.uint8)
    image[y : y + h, x : x + w] = 255
    config = ViewConfig([150], resize="square" if seed % 2 else "shortest_edge", flip_probability=flip, color=False)
    view, boxes, kept = make_view(image, np.array([[x, y, w, h]], np.float32), draw, config, 150)
    box = np.concatenate([boxes[0, :2], boxes[0, :2] + boxes[0, 2:]])
    tolerance = max(view.shape[0] / height, view.shape[1] / width) / 2 + 1
    assert np.abs(white_rectangle(view) - box).max() <= tolerance
    assert kept.tolist() == [0]


def test_boxes_too_small_to_see_are_dropped_and_the_rest_keep_their_numbers():
    boxes = np.array([[1, 1, 50, 50], [3, 3, 0.01, 20], [5, 5, 20, 20], [7, 7, 20, 0.005]], np.float32)
    config = ViewConfig([50], flip_probability=1.0, color=False)
    view, left, kept = make_view(np.zeros((100, 100, 3), np.uint8), boxes, rng(), config, 50)
    assert kept.tolist() == [0, 2]
    np.testing.assert_allclose(left, [[24.5, 0.5, 25, 25], [37.5, 2.5, 10, 10]])


def test_no_boxes():
    for crop in (None, (2, 3, 20, 20)):
        _, boxes, kept = make_view(photograph(40, 40), np.zeros((0, 4), np.float32), rng(), ViewConfig([32]), 32, crop)
        assert boxes.shape == (0, 4) and kept.shape == (0,)


def test_inputs_are_left_alone():
    image, boxes = photograph(40, 60), np.array([[1, 2, 30, 20]], np.float32)
    before = image.copy(), boxes.copy()
    for config in (ViewConfig([40], flip_probability=1.0), ViewConfig([40], **PLAIN), ViewConfig([20])):
        make_view(image, boxes, rng(), config, config.sizes[0])
        np.testing.assert_array_equal(image, before[0])
        np.testing.assert_array_equal(boxes, before[1])


def test_same_random_state_same_view():
    config = ViewConfig([60])
    first, second, other = (make_view(photograph(), np.zeros((0, 4)), rng(seed), config, 60)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_colour_is_applied_if_asked_for():
    image = photograph(40, 60)
    views_of = {
        color: [
            make_view(image, np.zeros((0, 4)), rng(seed), ViewConfig([40], color=color), 40)[0] for seed in range(20)
        ]
        for color in (True, False)
    }
    coloured = [(with_color != plain).any() for with_color, plain in zip(views_of[True], views_of[False], strict=True)]
    assert 10 < sum(coloured) < 20  # one of the nine operations is the identity


# ---- crops ----


def test_rule_of_the_boxes_that_a_crop_shows():
    crop = (0, 0, 100, 100)
    boxes = np.array(
        [
            [10, 10, 20, 20],  # inside
            [80, 10, 40, 20],  # half on the right
            [81, 10, 40, 20],  # less than half
            [10, 80, 20, 40],  # half at the bottom
            [10, 81, 20, 40],
            [-20, 10, 40, 20],  # half on the left
            [-21, 10, 40, 20],
            [10, -20, 20, 40],  # half at the top
            [10, -21, 20, 40],
            [-19, -19, 40, 40],  # the centre, but only (21/40)^2 of the area
            [150, 150, 20, 20],  # beyond the corner: both overlaps are negative
        ],
        np.float32,
    )
    assert views.boxes_in_crop(boxes, crop).tolist() == [True, *[True, False] * 4, False, False]


def test_boxes_are_moved_and_clipped_by_a_crop():
    boxes = np.array([[30, 40, 20, 20], [5, 20, 20, 40], [0, 0, 5, 5], [60, 30, 30, 20]], np.float32)
    image = np.zeros((100, 80, 3), np.uint8)
    view, left, kept = make_view(image, boxes, rng(), ViewConfig([60], **PLAIN), 60, crop=(25, 10, 60, 60))
    assert view.shape == (60, 60, 3) and kept.tolist() == [0, 1]
    np.testing.assert_allclose(left, [[20, 15, 20, 20], [0, 0, 15, 35]])


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
def test_crops_lie_in_the_image_and_have_the_area_asked_for(height, width, seed):
    top, left, crop_height, crop_width = views.draw_crop(height, width, rng(seed), (0.3, 0.6))
    assert 0 <= top <= top + crop_height <= height and 0 <= left <= left + crop_width <= width
    if min(height, width) > 50:
        assert 0.28 <= crop_height * crop_width / (height * width) <= 0.62


def test_crops_reach_every_corner():
    crops = np.array([views.draw_crop(100, 100, rng(seed), (0.4, 1.0)) for seed in range(300)])
    assert crops[:, :2].min() == 0 and (crops[:, :2] + crops[:, 2:]).max(axis=0).tolist() == [100, 100]
    assert crops[:, :2].max(axis=0).min() > 20
    assert 0.4 < (crops[:, 2] * crops[:, 3]).min() / 10**4 < 0.5


def test_two_crops_share_boxes():
    boxes = np.array([[10 * i, 10 * j, 20, 20] for i in range(8) for j in range(8)], np.float32)
    first_pair, best_pair = [], []
    for seed in range(20):
        generator = rng(seed)
        crops = [views.draw_crop(100, 100, generator, (0.3, 0.6)) for _ in range(2)]
        first_pair.append((views.boxes_in_crop(boxes, crops[0]) & views.boxes_in_crop(boxes, crops[1])).sum())
        first, second, shared = views.draw_two_crops(100, 100, boxes, rng(seed), (0.3, 0.6))
        best_pair.append(len(shared))
        both = views.boxes_in_crop(boxes, first) & views.boxes_in_crop(boxes, second)
        assert shared.tolist() == np.flatnonzero(both).tolist()
        assert len(shared) > 0 and first != second
    assert (np.array(best_pair) >= first_pair).all() and np.mean(best_pair) > np.mean(first_pair) + 2


# ---- colour ----


def reference(name, image, value):
    """The same operation by PIL."""
    image = PIL.Image.fromarray(image)
    enhancers = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    if name in enhancers:
        return np.array(getattr(PIL.ImageEnhance, enhancers[name])(image).enhance(value))
    arguments = [] if value is None else [int(value)]
    return np.array(getattr(PIL.ImageOps, name)(image, *arguments))


@pytest.mark.parametrize(
    "name, value",
    [("autocontrast", None), ("equalize", None)]
    + [("solarize", value) for value in (0, 1, 100, 255, 256)]
    + [("posterize", value) for value in (4, 5.9, 8)]
    + [(name, value) for name in ("color", "contrast", "brightness", "sharpness") for value in (0.1, 0.7, 1.0, 1.9)],
)
def test_colour_operations_are_those_of_pil(name, value):
    image = photograph()
    image = (40 + image * 0.6).astype(np.uint8)  # so that autocontrast has something to do
    operation, span = views.COLOR_OPERATIONS[name]
    ours = operation(image) if span is None else operation(image, value)
    # The smoothing of PIL leaves the border alone, ours replicates it.
    inner = np.s_[1:-1, 1:-1]
    difference = np.abs(ours[inner].astype(int) - reference(name, image, value)[inner])
    assert difference.max() <= (0 if name in ("equalize", "solarize", "posterize") else 2)


@pytest.mark.parametrize("name", views.COLOR_OPERATIONS)
@pytest.mark.parametrize("level", [0, 77, 255])
def test_colour_operations_on_an_even_image(name, level):
    operation, span = views.COLOR_OPERATIONS[name]
    image = np.full((5, 4, 3), level, np.uint8)
    result = operation(image) if span is None else operation(image, span[0])
    assert result.dtype == np.uint8 and result.shape == image.shape and (result == result[0, 0]).all()
    if name in ("identity", "autocontrast", "equalize"):
        assert (result == level).all()


def test_each_colour_operation_is_drawn(monkeypatch):
    drawn = []
    operations = {
        name: (lambda image, value=None, name=name: drawn.append((name, value)) or image, span)
        for name, (_, span) in views.COLOR_OPERATIONS.items()
    }
    monkeypatch.setattr(views, "COLOR_OPERATIONS", operations)
    generator = rng()
    for _ in range(900):
        views.random_color(np.zeros((2, 2, 3), np.uint8), generator)
    for name, (_, span) in operations.items():
        values = [value for used, value in drawn if used == name]
        assert 60 < len(values) < 140
        if span:
            assert span[0] <= min(values) < max(values) < span[1]
            assert max(values) - min(values) > 0.8 * (span[1] - span[0])
        if name == "posterize":
            assert {int(value) for value in values} == {4, 5, 6, 7, 8}


# ---- configuration ----


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sizes": []}, "sizes"),
        ({"sizes": [0]}, "sizes"),
        ({"resize": "longest"}, "resize"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"crop_scale": (0.0, 0.5)}, "crop_scale"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
    ],
)
def test_impossible_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        ViewConfig(**({"sizes": [64]} | fields))


def test_is_random():
    assert not ViewConfig([96], 120, "square", **PLAIN).is_random
    for fields in ({"sizes": [1, 2]}, {"flip_probability": 0.1}, {"color": True}, {"crop_scale": (0.5, 1)}):
        assert ViewConfig(**({"sizes": [64]} | PLAIN | fields)).is_random
