"""Pseudo-labels: boxes of a teacher that is right by construction, checks of classes, and batches of both kinds."""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import tiny_detector
from transformers import AutoImageProcessor

from aligndet_hf.commands import finetune as finetune_command
from aligndet_hf.commands import pseudolabel as command
from aligndet_hf.commands.finetune import FinetuneArguments, finetune
from aligndet_hf.commands.pseudolabel import PseudolabelArguments, pseudolabel
from aligndet_hf.data.bit_depth import pixel_window
from aligndet_hf.data.dataset import LabelledImages, MixedImages
from aligndet_hf.data.door import image_bytes
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.sampling import MixedBatchSampler, SampleKey
from aligndet_hf.data.synthetic import SYNTHETIC_CATEGORIES, write_synthetic_folder
from aligndet_hf.data.views import ViewConfig
from aligndet_hf.detectors.build import build_image_processor
from aligndet_hf.evaluation.pseudo_labels import check_classes, suppress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pseudo")
    write_synthetic_folder(folder / "data", {"train": 12, "validation": 3}, seed=0, image_size=(64, 96))
    teacher = tiny_detector("detr", num_labels=len(SYNTHETIC_CATEGORIES))
    teacher.config.id2label = dict(enumerate(SYNTHETIC_CATEGORIES))
    teacher.save_pretrained(folder / "teacher")
    build_image_processor(teacher, 64).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def oracle(folder, monkeypatch):
    """Has the teacher see the truth, twice each object, with one class confused and one box of a low score."""
    rows = [json.loads(line) for line in (folder / "data/train/metadata.jsonl").read_text().splitlines()]
    truth = {row["file_name"]: row["objects"] for row in rows}

    def predict(arguments):
        found = datasets.Dataset.from_list(
            [
                {"image": {"bytes": value["bytes"], "path": None}, "file_name": name, "objects": _seen(truth[name])}
                for name, value in (
                    (value["path"] and value["path"].split("/")[-1], {"bytes": image_bytes(value)})
                    for value in command._values(arguments.images)
                )
            ]
        )
        return found.cast_column("image", datasets.Image(decode=False))

    monkeypatch.setattr(command, "predict", predict)
    return truth


def _seen(objects: dict) -> dict:
    boxes, labels = objects["bbox"], objects["category"]
    scores = [0.9] * len(boxes) + [0.6] * len(boxes) + [0.3]
    boxes = [*boxes, *([x + 1, y, w, h] for x, y, w, h in boxes), [0.0, 0.0, 5.0, 4.0]]
    return {"bbox": boxes, "category": [*labels, *labels, 0], "score": scores}


def arguments_for(folder, **changes) -> PseudolabelArguments:
    settings = {"detector": str(folder / "teacher"), "dataset": str(folder / "data"), "label_fraction": 0.25}
    return PseudolabelArguments(**settings | {"disable_tqdm": True, "class_check": "none", "use_cpu": True} | changes)


def test_labels_of_a_teacher(folder, oracle, tmp_path):
    labelled = pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "out")))
    report = json.loads((tmp_path / "out" / "pseudolabel.json").read_text())
    assert len(labelled) == 9 == report["images"]  # 3 of 12 are the teacher's own
    for row in labelled.remove_columns("image"):
        objects, truth = row["objects"], oracle[row["file_name"]]
        sure = [box for box, ignore in zip(objects["bbox"], objects["ignore"], strict=True) if not ignore]
        np.testing.assert_allclose(sorted(sure), sorted(truth["bbox"]))  # the doubles are gone
        assert objects["ignore"][-1] == 1 and objects["score"][-1] == pytest.approx(0.3)
        assert set(objects["source"]) == {"teacher"}
    assert report["precision"] == report["precision_without_class"] == 1.0
    assert report["kept"] == sum(len(oracle[name]["bbox"]) for name in labelled["file_name"])
    assert sum(row["share"] for row in report["classes"].values()) == pytest.approx(1)
    sheet = np.asarray(Image.open(tmp_path / "out" / "pseudolabel.jpg")).astype(int)
    assert sheet.shape[1] == 4 * 408 + 8  # small images are shown large
    assert sheet[5:20].min() < 80 and (sheet[5:20] > 240).mean() > 0.8  # what is solid and what is dashed
    with pytest.raises(ValueError, match="overwrite"):
        pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "out"), score_threshold=0.7))
    with pytest.raises(ValueError, match="backbone_weights: None there, 'timm' now"):
        pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "out"), backbone_weights="timm"))


