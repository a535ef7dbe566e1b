"""Every layout of labelled images that people have reads as it is: the same images, boxes, names and splits."""

import base64
import contextlib
import csv
import io
import json
import logging
import os
import re
import unicodedata
import zlib
from xml.sax.saxutils import quoteattr

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligndet_hf.data.columns import category_ids, validate_objects
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.formats import category_names, load_dataset_source, split_names
from aligndet_hf.data.images import decode_image
from aligndet_hf.data.masks import run_lengths
from aligndet_hf.data.readers import find_reader, json_images

NAMES = ["cat", "dog", "owl"]
# By split: the size of each image, and its objects (xywh in pixels, category). No owl is in the validation split.
SCENES = {
    "train": [
        ((40, 30), [([4, 3, 10, 12], 0), ([20, 6, 8, 9], 2)]),
        ((30, 50), [([6, 5, 12, 20], 1)]),
        ((40, 30), []),
    ],
    "validation": [((40, 30), [([8, 6, 16, 15], 1)]), ((30, 50), [([3, 10, 9, 5], 0)])],
}


def write_image(path, size, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (number, 0, 0)).save(path)


def scenes(split):
    """(name without suffix, size, objects) of each image; the names of the splits differ."""
    return [(f"{split[0]}{number}", size, objects) for number, (size, objects) in enumerate(SCENES[split])]


def write_images(folder, split):
    for number, (name, size, _) in enumerate(scenes(split)):
        write_image(folder / f"{name}.png", size, number)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


def coco_content(split, name=lambda name: f"{name}.png", group=False):
    images, annotations = [], []
    for number, (stem, size, objects) in enumerate(scenes(split)):
        images.append({"id": 100 + number, "file_name": name(stem), "width": size[0], "height": size[1]})
        for box, category in objects:
            annotation = {"id": len(annotations) + 1, "image_id": 100 + number, "category_id": 10 * category + 5}
            annotations.append(annotation | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": 10 * number + 5, "name": n, "supercategory": "animals"} for number, n in enumerate(NAMES)]
    if group:
        categories.insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    return {"images": images, "annotations": annotations, "categories": categories}


# ---- one writer for each layout: as the tools write it, not as we export it ----


def coco_original(root):
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        write_images(root / name, split)
        write_text(root / "annotations" / f"instances_{name}.json", coco_content(split))
        write_text(root / "annotations" / f"captions_{name}.json", {"images": [], "annotations": []})


def coco_roboflow(root):
    for split, name in (("train", "train"), ("validation", "valid")):
        write_images(root / name, split)
        write_text(root / name / "_annotations.coco.json", coco_content(split, group=True))


def coco_fiftyone(root):
    for split, name in (("train", "train"), ("validation", "validation")):
        write_images(root / name / "data", split)
        write_text(root / name / "labels.json", coco_content(split))


def coco_cvat(root):
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "images" / name, split)
        write_text(root / "annotations" / f"instances_{name}.json", coco_content(split))


def coco_up_and_over(root):
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "pictures" / name, split)
        content = coco_content(split, lambda stem, name=name: f"../pictures/{name}/{stem}.png")
        write_text(root / "annotations" / f"{name}.json", content)


def coco_backslashes(root):
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name / "images", split)
        write_text(root / name / "result.json", coco_content(split, lambda stem: f"images\\{stem}.png"))


def coco_other_folder(root):
    """DocLayNet: images in a folder with a name of its own, and file names with a folder that is not there."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "PNG", split)
        write_text(root / "COCO" / f"{name}.json", coco_content(split, lambda stem: f"old/{stem}.png"))


def coco_tasks(root):
    """Tasks of CVAT in folders of splits; masks in place of boxes; a group with the name of a class."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name / "images", split)
        content = coco_content(split, group=True)
        content["categories"] = [category | {"supercategory": NAMES[0]} for category in content["categories"]]
        content["categories"][0] |= {"name": NAMES[0], "supercategory": "none"}
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, w, h = annotation.pop("bbox")
            mask = np.zeros(sizes[annotation["image_id"]], dtype=np.uint8)
            mask[y : y + h, x : x + w] = 1
            annotation["segmentation"] = run_lengths(mask)
        write_text(root / name / "annotations" / "instances_default.json", content)


def coco_addresses(root):
    """LVIS: addresses in place of file names."""
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        write_images(root / name, split)
        content = coco_content(split, lambda stem, name=name: f"http://images.cocodataset.org/{name}/{stem}.png")
        for image in content["images"]:
            image["coco_url"] = image.pop("file_name")
        write_text(root / "annotations" / f"lvis_v1_{name[:-4]}.json", content)


def coco_panoptic(root):
    """An entry for each image with its segments; the sky is none of the classes."""
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        write_images(root / name, split)
        content = coco_content(split)
        content["categories"] = [category | {"isthing": 1} for category in content["categories"]]
        content["categories"].append({"id": 7, "name": "sky", "supercategory": "outdoor", "isthing": 0})
        segments = {image["id"]: [{"id": 1, "category_id": 7, "bbox": [0, 0, 9, 2], "area": 18, "iscrowd": 0}]
                    for image in content["images"]}  # fmt: skip
        for annotation in content["annotations"]:
            segments[annotation.pop("image_id")].append(annotation)
        content["annotations"] = [
            {"image_id": image["id"], "file_name": f"{image['id']}.png", "segments_info": segments[image["id"]]}
            for image in content["images"]
        ]
        write_text(root / "annotations" / f"panoptic_{name}.json", content)


def yolo_lines(size, objects, polygons=False):
    lines = []
    for (x, y, w, h), category in objects:
        numbers = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
        if polygons:
            points = [(x, y + h / 2), (x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h)]
            numbers = [value for px, py in points for value in (px / size[0], py / size[1])]
        lines.append(" ".join([str(category), *(f"{number:.8f}" for number in numbers)]))
    return "\n".join(lines) + "\n" if lines else ""


def write_yolo(images, labels, split, polygons=False):
    write_images(images, split)
    for stem, size, objects in scenes(split):
        if objects or stem == "t2":
            write_text(labels / f"{stem}.txt", yolo_lines(size, objects, polygons))


def yolo_ultralytics(root):
    for split, name in (("train", "train"), ("validation", "val")):
        write_yolo(root / "images" / name, root / "labels" / name, split)
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    write_text(
        root / "dataset.yaml", f"path: ../datasets/mine\ntrain: images/train\nval: images/val\nnames:\n{names}\n"
    )


def yolo_roboflow(root):
    for split, name in (("train", "train"), ("validation", "valid")):
        write_yolo(root / name / "images", root / name / "labels", split, polygons=True)
    text = f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\nnames: {NAMES}\n"
    write_text(root / "data.yaml", text)
    write_text(root / "README.roboflow.txt", "Exported by somebody")


def yolo_lists(root):
    """`train.txt` with the paths of another machine, as Darknet and Ultralytics take it."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_yolo(root / "images", root / "labels", split)
        write_text(
            root / f"{name}.txt", "".join(f"/home/bob/mine/images/{stem}.png\n" for stem, _, _ in scenes(split))
        )
    write_text(root / "data.yaml", f"train: /home/bob/mine/train.txt\nval: /home/bob/mine/val.txt\nnames: {NAMES}\n")


def yolo_beside(root):
    """Darknet: the text files beside the images, names in `classes.txt`."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_yolo(root / name, root / name, split)
    write_text(root / "classes.txt", "\n".join(NAMES))


def yolo_names(root):
    """`data.yaml` with nothing but names."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_yolo(root / "images" / name, root / "labels" / name, split)
    write_text(root / "data.yaml", f"nc: 3\nnames: {NAMES}\n")


def yolo_lists_alone(root):
    """Lists without a `data.yaml`, names as Darknet has them, and classes written as 0.0."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "images", split)
        for stem, size, objects in scenes(split):
            lines = yolo_lines(size, objects).splitlines()
            write_text(root / "labels" / f"{stem}.txt", "".join(f"{line[0]}.0{line[1:]}\n" for line in lines))
        write_text(root / f"{name}.txt", "".join(f"./images/{stem}.png\n" for stem, _, _ in scenes(split)))
    write_text(root / "mine.names", "\n".join(NAMES))


def yolo_supervision(root):
    """A `data.yaml` with nothing but names in the folder of each split."""
    for split, name in (("train", "train"), ("validation", "valid")):
        write_yolo(root / name / "images", root / name / "labels", split)
        write_text(root / name / "data.yaml", f"names: {NAMES}\nnc: 3\n")


def voc_xml(stem, size, objects, source="", shift=0):
    boxes = "".join(
        f"<object><name>{NAMES[category]}</name><difficult>0</difficult><bndbox><xmin>{x + shift}</xmin>"
        f"<ymin>{y + shift}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for (x, y, w, h), category in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation>{source}<folder>x</folder><filename>{stem}.png</filename>{size}{boxes}</annotation>"


def voc_challenge(root):
    """As the challenge has it: corners count from 1, and the last pixel is inside."""
    source = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "JPEGImages", split)
        for scene in scenes(split):
            write_text(root / "Annotations" / f"{scene[0]}.xml", voc_xml(*scene, source, shift=1))
        write_text(root / "ImageSets/Main" / f"{name}.txt", "".join(f"{stem}\n" for stem, _, _ in scenes(split)))
        write_text(root / "ImageSets/Main" / f"cat_{name}.txt", "".join(f"{s} -1\n" for s, _, _ in scenes(split)))
    write_text(root / "ImageSets/Main/trainval.txt", "t0\nt1\nt2\nv0\nv1\n")


def voc_years(root):
    """Two years of the challenge, each with lists; the endings of images in one, folders in the other."""
    for year in ("VOC2007", "VOC2012"):
        for split, name in (("train", "train"), ("validation", "val")):
            own = [scene for scene in scenes(split) if (scene[0][1] == "0") == (year == "VOC2007")]
            for scene in own:
                number = int(scene[0][1])
                write_image(root / year / "JPEGImages" / f"{scene[0]}.png", scene[1], number)
                write_text(root / year / "Annotations" / f"{scene[0]}.xml", voc_xml(*scene))
            lines = [f"{stem}.png" if year == "VOC2007" else f"sub/{stem}" for stem, _, _ in own]
            write_text(root / year / "ImageSets/Main" / f"{name}.txt", "\n".join(lines))


