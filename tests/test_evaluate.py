"""Measuring: a detector that knows the truth scores 100, and what is measured is what `pipeline` users get."""

import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Image
from tiny_detectors import tiny_detector
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    RTDetrImageProcessor,
    pipeline,
)

from aligndet_hf.commands.evaluate import EvaluateArguments, evaluate
from aligndet_hf.convnets.modeling_torchvision import NO_LOGIT
from aligndet_hf.data.collate import collate_labelled, normalize_images
from aligndet_hf.data.errors import DataError, ImageError
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.synthetic import SYNTHETIC_CATEGORIES, make_synthetic_dataset, write_synthetic_folder
from aligndet_hf.detectors import build
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.evaluation.coco_metrics import CocoMetrics
from aligndet_hf.evaluation.detections import (
    EvaluationImages,
    coco_detections,
    match_categories,
    normalization_of,
    predict_batches,
    prepare_image,
)
from aligndet_hf.proposals.trained import with_both_sides

CLASSES = len(SYNTHETIC_CATEGORIES)
PROCESSORS = {
    "softmax": DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}),
    "sigmoid": ConditionalDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}),
    "sigmoid of squares": RTDetrImageProcessor(size={"height": 64, "width": 64}),
}


def mixed_dataset():
    """Seven images, landscape and portrait, so that batches are padded."""
    from datasets import concatenate_datasets

    wide = make_synthetic_dataset(4, seed=0, image_size=(60, 90))
    tall = make_synthetic_dataset(3, seed=1, image_size=(80, 50)).map(lambda row: {"image_id": row["image_id"] + 70})
    return concatenate_datasets([wide, tall]).cast_column("image", Image(decode=False))


class Oracle(torch.nn.Module):
    """
    Answers the images of a dataset, in their order, with the truth: normalised cxcywh boxes and their classes, which
    are the categories, or for a `names` list those of these names.
    """

    def __init__(self, dataset, softmax: bool, names: list[str] = SYNTHETIC_CATEGORIES):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        self.classes = [names.index(name) for name in SYNTHETIC_CATEGORIES]
        self.device_holder = torch.nn.Parameter(torch.zeros(1))
        self.answers = iter(dataset.cast_column("image", Image(decode=True)))
        self.width = CLASSES + softmax

    def forward(self, pixel_values, pixel_mask):
        logits = torch.full((len(pixel_values), 12, self.width), -20.0)
        logits[:, :, CLASSES:] = 0.0  # the class "nothing", where there is one
        boxes = torch.full((len(pixel_values), 12, 4), 0.5)
        for image, row in enumerate(self.take(len(pixel_values))):
            size = torch.tensor(row["image"].size * 2)
            for query, (box, label) in enumerate(zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)):
                x, y, w, h = box
                boxes[image, query] = torch.tensor([x + w / 2, y + h / 2, w, h]) / size
                logits[image, query, self.classes[label]] = 20.0
        return SimpleNamespace(logits=logits, pred_boxes=boxes)

    def take(self, count):
        return [next(self.answers) for _ in range(count)]


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("batch_size", [3, 7])
def test_the_truth_scores_one_hundred(kind, batch_size):
    dataset = mixed_dataset()
    images = EvaluationImages(dataset, SYNTHETIC_CATEGORIES, PROCESSORS[kind])
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collate_labelled)
    metrics, seen = images.metrics(), []
    for ids, predictions in predict_batches(Oracle(dataset, kind == "softmax"), loader, PROCESSORS[kind]):
        metrics.update(predictions, ids)
        seen += ids
    assert seen == [0, 1, 2, 3, 70, 71, 72]
    results = metrics.compute()
    assert results["AP"] == pytest.approx(1.0) and results["AR100"] == pytest.approx(1.0)
    assert all(value in (-1, pytest.approx(1.0)) for value in results["per_class"].values())


@pytest.mark.parametrize(
    ("family", "most", "fields"),
    [
        ("torchvision_fcos", 9, {}),
        ("torchvision_mask_rcnn", 9, {}),
        ("torchvision_fcos", 150, {"score_threshold": 0.0}),
    ],
)
def test_what_a_detector_of_torchvision_found_is_a_detection_and_nothing_else(family, most, fields):
    """Its outputs have room for every class of each detection; an image processor by itself keeps 100."""
    processor = DeformableDetrImageProcessor()
    detector = tiny_detector(family, num_labels=CLASSES, detections_per_image=most, **fields).eval()
    images = EvaluationImages(make_synthetic_dataset(3, seed=0), SYNTHETIC_CATEGORIES, processor)
    (batch,) = DataLoader(images, batch_size=3, collate_fn=collate_labelled)
    normal = normalize_images(batch["pixel_values"], batch["pixel_mask"], **normalization_of(processor))
    with torch.no_grad():
        made = detector(normal, batch["pixel_mask"]).logits > NO_LOGIT
    ((_, predictions),) = predict_batches(detector, [batch], processor, masks=True)
    assert made.any(-1).sum() > 0 and made.sum(-1).max() == 1
    assert most <= 100 or made.sum((1, 2)).min() > 100
    assert [len(found["scores"]) for found in predictions] == made.sum((1, 2)).tolist()
    assert all(len(found.get("masks", found["scores"])) == len(found["labels"]) for found in predictions)


