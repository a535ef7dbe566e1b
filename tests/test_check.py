"""`aligndet check`: everything that is wrong with a data set, at once."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import PIL.Image
import pytest
from tiny_detectors import ONE_STEP, SMALL_DETR

from aligndet_hf.cli import main
from aligndet_hf.commands.check import CheckArguments, check
from aligndet_hf.commands.finetune import finetune
from aligndet_hf.data.checks import leak_note, metric_note, objects_per_image, query_note, same_images
from aligndet_hf.data.formats import load_dataset_source
from aligndet_hf.training.finetune_arguments import FinetuneArguments


def write_image(path, seed, size=(80, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Smooth and different from one another, as photographs are.
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(small).resize(size, PIL.Image.Resampling.BICUBIC).save(path)


def write_coco(folder, count, first_seed=0, boxes=((10, 10, 20, 20), (30, 5, 8, 8)), **image_fields):
    """A folder of images with a COCO file: the categories of its boxes are 3, 7, 3, 7, ..."""
    images, annotations = [], []
    for number in range(count):
        write_image(folder / f"{number}.png", first_seed + number)
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
        for index, box in enumerate(boxes):
            category = (3, 7)[index % 2]
            annotation = {"id": len(annotations), "image_id": number, "category_id": category, "bbox": list(box)}
            annotations.append(annotation | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "cow"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "labels.json").write_text(json.dumps(content))
    return content


def run(source, **arguments):
    arguments = {"image_sizes": [60], "disable_tqdm": True} | arguments
    return check(CheckArguments(dataset=str(source), **arguments))


def test_a_sound_data_set(tmp_path, capsys):
    write_coco(tmp_path / "x", 4)
    report = run(tmp_path / "x" / "labels.json", output_dir=str(tmp_path / "out"), num_pictures=3)
    (split,) = report.splits.values()
    assert report.exit_code == 0 and report.all_problems == [] and report.leaks == []
    assert (split.images, split.objects, split.kinds) == (4, 8, {"PNG RGB": 4})
    assert split.classes == {"cat": 4, "dog": 4, "cow": 0}
    assert split.sizes["width"] == {"min": 80, "median": 80, "max": 80} and split.sizes["rotated"] == 0
    assert split.objects_per_image == {"median": 2.0, "max": 2, "without": 0}
    # Views of 60 are as large as the images: sides of 20 and 8 pixels.
    assert split.box_sides == {"60": {"below 8": 0.0, "below 16": 0.5, "below 32": 1.0}}
    assert split.notes == ["1 of 3 categories have no object here: cow"]
    text = capsys.readouterr().out
    assert "COCO" in text and "no problems found" in text and "4 images, 8 boxes" in text
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == json.loads(json.dumps(asdict(report)))
    (sheet,) = (tmp_path / "out").glob("check-*.jpg")
    assert PIL.Image.open(sheet).width > 3 * 80


def test_views_double_the_boxes(tmp_path):
    write_coco(tmp_path / "x", 1)
    (split,) = run(tmp_path / "x" / "labels.json", image_sizes=[120, 240], find_copies=False).splits.values()
    assert split.box_sides == {
        "120": {"below 8": 0.0, "below 16": 0.0, "below 32": 0.5},  # 40 and 16
        "240": {"below 8": 0.0, "below 16": 0.0, "below 32": 0.0},
    }


def test_all_problems_are_told_at_once(tmp_path, capsys):
    content = write_coco(tmp_path / "x", 6)
    for name in ("1.png", "4.png"):
        path = tmp_path / "x" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    content["images"][3]["width"] = 40
    content["annotations"][0]["bbox"] = [500, 1, 5, 5]
    (tmp_path / "x" / "labels.json").write_text(json.dumps(content))
    assert main(["check", "--dataset", str(tmp_path / "x" / "labels.json"), "--disable_tqdm"]) == 1
    text = capsys.readouterr().out
    problems = [line for line in text.splitlines() if line.startswith("  problem: ")]
    assert len(problems) == 3 and "3 problems found" in text
    assert "row 1: " in problems[0] and "1.png" in problems[0] and "row 4: " in problems[1]
    assert "row 3: by the labels the image has width 40" in problems[2]
    assert "1 boxes will be dropped: outside the image (rows 0)" in text


def test_copies_and_leaks(tmp_path):
    for split, seed in (("train", 0), ("validation", 100)):
        for number in range(3):
            write_image(tmp_path / "x" / split / f"{number}.png", seed + number)
    shutil.copy(tmp_path / "x" / "train" / "0.png", tmp_path / "x" / "train" / "copy.png")
    image = PIL.Image.open(tmp_path / "x" / "train" / "2.png")
    image.resize((40, 30)).save(tmp_path / "x" / "validation" / "smaller.jpg")
    report = run(tmp_path / "x")
    assert [leak["image"].rsplit("/", 1)[1] for leak in report.leaks] == ["smaller.jpg"]
    assert report.leaks[0]["seen"].endswith("train/2.png")
    assert report.exit_code == 0 and report.notes[0].startswith("1 images of one split look like one of another split")
    ((copy, original),) = report.splits["train"].copies
    assert copy.endswith("copy.png") and original.endswith("0.png") and report.splits["validation"].copies == []
    shutil.copy(tmp_path / "x" / "train" / "1.png", tmp_path / "x" / "validation" / "same.png")
    report = run(tmp_path / "x")
    (problem,) = report.all_problems
    assert report.exit_code == 1 and "same.png (validation) = " in problem and "smaller" not in problem
    assert len(report.notes) == 1
    assert run(tmp_path / "x", find_copies=False).exit_code == 0


def test_a_split_that_cannot_be_read_hides_no_other_one(tmp_path):
    for split in ("train", "validation"):
        write_image(tmp_path / "x" / split / "0.png", 0)
        objects = {"bbox": [[1, 1, 9, 9]], "category": [0]}
        (tmp_path / "x" / split / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "objects": objects}))
    (tmp_path / "x" / "train" / "metadata.jsonl").write_text("{")
    report = run(tmp_path / "x", find_copies=False)
    assert len(report.splits["train"].problems) == 1 and "line 1" in report.splits["train"].problems[0]


def test_nothing_there(tmp_path, capsys, monkeypatch):
    assert main(["check", "--dataset", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.startswith("error: Cannot load")


def test_an_error_is_printed_safely(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    name = "\x1b]0;owned\x07.jpg"
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": name}))
    write_image(tmp_path / "train" / "0.png", 0)
    assert main(["proposals", "--dataset", str(tmp_path), "--output_dir", str(tmp_path / "\x1b[31mout")]) == 2
    text = capsys.readouterr().err
    assert "there is no file" in text and "\\x1b]0;owned\\x07.jpg" in text and "\x1b" not in text
    assert main(["check", "--dataset", str(tmp_path / "\x1b[31m\udce9gone")]) == 2
    assert "\x1b" not in capsys.readouterr().err


# ---- many objects, and the same image twice ----


def test_objects_of_an_image_are_counted_without_crowds(tmp_path):
    content = write_coco(tmp_path / "x", 2, boxes=[(1, 1, 5, 5)] * 5)
    content["annotations"][0]["iscrowd"] = 1
    (tmp_path / "x" / "labels.json").write_text(json.dumps(content))
    counts, commonest = objects_per_image(load_dataset_source(tmp_path / "x" / "labels.json"))
    assert counts.tolist() == [4, 5] and commonest.tolist() == [2, 3]


def test_more_objects_than_queries_and_than_coco_counts():
    counts = np.array([3, 640, 101])
    assert query_note(counts, 640) is None and metric_note(np.array([100, 3])) is None
    assert query_note(counts, 300).startswith(
        "1 of 3 images have more objects, up to 640, than the detector can find (300)."
    )
    assert metric_note(counts).startswith("2 of 3 images have more than 100 objects of one category, up to 640")


def test_the_same_file_in_training_and_evaluation(tmp_path):
    for split, seeds in (("train", (0, 1, 2)), ("validation", (7, 2, 0, 8))):
        for number, seed in enumerate(seeds):
            write_image(tmp_path / "x" / split / f"{number}.png", seed)
    train, held_out = (load_dataset_source(tmp_path / "x", split) for split in ("train", "validation"))
    assert same_images(train, held_out) == [(0, 2), (2, 1)]
    assert "2 of the 4 images to measure on (mine; ids 1, 2) are also in the training data" in leak_note(
        train, held_out, "mine"
    )
    assert leak_note(train.select([1]), held_out, "mine") is None


@pytest.mark.parametrize(
    "arguments", [{"image_sizes": []}, {"resize": "crop"}, {"num_queries": 0}, {"export": "kitti"}, {"export": "coco"}]
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError):
        CheckArguments(dataset="x", **arguments)


# ---- given back ----


@pytest.mark.parametrize("layout", ["coco", "yolo", "voc"])
def test_what_was_read_is_given_back(tmp_path, layout, capsys):
    write_coco(tmp_path / "x", 3)
    source = tmp_path / "x" / "labels.json"
    report = run(source, export=layout, output_dir=str(tmp_path / "out"), num_pictures=0)
    assert report.exit_code == 0 and f"Exported to {tmp_path / 'out' / layout}" in capsys.readouterr().out
    before, after = load_dataset_source(source), load_dataset_source(tmp_path / "out" / layout, labels=True)
    assert [row["objects"]["category"] for row in after] == [[0, 1]] * 3
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new["objects"]["bbox"], old["objects"]["bbox"], atol=0.5)


def test_problems_are_not_given_back(tmp_path, capsys):
    write_coco(tmp_path / "x", 2)
    (tmp_path / "x" / "1.png").write_bytes(b"\x89PNG")
    report = run(tmp_path / "x" / "labels.json", export="coco", output_dir=str(tmp_path / "out"))
    assert report.exit_code == 1 and not (tmp_path / "out" / "coco").exists()
    assert "Nothing is exported" in capsys.readouterr().out


def test_finetune_tells_it_before_it_starts(tmp_path, capsys):
    for split, boxes in (("train", [(1, 1, 9, 9)] * 4), ("validation", [(1, 1, 9, 9)])):
        write_coco(tmp_path / split, 2, boxes=boxes)
    finetune(
        FinetuneArguments(
            dataset=str(tmp_path / "train" / "labels.json"),
            eval_dataset=str(tmp_path / "validation" / "labels.json"),
            output_dir=str(tmp_path / "out"),
            detector_config=SMALL_DETR | {"num_queries": 3},
            **ONE_STEP,
        )
    )
    text = capsys.readouterr().out
    start = text[: text.index("Fine-tuning on 2 images")]
    assert "note: 2 of 2 images have more objects, up to 4, than the detector can find (3)" in start
    assert "note: 2 of the 2 images to measure on" in start and "ids 0, 1" in start


@pytest.mark.parametrize("name, exit_code", [("labels.csv", 1), ("0.txt", 1), ("README.txt", 0)])
def test_labels_in_no_known_format_are_a_problem(tmp_path, name, exit_code):
    write_image(tmp_path / "x" / "0.png", 0)
    (tmp_path / "x" / name).write_text("a,b\nc,d\n")
    report = run(tmp_path / "x")
    assert report.exit_code == exit_code
    assert not exit_code or f"its files {name} are no labels in a format that is known" in report.all_problems[0]


def test_a_folder_without_images_is_not_sound(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no labels")
    assert main(["check", "--dataset", str(tmp_path), "--disable_tqdm", "true"]) == 1
    assert (
        "there is no image in it, and no label file that names some is recognised. Give the folder"
        in capsys.readouterr().out
    )


def test_an_empty_split_is_a_problem(tmp_path):
    write_coco(tmp_path / "train", 2)
    content = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "labels.json").write_text(json.dumps(content))
    report = run(tmp_path)
    assert report.exit_code == 1 and report.all_problems == [
        f"{tmp_path}/valid/labels.json: its list 'images' is empty."
    ]
    dataset = load_dataset_source(tmp_path, "train")
    assert run_on(dataset.select([])).all_problems[0].endswith("there is no image in it.")


def run_on(dataset):
    return check(CheckArguments(dataset=dataset, disable_tqdm=True))
