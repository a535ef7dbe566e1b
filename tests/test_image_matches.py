"""AP on any choice of images from saved matches equals pycocotools', also with crowds, ties and repeated images."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet_hf.evaluation.coco_metrics import CocoMetrics
from aligndet_hf.evaluation.image_matches import ImageMatches


def scenes(seed: int, images: int = 5) -> tuple[dict, dict]:
    """Ground truth of two classes in COCO format, and predictions near it, with ties, misses and crowds."""
    rng = np.random.default_rng(seed)
    annotations, predictions = [], {}
    for image in range(images):
        boxes, labels = [], []
        for _ in range(rng.integers(0, 5)):
            box = [*rng.integers(0, 60, 2).tolist(), *rng.integers(5, 40, 2).tolist()]
            label, crowd = int(rng.integers(2)), int(rng.random() < 0.2)
            annotations.append({"image_id": image, "category_id": label, "bbox": box, "iscrowd": crowd})
            for _ in range(rng.integers(0, 4)):
                near = np.array(box) + rng.integers(-4, 5, 4)
                boxes.append([near[0], near[1], near[0] + max(near[2], 1), near[1] + max(near[3], 1)])
                labels.append(label if rng.random() < 0.8 else 1 - label)
        if rng.random() < 0.8:
            scores = rng.permutation(20)[: len(boxes)].astype(np.float32) / 20  # as in other images, not in this one
            predictions[image] = {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": labels, "scores": scores}
    truth = {"images": [{"id": image} for image in range(images)], "annotations": annotations}
    return truth | {"categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}, predictions


def matched(truth: dict, predictions: dict) -> ImageMatches:
    metrics = CocoMetrics(truth)
    metrics.update(list(predictions.values()), list(predictions))
    return ImageMatches.of(metrics)


def pycocotools_ap(truth: dict, predictions: dict, weights: np.ndarray) -> float:
    """The AP on images that are repeated, each beside its copies."""
    copies = [(image, copy) for image, weight in enumerate(weights) for copy in range(weight)]
    annotations, detections = [], []
    for number, (image, _) in enumerate(copies, start=1):
        own = [a for a in truth["annotations"] if a["image_id"] == image]
        annotations += [a | {"image_id": number, "area": a["bbox"][2] * a["bbox"][3]} for a in own]
        for (x1, y1, x2, y2), label, score in zip(*predictions.get(image, EMPTY).values(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            detections.append({"image_id": number, "category_id": label, "bbox": box, "score": score})
            detections[-1] |= {"area": box[2] * box[3], "iscrowd": 0}
    sides = []
    for rows in (annotations, detections):
        side = COCO()
        side.dataset = {
            "images": [{"id": number} for number in range(1, len(copies) + 1)],
            "categories": truth["categories"],
            "annotations": [row | {"id": number} for number, row in enumerate(rows, start=1)],
        }
        side.createIndex()
        sides.append(side)
    evaluation = COCOeval(*sides, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    values = evaluation.eval["precision"][..., 0, -1]
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


EMPTY = {"boxes": [], "labels": [], "scores": []}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_equal_to_pycocotools_on_any_sample(seed):
    truth, predictions = scenes(seed)
    matches = matched(truth, predictions)
    rng = np.random.default_rng(seed)
    for weights in (np.ones(5, int), rng.multinomial(5, np.full(5, 0.2))):
        with contextlib.redirect_stdout(io.StringIO()):
            expected = pycocotools_ap(truth, predictions, weights)
        assert matches.average_precision(weights) == pytest.approx(expected, abs=1e-9)
    assert matches.average_precision() == matches.average_precision(np.ones(5, int))


def test_by_hand_and_through_a_file(tmp_path):
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 0, "name": "a"}],
        "annotations": [{"image_id": i, "category_id": 0, "bbox": [0, 0, 10, 10]} for i in (1, 2)],
    }
    right, wrong = [[0.0, 0, 10, 10]], [[50.0, 50, 60, 60]]
    matches = matched(
        truth,
        {
            1: {"boxes": right, "labels": [0], "scores": [0.5]},
            2: {"boxes": wrong, "labels": [0], "scores": [0.9]},
        },
    )
    matches.save(tmp_path / "matches.npz")
    matches = ImageMatches.load(tmp_path / "matches.npz")
    assert matches.average_precision(np.array([1, 0])) == pytest.approx(1)
    assert matches.average_precision(np.array([0, 3])) == 0
    # One of two objects is found, by the second detection: precision 1/2 up to a recall of 1/2, 51 of 101 points.
    assert matches.average_precision() == pytest.approx(0.5 * 51 / 101)
    # Twice the first image: two of three objects are found, the better of its precisions is 2/3.
    assert matches.average_precision(np.array([2, 1])) == pytest.approx(2 / 3 * 67 / 101)
    assert matches.average_precision(np.zeros(2, int)) == -1
