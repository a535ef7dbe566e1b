"""COCO numbers: those of pycocotools, from batches, from many processes, from a dataset."""

import contextlib
import io
import json
from pathlib import Path

import datasets
import forks
import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet_hf.data.errors import DataError
from aligndet_hf.evaluation import CocoMetrics, format_table
from aligndet_hf.evaluation.coco_metrics import SUMMARY


def pycocotools_results(ground_truth: dict, predictions: dict[int, dict]) -> dict:
    """What a user of pycocotools would do, with all detections."""
    results = [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)],
            "score": float(score),
        }
        for image_id, found in predictions.items()
        for score, label, (x1, y1, x2, y2) in zip(found["scores"], found["labels"], found["boxes"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(ground_truth))
        for annotation in truth.dataset["annotations"]:
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(SUMMARY, evaluation.stats, strict=True))
    expected["per_class"] = {}
    for number, category in enumerate(ground_truth["categories"]):
        precision = evaluation.eval["precision"][:, :, number, 0, 2]
        precision = precision[precision > -1]
        expected["per_class"][category["name"]] = precision.mean() if precision.size else -1
    return expected


def random_case(seed: int, images: int, categories: int, detections: int):
    """Ground truth (crowds, own areas, images and categories without objects) and detections near and far from it."""
    rng = np.random.default_rng(seed)
    category_ids = np.sort(rng.choice(50, categories, replace=False))
    image_ids = rng.choice(10**4, images, replace=False).tolist()
    annotations, predictions = [], {}
    for image_id in image_ids:
        # A coarse grid of places, sizes and scores makes many ties.
        count = rng.integers(0, 8) * rng.integers(0, 2)
        boxes = np.concatenate([rng.integers(0, 40, (count, 2)) * 5, rng.choice([8, 20, 30, 90, 120], (count, 2))], 1)
        for box in boxes.tolist():
            category = int(rng.choice(category_ids[: max(1, categories - 1)]))
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box}
            annotation["area"] = box[2] * box[3] * float(rng.choice([1, 0.5]))
            annotation["iscrowd"] = int(rng.random() < 0.15)
            annotations.append(annotation)
        own = [annotation["category_id"] for annotation in annotations if annotation["image_id"] == image_id]
        found = np.concatenate([boxes + rng.integers(-3, 4, boxes.shape), rng.integers(0, 200, (detections, 4))])
        labels = np.concatenate([np.array(own, dtype=int), rng.choice(category_ids, detections)])
        some = rng.permutation(np.flatnonzero(rng.random(len(found)) < 0.8))
        found, labels = found[some], labels[some]
        found[:, 2:] = found[:, :2] + np.maximum(found[:, 2:], 1)
        if rng.random() < 0.8:
            predictions[image_id] = {
                "scores": (rng.integers(1, 12, len(found)) / 12).astype(np.float32),
                "labels": labels,
                "boxes": found.astype(np.float32),
            }
    truth = {
        "images": [{"id": image_id} for image_id in image_ids],
        "categories": [{"id": int(category), "name": f"class {category}"} for category in category_ids],
        "annotations": annotations,
    }
    return truth, predictions


def measured(truth: dict, predictions: dict, batch: int = 3) -> dict:
    metrics = CocoMetrics(truth)
    ids = list(predictions)
    for start in range(0, len(ids), batch):
        metrics.update([predictions[i] for i in ids[start : start + batch]], ids[start : start + batch])
    return metrics.compute()


def assert_same(results: dict, expected: dict):
    results, expected = dict(results), dict(expected)
    assert results.pop("per_class") == pytest.approx(expected.pop("per_class"), abs=1e-12)
    assert results == pytest.approx(expected, abs=1e-12)


def perfect(truth: dict) -> dict[int, dict]:
    predictions = {}
    for image in truth["images"]:
        own = [annotation for annotation in truth["annotations"] if annotation["image_id"] == image["id"]]
        boxes = np.array([annotation["bbox"] for annotation in own], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([annotation["category_id"] for annotation in own], dtype=int)
        predictions[image["id"]] = {"scores": np.ones(len(own)), "labels": labels, "boxes": boxes}
    return predictions


# Object sizes: small (10 x 10), medium (50 x 50) and large (100 x 100).
TRUTH = {
    "images": [{"id": 7}, {"id": 3}],
    "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10]},
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [20, 20, 50, 50]},
        {"id": 2, "image_id": 3, "category_id": 5, "bbox": [100, 100, 100, 100]},
    ],
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 4), st.integers(0, 20))
def test_equals_pycocotools(seed, images, categories, detections):
    truth, predictions = random_case(seed, images, categories, detections)
    assert_same(measured(truth, predictions), pycocotools_results(truth, predictions))


