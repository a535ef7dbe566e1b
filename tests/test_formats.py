import io
import json
import logging
import os

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import embed_table_storage

from aligndet_hf.data.columns import category_ids, validate_objects
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import category_names, load_dataset_source, split_names
from aligndet_hf.data.images import decode_image


def write_image(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (value, 0, 0)).save(path)


def write_metadata(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def names_of(dataset):
    return [os.path.basename(row["image"]["path"]) for row in dataset]


OBJECTS = {"bbox": [[1, 2, 3, 4], [0, 0, 5.5, 2]], "category": [1, 0]}


@pytest.fixture
def labelled_folder(tmp_path):
    """Two splits with metadata and names."""
    for split, count in (("train", 3), ("validation", 2)):
        rows = []
        for number in range(count):
            write_image(tmp_path / "data" / split / f"{number}.png", number)
            rows.append({"file_name": f"{number}.png", "image_id": 10 + number, "caption": "x", "objects": OBJECTS})
        write_metadata(tmp_path / "data" / split, rows)
    (tmp_path / "data" / "labels.json").write_text('["cell", "plate"]')
    return tmp_path / "data"


# ---- image folders ----


def test_plain_folder(tmp_path):
    for name in ("b.png", "a.jpg", "deep/er/c.PNG"):
        write_image(tmp_path / "pictures" / name, 9)
    (tmp_path / "pictures" / "notes.txt").write_text("x")
    for name in (".hidden.png", ".ipynb_checkpoints/a.png"):
        write_image(tmp_path / "pictures" / name)
    for source in (tmp_path / "pictures", str(tmp_path / "pictures")):
        dataset = load_dataset_source(source)
        assert names_of(dataset) == ["a.jpg", "b.png", "c.PNG"]
        assert dataset.features == datasets.Features(image=datasets.Image(decode=False))
        assert dataset[0]["image"]["bytes"] is None  # not read, not kept
        assert os.path.isabs(dataset[0]["image"]["path"])
        assert decode_image(dataset[2]["image"])[0, 0].tolist() == [9, 0, 0]
    assert len(load_dataset_source(tmp_path / "pictures", "train")) == 3


def test_names_of_files_do_not_make_splits(tmp_path):
    """`datasets` would make a split of `test_1.png` and leave out the other image."""
    write_image(tmp_path / "pictures" / "test_1.png")
    write_image(tmp_path / "pictures" / "street.png")
    assert len(load_dataset_source(tmp_path / "pictures")) == 2


def test_splits_of_a_folder(labelled_folder):
    assert len(load_dataset_source(labelled_folder, "train", labels=True)) == 3
    assert len(load_dataset_source(labelled_folder, "validation", labels=True)) == 2
    assert len(load_dataset_source(labelled_folder, "train+validation")) == 5
    with pytest.raises(DataError, match="data: several splits; found train, validation.*Give --split train, or"):
        load_dataset_source(labelled_folder)
    with pytest.raises(DataError, match="no split 'val'; .* Give --split validation, or several"):
        load_dataset_source(labelled_folder, "val")
    for wrong in ("test", "train+test", "val"):
        with pytest.raises(DataError, match=f"no split '{wrong}'".replace("+", r"\+")):
            load_dataset_source(labelled_folder, wrong)


def test_one_split_folder_by_itself(labelled_folder):
    dataset = load_dataset_source(labelled_folder / "validation", labels=True)
    assert len(dataset) == 2 and category_names(dataset) == ["cell", "plate"]  # labels.json of the folder above
    assert len(load_dataset_source(labelled_folder / "validation", "validation")) == 2
    with pytest.raises(DataError, match="no split 'train'; found validation"):
        load_dataset_source(labelled_folder / "validation", "train")


def test_usual_names_of_splits_and_no_images_lost(tmp_path):
    for name in ("train2017", "val_1", "extra"):
        write_image(tmp_path / "coco" / name / "x.png")
    (tmp_path / "coco" / "annotations").mkdir()
    for split in ("train", "validation", "extra"):
        assert len(load_dataset_source(tmp_path / "coco", split)) == 1
    with pytest.raises(DataError, match="found extra, train, validation"):
        load_dataset_source(tmp_path / "coco")


def test_sub_folders_that_are_not_splits_belong_together(tmp_path):
    for name in ("cats", "dogs", "trainers"):
        write_image(tmp_path / "zoo" / name / "x.png")
    assert len(load_dataset_source(tmp_path / "zoo")) == 3


def test_metadata(labelled_folder):
    dataset = load_dataset_source(labelled_folder, "train", labels=True)
    assert dataset.column_names == ["image", "image_id", "objects"]
    row = dataset[1]
    assert row["image_id"] == 11 and decode_image(row["image"])[0, 0, 0] == 1
    assert row["objects"] == {"bbox": OBJECTS["bbox"], "category": [1, 0], "area": [12, 11], "id": [3, 4]}
    assert category_names(dataset) == ["cell", "plate"]
    assert validate_objects(dataset, ["cell", "plate"]).boxes == 6


def test_stored_areas_and_ids_are_kept(tmp_path):
    write_image(tmp_path / "x" / "a.png")
    write_metadata(tmp_path / "x", [{"file_name": "a.png", "objects": OBJECTS | {"area": [7, 8], "id": [40, 50]}}])
    objects = load_dataset_source(tmp_path / "x", labels=True)[0]["objects"]
    assert objects["area"] == [7, 8] and objects["id"] == [40, 50]


def test_images_without_objects(tmp_path):
    rows = [{"file_name": "a.png", "objects": {"bbox": [], "category": []}}, {"file_name": "b.png", "objects": None}]
    rows += [{"file_name": "c.png"}, {"file_name": "d.png", "objects": OBJECTS}]
    for row in rows:
        write_image(tmp_path / "x" / row["file_name"])
    write_metadata(tmp_path / "x", rows)
    dataset = load_dataset_source(tmp_path / "x", labels=True)
    assert [len(row["objects"]["bbox"]) for row in dataset] == [0, 0, 0, 2]
    assert category_names(dataset, tmp_path / "x") == ["0", "1"]  # no names anywhere


def test_metadata_above_the_folders_of_the_splits(tmp_path):
    """As `datasets` reads it: the folders are the splits, wherever their rows stand."""
    for name in ("train/a.png", "val/b.png", "val/c.png"):
        write_image(tmp_path / "x" / name)
    rows = [{"file_name": name, "objects": OBJECTS} for name in ("val/b.png", "train/a.png")]
    write_metadata(tmp_path / "x", rows)
    assert split_names(tmp_path / "x") == ["train", "validation"]
    for split, name in (("train", "a.png"), ("validation", "b.png")):
        (row,) = load_dataset_source(tmp_path / "x", split, labels=True)
        assert row["image"]["path"].endswith(name) and row["objects"]["bbox"] == OBJECTS["bbox"]


@pytest.mark.parametrize("crowd", [[], "x", float("nan"), float("inf"), 2])
def test_crowds_are_zero_or_one(tmp_path, crowd):
    write_image(tmp_path / "x" / "a.png")
    write_metadata(tmp_path / "x", [{"file_name": "a.png", "objects": OBJECTS | {"iscrowd": [crowd, 0]}}])
    with pytest.raises(DataError, match="metadata.jsonl, line 1: 'iscrowd' must be 0 or 1, got "):
        load_dataset_source(tmp_path / "x", labels=True)


def test_images_that_the_metadata_do_not_list_are_reported(labelled_folder, caplog):
    write_image(labelled_folder / "train" / "extra.png")
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset_source(labelled_folder, "train")) == 3
    assert "1 images are left out, they are not in metadata.jsonl (e.g. extra.png)" in caplog.text