def test_classes_are_translated_and_unknown_ones_left_out():
    dataset = make_synthetic_dataset(2, seed=0)
    images = EvaluationImages(dataset, SYNTHETIC_CATEGORIES, PROCESSORS["sigmoid"])
    loader = DataLoader(images, batch_size=2, collate_fn=collate_labelled)
    ((_, plain),) = predict_batches(Oracle(dataset, False), loader, PROCESSORS["sigmoid"])
    classes = [4, 3, -1, 1, 0]
    ((_, translated),) = predict_batches(Oracle(dataset, False), loader, PROCESSORS["sigmoid"], classes)
    for before, after in zip(plain, translated, strict=True):
        kept = before["labels"] != 2
        assert after["labels"].tolist() == [classes[label] for label in before["labels"][kept]]
        np.testing.assert_array_equal(after["boxes"], before["boxes"][kept])
        np.testing.assert_array_equal(after["scores"], before["scores"][kept])


def test_categories_are_matched_by_name():
    assert match_categories({0: "cat", 1: "dog", 2: "cow"}, ["dog", "cat"]) == [1, 0, -1]
    assert match_categories({0: "LABEL_0", 1: "LABEL_1"}, ["dog", "cat"]) == [0, 1]
    with pytest.raises(DataError, match="no class for horse: .*dog, horse.*cat, dog"):
        match_categories({0: "cat", 1: "dog"}, ["dog", "horse"])
    with pytest.raises(DataError, match="no class for dog, cat, cow"):
        match_categories({0: "LABEL_0", 1: "LABEL_1"}, ["dog", "cat", "cow"])


@pytest.mark.parametrize(
    "processor",
    [
        *PROCESSORS.values(),
        RTDetrImageProcessor(size={"height": 32, "width": 48}, do_normalize=False),
        DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 60}, pad_size={"height": 70, "width": 70}),
        DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 60}, image_mean=[0.5] * 3, image_std=[0.25] * 3),
        DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 60}, do_normalize=False, do_rescale=False),
    ],
)
def test_images_are_prepared_as_the_processor_does(processor):
    dataset = mixed_dataset()
    images = EvaluationImages(dataset, SYNTHETIC_CATEGORIES, processor)
    for row in (0, 5):
        expected = processor(images=images.read_image(row), return_tensors="pt", do_pad=False)["pixel_values"][0]
        batch = collate_labelled([images[row]])
        pixel_values = normalize_images(batch["pixel_values"], batch["pixel_mask"], **normalization_of(processor))[0]
        # uint8 in between: half a level at most.
        level = (0.5 / 255 / min(processor.image_std)) if processor.do_normalize else 0.5
        assert pixel_values.shape == expected.shape
        assert (pixel_values - expected).abs().max() <= level + 1e-4


def test_a_broken_image_is_named():
    rows = [{"bytes": b"no image", "path": "broken.jpg"}]
    objects = {"bbox": [[0.0, 0.0, 1.0, 1.0]], "category": [0]}
    dataset = make_synthetic_dataset(1, seed=0).remove_columns(["image", "objects"]).add_column("image", rows)
    dataset = dataset.add_column("objects", [objects]).cast_column("image", Image(decode=False))
    with pytest.raises(ImageError, match="Row 0.*broken.jpg"):
        EvaluationImages(dataset, ["a"], PROCESSORS["softmax"])[0]


def test_no_more_than_a_batch_is_held():
    dataset = make_synthetic_dataset(6, seed=0, image_size=(32, 32))
    images = EvaluationImages(dataset, SYNTHETIC_CATEGORIES, PROCESSORS["sigmoid"])
    alive = weakref.WeakSet()

    class Watched(Oracle):
        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            alive.update([*inputs.values(), outputs.logits, outputs.pred_boxes])
            return outputs

    metrics, counts = images.metrics(), []
    loader = DataLoader(images, batch_size=1, collate_fn=collate_labelled)
    for ids, predictions in predict_batches(Watched(dataset, False), loader, PROCESSORS["sigmoid"]):
        metrics.update(predictions, ids)
        gc.collect()
        counts.append(len(alive))
    assert len(counts) == 6 and max(counts) <= 4  # pixels, mask, logits and boxes of one batch


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Labelled images and a tiny detector that finds something: its boxes are spread over the image."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_synthetic_folder(folder / "data", {"train": 1, "validation": 5}, seed=0, image_size=(64, 96))
    id2label = dict(enumerate(SYNTHETIC_CATEGORIES[::-1]))  # not in the order of the data
    detector = tiny_detector("rt_detr", num_labels=CLASSES, id2label=id2label)
    detector.save_pretrained(folder / "detector")
    build_image_processor(detector, 64).save_pretrained(folder / "detector")
    return folder


