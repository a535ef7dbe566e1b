"""What every pre-training run is made of, whatever its method: accelerator, data and optimizer, from its arguments."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial

import datasets
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor

from ..data.collate import normalize_images
from ..data.columns import BoxReport, require_columns, validate_proposals
from ..data.sampling import EpochBatches, EpochBatchSampler, StepBatches
from ..data.streaming import first_rows, load_stream
from ..data.view_stream import StreamBatches, ViewStream
from ..flags import names_of
from ..processes import init_worker, require_one_gpu, trains_on_cpu
from .pretrain_arguments import PretrainArguments
from .sharding import require_supported

# Of a stream, whose proposals cannot all be validated before it is used.
CHECKED_ROWS = 256


def build_accelerator(arguments: PretrainArguments) -> Accelerator:
    if not arguments.use_cpu and not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):
        require_one_gpu(torch.cuda.device_count(), "pretrain")
    accelerator = Accelerator(
        cpu=trains_on_cpu(arguments.use_cpu),
        mixed_precision="bf16" if arguments.bf16 else "fp16" if arguments.fp16 else None,  # or what the launcher says
        log_with=[name for name in arguments.report_to if name != "none"] or None,
        project_dir=arguments.output_dir,
        # A batch without any proposal leaves denoising embeddings without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    require_supported(accelerator, arguments.method, arguments.torch_compile)
    return accelerator


def compared_configuration(arguments: PretrainArguments, accelerator: Accelerator) -> dict:
    """What has to be the same when a run is resumed."""
    compared = names_of(type(arguments), "result", "data", "start") - {"bf16", "fp16"}  # or the launcher's
    values = {key: value for key, value in dataclasses.asdict(arguments).items() if key in compared}
    # The batch counts as the images of one step, however they are spread over processes and micro-batches.
    images = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    values |= {"mixed_precision": accelerator.mixed_precision, "images_per_step": images}
    if arguments.streaming:  # which read it in an order of their own
        values["readers"] = [accelerator.num_processes, max(1, arguments.dataloader_num_workers)]
    return values


def open_stream(arguments: PretrainArguments) -> tuple[datasets.IterableDataset, BoxReport, dict]:
    """The dataset as a stream, a validation of its first rows, and what tells it from another one."""
    stream, version = load_stream(arguments.dataset, arguments.split or "train")
    require_columns(stream, ["proposals"], arguments.dataset)
    source = f"{arguments.dataset}, its first rows"
    report = validate_proposals(first_rows(stream, CHECKED_ROWS), source, with_clusters=bool(arguments.use_clusters))
    return stream, report, {"images": None, "stream": version}


def build_batches(
    arguments: PretrainArguments, accelerator: Accelerator, views: Dataset, collate: Callable
) -> StepBatches:
    """The batches of this process, each a list of micro-batches for one optimizer step."""
    images = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    share = {"seed": arguments.seed, "rank": accelerator.process_index, "world_size": accelerator.num_processes}
    options = {
        "num_workers": arguments.dataloader_num_workers,
        "worker_init_fn": init_worker,
        "persistent_workers": arguments.dataloader_num_workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
    }
    collate = partial(_collate_step, collate=collate, micro_batch_size=arguments.per_device_train_batch_size)
    if arguments.streaming:
        stream = ViewStream(
            views,
            images,
            buffer_size=arguments.stream_buffer,
            num_workers=arguments.dataloader_num_workers,
            num_classes=arguments.num_clusters if arguments.use_clusters else 1,
            **share,
        )
        loader = DataLoader(stream, batch_size=images, collate_fn=partial(_with_position, collate=collate), **options)
        return StreamBatches(stream, loader, arguments.max_steps)
    sampler = EpochBatchSampler(len(views), images, drop_last=True, **share)
    return EpochBatches(sampler, DataLoader(views, batch_sampler=sampler, collate_fn=collate, **options))


def _collate_step(items: list[dict], collate: Callable, micro_batch_size: int) -> list[dict]:
    return [collate(items[i : i + micro_batch_size]) for i in range(0, len(items), micro_batch_size)]


def _with_position(items: list[dict], collate) -> tuple:
    """A batch of a stream, and where the stream is after it."""
    return items[-1]["position"], collate(items)


def to_device(batch: dict, device: torch.device, image_processor: BaseImageProcessor) -> dict:
    """Copies a batch to the device, and normalises its images there."""
    batch = send_to_device(batch, device, non_blocking=True)
    mean, std = image_processor.image_mean, image_processor.image_std
    for name in [name for name in batch if name.endswith("pixel_values")]:
        if isinstance(views := batch[name], list):  # of one size each, so without padding
            batch[name] = [normalize_images(view, None, mean, std) for view in views]
        else:
            batch[name] = normalize_images(views, batch[name.replace("values", "mask")], mean, std)
    return batch


def build_optimizer(model: torch.nn.Module, arguments: PretrainArguments) -> torch.optim.Optimizer:
    """AdamW, or LARS (You et al., 2017) with momentum 0.9, which leaves what does not decay at the common rate."""
    groups = parameter_groups(model, arguments)
    if arguments.optim == "lars":
        from timm.optim import Lars

        return Lars(groups, arguments.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, arguments.learning_rate, fused=True)


def parameter_groups(model: torch.nn.Module, arguments: PretrainArguments) -> list[dict]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_decayed = [arguments.decay_norms_and_biases or parameter.ndim > 1 for parameter in trained]
    decayed = [parameter for parameter, flag in zip(trained, is_decayed, strict=True) if flag]
    plain = [parameter for parameter, flag in zip(trained, is_decayed, strict=True) if not flag]
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
