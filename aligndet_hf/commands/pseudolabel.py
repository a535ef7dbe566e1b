"""`aligndet pseudolabel`: what a teacher finds in unlabelled images, as labels for a student."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..arguments import (
    InferenceArguments,
    LabelledArguments,
    LabelShareArguments,
    ReadyDetectorArguments,
    RunArguments,
    again,
    is_trained,
)
from ..data.arrow_boxes import read_boxes, read_values, usable_boxes
from ..data.bit_depth import pixel_window, record_pixel_window, saved_window
from ..data.door import image_digest
from ..data.errors import DataError
from ..data.formats import category_names, load_dataset_source, load_labelled
from ..data.images import decode_image
from ..data.launch import Launch
from ..data.shards import content_hash, data_folder, save_split
from ..data.splits import is_same_split, nested_subsets
from ..detectors.build import build_detector, find_detector, open_detector
from ..evaluation.box_features import BoxFeatures
from ..evaluation.detections import match_categories
from ..evaluation.pseudo_labels import check_classes, crop_features, suppress
from ..files import read_json, write_json
from ..flags import flag, local_paths, names_of, takes_arguments
from ..processes import device_of
from ..proposals.clusters import match_labels
from ..ranges import COUNT, SHARE
from ..reporting.predictions import write_sheet
from ..reporting.run_record import SETTINGS
from ..runs import RunFolder
from ..training.start import start_hashes
from .predict import PredictArguments, _identity, predict

REPORT, SHEET = "pseudolabel.json", "pseudolabel.jpg"
_SHEET_NOTE = (
    "solid: labels, with class and score; dashed, with a question mark: left out of account in training, neither "
    "object nor background"
)


@dataclass(kw_only=True)
class PseudolabelArguments(
    RunArguments, InferenceArguments, LabelShareArguments, LabelledArguments, ReadyDetectorArguments
):
    """Arguments of [`pseudolabel`]: the flags of `aligndet pseudolabel` and the keys of its recipes."""

    help_groups = {
        "labelled_dataset": "Data",
        "score_threshold": "Which boxes to keep",
        "class_check": "Are their classes right?",
        "num_pictures": "Output",
    }

    detector: str = again(
        ReadyDetectorArguments,
        "detector",
        help="folder, published file or Hub id of the teacher: a fine-tuned detector",
    )
    dataset: str = again(
        LabelledArguments, "dataset", help="unlabelled images: folder, label file or Hub id; labels are not used"
    )
    split: str | None = again(LabelledArguments, "split", default="train", help="split of the dataset")
    labelled_dataset: str | None = flag(None, "data", "what the teacher learned from; `dataset` if not given")
    labelled_split: str = flag("train", "data", "its split")
    labelled_image_dir: str | None = flag(None, "data", "as image_dir, of labelled_dataset", is_path=True)
    label_fraction: float = again(
        LabelShareArguments, "label_fraction", help="share of labelled_dataset that the teacher learned from"
    )

    score_threshold: float = flag(0.5, "result", "make labels of boxes with at least this score", range=SHARE)
    ignore_threshold: float = flag(
        0.2,
        "result",
        "leave boxes from this score on out of account: they are neither object nor background",
        range=SHARE,
    )
    nms_threshold: float = flag(
        0.6, "result", "drop a box that overlaps a better one by more (IoU), whatever their classes", range=SHARE
    )

    class_check: Literal["neighbours", "none"] = flag(
        "neighbours",
        "result",
        "`neighbours`: keep a box only where the nearest labelled object and label spreading agree on its class, in "
        "features of a frozen backbone; `none`: believe the teacher",
    )
    backbone: str | None = flag(
        None,
        "start",
        "that backbone: a timm name, or a folder, whose weights come with it; the teacher's own if not given",
    )
    backbone_weights: str | None = flag(None, "start", "its weights")

    shuffle_classes: bool = flag(
        False, "result", "as a control, deal the classes out at random among the boxes that are labels"
    )

    output_dir: str = again(
        RunArguments, "output_dir", help="folder for the data set of images with pseudo-labels, and the report"
    )
    num_pictures: int = flag(24, "output", "put this many images on the sheet of pictures", range=COUNT)

    def __post_init__(self):
        super().__post_init__()
        if self.ignore_threshold > self.score_threshold:
            raise ValueError(
                f"ignore_threshold must be at most score_threshold, got {self.ignore_threshold} and "
                f"{self.score_threshold}: give both"
            )
        is_complete = self.backbone and is_trained(self.backbone, self.backbone_weights)
        if self.class_check == "neighbours" and (self.backbone or self.backbone_weights) and not is_complete:
            raise ValueError(
                "--class_check neighbours needs both --backbone and --backbone_weights, or neither for the teacher's "
                "own backbone: random features tell no classes apart"
            )
        if self.labelled_dataset is None:
            self.labelled_dataset, self.labelled_split = self.dataset, self.split
            self.labelled_image_dir = self.image_dir


@takes_arguments
def pseudolabel(arguments: PseudolabelArguments) -> datasets.Dataset:
    """
    Labels images with the boxes of a teacher, for `aligndet finetune --pseudo_dataset`.

    Images that the teacher learned from are left out: their labels are better than its boxes. An image without any
    label is left out too. A killed run continues with the same command.

    Args:
        arguments ([`PseudolabelArguments`]): The configuration.

    Returns:
        `datasets.Dataset`: the images with `objects`: `bbox` (absolute xywh), `category`, `score`, `ignore` (1 for
        boxes that are neither objects nor background) and `source` ("teacher", or "neighbours" where the class is
        theirs). It is saved in `output_dir`, beside a report and a sheet of pictures.

    Raises:
        DataError: a dataset is broken, every image is a labelled one, or no box is left.
        ValueError: the folder is in use, or holds something else.
    """
    if Launch().size > 1:
        raise ValueError("pseudolabel runs as one process: start it without a launcher")
    labelled, names, report = load_labelled(
        arguments.labelled_dataset,
        arguments.labelled_split,
        arguments.labelled_image_dir,
        split_flag="--labelled_split",
    )
    print(report)
    _require_labels_of_teacher(arguments)
    rows = nested_subsets(len(labelled), [arguments.label_fraction], arguments.label_seed)[arguments.label_fraction]
    images = load_dataset_source(arguments.dataset, arguments.split, image_dir=arguments.image_dir)
    unseen = _unseen(images, labelled, rows, arguments)
    with data_folder(arguments, "pseudolabel", ["predictions*/*.arrow"]) as folder:
        deciding = {"backbone", "backbone_weights", "label_seed"} | names_of(PseudolabelArguments, "result")
        settings = {name: getattr(arguments, name) for name in sorted(deciding)}
        settings |= {"detector": _identity(arguments.detector), "num_pictures": arguments.num_pictures}
        hashes = start_hashes(arguments)
        data = {"images": content_hash(images), "labelled": content_hash(labelled), "rows": list(rows)}
        folder.claim(places=local_paths(arguments), settings=settings, data=data, start=hashes)
        if folder.is_finished:
            print(f"{folder.path} is complete: nothing to do.")
            return datasets.load_from_disk(str(folder.path))
        _label(arguments, images.select(unseen), labelled.select(rows), names, folder)
    return datasets.load_from_disk(str(folder.path))


def _require_labels_of_teacher(arguments: PseudolabelArguments) -> None:
    """Refuses a teacher that learned, as its folder tells, from other labels of these images."""
    settings = Path(str(arguments.detector)) / SETTINGS
    learned = read_json(settings) or {}
    labels = (learned.get("dataset"), learned.get("split")), (arguments.labelled_dataset, arguments.labelled_split)
    if not is_same_split(*labels):
        return
    for name in ("label_fraction", "label_seed")[: 1 if arguments.label_fraction == 1 else 2]:
        now = getattr(arguments, name)
        if (before := learned.get(name, now)) != now:
            raise ValueError(
                f"the teacher learned from {name} {before} of {learned['dataset']} ({settings}), not from {now}: give "
                f"--{name} {before}, or images that it has learned from become pseudo-labelled ones"
            )


def _unseen(images, labelled, rows, arguments: PseudolabelArguments) -> list[int]:
    """The rows of images that the teacher did not learn from: it is told them by their content."""
    seen = {image_digest(value) for value in _values(labelled.select(rows))}
    unseen = [row for row, value in enumerate(_values(images)) if image_digest(value) not in seen]
    if not unseen:
        raise DataError(
            f"{arguments.dataset} (split {arguments.split}): all {len(images)} images are among the labelled ones. "
            "Lower --label_fraction to the share that the teacher learned from, or give other images."
        )
    print(f"{len(unseen)} images to label; {len(images) - len(unseen)} are among the {len(rows)} labelled ones.")
    return unseen


def _values(dataset: datasets.Dataset) -> Iterator[dict]:
    for row in dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)):
        yield row["image"]


def _label(arguments: PseudolabelArguments, images, labelled, names: list[str], folder: RunFolder) -> None:
    """Predict, suppress, check the classes, and write data set, report and sheet at once."""
    teacher = open_detector(arguments.detector)
    classes = np.array(match_categories(teacher.config.id2label, names))
    same = ("detector", "per_device_eval_batch_size", "dataloader_num_workers", "use_cpu", "disable_tqdm")
    found = predict(
        PredictArguments(
            **{name: getattr(arguments, name) for name in same},
            images=images,
            score_threshold=arguments.ignore_threshold,
            formats=[],
            output_dir=str(folder.work / "predictions"),
        )
    )
    # Whatever looks at these images sees what the teacher saw: the check of classes, the sheet, and the student.
    window = saved_window(find_detector(arguments.detector)) or pixel_window(images)
    if window is not None:
        for part in (labelled, found):
            record_pixel_window(part, window)
    boxes = [_boxes_of(row["objects"], classes, arguments) for row in found.remove_columns(["image"])]
    best = max((max(row["score"], default=0.0) for row in found["objects"]), default=0.0)
    if best < arguments.score_threshold:
        raise DataError(
            f"no box has a score of at least {arguments.score_threshold:g}, the score_threshold; "
            + (f"the best score is {best:.3g}" if best else f"all are below {arguments.ignore_threshold:g}, too")
            + ". Lower --score_threshold and --ignore_threshold, with another --output_dir or --overwrite_output_dir, "
            "or train the teacher for longer."
        )
    report = {"images": len(images), "skipped": len(images) - len(found), "boxes": sum(map(len, boxes))}
    if arguments.class_check == "neighbours":
        nearest, agree = _check(arguments, teacher, found, boxes, labelled)
        _believe_neighbours(boxes, nearest, agree)
        report["classes_agree"] = round(float(np.mean(agree)), 4) if len(agree) else None
    if arguments.shuffle_classes:
        _shuffle_classes(boxes, arguments.label_seed)
    kept = [row for row, rows_boxes in enumerate(boxes) if any(not box["ignore"] for box in rows_boxes)]
    if not kept:
        raise DataError(
            f"no box is left of {report['boxes']}: lower --score_threshold ({arguments.score_threshold}), give "
            "--class_check none, or train the teacher for longer."
        )
    report |= _count(boxes, labelled, names) | _truth(arguments, images, found, boxes, names)
    dataset = _dataset(found, boxes, kept, names)
    complete = folder.work / "dataset"
    shutil.rmtree(complete, ignore_errors=True)  # of a run that was killed just here
    save_split(dataset, complete)
    write_json(complete / REPORT, report)
    write_sheet(dataset, names, complete / SHEET, arguments.num_pictures, pixel_window(dataset), _SHEET_NOTE)
    folder.put_in_place(complete)
    _tell(report, folder.path)


def _boxes_of(objects: dict, classes: np.ndarray, arguments: PseudolabelArguments) -> list[dict]:
    """The boxes of one image that stay, best first."""
    boxes, scores = np.array(objects["bbox"], float).reshape(-1, 4), np.array(objects["score"], float)
    labels = classes[np.array(objects["category"], int)] if len(boxes) else np.zeros(0, int)
    return [
        {
            "bbox": boxes[index].tolist(),
            "category": int(labels[index]),
            "score": float(scores[index]),
            "ignore": int(scores[index] < arguments.score_threshold),
            "source": "teacher",
        }
        for index in suppress(boxes, scores, arguments.nms_threshold)
        if labels[index] >= 0
    ]


def _check(arguments: PseudolabelArguments, teacher, found, boxes, labelled) -> tuple[np.ndarray, np.ndarray]:
    """What neighbours say of all boxes that are to be labels, in their order."""
    source = teacher
    if arguments.backbone is not None:
        source = build_detector("detr", backbone=arguments.backbone, backbone_weights=arguments.backbone_weights)
    device = device_of(arguments.use_cpu)
    features = _frozen_backbone(source, device)
    objects = labelled.select_columns(["objects"]).with_format("arrow")
    vectors, classes = [], []
    for row, value in enumerate(tqdm(_values(labelled), "labelled", len(labelled), disable=arguments.disable_tqdm)):
        image, column = decode_image(value, pixel_window(labelled)), objects[row]["objects"]
        true_boxes, kept = usable_boxes(column, image.shape[1], image.shape[0])
        vectors.append(crop_features(features, image, true_boxes))
        classes.append(read_values(column, "category")[0].astype(int)[kept])
    unlabelled = [np.zeros((0, features.size), np.float32)]
    for value, row in zip(
        tqdm(_values(found), "boxes", len(found), disable=arguments.disable_tqdm), boxes, strict=True
    ):
        chosen = [box["bbox"] for box in row if not box["ignore"]]
        if chosen:
            unlabelled.append(crop_features(features, decode_image(value, pixel_window(found)), np.array(chosen)))
    return check_classes(np.concatenate(vectors), np.concatenate(classes), np.concatenate(unlabelled))


def _frozen_backbone(detector, device: str) -> BoxFeatures:
    """A detector's backbone, with the last two feature maps that it has."""
    for strides in ([16, 32], [8, 16], [32], [16]):
        with contextlib.suppress(ValueError):
            return BoxFeatures(detector, strides, device=device)
    return BoxFeatures(detector, [8], device=device)


