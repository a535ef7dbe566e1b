"""What is read can be given back: COCO with all its fields, YOLO and Pascal VOC to less than half a pixel."""

import json

import datasets
import numpy as np
import PIL.Image
import pytest

from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import category_names, load_dataset_source, split_names
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.label_export import export_labels

SIZES = {"a.png": (64, 48), "deep/b.png": (31, 57), "other/b.png": (20, 20)}


def coco(split):
    """Ids with gaps, an unused category, crowds, an area of a mask, fractions, an image without objects."""
    first = {"train": 70, "validation": 900}[split]
    images = [
        {"id": first + 3 * number, "file_name": name, "width": size[0], "height": size[1]}
        for number, (name, size) in enumerate(SIZES.items())
    ]
    annotations = [
        {"id": first + 9, "image_id": first, "category_id": 90, "bbox": [3.25, 4.5, 20.1, 30], "area": 411.7},
        {"id": first + 4, "image_id": first, "category_id": 7, "bbox": [0, 0, 64, 48], "area": 3072, "iscrowd": 1},
        {"id": first + 5, "image_id": first + 3, "category_id": 7, "bbox": [1 / 3, 2, 20, 50.7], "area": 1014.0},
    ]
    categories = [{"id": 90, "name": "zebra"}, {"id": 7, "name": "naïve cat"}, {"id": 40, "name": "never seen"}]
    annotations = [{"iscrowd": 0} | annotation for annotation in annotations]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def source(tmp_path):
    for number, (split, folder) in enumerate((("train", "train"), ("validation", "val"))):
        for name, size in SIZES.items():
            path = tmp_path / "in" / "images" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", size, (number, 5, 9)).save(path)
        path = tmp_path / "in" / "annotations" / f"instances_{folder}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco(split)))
    return tmp_path / "in"


def load(source):
    return {name: load_dataset_source(source, name, labels=True) for name in split_names(source)}


def export(splits, folder, layout):
    names = category_names(next(iter(splits.values())))
    return export_labels(splits, names, folder, layout)


def in_order(content):
    return {key: sorted(entries, key=lambda entry: entry["id"]) for key, entries in content.items()}


def test_coco_comes_back_as_it_was(source, tmp_path):
    assert export(load(source), tmp_path / "out", "coco") == []
    for split, name in (("train", "train"), ("validation", "val")):
        content = json.loads((tmp_path / "out" / "annotations" / f"instances_{name}.json").read_text())
        assert in_order(content) == in_order(coco(split))
        for image in content["images"]:
            written = tmp_path / "out" / "images" / name / image["file_name"]
            assert written.read_bytes() == (source / "images" / name / image["file_name"]).read_bytes()
    again, before = load(tmp_path / "out"), load(source)
    for split, dataset in before.items():
        assert again[split].features == dataset.features
        columns = [column for column in dataset.column_names if column != "image"]
        assert again[split].select_columns(columns).to_list() == dataset.select_columns(columns).to_list()


@pytest.mark.parametrize("layouts", [("yolo", "coco"), ("voc", "yolo"), ("yolo", "voc", "coco", "voc")])
def test_boxes_survive_other_layouts(source, tmp_path, layouts):
    before = load(source)
    splits = before
    for number, layout in enumerate(layouts):
        left_out = export(splits, tmp_path / str(number), layout)
        # Two crowds, one of each split, of which only COCO knows.
        assert left_out == ([] if number else ["left out: 2 crowds, which the format does not have"])
        splits = load(tmp_path / str(number))
    for split, dataset in before.items():
        names, read = category_names(dataset), category_names(splits[split])
        found = {tuple(decode_image(row["image"]).shape): row["objects"] for row in splits[split]}
        assert len(found) == 3
        for row in dataset:
            objects = row["objects"]
            kept = [number for number, crowd in enumerate(objects["iscrowd"]) if not crowd]
            other = found[tuple(decode_image(row["image"]).shape)]
            np.testing.assert_allclose(
                np.reshape(other["bbox"], (-1, 4)), np.reshape(objects["bbox"], (-1, 4))[kept], atol=0.02
            )
            assert [read[k] for k in other["category"]] == [names[objects["category"][k]] for k in kept]


def test_boxes_that_a_layout_cannot_hold_are_told(tmp_path):
    objects = {"bbox": [[1, 1, 5, 5], [2, 2, 0, 4], [90, 2, 5, 5], [25, 25, 10, 10]], "category": [0, 0, 0, 0]}
    images = [PIL.Image.new("RGB", (30, 30))]
    data = datasets.Dataset.from_dict({"image": images, "objects": [objects]}).cast_column(
        "image", datasets.Image(decode=False)
    )
    assert export_labels({"train": data}, ["x"], tmp_path / "yolo", "yolo") == [
        "left out: 2 boxes without area or outside their image"
    ]
    # Clipped to the image: some trainers refuse a label file with more than that.
    assert (tmp_path / "yolo" / "labels" / "train" / "0.txt").read_text().split("\n")[1] == (
        "0 0.91666667 0.91666667 0.16666667 0.16666667"
    )
    assert (tmp_path / "yolo" / "images" / "train" / "0.png").is_file()  # a name and an ending for an image without
    export_labels({"train": data}, ["x"], tmp_path / "coco", "coco")
    again = load_dataset_source(tmp_path / "coco", labels=True)
    assert again[0]["objects"]["bbox"] == objects["bbox"]  # as they came, to be found by the checks


def test_names_that_lead_out_or_meet(tmp_path):
    def picture(value):
        return PIL.Image.new("RGB", (30, 30), (value, 0, 0))

    names = ["../../x.png", "x.jpg", "X.png", "c:\\y\\z.png"]
    objects = [{"bbox": [[1, 1, 5, 5]], "category": [0]}] * 4
    columns = {"image": [picture(value) for value in range(4)], "objects": objects, "file_name": names}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    export_labels({"train": data}, ["x"], tmp_path / "out" / "put", "voc")
    written = sorted(path.name for path in (tmp_path / "out" / "put" / "JPEGImages").iterdir())
    assert written == ["X_2.png", "x.png", "x_1.jpg", "y_z.png"]
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["X_2.png", "x.png", "y_z.png"]
    assert len(load_dataset_source(tmp_path / "out" / "put", labels=True)) == 4


def test_what_cannot_be_written_to(tmp_path):
    with pytest.raises(DataError, match="Unknown layout 'xml' of labels: expected one of coco, yolo, voc"):
        export_labels({}, [], tmp_path / "x", "xml")
    export_labels({}, ["می\u200cخواهم", "\U0001f9d1\u200d\U0001f33e"], tmp_path / "names", "voc")
    for name in ("a\x07", "cat ", "a\tb"):
        with pytest.raises(DataError, match="the category '.*' cannot be written to Pascal VOC's XML as it is"):
            export_labels({}, ["dog", name], tmp_path / "voc", "voc")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="expected a new or empty folder"):
        export_labels({}, [], tmp_path, "coco")


def test_part_of_a_data_set_does_not_pass_for_all_of_it(source, tmp_path):
    image = source / "images" / "val" / "other" / "b.png"
    content, splits = image.read_bytes(), load(source)
    image.unlink()
    with pytest.raises(DataError, match=r"other/b\.png: No such file"):
        export(splits, tmp_path / "out", "coco")
    assert not (tmp_path / "out").exists()
    image.write_bytes(content)
    (tmp_path / "out").mkdir()
    export(splits, tmp_path / "out", "coco")
    assert len(load(tmp_path / "out")["validation"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
