"""How long a detector takes for an image, on the machine that it is measured on."""

import statistics
import time

import numpy as np
import torch

from ..data.collate import collate_labelled, normalize_images
from .detections import normalization_of, prepare_image

IMAGE = (480, 640)  # height and width in pixels, as photographs of COCO have them
RUNS, SECONDS = 20, 5.0  # at most


@torch.no_grad()
def measure_speed(detector, image_processor) -> dict:
    """
    Times the forward pass of one image: the median of at most 20 runs within some seconds, after one that is not
    counted. Reading, resizing and post-processing are left out.

    Args:
        detector (`PreTrainedModel`): Any detector; it is left in evaluation mode, on its device.
        image_processor (`BaseImageProcessor`): The detector's, which makes an input of a 640 x 480 image.

    Returns:
        `dict`: `milliseconds`, `runs`, `height` and `width` of the input in pixels, `dtype`, `device` (its name), and
        `threads` of a CPU.
    """
    detector.eval()
    parameter = next(detector.parameters())
    batch = collate_labelled([prepare_image(np.zeros((*IMAGE, 3), np.uint8), image_processor, 0)])
    pixel_values, pixel_mask = (batch[name].to(parameter.device) for name in ("pixel_values", "pixel_mask"))
    pixel_values = normalize_images(pixel_values, pixel_mask, **normalization_of(image_processor)).to(parameter.dtype)
    is_cuda = parameter.device.type == "cuda"
    seconds, started = [], time.perf_counter()
    while len(seconds) <= RUNS and (len(seconds) < 2 or time.perf_counter() - started < SECONDS):
        before = time.perf_counter()
        detector(pixel_values=pixel_values, pixel_mask=pixel_mask)
        if is_cuda:
            torch.cuda.synchronize(parameter.device)
        seconds.append(time.perf_counter() - before)
    return {
        "milliseconds": round(1000 * statistics.median(seconds[1:]), 2),
        "runs": len(seconds) - 1,
        "height": pixel_values.shape[-2],
        "width": pixel_values.shape[-1],
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parameter.device) if is_cuda else parameter.device.type,
        **({"threads": torch.get_num_threads()} if parameter.device.type == "cpu" else {}),
    }