def test_what_is_measured_is_what_pipelines_give(saved):
    processor = RTDetrImageProcessor.from_pretrained(saved / "detector")
    detector = AutoModelForObjectDetection.from_pretrained(saved / "detector")
    dataset = load_dataset_source(saved / "data", "validation", labels=True)
    images = EvaluationImages(dataset, SYNTHETIC_CATEGORIES, processor)
    loader = DataLoader(images, batch_size=2, collate_fn=collate_labelled)
    ours = [found for _, predictions in predict_batches(detector, loader, processor) for found in predictions]
    detect = pipeline("object-detection", model=str(saved / "detector"))
    names = detector.config.id2label
    for row, found in zip(dataset, ours, strict=True):
        theirs = detect(row["image"]["path"], threshold=0.0)
        assert len(theirs) == len(found["scores"]) == 20
        for one, score, label, box in zip(theirs, found["scores"], found["labels"], found["boxes"], strict=True):
            assert one["score"] == pytest.approx(score, abs=2e-3) and one["label"] == names[label]
            assert list(one["box"].values()) == pytest.approx(box.tolist(), abs=1.5)  # pipelines cut to whole pixels


def test_the_command(saved, tmp_path, capsys, monkeypatch):
    dataset = load_dataset_source(saved / "data", "validation", labels=True)
    oracle = Oracle(dataset, False, SYNTHETIC_CATEGORIES[::-1])  # classes of the same names in another order
    monkeypatch.setattr(build, "open_checkpoint", lambda source, is_whole: oracle)
    results = evaluate(
        EvaluateArguments(
            detector=str(saved / "detector"),
            dataset=str(saved / "data"),
            output_dir=str(tmp_path / "new"),
            per_device_eval_batch_size=2,
            save_predictions=True,
            num_pictures=2,
            use_cpu=True,
            disable_tqdm=True,
        )
    )
    assert results["AP"] == pytest.approx(1.0)
    printed = capsys.readouterr().out
    assert "AP50" in printed and "100.0" in printed and all(name in printed for name in SYNTHETIC_CATEGORIES)
    record = json.loads((tmp_path / "new" / "results.json").read_text())
    assert record["metrics"] == results and record["images"] == 5 and record["split"] == "validation"
    assert (tmp_path / "new" / "predictions.jpg").stat().st_size > 10_000
    assert not (tmp_path / "new" / "worst.jpg").exists()  # nothing was wrong
    page = (tmp_path / "new" / "report.html").read_text()
    assert "<h2>Diagnosis</h2>" in page and "<h2>Results</h2>" in page and page.count("data:image/") == 2
    diagnosis = json.loads((tmp_path / "new" / "diagnosis.json").read_text())
    assert set(diagnosis["errors"].values()) == {0} and "errors at these thresholds" in printed
    assert {found["f1"] for found in diagnosis["per_class"].values() if found["objects"]} == {1.0}

    # The predictions file alone gives the same numbers.
    detections = json.loads((tmp_path / "new" / "predictions.json").read_text())
    metrics = CocoMetrics.from_dataset(dataset, SYNTHETIC_CATEGORIES)
    for image_id in range(5):
        own = [detection for detection in detections if detection["image_id"] == image_id]
        boxes = np.array([detection["bbox"] for detection in own])
        boxes[:, 2:] += boxes[:, :2]
        scores, labels = ([detection[key] for detection in own] for key in ("score", "category_id"))
        metrics.update([{"boxes": boxes, "scores": scores, "labels": labels}], [image_id])
    assert metrics.compute() == results


def test_detections_in_coco_format():
    prediction = {
        "boxes": np.array([[1, 2, 11, 22.5]], np.float32),
        "labels": np.array([3]),
        "scores": np.array([0.5], np.float32),
    }
    expected = [{"image_id": 7, "category_id": 3, "bbox": [1.0, 2.0, 10.0, 20.5], "score": 0.5}]
    assert coco_detections(7, prediction) == expected
    assert coco_detections(7, {name: value[:0] for name, value in prediction.items()}) == []


def test_output_needs_a_place():
    with pytest.raises(ValueError, match="output_dir"):
        EvaluateArguments(detector="d", dataset="d", save_predictions=True)


def test_very_long_images_have_two_sides():
    image = np.zeros((1500, 7, 3), np.uint8)
    image[300:600] = 255
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100})
    item = prepare_image(image, processor, 5)
    assert item["image"].shape[1:] == (100, 1) and item["labels"]["orig_size"].tolist() == [1500, 7]
    lit = (item["image"][0, :, 0] > 127).nonzero().flatten()
    assert (lit.min(), lit.max()) == (20, 39)  # the same fifth of the image
    wide = with_both_sides(image.transpose(1, 0, 2), processor.size)
    assert wide.shape == (21, 1500, 3) and (wide[::3] == wide[1::3]).all()
    assert with_both_sides(image, {"height": 64, "width": 64}) is image
