"""How many images fit into memory at once: found before training, by a step that leaves nothing behind."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..data.collate import collate_labelled, normalize_images
from ..data.dataset import LabelledImages
from ..data.sampling import SampleKey
from ..detectors.backbones import eval_frozen, get_backbone
from ..evaluation.detections import normalization_of

_OPTIMIZER_COPIES = 2  # of the parameters, which AdamW keeps


def largest_batch(step: Callable[[int], None], batch_size: int) -> int:
    """
    The largest divisor of a batch size with which a step does not run out of memory, on every process.

    Args:
        step (`Callable`): Takes a number of images, and does what training does with them.
        batch_size (`int`): What is asked for.

    Raises:
        RuntimeError: not even one image fits.
    """
    size = batch_size
    while True:
        try:
            step(size)
            fits = True
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
            fits = False
        if all(gather_object([fits])):  # processes go on together: their losses wait for each other
            return size
        clear_device_cache(garbage_collection=True)
        size = next(smaller for smaller in range(size - 1, 0, -1) if batch_size % smaller == 0)


def trial_step(detector, images: LabelledImages, image_processor, args) -> Callable[[int], None]:
    """
    A step for [`largest_batch`]: forward and backward of images of the largest size, beside what the optimizer keeps.

    Parameters, buffers, gradients and random numbers are afterwards as they were.

    Args:
        detector (`PreTrainedModel`): The detector, as it is trained.
        images ([`LabelledImages`]): What it is trained on.
        image_processor (`BaseImageProcessor`): Its.
        args (`TrainingArguments`): Device, precision and checkpointing.
    """
    images = copy.copy(images)
    images.view = replace(images.view, sizes=[max(images.view.sizes)])
    own_random = [args.device] if args.device.type == "cuda" else []
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    def step(count: int) -> None:
        batch = collate_labelled([images[SampleKey(number % len(images), 0, 0)] for number in range(count)])
        batch = send_to_device(batch, args.device)
        pixels = normalize_images(batch["pixel_values"], batch["pixel_mask"], **normalization_of(image_processor))
        buffers = {name: buffer.clone() for name, buffer in detector.named_buffers()}
        kept = [
            torch.empty_like(p) for p in detector.parameters() if p.requires_grad for _ in range(_OPTIMIZER_COPIES)
        ]
        try:
            with (
                torch.random.fork_rng(own_random),
                torch.autocast(args.device.type, dtype=half, enabled=half is not None),
            ):
                detector(**batch | {"pixel_values": pixels}).loss.backward()
        finally:
            del kept
            detector.zero_grad(set_to_none=True)
            for name, buffer in detector.named_buffers():
                buffer.copy_(buffers[name])

    detector.to(args.device).train()
    if args.gradient_checkpointing:
        detector.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    eval_frozen(get_backbone(detector))
    return step
