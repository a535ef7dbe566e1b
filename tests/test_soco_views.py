"""SoCo's boxes and views: the recorded steps of the official code, and what holds for any draw."""

import datasets
import golden_cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.data.collate import collate_soco
from aligndet_hf.data.dataset import SoCoViews
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.soco_views import (
    Boxes,
    adjust_hue,
    assign_levels,
    clip_boxes,
    crop_corners,
    draw_color,
    draw_resized_crop,
    draw_shared_boxes,
    flip_corners,
    jitter_boxes,
    number_proposals,
    overlapping,
    pad_boxes,
    relative_corners,
    scale_boxes,
)

LEVEL_SIZES = [48, 96, 192, 224]


def golden(name: str) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in golden_cases.load(name)[1].items()}


FUNCTIONS = golden("e30_soco_box_functions")


def boxes_of(rows: np.ndarray) -> Boxes:
    """Recorded rows of four corners and an id."""
    return Boxes(rows[:, :4], rows[:, 4].astype(int))


def rows_of(boxes: Boxes) -> np.ndarray:
    return np.column_stack([boxes.corners, boxes.ids])


def crop_of(params: np.ndarray) -> tuple[int, int, int, int]:
    return tuple(int(value) for value in params[:4])


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def official_slots(boxes: Boxes, levels: np.ndarray, unassigned: int, num_levels: int = 4) -> np.ndarray:
    """One id for each level and box, level by level, as the official code keeps the levels of boxes."""
    return np.where(levels == np.arange(num_levels)[:, None], boxes.ids, unassigned)


def exclusive(corners: np.ndarray, crop: tuple[int, int, int, int]) -> np.ndarray:
    """The far ends of the official relative corners are a pixel of the crop short: the departure."""
    _, _, height, width = crop
    return corners + np.array([0, 0, 1 / width, 1 / height])


@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in FUNCTIONS if key.startswith("fn")}))
def test_box_functions_equal_the_official_ones(case):
    known = {key.removeprefix(f"{case}."): value for key, value in FUNCTIONS.items() if key.startswith(f"{case}.")}
    proposals = boxes_of(known["props"])
    for view in range(3):
        crop = crop_of(known[f"params{view}"])
        shown = clip_boxes(proposals, crop)
        assert_close(rows_of(shown), known[f"clip{view}"])
        for size in (224, 192, 112):
            scaled = scale_boxes(shown, crop, size)
            assert_close(rows_of(scaled), known[f"resize{view}_{size}"])
            slots = official_slots(shown, assign_levels(scaled, LEVEL_SIZES), -1)
            assert_close(slots.ravel(), known[f"assign{view}_{size}"])
        relative = relative_corners(shown, crop)
        assert_close(relative, exclusive(known[f"tensor{view}"][:, :4], crop))
        # The official flip of inclusive ends puts the near side one pixel of the crop to the right.
        assert_close(flip_corners(relative), known[f"flip{view}"][:, :4] + [-1 / crop[3], 0, 0, 1 / crop[2]])
    whole, crop1 = (crop_of(known[f"params{view}"]) for view in (0, 1))
    assert whole[:2] == (0, 0)
    assert_close(crop_corners(crop1), known["overlap01"])  # what the whole image and a crop share is the crop
    for pair in ("01", "12"):
        region = known.get(f"overlap{pair}")
        if region is not None:
            found = proposals.take(overlapping(proposals, region))
            assert_close(rows_of(found), known[f"overlap_props{pair}"])
    jittered = jitter_boxes(proposals, known["jitter_draws"])
    assert_close(rows_of(jittered), known["jitter_out"])
    assert_close(rows_of(clip_boxes(jittered, whole)), known["jitter_out_clipped_view0"])
    assert_close(rows_of(proposals.take(np.arange(4))), known["select_top4"])


def test_conversion_levels_and_the_empty_crop_equal_the_official_ones():
    converted = number_proposals(FUNCTIONS["convert.xywh"], 400, 400)
    assert_close(converted.corners, FUNCTIONS["convert.xyxy"])
    assert converted.ids.tolist() == [1, 2, 3]
    alone = clip_boxes(boxes_of(FUNCTIONS["clip_none.in"]), crop_of(FUNCTIONS["clip_none.params"]))
    assert_close(rows_of(alone), FUNCTIONS["clip_none.out"])
    for name, slots in (("boxes", "assign_0_4"), ("nonsquare", "nonsquare_assign")):
        boxes = boxes_of(FUNCTIONS[f"lvl.{name}"])
        found = official_slots(boxes, assign_levels(boxes, LEVEL_SIZES), -1)
        assert_close(found, FUNCTIONS[f"lvl.{slots}"])


