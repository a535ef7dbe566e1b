"""Masks of objects: read, kept, moved with their image, trained with and measured."""

import json
import logging

import cv2
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as pycoco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_detectors import tiny_detector
from torchvision.transforms import v2

from aligndet_hf import EvaluateArguments, FinetuneArguments, cli, evaluate, finetune, load_dataset_source
from aligndet_hf.data.augmentations import AUGMENTATIONS, Sample, apply_transform
from aligndet_hf.data.checks import mask_note
from aligndet_hf.data.dataset import LabelledImages
from aligndet_hf.data.label_export import export_labels
from aligndet_hf.data.masks import Region, draw_regions, read_regions, run_lengths, segmentation_text
from aligndet_hf.data.sampling import SampleKey
from aligndet_hf.data.views import ViewConfig
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.evaluation.coco_metrics import CocoMetrics, format_table
from aligndet_hf.evaluation.detections import coco_detections

ROW = np.dtype([("category", np.int64), ("region", object)])


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return (rng.random((height, width)) < rng.random()).astype(np.uint8)


# ---- what is kept of a segmentation ----


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_form_is_drawn_as_pycocotools_draws_it(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 60, 2))
    mask = random_mask(rng, height, width)
    compressed = pycoco.encode(np.asfortranarray(mask))
    assert run_lengths(mask)["counts"].encode() == compressed["counts"]
    column = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[0], column])))
    counts = np.diff(np.concatenate([[0], changes, [len(column)]])).tolist()
    polygons = (rng.random((2, 12)) * 1.3 * width - 3).round(2).tolist()
    expected = {
        segmentation_text(compressed): mask,
        segmentation_text(run_lengths(mask)): mask,
        segmentation_text({"size": [height, width], "counts": counts}): mask,
        segmentation_text(polygons): pycoco.decode(pycoco.merge(pycoco.frPyObjects(polygons, height, width))),
    }
    for text, drawn in expected.items():
        assert (Region.of(text, height, width).draw(height, width) == drawn).all()


