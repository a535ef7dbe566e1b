"""Selective search: finds what is there, the same everywhere, in bounded time and memory."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet_hf.data.synthetic import render_scene
from aligndet_hf.proposals.controls import grid_boxes, random_boxes
from aligndet_hf.proposals.filters import box_iou
from aligndet_hf.proposals.selective_search import PRESETS, Preset, rank_regions, selective_search

OBJECTS = np.array([[30, 40, 60, 80], [150, 30, 90, 60], [120, 130, 70, 70]])
ROOT = Path(__file__).parents[1]


def scene(noise: int = 6) -> np.ndarray:
    """Three coloured rectangles (`OBJECTS`, xywh) on a grey ground, 240 high and 300 wide."""
    image = np.full((240, 300, 3), 110, dtype=np.int64)
    for (x, y, width, height), colour in zip(OBJECTS, [(220, 40, 30), (30, 60, 220), (40, 200, 60)], strict=True):
        image[y : y + height, x : x + width] = colour
    image += np.random.default_rng(0).integers(-noise, noise + 1, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def fingerprint(preset: str = "default") -> str:
    boxes, scores = selective_search(scene(40), preset)
    return hashlib.sha256(boxes.tobytes() + scores.tobytes()).hexdigest()


@pytest.mark.parametrize("preset", PRESETS)
def test_finds_the_objects_first(preset):
    boxes, scores = selective_search(scene(), preset)
    assert boxes.dtype == scores.dtype == np.float32 and boxes.shape == (len(scores), 4)
    for box in OBJECTS:
        assert box_iou(box, boxes[:10]).max() > 0.85
    assert (np.diff(scores) <= 0).all()


def test_boxes_are_those_of_two_halves_and_of_nested_squares():
    halves = np.zeros((40, 60, 3), dtype=np.uint8)
    halves[:, 20:] = 200
    halves_and_all = np.array([[0, 0, 20, 40], [20, 0, 40, 40], [0, 0, 60, 40]])
    boxes, _ = selective_search(halves, nms_threshold=1.0)
    assert all(box_iou(box, boxes).max() >= 0.95 for box in halves_and_all)
    assert all(box_iou(box, halves_and_all).max() >= 0.9 for box in boxes)  # smoothing moves an edge by a pixel
    nested = np.zeros((90, 90, 3), dtype=np.uint8)
    nested[15:75, 15:75], nested[30:60, 30:60] = (0, 160, 0), (240, 240, 0)
    boxes, _ = selective_search(nested)
    for box in np.array([[30, 30, 30, 30], [15, 15, 60, 60], [0, 0, 90, 90]]):
        assert box_iou(box, boxes).max() > 0.85


def test_boxes_are_xywh_of_the_given_image_not_of_the_shrunk_copy():
    for scale in (1, 5):
        image = cv2.resize(scene(), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        boxes, _ = selective_search(image)
        assert all(box_iou(box * scale, boxes).max() > 0.85 for box in OBJECTS)


@pytest.mark.parametrize("turn", [np.fliplr, np.flipud, np.rot90, lambda image: image.transpose(1, 0, 2)])
def test_turned_images_give_turned_objects(turn):
    boxes, _ = selective_search(turn(scene(20)))
    for x, y, width, height in OBJECTS:
        mask = np.zeros((240, 300, 1), dtype=np.uint8)
        mask[y : y + height, x : x + width] = 1
        expected = cv2.boundingRect(np.ascontiguousarray(turn(mask)))
        assert box_iou(np.array(expected), boxes[:20]).max() > 0.8


def average_recall(boxes: np.ndarray, objects: np.ndarray) -> float:
    best = np.array([box_iou(box, boxes).max() for box in objects])
    return float(np.mean([best >= threshold for threshold in np.arange(0.5, 1, 0.05)]))


def test_beats_boxes_that_have_not_seen_the_image():
    recalls = {"search": [], "random": [], "grid": []}
    for seed in range(12):
        image, objects, _ = render_scene(np.random.default_rng(seed), 192, 256)
        recalls["search"].append(average_recall(selective_search(image, max_boxes=100)[0], objects))
        recalls["random"].append(average_recall(random_boxes((192, 256), 100, seed), objects))
        recalls["grid"].append(average_recall(grid_boxes((192, 256), 100), objects))
    means = {name: np.mean(values) for name, values in recalls.items()}
    assert means["search"] > 0.5 and means["search"] > 3 * max(means["random"], means["grid"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 5, 30]), st.booleans())
def test_any_image_gives_ordered_boxes_inside_it(seed, height, width, cell, grey):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
    image = image.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    image = np.ascontiguousarray(image[:, :, :1].repeat(3, axis=2)) if grey else image[:, ::-1]  # any strides
    boxes, scores = selective_search(image, "tiny", nms_threshold=1.0, max_boxes=None)
    assert len(boxes) == len(scores) > 0 and (np.diff(scores) <= 0).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array([width, height]) * (1 + 1e-6)).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)


def test_same_result_on_every_run_and_thread():
    expected = fingerprint()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fingerprint(), range(8))) == {expected}


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 300), (50, 8000), (8000, 50), (1, 300_000), (3, 8000)])
@pytest.mark.parametrize("content", ["flat", "noise"])
def test_odd_sizes_end_in_bounded_time(size, content):
    selective_search(np.zeros((1, 1, 3), dtype=np.uint8))  # compiled
    image = np.full((*size, 3), 77, dtype=np.uint8)
    if content == "noise":
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    start = time.process_time()
    boxes, scores = selective_search(image)
    assert time.process_time() - start < 1
    assert len(boxes) == len(scores) > 0
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size[::-1]) * (1 + 1e-6)).all()
    if content == "flat":
        assert boxes.tolist() == [[0, 0, size[1], size[0]]]


def test_another_process_finds_the_same_and_little_memory_is_enough_for_twenty_megapixels():
    code = """