def voc_folders(root):
    """Folders of splits under `images` and `annotations`; images renamed, so that the files name others."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "images" / name, split)
        for scene in scenes(split):
            text = voc_xml(*scene).replace(f"{scene[0]}.png", f"{split[0]}1.png")
            write_text(root / "annotations" / name / f"{scene[0]}.xml", text)


def voc_paddle(root):
    """PaddleDetection: lists with an image and its file in a line."""
    for split, name in (("train", "train_list"), ("validation", "val_list")):
        write_images(root / "images", split)
        for scene in scenes(split):
            write_text(root / "annotations" / f"{scene[0]}.xml", voc_xml(*scene))
        lines = [f"./images/{stem}.png ./annotations/{stem}.xml" for stem, _, _ in scenes(split)]
        write_text(root / f"{name}.txt", "\n".join(lines))


def voc_labelimg(root):
    """LabelImg and Roboflow: XML files beside the images of each split."""
    for split, name in (("train", "train"), ("validation", "valid")):
        write_images(root / name, split)
        for scene in scenes(split):
            write_text(root / name / f"{scene[0]}.xml", voc_xml(*scene))


def voc_supervision(root):
    """Corners that count from 1, as in the challenge, which another mark tells."""
    source = "<source><database>roboflow.ai</database></source>"
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name / "images", split)
        for scene in scenes(split):
            text = voc_xml(*scene, source, shift=1).replace("<folder>x</folder>", "<folder>VOC</folder>")
            write_text(root / name / "annotations" / f"{scene[0]}.xml", text)


def voc_masks(root):
    """CVAT: masks that are called as the images."""
    for split, name in (("train", "Train"), ("validation", "Validation")):
        write_images(root / "JPEGImages", split)
        for scene in scenes(split):
            for folder in ("SegmentationClass", "SegmentationObject"):
                write_image(root / folder / f"{scene[0]}.png", scene[1], 90)
            write_text(root / "Annotations" / f"{scene[0]}.xml", voc_xml(*scene))
        write_text(root / "ImageSets/Main" / f"{name}.txt", "".join(f"{stem}\n" for stem, _, _ in scenes(split)))


def labelme(root):
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name, split)
        for stem, size, objects in scenes(split):
            shapes = [
                {"label": NAMES[category], "shape_type": "polygon", "points": [[x, y + 1], [x + w, y], [x + 2, y + h]]}
                if category
                else {"label": NAMES[category], "shape_type": "rectangle", "points": [[x + w, y + h], [x, y]]}
                for (x, y, w, h), category in objects
            ]
            content = {"version": "5.2", "flags": {}, "shapes": shapes, "imagePath": f"..\\elsewhere\\{stem}.png"}
            write_text(
                root / name / f"{stem}.json",
                content | {"imageData": "x" * 10**5, "imageHeight": size[1], "imageWidth": size[0]},
            )


def cvat(root):
    images, number = "", 0
    for split, name in (("train", "Train"), ("validation", "Validation")):
        write_images(root / "images" / name, split)
        for stem, size, objects in scenes(split):
            shapes = "".join(
                f'<box label="{NAMES[category]}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}" occluded="0"/>'
                if category
                else f'<polygon label="cat" points="{x},{y};{x + w},{y};{x + w / 2},{y + h}"/>'
                for (x, y, w, h), category in objects
            )
            attributes = f'id="{number}" name={quoteattr(stem + ".png")} subset="{name}" width="{size[0]}"'
            images += f'<image {attributes} height="{size[1]}">{shapes}</image>'
            number += 1
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    meta = f"<meta><project><labels>{labels}</labels></project></meta>"
    write_text(root / "annotations.xml", f"<?xml version='1.0'?><annotations>{meta}{images}</annotations>")


def cvat_tasks(root):
    """A file for each task, whose images are called alike."""
    for split, name in (("train", "train"), ("validation", "val")):
        images = ""
        for number, (_, size, objects) in enumerate(scenes(split)):
            write_image(root / name / "images" / f"{number}.png", size, number)
            boxes = "".join(
                f'<box label="{NAMES[label]}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
                for (x, y, w, h), label in objects
            )
            attributes = f'id="{number}" name="{number}.png" width="{size[0]}" height="{size[1]}"'
            images += f"<image {attributes}>{boxes}</image>"
        labels = "".join(f"<label><name>{label}</name></label>" for label in NAMES)
        meta = f"<meta><task><labels>{labels}</labels></task></meta>"
        write_text(root / name / "annotations.xml", f"<annotations>{meta}{images}</annotations>")


def table_kaggle(root):
    """One table with a column of splits; images without their ending, and a row without a box for an empty one."""
    lines = ["image_id,class_name,x_min,y_min,x_max,y_max,width,height,Split"]
    for split, name in (("train", "TRAIN"), ("validation", "VALIDATION")):
        write_images(root / "pictures" / "all", split)
        for stem, (width, height), objects in scenes(split):
            boxes = [f"{NAMES[label]},{x},{y},{x + w}.0,{y + h}" for (x, y, w, h), label in objects]
            lines += [f"{stem},{box},{width},{height},{name}" for box in boxes or ["No finding,,,,"]]
    write_text(root / "train.csv", "\r\n".join(lines))


def table_in_each_split(root):
    for split, name in (("train", "train"), ("validation", "valid")):
        write_images(root / name, split)
        lines = ["Filename;X;Y;W;H;Label"]
        for stem, _, objects in scenes(split):
            boxes = [f"{x};{y};{w};{h};{NAMES[label]}" for (x, y, w, h), label in objects]
            lines += [f"/home/bob/{name}/{stem}.png;{box}" for box in boxes or [";;;;"]]
        write_text(root / name / "_annotations.csv", "\ufeff" + "\n".join(lines))


def table_without_names(root):
    """keras-retinanet: the first line is a row; an image without objects has empty cells."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "images", split)
        lines = []
        for stem, _, objects in scenes(split):
            boxes = [f"{x},{y},{x + w},{y + h},{NAMES[label]}" for (x, y, w, h), label in objects]
            lines += [f"images/{stem}.png,{box}" for box in boxes or [",,,,"]]
        write_text(root / f"{name}.csv", "\n".join(lines))


def table_of_parts(root):
    """Open Images: ids without endings, coordinates from 0 to 1, and columns that are of no use here; codes in one."""
    codes = "".join(f"/m/0{number},{name}\n" for number, name in enumerate(NAMES))
    write_text(root / "train" / "class-descriptions-boxable.csv", codes)
    for split, name in (("train", "train"), ("validation", "validation")):
        write_images(root / name / "data", split)
        lines = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded"]
        for stem, (width, height), objects in scenes(split):
            named = [f"/m/0{number}" for number in range(3)] if split == "train" else NAMES
            boxes = [(named[label], x / width, (x + w) / width, y / height, (y + h) / height)
                     for (x, y, w, h), label in objects]  # fmt: skip
            lines += [f"{stem},xclick,{n},1,{a:.8f},{b:.8f},{c:.8f},{d:.8f},0" for n, a, b, c, d in boxes]
            lines += [] if boxes else [f"{stem},xclick,,,,,,,"]
        write_text(root / name / "labels.csv", "\n".join(lines))


def table_of_google(root):
    """AutoML: no names of columns, addresses, and coordinates from 0 to 1."""
    lines = []
    for split, name in (("train", "TRAIN"), ("validation", "VALIDATE")):
        write_images(root / "images", split)
        for stem, (width, height), objects in scenes(split):
            boxes = [
                f"{NAMES[label]},{x / width},{y / height},,,{(x + w) / width},{(y + h) / height},,"
                for (x, y, w, h), label in objects
            ]
            lines += [f"{name},gs://mine/{stem}.png,{box}" for box in boxes or [",,,,,,,,"]]
    write_text(root / "automl.csv", "\n".join(lines))


