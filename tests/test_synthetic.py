import time

import numpy as np
import pytest

from aligndet_hf.data import synthetic
from aligndet_hf.data.columns import validate_objects
from aligndet_hf.data.formats import category_names, load_dataset_source
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.synthetic import (
    SYNTHETIC_CATEGORIES,
    make_synthetic_dataset,
    render_scene,
    write_synthetic_folder,
)


@pytest.fixture(scope="module")
def scenes():
    return make_synthetic_dataset(60, seed=0)


def test_columns_and_validity(scenes):
    report = validate_objects(scenes, SYNTHETIC_CATEGORIES)
    assert report.dropped == {} and report.empty_rows == 0
    assert category_names(scenes) == SYNTHETIC_CATEGORIES
    assert list(scenes["image_id"]) == list(range(60))
    ids = [number for row in scenes["objects"] for number in row["id"]]
    assert ids == list(range(1, len(ids) + 1))
    for row in scenes["objects"]:
        np.testing.assert_allclose(row["area"], [w * h for _, _, w, h in row["bbox"]])
    image, boxes, _ = render_scene(np.random.default_rng((0, 2)), 192, 256)
    stored = decode_image(scenes[2]["image"]).astype(int)
    assert np.abs(stored - image).mean() < 0.3 * np.abs(stored - image[:, :, ::-1]).mean()  # RGB, but for the JPEG
    assert scenes[2]["objects"]["bbox"] == boxes.tolist()


def test_all_categories_and_many_sizes(scenes):
    categories = np.concatenate([row["category"] for row in scenes["objects"]])
    assert np.bincount(categories, minlength=5).min() > len(categories) / 12
    sides = np.sqrt(np.concatenate([row["area"] for row in scenes["objects"]])) / np.sqrt(192 * 256)
    assert sides.min() < 0.1 and sides.max() > 0.3
    counts = [len(row["category"]) for row in scenes["objects"]]
    assert min(counts) == 1 and max(counts) >= 7


def test_an_image_does_not_depend_on_the_number_of_images(scenes):
    few = make_synthetic_dataset(3, seed=0)
    for row in range(3):
        assert few[row] == scenes[row]
    assert make_synthetic_dataset(1, seed=1)[0]["image"] != few[0]["image"]
    assert few[0]["image"]["bytes"] != few[1]["image"]["bytes"]


def test_boxes_are_exact(monkeypatch):
    """The box is that of the pixels that the object covers by more than half."""
    masks, draw = [], synthetic._mask
    monkeypatch.setattr(synthetic, "_mask", lambda *arguments: masks.append(draw(*arguments)) or masks[-1])
    for seed in range(30):
        _, boxes, categories = render_scene(np.random.default_rng(seed), 96, 128, max_objects=1)
        (box,) = boxes.astype(int).tolist()
        assert len(categories) == 1
        ys, xs = np.nonzero(masks[-1] > 127)
        assert box == [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]


def test_occlusion_is_limited():
    """No box lies for more than a part in the visible pixels of another object: count overlaps of boxes."""
    for row in make_synthetic_dataset(40, seed=3)["objects"]:
        boxes = np.array(row["bbox"])
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], boxes[None, :, :2] + boxes[None, :, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=2) - np.diag(boxes[:, 2:].prod(axis=1))
        assert (shared / boxes[:, 2:].prod(axis=1)).max() < 0.75


def test_objects_stand_out_from_the_background():
    """A box holds more contrast than a scene without objects would: the data set can be learned."""
    contrasts = []
    for row in make_synthetic_dataset(20, seed=5):
        image = decode_image(row["image"]).astype(float)
        for x, y, w, h in np.array(row["objects"]["bbox"], dtype=int):
            inner = image[y + h // 3 : y + h - h // 3, x + w // 3 : x + w - w // 3].mean(axis=(0, 1))
            contrasts.append(np.abs(inner - image.mean(axis=(0, 1))).max())
    assert np.median(contrasts) > 40


def test_sizes_and_number_of_objects():
    dataset = make_synthetic_dataset(20, seed=0, image_size=(64, 80), max_objects=2)
    assert all(decode_image(image).shape == (64, 80, 3) for image in dataset["image"])
    assert {len(row["category"]) for row in dataset["objects"]} == {1, 2}
    assert validate_objects(dataset, SYNTHETIC_CATEGORIES).dropped == {}


def test_folder(tmp_path, scenes):
    write_synthetic_folder(tmp_path / "data", {"train": 3, "validation": 2}, seed=0)
    train = load_dataset_source(tmp_path / "data", "train", labels=True)
    assert [row["image_id"] for row in train] == [0, 1, 2]
    assert [row["objects"] for row in train] == [scenes[row]["objects"] for row in range(3)]
    np.testing.assert_array_equal(decode_image(train[1]["image"]), decode_image(scenes[1]["image"]))
    validation = load_dataset_source(tmp_path / "data", "validation", labels=True)
    assert len(validation) == 2 and category_names(validation) == SYNTHETIC_CATEGORIES
    assert validation[0]["objects"] != train[0]["objects"]


def test_speed():
    start = time.process_time()
    make_synthetic_dataset(20, seed=0, image_size=(256, 256))
    assert (time.process_time() - start) / 20 < 0.03  # 5 ms on a 2026 server core
