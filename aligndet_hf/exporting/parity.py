"""Whether an exported detector finds what the detector finds, on images of the user's own."""

from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch
from torch.overrides import TorchFunctionMode
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.collate import collate_labelled, normalize_images
from ..data.errors import ImageError
from ..data.image_list import ImageList
from ..evaluation.detections import normalization_of, predict_batches, prepare_image
from .run_onnx import finish, prepare

BOX_TOLERANCE = 0.5  # pixels of the stored image
SCORE_TOLERANCE = 1e-3
_TIE = 1e-5  # a difference of scores, relative to them, that another order of sums may turn round

Graph = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""From the inputs of a graph to `logits` and `pred_boxes`."""


def compare(
    detector: PreTrainedModel,
    image_processor: BaseImageProcessor,
    run: Graph,
    model: dict,
    images: ImageList,
    indices: Sequence[int],
    score_threshold: float = 0.1,
) -> dict:
    """
    Compares what a detector finds in images with what its export finds, each with its own preparation of the image.

    A detection is the same if the export has one of the same class, with all four sides within half a pixel of the
    stored image and a score within 0.001.

    Args:
        detector (`PreTrainedModel`): The detector, on the CPU.
        image_processor (`BaseImageProcessor`): The detector's.
        run (`Graph`): Runs the export.
        model (`dict`): What [`~aligndet_hf.exporting.onnx_graph.describe`] says of it.
        images ([`ImageList`]): Images.
        indices (`Sequence[int]`): Which of them to compare on; those that cannot be read are left out.
        score_threshold (`float`, *optional*, defaults to 0.1): Detections with a lower score are not compared.

    Returns:
        `dict`: `images` and `detections` compared, the largest `box_difference` in pixels and `score_difference` of
        those that are the same, and `differing`: a list with `file`, `class`, `score` and `reason` of those that have
        no equal.
    """
    report = {"images": 0, "detections": 0, "box_difference": 0.0, "score_difference": 0.0, "differing": []}
    report |= {"score_threshold": score_threshold}
    for index in map(int, indices):
        try:
            image = images.read(index)
        except ImageError:
            continue
        report["images"] += 1
        batch = collate_labelled([prepare_image(image, image_processor, index)])
        expected = next(predict_batches(detector, [batch], image_processor))[1][0]
        expected = [expected[name] for name in ("scores", "labels", "boxes")]
        picture = PIL.Image.fromarray(image)
        found = finish(model, *_first(run(prepare(model, picture))), *picture.size, score_threshold - 0.01)
        boxes, scores, lacking = _matched(expected, found, score_threshold)
        report["detections"] += int((expected[0] >= score_threshold).sum())
        report["box_difference"] = max(report["box_difference"], boxes)
        report["score_difference"] = max(report["score_difference"], scores)
        if lacking:
            reason = _reason(detector, image_processor, run, model, batch, expected, picture.size, score_threshold)
            for number in lacking:
                entry = {"class": model["classes"][int(expected[1][number])], "score": float(expected[0][number])}
                report["differing"].append({"file": images.names[index]} | entry | {"reason": reason})
    return report


class _Choices(TorchFunctionMode):
    """Watches where a detector takes the best candidates: `ties` tells where the last is no better than the next."""

    def __init__(self):
        super().__init__()
        self.ties: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, torch.Tensor.topk):
            kept = result.values.shape[-1]
            scores = args[0].sort(dim=-1, descending=True).values
            if kept < scores.shape[-1]:
                last, following = scores[..., kept - 1], scores[..., kept]
                if ((last - following).abs() <= _TIE * (1 + last.abs())).any():
                    self.ties.append(f"{kept} of {scores.shape[-1]} candidates, whose last is no better than the next")
        return result


def _first(outputs: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return outputs[0][0], outputs[1][0]


def _matched(expected, found, threshold: float) -> tuple[float, float, list[int]]:
    """The largest differences in boxes and scores of what is the same, and the numbers of what is not."""
    free = np.ones(len(found[0]), dtype=bool)
    box_difference = score_difference = 0.0
    lacking = []
    for number in np.flatnonzero(expected[0] >= threshold):
        score, label, box = (values[number] for values in expected)
        boxes, scores = np.abs(found[2] - box).max(axis=1), np.abs(found[0] - score)
        same = free & (found[1] == label) & (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
        if not same.any():
            lacking.append(int(number))
            continue
        best = np.where(same, boxes, np.inf).argmin()
        free[best] = False
        box_difference, score_difference = max(box_difference, boxes[best]), max(score_difference, scores[best])
    return float(box_difference), float(score_difference), lacking


def _reason(detector, image_processor, run: Graph, model: dict, batch: dict, expected, size, threshold: float) -> str:
    """Why the export finds something else in an image."""
    pixels = normalize_images(batch["pixel_values"], batch["pixel_mask"], **normalization_of(image_processor))
    inputs = {"pixel_values": pixels.numpy(), "pixel_mask": batch["pixel_mask"].numpy()}
    outputs = run({name: inputs[name] for name in model["inputs"]})
    if not _matched(expected, finish(model, *_first(outputs), *size, threshold - 0.01), threshold)[2]:
        return "the image is resized differently: with the pixels of the image processor the graph finds the same"
    with _Choices() as choices, torch.no_grad():
        detector(pixel_values=pixels, pixel_mask=batch["pixel_mask"])
    if choices.ties:
        return f"the detector itself is undecided: it takes {choices.ties[0]}, so rounding may decide"
    if model["precision"] == "float16":
        return "float16 is not exact enough for this detector"
    return "the graph computes something else than the detector"
