"""`aligndet predict`: what is found is where it is, in every form of output, and a run that was cut off goes on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import datasets
import numpy as np
import PIL.Image
import pycocotools.mask
import pytest
import torch
from pycocotools.coco import COCO
from tiny_detectors import tiny_detector
from transformers import RTDetrImageProcessor

from aligndet_hf.cli import main
from aligndet_hf.commands import predict as command
from aligndet_hf.commands.predict import PredictArguments, predict
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.data.masks import read_regions
from aligndet_hf.detectors.build import build_image_processor

SIDE = 64  # of what the detector sees
PROCESSOR = RTDetrImageProcessor(size={"height": SIDE, "width": SIDE}, do_normalize=False)


class BlobDetector(torch.nn.Module):
    """
    Finds bright blobs of at least 9 pixels of the image that it is given, the larger the surer: of the class "red" or
    "green". After `patience` forward passes it is interrupted.
    """

    def __init__(self, patience: int | None = None):
        super().__init__()
        self.config = SimpleNamespace(id2label={0: "red", 1: "green"})
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.patience, self.seen = patience, 0

    def forward(self, pixel_values, pixel_mask):
        if self.patience is not None and self.seen >= self.patience:
            raise KeyboardInterrupt
        self.seen += 1
        logits = torch.full((len(pixel_values), 30, 2), -20.0)
        boxes = torch.full((len(pixel_values), 30, 4), 0.5)
        for number, image in enumerate(pixel_values):
            query = 0
            for label in (0, 1):
                bright = (image[label] - image[2] > 0.4).numpy().astype(np.uint8)
                for x, y, w, h, area in cv2.connectedComponentsWithStats(bright)[2][1:]:
                    if area >= 9:
                        size = torch.tensor([bright.shape[1], bright.shape[0]] * 2)
                        boxes[number, query] = torch.tensor([x + w / 2, y + h / 2, w, h]) / size
                        logits[number, query, label] = 1.0 + float(area) / 1000
                        query += 1
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


class HalfDetector(BlobDetector):
    """The mask of each blob is the left half of its box."""

    def forward(self, pixel_values, pixel_mask):
        outputs = super().forward(pixel_values, pixel_mask)
        outputs.pred_masks = torch.full((*outputs.logits.shape[:2], 28, 28), -9.0)
        outputs.pred_masks[..., :14] = 9.0
        return outputs


def scene(boxes, size=(SIDE, SIDE)):
    """Dark, with blobs of (x, y, w, h, class)."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    for x, y, w, h, label in boxes:
        image[y : y + h, x : x + w, label] = 255
    return image