import resource, sys, time, numpy as np
sys.path.append("tests")
from test_selective_search import fingerprint, selective_search
result = fingerprint()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
image = np.random.default_rng(0).integers(0, 256, (4000, 5000, 3), dtype=np.uint8)
selective_search(image[:600, :800])
before, start = peak(), time.process_time()
boxes, _ = selective_search(image)
print(result, peak() - before, time.process_time() - start, len(boxes))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    result, megabytes, seconds, number = run.stdout.split()
    assert result == fingerprint()
    assert float(megabytes) < 30 and float(seconds) < 2 and int(number) > 0


def test_scores_are_votes_persistence_and_distance_to_the_edge():
    first = (np.array([[10, 10, 20, 20], [30, 30, 90, 90], [60, 60, 70, 70]]), np.array([3, 1, 2]))
    second = (np.array([[10, 10, 20, 19], [30, 30, 90, 90], [0, 0, 100, 100]]), np.array([5, 7, 6]))
    boxes, scores = rank_regions([first, second], (100, 100))
    # Both hold 30..90, of ranks 0 and 2/3; 10 x 10 and 10 x 9 agree, of ranks 2/3 and 0; all of it has four edges.
    assert boxes.tolist() == [[10, 10, 20, 20], [30, 30, 90, 90], [10, 10, 20, 19], [60, 60, 70, 70], [0, 0, 100, 100]]
    np.testing.assert_allclose(scores, [1 + 0.08, 1 + 0.08, 1, 0.5 + 0.04, 0.5 + 0.04 - 4 * 0.05])


def test_too_many_hierarchies_are_refused():
    assert Preset(1000, scales=tuple(range(1, 8)), shares=(1.0,))
    with pytest.raises(ValueError, match="1 to 63 hierarchies of regions, not 64"):
        Preset(1000, scales=tuple(range(1, 9)))
    with pytest.raises(ValueError, match="not 0"):
        Preset(1000, spaces=())


def test_presets_find_more_and_more():
    counts = [len(selective_search(scene(40), preset, max_boxes=None)[0]) for preset in ("tiny", "default", "quality")]
    assert counts[0] < counts[1] < counts[2]


def test_selection_arguments_are_used():
    image = scene(40)
    everything = selective_search(image, nms_threshold=1.0, max_boxes=None)[0]
    default = selective_search(image)[0]
    large = selective_search(image, min_side=60)[0]
    assert len(large) < len(default) < len(everything) and (large[:, 2:] >= 60).all()
    assert len(selective_search(image, max_boxes=7)[0]) == 7


@pytest.mark.parametrize(
    "image",
    [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match=r"uint8 of shape \[H, W, 3\]"):
        selective_search(image)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="tiny, default, quality"):
        selective_search(scene(), "slow")
    with pytest.raises(ValueError, match="Unknown preset None"):
        selective_search(scene(), None)


def test_works_where_nothing_can_be_written(tmp_path):
    """A read-only installation caches in the user's folder; without one, it compiles in memory."""
    package = tmp_path / "installed"
    package.mkdir()
    shutil.copy(ROOT / "aligndet_hf" / "proposals" / "kernels.py", package)
    (package / "__pycache__").touch()  # a file in the place of the folder: not even root can write there
    code = (
        "import kernels, numpy; "
        "indices = kernels.texture(numpy.zeros((1, 2), numpy.int32)); "
        "print(indices.tolist(), kernels.texture.stats.cache_path)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "NUMBA_"))}
    for home, folder in [(str(tmp_path), str(tmp_path / ".cache" / "numba")), (os.devnull, "None")]:
        environment |= {"HOME": home, "PYTHONPATH": str(package)}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert run.stdout.startswith(f"[[0, 0]] {folder}"), run.stderr