@pytest.mark.parametrize(
    "wrong",
    [
        [], [[]], {}, "x", 5, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, float("nan")]], [[1e9] * 6], [[1, 2, 3, 4, 5, "6"]],
        {"size": [3, 3], "counts": "zzz~~"}, {"size": [3, 3], "counts": [5]}, {"size": [3, 3], "counts": [-1, 10]},
        {"size": [10**10, 10**10], "counts": [10**20]}, {"size": ["3", 3], "counts": [9]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_segmentation_is_no_mask(wrong):
    assert segmentation_text(wrong) is None


def test_run_lengths_of_another_size_are_no_mask():
    assert Region.of(segmentation_text({"size": [2, 3], "counts": [6]}), 3, 2) is None


# ---- moved with the image ----


def shapes(polygons: bool) -> Sample:
    """Two bright shapes on black, an L and a square, with their boxes and regions, the pixels that are bright."""
    image = np.zeros((60, 80, 3), np.uint8)
    outlines = [[[10, 8, 40, 8, 40, 20, 22, 20, 22, 44, 10, 44]], [[50, 30, 70, 30, 70, 50, 50, 50]]]
    rows = np.zeros(2, ROW)
    for number, outline in enumerate(outlines):
        mask = Region.of(segmentation_text(outline), 60, 80).draw(60, 80)
        image[mask > 0] = 255
        text = segmentation_text(outline if polygons else run_lengths(mask))
        rows[number] = number, Region.of(text, 60, 80)
    return Sample(image, np.float32([[10, 8, 30, 36], [50, 30, 20, 20]]), rows)


def other(grey: int = 40) -> Sample:
    """A sample that is dark, so that what is bright is of the first one."""
    sample = shapes(True)
    sample.image[:] = grey
    return sample


def overlap(mask: np.ndarray, image: np.ndarray) -> float:
    bright = image[..., 0] > 127
    return (mask.astype(bool) & bright).sum() / max((mask.astype(bool) | bright).sum(), 1)


@pytest.mark.parametrize("polygons", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["zoom_out", "mosaic", "mixup", "rotate", "quarter_turn", "photometric"])
def test_regions_go_where_their_pixels_go(name, seed, polygons):
    count, sample = AUGMENTATIONS[name].others, shapes(polygons)
    result = AUGMENTATIONS[name].function(sample, [other() for _ in range(count)], np.random.default_rng(seed))
    masks = draw_regions(result.classes, *result.image.shape[:2])
    first = masks[: len(masks) - 2 * count] if name == "mixup" else masks
    if name == "mosaic":  # of the first image, whose pixels alone are bright
        first = masks[: np.flatnonzero(np.diff(result.classes["category"]) < 0)[0] + 1]
        if overlap(first.any(0), result.image) < 0.85:  # an object with too little left has no box
            assert len(first) < 2
            return
    if name in ("mixup", "photometric"):
        assert (first == draw_regions(sample.classes, 60, 80)).all()
    else:
        assert overlap(first.any(0), result.image) > 0.9
    if name == "rotate":  # whose boxes are those around ellipses
        return
    for mask, (x, y, w, h) in zip(masks, result.boxes, strict=True):
        outside = mask.copy()
        outside[int(y) - 1 if y > 1 else 0 : int(y + h) + 3, int(x) - 1 if x > 1 else 0 : int(x + w) + 3] = 0
        assert not outside.any()


def test_what_is_pasted_hides_what_is_behind():
    sample, front = shapes(True), other()
    for seed in range(8):
        result = AUGMENTATIONS["copy_paste"].function(sample, [front], np.random.default_rng(seed))
        masks = draw_regions(result.classes, 60, 80)
        assert overlap(masks[:2].any(0), result.image) > 0.93  # the edges of what is pasted are soft
        for mask, (x, y, w, h) in zip(masks[2:], result.boxes[2:].astype(int), strict=True):
            assert mask[y : y + h, x : x + w].sum() == mask.sum() > 0


@pytest.mark.parametrize("polygons", [True, False])
def test_views_move_regions_with_the_pixels(polygons, tmp_path):
    sample = shapes(polygons)
    path = tmp_path / "1.png"
    Image.fromarray(sample.image).save(path)
    masks = draw_regions(sample.classes, 60, 80)
    texts = [run_lengths(mask) for mask in masks]
    if polygons:
        texts = [[points.ravel().tolist() for points in region.shape] for region in sample.classes["region"]]
    objects = {"bbox": sample.boxes.tolist(), "category": [0, 1], "segmentation": list(map(segmentation_text, texts))}
    rows = datasets.Dataset.from_dict({"image": [str(path)], "objects": [objects]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    view = ViewConfig([45, 96], color=False, crop_scale=(0.4, 1.0))
    images = LabelledImages(rows, view, masks=True)
    seen = set()
    for epoch in range(12):
        item = images[SampleKey(0, epoch, 0)]
        labels, image = item["labels"], item["image"].permute(1, 2, 0).numpy()
        assert labels["masks"].shape == (len(labels["boxes"]), *image.shape[:2])
        if len(labels["boxes"]) == 2:
            assert overlap(labels["masks"].any(0).numpy(), image) > 0.85
        seen.add(image.shape)
    assert len(seen) > 4
    assert "masks" not in LabelledImages(rows, view)[SampleKey(0, 0, 0)]["labels"]


def test_other_peoples_transforms_move_masks_or_there_are_none():
    sample, rng = shapes(True), np.random.default_rng(0)
    flipped = apply_transform(v2.RandomHorizontalFlip(1.0), sample, rng)
    assert (draw_regions(flipped.classes, 60, 80) == draw_regions(sample.classes, 60, 80)[:, :, ::-1]).all()
    forgetful = apply_transform(
        lambda image, target: (image, {k: target[k] for k in ("boxes", "labels")}), sample, rng
    )
    assert len(forgetful.boxes) == 2 and draw_regions(forgetful.classes, 60, 80) is None
    with pytest.raises(TypeError, match="masks"):
        apply_transform(lambda image, target: (image, target | {"masks": target["masks"][:1]}), sample, rng)


def test_a_view_with_an_object_without_a_mask_has_boxes_alone():
    sample = shapes(True)
    sample.classes["region"][1] = None
    assert draw_regions(sample.classes, 60, 80) is None
    moved = AUGMENTATIONS["quarter_turn"].function(sample, [], np.random.default_rng(0))
    assert moved.classes["region"][1] is None and moved.classes["region"][0].draw(80, 60).any()


# ---- a data set with masks ----

SIDE = 64


@pytest.fixture(scope="module")
def coco_file(tmp_path_factory):
    """Two images with a disc and a square each, as polygons, run lengths and, once, a crowd."""
    folder = tmp_path_factory.mktemp("coco")
    images, annotations, rng = [], [], np.random.default_rng(0)
    for number in (1, 2):
        image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        disc = cv2.circle(np.zeros((SIDE, SIDE), np.uint8), (18 + number, 20), 12, 1, -1)
        x, y, side = 34, 34 - 4 * number, 22
        image[disc > 0] = (250, 60, 60)
        image[y : y + side, x : x + side] = (60, 60, 250)
        Image.fromarray(image).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        square = [[x, y, x + side, y, x + side, y + side, x, y + side]]
        rle = run_lengths(disc)
        ys, xs = np.nonzero(disc)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        for category, region, own, area in (
            (1, rle, box, int(disc.sum())),
            (2, square, [x, y, side, side], side**2),
        ):
            annotations.append(
                {"image_id": number, "category_id": category, "segmentation": region, "bbox": own, "area": area}
            )
    crowd = run_lengths(np.pad(np.ones((8, 10), np.uint8), ((56, 0), (0, 54))))
    annotations.append(
        {"image_id": 2, "category_id": 1, "segmentation": crowd, "bbox": [0, 56, 10, 8], "area": 80, "iscrowd": 1}
    )
    for number, annotation in enumerate(annotations, start=1):
        annotation.setdefault("iscrowd", 0)
        annotation["id"] = number
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
    path = folder / "labels.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_coco_files_keep_masks_and_give_them_back(coco_file, tmp_path):
    dataset = load_dataset_source(str(coco_file), labels=True)
    objects = dataset[1]["objects"]
    truth = json.loads(coco_file.read_text())["annotations"]
    kept = [json.loads(text) for text in objects["segmentation"]]
    assert kept == [annotation["segmentation"] for annotation in truth if annotation["image_id"] == 2]
    assert mask_note(dataset) == "Masks: 2 of 2 images have one with every object, and train masks beside boxes."
    export_labels({"train": dataset}, ["disc", "square"], tmp_path / "out", "coco")
    written = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())["annotations"]
    assert [one["segmentation"] for one in written] == [one["segmentation"] for one in truth]


def test_masks_that_are_none_are_told_and_the_image_trains_boxes(coco_file, tmp_path, caplog):
    content = json.loads(coco_file.read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][1]["segmentation"] = []
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(str(path), labels=True, image_dir=str(coco_file.parent))
    assert "1 objects have a segmentation that is neither" in caplog.text
    assert mask_note(dataset).startswith("Masks: 1 of 2 images")
    images = LabelledImages(dataset, ViewConfig([SIDE], flip_probability=0, color=False), masks=True)
    assert "masks" not in images[0]["labels"] and len(images[1]["labels"]["masks"]) == 2


def test_labelme_and_yolo_polygons_are_masks(tmp_path):
    outline = [[4.0, 4.0], [30.0, 4.0], [30.0, 20.0], [4.0, 20.0]]
    shapes = [
        {"label": "a", "points": outline, "shape_type": "polygon"},
        {"label": "a", "points": [[2, 2], [12, 10]], "shape_type": "rectangle"},
        {"label": "a", "points": [[30, 30], [40, 30]], "shape_type": "circle"},
    ]
    labelme, yolo = tmp_path / "labelme", tmp_path / "yolo"
    for folder in (labelme, yolo / "images", yolo / "labels"):
        folder.mkdir(parents=True)
    for folder in (labelme, yolo / "images"):
        Image.new("RGB", (80, 60)).save(folder / "1.png")
    content = {"shapes": shapes, "imagePath": "1.png", "imageWidth": 80, "imageHeight": 60}
    (labelme / "1.json").write_text(json.dumps(content))
    (yolo / "labels" / "1.txt").write_text("0 0.05 0.0666667 0.375 0.0666667 0.375 0.333333 0.05 0.333333\n")
    for folder, areas in ((labelme, [26 * 16, 10 * 8, np.pi * 100]), (yolo, [26 * 16])):
        dataset = load_dataset_source(str(folder), labels=True).with_format("arrow")
        regions = read_regions(dataset[0]["objects"], 60, 80)
        drawn = [region.draw(60, 80).sum() for region in regions]
        assert drawn == pytest.approx(areas, rel=0.03)


@pytest.mark.parametrize("form", ["lists", "run lengths"])
def test_columns_of_other_people(form):
    square, rle = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]], {"size": [8, 8], "counts": [8, 8, 48]}
    objects = {"bbox": [[1.0, 1, 4, 4]], "category": [0], "segmentation": [square if form == "lists" else rle]}
    rows = datasets.Dataset.from_dict({"image": ["1.png"], "objects": [objects]})
    dataset = load_dataset_source(rows.cast_column("image", datasets.Image(decode=False)), labels=True)
    (region,) = read_regions(dataset.with_format("arrow")[0]["objects"], 8, 8)
    assert region.draw(8, 8).sum() == (16 if form == "lists" else 8)


