"""What is told of a detector beyond its AP: numbers by hand."""

import numpy as np
import pytest

from aligndet_hf.evaluation.coco_metrics import CocoMetrics
from aligndet_hf.evaluation.diagnosis import Diagnosis, format_diagnosis

A, B = [0, 0, 10, 10], [50, 50, 60, 60]


def found(*detections):
    boxes, labels, scores = zip(*detections, strict=True) if detections else ((), (), ())
    return {"boxes": np.array(boxes).reshape(-1, 4), "labels": np.array(labels, int), "scores": np.array(scores)}


def truth(*objects):
    boxes, labels = zip(*objects, strict=True) if objects else ((), ())
    return {"boxes": np.array(boxes).reshape(-1, 4), "labels": np.array(labels, int)}


def diagnose(*images, categories=("cat", "dog")):
    diagnosis = Diagnosis(categories)
    for number, (prediction, objects) in enumerate(images):
        diagnosis.update(number, prediction, objects)
    return diagnosis.compute()


def test_the_best_threshold_is_where_f1_is_highest():
    # of three cats two are found, with 0.9 and 0.6; between them a mistake with 0.7, below them one with 0.2
    result = diagnose(
        (found((A, 0, 0.9), (B, 0, 0.7)), truth((A, 0))),
        (found((A, 0, 0.6), (B, 0, 0.2)), truth((A, 0), ([80, 80, 90, 90], 0))),
    )
    cat = result["per_class"]["cat"]
    assert (cat["objects"], cat["best_threshold"]) == (3, 0.6)
    assert (cat["precision"], cat["recall"]) == pytest.approx((2 / 3, 2 / 3)) and cat["f1"] == pytest.approx(2 / 3)
    assert cat["curve"][0] == 1 and cat["curve"][33] == 1 and cat["curve"][34] == pytest.approx(2 / 3, abs=1e-4)
    assert cat["curve"][66] == pytest.approx(2 / 3, abs=1e-4) and cat["curve"][67] == 0
    assert result["per_class"]["dog"]["best_threshold"] == 1 and result["per_class"]["dog"]["objects"] == 0


def test_the_mean_of_the_curve_is_the_ap_at_half():
    rng = np.random.default_rng(0)
    images, annotations, predictions, diagnosis = [], [], [], Diagnosis(["cat"])
    for number in range(30):
        corners = rng.uniform(0, 300, (6, 2)).round()
        sides = rng.uniform(20, 60, (6, 2)).round()
        boxes = np.hstack([corners, corners + sides])
        images.append({"id": number, "file_name": f"{number}", "width": 400, "height": 400})
        annotations += [
            {"id": 6 * number + n + 1, "image_id": number, "category_id": 0, "bbox": [*corner, *side],
             "area": float(side.prod()), "iscrowd": 0}
            for n, (corner, side) in enumerate(zip(corners, sides, strict=True))
        ]  # fmt: skip
        moved = boxes + rng.uniform(-9, 9, boxes.shape)
        predictions.append({"boxes": moved, "scores": 0.02 + rng.random(6) / 2, "labels": np.zeros(6, int)})
        diagnosis.update(number, predictions[-1], {"boxes": boxes, "labels": np.zeros(6, int)})
    categories = [{"id": 0, "name": "cat"}]
    metrics = CocoMetrics({"images": images, "annotations": annotations, "categories": categories})
    metrics.update(predictions, range(30))
    curve = diagnosis.compute()["per_class"]["cat"]["curve"]
    assert np.mean(curve) == pytest.approx(metrics.compute()["AP50"], abs=1e-4) and 0.1 < np.mean(curve) < 0.9


def test_kinds_of_error():
    result = diagnose(
        # every class once right with the lowest score, so that the thresholds keep all that follows
        *[(found((A, 0, 0.5), (B, 1, 0.5)), truth((A, 0), (B, 1)))] * 6,
        (found((A, 1, 0.9)), truth((A, 0))),  # a cat taken for a dog
        (found(([4, 4, 14, 14], 0, 0.9)), truth((A, 0))),  # beside it: IoU 0.22
        (found(([4, 4, 14, 14], 1, 0.9)), truth((A, 0))),  # beside it, and another class
        (found((A, 0, 0.9), ([1, 0, 11, 10], 0, 0.8)), truth((A, 0))),  # found twice
        (found((B, 0, 0.9)), truth((A, 0))),  # nothing there, and an object without a hint
        *[(found((A, 0, 0.95), (B, 1, 0.95)), truth((A, 0), (B, 1)))] * 8,
    )
    assert [result["per_class"][name]["best_threshold"] for name in ("cat", "dog")] == [0.5, 0.5]
    assert result["errors"] == {
        "wrong class": 1, "wrong place": 1, "wrong class and place": 1, "double": 1, "background": 1, "missed": 1,
    }  # fmt: skip
    worst = result["worst_images"]
    assert worst[0] == {"image_id": 6, "false": 1, "missed": 1}
    assert [image["image_id"] for image in worst] == [6, 7, 8, 10, 9]