def table_of_via(root):
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name, split)
        names = ["filename", "file_size", "file_attributes", "region_count", "region_id", "region_shape_attributes"]
        with open(root / name / "via_export_csv.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "region_attributes"])
            for stem, _, objects in scenes(split):
                shapes = [(via_shape(box, label), {"name": NAMES[label]}) for box, label in objects] or [({}, {})]
                for number, shape in enumerate(shapes):
                    writer.writerow([f"{stem}.png", 9, "{}", len(objects), number, *map(json.dumps, shape)])


def create_ml(root):
    """One split as Roboflow writes it, the other with the keys of Apple's documentation."""
    for split, name in (("train", "train"), ("validation", "valid")):
        image, annotations = ("image", "annotations") if split == "train" else ("imagefilename", "annotation")
        write_images(root / name, split)
        entries = [
            {
                image: f"{stem}.png",
                annotations: [
                    {"label": NAMES[label], "coordinates": {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}}
                    for (x, y, w, h), label in objects
                ],
            }
            for stem, _, objects in scenes(split)
        ]
        write_text(root / name / "_annotations.createml.json", entries)


def create_ml_files(root):
    """LabelImg: a list for each image; that of one without objects is all but empty."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name, split)
        for stem, _, objects in scenes(split):
            annotations = [
                {"label": NAMES[label], "coordinates": {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}}
                for (x, y, w, h), label in objects
            ]
            content = [{"image": f"{stem}.png", "verified": False, "annotations": annotations}]
            write_text(root / name / f"{stem}.json", content)


def fiftyone(root):
    """FiftyOneImageDetectionDataset: numbers of classes in one split, names in the other; corners from 0 to 1."""
    for split in SCENES:
        write_images(root / split / "data", split)
        labels = {
            stem: [
                {"label": label if split == "train" else NAMES[label],
                 "bounding_box": [x / width, y / height, w / width, h / height]}
                for (x, y, w, h), label in objects
            ]
            for stem, (width, height), objects in scenes(split)
        }  # fmt: skip
        classes = NAMES if split == "train" else None
        write_text(root / split / "labels.json", {"classes": classes, "labels": labels})


def via_shape(box, label):
    x, y, w, h = box
    if label == 0:
        return {"name": "rect", "x": x, "y": y, "width": w, "height": h}
    if label == 1:
        return {"name": "ellipse", "cx": x + w / 2, "cy": y + h / 2, "rx": h / 2, "ry": w / 2, "theta": np.pi / 2}
    return {"name": "polygon", "all_points_x": [x, x + w, x + 1], "all_points_y": [y, y + 1, y + h]}


def via(root):
    """One split as a project, with options as classes; the other as the JSON of version 1, with a text."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name, split)
        content = {}
        for stem, _, objects in scenes(split):
            regions = [
                {
                    "shape_attributes": via_shape(box, label),
                    "region_attributes": {"sure": "yes", "Class": {NAMES[label]: True}}
                    if split == "train"
                    else {"name": NAMES[label]},
                }
                for box, label in objects
            ]
            regions = regions if split == "train" else {str(number): one for number, one in enumerate(regions)}
            content[f"{stem}.png123"] = {
                "filename": f"{stem}.png", "size": 123, "regions": regions, "file_attributes": {}
            }  # fmt: skip
        if split == "train":
            content = {"_via_settings": {"core": {}}, "_via_img_metadata": content, "_via_attributes": {}}
        write_text(root / name / "via_region_data.json", content)


def label_studio(root):
    """One split as the export with everything, the other as the one with little; in percent."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name, split)
        entries = []
        for number, (stem, (width, height), objects) in enumerate(scenes(split)):
            shapes = [
                ({"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height,
                  "rotation": 0, "rectanglelabels": [NAMES[label]]})
                for (x, y, w, h), label in objects
            ]  # fmt: skip
            size = {"original_width": width, "original_height": height}
            if split == "validation":
                image = f"/data/local-files/?d=mine/val/{stem}.png"
                entries.append({"id": number, "image": image, "label": [shape | size for shape in shapes]})
                continue
            result = [{"type": "rectanglelabels", "value": shape, "to_name": "image"} | size for shape in shapes]
            result.append({"type": "choices", "value": {"choices": ["sharp"]}})
            sound, cancelled = {"result": result}, {"result": result, "was_cancelled": True}
            data = {"note": "seen", "image": f"/data/upload/3/0a1b2c3d-{stem}.png"}
            entries.append({"id": number, "data": data, "annotations": [cancelled, sound]})
        write_text(root / name / "project-3.json", entries)


def scalabel(root):
    """BDD100K: files of splits beside the images, with labels that have no box."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / "images" / name, split)
        entries = []
        for stem, _, objects in scenes(split):
            labels = [
                {"category": NAMES[label], "box2d": {"x1": x, "y1": y, "x2": x + w, "y2": y + h}}
                for (x, y, w, h), label in objects
            ]
            lane = [{"category": "lane", "poly2d": [{"vertices": [[1, 2], [3, 4]]}]}]
            entries.append({"name": f"{stem}.png", "labels": labels + lane if labels else None})
        write_text(root / "labels" / f"det_{name}.json", entries)


def bitmap(box):
    content = io.BytesIO()
    PIL.Image.new("1", box[2:], 1).save(content, "PNG")
    return {"data": base64.b64encode(zlib.compress(content.getvalue())).decode(), "origin": box[:2]}


def supervisely(root):
    """Rectangles in one split, masks in the other."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_images(root / name / "img", split)
        for stem, (width, height), objects in scenes(split):
            shapes = [
                {
                    "classTitle": NAMES[label],
                    "geometryType": "rectangle",
                    "points": {"exterior": [[x, y], [x + w, y + h]], "interior": []},
                }
                if split == "train"
                else {"classTitle": NAMES[label], "geometryType": "bitmap", "bitmap": bitmap([x, y, w, h])}
                for (x, y, w, h), label in objects
            ]
            content = {"description": "", "size": {"height": height, "width": width}, "objects": shapes}
            write_text(root / name / "ann" / f"{stem}.png.json", content)
            write_image(root / name / "masks_machine" / f"{stem}.png", (width, height), 90)
    write_text(root / "meta.json", {"classes": [{"title": name, "shape": "rectangle"} for name in NAMES]})


def kitti(root):
    for split, name in (("train", "training"), ("validation", "val")):
        write_images(root / name / "image_2", split)
        for number, (stem, size, objects) in enumerate(scenes(split)):
            write_image(root / name / "image_3" / f"{stem}.png", size, 90 + number)  # of the other camera
            lines = [
                f"{NAMES[label]} 0.00 0 -1.57 {x}.00 {y}.00 {x + w}.00 {y + h}.00 1.5 1.6 3.9 1.0 2.0 30.1 -1.5"
                for (x, y, w, h), label in objects
            ]
            lines += ["DontCare -1 -1 -10 1 1 2 2 -1 -1 -1 -1000 -1000 -1000 -10"] if lines else []
            write_text(root / name / "label_2" / f"{stem}.txt", "\n".join(lines))
    write_text(root / "ImageSets" / "train.txt", "t0\nt1\n")


def metadata(objects_of):
    def write(root):
        for split, name in (("train", "training"), ("validation", "val")):
            write_images(root / name, split)
            rows = [{"file_name": f"{stem}.png", **objects_of(objects)} for stem, _, objects in scenes(split)]
            write_text(root / name / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
        write_text(root / "labels.json", NAMES)

    return write


def boxes_of(objects):
    return [box for box, _ in objects]


def labels_of(objects):
    return [category for _, category in objects]


def names_of(objects):
    return [NAMES[category] for _, category in objects]


LAYOUTS = {
    "coco, original": coco_original,
    "coco, Roboflow": coco_roboflow,
    "coco, FiftyOne": coco_fiftyone,
    "coco, CVAT": coco_cvat,
    "coco, ../": coco_up_and_over,
    "coco, backslashes": coco_backslashes,
    "coco, other folder": coco_other_folder,
    "coco, tasks": coco_tasks,
    "coco, addresses": coco_addresses,
    "coco, panoptic": coco_panoptic,
    "yolo, Ultralytics": yolo_ultralytics,
    "yolo, names": yolo_names,
    "yolo, lists alone": yolo_lists_alone,
    "yolo, Roboflow": yolo_roboflow,
    "yolo, lists": yolo_lists,
    "yolo, beside": yolo_beside,
    "yolo, supervision": yolo_supervision,
    "voc, challenge": voc_challenge,
    "voc, supervision": voc_supervision,
    "voc, masks": voc_masks,
    "voc, beside": voc_labelimg,
    "voc, years": voc_years,
    "voc, folders": voc_folders,
    "voc, Paddle": voc_paddle,
    "labelme": labelme,
    "cvat": cvat,
    "cvat, tasks": cvat_tasks,
    "table, Google": table_of_google,
    "table, VIA": table_of_via,
    "table, Kaggle": table_kaggle,
    "table, in each split": table_in_each_split,
    "table, without names": table_without_names,
    "table, parts": table_of_parts,
    "json, CreateML": create_ml,
    "json, LabelImg": create_ml_files,
    "json, FiftyOne": fiftyone,
    "json, VIA": via,
    "json, Label Studio": label_studio,
    "json, Scalabel": scalabel,
    "json, Supervisely": supervisely,
    "kitti": kitti,
    "metadata, documentation": metadata(lambda o: {"objects": {"bbox": boxes_of(o), "categories": labels_of(o)}}),
    "metadata, names": metadata(lambda o: {"objects": {"bbox": boxes_of(o), "category": names_of(o)}}),
    "metadata, labels": metadata(lambda o: {"objects": {"bboxes": boxes_of(o), "labels": names_of(o)}}),
    "metadata, dictionaries": metadata(
        lambda o: {"annotations": [{"bbox": box, "label": category} for box, category in o]}
    ),
}  # fmt: skip
READER_OF = {"coco": "COCO", "yolo": "YOLO", "voc": "Pascal VOC", "cvat": "CVAT"} | {
    "table": "table of boxes",
    "json": json_images.NAME,
    "labelme": json_images.NAME,
    "kitti": "KITTI",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, capsys):
    root = tmp_path / "mine"
    LAYOUTS[layout](root)
    assert find_reader(root)[0].NAME == READER_OF.get(layout.split(",")[0], "image folder")
    assert sorted(split_names(root)) == ["train", "validation"]
    for split, expected in SCENES.items():
        dataset = load_dataset_source(root, split, labels=True)
        assert category_names(dataset, root) == NAMES  # of the whole data set, also without an owl
        assert [decode_image(row["image"]).shape[:2] for row in dataset] == [size[::-1] for size, _ in expected]
        assert [int(decode_image(row["image"])[0, 0, 0]) for row in dataset] == list(range(len(expected)))
        for row, (_, objects) in zip(dataset, expected, strict=True):
            assert row["objects"]["category"] == labels_of(objects)
            np.testing.assert_allclose(
                np.reshape(row["objects"]["bbox"], (-1, 4)), np.reshape(boxes_of(objects), (-1, 4)), atol=1e-5
            )
            np.testing.assert_allclose(row["objects"]["area"], [w * h for _, _, w, h in boxes_of(objects)], rtol=1e-5)
        assert validate_objects(dataset, NAMES).boxes == sum(len(objects) for _, objects in expected)
    capsys.readouterr()
    assert len(load_dataset_source(root, "train+validation", labels=True)) == 5
    splits = ", ".join(split_names(root))
    told = f"{root}: read as {find_reader(root)[0].NAME}. It has the splits {splits}; used: train + validation.\n"
    assert capsys.readouterr().out == ("" if find_reader(root)[0].NAME == "image folder" else told)


def test_a_table_of_tensorflow_and_the_images_that_it_does_not_name(tmp_path, caplog):
    write_images(tmp_path / "images", "train")
    rows = ["t1.png,30,50,7,6,5,18,25", "t0.png,40,30,10,4,3,14,15", "t0.png,40,30,7,20,6,28,15"]
    path = tmp_path / "labels.csv"
    write_text(path, "\n".join(["filename,width,height,class,xmin,ymin,xmax,ymax", *rows]))
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(path, labels=True)
    assert "1 images are left out, they have no row in the table (e.g. t2.png)" in caplog.text
    assert category_names(dataset) == ["7", "10"] and dataset["file_name"][:] == ["t1.png", "t0.png"]
    assert dataset[1]["objects"]["bbox"] == [[4, 3, 10, 12], [20, 6, 8, 9]]
    assert dataset[1]["objects"]["category"] == [1, 0] and dataset["width"][:] == [30, 40]
    assert len(load_dataset_source(tmp_path, "train", labels=True)) == 2  # the folder is the same


def test_boxes_in_cells_of_a_parquet_file_without_classes(tmp_path, caplog):
    write_images(tmp_path / "train", "train")
    table = {"image_id": ["t0", "t0", "t1"], "bbox": [[4, 3, 10, 12], [20, 6, 8, 9], None], "source": ["a", "b", "c"]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    (tmp_path / "train.csv").write_text('image_id,bbox\nt1,"[6, 5, 12.5, 20]"\n')
    with pytest.raises(DataError, match="train.csv and train.parquet are both tables of boxes"):
        load_dataset_source(tmp_path)
    dataset = load_dataset_source(tmp_path / "train.parquet", labels=True)
    assert "all are 'object'" in caplog.text and category_names(dataset) == ["object"]
    assert [row["bbox"] for row in dataset["objects"]] == [[[4, 3, 10, 12], [20, 6, 8, 9]], []]
    assert load_dataset_source(tmp_path / "train.csv")[0]["objects"]["bbox"] == [[6, 5, 12.5, 20]]


@pytest.mark.parametrize(
    "lines, label",
    [
        ("{image},4,3,14,15,owl,40,30", "owl"),  # SKU-110K
        ("owl,4,3,10,12,{image},40,30", "owl"),  # makesense.ai
        ("image,label,bbox\n{image},owl,(4.0; 3; 10; 12)", "owl"),
        ("image,label,bbox\n{image},owl,[4 3 10 12]", "owl"),
        ("image_name,BoxesString,domain\n{image},4 3 14 15,field_1\n{other},no_box,field_1", "object"),  # wheat
    ],
)
def test_tables_of_other_forms(tmp_path, lines, label):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name, (40, 30), 0)
    text = lines.format(image="a.png", other="b.png")
    if ";" in text:
        text = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.split("\n")).replace(
            ";", ","
        )
    write_text(tmp_path / "boxes.csv", text)
    dataset = load_dataset_source(tmp_path, labels=True)
    assert category_names(dataset) == [label]
    assert [row["objects"]["bbox"] for row in dataset] == [[[4, 3, 10, 12]], []][: len(dataset)]


def test_names_of_classes_beside_their_numbers_and_boxes_around_groups(tmp_path):
    write_image(tmp_path / "a.png", (40, 30), 0)
    rows = "a.png,3,owl,0,4,3,14,15\na.png,2,cat,1,0,0,30,20\na.png,3,owl,-1,5,5,9,9"
    write_text(tmp_path / "train.csv", f"filename,class,class_name,IsGroupOf,xmin,ymin,xmax,ymax\n{rows}")
    dataset = load_dataset_source(tmp_path, labels=True)
    assert category_names(dataset) == ["cat", "owl"] and dataset[0]["objects"]["category"] == [1, 0, 1]
    assert dataset[0]["objects"]["iscrowd"] == [0, 1, 0]


def test_open_images_of_fiftyone(tmp_path):
    """Tables in `labels`, and the names of their codes in `metadata`."""
    for split, codes in (("train", ["/m/00", "/m/02", "/m/01"]), ("validation", ["/m/01", "/m/00"])):
        write_images(tmp_path / split / "data", split)
        write_text(tmp_path / split / "metadata" / "classes.csv", "/m/00,cat\n/m/01,dog\n/m/02,owl\n")
        write_text(tmp_path / split / "labels" / "classifications.csv", "ImageID,Source,LabelName,Confidence\n")
        rows = [(stem, size, box) for stem, size, objects in scenes(split) for box, _ in objects]
        lines = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf"] + [
            f"{stem},,{code},1,{x / width},{(x + w) / width},{y / height},{(y + h) / height},0"
            for (stem, (width, height), (x, y, w, h)), code in zip(rows, codes, strict=True)
        ]
        write_text(tmp_path / split / "labels" / "detections.csv", "\n".join(lines))
    assert sorted(split_names(tmp_path)) == ["train", "validation"]
    for source in (tmp_path, tmp_path / "train"):
        dataset = load_dataset_source(source, "train", labels=True)
        assert category_names(dataset) == NAMES
        assert [objects["category"] for objects in dataset["objects"]] == [[0, 2], [1]]
        np.testing.assert_allclose(dataset[1]["objects"]["bbox"], [[6, 5, 12, 20]])


def test_what_via_has_no_box_for_in_a_table_is_told(tmp_path, caplog):
    table_of_via(tmp_path)
    path = tmp_path / "train" / "via_export_csv.csv"
    point = '"{""name"": ""point"", ""cx"": 1, ""cy"": 2}","{""name"": ""cat""}"'
    path.write_text(path.read_text() + f"t0.png,9,{{}},3,2,{point}\n")
    assert len(load_dataset_source(tmp_path, "train", labels=True)[0]["objects"]["bbox"]) == 2
    assert "1 points and lines are left out" in caplog.text
    path.write_text(path.read_text() + 't0.png,9,{},3,2,"{""name"": ""rect""}","{}"\n')
    with pytest.raises(DataError, match="line 7, column 'region_shape_attributes': expected a shape of VIA and its"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_images_of_label_studio_that_nobody_labelled_are_left_out(tmp_path, caplog):
    write_images(tmp_path, "train")
    box = {"x": 10, "y": 10, "width": 25, "height": 40, "rectanglelabels": ["cat"]}
    result = [{"type": "rectanglelabels", "value": box, "original_width": 40, "original_height": 30}]
    entries = [
        {
            "data": {"image": "https://mine.example/t0.png?X-Amz-Algorithm=AWS4&X=1"},
            "annotations": [{"result": result}],
        },
        {"data": {"image": "/data/upload/1/t1.png"}, "annotations": []},
        {"data": {"image": "/data/upload/1/t2.png"}, "annotations": [{"result": []}]},
    ]
    write_text(tmp_path / "project.json", entries)
    dataset = load_dataset_source(tmp_path, labels=True)
    assert [row["objects"]["bbox"] for row in dataset] == [[[4, 3, 10, 12]], []]
    assert "1 images are left out, nobody has labelled them" in caplog.text
    assert "have no entry" not in caplog.text


def test_images_with_one_name_in_several_folders(tmp_path, caplog):
    for number, folder in enumerate(("train", "cam")):
        write_image(tmp_path / "images" / folder / "1.png", (40, 30), number)
    lines = "image,class,x,y,w,h\ntrain/1.png,cat,1,2,3,4\ncam/1.png,dog,5,6,7,8\n"
    write_text(tmp_path / "boxes.csv", lines)
    dataset = load_dataset_source(tmp_path, labels=True)
    assert [row["objects"]["bbox"] for row in dataset] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    assert [decode_image(row["image"])[0, 0, 0] for row in dataset] == [0, 1]
    assert not caplog.text
    write_text(tmp_path / "boxes.csv", lines + "gone/2.png,dog,5,6,7,8\nlost/2.png,dog,5,6,7,8\n")
    write_image(tmp_path / "images" / "train" / "2.png", (40, 30), 2)
    load_dataset_source(tmp_path, labels=True)
    assert "1 images get what is said of several paths" in caplog.text
    assert "2.png of 'gone/2.png' and 'lost/2.png': are files missing?" in caplog.text


def test_folders_of_xml_files_in_the_order_of_folders_of_images(tmp_path):
    for number, folder in enumerate(("a", "b")):
        write_image(tmp_path / "JPEGImages" / folder / "1.png", (40, 30), number)
        write_text(tmp_path / "Annotations" / folder / "1.xml", voc_xml("1", (40, 30), [([1, 2, 3, 4], number)]))
    dataset = load_dataset_source(tmp_path, labels=True)
    assert [row["objects"]["category"] for row in dataset] == [[0], [1]]
    assert [decode_image(row["image"])[0, 0, 0] for row in dataset] == [0, 1]


@pytest.mark.parametrize(
    "layout", ["voc, Paddle", "voc, challenge", "yolo, lists alone", "coco, tasks", "cvat, tasks"]
)
def test_a_relative_path_has_the_same_splits(tmp_path, monkeypatch, layout):
    LAYOUTS[layout](tmp_path / "mine")
    for folder, source in ((tmp_path, "mine"), (tmp_path / "mine", ".")):
        monkeypatch.chdir(folder)
        assert [len(load_dataset_source(source, split, labels=True)) for split in SCENES] == [3, 2]


def test_lists_that_are_not_of_coco(tmp_path):
    write_image(tmp_path / "a.png", (40, 30), 0)
    write_text(tmp_path / "coco.json", {"images": [{"id": 1, "file_name": ".."}], "annotations": []})
    with pytest.raises(DataError, match="entry 0 of 'images': the file name '..' leads out"):
        load_dataset_source(tmp_path / "coco.json")
    (tmp_path / "coco.json").unlink()
    for name in "ab":  # Darwin
        content = {"item": {"name": f"{name}.png"}, "annotations": [{"name": "cat", "bounding_box": {"x": 1}}]}
        write_text(tmp_path / f"{name}.json", content)
    with pytest.raises(DataError, match="its files a.json and 1 others are no labels .* a.json begins with"):
        load_dataset_source(tmp_path, labels=True)


def test_turned_boxes_polygons_and_two_annotations_of_label_studio(tmp_path):
    write_image(tmp_path / "a.png", (200, 100), 0)
    size = {"original_width": 200, "original_height": 100, "type": "labels"}
    shapes = [
        # Turned by 90 degrees around (40, 20) pixels: 60 x 10 becomes 10 x 60, to the left of the corner and below.
        {"value": {"x": 20, "y": 20, "width": 30, "height": 10, "rotation": 90, "rectanglelabels": ["b"]}},
        {"value": {"points": [[10, 10], [20, 15], [15, 40]], "polygonlabels": ["a"]}},
        # Half-axes of 20 and 10 pixels, turned by 90 degrees.
        {"value": {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10, "rotation": 90, "ellipselabels": ["a"]}},
        {"value": {"x": 50, "y": 50, "width": 1, "keypointlabels": ["a"]}},
    ]
    task = {"data": {"image": "s3://bucket/a.png"}, "annotations": [{"result": [shape | size for shape in shapes]}]}
    write_text(tmp_path / "export.json", [task])
    (objects,) = load_dataset_source(tmp_path, labels=True)["objects"][:]
    np.testing.assert_allclose(objects["bbox"], [[30, 20, 10, 60], [20, 10, 20, 30], [90, 30, 20, 40]], atol=1e-9)
    assert objects["category"] == [1, 0, 0]
    turned, polygon, ellipse = objects["segmentation"]
    np.testing.assert_allclose(json.loads(turned), [[40, 20, 40, 80, 30, 80, 30, 20]], atol=1e-9)
    assert json.loads(polygon) == [[20, 10, 40, 15, 30, 40]] and ellipse is None
    write_text(tmp_path / "export.json", [task | {"annotations": 2 * task["annotations"]}])
    with pytest.raises(DataError, match="export.json, entry 0: expected 'data' .*2 annotations: keep one"):
        load_dataset_source(tmp_path, labels=True)


def create_ml_entry(image, coordinates, label="cat"):
    return {"image": image, "annotations": [{"label": label, "coordinates": coordinates}]}


def via_entry(attributes):
    shape = {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}
    regions = [{"shape_attributes": shape, "region_attributes": attributes}]
    return {"a": {"filename": "a.png", "file_attributes": {}, "regions": regions}}


def label_studio_result(kind, image_rotation=0, **value):
    shape = {"x": 1, "y": 2, "width": 3, "height": 4} | value
    size = {"original_width": 40, "original_height": 30, "image_rotation": image_rotation}
    result = {"id": kind, "type": kind, "value": shape} | size
    return {"data": {"image": "a.png"}, "annotations": [{"result": [result]}]}


def label_studio_entry(width):
    shape = {"x": 1, "y": 2, "width": 3, "height": 4, "rectanglelabels": ["cat"]}
    return [{"image": "a.png", "label": [shape | {"original_width": width, "original_height": 30}]}]


@pytest.mark.parametrize(
    "content, message",
    [
        ([create_ml_entry("a.png", {"x": 1, "y": 2, "width": 3})], r"entry 0: expected .* \('height'\)"),
        ([create_ml_entry("a.png", {"x": 1, "y": 2, "width": 3, "height": 4}, 5)], "entry 0: .*names must be texts"),
        ([create_ml_entry("b.png", {"x": 1, "y": 2, "width": 3, "height": 4})], "entry 0: there is no image 'b.png'"),
        ({"a": {"filename": "a.png", "file_attributes": {}, "regions": [{"shape_attributes": {"name": "rect"}}]}},
         "entry 0: expected 'filename' and 'regions'.*got {'filename': 'a.png'"),
        ([{"name": "a.png", "labels": [{"category": "cat", "box2d": None}, {"box2d": {}}]}], "entry 0: .*'category'"),
        ({"size": {}, "objects": [{"classTitle": "cat", "geometryType": "rectangle"}]}, "x.json: expected 'size' and"),
        ([create_ml_entry("a.png", {"x": 10**400, "y": 2, "width": 3, "height": 4})], "entry 0: .* too large"),
        (label_studio_entry("nan"), "entry 0: expected 'data' .*not supported between"),
        (label_studio_entry(0), "entry 0: expected 'data' .*no sides of 0 and 30 pixels"),
        (label_studio_entry(10**400), "entry 0: expected 'data' .*no sides of"),
        ([label_studio_result("rectanglelabels", rectanglelabels=[])], r"entry 0: .*\(a region has no label\)"),
        ([label_studio_result("rectanglelabels", rectanglelabels=["cat"], image_rotation=90)],
         "entry 0: .*labelled with the image turned by 90 degrees: turn it back there"),
        ({"classes": ["cat"], "labels": {"a": [{"label": 1, "bounding_box": [0, 0, 1, 1]}]}},
         "entry 0: expected 'classes' and, in 'labels', a list for each image"),
        ({"classes": ["cat"], "labels": {"a": [{"label": -1, "bounding_box": [0, 0, 1, 1]}]}}, "entry 0: .*got"),
        ({"classes": ["cat"], "labels": {"a": [{"label": 0, "bounding_box": [0, 0, 1]}]}}, "entry 0: .*not enough"),
        ([label_studio_result("x") | {"data": {"thumb": "b.png", "photo": "a.png"}}],
         "entry 0: .*several images in 'data', thumb, photo: call the one that is labelled 'image'"),
        ([label_studio_result("rectangle")], r"entry 0: .*\(a region has no label\)"),
        (via_entry({"sure": "yes", "animal": "cat"}), "entry 0: .*several attributes, sure, animal: call the one"),
        (via_entry({"animal": {"cat": True, "dog": True}}), "entry 0: .*2 classes of one region: cat, dog"),
    ],
)  # fmt: skip
def test_json_of_images_that_is_wrong(tmp_path, content, message):
    write_image(tmp_path / "a.png", (40, 30), 0)
    write_text(tmp_path / "x.json", content)
    for source in (tmp_path, tmp_path / "x.json"):
        with pytest.raises(DataError, match=message):
            load_dataset_source(source, labels=True)


def test_a_row_of_metadata_with_too_many_cells(tmp_path):
    write_image(tmp_path / "a.png", (40, 30), 0)
    write_text(tmp_path / "metadata.csv", 'file_name,objects\na.png,"{""bbox"": [], ""category"": []}"\na.png,{},3\n')
    with pytest.raises(DataError, match="metadata.csv, line 3: more cells than the first line has names of columns"):
        load_dataset_source(tmp_path, labels=True)


def test_two_lists_of_images_of_one_split(tmp_path):
    create_ml(tmp_path)
    path = tmp_path / "train" / "_annotations.createml.json"
    write_text(path.with_name("older.json"), path.read_text())
    with pytest.raises(DataError, match="_annotations.createml.json and train/older.json are both lists of images"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_wrong_lines_of_kitti(tmp_path, caplog):
    kitti(tmp_path)
    load_dataset_source(tmp_path, "train", labels=True)
    assert "2 regions 'DontCare' are left out" in caplog.text
    write_text(tmp_path / "training/label_2/t1.txt", "cat 0 0 0 1 2 three 4 0 0 0 0 0 0 0\n")
    with pytest.raises(DataError, match="t1.txt, line 1: each value after the class must be a number, got 'three'"):
        load_dataset_source(tmp_path, "train", labels=True)
    write_text(tmp_path / "training/label_2/t1.txt", "traffic light 0 0 0 1 2 3 4 0 0 0 0 0 0 0\n")
    with pytest.raises(DataError, match="t1.txt, line 1: each value after the class must be a number, got 'light'"):
        load_dataset_source(tmp_path, "train", labels=True)
    write_text(tmp_path / "training/label_2/t1.txt", "\ncat 0 0 0 1 2 3 4\n")
    with pytest.raises(DataError, match="t1.txt, line 2: expected a class and 14 numbers, got 'cat 0 0 0 1 2 3 4'"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_many_files_without_objects_of_kitti_come_first(tmp_path):
    for number in range(30):
        write_image(tmp_path / "image_2" / f"{number:02}.png", (40, 30), 0)
        write_text(tmp_path / "label_2" / f"{number:02}.txt", "" if number < 29 else "cat 0 0 0 1 2 3 4" + 7 * " 0")
    dataset = load_dataset_source(tmp_path, labels=True)
    assert [row["bbox"] for row in dataset["objects"]] == 29 * [[]] + [[[1, 2, 2, 2]]]


@pytest.mark.parametrize("name, text", [("labels/a.txt", "10 20 50 20 50 60 10 60 plane 0"), ("a.tfrecord", "x")])
def test_labels_in_a_format_that_is_not_known(tmp_path, name, text):
    write_image(tmp_path / "a.png", (40, 30), 0)
    with pytest.raises(DataError, match="no column 'objects'; there are images in it and no file of labels. Give the"):
        load_dataset_source(tmp_path, labels=True)
    write_text(tmp_path / name, text)
    write_text(tmp_path / "README.txt", "Exported by somebody")
    found = (
        rf"its files {name} and 1 others are no labels in a format that is known \(.*Pascal VOC.* {name} begins with"
    )
    with pytest.raises(DataError, match=found) as error:
        load_dataset_source(tmp_path, labels=True)
    assert f"begins with '{text}'" in str(error.value)
    assert ("expected, for YOLO, lines 'class centre_x" in str(error.value)) == name.endswith(".txt")
    assert len(load_dataset_source(tmp_path)) == 1


@pytest.mark.parametrize(
    "header, row, message",
    [
        (
            "filename,class,xmin,ymin,xmax",
            "a.png,cat,1,2,3",
            "boxes.csv: expected a row for each box, .* found filename",
        ),
        ("name,age", "bob,3", "found name, age in the first line"),
        ("file,class,x,y,w,h", "a.png,cat,1,2,three,4", "boxes.csv, line 3: column 'w' must be a number, got 'three'"),
        ("file,class,x,y,w,h", "a.png,cat,1,2,,4", "line 3: column 'w' must be a number, got ''"),
        ("file,class,x,y,w,h", "a.png,,1,2,3,4", "line 3: column 'class' is empty"),
        ("file,class,x,y,w,h", ",cat,1,2,3,4", "line 3: column 'file' is empty"),
        ("file,class,x,y,w,h", "a.png,cat,1,2,3,4,5", "line 3: more cells than the first line has names"),
        ("file,class,x,y,w,h", 'a.png,"cat\na.png,dog,1,2,3,4', "line 4: a quotation mark that nothing closes"),
        ("file,class,x,y,w,h", "c.png,cat,1,2,3,4", "line 3: there is no image 'c.png' in .* Give the folder as"),
        ("file,class,x,y,w,h", "../../a.txt,cat,1,2,3,4", "line 3: there is no image '../../a.txt'"),
        ("file,class,x,y,w,h", "b,cat,1,2,3,4", "line 3: 'b' may be .*b.jpg or .*b.png"),
        ("file,class,x,y,w,h", ",,,,,\na.png,cat,1,2,three,4", "line 4: column 'w' must be a number, got 'three'"),
        ("file,class,x,y,w,h,Class", "a.png,cat,1,2,3,4,dog", "boxes.csv: 2 columns are called alike, class, Class."),
        ("file,class,bbox", "a.png,cat,1 2 3", r"line 3, column 'bbox' must hold four numbers \[x, y, width, h"),
        ("file,class,bbox", 'a.png,cat,"[1, 2]"', r"line 3, column 'bbox' must hold four numbers .* got '\[1, 2\]'"),
        ("file,class,bbox", "a.png,cat,1 2 x 4", "line 3, column 'bbox': a coordinate must be a number, got 'x'"),
    ],
)
def test_tables_that_are_wrong(tmp_path, header, row, message):
    for name in ("a.png", "b.png", "b.jpg"):
        write_image(tmp_path / "x" / name, (40, 30), 0)
    sound = 'a.png,cat,"[1, 2, 3, 4]"' if "bbox" in header else "a.png,cat,1,2,3,4"
    write_text(tmp_path / "x" / "boxes.csv", f"{header}\n{sound}\n{row}\n")
    with pytest.raises(DataError, match=message):
        load_dataset_source(tmp_path / "x" / "boxes.csv")


def test_the_group_of_roboflow_is_left_out_and_told(tmp_path, caplog):
    coco_roboflow(tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(tmp_path / "train" / "_annotations.coco.json", labels=True)
    assert category_names(dataset) == NAMES and category_ids(dataset, NAMES) == [5, 15, 25]
    assert "the category 'animals' (id 0) is left out" in caplog.text
    # A group that is used in another split is a category.
    path = tmp_path / "valid" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    write_text(path, content)
    for split in SCENES:
        assert category_names(load_dataset_source(tmp_path, split, labels=True)) == ["animals", *NAMES]


def small_coco(tmp_path, **changes):
    write_image(tmp_path / "a.png", (40, 30), 0)
    write_image(tmp_path / "b.png", (40, 30), 1)
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"id": 9, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4], "area": None}],
    }
    write_text(tmp_path / "labels.json", content | changes)
    return tmp_path / "labels.json"


def annotation(**changes):
    return [{"id": 9, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4], "area": None} | changes]


@pytest.mark.parametrize(("given", "own"), [([None, None], [1, 2]), ([7, None], [7, 8]), ([None, "7"], [8, "7"])])
def test_annotations_without_an_id_get_free_ones(tmp_path, given, own):
    """0 is not free: pycocotools takes it for no match."""
    entries = [annotation(id=one)[0] for one in given]
    for one in entries:
        if one["id"] is None and given[0] is None:
            del one["id"]
    dataset = load_dataset_source(small_coco(tmp_path, annotations=entries), labels=True)
    assert list(map(str, dataset[1]["objects"]["id"])) == list(map(str, own))


UUIDS = ["6fa459ea-ee8a-3ca4-894e-db77e160355e", "16fd2706-8baf-433b-82eb-8c7fada847da"]


@pytest.mark.parametrize(
    "changes, image_ids, label_ids, own",
    [
        ({}, [1, 2], [1, 2], [9]),
        ({"annotations": annotation(image_id="2", category_id="2")}, [1, 2], [1, 2], [9]),
        ({"annotations": annotation(image_id=2.0, category_id=2.0, id=9.0)}, [1, 2], [1, 2], [9]),
        ({"images": [{"id": "1", "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]}, [1, 2], [1, 2], [9]),
        ({"categories": [{"id": "1", "name": "cat"}, {"id": 2, "name": "dog"}]}, [1, 2], ["1", 2], [9]),
        (
            {
                "images": [{"id": own, "file_name": f"{name}.png"} for own, name in zip(UUIDS, "ab", strict=True)],
                "annotations": annotation(image_id=UUIDS[1], id=UUIDS[0]),
            },
            UUIDS,
            [1, 2],
            [UUIDS[0]],
        ),
        (
            {
                "categories": [{"id": "c", "name": "cat"}, {"id": "d", "name": "dog"}],
                "annotations": annotation(category_id="d"),
            },
            [1, 2],
            ["c", "d"],
            [9],
        ),
    ],
    ids=["integers", "texts of integers", "floats", "mixed images", "mixed categories", "uuids", "texts"],
)
def test_ids_of_every_type_are_kept(tmp_path, changes, image_ids, label_ids, own):
    dataset = load_dataset_source(small_coco(tmp_path, **changes), labels=True)
    assert list(dataset["image_id"]) == image_ids and category_ids(dataset, ["cat", "dog"]) == label_ids
    assert dataset[0]["objects"]["bbox"] == []
    assert dataset[1]["objects"] == {
        "bbox": [[1, 2, 3, 4]], "category": [1], "area": [12], "iscrowd": [0], "id": own,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": annotation(image_id="two")}, r"annotation 9: no image has the id 'two' \(str\)"),
        ({"annotations": annotation(category_id=None)}, "annotation 9: no category has the id None"),
        ({"annotations": annotation(area="big")}, "annotation 9: 'area' must be a number or null, got 'big'"),
        ({"annotations": annotation(iscrowd=2)}, "annotation 9: 'iscrowd' must be 0 or 1, got 2"),
        ({"annotations": annotation(bbox=[])}, r"annotation 9: 'bbox' must be four numbers .*, got \[\]"),
        ({"categories": []}, "annotation 9: no category has the id 2; the file has no 'categories'"),
        ({"annotations": None}, r"'annotations' must be a list, got None \(NoneType\)"),
        ({"images": [{"id": [1], "file_name": "a.png"}]}, r"entry 0 of 'images': an id .* got \[1\] of the type list"),
        ({"images": [{"id": True, "file_name": "a.png"}]}, "got True of the type bool"),
        ({"annotations": annotation(image_id=True)}, r"annotation 9: no image has the id True \(bool\)"),
        ({"images": [{"id": 1, "file_name": None}]}, "image 1: 'file_name' must be a text, got None"),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": "40"}]},
            "'width' must be an integer, got '40'",
        ),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}]}, "must be unique, got 1: 'cat', '1'"),
    ],
)
def test_wrong_types_are_named_with_place_and_value(tmp_path, changes, message):
    with pytest.raises(DataError, match=f"labels.json.*{message}"):
        load_dataset_source(small_coco(tmp_path, **changes), labels=True)


@pytest.mark.parametrize("stored, named", [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_in_either_form_of_unicode(tmp_path, stored, named):
    """An archive of macOS takes accents apart, its label file does not."""
    stored, named = (unicodedata.normalize(form, "\u00e9.png") for form in (stored, named))
    write_image(tmp_path / stored, (40, 30), 0)
    path = small_coco(tmp_path, images=[{"id": 2, "file_name": named}])
    assert load_dataset_source(path).with_format("arrow")[:]["image"][0]["path"].as_py() == str(tmp_path / stored)
    write_image(tmp_path / "yolo" / "images" / stored, (40, 30), 0)
    write_text(tmp_path / "yolo" / "labels" / f"{named[:-4]}.txt", "0 0.5 0.5 0.5 0.5")
    assert load_dataset_source(tmp_path / "yolo", labels=True)[0]["objects"]["bbox"] == [[10, 7.5, 20, 15]]


def test_a_name_with_other_capitals_is_told(tmp_path):
    path = small_coco(tmp_path, images=[{"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "A.PNG"}])
    with pytest.raises(DataError, match="image 2: there is no file .*A.PNG; 'a.png' is there: capitals count."):
        load_dataset_source(path)


def test_the_other_capitals_of_all_names_are_told(tmp_path):
    path = small_coco(tmp_path, images=[{"id": 1, "file_name": "A.PNG"}, {"id": 2, "file_name": "B.PNG"}])
    with pytest.raises(DataError, match="cannot find 'A.PNG' in .*; 'a.png' is there: capitals count. Give"):
        load_dataset_source(path)


def test_annotations_that_share_an_id_are_told(tmp_path, caplog):
    load_dataset_source(small_coco(tmp_path, annotations=annotation() * 3), labels=True)
    assert "labels.json: 2 annotations have the id of another one" in caplog.text


@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_yolo_of_label_studio_with_its_notes(tmp_path, parts):
    """`notes.json` has a list `categories`, and is no COCO file."""
    for part in parts:
        write_yolo(tmp_path / part / "images", tmp_path / part / "labels", "train")
        write_text(tmp_path / part / "classes.txt", "\n".join(NAMES))
        write_text(tmp_path / part / "notes.json", {"categories": [{"id": 0, "name": NAMES[0]}], "info": {}})
    dataset = load_dataset_source(tmp_path, "train", labels=True)
    assert category_names(dataset) == NAMES and len(dataset) == len(scenes("train"))


def test_a_place_of_yolo_whose_name_is_too_long(tmp_path):
    yolo_ultralytics(tmp_path)
    write_text(tmp_path / "dataset.yaml", f"train: {'9' * 400}\nnames: {NAMES}\n")
    with pytest.raises(DataError, match="dataset.yaml: 'train' is .*, but there is no"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_labels_one_folder_further_down_are_told(tmp_path):
    coco_roboflow(tmp_path / "My data.v1i.coco")
    write_text(tmp_path / "other" / "notes.txt", "x")
    with pytest.raises(DataError, match=r"there are labels in .*My data.v1i.coco \(COCO\). Give that folder."):
        load_dataset_source(tmp_path, labels=True)


@pytest.mark.parametrize("layout", [yolo_roboflow, coco_roboflow, table_in_each_split, voc_labelimg])
def test_the_only_folder_of_a_folder_is_read(tmp_path, layout):
    """As archives unpack: a folder in the folder, and `__MACOSX` beside it."""
    layout(tmp_path / "down" / "My data.v1i")
    write_text(tmp_path / "down" / "__MACOSX" / "notes.txt", "x")
    splits = split_names(tmp_path / "down" / "My data.v1i")
    assert split_names(tmp_path / "down") == splits
    for split in splits:
        outer, inner = (
            load_dataset_source(path, split) for path in (tmp_path / "down", tmp_path / "down/My data.v1i")
        )
        assert outer.to_list() == inner.to_list() and len(inner) > 0


@pytest.mark.parametrize("names", ["cat\n\ndog\nowl\n", "cat\ndog\ndog\n"])
@pytest.mark.parametrize("name", ["classes.txt", "obj.names"])
def test_lines_without_a_name_of_their_own(tmp_path, name, names):
    yolo_beside(tmp_path)
    (tmp_path / "classes.txt").unlink()
    write_text(tmp_path / name, names)
    write_text(tmp_path / "train.txt", "train/t0.png\n")
    if name == "obj.names":
        write_text(tmp_path / "obj.data", "train = train.txt\nnames = obj.names\n")
    with pytest.raises(
        DataError, match="(obj.data, 'names'|classes.txt): expected a list of different category names"
    ):
        load_dataset_source(tmp_path, "train", labels=True)


def test_the_lists_of_darknet_are_splits(tmp_path):
    for split, name in (("train", "a"), ("valid", "b")):
        write_image(tmp_path / f"obj_{split}_data" / f"{name}.png", (40, 30), 0)
        write_text(tmp_path / f"obj_{split}_data" / f"{name}.txt", "1 0.5 0.5 0.5 0.5\n")
        write_text(tmp_path / f"{split}.txt", f"data/obj_{split}_data/{name}.png\n")
    write_text(tmp_path / "obj.names", "cat\ndog\n")
    lists = "train = data/train.txt\nvalid = data/valid.txt\n"
    write_text(tmp_path / "obj.data", f"classes = 2\n{lists}names = data/obj.names\nbackup = backup/\n")
    assert split_names(tmp_path) == ["train", "validation"]
    (row,) = load_dataset_source(tmp_path, "validation")
    assert row["image"]["path"].endswith("b.png") and row["objects"]["bbox"] == [[10, 7.5, 20, 15]]
    assert category_names(load_dataset_source(tmp_path, "train")) == ["cat", "dog"]


def test_what_a_yaml_file_of_yolo_names_and_is_not_there(tmp_path, caplog):
    write_image(tmp_path / "images" / "train" / "a.png", (40, 30), 0)
    write_text(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [no, 12]\n")
    dataset = load_dataset_source(tmp_path, "train")
    assert category_names(dataset) == ["no", "12"] and dataset[0]["objects"]["bbox"] == []
    assert "'val' is 'images/val', which is not there: left out." in caplog.text
    assert f"no image has a label file; {tmp_path / 'labels/train/a.txt'} is where" in caplog.text


def test_names_that_label_studio_gives_to_uploads(tmp_path):
    write_image(tmp_path / "0a1b2c3d-a.png", (40, 30), 0)
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": ["cat"]}
    result = {"type": "rectanglelabels", "original_width": 40, "original_height": 30, "value": value}
    task = {"data": {"image": "/data/upload/1/0a1b2c3d-a.png"}, "annotations": [{"result": [result]}]}
    write_text(tmp_path / "project.json", [task])
    (row,) = load_dataset_source(tmp_path)
    assert row["objects"]["bbox"] == [[4, 6, 12, 12]]
    (tmp_path / "project.json").unlink()
    name = "../../label-studio/data/media/upload/1/0a1b2c3d-a.png"  # as its COCO has it
    content = {"images": [{"id": 0, "file_name": name}], "categories": [{"id": 0, "name": "cat"}]}
    annotation = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [4, 6, 12, 12]}
    write_text(tmp_path / "result.json", content | {"annotations": [annotation]})
    assert load_dataset_source(tmp_path).to_list()[0]["objects"]["bbox"] == [[4, 6, 12, 12]]


def test_what_a_command_wrote_has_no_labels(tmp_path):
    write_image(tmp_path / "predictions.png", (40, 30), 0)
    write_text(tmp_path / "run.json", {"command": "pretrain"})
    with pytest.raises(DataError, match="no column 'objects'; this is what a command wrote. Give the folder of the"):
        load_dataset_source(tmp_path, labels=True)


def test_a_long_value_does_not_make_a_long_message(tmp_path):
    with pytest.raises(DataError, match=r"'width' must be an integer, got '9{10}.*9\.\.\.$") as error:
        load_dataset_source(small_coco(tmp_path, images=[{"id": 1, "file_name": "a.png", "width": "9" * 5000}]))
    assert len(str(error.value)) < 800


def test_a_coco_file_whose_categories_are_long_and_come_first(tmp_path):
    categories = [{"id": number, "name": str(number) * 500} for number in range(100, 190)]
    content = {"categories": categories, **json.loads(small_coco(tmp_path).read_text())}
    content["categories"] = categories + content["categories"]
    write_text(tmp_path / "labels.json", content)
    assert len(load_dataset_source(tmp_path, labels=True)[1]["objects"]["bbox"]) == 1


def test_a_coco_file_without_annotations_has_no_labels(tmp_path):
    path = small_coco(tmp_path)
    content = json.loads(path.read_text())
    del content["annotations"]
    write_text(path, content)
    assert len(load_dataset_source(path)) == 2
    with pytest.raises(DataError, match="labels.json: no column 'objects'; .* The file has no list 'annotations'."):
        category_names(load_dataset_source(path), path)


def test_images_that_are_in_no_coco_file_are_told(tmp_path, caplog):
    """Of a folder that the splits share the images of the other split are none of them."""
    for split in SCENES:
        write_images(tmp_path / "images", split)
        write_text(tmp_path / "annotations" / f"{split}.json", coco_content(split))
    assert len(load_dataset_source(tmp_path, "train", labels=True)) == 3 and not caplog.text
    write_image(tmp_path / "images" / "new.png", (40, 30), 0)
    load_dataset_source(tmp_path, "train", labels=True)
    assert "images: 1 images are left out, they are not in train.json (e.g. new.png)" in caplog.text


def test_splits_that_disagree_about_a_category(tmp_path):
    coco_original(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    write_text(path, path.read_text().replace('"dog"', '"wolf"'))
    with pytest.raises(DataError, match="instances_val2017.json: the category 15 is 'wolf', but 'dog' in .*train2017"):
        load_dataset_source(tmp_path, "train")


def test_a_folder_whose_name_holds_the_word_test_is_no_split(tmp_path):
    write_image(tmp_path / "field_test_images" / "a.png", (40, 30), 0)
    write_image(tmp_path / "test2017" / "a.png", (40, 30), 0)
    assert split_names(tmp_path / "field_test_images") == ["train"]
    assert split_names(tmp_path / "test2017") == ["test"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("0 0.5 0.5 0.2", "expected 'class centre_x centre_y width height', got '0 0.5 0.5 0.2'"),
        ("cat 0.5 0.5 0.2 0.2", "each value must be a number, got 'cat'"),
        ("0 20 15 8 6", "must be relative to the size of the image, from 0 to 1, got 20 15 8 6"),
        ("3 0.5 0.5 0.2 0.2", r"unknown class 3, expected 0 to 2 \(cat, dog, owl\)"),
        ("0 0.5 0.5 0.2 0.2 0.9", "six values, expected five: a detection with its score, or a track with its number"),
        ("0 0.5 0.5 0.2 nan", "each value must be a number, got 'nan'"),
        ("0 0.5 0.5 0.2 0.2 0.4 0.4 2 0.6 0.6 1", "got 2 in a polygon. Of key points data.yaml must give"),
    ],
)
def test_wrong_lines_of_yolo(tmp_path, line, message):
    yolo_ultralytics(tmp_path)
    write_text(tmp_path / "labels" / "train" / "t1.txt", f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=f"t1.txt, line 2: .*{message}"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_what_yolo_does_not_use_is_told(tmp_path, caplog):
    yolo_names(tmp_path / "yolo")
    labels = tmp_path / "yolo" / "labels" / "train"
    (labels / "t0.txt").rename(labels / "t0_old.txt")
    write_text(labels / "classes.txt", "\n".join(NAMES))
    dataset = load_dataset_source(tmp_path / "yolo", "train", labels=True, image_dir=tmp_path)
    assert [len(row["objects"]["bbox"]) for row in dataset] == [0, 1, 0]
    unused = f"1 label files are not used, there is no image of that name (e.g. {labels / 't0_old.txt'})"
    assert unused in caplog.text and "image_dir has no effect" in caplog.text
    write_text(tmp_path / "README.md", "mine")
    with pytest.raises(
        DataError, match="no data.yaml in it, but further down there is .*yolo/data.yaml. Give that file"
    ):
        load_dataset_source(tmp_path, labels=True)
    write_text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1")
    with pytest.raises(DataError, match="there is no image in it, and no label file that names some is recognised"):
        load_dataset_source(tmp_path / "labels", labels=True)


@pytest.mark.parametrize(("layout", "images"), [(yolo_ultralytics, "images/train"), (voc_challenge, "JPEGImages")])
def test_images_that_are_links_to_elsewhere_are_told(tmp_path, caplog, layout, images):
    layout(tmp_path / "mine")
    image = tmp_path / "mine" / images / "t0.png"
    image.rename(tmp_path / "t0.png")
    image.symlink_to(tmp_path / "t0.png")
    with contextlib.suppress(DataError):
        assert len(load_dataset_source(tmp_path / "mine", "train", labels=True)) == 2
        assert "left out: 1 (a link to a file outside the folder: give the folder of that file): " in caplog.text
        assert "label files are not used" not in caplog.text
        write_text(tmp_path / "mine/labels/val/t0.txt", "0 0.5 0.5 0.1 0.1")  # of the name of a link elsewhere
        load_dataset_source(tmp_path / "mine", "train", labels=True)
        assert "1 label files are not used, there is no image of that name" in caplog.text
        return
    with pytest.raises(DataError, match=r"t0.xml: the image .*t0.png is not opened: a link to a file outside"):
        load_dataset_source(tmp_path / "mine", "train", labels=True)


def test_the_number_of_classes_of_yolo(tmp_path):
    yolo_ultralytics(tmp_path)
    text = (tmp_path / "dataset.yaml").read_text()
    write_text(tmp_path / "dataset.yaml", f"{text}\nnc: 4\n")
    with pytest.raises(DataError, match="dataset.yaml: 'nc' is 4, but there are 3 names: correct one of the two"):
        load_dataset_source(tmp_path, "train", labels=True)
    write_text(tmp_path / "dataset.yaml", f"{text}\nnc: '3'\n")
    assert category_names(load_dataset_source(tmp_path, "train", labels=True)) == list(NAMES)
    write_text(tmp_path / "dataset.yaml", "train: images/train\nval: images/val\nnc: 4\n")
    assert category_names(load_dataset_source(tmp_path, "train", labels=True)) == ["0", "1", "2", "3"]
    (tmp_path / "dataset.yaml").rename(tmp_path / "training.yaml")  # anything may have an `nc`
    assert category_names(load_dataset_source(tmp_path, "train", labels=True)) == ["0", "1", "2"]


def test_key_points_of_yolo_follow_the_box(tmp_path):
    yolo_ultralytics(tmp_path)
    with open(tmp_path / "dataset.yaml", "a") as file:
        file.write("kpt_shape: [2, 3]\n")
    write_text(tmp_path / "labels" / "train" / "t0.txt", "1 0.5 0.5 0.5 0.2 0.1 0.1 2 0.9 0.9 2\n")
    assert load_dataset_source(tmp_path, "train")[0]["objects"]["bbox"] == [[10, 12, 20, 6]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "iso-8859-1"])
@pytest.mark.parametrize("name", ["labels.json", "labels.xml", "labels.csv", "classes.txt", "metadata.jsonl"])
def test_label_files_in_other_encodings(tmp_path, name, encoding):
    write_image(tmp_path / "a.png", (64, 48), 0)
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "café"}]}
    coco["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>6</ymax></bndbox>"
    text = {
        "labels.json": json.dumps(coco, ensure_ascii=False),
        "labels.xml": f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n<annotation><filename>a.png'
        f"</filename><object><name>café</name>{box}</object></annotation>",
        "labels.csv": "image,class,xmin,ymin,xmax,ymax\na.png,café,1,2,4,6\n",
        "classes.txt": "café\n",
        "metadata.jsonl": '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": ["café"]}}\n',
    }[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    if name == "classes.txt":
        (tmp_path / "a.txt").write_bytes(f"0 {2.5 / 64} {4 / 48} {3 / 64} {4 / 48}\n".encode(encoding))
    if encoding == "iso-8859-1" and name != "labels.xml":  # nothing says what it is
        with pytest.raises(DataError, match=f"{name}: not a text in UTF-8 .* Save it in UTF-8"):
            load_dataset_source(tmp_path)
        return
    dataset = load_dataset_source(tmp_path)
    assert np.allclose(dataset[0]["objects"]["bbox"], [[1, 2, 3, 4]])
    assert category_names(dataset) == ["café"]


@pytest.mark.parametrize(
    "image, labels", [("Images/Train/a.JPG", "Labels/Train/a.TXT"), ("Train/Images/a.JPG", "Train/Labels/a.TXT"),
    ("images/Train/a.Jpeg", "Labels/train/a.txt"), ("TRAIN/a.PNG", "TRAIN/a.xml"),
    ("Train/a.JPG", "Train_labels.csv"), ("Images/Train/a.JPG", "Annotations/Train.json")],
)  # fmt: skip
def test_folders_of_splits_in_capitals(tmp_path, image, labels):
    texts = {
        ".txt": f"0 {2.5 / 64} {4 / 48} {3 / 64} {4 / 48}\n",
        ".xml": "<annotation><object><name>0</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>6</ymax>"
        "</bndbox></object></annotation>",
        ".csv": f"filename,class,xmin,ymin,xmax,ymax\n{image.rpartition('/')[2]},0,1,2,4,6\n",
        ".json": json.dumps({"images": [{"id": 1, "file_name": "a.JPG"}], "categories": [{"id": 1, "name": "0"}]
        , "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}),
    }  # fmt: skip
    for split in ("train", "test"):
        names = [
            name.replace("Train", split.title()).replace("TRAIN", split.upper()).replace("train", split)
            for name in (image, labels)
        ]
        (tmp_path / names[0]).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / names[0], (64, 48), 0)
        write_text(tmp_path / names[1], texts[os.path.splitext(labels)[1].lower()])
    assert split_names(tmp_path) == ["test", "train"]
    for split in ("train", "test"):
        (row,) = load_dataset_source(tmp_path, split)
        assert f"/{split}" in row["image"]["path"].lower()
        assert np.allclose(row["objects"]["bbox"], [[1, 2, 3, 4]])


def test_labels_of_yolo_in_capitals(tmp_path):
    yolo_ultralytics(tmp_path)
    file = tmp_path / "labels" / "train" / "t0.txt"
    file.rename(file.with_suffix(".TXT"))
    dataset = load_dataset_source(tmp_path, "train", labels=True)
    np.testing.assert_allclose(dataset[0]["objects"]["bbox"], boxes_of(SCENES["train"][0][1]), atol=1e-5)


def test_a_yaml_file_is_a_source(tmp_path):
    yolo_ultralytics(tmp_path)
    assert len(load_dataset_source(tmp_path / "dataset.yaml", "validation", labels=True)) == 2


def test_splits_of_yolo_that_name_the_classes_differently(tmp_path):
    yolo_supervision(tmp_path)
    write_text(tmp_path / "valid/data.yaml", f"names: {NAMES[::-1]}\nnc: 3\n")
    with pytest.raises(DataError, match="train/data.yaml and .*valid/data.yaml name the classes differently"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_images_without_names_or_labels_of_yolo(tmp_path, caplog):
    """Without `data.yaml`: numbers for names, as far as those of all splits; no label file means no object."""
    for split, name in (("train", "train"), ("validation", "val")):
        write_yolo(tmp_path / "images" / name, tmp_path / "labels" / name, split)
    dataset = load_dataset_source(tmp_path, "validation", labels=True)
    assert category_names(dataset) == ["0", "1", "2"]
    assert "no data.yaml or classes.txt names the classes" in caplog.text
    (tmp_path / "labels" / "val" / "v0.txt").unlink()
    assert load_dataset_source(tmp_path, "validation", labels=True)[0]["objects"]["bbox"] == []


@pytest.mark.parametrize("source", ["yolo", "nc", "metadata of two splits", "metadata of one", "Hub"])
def test_a_broken_number_of_a_category_makes_no_billion_names(tmp_path, source):
    large, where = 3_000_000_000, str(tmp_path)
    if source in ("yolo", "nc"):
        write_yolo(tmp_path / "images" / "train", tmp_path / "labels" / "train", "train")
        if source == "yolo":
            write_text(tmp_path / "labels" / "train" / "t1.txt", f"{large} 0.5 0.5 0.1 0.1\n")
            where = "t1.txt, line 1"
        else:
            write_text(tmp_path / "data.yaml", f"train: images/train\nnc: {large + 1}\n")
            where = "data.yaml, 'nc'"
    rows = [{"file_name": "t0.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [large]}}]
    for split in {"metadata of two splits": ["train", "validation"], "metadata of one": ["train"]}.get(source, []):
        write_image(tmp_path / split / "t0.png", (40, 30), 0)
        write_text(tmp_path / split / "metadata.jsonl", json.dumps(rows[0]))
    if source == "Hub":
        part = datasets.Dataset.from_list([{"objects": rows[0]["objects"]}])
        datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=f"{re.escape(where)}.*: the number {large} of a category without a name"):
        category_names(load_dataset_source(tmp_path, "train", labels=True), tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<xmin>5</xmin>", "", "t0.xml, object 0: expected a 'xmin' in 'bndbox'"),
        ("<xmin>5</xmin>", "<xmin>five</xmin>", "t0.xml, object 0: 'xmin' must be a number, got 'five'"),
        ("<name>cat</name>", "<name/>", "t0.xml, object 0: expected a 'name' in 'object'"),
        ("</annotation>", "", "t0.xml: not valid XML"),
        ("<annotation>", '<!DOCTYPE x [<!ENTITY a "b">]><annotation>', "t0.xml: it defines XML entities"),
    ],
)
def test_wrong_files_of_voc(tmp_path, old, new, message):
    voc_challenge(tmp_path)
    path = tmp_path / "Annotations" / "t0.xml"
    write_text(path, path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_dataset_source(tmp_path, "train", labels=True)


def test_empty_file_of_voc_is_no_missing_one(tmp_path):
    voc_labelimg(tmp_path)
    (tmp_path / "notes.xml").write_text("")
    assert len(load_dataset_source(tmp_path, "train", labels=True)) == 3
    (tmp_path / "train" / "t2.xml").write_text("")
    with pytest.raises(DataError, match="t2.xml: not valid XML"):
        load_dataset_source(tmp_path, "train", labels=True)


def test_difficult_objects_and_images_without_labels_are_told(tmp_path, caplog):
    voc_labelimg(tmp_path)
    path = tmp_path / "train" / "t0.xml"
    write_text(path, path.read_text().replace("<difficult>0", "<difficult>1"))
    (tmp_path / "train" / "t2.xml").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(tmp_path, "train", labels=True)
    assert len(dataset) == 2 and len(dataset[0]["objects"]["bbox"]) == 2
    assert "2 objects are marked as difficult" in caplog.text
    assert "1 images are left out, they have no XML file (e.g. t2.png)" in caplog.text


def test_circles_and_points_of_labelme(tmp_path, caplog):
    write_image(tmp_path / "a.png", (40, 30), 0)
    shapes = [
        {"label": "ball", "shape_type": "circle", "points": [[20, 15], [23, 19]]},
        {"label": "spot", "shape_type": "point", "points": [[1, 1]]},
        {"label": "ball", "shape_type": "mask", "points": [[5, 9], [2, 3]], "mask": "of 4 x 7 pixels"},
    ]
    write_text(tmp_path / "a.json", {"shapes": shapes, "imagePath": "a.png", "imageData": None})
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(tmp_path, labels=True)
    assert category_names(dataset) == ["ball"]
    assert dataset[0]["objects"]["bbox"] == [[15, 10, 10, 10], [2, 3, 4, 7]]
    assert "1 points, lines or brushed masks are left out" in caplog.text


def test_parts_of_one_object_of_labelme(tmp_path):
    write_image(tmp_path / "a.png", (40, 30), 0)
    shapes = [
        {"label": "cat", "shape_type": "polygon", "points": [[2, 3], [6, 3], [6, 9]], "group_id": 1},
        {"label": "dog", "shape_type": "rectangle", "points": [[1, 1], [5, 5]], "group_id": 1},
        {"label": "cat", "shape_type": "rectangle", "points": [[20, 12], [10, 20]], "group_id": 1},
        {"label": "cat", "shape_type": "point", "points": [[30, 1]], "group_id": 1},
        {"label": "dog", "shape_type": "rectangle", "points": [[1, 1], [5, 5]], "group_id": None},
        {"label": "dog", "shape_type": "mask", "points": [[5, 9], [2, 3]], "group_id": 0},
        {"label": "dog", "shape_type": "mask", "points": [[9, 9], [8, 3]], "group_id": 0},
    ]
    write_text(tmp_path / "a.json", {"shapes": shapes, "imagePath": "a.png", "imageData": None})
    objects = load_dataset_source(tmp_path, labels=True)[0]["objects"]
    assert objects["bbox"] == [[2, 3, 18, 17], [1, 1, 4, 4], [1, 1, 4, 4], [2, 3, 8, 7]]
    assert objects["category"] == [0, 1, 1, 1]
    assert json.loads(objects["segmentation"][0]) == [[2, 3, 6, 3, 6, 9], [20, 12, 10, 12, 10, 20, 20, 20]]


def test_turned_boxes_of_cvat_in_coco_and_pascal_voc(tmp_path):
    """There they are written as they were before they were turned, with the angle as an attribute."""
    write_image(tmp_path / "coco/images/default/a.png", (40, 30), 0)
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [10, 12, 10, 4], "area": 40.0, "iscrowd": 0} | more
        for number, more in enumerate(
            [
                {"segmentation": [], "attributes": {"occluded": False, "rotation": 90.0}},
                {"segmentation": [], "attributes": {"occluded": False, "rotation": 0.0}},
                {"segmentation": [[10, 12, 20, 12, 20, 16]], "attributes": {"rotation": 90.0}},
                {"segmentation": [], "attributes": {"rotation": "strong"}},
                {"segmentation": [], "attributes": ["rotation"]},
            ]
        )
    ]
    images, categories = [{"id": 1, "file_name": "a.png"}], [{"id": 1, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_text(tmp_path / "coco/annotations/instances_default.json", content)
    boxes = load_dataset_source(tmp_path / "coco", labels=True)[0]["objects"]["bbox"]
    np.testing.assert_allclose(boxes, [[13, 9, 4, 10], *[[10, 12, 10, 4]] * 4], atol=1e-9)

    write_image(tmp_path / "voc/JPEGImages/a.png", (40, 30), 0)
    attribute = "<attribute><name>rotation</name><value>{}</value></attribute>"
    text = voc_xml("a", (40, 30), [([10, 12, 10, 4], 0)])
    for value, box in (("90.0", [13, 9, 4, 10]), ("0.0", [10, 12, 10, 4])):
        other = "<attribute><name>x</name><value>y</value></attribute>"
        attributes = f"</bndbox><attributes>{other}{attribute.format(value)}</attributes>"
        write_text(tmp_path / "voc/Annotations/a.xml", text.replace("</bndbox>", attributes))
        boxes = load_dataset_source(tmp_path / "voc", labels=True)[0]["objects"]["bbox"]
        np.testing.assert_allclose(boxes, [box], atol=1e-9)


def test_turned_boxes_and_other_shapes_of_cvat(tmp_path, caplog):
    write_image(tmp_path / "images" / "a.png", (40, 30), 0)
    shapes = '<box label="cat" xtl="10" ytl="12" xbr="20" ybr="16" rotation="90"/><points label="cat" points="1,1"/>'
    shapes += '<ellipse label="dog" cx="20" cy="15" rx="6" ry="4"/>'
    shapes += '<ellipse label="dog" cx="20" cy="15" rx="6" ry="4" rotation="90.00"/>'
    shapes += '<mask label="dog" left="1" top="2" width="3" height="4"/>'
    write_text(tmp_path / "annotations.xml", f'<annotations><image id="7" name="a.png">{shapes}</image></annotations>')
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset_source(tmp_path, labels=True)
    boxes = [[13, 9, 4, 10], [14, 11, 12, 8], [16, 9, 8, 12], [1, 2, 3, 4]]
    np.testing.assert_allclose(dataset[0]["objects"]["bbox"], boxes, atol=1e-9)
    assert list(dataset["image_id"]) == [7] and category_names(dataset) == ["cat", "dog"]
    assert "left out, for they have no box: 1 points" in caplog.text
    for rotation in ("x", "1e400"):
        box = f'<box label="cat" xtl="10" ytl="12" xbr="20" ybr="16" rotation="{rotation}"/>'
        write_text(
            tmp_path / "annotations.xml", f'<annotations><image id="7" name="a.png">{box}</image></annotations>'
        )
        with pytest.raises(DataError, match=f"a.png.*'rotation' must be a number, got '{rotation}'"):
            load_dataset_source(tmp_path, labels=True)
    bird = "<label><name>bird</name><type>skeleton</type></label><label><name>1</name><parent>bird</parent></label>"
    meta = f"<meta><job><labels><label><name>cat</name></label>{bird}</labels></job></meta>"
    box = '<box label="cat" xtl="10" ytl="12" xbr="20" ybr="16"/>'
    write_text(tmp_path / "annotations.xml", f'<annotations>{meta}<image name="a.png">{box}</image></annotations>')
    assert category_names(load_dataset_source(tmp_path, labels=True)) == ["cat", "bird"]  # no key points
    write_text(tmp_path / "annotations.xml", '<annotations><track id="0" label="cat"/></annotations>')
    with pytest.raises(DataError, match="tracks of a video"):
        load_dataset_source(tmp_path, labels=True)


@pytest.mark.parametrize(
    "name",
    [
        "/home/bob/mine/images/one a.png",
        "https://data.example/x/one a.png",
        "C:\\mine\\one a.png",
        "one%20a.png",
        "https://data.example/x/one%20a.png?key=1/2",
    ],
)
def test_file_names_of_other_machines_in_coco(tmp_path, name):
    write_image(tmp_path / "images" / "one a.png", (40, 30), 0)
    outline = [[2, 3, 12, 3, 12, 20]]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": outline}  # its box is the polygon's
    content = {"images": [{"id": 1, "file_name": name}], "categories": [{"id": 1, "name": "cat"}]}
    write_text(tmp_path / "labels.json", content | {"annotations": [annotation]})
    dataset = load_dataset_source(tmp_path, labels=True)
    assert dataset[0]["objects"]["bbox"] == [[2, 3, 10, 17]] and dataset[0]["file_name"] == name
    assert dataset[0]["image"]["path"] == str(tmp_path / "images" / "one a.png")


def test_voc_with_a_namespace_and_file_names_of_other_machines(tmp_path):
    for folder in ("train", "valid"):  # with the same names, as Oxford's pets have them
        write_image(tmp_path / folder / "images" / "a.jpg", (40, 30), 0)
        xml = voc_xml("a", (40, 30), [([1, 2, 3, 4], 0)]).replace("a.png", "C:\\Users\\bob\\a.png")
        write_text(
            tmp_path / folder / "annotations" / "xmls" / "a.xml",
            xml.replace("<annotation>", '<annotation xmlns="http://data.example">'),
        )
    for split, folder in (("train", "train"), ("validation", "valid")):
        dataset = load_dataset_source(tmp_path, split, labels=True)
        assert dataset[0]["image"]["path"] == str(tmp_path / folder / "images" / "a.jpg")
        assert dataset[0]["objects"]["bbox"] == [[1, 2, 3, 4]] and category_names(dataset) == ["cat"]


def test_names_of_yolo_with_numbers_as_texts(tmp_path):
    yolo_ultralytics(tmp_path)
    names = "".join(f"\n  '{number}': {name}" for number, name in enumerate(NAMES))
    write_text(tmp_path / "dataset.yaml", f"train: images/train\nval: images/val\nnames:{names}\n")
    assert category_names(load_dataset_source(tmp_path, "train", labels=True)) == NAMES


def test_a_split_without_labels_beside_one_with_metadata(tmp_path):
    LAYOUTS["metadata, names"](tmp_path)
    write_image(tmp_path / "test" / "a.png", (40, 30), 0)
    with pytest.raises(DataError, match="no column 'objects'; found 'image'"):
        load_dataset_source(tmp_path, "test", labels=True)


# ---- spellings of data sets that are saved or on the Hub ----


def saved(folder, **splits):
    data = {}
    for split, objects in splits.items():
        column = next(iter(objects))
        images = [PIL.Image.new("RGB", (40, 30))] * len(objects[column])
        data[split] = datasets.Dataset.from_dict({"image": images} | objects)
    datasets.DatasetDict(data).save_to_disk(folder)
    return folder


BOXES = [[[1, 2, 3, 4], [5, 6, 7, 8]], [], [[2, 2, 9, 9]]]


@pytest.mark.parametrize(
    "column, objects, names",
    [
        ("objects", lambda labels: {"bbox": BOXES, "categories": labels}, ["0", "1", "2"]),
        ("annotations", lambda labels: {"bboxes": BOXES, "label": labels}, ["0", "1", "2"]),
        ("objects", lambda labels: {"boxes": BOXES, "labels": [[f"c{k}" for k in one] for one in labels]}, None),
        (
            "objects",
            lambda labels: {
                "bbox": BOXES,
                "category_id": labels,
                "category_name": [[f"c{k}" for k in one] for one in labels],
            },
            None,
        ),
        ("objects", None, ["0", "1", "2"]),
    ],
    ids=["categories", "annotations", "names", "names beside numbers", "list of dictionaries"],
)
def test_spellings_of_objects(tmp_path, column, objects, names):
    """Of two splits, the second without the last class: the names are those of both."""
    splits = {}
    for split, labels in (("train", [[2, 0], [], [1]]), ("validation", [[0, 1], [], [1]])):
        if objects is None:
            rows = [
                [{"bbox": box, "category": label} for box, label in zip(boxes, own, strict=True)]
                for boxes, own in zip(BOXES, labels, strict=True)
            ]
        else:
            fields = objects(labels)
            rows = [dict(zip(fields, one, strict=True)) for one in zip(*fields.values(), strict=True)]
        splits[split] = {column: rows}
    folder = saved(tmp_path / "saved", **splits)
    for split, expected in (("train", [[2, 0], [], [1]]), ("validation", [[0, 1], [], [1]])):
        dataset = load_dataset_source(folder, split, labels=True)
        assert category_names(dataset) == (names or ["c0", "c1", "c2"])
        assert [row["objects"]["category"] for row in dataset] == expected
        assert [row["objects"]["bbox"] for row in dataset] == BOXES
        assert validate_objects(dataset, category_names(dataset)).boxes == 3


@pytest.mark.parametrize("labels", [[[2, 0], [], [1]], [["c", "a"], [], ["b"]]], ids=["numbers", "names"])
@pytest.mark.parametrize("kind", ["saved", "metadata.jsonl", "metadata.csv"])
def test_lists_beside_the_image_are_objects(tmp_path, kind, labels):
    """Boxes and labels in columns of their own, beside an id and a text that are none of theirs."""
    folder, columns = tmp_path / "data", {"bboxes": BOXES, "label": labels, "id": [7, 8, 9], "note": ["[a"] * 3}
    if kind == "saved":
        images = [PIL.Image.new("RGB", (40, 30))] * 3
        datasets.Dataset.from_dict({"image": images} | columns).save_to_disk(folder)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for number, row in enumerate(rows):
            write_image(folder / f"{number}.png", (40, 30), number)
            row["file_name"] = f"{number}.png"
        if kind == "metadata.csv":
            with open(folder / kind, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            write_text(folder / kind, "\n".join(map(json.dumps, rows)))
    dataset = load_dataset_source(folder, labels=True)
    assert [row["objects"]["bbox"] for row in dataset] == BOXES
    assert [row["objects"]["category"] for row in dataset] == [[2, 0], [], [1]]
    assert category_names(dataset) == (["a", "b", "c"] if labels[0] == ["c", "a"] else ["0", "1", "2"])


def test_a_category_that_is_null_is_named(tmp_path):
    rows = [{"bbox": [[1, 2, 3, 4]], "category": [0]}, {"bbox": [[1, 2, 3, 4]] * 2, "category": [1, None]}]
    dataset = load_dataset_source(saved(tmp_path / "saved", train={"objects": rows}))
    with pytest.raises(
        DataError, match="mine, row 1, column 'objects': a category is null or infinite, expected a number."
    ):
        category_names(dataset, "mine")


def test_selected_rows_keep_their_objects(tmp_path):
    """The lists of a slice do not start where the values do."""
    rows = [[{"bbox": box, "label": f"c{number}"} for box in boxes] for number, boxes in enumerate(BOXES)]
    images = [PIL.Image.new("RGB", (40, 30))] * 3
    dataset = datasets.Dataset.from_dict({"image": images, "annotations": rows}).select([2, 0])
    dataset.save_to_disk(tmp_path / "saved")
    loaded = load_dataset_source(tmp_path / "saved", labels=True)
    assert [row["objects"] for row in loaded] == [
        {"bbox": BOXES[2], "category": [1]}, {"bbox": BOXES[0], "category": [0, 0]},
    ]  # fmt: skip


# ---- nothing outside the folder is read ----


def swap(path, old, new):
    text = path.read_text()
    assert old in text
    write_text(path, text.replace(old, new))


def link(path, target):
    path.unlink()
    path.symlink_to(target)


ESCAPES = {
    "coco": (coco_original, lambda root, name: swap(root / "annotations/instances_train2017.json", "t0.png", name)),
    "coco, ../": (
        coco_up_and_over,
        lambda root, name: swap(root / "annotations/train.json", "../pictures/train/t0.png", f"../{name}"),
    ),
    "yolo, list": (yolo_lists, lambda root, name: swap(root / "train.txt", "/home/bob/mine/images/t0.png", name)),
    "yolo, data.yaml": (
        yolo_ultralytics,
        lambda root, name: swap(root / "dataset.yaml", "train: images/train", f"train: {name}"),
    ),
    "voc": (voc_labelimg, lambda root, name: swap(root / "train/t0.xml", "<filename>t0.png", f"<filename>{name}")),
    "labelme": (labelme, lambda root, name: swap(root / "train/t0.json", "..\\\\elsewhere\\\\t0.png", name)),
    "cvat": (cvat, lambda root, name: swap(root / "annotations.xml", '"t0.png"', f'"{name}"')),
    "table": (table_without_names, lambda root, name: swap(root / "train.csv", "images/t0.png", name)),
    "json": (create_ml, lambda root, name: swap(root / "train/_annotations.createml.json", "t0.png", name)),
    "metadata": (
        LAYOUTS["metadata, names"],
        lambda root, name: swap(root / "training/metadata.jsonl", "t0.png", name),
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", ["relative", "absolute", "link"])
@pytest.mark.parametrize("layout", ESCAPES)
def test_images_elsewhere_are_not_read(tmp_path, layout, place):
    """A label file that somebody else made may name any file; those of other machines are looked for in the folder."""
    root = tmp_path / "mine"
    write_layout, point_to = ESCAPES[layout]
    write_layout(root)
    write_image(tmp_path / "secret.png", (40, 30), 200)
    if place == "link":
        link(next(root.rglob("t0.png")), tmp_path / "secret.png")
    else:
        point_to(root, "../" * 3 + "secret.png" if place == "relative" else str(tmp_path / "secret.png"))
    try:
        dataset = load_dataset_source(root, "train")
    except DataError as error:
        assert "secret.png" in str(error) or "t0" in str(error)
    else:
        shown = [int(decode_image(row["image"])[0, 0, 0]) for row in dataset]
        assert 200 not in shown and len(shown) >= 2


@pytest.mark.parametrize(
    "layout, name",
    [
        ("coco, original", "train2017"),
        ("coco, CVAT", "images"),
        ("yolo, Ultralytics", "images/train"),
        ("yolo, Roboflow", "train/images"),
        ("yolo, beside", "train"),
        ("voc, challenge", "JPEGImages"),
        ("labelme", "train"),
        ("cvat", "images"),
        ("json, Supervisely", "train/img"),
        ("kitti", "training/image_2"),
        ("metadata, names", "training"),
    ],
)
def test_links_to_folders_elsewhere_are_not_followed(tmp_path, layout, name):
    LAYOUTS[layout](tmp_path / "mine")
    (tmp_path / "mine" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "mine" / name).symlink_to(tmp_path / "elsewhere")
    try:
        dataset = load_dataset_source(tmp_path / "mine", "train")
    except DataError:
        return
    assert not any("elsewhere" in os.path.realpath(row["image"]["path"]) for row in dataset)


@pytest.mark.parametrize(
    "write_layout, name",
    [
        (coco_original, "annotations/instances_train2017.json"),
        (yolo_ultralytics, "labels/train/t0.txt"),
        (yolo_ultralytics, "dataset.yaml"),
        (yolo_lists, "train.txt"),
        (yolo_beside, "classes.txt"),
        (voc_challenge, "Annotations/t0.xml"),
        (voc_challenge, "ImageSets/Main/train.txt"),
        (labelme, "train/t0.json"),
        (cvat, "annotations.xml"),
        (create_ml, "train/_annotations.createml.json"),
        (table_without_names, "train.csv"),
        (kitti, "training/label_2/t0.txt"),
        (LAYOUTS["metadata, names"], "training/metadata.jsonl"),
        (LAYOUTS["metadata, names"], "labels.json"),
    ],
)
def test_label_files_elsewhere_are_not_read(tmp_path, write_layout, name):
    """A link to a file outside: whatever is done without it, nothing of its content is told or used."""
    write_layout(tmp_path / "mine")
    path = tmp_path / "mine" / name
    secret = tmp_path / "secret"
    secret.write_text(f"top secret {path.read_text()}" if path.suffix == ".txt" else path.read_text())
    if path.suffix != ".txt":
        swap(
            secret, {"labels.json": "owl"}.get(path.name, "dog" if "dog" in secret.read_text() else "t0"), "top secret"
        )
    link(path, secret)
    try:
        dataset = load_dataset_source(tmp_path / "mine", "train")
        text = str(dataset.to_list()) + str(dataset.features)
    except DataError as error:
        text = str(error)
    assert "top secret" not in text


def test_metadata_of_another_box_format_or_with_an_image_twice(tmp_path, caplog):
    write_image(tmp_path / "a.png", (40, 30), 0)
    row = {"image": "a.png", "objects": {"bbox": [[1, 2, 30, 20]], "category": [0]}}
    write_text(tmp_path / "metadata.jsonl", json.dumps(row) + "\n" + json.dumps(row))
    assert len(load_dataset_source(tmp_path)) == 2
    assert "1 images are listed more than once" in caplog.text
    write_text(tmp_path / "metadata.jsonl", json.dumps(row | {"bbox_format": "xyxy"}))
    with pytest.raises(DataError, match="metadata.jsonl, line 1: by 'bbox_format' the boxes are 'xyxy', expected"):
        load_dataset_source(tmp_path)


def test_images_of_a_coco_file_whose_first_word_is_the_split(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "a.png", (40, 30), 0)
        content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cat"}]}
        content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]
        write_text(tmp_path / "annotations" / f"{split}_annotations.json", content)
    (row,) = load_dataset_source(tmp_path, "validation")
    assert row["image"]["path"] == str(tmp_path / "val" / "a.png")


def test_cells_without_a_number(tmp_path):
    write_image(tmp_path / "a.png", (40, 30), 0)
    write_text(tmp_path / "labels.csv", "image,label,xmin,ymin,xmax,ymax\na.png,,nan,NaN,nan,nan\na.png,cat,1,2,4,6\n")
    assert load_dataset_source(tmp_path)[0]["objects"]["bbox"] == [[1, 2, 3, 4]]


def test_a_split_without_images(tmp_path):
    write_image(tmp_path / "images" / "train" / "a.png", (40, 30), 0)
    write_text(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "images" / "val").mkdir()
    write_text(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")
    with pytest.raises(DataError, match="there is no image in it, split 'validation'"):
        load_dataset_source(tmp_path, "validation", labels=True)


@pytest.mark.parametrize("header", ["x_center,y_center,width,height", "cx,cy,w,h"])
def test_tables_with_centres(tmp_path, header):
    write_image(tmp_path / "a.png", (40, 30), 0)
    for row, boxes in (("20,15,10,8", [[15, 11, 10, 8]]), ("0.5,0.5,0.25,0.2", [[15, 12, 10, 6]])):
        write_text(tmp_path / "labels.csv", f"image,label,{header}\na.png,cat,{row}\n")
        assert np.allclose(load_dataset_source(tmp_path)[0]["objects"]["bbox"], boxes)
