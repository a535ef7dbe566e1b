"""Nothing outside the folder of a data set is read, whatever its files say and wherever its links lead."""

import json
import os

import numpy as np
import PIL.Image
import pytest

from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import load_dataset_source, split_names

OWN, CANARY = [2, 3, 10, 12], [7, 8, 31, 33]  # boxes: what the data set says, and what a file outside of it does
SIZE = (64, 48)


def xml(box, name):
    x, y, width, height = box
    corners = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    return (
        f"<annotation><filename>{name}</filename>{size}<object><name>cell</name><bndbox>{corners}</bndbox></object>"
        "</annotation>"
    )


def yolo(box, name):
    x, y, width, height = box
    return f"0 {(x + width / 2) / 64} {(y + height / 2) / 48} {width / 64} {height / 48}\n"


def labelme(box, name):
    x, y, width, height = box
    shape = {"label": "cell", "points": [[x, y], [x + width, y + height]], "shape_type": "rectangle"}
    content = {"version": "5.0", "shapes": [shape], "imagePath": name, "imageData": None}
    return json.dumps(content | {"imageHeight": 48, "imageWidth": 64})


def coco(box, name):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 9, "iscrowd": 0}
    image = {"id": 1, "file_name": name, "width": 64, "height": 48}
    return json.dumps({"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cell"}]})


def metadata(box, name):
    return json.dumps({"file_name": name, "objects": {"bbox": [box], "category": ["cell"]}})


def cvat(box, name):
    x, y, width, height = box
    corners = f'xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}"'
    return (
        "<annotations><version>1.1</version><meta></meta>"
        f'<image id="0" name="{name}" width="64" height="48"><box label="cell" {corners}></box></image></annotations>'
    )


# Where image and labels are, and what the labels are.
LAYOUTS = {
    "voc": ("JPEGImages/0.png", "Annotations/0.xml", xml),
    "yolo": ("images/train/0.png", "labels/train/0.txt", yolo),
    "labelme": ("0.png", "0.json", labelme),
    "coco": ("train/0.png", "annotations/instances_train.json", coco),
    "coco beside": ("0.png", "_annotations.coco.json", coco),
    "metadata": ("train/0.png", "train/metadata.jsonl", metadata),
    "cvat": ("images/0.png", "annotations.xml", cvat),
}
BY_NAME = [name for name in LAYOUTS if name != "yolo"]  # the labels say where the image is


def write(root, layout, box=OWN, name="0.png"):
    """A data set of one image, and its paths of image and labels."""
    image, labels, text = LAYOUTS[layout]
    for path in (root / image, root / labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((48, 64, 3), 9, np.uint8)).save(root / image)
    (root / labels).write_text(text(box, name))
    return root / image, root / labels


def read(root):
    """What a data set has: paths of images without links, and boxes."""
    paths, boxes = [], []
    for split in split_names(root):
        for row in load_dataset_source(root, split):
            paths.append(os.path.realpath(row["image"]["path"]))
            boxes += [np.round(box, 3).tolist() for box in (row.get("objects") or {}).get("bbox", [])]
    return paths, boxes


def left_alone(root, outside):
    """Reads a data set; returns the error, or what it has, after it was seen that nothing of it lies outside."""
    try:
        paths, boxes = read(root)
    except DataError as error:
        return str(error)
    assert not [path for path in paths if path.startswith(str(outside))]
    assert CANARY not in boxes
    return paths, boxes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_are_read_without_tricks(tmp_path, layout):
    image, _ = write(tmp_path / "data", layout)
    assert read(tmp_path / "data") == ([str(image)], [OWN])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_to_an_image_outside(tmp_path, layout):
    image, _ = write(tmp_path / "data", layout)
    image.rename(tmp_path / "passport.png")
    image.symlink_to(tmp_path / "passport.png")
    left_alone(tmp_path / "data", tmp_path / "passport.png")


@pytest.mark.parametrize("layout", ["voc", "yolo", "coco", "cvat"])
def test_a_link_to_a_folder_of_images_outside(tmp_path, layout):
    image, _ = write(tmp_path / "data", layout)
    image.parent.rename(tmp_path / "private")
    image.parent.symlink_to(tmp_path / "private")
    left_alone(tmp_path / "data", tmp_path / "private")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_to_labels_outside(tmp_path, layout):
    _, labels = write(tmp_path / "data", layout)
    _, canary = write(tmp_path / "private", layout, CANARY)
    labels.unlink()
    labels.symlink_to(canary)
    left_alone(tmp_path / "data", tmp_path / "private")


@pytest.mark.parametrize("layout", BY_NAME)
@pytest.mark.parametrize("kind", ["above", "backslashes", "absolute", "address"])
def test_labels_that_name_an_image_outside(tmp_path, layout, kind):
    image, labels = write(tmp_path / "data", layout)
    canary = tmp_path / "passport.png"
    PIL.Image.new("RGB", SIZE).save(canary)
    name = os.path.relpath(canary, labels.parent if layout != "voc" else image.parent)
    names = {"above": "../" + name, "backslashes": ("../" + name).replace("/", "\\"), "absolute": str(canary)}
    names["address"] = f"file://{canary}"
    write(tmp_path / "data", layout, name=names[kind])
    (tmp_path.parent / "passport.png").write_bytes(canary.read_bytes())  # what "above" leads to
    left_alone(tmp_path / "data", tmp_path / "passport.png")
    left_alone(tmp_path / "data", tmp_path.parent / "passport.png")
    write(tmp_path / "data", layout, name=name)
    left_alone(tmp_path / "data", tmp_path / "passport.png")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_that_are_a_pipe_do_not_hang(tmp_path, layout):
    _, labels = write(tmp_path / "data", layout)
    labels.unlink()
    os.mkfifo(labels)
    left_alone(tmp_path / "data", tmp_path / "private")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_is_a_pipe_does_not_hang(tmp_path, layout):
    image, _ = write(tmp_path / "data", layout)
    image.unlink()
    os.mkfifo(image)
    left_alone(tmp_path / "data", tmp_path / "private")