def test_confusion_has_a_row_and_a_column_for_the_background():
    result = diagnose(
        (found((A, 0, 0.5), (B, 1, 0.5)), truth((A, 0), (B, 1))),
        (found((A, 1, 0.9)), truth((A, 0))),
        (found((B, 0, 0.9)), truth((A, 0))),
        *[(found((A, 0, 0.95), (B, 1, 0.95)), truth((A, 0), (B, 1)))] * 8,
    )
    #                            cat dog nothing
    assert result["confusion"] == [[9, 1, 1], [0, 9, 0], [1, 0, 0]]


def test_found_by_size():
    large, medium = [0, 0, 200, 200], [0, 0, 50, 50]
    result = diagnose(
        (found((A, 0, 0.9), (large, 0, 0.9)), truth((A, 0), (large, 0))),
        (found(), truth((medium, 0))),
    )
    assert result["by_size"] == {
        "small": {"objects": 1, "found": 1},
        "medium": {"objects": 1, "found": 0},
        "large": {"objects": 1, "found": 1},
    }


def test_nothing_at_all_and_the_table():
    result = diagnose((found(), truth((A, 0))))
    assert result["errors"]["missed"] == 1 and result["confusion"][0] == [0, 0, 1]
    text = format_diagnosis(result, ["cat", "dog"])
    assert "missed 1" in text and "small 0 of 1" in text
    assert text.splitlines()[1].split() == ["cat", "1", "–", "0.00", "0.00", "0.00"]  # no threshold to recommend


def test_errors_by_size_and_one_threshold_for_all():
    large, beside = [0, 0, 200, 200], [100, 0, 300, 200]  # IoU 1/3
    result = diagnose(
        (found((A, 0, 0.9), (beside, 1, 0.8)), truth((A, 0), (large, 1))),
        (found((large, 1, 0.7)), truth((large, 1), (B, 0))),
    )
    errors = result["errors_by_size"]
    assert errors["large"]["wrong place"] == 1 and errors["small"]["missed"] == 1
    assert sum(sum(kinds.values()) for kinds in errors.values()) == sum(result["errors"].values()) == 2
    # Together: right with 0.9, wrong with 0.8, right with 0.7, of four objects: F1 is 4/7 with all three.
    assert result["best_threshold"] == 0.7 and result["f1"] == pytest.approx(4 / 7)


def test_pairs_of_metrics_are_what_was_found_and_what_there_is():
    annotations = [
        {"image_id": "b", "category_id": 1, "bbox": [50, 50, 10, 10]},
        {"image_id": "b", "category_id": 0, "bbox": [0, 0, 90, 90], "iscrowd": 1},
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog"))]
    metrics = CocoMetrics({"images": [{"id": "b"}, {"id": "a"}], "annotations": annotations, "categories": categories})
    metrics.predictions["b"] = (np.array([0.5]), np.array([1]), np.array([B], float))
    (first, prediction, objects), (second, nothing, no_objects) = metrics.pairs()
    assert (first, second) == ("b", "a") and objects["boxes"].tolist() == [B] and objects["labels"].tolist() == [1]
    assert prediction["boxes"].tolist() == [B] and prediction["scores"].tolist() == [0.5]
    assert nothing["boxes"].shape == no_objects["boxes"].shape == (0, 4) and not len(no_objects["labels"])


def test_what_lies_in_a_crowd_is_no_error():
    crowd = {"image_id": 0, "category_id": 0, "bbox": [50, 50, 200, 200], "iscrowd": 1}
    objects = [{"image_id": 0, "category_id": 0, "bbox": box} for box in ([0, 0, 20, 20], [60, 60, 40, 40])]
    categories = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog"))]
    metrics = CocoMetrics({"images": [{"id": 0}], "annotations": [crowd, *objects], "categories": categories})
    boxes = [
        [0, 0, 20, 20],
        [60, 60, 100, 100],  # an object in the crowd
        [60, 60, 100, 100],  # and again
        [110, 110, 150, 150],
        [20, 110, 60, 150],  # a quarter of it is in the crowd
        [110, 110, 150, 150],  # no dog in a crowd of cats
    ]
    scores, labels = np.array([0.5, 0.8, 0.7, 0.9, 0.4, 0.6]), np.array([0, 0, 0, 0, 0, 1])
    metrics.update([{"scores": scores, "labels": labels, "boxes": np.array(boxes, float)}], [0])
    ((_, prediction, truth),) = metrics.pairs()
    assert sorted(prediction["scores"].tolist()) == [0.4, 0.5, 0.6, 0.8]
    result = diagnose((prediction, truth))
    best = result["per_class"]["cat"]
    assert (best["best_threshold"], best["precision"], best["recall"]) == (0.5, 1, 1)
    assert metrics.compute()["per_class"]["cat"] == pytest.approx(1)
    assert result["errors"]["double"] == result["errors"]["background"] == 0