@pytest.mark.parametrize(
    "name, partners",
    [("e40_soco_fpn_pipeline", {2: 224, 3: 112}), ("e50_soco_Star_pipeline", {2: 224, 3: 192, 4: 112})],
)
def test_pipelines_equal_the_official_ones(name, partners):
    known = golden(name)
    width, height = known["image_wh"]
    whole = (0, 0, int(height), int(width))
    xywh = np.column_stack([known["props"][:, :2], known["props"][:, 2:] - known["props"][:, :2] + 1])
    proposals = number_proposals(xywh, height, width)
    for partner, size in partners.items():
        source = min(partner, 3) if partner != 4 else 2  # view 4 shows the crop and the boxes of view 2
        crop = crop_of(known[f"params{source}"])
        shared = proposals.take(overlapping(proposals, crop_corners(crop)))
        assert_close(rows_of(shared), known[f"overlap_props1{source}"])
        selected = boxes_of(known[f"selected1{source}"])
        views = {
            f"1_1{partner}": (clip_boxes(boxes_of(known[f"jittered1{source}"]), whole), whole, 224, -1, 1),
            f"{partner}": (clip_boxes(selected, crop), crop, size, -partner, partner),
        }
        slots = []
        for key, (boxes, crop_of_view, view_size, unassigned, flipped) in views.items():
            other = next(value[0] for other_key, value in views.items() if other_key != key)
            padded = pad_boxes(boxes, other, 4, np.random.default_rng(0))
            assert_close(rows_of(padded), known[f"padded_{key}"])
            scaled = scale_boxes(padded, crop_of_view, view_size)
            assert_close(rows_of(scaled), known[f"resized_{key}"])
            slots.append(official_slots(padded, assign_levels(scaled, LEVEL_SIZES), unassigned).ravel())
            assert_close(slots[-1], known[f"assign_{key}"])
            corners = relative_corners(padded, crop_of_view)
            assert_close(corners, exclusive(known[f"tensor_{key}"][:, :4], crop_of_view))
            _, _, h, w = crop_of_view
            if known[f"flipped_{flipped}"]:
                assert_close(flip_corners(corners), known[f"final_{key}"][:, :4] + [-1 / w, 0, 0, 1 / h])
            else:
                assert_close(corners, exclusive(known[f"final_{key}"][:, :4], crop_of_view))
        assert_close(slots[0][:, None] == slots[1], known[f"corres_1{partner}"])


# ---- any draw ----


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), height=st.integers(8, 300), width=st.integers(8, 300), count=st.integers(0, 12))
def test_shared_boxes_lie_in_their_crops_and_are_the_same_proposals(seed, height, width, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.5, size=(count, 2)) * (width, height)
    size = rng.uniform(3, ((width, height) - corner).clip(3.5))  # as the data set clips them: within the image
    proposals = number_proposals(np.column_stack([corner, size]), height, width)
    drawn = draw_shared_boxes(proposals, height, width, rng, count=4, num_crops=2, scale=(0.5, 1.0))
    assert len(drawn) == 2
    for (top, left, h, w), in_image, in_crop in drawn:
        assert 0 <= top <= height - h and 0 <= left <= width - w
        assert len(in_image) == len(in_crop) == 4
        assert set(in_image.ids) == set(in_crop.ids)
        for boxes, size in ((in_image, (width, height)), (in_crop, (w, h))):
            assert (boxes.corners >= 0).all() and (boxes.corners[:, 2:] <= np.array(size) - 1).all()
            assert (boxes.corners[:, 2:] >= boxes.corners[:, :2]).all()


def test_crops_have_the_area_and_shape_that_they_should():
    rng = np.random.default_rng(0)
    crops = np.array([draw_resized_crop(240, 320, rng, (0.5, 1.0)) for _ in range(300)])
    area, ratio = crops[:, 2] * crops[:, 3] / (240 * 320), crops[:, 3] / crops[:, 2]
    assert 0.49 < area.min() < 0.55 and 0.9 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 1.0 < ratio.max() < 1.35
    assert draw_resized_crop(20, 400, rng, (0.9, 1.0)) == (0, 186, 20, 27)  # no crop fits: the middle


def test_padding_takes_what_both_show():
    first = Boxes(np.arange(8.0).reshape(2, 4), np.array([3, 5]))
    second = Boxes(np.zeros((1, 4)), np.array([5]))
    padded = pad_boxes(first, second, 5, np.random.default_rng(0))
    assert padded.ids.tolist() == [3, 5, 5, 5, 5]
    assert (padded.corners[2:] == first.corners[1]).all()