def test_equals_pycocotools_with_more_detections_than_count():
    truth, predictions = random_case(0, images=4, categories=2, detections=700)
    results = measured(truth, predictions)
    assert_same(results, pycocotools_results(truth, predictions))
    assert results["AR100"] > results["AR10"] > 0


def test_by_hand():
    results = measured(TRUTH, perfect(TRUTH))
    assert_same(results, {**dict.fromkeys(SUMMARY, 1.0), "AR1": 0.75, "per_class": {"cat": 1.0, "dog": 1.0}})
    # The dog is missed, and the larger cat found at an IoU of 40 / 50 = 0.8 (7 of 10 thresholds), after a wrong box.
    predictions = perfect(TRUTH)
    predictions.pop(3)
    predictions[7] = {
        "scores": [0.9, 0.8, 0.7],
        "labels": [2, 2, 2],
        "boxes": [[0, 0, 10, 10], [200, 0, 210, 10], [20, 20, 60, 70]],
    }
    # Precision 1 up to recall 0.5 (51 of 101 levels), then 2/3 up to recall 1.
    cat = 51 / 101 + 0.7 * 2 / 3 * 50 / 101
    results = measured(TRUTH, predictions)
    assert results["per_class"] == pytest.approx({"cat": cat, "dog": 0})
    assert results["AP"] == pytest.approx(cat / 2)
    assert (results["APs"], results["APl"], results["AR100"]) == pytest.approx((1.0, 0.0, 0.85 / 2))


def test_nothing_to_find_is_minus_one_and_nothing_found_is_zero():
    assert measured(TRUTH, {})["AP"] == 0
    empty = {**TRUTH, "annotations": []}
    assert measured(empty, perfect(TRUTH)) == {**dict.fromkeys(SUMMARY, -1.0), "per_class": {"cat": -1, "dog": -1}}


def test_annotation_zero_counts():
    """pycocotools alone takes a match with the annotation of id 0 for none."""
    assert pycocotools_results(TRUTH, perfect(TRUTH))["AP"] < 1
    assert measured(TRUTH, perfect(TRUTH))["AP"] == pytest.approx(1)


def test_tensors_lists_and_half_precision_are_alike():
    truth, predictions = random_case(5, images=4, categories=3, detections=10)
    expected = measured(truth, predictions)
    for convert in (torch.as_tensor, np.ndarray.tolist):
        converted = {i: {key: convert(value) for key, value in p.items()} for i, p in predictions.items()}
        assert measured(truth, converted) == expected
    bfloat = {i: {k: torch.as_tensor(v) for k, v in p.items()} for i, p in predictions.items()}
    for prediction in bfloat.values():
        prediction["scores"] = prediction["scores"].bfloat16()
    assert set(measured(truth, bfloat)) == set(expected)
    metrics = CocoMetrics(truth)
    metrics.update(list(predictions.values()), torch.tensor(list(predictions)))
    assert metrics.compute() == expected


def test_keeps_little_and_no_reference_to_the_input():
    truth, predictions = random_case(2, images=1, categories=2, detections=3000)
    truth["images"], image_id = [{"id": 4}], 4
    truth["annotations"] = []
    (prediction,) = predictions.values()
    metrics = CocoMetrics(truth)
    metrics.update([prediction], [image_id])
    scores, labels, boxes = metrics.predictions[image_id]
    assert len(scores) == len(labels) == len(boxes) == 200  # 100 of each category, not 2400
    for label in np.unique(labels):
        best = np.sort(prediction["scores"][prediction["labels"] == label])[::-1][:100]
        assert scores[labels == label].tolist() == best.tolist()
    assert boxes.dtype == scores.dtype == np.float32
    before = [scores.copy(), boxes.copy()]
    prediction["scores"][:], prediction["boxes"][:] = 0, 0
    assert (metrics.predictions[image_id][0] == before[0]).all()
    assert (metrics.predictions[image_id][2] == before[1]).all()


def test_an_image_that_comes_twice_counts_once_and_reset_forgets():
    metrics = CocoMetrics(TRUTH)
    wrong = {"scores": [1.0], "labels": [2], "boxes": [[300, 300, 310, 310]]}
    metrics.update([wrong, wrong], [7, 3])
    assert metrics.compute()["AP"] == 0
    predictions = perfect(TRUTH)
    metrics.update([predictions[7], predictions[3]], [7, 3])
    assert metrics.compute()["AP"] == pytest.approx(1)
    metrics.reset()
    assert metrics.compute()["AP"] == 0