def _believe_neighbours(boxes: list[list[dict]], nearest: np.ndarray, agree: np.ndarray) -> None:
    """Gives boxes the class that both ways agree on; where they do not, a box is neither object nor background."""
    chosen = (box for row in boxes for box in row if not box["ignore"])
    for box, category, is_agreed in zip(list(chosen), nearest.tolist(), agree.tolist(), strict=True):
        if not is_agreed:
            box["ignore"] = 1
        elif category != box["category"]:
            box |= {"category": category, "source": "neighbours"}


def _shuffle_classes(boxes: list[list[dict]], seed: int) -> None:
    """Deals the classes of all boxes that are labels out anew: how many there are of each stays."""
    chosen = [box for row in boxes for box in row if not box["ignore"]]
    classes = np.random.default_rng(seed).permutation([box["category"] for box in chosen])
    for box, category in zip(chosen, classes.tolist(), strict=True):
        box["category"] = category


def _count(boxes, labelled, names: list[str]) -> dict:
    """Boxes kept, and the share of each class beside its share of the labels: a student learns that imbalance."""
    kept = Counter(box["category"] for row in boxes for box in row if not box["ignore"])
    column = labelled.select_columns(["objects"]).with_format("arrow")[:]["objects"]
    true = Counter(read_values(column, "category")[0].astype(int).tolist())
    total, labels = max(sum(kept.values()), 1), max(sum(true.values()), 1)
    return {
        "kept": sum(kept.values()),
        "ignored": sum(box["ignore"] for row in boxes for box in row),
        "class_by_neighbours": sum(box["source"] == "neighbours" for row in boxes for box in row),
        "classes": {
            name: {"boxes": kept[index], "share": kept[index] / total, "share_of_labels": true[index] / labels}
            for index, name in enumerate(names)
        },
    }