# ---- items ----


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dataset(proposal_folder):
    return datasets.load_from_disk(proposal_folder)


def test_an_item_is_a_function_of_seed_epoch_and_row(dataset):
    views = SoCoViews(dataset, [64, 64, 48, 32], (0, 1, 0), [16, 32, 64], seed=3)
    key = SampleKey(2, 1, 5)
    first, again, other = views[key], views[key._replace(batch=9)], views[key._replace(epoch=2)]
    assert [tuple(image.shape) for image in first["images"]] == [(3, s, s) for s in (64, 64, 48, 32)]
    assert [tuple(boxes.shape) for boxes in first["boxes"]] == [(8, 4), (4, 4), (4, 4), (4, 4)]
    for name, values in first.items():
        assert all(torch.equal(value, same) for value, same in zip(values, again[name], strict=True))
    assert any(not torch.equal(value, new) for value, new in zip(first["boxes"], other["boxes"], strict=True))
    assert torch.equal(first["ids"][1], first["ids"][3])  # one crop, two sizes
    assert set(first["ids"][0][:4].tolist()) == set(first["ids"][1].tolist())
    assert set(first["ids"][0][4:].tolist()) == set(first["ids"][2].tolist())
    assert max(levels.max() for levels in first["levels"]) <= 2


def test_views_show_what_their_boxes_frame():
    """A red square on noise: every box of it, in every view and however flipped, is red inside."""
    image = noise(90, 120)
    image[20:60, 30:90] = (250, 0, 0)
    row = {"image": [image], "proposals": [{"bbox": [[30.0, 20.0, 60.0, 40.0]], "score": [1.0]}]}
    views = SoCoViews(as_dataset(row), [80, 80, 40], (0, 1), [20, 40, 80], seed=0, color=False)
    for epoch in range(12):
        item = views[SampleKey(0, epoch, 0)]
        for view, (picture, boxes) in enumerate(zip(item["images"], item["boxes"], strict=True)):
            size = picture.shape[1]
            for number, box in enumerate(boxes):
                x1, y1, x2, y2 = (box * size).tolist()
                # Jittered boxes of the whole image reach out by a tenth on either side.
                dx, dy = ((x2 - x1) * 0.2 + 2, (y2 - y1) * 0.2 + 2) if view == 0 else (2, 2)
                inside = picture[:, int(y1 + dy) : int(y2 - dy), int(x1 + dx) : int(x2 - dx)].float()
                assert inside.numel() and (inside[0] > 200).all() and (inside[1:] < 50).all(), (epoch, view, number)


def as_dataset(rows: dict) -> datasets.Dataset:
    boxes = {"bbox": datasets.List(datasets.List(datasets.Value("float32"), 4))}
    boxes["score"] = datasets.List(datasets.Value("float32"))
    features = datasets.Features({"image": datasets.Image(), "proposals": boxes})
    return datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image(decode=False))


def test_batches_stack_the_views(dataset):
    views = SoCoViews(dataset, [32, 32], (0,), seed=0, max_proposals=3, proposal_sampling="top")
    batch = collate_soco([views[SampleKey(row, 0, 0)] for row in range(2)])
    assert [tuple(values.shape) for values in batch["pixel_values"]] == [(2, 3, 32, 32)] * 2
    assert [tuple(values.shape) for values in batch["boxes"]] == [(2, 3, 4)] * 2
    assert all((levels == 0).all() for levels in batch["levels"])
    with pytest.raises(ValueError, match=r"one size for each of the 2 views.*got \[32\]"):
        SoCoViews(dataset, [32], (0,), seed=0)


# ---- colours ----


def test_hue_turns_and_keeps_grey():
    red = np.full((2, 2, 3), (200, 0, 0), dtype=np.uint8)
    assert adjust_hue(red, 1 / 3)[0, 0].argmax() == 1 and adjust_hue(red, -1 / 3)[0, 0].argmax() == 2
    grey = np.full((2, 2, 3), 77, dtype=np.uint8)
    assert (adjust_hue(grey, 0.1) == grey).all() and (adjust_hue(red, 0.0) == red).all()


def test_the_first_view_is_always_blurred_and_never_solarised():
    image = noise(40, 40)
    rough = np.abs(np.diff(image.astype(int), axis=1)).mean()
    for seed in range(20):
        view = draw_color(image, np.random.default_rng(seed), is_first=True)
        assert np.abs(np.diff(view.astype(int), axis=1)).mean() < 1.01 * 1.4 * rough
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    assert min(draw_color(white, np.random.default_rng(seed), True).mean() for seed in range(40)) > 150
    assert min(draw_color(white, np.random.default_rng(seed), False).mean() for seed in range(40)) < 110