def test_the_labels_are_those_that_the_teacher_learned_from(folder, oracle, tmp_path):
    teacher = shutil.copytree(folder / "teacher", tmp_path / "teacher")
    learned = {"dataset": str(folder / "data"), "label_fraction": 0.5, "label_seed": 0}
    (teacher / "finetune_settings.json").write_text(json.dumps(learned))
    given = {"detector": str(teacher), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="learned from label_fraction 0.5 .* give --label_fraction 0.5"):
        pseudolabel(arguments_for(folder, **given))
    with pytest.raises(ValueError, match="give --label_seed 0"):
        pseudolabel(arguments_for(folder, **given, label_fraction=0.5, label_seed=1))
    assert len(pseudolabel(arguments_for(folder, **given, label_fraction=0.5))) == 6
    (teacher / "finetune_settings.json").write_text(json.dumps(learned | {"dataset": "others"}))
    assert len(pseudolabel(arguments_for(folder, **given | {"output_dir": str(tmp_path / "other")}))) == 9


def test_shuffled_classes_are_a_control(folder, oracle, tmp_path):
    plain = pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "plain")))
    dealt = pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "dealt"), shuffle_classes=True))
    boxes, classes = [], []
    for labelled in (plain, dealt):
        objects = labelled["objects"]
        boxes.append([row["bbox"] for row in objects])
        classes.append(
            [c for row in objects for c, ignore in zip(row["category"], row["ignore"], strict=True) if not ignore]
        )
    assert boxes[0] == boxes[1] and classes[0] != classes[1] and sorted(classes[0]) == sorted(classes[1])
    report = json.loads((tmp_path / "dealt" / "pseudolabel.json").read_text())
    assert report["precision"] < report["precision_without_class"] == 1.0


def test_all_images_are_labelled_ones(folder, tmp_path):
    with pytest.raises(DataError, match="all 12 images are among the labelled ones. Lower --label_fraction"):
        pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "out"), label_fraction=1.0))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def deep(folder):
    """The same images with 12 of 16 bits, and a teacher that was trained with levels up to 6000."""
    shutil.copytree(folder / "data", folder / "deep")
    for path in (folder / "deep").glob("*/*.jpg"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path, "PNG")
    shutil.copytree(folder / "teacher", folder / "deep_teacher")
    image_processor = AutoImageProcessor.from_pretrained(folder / "deep_teacher")
    image_processor.pixel_window = [0.0, 6000.0]
    image_processor.save_pretrained(folder / "deep_teacher")
    return {"detector": str(folder / "deep_teacher"), "dataset": str(folder / "deep")}


class Caught(Exception):
    pass


def test_everything_sees_grey_levels_as_the_teacher_does(folder, deep, tmp_path, monkeypatch):
    seen, windows, original = [], [], command.crop_features
    monkeypatch.setattr(
        command, "crop_features", lambda features, image, boxes: seen.append(image) or original(features, image, boxes)
    )
    monkeypatch.setattr(
        command, "check_classes", lambda _, __, boxes: (np.zeros(len(boxes), int), boxes[:, 0] == boxes[:, 0])
    )
    monkeypatch.setattr(command, "write_sheet", lambda *given: windows.append(given[4]))
    everything = {"score_threshold": 0.0, "ignore_threshold": 0.0, "class_check": "neighbours"}
    labelled = pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "out"), **everything, **deep))
    assert pixel_window(labelled) == (0, 6000) and windows == [(0, 6000)]
    assert len(seen) == 12 and max(image.max() for image in seen) <= 255 * 16 * 255 / 6000 + 1

    def catch(*_, train_dataset, **__):
        seen.append(train_dataset)
        raise Caught

    monkeypatch.setattr(finetune_command, "DetectionTrainer", catch)
    for window, expected in (("range", (0, 6000)), ("0,1000", (0, 1000))):
        student = FinetuneArguments(
            **deep, output_dir=str(tmp_path / "student"), overwrite_output_dir=True, pixel_window=window, max_steps=1,
            pseudo_dataset=str(tmp_path / "out"), image_sizes=[64], dataloader_num_workers=0, use_cpu=True,
            eval_strategy="no",
        )  # fmt: skip
        with pytest.raises(Caught):
            finetune(student)
        assert seen[-1].labelled.window == seen[-1].pseudo.window == expected