def test_metadata_in_csv_and_parquet(tmp_path, caplog):
    """As `datasets` reads them; of several files in a folder the first of jsonl, csv and parquet counts."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "x" / name)
    line = json.dumps(OBJECTS).replace('"', '""')
    (tmp_path / "x" / "metadata.csv").write_text(f'file_name,image_id,objects\nb.png,7,"{line}"\na.png,8,\n')
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(tmp_path / "x", labels=True)
    assert "1 images are left out, they are not in metadata.csv (e.g. c.png)" in caplog.text
    assert names_of(dataset) == ["b.png", "a.png"] and list(dataset["image_id"]) == [7, 8]
    assert dataset[0]["objects"]["bbox"] == OBJECTS["bbox"] and dataset[1]["objects"]["bbox"] == []

    (tmp_path / "x" / "metadata.csv").unlink()
    table = pa.Table.from_pylist([{"file_name": "c.png", "objects": [{"bbox": [1, 2, 3, 4], "label": "cell"}]}])
    pq.write_table(table, tmp_path / "x" / "metadata.parquet")
    dataset = load_dataset_source(tmp_path / "x", labels=True)
    assert names_of(dataset) == ["c.png"] and category_names(dataset) == ["cell"]
    assert dataset[0]["objects"]["bbox"] == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{broken", "line 2: not valid JSON"),
        ('["a.png"]', "line 2: expected an object with the key 'file_name'"),
        ({"name": "a.png"}, "line 2: expected an object with the key 'file_name'"),
        ({"file_name": "gone.png"}, "line 2: there is no file .*gone.png"),
        ({"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [0]}}, "found bbox, categories"),
        ({"file_name": "a.png", "objects": [{"bbox": [1, 2, 3, 4]}]}, "line 2: 'objects' must have the lists"),
        ({"file_name": "a.png", "objects": {"bbox": [[1, 2, 3]], "category": [0]}}, "line 2.*four numbers.*got"),
        ({"file_name": "a.png", "objects": {"bbox": [["1", 2, 3, 4]], "category": [0]}}, "line 2.*four numbers.*got"),
        (
            {"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": []}},
            "line 2: 'category' must be a list",
        ),
        (
            {"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": 0}},
            "line 2: 'category' must be a list",
        ),
        ({"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": ["cell"]}}, "line 2.*labels.json"),
        (
            {"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [2]}},
            r"unknown category 2.*0 to 1 \(cell",
        ),
        ({"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [-1]}}, "unknown category -1"),
        ({"file_name": "a.png", "image_id": "one"}, "line 2: 'image_id' does not fit"),
    ],
)
def test_bad_metadata_name_file_and_line(tmp_path, row, message):
    write_image(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "labels.json").write_text('["cell", "plate"]')
    row = {"image_id": 1} | row if isinstance(row, dict) else row
    write_metadata(tmp_path / "x", [{"file_name": "a.png", "image_id": 0, "objects": OBJECTS}, row])
    with pytest.raises(DataError, match=f"metadata.jsonl, {message}" if message.startswith("line") else message):
        load_dataset_source(tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "..\\secret.png", "/etc/x.png", "file:///x.png", "C:\\x.png"]
)
def test_paths_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    write_image(tmp_path / "secret.png")
    write_image(tmp_path / "x" / "a.png")
    write_metadata(tmp_path / "x", [{"file_name": name}])
    with pytest.raises(DataError, match="line 1: the file name .* leads out of"):
        load_dataset_source(tmp_path / "x")
    content = {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": name}]}
    (tmp_path / "x" / "coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="coco.json, image 2: the file name .* leads out of"):
        load_dataset_source(tmp_path / "x" / "coco.json")


@pytest.mark.parametrize("names", ['["a", "a"]', "[]", '"a"', '{"0": "a", "2": "b"}', '{"a": 0}'])
def test_bad_labels_json(tmp_path, names):
    write_image(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "labels.json").write_text(names)
    with pytest.raises(DataError, match="labels.json: expected a list of different category names"):
        load_dataset_source(tmp_path / "x")


def test_labels_json_of_the_folder_above_counts_for_splits_only(labelled_folder):
    os.rename(labelled_folder / "train", labelled_folder / "mine")
    assert category_names(load_dataset_source(labelled_folder / "mine")) == ["0", "1"]


def test_metadata_with_a_byte_order_mark_and_windows_lines(tmp_path):
    write_image(tmp_path / "x" / "a.png")
    line = json.dumps({"file_name": "a.png", "note": "\u2028"}, ensure_ascii=False)
    (tmp_path / "x" / "metadata.jsonl").write_bytes(f"\ufeff{line}\r\n".encode())
    assert names_of(load_dataset_source(tmp_path / "x")) == ["a.png"]


@pytest.mark.parametrize("content, message", [(b"\xff{}", "not a text in UTF-8"), (b"\n", "it lists no image")])
def test_unusable_metadata_files(tmp_path, content, message):
    write_image(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "metadata.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"metadata.jsonl: {message}"):
        load_dataset_source(tmp_path / "x")


def test_some_images_without_an_id(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "x" / name)
    write_metadata(tmp_path / "x", [{"file_name": "a.png", "image_id": 1}, {"file_name": "b.png"}])
    with pytest.raises(DataError, match="line 2: no .image_id., which other images have"):
        load_dataset_source(tmp_path / "x")


def test_labels_json_as_a_mapping(labelled_folder):
    (labelled_folder / "labels.json").write_text('{"1": "second", "0": "first"}')
    assert category_names(load_dataset_source(labelled_folder, "train")) == ["first", "second"]


# ---- COCO ----


def coco(**changes):
    """Two images, categories with gaps in their ids and not in order, one crowd."""
    content = {
        "images": [{"id": 7, "file_name": "b.png", "width": 8, "height": 6}, {"id": 3, "file_name": "a.png"}],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"id": 5, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 9.5, "iscrowd": 0},
            {"id": 6, "image_id": 3, "category_id": 2, "bbox": [0, 0, 2, 2]},
            {"id": 8, "image_id": 7, "category_id": 2, "bbox": [0, 0, 8, 6], "iscrowd": 1},
        ],
    }
    return content | changes


def write_coco(tmp_path, content, name="labels_here.json", images="."):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    for value, file_name in enumerate(("a.png", "b.png")):
        write_image(tmp_path / images / file_name, value)
    return path


def test_coco(tmp_path):
    dataset = load_dataset_source(write_coco(tmp_path, coco()), labels=True)
    assert names_of(dataset) == ["b.png", "a.png"] and list(dataset["image_id"]) == [7, 3]
    assert category_names(dataset) == ["car", "zebra"]  # in the order of their ids
    assert category_ids(dataset, ["car", "zebra"]) == [2, 90]
    assert dataset[0]["objects"] == {
        "bbox": [[0, 0, 8, 6]], "category": [0], "area": [48], "iscrowd": [1], "id": [8],
    }  # fmt: skip
    expected = {"bbox": [[1, 2, 3, 4], [0, 0, 2, 2]], "category": [1, 0], "area": [9.5, 4], "id": [5, 6]}
    assert dataset[1]["objects"] == expected | {"iscrowd": [0, 0]}
    assert list(dataset["width"]) == [8, None] and list(dataset["height"]) == [6, None]
    assert list(dataset["file_name"]) == ["b.png", "a.png"]
    assert decode_image(dataset[0]["image"])[0, 0, 0] == 1


@pytest.mark.parametrize(
    "name, images", [("a.json", "images"), ("annotations/instances_val2017.json", "val2017"), ("ann/a.json", "images")]
)
def test_usual_places_of_the_images(tmp_path, name, images):
    path = write_coco(tmp_path, coco(), name, images)
    assert split_names(path) == ["validation" if "val" in name else "train"]
    for split in (None, "train", "validation", "test"):  # one file is the split that is asked for
        assert len(load_dataset_source(path, split)) == 2


def test_image_dir(tmp_path):
    path = write_coco(tmp_path, coco(), "a/b/c.json", "far/away")
    with pytest.raises(DataError, match="cannot find 'b.png' in .*image_dir"):
        load_dataset_source(path)
    assert len(load_dataset_source(path, image_dir=tmp_path / "far" / "away")) == 2


def test_coco_without_annotations(tmp_path):
    content = coco()
    del content["annotations"], content["categories"]
    path = write_coco(tmp_path, content)
    assert load_dataset_source(path).column_names == ["image", "image_id"]
    with pytest.raises(DataError, match="no column 'objects'"):
        load_dataset_source(path, labels=True)


def test_faulty_boxes_of_a_coco_file_reach_the_validation(tmp_path):
    content = json.dumps(coco()).replace("[1, 2, 3, 4]", "[1, 2, NaN, Infinity]")
    dataset = load_dataset_source(write_coco(tmp_path, content), labels=True)
    assert validate_objects(dataset, ["car", "zebra"]).dropped == {"not finite": 1}


ANNOTATION = {"id": 5, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "no list 'images'"),
        (coco(images=[]), "its list 'images' is empty"),
        (coco(categories=[{"id": 2, "name": None}]), "the category 2 must have a name, got None"),
        (coco(images=[{"id": 3}]), "entry 0 of 'images' must have file_name, id"),
        (coco(images=[{"id": 3, "file_name": "a.png"}] * 2), "image 3: this id occurs twice"),
        (coco(annotations=[ANNOTATION | {"image_id": 99}]), "annotation 5: no image has the id 99"),
        (
            coco(annotations=[ANNOTATION | {"category_id": 1}]),
            r"annotation 5: no category has the id 1; found \[2, 90\]",
        ),
        (coco(annotations=[ANNOTATION | {"bbox": [1, 2, 3]}]), "annotation 5: 'bbox' must be four numbers"),
        (coco(annotations=[ANNOTATION | {"bbox": [1, 2, "3", 4]}]), "annotation 5: 'bbox' must be four numbers"),
        (coco(annotations=[{"image_id": 3, "category_id": 2}]), "annotation number 0: 'bbox' must be four numbers"),
        (coco(annotations=[{"id": 1}]), "entry 0 of 'annotations' must have image_id"),
        (coco(categories=[{"id": 2, "name": "car"}, {"id": 2, "name": "bus"}]), "must be unique"),
        (coco(categories=[{"id": 2, "name": "car"}, {"id": 90, "name": "car"}]), "must be unique"),
        (
            coco(images=[{"id": 3, "file_name": "a.png"}, {"id": 7, "file_name": "gone.png"}]),
            "image 7: there is no file",
        ),
        (
            coco(images=[{"id": 3, "file_name": "a.png"}, {"id": "x", "file_name": "b.png"}], annotations=[]),
            "entry 1 of 'images': the id 'x' is a text, others are integers, as 3",
        ),
    ],
)
def test_bad_coco_files(tmp_path, content, message):
    with pytest.raises(DataError, match=f"labels_here.json.*{message}"):
        load_dataset_source(write_coco(tmp_path, content))


# ---- saved data sets and the Hub ----


def saved(tmp_path, **splits):
    def rows(count):
        features = datasets.Features(image=datasets.Image(), image_id=datasets.Value("int64"))
        images = [np.full((4, 5, 3), value, np.uint8) for value in range(count)]
        return datasets.Dataset.from_dict({"image": images, "image_id": list(range(count))}, features=features)

    data = datasets.DatasetDict({name: rows(count) for name, count in splits.items()})
    if list(splits) == ["only"]:
        data = data["only"]
    data.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_data_set(tmp_path):
    folder = saved(tmp_path, only=3)
    dataset = load_dataset_source(folder)
    assert dataset.features["image"] == datasets.Image(decode=False) and len(dataset) == 3
    assert decode_image(dataset[2]["image"])[0, 0].tolist() == [2, 2, 2]
    assert len(load_dataset_source(folder, "train")) == 3


def test_names_of_the_splits_of_every_kind_of_source(tmp_path, labelled_folder):
    write_image(tmp_path / "plain" / "a.png")
    sources = {
        labelled_folder: ["train", "validation"],
        tmp_path / "plain": ["train"],
        write_coco(tmp_path / "coco", coco(), "instances_val2017.json"): ["validation"],
        saved(tmp_path / "s", test=1, train=2): ["test", "train"],
    }
    for source, names in sources.items():
        assert split_names(source) == names
        assert all(len(load_dataset_source(source, name)) for name in names)
    with pytest.raises(DataError, match="nowhere"):
        split_names(tmp_path / "nowhere")


def test_saved_splits(tmp_path):
    folder = saved(tmp_path, train=3, test=2)
    assert len(load_dataset_source(folder, "test")) == 2 and len(load_dataset_source(folder, "train+test")) == 5
    with pytest.raises(DataError, match="several splits; found test, train"):
        load_dataset_source(folder)


def test_folder_of_parquet_files(tmp_path, labelled_folder, monkeypatch):
    """A local copy of a data set of the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = load_dataset_source(labelled_folder, "train", labels=True)
    (tmp_path / "copy" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "copy" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="3 images are not in the data set but name files outside"):
        load_dataset_source(tmp_path / "copy", labels=True)
    dataset.cast_column("image", datasets.Image()).with_format("arrow").map(
        embed_table_storage, batched=True, batch_size=2
    ).to_parquet(tmp_path / "copy" / "data" / "train-00000-of-00001.parquet")
    copy = load_dataset_source(tmp_path / "copy", labels=True)
    assert [row["objects"] for row in copy] == [row["objects"] for row in dataset]
    assert split_names(tmp_path / "copy") == ["train"]
    assert category_names(copy) == ["cell", "plate"] and copy.features["image"] == datasets.Image(decode=False)
    with pytest.raises(DataError, match="validation"):
        load_dataset_source(tmp_path / "copy", "validation")


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "gone", "no-such-user/no-such-set", "not an id"):
        with pytest.raises(DataError, match="Cannot load"):
            load_dataset_source(source)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match="table.csv: expected a row for each box, .* found a, b in"):
        load_dataset_source(tmp_path / "table.csv")


