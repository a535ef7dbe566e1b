"""`aligndet evaluate`: the COCO numbers of a detector on labelled images."""

import json
from dataclasses import dataclass

from tqdm.auto import tqdm

from ..arguments import InferenceArguments, LabelledArguments, MeasureArguments, ReadyDetectorArguments, again
from ..data.columns import category_ids, image_ids
from ..data.formats import load_labelled
from ..detectors.build import open_detector, open_image_processor
from ..evaluation.coco_metrics import format_table
from ..evaluation.detections import EvaluationImages, coco_detections, match_categories, predict_batches
from ..evaluation.diagnosis import format_diagnosis
from ..files import write_json, write_text
from ..flags import flag, takes_arguments
from ..processes import device_of
from ..ranges import SHARE
from ..reporting.html_report import REPORT, write_report
from ..reporting.predictions import PREDICTIONS, WORST, tell_predictions
from ..reporting.run_record import DIAGNOSIS
from ..runs import measuring_folder

WRITTEN = ["results.json", "predictions.json", DIAGNOSIS, PREDICTIONS, WORST, REPORT]


@dataclass(kw_only=True)
class EvaluateArguments(MeasureArguments, InferenceArguments, LabelledArguments, ReadyDetectorArguments):
    """Arguments of [`evaluate`]: the flags of `aligndet evaluate` and the keys of its recipes."""

    help_groups = {"save_predictions": "Output"}

    image_processor: str | None = flag(
        None, "start", "folder or Hub id of another image processor; needed for a detector that is given as an object"
    )
    split: str | None = again(LabelledArguments, "split", default="validation", help="split of the dataset")

    output_dir: str | None = again(
        MeasureArguments, "output_dir", help="folder for results.json, diagnosis.json, report.html and what follows"
    )
    save_predictions: bool = flag(
        False, "output", "write predictions.json, a list of detections in COCO's result format"
    )
    num_pictures: int = flag(
        0,
        "output",
        "draw predictions beside the truth, of this many evenly spaced images (predictions.jpg) and of the worst "
        "ones (worst.jpg)",
    )
    score_threshold: float = flag(0.3, "output", "draw boxes with at least this score; no effect on AP", range=SHARE)

    def __post_init__(self):
        super().__post_init__()
        if self.output_dir is None and (self.save_predictions or self.num_pictures):
            raise ValueError("save_predictions and num_pictures need an output_dir to write to")


@takes_arguments
def evaluate(arguments: EvaluateArguments) -> dict:
    """
    Measures a detector on labelled images and prints the COCO table with the AP of every class.

    Args:
        arguments ([`EvaluateArguments`]): The configuration.

    Returns:
        `dict`: What `CocoMetrics.compute()` gives: the 12 COCO numbers in 0 to 1, and `per_class`; where detector and
        labels have masks `mask_AP` and others as well.

    Raises:
        DataError: the dataset is broken, or its categories are not among the detector's classes.
        ValueError: what is named is not a detector.
        OSError: there is none on the Hub, or it has no image processor.
    """
    with measuring_folder(arguments.output_dir, "evaluate", WRITTEN) as folder:
        dataset, categories, report = load_labelled(arguments.dataset, arguments.split, arguments.image_dir)
        print(report)
        device = device_of(arguments.use_cpu)
        detector = open_detector(arguments.detector).to(device)
        image_processor = open_image_processor(arguments.image_processor or arguments.detector)
        classes = match_categories(detector.config.id2label, categories)

        images = EvaluationImages(dataset, categories, image_processor)
        loader = images.batches(arguments.per_device_eval_batch_size, arguments.dataloader_num_workers)
        own_ids = dict(zip(images.image_ids, image_ids(dataset), strict=True))  # as in the label file
        own_categories = category_ids(dataset, categories)
        metrics, detections = images.metrics(), []
        batches = predict_batches(detector, loader, image_processor, classes, metrics.has_masks)
        for ids, predictions in tqdm(batches, total=len(loader), desc="evaluating", disable=arguments.disable_tqdm):
            metrics.update(predictions, ids)
            if arguments.save_predictions:
                for image_id, found in zip(ids, predictions, strict=True):
                    detections += coco_detections(own_ids[image_id], found, own_categories)
        results = metrics.compute()
        print(format_table(results))

        if folder is not None:
            measured = {"detector": arguments.detector, "dataset": arguments.dataset, "split": arguments.split}
            record = measured | {"images": len(images), "metrics": results}
            write_json(folder / "results.json", record)
            told = tell_predictions(images, metrics, folder, arguments.num_pictures, arguments.score_threshold)
            print(format_diagnosis(told, categories))
            if arguments.save_predictions:
                write_text(folder / "predictions.json", json.dumps(detections))
            print(f"Report: {write_report(folder)}")
        return results
