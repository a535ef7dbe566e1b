"""Opening the checkpoint of a detector, so that what is damaged in it is told instead of found in the results."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from .files import first_line

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

# What transformers raises where a value of a JSON file is of another kind than it expects.
_FAULTS = (AttributeError, LookupError, TypeError, ArithmeticError, StrictDataclassError)
# What a detector finds boxes without: counters of batches, and embeddings that only a training step looks at.
_NOT_NEEDED = re.compile(r"num_batches_tracked$|(^|\.)denoising_class_embed\.")


def open_checkpoint(source: str, is_whole: bool) -> PreTrainedModel:
    """
    Loads a detector in float32, whatever its file has: training in half precision keeps float32 weights, and a CPU
    has no half precision for all layers.

    Args:
        source (`str`): a folder or Hub id that [`~aligndet_hf.detectors.build.find_detector`] gave.
        is_whole (`bool`): whether to refuse a checkpoint that lacks layers, for what a detector finds with random
            ones means nothing. Where it is trained they may start so, which is told.

    Raises:
        `ValueError`: the weights are damaged, have shapes that the config does not make, or are not all there, or the
            config makes no detector. The message says which.
    """
    try:
        detector, info = AutoModelForObjectDetection.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{source}: its weights are damaged or no weights ({first_line(error)}). Fetch or save it again"
        ) from error
    except _FAULTS as error:
        raise ValueError(
            f"{source}: its config.json makes no detector ({first_line(error)}). Correct it, or fetch it again"
        ) from error
    if wrong := sorted(info["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise ValueError(
            f"{source}: {len(wrong)} tensors have other shapes than its config.json makes, such as {name} with "
            f"{list(found)} for {list(expected)}. Weights and config.json are not of one detector"
        )
    if broken := [name for name, tensor in detector.named_parameters() if not torch.isfinite(tensor).all()]:
        raise ValueError(
            f"{source}: {len(broken)} tensors hold NaN or infinite numbers, such as {broken[0]}. Its training has "
            "diverged, or the file is damaged: take an earlier checkpoint"
        )
    if new := sorted(name for name in info["missing_keys"] if not _NOT_NEEDED.search(name)):
        what = f"{source} lacks {len(new)} tensors of its detector, such as {new[0]}"
        if is_whole:
            raise ValueError(f"{what}. Fetch or save it again, or fine-tune it first")
        print(f"note: {what}, which start from random numbers")
    return detector


def open_processor(source: str) -> BaseImageProcessor:
    """
    Loads the image processor of a detector, and tries it on a black image.

    Args:
        source (`str`): a folder or Hub id.

    Raises:
        `OSError`: there is none.
        `ValueError`: it cannot prepare an image, as its file has values that it does not understand.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        processor(images=np.zeros((32, 48, 3), np.uint8), input_data_format="channels_last", return_tensors="pt")
    except (*_FAULTS, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source}: its image processor prepares no image ({first_line(error)}). Correct its JSON file, or "
            "fetch it again"
        ) from error
    return processor