def test_a_path_with_a_typing_error_and_a_file_of_images(tmp_path):
    (tmp_path / "labelled").mkdir()
    with pytest.raises(DataError, match=r"there is no such file or folder here \(did you mean '.*/labelled'\?\)"):
        load_dataset_source(tmp_path / "lableled")
    (tmp_path / "images.zip").touch()
    with pytest.raises(DataError, match="images.zip: expected a folder.* of an archive the folder that it unpacks to"):
        load_dataset_source(tmp_path / "images.zip")


def test_missing_columns(tmp_path):
    folder = saved(tmp_path, only=2)
    with pytest.raises(DataError, match="no column 'objects'"):
        load_dataset_source(folder, labels=True)
    datasets.Dataset.from_dict({"img": ["x"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="no column 'image'; found 'img'; did you mean 'img'"):
        load_dataset_source(tmp_path / "other")


def test_category_names_without_categories():
    row = {"bbox": [[1.0, 2.0, 3.0, 4.0]], "label": [0]}
    dataset = datasets.Dataset.from_dict({"objects": [row]})
    with pytest.raises(DataError, match="'category'"):
        category_names(dataset)
    with pytest.raises(DataError, match="no column 'objects'"):
        category_names(dataset.rename_column("objects", "annotations"))
    with pytest.raises(DataError, match="must be a struct of lists"):
        category_names(datasets.Dataset.from_dict({"objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": 0}]}))
    empty = datasets.Dataset.from_dict({"objects": [{"bbox": [], "category": []}]})
    with pytest.raises(DataError, match="empty in all rows"):
        category_names(empty)