# ---- mask AP ----


def pycocotools_numbers(truth, found, kind: str) -> list[float]:
    evaluation = COCOeval(truth, truth.loadRes(found), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:6].tolist()


NAMES = ["mask_AP", "mask_AP50", "mask_AP75", "mask_APs", "mask_APm", "mask_APl"]


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_mask_ap_is_that_of_pycocotools_on_the_files(coco_file, shift, tmp_path):
    """One for the truth itself; less, and the same as pycocotools, for masks that are shifted."""
    dataset = load_dataset_source(str(coco_file), labels=True)
    metrics = CocoMetrics.from_dataset(dataset, ["disc", "square"])
    rng, detections = np.random.default_rng(shift), []
    for image in (1, 2):
        row = dataset.select([image - 1]).with_format("arrow")[:]["objects"]
        masks = [np.roll(region.draw(SIDE, SIDE), shift, axis=1) for region in read_regions(row, SIDE, SIDE)][:2]
        masks += [random_mask(rng, SIDE, SIDE) for _ in range(3)] if shift else []
        boxes = np.array([[*np.nonzero(mask)[1][[0]], 0, 40 + shift, 60] for mask in masks], dtype=np.float32)
        encoded = np.empty(len(masks), dtype=object)
        encoded[:] = [run_lengths(mask) for mask in masks]
        prediction = {
            "scores": rng.permutation(len(masks)) / 10 + 0.05,
            "labels": np.array([0, 1, *rng.integers(0, 2, len(masks) - 2)]),
            "boxes": boxes,
            "masks": encoded,
        }
        metrics.update([prediction], [image])
        detections += coco_detections(image, prediction, [1, 2])
    results = metrics.compute()
    expected = pycocotools_numbers(COCO(str(coco_file)), detections, "segm")
    assert [results[name] for name in NAMES] == pytest.approx(expected, abs=1e-12)
    assert results["mask_AP"] == 1 if shift == 0 else 0 < results["mask_AP"] < 1
    assert "mask_AP50" in format_table(results)
    metrics.reset()
    assert "mask_AP" not in metrics.compute()


