"""Augmentations: hand-computable boxes, what stays inside the picture, and randomness that follows from the seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from aligndet_hf.data.augmentations import (
    AUGMENTATIONS,
    Sample,
    apply_transform,
    copy_paste,
    mixup,
    mosaic,
    quarter_turn,
    rotate,
    zoom_out,
)
from aligndet_hf.data.dataset import LabelledImages
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.synthetic import make_synthetic_dataset
from aligndet_hf.data.views import ViewConfig


def square(side=10, height=60, width=80, top=20, left=30, colour=255, label=1) -> Sample:
    """A bright square on black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[top : top + side, left : left + side] = colour
    return Sample(image, np.float32([[left, top, side, side]]), np.array([label]))


def where(image: np.ndarray, above: int = 200) -> list[float]:
    """The box (xywh) of all pixels brighter than a value."""
    rows, columns = np.nonzero(image[..., 0] > above)
    return [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(AUGMENTATIONS)))
def test_boxes_stay_inside_and_inputs_stay_as_they_are(seed, name):
    rng = np.random.default_rng(seed)
    count = AUGMENTATIONS[name].others + 1
    samples = [
        square(int(rng.integers(4, 20)), int(rng.integers(40, 70)), int(rng.integers(40, 70)), 15, 12, label=i)
        for i in range(count)
    ]
    before = [(sample.image.copy(), sample.boxes.copy()) for sample in samples]
    result = AUGMENTATIONS[name].function(samples[0], samples[1:], rng)
    height, width = result.image.shape[:2]
    assert result.image.dtype == np.uint8 and result.image.shape[2] == 3
    assert len(result.boxes) == len(result.classes) and result.boxes.dtype == np.float32
    assert (result.boxes[:, :2] >= -1e-3).all() and (result.boxes[:, 2:] > 0).all()
    assert (result.boxes[:, :2] + result.boxes[:, 2:] <= np.array([width, height]) + 1e-3).all()
    for sample, (image, boxes) in zip(samples, before, strict=True):
        assert (sample.image == image).all() and (sample.boxes == boxes).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("function", [zoom_out, quarter_turn])
def test_the_box_is_where_the_square_is(function, seed):
    result = function(square(), [], np.random.default_rng(seed))
    np.testing.assert_allclose(result.boxes, [where(result.image)])


def test_a_turned_circle_keeps_its_box():
    # The ellipse in a square is a circle, whose box does not change its size when it is turned.
    result = rotate(square(height=80), [], np.random.default_rng(1))
    np.testing.assert_allclose(result.boxes[0, 2:], [10, 10], atol=1e-4)
    x, y, w, h = where(result.image, 127)
    np.testing.assert_allclose(result.boxes[0, :2] + 5, [x + w / 2, y + h / 2], atol=1)


def test_mosaic_shows_all_four():
    parts = [square(side=50, top=5, left=15, colour=205 + 10 * i, label=i) for i in range(4)]
    result = mosaic(parts[0], parts[1:], np.random.default_rng(0))
    assert result.image.shape == parts[0].image.shape and set(result.classes) == {0, 1, 2, 3}
    for box, label in zip(result.boxes, result.classes, strict=True):
        x, y, w, h = box.round().astype(int)
        inside = result.image[y + 2 : y + h - 2, x + 2 : x + w - 2, 0]
        assert abs(float(np.median(inside)) - (205 + 10 * label)) < 3


def test_mixup_keeps_the_objects_of_both():
    other = square(side=20, height=120, width=160, top=40, left=60, label=7)  # twice as large
    result = mixup(square(), [other], np.random.default_rng(0))
    assert result.classes.tolist() == [1, 7]
    np.testing.assert_allclose(result.boxes, [[30, 20, 10, 10], [30, 20, 10, 10]])
    assert result.image[25, 35].min() == 255 and result.image.shape == (60, 80, 3)  # both squares are there


def test_pasted_objects_hide_nothing():
    sample, other = square(colour=210), square(side=12, colour=250, label=4)
    pasted = 0
    for seed in range(20):
        result = copy_paste(sample, [other], np.random.default_rng(seed))
        assert result.boxes[0].tolist() == sample.boxes[0].tolist()
        for box in result.boxes[1:]:
            pasted += 1
            x, y, w, h = box.astype(int)
            assert result.image[y + h // 2, x + w // 2, 0] == 250 and 0.7 * 12 - 1 <= w <= 1.3 * 12 + 1
    assert pasted > 10


def test_transforms_of_torchvision():
    sample = square()
    flipped = apply_transform(v2.RandomHorizontalFlip(p=1.0), sample, np.random.default_rng(0))
    np.testing.assert_allclose(flipped.boxes, [[40, 20, 10, 10]])
    assert where(flipped.image) == [40, 20, 10, 10]
    # Its noise follows from the generator, and leaves torch's own alone.
    noise = v2.Compose([v2.RandomPhotometricDistort(p=1.0), v2.RandomZoomOut(p=1.0)])
    state = torch.get_rng_state()
    one, two, other = (apply_transform(noise, sample, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert (one.image == two.image).all() and one.image.shape != other.image.shape
    with pytest.raises(TypeError, match="one label for each box"):
        apply_transform(lambda image, target: (image, target | {"labels": torch.zeros(3)}), sample, noise_free())
    with pytest.raises(TypeError, match="must return"):
        apply_transform(lambda image, target: image, sample, noise_free())


def test_a_transform_that_takes_something_else():
    def of_albumentations(*args, **data):
        raise KeyError("You have to pass data to augmentations as named arguments")

    with pytest.raises(TypeError, match="as torchvision.*, as of albumentations, .* KeyError: .*named arg"):
        apply_transform(of_albumentations, square(), noise_free())


def noise_free():
    return np.random.default_rng(0)


def test_items_follow_from_seed_and_epoch():
    dataset = make_synthetic_dataset(6, seed=0, image_size=(48, 64))
    names = ["mosaic", "mixup", "copy_paste", "zoom_out", "rotate", "photometric"]
    make = lambda **more: LabelledImages(dataset, ViewConfig([48]), seed=1, augmentations=names, **more)  # noqa: E731
    images, again = make(augmentation_probability=1.0), make(augmentation_probability=1.0)
    item, same, later = images[SampleKey(2, 0, 0)], again[SampleKey(2, 0, 5)], images[SampleKey(2, 1, 0)]
    assert torch.equal(item["image"], same["image"]) and torch.equal(item["labels"]["boxes"], same["labels"]["boxes"])
    assert item["image"].shape != later["image"].shape or not torch.equal(item["image"], later["image"])
    assert item["labels"]["orig_size"].tolist() == [48, 64]
    never = make(augmentation_probability=0.0)[SampleKey(2, 0, 0)]
    plain = LabelledImages(dataset, ViewConfig([48]), seed=1)[SampleKey(2, 0, 0)]
    assert len(never["labels"]["boxes"]) == len(plain["labels"]["boxes"])
    with pytest.raises(TypeError, match="SampleKey"):
        images[2]
    with pytest.raises(ValueError, match="no augmentation 'mozaic': choose from mosaic, mixup"):
        LabelledImages(dataset, ViewConfig([48]), augmentations=["mozaic"])
