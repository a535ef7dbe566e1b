"""pycocotools on a user's COCO file and our predictions.json gives the numbers that we print."""

import contextlib
import io
import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_detectors import tiny_detector

from aligndet_hf.commands.evaluate import EvaluateArguments, evaluate
from aligndet_hf.data.columns import category_ids, image_ids, image_numbers
from aligndet_hf.data.formats import category_names, load_dataset_source
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.evaluation.coco_metrics import SUMMARY, CocoMetrics
from aligndet_hf.evaluation.detections import coco_detections

IMAGES = 5
SIDE = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def coco_file(folder, rng, text_ids=False):
    """Ids with gaps and in disorder, an unused category, crowds, areas of masks, boxes without area, empty images."""
    chosen = rng.choice(1000, IMAGES, replace=False).tolist()
    images = [
        {"id": f"image {own}" if text_ids else own, "file_name": f"{number}.png", "width": SIDE, "height": SIDE}
        for number, own in enumerate(chosen)
    ]
    categories = [{"id": int(own), "name": f"class {own}"} for own in rng.choice(90, 4, replace=False)]
    annotations = []
    for image in images:
        for _ in range(int(rng.integers(0, 7)) * int(rng.random() < 0.8)):
            box = [
                *rng.integers(0, 12, 2) * 10.0,
                *rng.choice([0, 8.3, 20, 45.5, 100], 2, p=[0.05, 0.3, 0.3, 0.25, 0.1]),
            ]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([one["id"] for one in categories[:3]])),
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3] * rng.choice([1, 0.6])),
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def detections_near(truth, rng, labels):
    """Near the objects, and elsewhere; few different scores, so that many are equal."""
    boxes = np.array(truth["bbox"]).reshape(-1, 4) + rng.integers(-3, 4, (len(truth["bbox"]), 4))
    others = np.concatenate([rng.integers(0, 100, (6, 2)), rng.integers(1, 90, (6, 2))], axis=1)
    boxes = np.concatenate([boxes, others])
    boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 1)
    found = np.concatenate([truth["category"], rng.integers(0, labels, 6)]).astype(int)
    scores = (rng.integers(1, 9, len(boxes)) / 9).astype(np.float32)
    return {"boxes": boxes.astype(np.float32), "labels": found, "scores": scores}


def numbers_of_pycocotools(path, predictions):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(SUMMARY, evaluation.stats.tolist(), strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), text_ids=st.booleans())
def test_any_coco_file(folder, seed, text_ids):
    rng = np.random.default_rng(seed)
    path = coco_file(folder, rng, text_ids)
    dataset = load_dataset_source(path, "validation", labels=True)
    names = category_names(dataset)
    numbers, own_ids, own_categories = image_numbers(dataset), image_ids(dataset), category_ids(dataset, names)
    metrics, detections = CocoMetrics.from_dataset(dataset, names), []
    for row, number, own_id in zip(dataset, numbers, own_ids, strict=True):
        if rng.random() < 0.8:  # of some images there are no predictions
            found = detections_near(row["objects"], rng, len(names))
            metrics.update([found], [number])
            detections += coco_detections(own_id, found, own_categories)
    if not detections:
        return
    (folder / "predictions.json").write_text(json.dumps(detections))
    results = metrics.compute()
    expected = numbers_of_pycocotools(path, folder / "predictions.json")
    assert {name: results[name] for name in SUMMARY} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("text_ids", [False, True])
def test_the_command(folder, tmp_path, text_ids):
    path = coco_file(folder, np.random.default_rng(8), text_ids)
    names = category_names(load_dataset_source(path, labels=True))
    detector = tiny_detector("rt_detr", num_labels=len(names), id2label=dict(enumerate(names)))
    detector.save_pretrained(tmp_path / "detector")
    build_image_processor(detector, 64).save_pretrained(tmp_path / "detector")
    arguments = EvaluateArguments(
        detector=str(tmp_path / "detector"),
        dataset=str(path),
        split="test",
        output_dir=str(tmp_path / "out"),
        save_predictions=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    evaluate(arguments)
    content, predictions = json.loads(path.read_text()), tmp_path / "out" / "predictions.json"
    found = json.loads(predictions.read_text())
    # What it found now and then is the truth from now on.
    for number, one in enumerate(found[::9], start=1000):
        width, height = one["bbox"][2:]
        label = {key: one[key] for key in ("image_id", "category_id", "bbox")}
        content["annotations"].append(label | {"id": number, "area": width * height, "iscrowd": number % 4 == 0})
    path.write_text(json.dumps(content))
    results = evaluate(arguments)
    assert json.loads(predictions.read_text()) == found
    for key, entries in (("image_id", "images"), ("category_id", "categories")):
        assert {one[key] for one in found} <= {entry["id"] for entry in content[entries]}
    expected = numbers_of_pycocotools(path, predictions)
    assert {name: results[name] for name in SUMMARY} == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["AP"] < expected["AR100"] < 1
