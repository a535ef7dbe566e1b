"""The boxes of a trained model as proposals: of a detector, perhaps of an earlier round, or of a mask generator."""

import inspect
import os
from collections.abc import Callable, Mapping

import numpy as np

BoxFinder = Callable[[list[np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]


def load_box_finder(model: str, score_threshold: float = 0.05) -> BoxFinder:
    """
    Loads a model of `transformers` to find boxes with, whatever their class.

    It runs in float32, on a GPU if there is one: the GPU of the process's `LOCAL_RANK` under a launcher. Code that a
    repository brings along is never run.

    Args:
        model (`str`): Folder or Hub id, with its image processor, of any object detector, or of a model for the
            pipeline `mask-generation` (SAM and its relatives), whose masks' boxes are taken.
        score_threshold (`float`, *optional*, defaults to 0.05):
            Lowest score of a detection; of a mask, the lowest IoU that the model predicts for it.

    Returns:
        A function from a list of RGB images, uint8 `[H, W, 3]`, to boxes float32 `[N, 4]`, absolute `xywh` inside the
        image, and scores float32 `[N]` of each, in no order.

    Raises:
        `OSError`: If there is no such model, or it has no image processor.
        `ValueError`: If the model finds neither objects nor masks, needs code of its repository, or is a detector that
            [`~aligndet_hf.checkpoint.open_checkpoint`] or [`~aligndet_hf.checkpoint.open_processor`] refuses.
    """
    import torch
    from transformers import AutoConfig, AutoModelForMaskGeneration, AutoModelForObjectDetection

    from .. import convnets  # noqa: F401, which tells transformers of its models

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if type(config) in AutoModelForObjectDetection._model_mapping:
        return _load_detector(model, score_threshold, device)
    if type(config) in AutoModelForMaskGeneration._model_mapping:
        return _load_mask_generator(model, score_threshold, device)
    raise ValueError(
        f"{model} is a model of the type '{config.model_type}', which neither detects objects nor generates masks: "
        "expected one that AutoModelForObjectDetection or the pipeline 'mask-generation' loads."
    )


def _load_detector(model: str, score_threshold: float, device: str) -> BoxFinder:
    import torch

    from ..checkpoint import open_checkpoint, open_processor

    image_processor = open_processor(model)
    detector = open_checkpoint(model, is_whole=True).to(device).eval()

    @torch.no_grad()
    def find(images):
        images = [with_both_sides(image, image_processor.size) for image in images]
        inputs = image_processor(images=images, input_data_format="channels_last", return_tensors="pt").to(device)
        results = image_processor.post_process_object_detection(
            detector(**inputs),
            threshold=score_threshold,
            target_sizes=[image.shape[:2] for image in images],
            **all_detections(image_processor, detector),
        )
        return [
            (_xywh_inside(result["boxes"].cpu().numpy(), image), result["scores"].cpu().numpy())
            for image, result in zip(images, results, strict=True)
        ]

    return find


def all_detections(image_processor, detector) -> dict[str, int]:
    """
    What to give `post_process_object_detection` beside the outputs, so that none of a convnet's detections is lost.

    The image processors of transformers keep 100 of an image.

    Args:
        image_processor (`BaseImageProcessor`): The detector's.
        detector (`PreTrainedModel`): The detector.
    """
    from ..convnets.modeling_torchvision import TorchvisionDetector

    takes = inspect.signature(image_processor.post_process_object_detection).parameters
    is_convnet = isinstance(detector, TorchvisionDetector)
    return {"top_k": detector.config.detections_per_image} if is_convnet and "top_k" in takes else {}


def with_both_sides(image: np.ndarray, size: Mapping) -> np.ndarray:
    """
    An image that an image processor can resize: of a very long one, the short side would have 0 pixels.

    Args:
        image (`np.ndarray`): RGB uint8 [height, width, 3].
        size (`Mapping`): The `size` of the image processor.

    Returns:
        `np.ndarray`: the image, or one of the same content with a longer short side. Boxes relative to it are those
        relative to the image.
    """
    longest, short, long = size.get("longest_edge"), min(image.shape[:2]), max(image.shape[:2])
    if not longest or short * longest >= long:
        return image
    enough = -(-long // longest)
    return np.repeat(image, -(-enough // short), axis=int(image.shape[1] < image.shape[0]))


def _load_mask_generator(model: str, score_threshold: float, device: str) -> BoxFinder:
    import PIL.Image
    import torch
    from transformers import pipeline

    generate = pipeline("mask-generation", model, device=device, trust_remote_code=False, dtype=torch.float32)

    def find(images):
        found = []
        for image in images:
            result = generate(PIL.Image.fromarray(image), pred_iou_thresh=score_threshold, output_bboxes_mask=True)
            # The corners are pixels of the mask, both included.
            boxes = result["bounding_boxes"].cpu().numpy() + [0, 0, 1, 1]
            found.append((_xywh_inside(boxes, image), result["scores"].cpu().numpy()))
        return found

    return find


def _xywh_inside(boxes: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Boxes xyxy `[N, 4]`, clipped to the image, as float32 xywh."""
    height, width = image.shape[:2]
    boxes = np.clip(boxes.astype(np.float32), 0, np.array([width, height] * 2, dtype=np.float32))
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