def small_dataset(objects, **columns):
    image = {"bytes": image_bytes(), "path": None}
    columns = {"image": [image], "objects": [objects]} | {name: [value] for name, value in columns.items()}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def image_bytes():
    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 30)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("field", ["class_labels", "category_name", "name", "class_id"])
def test_more_spellings_of_the_category(field):
    labels = ["dog", "cat"] if "name" in field else [1, 0]
    dataset = load_dataset_source(small_dataset({"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], field: labels}))
    assert dataset[0]["objects"]["category"] == [1, 0]
    assert category_names(dataset) == (["cat", "dog"] if "name" in field else ["0", "1"])


def test_a_column_that_says_the_format_of_boxes():
    objects = {"bbox": [[1, 2, 30, 20]], "category": [0]}
    for said in ("xywh", "COCO", None):
        assert load_dataset_source(small_dataset(objects, bbox_format=said)).num_rows == 1
    for dataset in (
        small_dataset(objects, bbox_format="pascal_voc"),
        small_dataset(objects | {"bbox_format": "pascal_voc"}),
        small_dataset([{"bbox": [1, 2, 30, 20], "category": 0, "bbox_format": "pascal_voc"}]),
    ):
        with pytest.raises(
            DataError, match="by 'bbox_format' the boxes are 'pascal_voc', expected .x, y, width, heig"
        ):
            load_dataset_source(dataset)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_a_parquet_file_that_others_wrote_is_a_data_set(tmp_path, form, large):
    """As pandas, polars and pyarrow write one again: nothing says any more that the bytes are images."""
    (tmp_path / "data").mkdir()
    content = pa.large_binary() if large else pa.binary()
    dataset = small_dataset({"bbox": [[1, 2, 3, 4]], "category": [0]})
    (row,) = dataset.cast_column("image", datasets.Image(decode=False))
    image = row["image"] if form == "struct" else row["image"]["bytes"]
    kind = pa.struct({"bytes": content, "path": pa.large_string() if large else pa.string()})
    columns = {
        "image": pa.array([image], kind if form == "struct" else content),
        "objects": pa.array([{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [0]}]),
    }
    pq.write_table(pa.table(columns), tmp_path / "data" / "train-00000-of-00001.parquet")
    for source in (tmp_path, tmp_path / "data", tmp_path / "data" / "train-00000-of-00001.parquet"):
        (read,) = load_dataset_source(source, "train", labels=True)
        assert read["image"]["bytes"] == row["image"]["bytes"] and read["objects"]["bbox"] == [[1, 2, 3, 4]]


@pytest.mark.parametrize("split", [None, "validation"])
def test_a_parquet_file_with_images_is_a_data_set(tmp_path, split):
    small_dataset({"bbox": [[1, 2, 3, 4]], "category": [0]}).to_parquet(tmp_path / "x.parquet")
    (row,) = load_dataset_source(tmp_path / "x.parquet", split)
    assert row["objects"]["bbox"] == [[1, 2, 3, 4]] and row["image"]["bytes"] == image_bytes()


def test_images_as_arrays_and_columns_of_something_else():
    rows = {"image": [np.full((3, 4, 3), 9, np.uint8).tolist()], "objects": [{"bbox": [], "category": []}]}
    arrays = datasets.Dataset.from_dict(rows)
    for feature in (arrays.features["image"], datasets.Array3D((3, 4, 3), "uint8")):
        (row,) = load_dataset_source(arrays.cast_column("image", feature))
        assert (decode_image(row["image"]) == 9).all() and decode_image(row["image"]).shape == (3, 4, 3)
    image = PIL.Image.new("RGB", (40, 30))
    first = datasets.Dataset.from_dict({"image": [np.zeros((3, 30, 40), np.uint8)]})
    several = datasets.Dataset.from_dict({"image": [[image, image]]})
    for dataset, what in ((first, "List"), (several, "List.Image")):
        with pytest.raises(DataError, match=f"column 'image' must hold an image in each row, .*it is {what}"):
            load_dataset_source(dataset)


def test_a_transform_is_not_applied_and_told(caplog):
    dataset = small_dataset({"bbox": [[1, 2, 3, 4]], "category": [0]}).with_transform(lambda batch: {"image": [None]})
    (row,) = load_dataset_source(dataset)
    assert row["image"]["bytes"] == image_bytes() and row["objects"]["bbox"] == [[1, 2, 3, 4]]
    assert "its transform is not applied" in caplog.text


def test_the_split_of_another_name_is_shown():
    dataset = small_dataset({"bbox": [[1, 2, 3, 4]], "category": [0]})
    with pytest.raises(DataError, match="no split 'validation'; found train, val. Give --split val, or several"):
        load_dataset_source(datasets.DatasetDict(train=dataset, val=dataset), "validation")
    with pytest.raises(DataError, match="no split 'validation'; found test, train. Give one of them as --split, or"):
        load_dataset_source(datasets.DatasetDict(train=dataset, test=dataset), "validation")
