"""`aligndet predict`: what a detector finds in images, videos and data sets, as pictures, labels and a data set."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm

from ..arguments import DatasetArguments, InferenceArguments, ReadyDetectorArguments, RunArguments, again
from ..data.errors import DataError
from ..data.image_list import ImageList, list_images
from ..data.images import print_left_out
from ..data.label_export import export_labels
from ..data.launch import Launch
from ..data.shards import data_folder, require_all, save_split
from ..data.sources import model_hash
from ..detectors.build import find_detector, open_detector, open_image_processor
from ..evaluation.predicted_rows import join_predictions, write_coco, write_predictions, write_results
from ..evaluation.predictions import Prediction, Tiling, predict_images
from ..files import is_sound, write_json
from ..flags import REQUIRED, flag, given_flags, names_of
from ..objects import folder_of
from ..processes import device_of
from ..ranges import BELOW_ONE, COUNT, PIXELS, SHARE, Range, check_values
from ..reporting.drawing import draw_boxes, jpeg_bytes, tint_masks
from ..reporting.predictions import write_sheet
from ..runs import RunFolder

FORMATS = ("coco", "results", "yolo", "voc", "dataset", "pictures", "sheet")

_COMPLETE, _TABLE = "complete", "predictions.arrow"
_TILES = ("tile_overlap", "whole_image", "nms_threshold")  # which say nothing without a `tile_size`
_SHARD_SIZE = 64  # images between two saves; a killed run loses no more


@dataclass(kw_only=True)
class PredictArguments(RunArguments, InferenceArguments, ReadyDetectorArguments):
    """Arguments of [`predict`]: the flags of `aligndet predict` and the keys of its recipes."""

    help_groups = {
        "images": "Data",
        "score_threshold": "Which boxes to keep",
        "tile_size": "Tiles, for large images and small objects",
        "formats": "Output",
    }

    images: list[str] = flag(
        REQUIRED,
        "data",
        "images, videos, folders of them, patterns like 'photos/*.jpg', COCO-JSON files, folders of save_to_disk or "
        "Hub ids of data sets; one or several",
    )
    split: str | None = again(DatasetArguments, "split", help="split of the data sets; all of them if not given")

    score_threshold: float = flag(0.3, "result", "keep boxes with at least this score", range=SHARE)

    tile_size: int | None = flag(
        None, "result", "look at square tiles with sides of this many pixels as well", range=Range(16)
    )
    tile_overlap: float = flag(0.2, "result", "let neighbouring tiles share this part of a side", range=BELOW_ONE)
    whole_image: bool = flag(True, "result", "look at the whole image beside its tiles")
    nms_threshold: float = flag(
        0.5, "result", "drop a box of another tile that overlaps a better one by more (IoU)", range=SHARE
    )

    # On a CPU more images at a time take memory and gain nothing.
    per_device_eval_batch_size: int | None = again(
        InferenceArguments,
        "per_device_eval_batch_size",
        default=None,
        help="look at this many images, or tiles, per forward pass; 8 on a GPU, 1 on a CPU if not given",
    )

    masks: bool = flag(True, "result", "also give the masks of a detector that predicts them, such as Mask R-CNN")

    output_dir: str | None = again(
        RunArguments, "output_dir", default=None, help="folder for what follows; must be new", needed_on_console=True
    )
    formats: list[str] = flag(
        ["coco", "results", "sheet"],
        "output",
        "write coco: labels.json, to be corrected in a labelling tool; results: predictions.json in COCO's result "
        "format; yolo, voc: a folder of labels; dataset: a data set with the column `objects`; pictures: each image "
        "with its boxes; sheet: some of them on one page",
    )
    num_pictures: int = flag(24, "output", "put this many images on the sheet, evenly spaced", range=COUNT)
    picture_size: int = flag(1600, "output", "longest side of a picture in pixels", range=PIXELS)

    def __post_init__(self):
        self.detector = folder_of(self.detector)
        check_values(self)
        if self.tile_size is None and (idle := [name for name in given_flags(self) if name in _TILES]):
            raise ValueError(f"{idle[0]} is for tiles: give a tile_size too, such as 640, or leave it out")
        if unknown := sorted(set(self.formats) - set(FORMATS)):
            raise ValueError(f"formats must be among {', '.join(FORMATS)}, got {', '.join(unknown)}")

    def tiling(self) -> Tiling | None:
        """How to cut images into tiles, if that is asked for."""
        if self.tile_size is None:
            return None
        return Tiling(
            tile_size=self.tile_size,
            overlap=self.tile_overlap,
            whole_image=self.whole_image,
            iou_threshold=self.nms_threshold,
        )


def predict(detector, images=None, *, image_processor=None, **settings) -> list[dict] | datasets.Dataset:
    """
    Detects objects in images.

    The processes of `accelerate launch` divide the images among them. With an `output_dir`, a run that was interrupted
    in whatever way continues with the same command; images that cannot be read are listed in `report.json`.

    Args:
        detector (`str`, `PreTrainedModel` or [`PredictArguments`]):
            Folder or Hub id of a detector; a detector; or all of the arguments at once.
        images:
            What to look at, one or a list: paths of images, videos and folders, patterns, PIL images, arrays (RGB
            uint8 `[H, W, 3]`), a `datasets.Dataset`. See [`~aligndet_hf.data.image_list.list_images`].
        image_processor (`BaseImageProcessor`, *optional*):
            The detector's; by default the one that is saved with it.
        settings: Further fields of [`PredictArguments`], such as `score_threshold` and `tile_size`.

    Returns:
        Without `output_dir` a `list[dict]`, one per image: `boxes` (float32 `[n, 4]`, absolute xywh inside the image,
        best score first), `scores` (float32 `[n]`), `labels` (int64 `[n]`), `names` (the class of each), `masks` (run
        lengths of COCO, of a detector that predicts masks, else `None`), `file_name`, `width` and `height`, and
        `error` for an image that cannot be read (else `None`). With `output_dir` a
        `datasets.Dataset` with the columns `image`, `image_id`, `file_name`, `width`, `height` and `objects` (`bbox`,
        absolute xywh, `category`, `area`, `id`, `score`, and `segmentation` of a detector that predicts masks).

    Raises:
        DataError: there is no image to look at, or `output_dir` is in use.
        OSError: there is no such detector, or it has no image processor.

    Example:

    ```python
    found = predict("outputs/finetuned", ["street.jpg", "drive.mp4"])
    boxes = sv.Detections(  # of supervision
        xyxy=sv.xywh_to_xyxy(found[0]["boxes"]), confidence=found[0]["scores"], class_id=found[0]["labels"]
    )
    ```
    """
    arguments = detector
    if not isinstance(detector, PredictArguments):
        arguments = PredictArguments(detector=detector, images=images, **settings)
    elif images is not None or settings:
        raise ValueError(f"PredictArguments have everything: give {', '.join(settings) or 'images'} to them")
    listed = list_images(arguments.images, arguments.split)
    if arguments.output_dir is not None:
        return _predict_to_folder(arguments, listed, image_processor)
    model, image_processor = _load(arguments, image_processor)
    results, best_score = [None] * len(listed), 0.0
    for found in _run(arguments, model, image_processor, listed, range(len(listed))):
        best_score = max(best_score, found.best_score)
        results[found.index] = {
            "boxes": found.boxes,
            "scores": found.scores,
            "labels": found.labels,
            "masks": found.masks,
            "names": [model.config.id2label[label] for label in found.labels.tolist()],
            "file_name": listed.names[found.index],
            "height": found.size[0],
            "width": found.size[1],
            "error": found.error,
        }
    errors = [found["error"] for found in results if found["error"]]
    if len(errors) == len(results):
        print(f"note: none of the {len(results)} images can be read. {errors[0]}")
    elif not any(len(found["scores"]) for found in results):
        _tell_nothing_found(arguments.score_threshold, best_score)
    return results


def _load(arguments: PredictArguments, image_processor) -> tuple:
    """The detector, on its device, and its image processor."""
    detector = arguments.detector
    if isinstance(detector, (str, Path)):
        source, detector = detector, open_detector(detector)
    elif image_processor is None:
        source = detector.config._name_or_path or detector
    return detector.to(device_of(arguments.use_cpu)), image_processor or open_image_processor(source)


def _run(arguments: PredictArguments, detector, image_processor, images: ImageList, indices) -> Iterator[Prediction]:
    """[`~aligndet_hf.evaluation.predictions.predict_images`] with a progress bar."""
    batch_size = arguments.per_device_eval_batch_size
    if batch_size is None:
        batch_size = 1 if next(detector.parameters()).device.type == "cpu" else 8
    found = predict_images(
        detector,
        image_processor,
        images,
        indices,
        score_threshold=arguments.score_threshold,
        tiling=arguments.tiling(),
        batch_size=batch_size,
        num_workers=arguments.dataloader_num_workers,
        encode=arguments.output_dir is not None,
        masks=arguments.masks,
    )
    disable = arguments.disable_tqdm or not Launch().is_main
    initial = len(images) - len(indices)
    modes = {part: part.training for part in detector.modules()}
    try:
        yield from tqdm(found, total=len(images), initial=initial, desc="predicting", unit="image", disable=disable)
    finally:
        for part, mode in modes.items():  # somebody may be about to train it
            part.training = mode


# ---- to a folder ----


def _predict_to_folder(arguments: PredictArguments, images: ImageList, image_processor) -> datasets.Dataset:
    """Shards of predictions in a folder beside the output, then the output at once."""
    with Launch() as launch, data_folder(arguments, "predict", on_main=launch.on_main) as folder:
        given = {} if image_processor is None else {"image_processor": json.loads(image_processor.to_json_string())}
        folder.claim(settings=_settings(arguments) | given, data={"images": images.identity()})
        if folder.is_finished:
            launch.on_main(print, f"{folder.path} is complete: nothing to do.")
        else:
            classes = _predict_shards(arguments, images, image_processor, folder.work, launch)
            launch.wait()
            launch.on_main(_finish, arguments, images, classes, folder)
    return datasets.Dataset.from_file(str(folder.path / _TABLE))


def _settings(arguments: PredictArguments) -> dict:
    """What decides the output."""
    names = names_of(PredictArguments, "result") | {"formats", "num_pictures", "picture_size"}
    return {"detector": _identity(arguments.detector)} | {name: getattr(arguments, name) for name in sorted(names)}


def _identity(detector) -> str:
    """A hash that tells a detector from others."""
    if isinstance(detector, (str, Path)):
        return model_hash(find_detector(detector))
    digest = hashlib.blake2b(repr(detector.config.id2label).encode(), digest_size=16)
    for name, tensor in detector.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _predict_shards(
    arguments: PredictArguments, images: ImageList, image_processor, work: Path, launch: Launch
) -> list[str]:
    """Writes the shards that are not there yet, each at once, and its pictures before it; returns the classes."""
    detector, image_processor = _load(arguments, image_processor)
    classes = [detector.config.id2label[label] for label in sorted(detector.config.id2label)]
    shards = _shards(images)
    missing = [n for n in range(launch.rank, len(shards), launch.size) if not is_sound(_shard_path(work, n))]
    indices = [index for number in missing for index in shards[number]]
    unfinished = {}
    for found in _run(arguments, detector, image_processor, images, indices):
        number = found.index // _SHARD_SIZE
        rows = unfinished.setdefault(number, {})
        rows[found.index] = found
        if len(rows) == len(shards[number]):
            del unfinished[number]
            if "pictures" in arguments.formats:
                for index in shards[number]:
                    _write_picture(rows[index], images, classes, work / _COMPLETE, arguments.picture_size)
            write_predictions(_shard_path(work, number), [rows[index] for index in shards[number]], images)
    return classes


def _shards(images: ImageList) -> list[range]:
    return [range(start, min(start + _SHARD_SIZE, len(images))) for start in range(0, len(images), _SHARD_SIZE)]


def _shard_path(work: Path, number: int) -> Path:
    return work / f"shard-{number:06d}.arrow"


def _write_picture(found: Prediction, images: ImageList, classes: list[str], folder: Path, max_side: int) -> None:
    """Writes an image with its boxes to the folder `pictures`, under its name."""
    if found.error is not None:
        return
    name = images.names[found.index]
    path = folder / "pictures" / (name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = [f"{classes[label]} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)]
    image = images.read(found.index)
    if found.masks is not None:
        image = tint_masks(image, found.masks, found.labels.tolist())
    picture = draw_boxes(image, found.boxes, found.labels.tolist(), tags, max_side)
    path.write_bytes(jpeg_bytes(picture))


def _finish(arguments: PredictArguments, images: ImageList, classes: list[str], folder: RunFolder) -> None:
    """Makes the output of the shards, and puts it in place."""
    shards = [_shard_path(folder.work, number) for number in range(len(_shards(images)))]
    require_all(shards)
    complete, formats = folder.work / _COMPLETE, set(arguments.formats)
    complete.mkdir(exist_ok=True)
    category_ids = images.category_ids(classes)
    dataset, report = join_predictions(shards, complete / _TABLE, classes, category_ids)
    if len(dataset) == 0:
        raise DataError(f"None of the {len(images)} images can be read. {report['skipped'][0]['reason']}")
    report["skipped"] += images.faults
    if "results" in formats:
        write_results(dataset, complete / "predictions.json", category_ids)
    if "coco" in formats:
        write_coco(dataset, complete / "labels.json", classes, category_ids)
    for layout in sorted({"yolo", "voc"} & formats):
        shutil.rmtree(complete / layout, ignore_errors=True)
        undecoded = dataset.cast_column("image", datasets.Image(decode=False))
        export_labels({"train": undecoded}, classes, complete / layout, layout)
    if "dataset" in formats:
        shutil.rmtree(complete / "dataset", ignore_errors=True)
        save_split(dataset, complete / "dataset")
    if "sheet" in formats:
        write_sheet(dataset, classes, complete / "sheet.jpg", arguments.num_pictures, images.window)
    left_out = _TILES if arguments.tile_size is None else ()
    settings = {name: value for name, value in _settings(arguments).items() if name not in left_out}
    write_json(complete / "report.json", {"settings": settings, "classes": classes} | report)
    folder.put_in_place(complete)
    if formats:  # else it is for another command, which tells what comes of it
        _print_report(report, arguments.score_threshold)
    print_left_out([image["reason"] for image in report["skipped"]], folder.path / "report.json")
    if formats:
        print(f"Saved to {folder.path}")


def _print_report(report: dict, score_threshold: float) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in report["boxes_of_class"].items() if count)
    print(
        f"{report['images']} images, {report['images_without_boxes']} of them without boxes; {report['boxes']} boxes"
        + (f": {counts}" if counts else "")
    )
    if report["boxes"] == 0:
        _tell_nothing_found(score_threshold, report["best_score"])
        print("Another --score_threshold needs another --output_dir, or --overwrite_output_dir to start anew.")


def _tell_nothing_found(score_threshold: float, best_score: float) -> None:
    print(
        f"note: no box has a score of at least {score_threshold:g}, the score_threshold; the best score is "
        f"{best_score:.3g}. A lower threshold shows what the detector sees; a best score near 0 means that it has "
        "not learnt to find objects yet."
    )