def test_unusable_detections_are_left_out():
    predictions = perfect(TRUTH)
    extra = {
        "scores": [1.0, float("nan"), 1.0, 1.0],
        "labels": [99, 2, 2, 2],
        "boxes": [[0, 0, 5, 5], [0, 0, 5, 5], [float("nan"), 0, 5, 5], [0, 0, float("inf"), 5]],
    }
    metrics = CocoMetrics(TRUTH)
    metrics.update([{key: np.concatenate([extra[key], predictions[7][key]]) for key in extra}, predictions[3]], [7, 3])
    assert [len(kept) for kept in metrics.predictions[7]] == [2, 2, 2]
    assert metrics.compute()["AP"] == pytest.approx(1)


def test_images_without_predictions_are_mentioned(caplog):
    predictions = perfect(TRUTH)
    measured(TRUTH, predictions)
    assert not caplog.records
    predictions.pop(3)
    assert measured(TRUTH, predictions)["AP"] == pytest.approx(0.5)
    assert "1 of 2 images have no predictions" in caplog.text


def test_ids_may_be_texts():
    """Also with equal scores, of which the order of the ids decides: "10" comes before "9"."""
    truth, predictions = random_case(3, 8, 3, 20)
    texts = {image["id"]: str(image["id"]) for image in truth["images"]}
    truth["images"] = [{"id": texts[image["id"]]} for image in truth["images"]]
    truth["annotations"] = [one | {"image_id": texts[one["image_id"]]} for one in truth["annotations"]]
    predictions = {texts[image_id]: found for image_id, found in predictions.items()}
    assert_same(measured(truth, predictions), pycocotools_results(truth, predictions))


def test_pycocotools_is_silent(capfd):
    measured(TRUTH, perfect(TRUTH))
    assert capfd.readouterr() == ("", "")


def test_ground_truth_from_a_file(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(TRUTH))
    metrics = CocoMetrics(path)
    metrics.update(list(perfect(TRUTH).values()), list(perfect(TRUTH)))
    assert metrics.compute()["AP"] == pytest.approx(1)


def test_from_dataset_with_and_without_areas_and_ids():
    """
    The same boxes by either way; an area given wins over the box's own, as a mask's area does in COCO. A box without
    area counts as missed, as it does in pycocotools; one that is not finite is left out.
    """
    rows = {
        "image_id": [7, 3, 9],
        "objects": [
            {"bbox": [[0, 0, 10, 10], [20, 20, 50, 50]], "category": [0, 0], "area": [100.0, 5000.0]},
            {"bbox": [[100, 100, 100, 100]], "category": [1], "area": [10000.0]},
            {"bbox": [[5, 5, 0, 10], [5, 5, float("nan"), 10]], "category": [1, 1], "area": [0.0, 0.0]},
        ],
    }
    dataset = datasets.Dataset.from_dict(rows)
    truth = json.loads(json.dumps(TRUTH).replace('"category_id": 2', '"category_id": 0'))
    truth = json.loads(json.dumps(truth).replace('"category_id": 5', '"category_id": 1'))
    predictions = perfect(truth)
    metrics = CocoMetrics.from_dataset(dataset, ["cat", "dog"])
    metrics.update([predictions[7], predictions[3], perfect({**TRUTH, "annotations": []})[3]], [7, 3, 9])
    assert metrics.compute()["per_class"] == pytest.approx(
        {"cat": 1.0, "dog": 51 / 101}
    )  # precision 1 up to recall 1/2
    assert [annotation["area"] for annotation in metrics.truth[0]] == [100, 5000]

    without = dataset.remove_columns("image_id").map(
        lambda row: {"objects": {key: row["objects"][key] for key in ("bbox", "category")}},
        features=datasets.Features(
            {
                "objects": {
                    "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                    "category": datasets.List(datasets.Value("int64")),
                }
            }
        ),
    )
    metrics = CocoMetrics.from_dataset(without, ["cat", "dog"])
    metrics.update([predictions[7], predictions[3]], [0, 1])
    assert metrics.compute()["AP"] == pytest.approx((1 + 51 / 101) / 2)
    assert [annotation["area"] for annotation in metrics.truth[0]] == [100, 2500]
    assert [annotation["bbox"] for annotation in metrics.truth[1]] == [[100, 100, 100, 100], [5, 5, 0, 10]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("data", "expected a datasets.Dataset, got a str: load_dataset_source reads one"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": [1]})), "got a DatasetDict: give one of its spl"),
        (datasets.Dataset.from_dict({"image": [1]}), "no column 'objects'"),
        (datasets.Dataset.from_dict({"objects": [[{"bbox": [0, 0, 1, 1], "category": 0}]]}), "struct of lists with"),
        (datasets.Dataset.from_dict({"objects": [{"bboxes": [[0, 0, 1, 1]], "labels": [0]}]}), "struct of lists with"),
    ],
)
def test_datasets_in_another_form_are_refused(dataset, message):
    with pytest.raises(DataError, match=message):
        CocoMetrics.from_dataset(dataset, ["cat"])