def test_images_of_a_label_file_may_lie_elsewhere(folder, oracle, tmp_path):
    names = sorted(oracle)
    annotations = [
        {"image_id": number, "bbox": box, "category_id": label}
        for number, name in enumerate(names)
        for box, label in zip(oracle[name]["bbox"], oracle[name]["category"], strict=True)
    ]
    content = {
        "images": [{"id": number, "file_name": name, "width": 96, "height": 64} for number, name in enumerate(names)],
        "annotations": [{"id": number} | annotation for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(SYNTHETIC_CATEGORIES)],
    }
    labels, images = str(tmp_path / "labels.json"), str(folder / "data" / "train")
    (tmp_path / "labels.json").write_text(json.dumps(content))
    of_both = arguments_for(folder, output_dir=str(tmp_path / "both"), dataset=labels, image_dir=images)
    assert len(pseudolabel(of_both)) == 9
    given = {"labelled_dataset": labels, "labelled_image_dir": images}
    assert len(pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "own"), **given))) == 9
    # The folder of the unlabelled images says nothing of the labelled ones.
    with pytest.raises(DataError, match="labels.json"):
        apart = {"labelled_dataset": labels, "image_dir": images}
        pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "apart"), **apart))


@pytest.mark.parametrize("given", [{"backbone": "resnet10t"}, {"backbone_weights": "timm"}])
def test_random_features_decide_no_class(folder, given):
    with pytest.raises(ValueError, match="needs both --backbone and --backbone_weights, or neither"):
        arguments_for(folder, output_dir="out", class_check="neighbours", **given)
    arguments_for(folder, output_dir="out", class_check="neighbours", backbone=str(folder))  # brings its weights


def test_a_teacher_that_is_never_sure_is_told_before_classes_are_checked(folder, oracle, tmp_path):
    changes = {"score_threshold": 0.95, "class_check": "neighbours", "output_dir": str(tmp_path / "out")}
    with pytest.raises(DataError, match="score of at least 0.95, the score_threshold; the best score is 0.9. Lower"):
        pseudolabel(arguments_for(folder, **changes))


def test_the_real_teacher_and_its_neighbours(folder, tmp_path, capsys):
    changes = {"score_threshold": 0.0, "ignore_threshold": 0.0, "nms_threshold": 0.9, "class_check": "neighbours"}
    labelled = pseudolabel(arguments_for(folder, output_dir=str(tmp_path / "out"), **changes))
    report = json.loads((tmp_path / "out" / "pseudolabel.json").read_text())
    assert ".partial" not in capsys.readouterr().out  # nothing of the predictions in between, which are gone by now
    assert 0 < len(labelled) <= 9 and 0 <= report["classes_agree"] <= 1
    assert report["kept"] + report["ignored"] == report["boxes"]
    sources = {source for row in labelled["objects"] for source in row["source"]}
    assert sources <= {"teacher", "neighbours"}
    # The student learns from both kinds.
    student = FinetuneArguments(
        dataset=str(folder / "data"), detector=str(folder / "teacher"), output_dir=str(tmp_path / "student"),
        image_sizes=[64], max_steps=2, per_device_train_batch_size=4, dataloader_num_workers=0, use_cpu=True,
        label_fraction=0.25, pseudo_dataset=str(tmp_path / "out"), labelled_share=0.5, disable_tqdm=True,
        save_strategy="no", write_report=False, eval_strategy="no", logging_steps=1,
    )  # fmt: skip
    finetune(student)
    losses = [
        row["loss"] for row in json.loads((tmp_path / "student/trainer_state.json").read_text())["log_history"][:2]
    ]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_labels_of_people_are_no_pseudo_labels(folder, tmp_path):
    student = {"detector": str(folder / "teacher"), "output_dir": str(tmp_path), "image_sizes": [64], "use_cpu": True}
    wrong = FinetuneArguments(dataset=str(folder / "data"), pseudo_dataset=str(folder / "data"), **student,
                              pseudo_split="train", dataloader_num_workers=0)  # fmt: skip
    with pytest.raises(DataError, match="no field 'ignore'. Expected what `aligndet pseudolabel` writes"):
        finetune(wrong)
    Image.new("RGB", (8, 8)).save(tmp_path / "unlabelled.png")
    with pytest.raises(DataError, match="--pseudo_dataset takes what `aligndet pseudolabel` writes. .*no column 'obj"):
        finetune(FinetuneArguments(dataset=str(folder / "data"), pseudo_dataset=str(tmp_path), **student | {
            "output_dir": str(tmp_path / "out")}, dataloader_num_workers=0))  # fmt: skip
    with pytest.raises(ValueError, match="labelled_share must be above 0 and below 1"):
        FinetuneArguments(dataset="x", labelled_share=1.0, **student)