def look(images, detector=None, **settings):
    return predict(
        detector or BlobDetector(),
        images,
        image_processor=PROCESSOR,
        **{"disable_tqdm": True, "per_device_eval_batch_size": 3} | settings,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven images, each with one blob more than the one before it, and one file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(7):
        boxes = [(2 + 9 * blob, 4 + number, 5, 6, blob % 2) for blob in range(number)]
        PIL.Image.fromarray(scene(boxes)).save(folder / f"{number}.png")
    (folder / "3b.png").write_bytes(b"no image")
    return folder


def test_boxes_are_absolute_xywh_of_the_stored_image():
    image = cv2.resize(scene([(8, 16, 20, 10, 1), (40, 40, 6, 6, 0)]), (2 * SIDE, 3 * SIDE), interpolation=0)
    (found,) = look(image)
    np.testing.assert_allclose(found["boxes"], [[16, 48, 40, 30], [80, 120, 12, 18]], atol=1e-3)
    assert found["labels"].tolist() == [1, 0] and found["names"] == ["green", "red"]
    assert found["scores"] == pytest.approx(1 / (1 + np.exp([-1.2, -1.036])), abs=1e-5)
    assert (found["width"], found["height"], found["error"]) == (2 * SIDE, 3 * SIDE, None)
    assert len(look(image, score_threshold=0.75)[0]["boxes"]) == 1


def test_all_kinds_of_images_come_back_in_their_order(photos):
    dataset = datasets.Dataset.from_dict({"image": [str(photos / "2.png")]}).cast_column("image", datasets.Image())
    images = [
        scene([(9, 9, 9, 9, 0)]),
        photos / "3.png",
        str(photos / "3b.png"),
        PIL.Image.open(photos / "1.png"),
        dataset,
    ]
    found = look(images, dataloader_num_workers=2)
    assert [len(one["boxes"]) for one in found] == [1, 3, 0, 1, 2]
    assert [one["error"] is None for one in found] == [True, True, False, True, True]
    assert "3b.png" in found[2]["error"]


def test_supervision_takes_what_it_returns():
    sv = pytest.importorskip("supervision")
    (found,) = look(scene([(8, 16, 20, 10, 1)]))
    detections = sv.Detections(
        xyxy=sv.xywh_to_xyxy(found["boxes"]), confidence=found["scores"], class_id=found["labels"]
    )
    np.testing.assert_allclose(detections.xyxy, [[8, 16, 28, 26]], atol=1e-4)


def test_tiles_find_small_objects_that_the_whole_image_misses():
    rng = np.random.default_rng(0)
    cells = rng.permutation(64)[:20]
    small = [
        (64 * (c % 8) + int(dx), 64 * (c // 8) + int(dy), 10, 10, int(c % 2))
        for c, (dx, dy) in zip(cells, rng.integers(2, 50, (20, 2)), strict=True)
    ]
    large = (100, 60, 300, 330, 0)
    image = scene([large], (512, 512))
    for x, y, w, h, label in small:
        image[y : y + h, x : x + w] = scene([(0, 0, w, h, label)], (h, w)) if label else 0
    greens = sorted(box[:4] for box in small if box[4] == 1)
    whole = look(image)[0]
    assert 1 not in whole["labels"]  # 10 of 512 pixels are 1 or 2 of 64
    tiled = look(image, tile_size=128)[0]
    found = sorted(box.round().astype(int).tolist() for box in tiled["boxes"][tiled["labels"] == 1])
    assert len(found) == len(greens)
    np.testing.assert_allclose(found, greens, atol=2)
    reds = tiled["boxes"][tiled["labels"] == 0]
    assert len(reds) >= 1 and np.abs(reds - large[:4]).max(axis=1).min() <= 8  # found in the whole image, once
    without = look(image, tile_size=128, whole_image=False)[0]
    assert np.abs(without["boxes"] - large[:4]).max(axis=1).min() > 100


def test_a_video_of_300_frames_in_order(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 25, (SIDE, SIDE))
    for number in range(300):
        writer.write(scene([(number % 50, number // 8, 8, 8, 0)])[:, :, ::-1])
    writer.release()
    dataset = look(
        tmp_path / "v.avi", output_dir=str(tmp_path / "out"), dataloader_num_workers=2, per_device_eval_batch_size=16
    )
    assert dataset["file_name"] == [f"v.avi/{number:06d}.jpg" for number in range(300)]
    boxes = [objects["bbox"][0] for objects in dataset["objects"]]
    np.testing.assert_allclose(boxes, [[n % 50, n // 8, 8, 8] for n in range(300)], atol=0.01)
    assert (tmp_path / "out/images/v.avi/000299.jpg").is_file()


@pytest.fixture(scope="module")
def output(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions") / "out"
    formats = ["coco", "results", "yolo", "dataset", "pictures", "sheet"]
    look(photos, output_dir=str(folder), formats=formats)
    return folder


def test_the_report_counts_everything_and_lists_what_cannot_be_read(output):
    report = json.loads((output / "report.json").read_text())
    assert (report["images"], report["images_without_boxes"], report["boxes"]) == (7, 1, 21)
    assert report["boxes_of_class"] == {"red": 12, "green": 9}
    assert [fault["file"] for fault in report["skipped"]] == ["3b.png"]


def test_coco_labels_and_results_agree_and_load(output, photos):
    labels = COCO(str(output / "labels.json"))
    results = labels.loadRes(str(output / "predictions.json"))
    assert len(labels.anns) == len(results.anns) == 21 and len(labels.imgs) == 7
    assert labels.anns[1]["bbox"] == pytest.approx([2, 5, 5, 6]) and labels.anns[1]["area"] == pytest.approx(30)
    for of_file, of_results in zip(labels.anns.values(), results.anns.values(), strict=True):
        assert {key: of_file[key] for key in ("image_id", "bbox", "category_id", "score")} == {
            key: of_results[key] for key in ("image_id", "bbox", "category_id", "score")
        }
    loaded = load_dataset_source(output / "labels.json", labels=True, image_dir=photos)
    assert [len(objects["bbox"]) for objects in loaded["objects"]] == list(range(7))
    assert loaded.features["objects"]["category"].feature.names == ["red", "green"]


def test_yolo_labels_come_in_again_as_they_went_out(output, photos):
    assert (output / "yolo/images/train/1.png").read_bytes() == (photos / "1.png").read_bytes()
    assert (output / "yolo/labels/train/0.txt").read_text() == ""
    label, *box = (output / "yolo/labels/train/1.txt").read_text().split()
    assert label == "0" and [float(number) for number in box] == pytest.approx([4.5 / 64, 8 / 64, 5 / 64, 6 / 64])
    first = load_dataset_source(output / "yolo", labels=True)
    second = load_dataset_source(output / "labels.json", labels=True, image_dir=photos)
    assert first.features["objects"]["category"].feature.names == ["red", "green"]
    for one, other in zip(first["objects"], second["objects"], strict=True):
        assert one["category"] == other["category"]
        np.testing.assert_allclose(one["bbox"] or np.zeros(0), other["bbox"] or np.zeros(0), atol=1e-5)


def test_a_coco_file_gets_its_own_ids_back(photos, tmp_path):
    """Ids 7 and 90, images from 139 on: the results go with the file that came in."""
    images = [{"id": 139 + n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(3)]
    box = {"image_id": 140, "category_id": 90, "bbox": [2, 5, 5, 6], "area": 30, "iscrowd": 0, "id": 1}
    categories = [{"id": 7, "name": "green"}, {"id": 90, "name": "red"}]
    content = {"images": images, "annotations": [box], "categories": categories}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    images = load_dataset_source(tmp_path / "labels.json", image_dir=photos)
    look(images, output_dir=str(tmp_path / "out"))
    truth = COCO(str(tmp_path / "labels.json"))
    results = truth.loadRes(str(tmp_path / "out/predictions.json"))
    assert [(one["image_id"], one["category_id"]) for one in results.anns.values()] == [(140, 90), (141, 90), (141, 7)]
    labels = json.loads((tmp_path / "out/labels.json").read_text())
    assert labels["categories"] == [{"id": 90, "name": "red"}, {"id": 7, "name": "green"}]
    assert [image["file_name"] for image in labels["images"]] == ["0.png", "1.png", "2.png"]


def test_the_data_set_holds_images_and_objects_with_scores(output, photos):
    dataset = datasets.load_from_disk(str(output / "dataset"))
    row = dataset[2]
    assert row["image"].size == (SIDE, SIDE) and row["file_name"] == "2.png"
    np.testing.assert_allclose(row["objects"]["bbox"], [[2, 6, 5, 6], [11, 6, 5, 6]], atol=1e-3)
    assert row["objects"]["category"] == [0, 1] and min(row["objects"]["score"]) > 0.7
    assert [number for objects in dataset["objects"] for number in objects["id"]] == list(range(1, 22))


def test_pictures_show_the_boxes(output):
    assert sorted(path.name for path in (output / "pictures").iterdir()) == [f"{n}.png.jpg" for n in range(7)]
    empty, full = (np.asarray(PIL.Image.open(output / f"pictures/{n}.png.jpg")).astype(int) for n in (0, 6))
    assert empty.max() < 30 and (full[..., 2] > 100).any()  # the blue of a box: the scene has none
    sheet = PIL.Image.open(output / "sheet.jpg")
    assert sheet.width > 4 * 400
    first = np.asarray(sheet)[8:408, 8:408].astype(int)  # image 0, of 64 pixels, fills its place
    assert first.max() < 30


def test_masks_of_a_detector_that_predicts_them(tmp_path):
    """In an image of 128 pixels, also where tiles of 64 are looked at: the left half of each blob."""
    image = scene([(10, 70, 20, 40, 0), (74, 8, 16, 20, 1)], (128, 128))
    halves = np.zeros((2, 128, 128), dtype=np.uint8)
    halves[0, 70:110, 10:20], halves[1, 8:28, 74:82] = 1, 1
    for settings in ({}, {"tile_size": 64, "tile_overlap": 0.0, "whole_image": False}):
        (found,) = look(image, HalfDetector(), **settings)
        assert found["labels"].tolist() == [0, 1]
        masks = pycocotools.mask.decode(list(found["masks"])).transpose(2, 0, 1)
        assert (masks != halves).sum() <= 90  # a row or column of pixels at the edges
    assert look(image, HalfDetector(), masks=False)[0]["masks"] is None and look(image)[0]["masks"] is None

    (tmp_path / "photos").mkdir()
    PIL.Image.fromarray(image).save(tmp_path / "photos" / "1.png")
    (tmp_path / "photos" / "0.png").write_bytes(b"no image")
    out = tmp_path / "out"
    formats = ["coco", "results", "dataset", "pictures", "sheet"]
    look(tmp_path / "photos", HalfDetector(), output_dir=str(out), formats=formats)
    labels = COCO(str(out / "labels.json"))
    for coco in (labels, labels.loadRes(str(out / "predictions.json"))):
        masks = np.stack([coco.annToMask(annotation) for annotation in coco.anns.values()])
        assert (masks != halves).sum() <= 90
    assert [annotation["area"] for annotation in labels.anns.values()] == masks.sum((1, 2)).tolist()
    stored = datasets.load_from_disk(str(out / "dataset"))
    first, _ = read_regions(stored.with_format("arrow")[:]["objects"], 128, 128)
    assert (first.draw(128, 128) == masks[0]).all()
    loaded = load_dataset_source(out / "labels.json", labels=True, image_dir=tmp_path / "photos")
    for mask, region in zip(masks, read_regions(loaded.with_format("arrow")[:]["objects"], 128, 128), strict=True):
        assert isinstance(region.shape, list) and (region.draw(128, 128) != mask).sum() <= 2
    picture = np.asarray(PIL.Image.open(out / "pictures/1.png.jpg")).astype(int)
    assert picture[80:100, 13:18, 1].mean() > 30 > 15 > picture[80:100, 22:28, 1].mean()  # orange over red


def test_that_nothing_was_found_is_told_with_the_best_score(photos, tmp_path, capsys):
    images = [scene([(8, 16, 20, 10, 1)]), scene([(9, 9, 9, 9, 0)])]  # scores 1 / (1 + exp(-1.2)) = 0.769, and 0.747
    expected = "no box has a score of at least 0.8, the score_threshold; the best score is 0.769"
    assert [len(found["boxes"]) for found in look(images, score_threshold=0.8)] == [0, 0]
    told = capsys.readouterr().out
    assert expected in told and "--output_dir" not in told
    look(images, score_threshold=0.8, output_dir=str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert expected in told and "needs another --output_dir, or --overwrite_output_dir" in told
    assert json.loads((tmp_path / "out/report.json").read_text())["best_score"] == pytest.approx(0.769, abs=1e-3)
    look(images)
    assert "no box" not in capsys.readouterr().out


def test_images_that_cannot_be_read_are_no_fault_of_the_detector(capsys):
    broken = np.zeros((4, 4, 3))  # not uint8
    assert look([broken])[0]["error"]
    told = capsys.readouterr().out
    assert "note: none of the 1 images can be read" in told and "no box" not in told


def test_arguments_beside_arguments_are_refused():
    given = PredictArguments(detector="d", images="a.jpg")
    with pytest.raises(ValueError, match="PredictArguments have everything: give score_threshold to them"):
        predict(given, score_threshold=0.9)
    with pytest.raises(ValueError, match="give images to them"):
        predict(given, "b.jpg")


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(photos, tmp_path, monkeypatch, output):
    monkeypatch.setattr("aligndet_hf.commands.predict._SHARD_SIZE", 2)
    settings = {"output_dir": str(tmp_path / "out"), "per_device_eval_batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        look(photos, BlobDetector(patience=5), **settings)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    with pytest.raises(ValueError, match="score_threshold: 0.3 there, 0.5 now"):
        look(photos, score_threshold=0.5, **settings)
    shard = tmp_path / "out.partial" / "shard-000000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    shutil.copytree(photos, tmp_path / "moved")  # the same images, at another place and time
    rest = BlobDetector()
    look(tmp_path / "moved", rest, **settings)
    assert rest.seen == 4  # of four shards the last one was missing, and the first damaged
    for name in ("labels.json", "predictions.json"):
        assert (tmp_path / "out" / name).read_text() == (output / name).read_text()
    assert not (tmp_path / "out.partial").exists()
    again = BlobDetector()
    assert len(look(photos, again, **settings)) == 7 and again.seen == 0
    with pytest.raises(ValueError, match="score_threshold: 0.3 there, 0.5 now"):
        look(photos, again, score_threshold=0.5, **settings)
    look(photos, again, score_threshold=0.5, overwrite_output_dir=True, **settings)
    assert again.seen == 7


def test_images_are_told_by_their_content(tmp_path):
    folder, settings = tmp_path / "photos", {"output_dir": str(tmp_path / "photos" / "out"), "formats": ["pictures"]}
    folder.mkdir()
    for name, boxes in {"a.bmp": [(4, 4, 9, 9, 0)], "b.bmp": [(30, 8, 12, 9, 1)]}.items():
        PIL.Image.fromarray(scene(boxes)).save(folder / name)
    assert len(look(folder, **settings)) == 2
    again = BlobDetector()
    assert len(look(folder, again, **settings)) == 2 and again.seen == 0  # its pictures lie there and are none of ours
    stat = (folder / "a.bmp").stat()
    shutil.copyfile(folder / "b.bmp", folder / "a.bmp")  # as large
    os.utime(folder / "a.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="or of other data"):
        look(folder, again, **settings)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """From 200 images to 1,000 the process gets no larger, but for the pages of files."""
    PIL.Image.fromarray(scene([(4, 4, 9, 9, 0)], (120, 160))).save(tmp_path / "one.png")
    (tmp_path / "photos").mkdir()
    for number in range(1000):
        (tmp_path / "photos" / f"{number:04d}.png").hardlink_to(tmp_path / "one.png")
    held, write = [], command.write_predictions

    def record(*args):
        write(*args)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        held.append(int(next(line for line in lines if line.startswith("Anonymous")).split()[1]) / 1024)

    monkeypatch.setattr(command, "write_predictions", record)
    settings = {"disable_tqdm": True, "output_dir": str(tmp_path / "out")}
    predict(BlobDetector(), tmp_path / "photos", image_processor=PROCESSOR, **settings)
    assert len(held) == 16
    assert held[-1] - held[3] < 20  # MB; the pixels of 800 images are 46 MB


def test_the_command_takes_a_folder_of_a_detector(photos, tmp_path, capsys):
    detector = tiny_detector("conditional_detr", num_labels=2, id2label={0: "red", 1: "green"})
    detector.save_pretrained(tmp_path / "detector")
    build_image_processor(detector, SIDE).save_pretrained(tmp_path / "detector")
    flags = ["--images", str(photos), "--score_threshold", "0.1", "--formats", "results", "--disable_tqdm"]
    assert (
        main(["predict", "--detector", str(tmp_path / "detector"), *flags, "--output_dir", str(tmp_path / "out")]) == 0
    )
    assert "7 images" in (text := capsys.readouterr().out) and "3b.png" in text
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {entry["image_id"] for entry in results} == {1, 2, 3, 4, 6, 7, 8}
    assert all(min(entry["bbox"]) >= 0 and entry["score"] >= 0.1 for entry in results)
    assert main(["predict", "--detector", "nothing/here", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert "error: detector 'nothing/here'" in capsys.readouterr().err
    assert main(["predict", "--detector", str(tmp_path / "detector"), *flags]) == 2  # nobody would see the boxes
    assert "required: --output_dir" in capsys.readouterr().err


def test_a_model_without_a_folder_needs_an_image_processor():
    image, detector = np.zeros((8, 8, 3), np.uint8), tiny_detector("detr", num_labels=1)
    with pytest.raises(ValueError, match="no image processor with it: give `image_processor` as well"):
        predict(detector, image, use_cpu=True)
    assert (
        predict(detector, image, image_processor=build_image_processor(detector, SIDE), use_cpu=True)[0]["width"] == 8
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tile_overlap": 1.0}, "tile_overlap must be 0 or more and below 1, got 1.0"),
        ({"formats": ["coco", "kitti"]}, "formats must be among .*, got kitti"),
        ({"score_threshold": 2.0}, "score_threshold must be from 0 to 1"),
        ({"tile_size": 3}, "tile_size must be 16 or more"),
        ({"tile_overlap": 0.5}, "tile_overlap is for tiles: give a tile_size too, such as 640, or leave it out"),
        ({"whole_image": False}, "whole_image is for tiles"),
        ({"nms_threshold": 0.7}, "nms_threshold is for tiles"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PredictArguments(detector="d", images=["i"], **settings)


def test_without_tiles_the_defaults_of_tiles_may_be_given(output):
    given = {"tile_overlap": 0.2, "whole_image": True, "nms_threshold": 0.5}
    assert PredictArguments(detector="d", images=np.zeros((4, 4, 3), np.uint8), **given).tiling() is None
    settings = json.loads((output / "report.json").read_text())["settings"]
    assert settings["tile_size"] is None and settings.keys().isdisjoint(given)