@pytest.fixture(scope="module")
def trained(coco_file, tmp_path_factory):
    """A small Mask R-CNN that was trained on the two images until it knows them."""
    folder = tmp_path_factory.mktemp("mask_rcnn")
    torch.manual_seed(0)
    detector = tiny_detector("torchvision_mask_rcnn", num_labels=2, anchor_sizes=[[8], [16], [32], [64], [128]])
    detector.config.id2label = {0: "disc", 1: "square"}
    detector.save_pretrained(folder / "start")
    build_image_processor(detector, SIDE).save_pretrained(folder / "start")
    return finetune(
        FinetuneArguments(
            dataset=str(coco_file), eval_dataset=str(coco_file), eval_split="train", do_eval=False,
            detector=str(folder / "start"), output_dir=str(folder / "run"), max_steps=120, learning_rate=3e-3,
            backbone_learning_rate=1e-3, lr_scheduler_type="cosine", per_device_train_batch_size=2,
            image_sizes=[SIDE], eval_size=SIDE, color=False, crop_scale=None, use_cpu=True, save_strategy="no",
            write_report=False, disable_tqdm=True, dataloader_num_workers=0, logging_steps=20, warmup_steps=0,
        )
    ).output_dir  # fmt: skip


def test_mask_rcnn_learns_masks(coco_file, trained, tmp_path):
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss_mask"] for entry in log if "loss_mask" in entry]
    assert {name for name in log[0] if name.startswith("loss_")} == {
        "loss_ce", "loss_bbox", "loss_objectness", "loss_rpn_bbox", "loss_mask",
    }  # fmt: skip
    results = evaluate(
        EvaluateArguments(
            detector=str(trained), dataset=str(coco_file), split="train", output_dir=str(tmp_path / "out"),
            save_predictions=True, use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
        )
    )  # fmt: skip
    assert results["mask_AP"] > 0.5 and losses[-1] < losses[0] / 2
    detections = json.loads((tmp_path / "out" / "predictions.json").read_text())
    truth = COCO(str(coco_file))
    assert pycocotools_numbers(truth, detections, "segm") == pytest.approx(
        [results[name] for name in NAMES], abs=1e-12
    )
    boxes = [results[name.removeprefix("mask_")] for name in NAMES]
    assert pycocotools_numbers(truth, detections, "bbox") == pytest.approx(boxes, abs=1e-12)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["mask_AP"] == results["mask_AP"]


def test_other_commands_take_it(coco_file, trained, tmp_path):
    common = ["--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0", "--disable_tqdm"]
    words = ["--images", str(coco_file), "--detector", str(trained), "--score_threshold", "0.5", "--use_cpu"]
    assert cli.main(["predict", *words, *common]) == 0
    truth = json.loads(coco_file.read_text())["annotations"]
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    for annotation in truth[:4]:
        own = [one["bbox"] for one in found if one["image_id"] == annotation["image_id"]]
        assert pycoco.iou(own, [annotation["bbox"]], [0]).max() > 0.3
    common[1] = str(tmp_path / "boxes")
    words = ["--dataset", str(coco_file), "--source", "detector", "--detector", str(trained), "--min_side", "4"]
    assert cli.main(["proposals", *words, *common]) == 0
    boxes = load_dataset_source(str(tmp_path / "boxes"))[0]["proposals"]["bbox"]
    assert pycoco.iou(np.array(boxes, dtype=float), [truth[0]["bbox"]], [0]).max() > 0.3
