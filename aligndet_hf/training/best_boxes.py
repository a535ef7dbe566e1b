"""The boxes that a detector is surest of, before and after pre-training, drawn on a few images."""

from pathlib import Path

import datasets
import numpy as np

from ..data.arrow_boxes import read_boxes
from ..data.splits import spread_rows
from ..detectors.build import open_detector
from ..evaluation.detections import EvaluationImages, predict_batches
from ..reporting.drawing import JPEG_QUALITY, contact_sheet, draw_boxes, enlarged

BOXES = "boxes.jpg"
NUM_IMAGES, NUM_BOXES, SIDE = 4, 8, 340


class BestBoxes:
    """
    Finds the best boxes of a detector that is not trained yet, and draws them beside the best boxes that it has later.

    Args:
        model (`AlignDetForPreTraining`): As it starts; it is left in training mode.
        dataset (`datasets.Dataset`): Its images, with the columns `image` and `proposals`.
        image_processor (`BaseImageProcessor`): Its image processor.
    """

    def __init__(self, model, dataset: datasets.Dataset, image_processor):
        self.images = EvaluationImages(dataset, [], image_processor)
        self.rows = spread_rows(len(self.images), NUM_IMAGES)
        self.before = self._find(model.online_detector)
        model.train()

    def _find(self, detector) -> list[np.ndarray]:
        """The best boxes (`[n, 4]`, xywh in pixels) of each image, best first."""
        batches, best = self.images.batches(1, rows=self.rows), []
        for _, (found,) in predict_batches(detector, batches, self.images.image_processor):
            boxes = found["boxes"][np.argsort(-found["scores"], kind="stable")[:NUM_BOXES]].astype(float)
            boxes[:, 2:] -= boxes[:, :2]
            best.append(boxes)
        return best

    def draw(self, detector_dir: Path, path: Path) -> None:
        """Draws proposals and best boxes of each image, before and after; `detector_dir` is what came after."""
        after = self._find(open_detector(str(detector_dir)))
        pictures = []
        for number, row in enumerate(self.rows):
            image = self.images.read_image(row)
            proposals = read_boxes(self.images.dataset.select([row]).with_format("arrow")[:]["proposals"])[0]
            for boxes in (proposals[:NUM_BOXES], self.before[number], after[number]):
                ranks = range(len(boxes))
                pictures.append(
                    draw_boxes(*enlarged(image, boxes, SIDE), list(ranks), [str(rank + 1) for rank in ranks], SIDE)
                )
        titles = ["proposals", "best boxes before pre-training", "after"] * len(self.rows)
        note = f"The first {NUM_BOXES} proposals, and the {NUM_BOXES} boxes that the detector is surest of, in order"
        contact_sheet(pictures, titles, 3, SIDE, note).save(path, quality=JPEG_QUALITY)