def test_items_have_weights_and_ignored_boxes():
    row = {"bbox": [[0, 0, 10, 10], [20, 20, 20, 20]], "category": [1, 0], "score": [0.75, 0.25], "ignore": [0, 1]}
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": None}
    dataset = datasets.Dataset.from_list([{"image": image, "objects": row}])
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    labels = LabelledImages(dataset, ViewConfig([40], flip_probability=0.0), pseudo=True)[SampleKey(0, 0, 0)]["labels"]
    assert labels["class_labels"].tolist() == [1] and labels["weights"].tolist() == [0.75]
    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.125, 0.125, 0.25, 0.25]]))
    torch.testing.assert_close(labels["ignored_boxes"], torch.tensor([[0.75, 0.75, 0.5, 0.5]]))
    mixed = MixedImages(
        LabelledImages(dataset, ViewConfig([40])), LabelledImages(dataset, ViewConfig([40]), pseudo=True), 0.5
    )
    assert len(mixed) == 2
    assert "weights" not in mixed[SampleKey(0, 0, 0)]["labels"] and "weights" in mixed[SampleKey(1, 0, 0)]["labels"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_of_both_kinds(world_size):
    options = {"batch_size": 8 // world_size, "seed": 3, "world_size": world_size}
    samplers = [MixedBatchSampler(5, 40, 0.25, rank=rank, **options) for rank in range(world_size)]
    seen = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for parts in zip(*samplers, strict=True):
            rows = [key.index for part in parts for key in part]
            assert len(rows) == 8 and sum(row < 5 for row in rows) == 2
            assert all(any(key.index < 5 for key in part) for part in parts)
            seen += rows
    counts = np.bincount(seen, minlength=45)
    assert set(counts[5:].tolist()) == {2} or np.ptp(counts[5:]) <= 1  # 84 places for 40 rows, in two epochs
    assert np.ptp(counts[:5]) <= 1
    # Resumed in the middle, the rest is the same.
    whole = list(samplers[0])
    samplers[0].set_epoch(1, 3)
    assert list(samplers[0]) == whole[3:]
    with pytest.raises(ValueError, match="at least 2"):
        MixedBatchSampler(5, 5, 0.5, 1, seed=0)


def test_suppression_is_over_all_classes():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [30, 30, 5, 5]], float)
    assert suppress(boxes, np.array([0.5, 0.9, 0.1]), 0.6).tolist() == [1, 2]
    assert suppress(boxes, np.array([0.5, 0.9, 0.1]), 0.9).tolist() == [1, 0, 2]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


def test_neighbours_know_classes():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    classes = np.repeat([0, 1, 2], 30)
    points = centres[classes] + 0.1 * rng.standard_normal((90, 8))
    labelled = np.arange(0, 90, 10)
    rest = np.setdiff1d(np.arange(90), labelled)
    nearest, agree = check_classes(points[labelled], classes[labelled], points[rest])
    assert (nearest == classes[rest]).all() and agree.all()
    # A point between two classes: both ways may say what they like, and what they do not share is not believed.
    assert [len(one) for one in check_classes(points[labelled], classes[labelled], np.zeros((0, 8)))] == [0, 0]
    assert check_classes(points[:1], classes[:1], points[rest])[0].tolist() == [0] * len(rest)
    with pytest.raises(ValueError, match="no labelled object"):
        check_classes(np.zeros((0, 8)), np.zeros(0), points)