def test_crowds_of_a_dataset_are_ignored_not_missed():
    objects = {"bbox": [[0, 0, 10, 10], [50, 50, 100, 100]], "category": [0, 0], "iscrowd": [0, 1]}
    metrics = CocoMetrics.from_dataset(datasets.Dataset.from_dict({"objects": [objects]}), ["cat"])
    boxes = [[60, 60, 80, 80], [0, 0, 10, 10]]
    metrics.update([{"scores": [0.9, 0.8], "labels": [0, 0], "boxes": boxes}], [0])
    assert metrics.compute()["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("predictions", "image_ids", "message"),
    [
        ([{"scores": [], "labels": [], "boxes": []}], [1], "Image 1 is not in the ground truth"),
        ([{"scores": [1.0], "labels": [], "boxes": []}], [7], "Image 7: 1 scores, 0 labels and 0 boxes"),
        ([{"scores": [1.0], "labels": ["cat"], "boxes": [[0, 0, 1, 1]]}], [7], "Image 7: labels must be category ids"),
        ([], [7], "0 predictions for 1 image ids"),
    ],
)
def test_wrong_updates_are_refused(predictions, image_ids, message):
    with pytest.raises(ValueError, match=message):
        CocoMetrics(TRUTH).update(predictions, image_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 3}]}, "Annotation 0: unknown image_id 7"),
        ({"categories": [{"id": 2, "name": "cat"}]}, "Annotation 2: unknown category_id 5"),
        ({"categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "cat"}]}, "must be unique"),
    ],
)
def test_wrong_ground_truth_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CocoMetrics({**TRUTH, **change})


def measure_a_part(folder: Path) -> None:
    state = PartialState(cpu=True)
    truth, predictions = random_case(11, images=7, categories=3, detections=12)
    ids = list(predictions)
    ids = ids + ids[: len(ids) % 2]  # an odd number: the first image comes twice
    metrics = CocoMetrics(truth)
    for image_id in ids[state.process_index :: 2]:
        metrics.update([predictions[image_id]], [image_id])
    assert len(metrics.predictions) < len(predictions)
    metrics.gather()
    results = metrics.compute()
    (folder / f"{state.process_index}.json").write_text(json.dumps([state.num_processes, results]))
    state.destroy_process_group()


def test_two_processes_gather_the_result_of_one(tmp_path):
    forks.run_ranks(2, measure_a_part, tmp_path, folder=tmp_path)
    truth, predictions = random_case(11, images=7, categories=3, detections=12)
    expected = measured(truth, predictions)
    assert 0.05 < expected["AP"] < 0.95
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [2, expected]


def test_gather_alone_changes_nothing():
    metrics = CocoMetrics(TRUTH)
    metrics.update(list(perfect(TRUTH).values()), list(perfect(TRUTH)))
    metrics.gather()
    assert metrics.compute()["AP"] == pytest.approx(1) and len(metrics.predictions) == 2


def test_table():
    results = {name: number / 100 for number, name in enumerate(SUMMARY, start=10)}
    table = format_table({**results, "APs": -1.0, "per_class": {"cat": 0.123, "sea lion": -1.0}})
    assert table.splitlines() == [
        "      AP    AP50    AP75     APs     APm     APl",
        "    10.0    11.0    12.0       -    14.0    15.0",
        "",
        "     AR1    AR10   AR100     ARs     ARm     ARl",
        "    16.0    17.0    18.0    19.0    20.0    21.0",
        "",
        "class         AP",
        "cat         12.3",
        "sea lion       -",
    ]


@pytest.mark.parametrize("number", [1, 9, 80, 91])
def test_table_lists_every_class_once(number):
    results = {**dict.fromkeys(SUMMARY, 0.5), "per_class": {f"class_{i:02d}": i / 1000 for i in range(number)}}
    lines = format_table(results).splitlines()[6:]
    assert max(map(len, lines)) <= 100 and len(lines) <= 1 + max(8, number / 3)
    assert sum(line.count("class_") for line in lines) == number
    assert sum(word == "AP" for word in lines[0].split()) == lines[1].count("class_")
