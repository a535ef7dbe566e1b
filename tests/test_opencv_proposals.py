"""OpenCV's selective search with our order: reproducible, in the image's pixels, bounded on odd images."""

import hashlib
import multiprocessing
import time
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from aligndet_hf.proposals import opencv
from aligndet_hf.proposals.filters import box_iou, unique_boxes
from aligndet_hf.proposals.opencv import agreement_scores, opencv_selective_search

OBJECTS = np.array([[30, 40, 60, 80], [150, 30, 90, 60], [120, 130, 70, 70]])


def scene(noise: int = 6) -> np.ndarray:
    """Three coloured rectangles (`OBJECTS`, xywh) on a grey ground, 240 high and 300 wide."""
    image = np.full((240, 300, 3), 110, dtype=np.int64)
    for (x, y, width, height), colour in zip(OBJECTS, [(220, 40, 30), (30, 60, 220), (40, 200, 60)], strict=True):
        image[y : y + height, x : x + width] = colour
    image += np.random.default_rng(0).integers(-noise, noise + 1, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def fingerprint(image: np.ndarray) -> str:
    boxes, scores = opencv_selective_search(image)
    return hashlib.sha256(boxes.tobytes() + scores.tobytes()).hexdigest()


def test_finds_the_objects_first():
    boxes, scores = opencv_selective_search(scene(), max_boxes=20)
    assert boxes.dtype == scores.dtype == np.float32 and boxes.shape == (len(scores), 4)
    for box in OBJECTS:
        assert box_iou(box, boxes[:10]).max() > 0.85
    assert (np.diff(scores) <= 0).all()


def test_boxes_are_xywh_of_the_given_image_not_of_the_resized_copy():
    small, large = scene(), cv2.resize(scene(), (1500, 1200), interpolation=cv2.INTER_NEAREST)
    for image, scale in [(small, 1), (large, 5)]:
        boxes, _ = opencv_selective_search(image)
        assert all(box_iou(box * scale, boxes).max() > 0.85 for box in OBJECTS)
        assert boxes.min() >= 0
        assert (boxes[:, :2] + boxes[:, 2:] <= [300 * scale + 1e-3, 240 * scale + 1e-3]).all()


def test_the_channel_order_is_rgb():
    """OpenCV converts from BGR to HSV and Lab, where red and blue are not alike: a swap changes the boxes."""
    seen = []
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()

    class Recorder:
        def setBaseImage(self, image):
            seen.append(image[0, 0].tolist())
            search.setBaseImage(image)

        def __getattr__(self, name):
            return getattr(search, name)

    create, segmentation = Recorder, cv2.ximgproc.segmentation
    original, segmentation.createSelectiveSearchSegmentation = segmentation.createSelectiveSearchSegmentation, create
    try:
        opencv_selective_search(np.full((20, 20, 3), (255, 10, 0), dtype=np.uint8))
    finally:
        segmentation.createSelectiveSearchSegmentation = original
    assert seen == [[0, 10, 255]]


def test_same_result_on_every_run_thread_count_and_process():
    """OpenCV's own order draws from C `rand()`, so a second run in one process would differ."""
    image = scene(noise=40)
    first = fingerprint(image)
    assert fingerprint(image) == first
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        assert fingerprint(image) == first
    finally:
        cv2.setNumThreads(threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(fingerprint, (image,)) == first


def test_scores_depend_on_the_set_of_boxes_only():
    boxes = unique_boxes(np.random.default_rng(0).integers(0, 60, (300, 4)) + [0, 0, 1, 1])
    order = np.random.default_rng(1).permutation(len(boxes))
    np.testing.assert_array_equal(agreement_scores(boxes)[order], agreement_scores(boxes[order]))


def test_agreement_counts_by_hand():
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 80], [0, 0, 100, 74], [300, 0, 9, 9]])
    # 100 x 80 overlaps the first by 0.8 and the third by 74 / 80; the first and the third overlap by 0.74 only.
    assert np.floor(agreement_scores(boxes)).tolist() == [2, 3, 2, 1]
    many = np.concatenate([boxes + [1000 * i, 0, 0, 0] for i in range(300)])  # more than one slice of rows
    assert np.floor(agreement_scores(many)).tolist() == [2, 3, 2, 1] * 300
    assert agreement_scores(np.zeros((0, 4), int)).shape == (0,)


def test_equal_counts_are_not_ordered_by_place():
    places = np.arange(0, 4000, 20)
    boxes = np.stack([places, places, np.full_like(places, 10), np.full_like(places, 10)], axis=1)
    scores = agreement_scores(boxes)
    assert len(np.unique(scores)) > 150
    assert abs(np.corrcoef(places, scores)[0, 1]) < 0.2
    assert 0.4 < (scores - 1).mean() < 0.6


@pytest.mark.parametrize("mode", ["single", "fast"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 300), (50, 8000), (8000, 50), (3, 8000)])
@pytest.mark.parametrize("content", ["flat", "noise"])
def test_odd_sizes_end_in_bounded_time(mode, size, content):
    image = np.full((*size, 3), 77, dtype=np.uint8)
    if content == "noise":
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    start = time.process_time()
    boxes, scores = opencv_selective_search(image, mode=mode)
    assert time.process_time() - start < 10
    assert len(boxes) == len(scores) and np.isfinite(boxes).all()
    assert (boxes >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array(size)[::-1] + 1e-2).all()


def test_grey_and_flat_images():
    grey = np.repeat(cv2.cvtColor(scene(), cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2)
    boxes, _ = opencv_selective_search(grey)
    assert all(box_iou(box, boxes).max() > 0.8 for box in OBJECTS)
    flat, _ = opencv_selective_search(np.zeros((240, 300, 3), dtype=np.uint8))
    assert flat.tolist() in ([], [[0, 0, 300, 240]])


def test_modes_find_more_and_more():
    counts = [len(opencv_selective_search(scene(40), mode, 100, max_boxes=None)[0]) for mode in ("single", "fast")]
    assert counts[0] < counts[1]


def test_selection_arguments_are_used():
    image = scene(40)
    everything = opencv_selective_search(image, nms_threshold=1.0, max_boxes=None)[0]
    default = opencv_selective_search(image)[0]
    large = opencv_selective_search(image, min_side=60)[0]
    assert len(large) < len(default) < len(everything) and (large[:, 2:] >= 60).all()


@pytest.mark.parametrize(
    "image",
    [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match=r"uint8 of shape \[H, W, 3\]"):
        opencv_selective_search(image)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="single, fast, quality"):
        opencv_selective_search(scene(), mode="slow")


@pytest.mark.parametrize("left", ["nothing", "an empty module", "a module without the function"])
def test_opencv_without_contrib_is_named(monkeypatch, left):
    """Where another package of OpenCV has overwritten the files, some of contrib may be left."""
    if left == "nothing":
        monkeypatch.delattr(cv2, "ximgproc")
    elif left == "an empty module":
        monkeypatch.setattr(cv2, "ximgproc", ModuleType("cv2.ximgproc"))
    else:
        monkeypatch.delattr(cv2.ximgproc.segmentation, "createSelectiveSearchSegmentation")
    with pytest.raises(ImportError, match=r"aligndet-hf\[opencv\].*opencv-contrib-python-headless.*selective_search"):
        opencv_selective_search(scene())


def test_no_other_module_needs_contrib():
    """The core has plain OpenCV: only this module, and the script that compares with it, may use what is not in it."""
    package = Path(opencv.__file__).parents[1]
    users = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if "ximgproc" in path.read_text()]
    assert users == ["proposals/opencv.py"]