def _truth(arguments: PseudolabelArguments, images, found, boxes, names: list[str]) -> dict:
    """Where the images have labels after all: the share of kept boxes that are right, and right but for the class."""
    if "objects" not in images.column_names:
        return {}
    try:
        labels = load_dataset_source(arguments.dataset, arguments.split, labels=True, image_dir=arguments.image_dir)
        if category_names(labels, arguments.dataset) != names:
            return {}
    except DataError:
        return {}
    rows = {image_digest(value): row for row, value in enumerate(_values(labels))}
    column = labels.select_columns(["objects"]).with_format("arrow")
    kept = placed = right = 0
    for value, row in zip(_values(found), boxes, strict=True):
        chosen = [box for box in row if not box["ignore"]]
        kept += len(chosen)
        if (number := rows.get(image_digest(value))) is not None:
            truth = column[number]["objects"]
            bbox, own = (np.array([box[name] for box in chosen]) for name in ("bbox", "category"))
            classes = match_labels(bbox, read_boxes(truth)[0], read_values(truth, "category")[0])
            placed += int((classes >= 0).sum())
            right += int((classes == own).sum())
    return {"precision": right / max(kept, 1), "precision_without_class": placed / max(kept, 1)}


def _dataset(found, boxes, kept: list[int], names: list[str]) -> datasets.Dataset:
    feature = {
        "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=names)),
        "score": datasets.List(datasets.Value("float32")),
        "ignore": datasets.List(datasets.Value("int64")),
        "source": datasets.List(datasets.Value("string")),
    }
    chosen = found.select(kept).remove_columns(["objects"])
    objects = [{name: [box[name] for box in boxes[row]] for name in feature} for row in kept]
    return chosen.add_column("objects", objects, feature=feature)


def _tell(report: dict, folder: Path) -> None:
    print(
        f"{report['kept']} boxes of {report['boxes']} are labels, {report['ignored']} are left out of account, "
        f"{report['class_by_neighbours']} have the class of their neighbours."
    )
    if "precision" in report:
        print(
            f"The images have labels: {100 * report['precision']:.1f} % of the boxes are right, "
            f"{100 * report['precision_without_class']:.1f} % but for the class."
        )
    for name, row in report["classes"].items():
        if row["share_of_labels"] > 0.02 and row["share"] < 0.2 * row["share_of_labels"]:
            print(
                f"Few boxes of {name}: {100 * row['share']:.1f} %, of the labels {100 * row['share_of_labels']:.1f} %."
            )
    print(f"Look at {folder / SHEET} before you train on {folder}.")
