"""What a pre-training run is made of: accelerator, model, data and parameter groups, from its arguments."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..data.collate import collate_views, normalize_images
from ..data.columns import BoxReport, DataError, read_values, require_columns, validate_proposals
from ..data.dataset import ProposalViews, init_worker
from ..data.sampling import EpochBatchSampler
from ..data.streaming import first_rows, load_stream
from ..data.view_stream import StreamBatches, ViewStream
from ..data.views import ViewConfig
from ..detectors.build import build_image_processor, is_new, load_detector
from ..detectors.families import family_of, num_queries, require_fitting_sizes
from ..detectors.transfer import transfer_detector
from ..flags import names_of
from ..models import AlignDetForPreTraining
from .pretrain_arguments import PretrainArguments
from .sharding import require_supported

logger = logging.get_logger(__name__)

# Of a stream, whose proposals cannot all be validated before it is used.
CHECKED_ROWS = 256


def build_accelerator(arguments: PretrainArguments) -> Accelerator:
    devices = 0 if arguments.use_cpu else torch.cuda.device_count()
    if devices > 1 and not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):
        raise ValueError(
            f"{devices} GPUs are visible, but one process was started. To use all: accelerate launch --num_processes "
            f"{devices} -m aligndet_hf pretrain ...; to use one: CUDA_VISIBLE_DEVICES=0 aligndet pretrain ..."
        )
    accelerator = Accelerator(
        cpu=arguments.use_cpu,
        mixed_precision=arguments.mixed_precision,
        log_with=[name for name in arguments.report_to if name != "none"] or None,
        project_dir=arguments.output_dir,
        # A batch without any proposal leaves denoising embeddings without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    require_supported(accelerator, arguments.method, arguments.torch_compile)
    return accelerator


def compared_configuration(arguments: PretrainArguments, accelerator: Accelerator) -> dict:
    """What has to be the same when a run is resumed."""
    compared = names_of(type(arguments), "result", "data", "start")
    values = {key: value for key, value in dataclasses.asdict(arguments).items() if key in compared}
    # The batch counts as the images of one step, however they are spread over processes and micro-batches.
    images = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    values |= {"mixed_precision": accelerator.mixed_precision, "images_per_step": images}
    if arguments.streaming:  # which read it in an order of their own
        values["readers"] = [accelerator.num_processes, max(1, arguments.dataloader_num_workers)]
    return values


def open_stream(arguments: PretrainArguments) -> tuple[datasets.IterableDataset, BoxReport, dict]:
    """The dataset as a stream, a validation of its first rows, and what tells it from another one."""
    stream, version = load_stream(arguments.dataset, arguments.split)
    require_columns(stream, ["proposals"], arguments.dataset)
    source = f"{arguments.dataset}, its first rows"
    report = validate_proposals(first_rows(stream, CHECKED_ROWS), source, with_clusters=arguments.use_clusters)
    return stream, report, {"images": None, "stream": version}


def class_names(arguments: PretrainArguments, dataset: datasets.Dataset) -> dict[int, str]:
    """One class, or one for each cluster that the proposals mention."""
    if not arguments.use_clusters:
        return {0: "object"}
    if arguments.streaming:
        return {cluster: f"cluster_{cluster}" for cluster in range(arguments.num_clusters)}
    highest = 0
    for table in dataset.select_columns(["proposals"]).with_format("arrow").iter(batch_size=1000):
        clusters, _ = read_values(table["proposals"], "cluster")
        if len(clusters) and clusters.min() < 0:
            raise DataError(
                f"{arguments.dataset}: column 'proposals', field 'cluster' holds {clusters.min()}; expected 0, 1, ..."
            )
        highest = max(highest, int(clusters.max(initial=0)))
    return {cluster: f"cluster_{cluster}" for cluster in range(highest + 1)}


def build_model(arguments: PretrainArguments, dataset: datasets.Dataset):
    """
    The model to train, the image processor to export with the detector, and the report of the weights that a new
    detector's backbone got, or of what a checkpoint for other classes passed on.
    """
    id2label = class_names(arguments, dataset)
    torch.manual_seed(arguments.seed)
    detector, report = load_detector(arguments, len(id2label), id2label)
    if detector.config.num_labels != len(id2label):  # A checkpoint for other classes.
        detector, report = transfer_detector(detector, len(id2label), id2label)
    detector.config.id2label, detector.config.label2id = id2label, {name: i for i, name in id2label.items()}
    config = _with_a_useful_backbone(arguments.aligndet_config, is_random=is_new(arguments) and report is None)
    model = AlignDetForPreTraining.from_detector(detector, **config).train()
    if arguments.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    sizes = sorted(arguments.image_sizes)
    # Families of square images are evaluated at the middle of the sizes they were trained with, others at the largest.
    size = sizes[len(sizes) // 2] if family_of(detector.config).resize == "square" else sizes[-1]
    return model, build_image_processor(detector, size, arguments.max_size), report


def _with_a_useful_backbone(config: dict, is_random: bool) -> dict:
    """Fields of AlignDetConfig for a backbone that is random or not: a random one is trained, and never frozen."""
    if not is_random:
        return config
    if config.get("freeze_backbone", False):
        raise ValueError(
            "the backbone is random and frozen, which teaches the detector nothing. Give --backbone_weights (`timm`, "
            "or a file), or leave out freeze_backbone"
        )
    logger.warning(
        "The backbone starts from random weights, so it is trained, not frozen; give --freeze_batch_norm false too. "
        "--backbone_weights timm starts from ImageNet's instead, which is better unless there are very many images."
    )
    return config | {"freeze_backbone": False}


def enable_gradient_checkpointing(model: AlignDetForPreTraining) -> None:
    """
    Has the layers of encoder and decoder computed again in the backward pass, instead of kept.

    Raises:
        `ValueError`: the family's layers cannot be, in transformers.
    """
    # Asked of this model, since some detectors deny what all of their layers can do.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the new name
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"gradient_checkpointing: transformers has none for {model.config.detector_config.model_type} "
            "(docs/families.md). To save memory, lower the image_sizes or the batch, or set mixed_precision to bf16"
        ) from error


def build_views(arguments: PretrainArguments, accelerator: Accelerator, dataset: datasets.Dataset, config):
    """The data set of views for a model of this config, and the function that makes batches of its items."""
    detector_config = config.detector_config
    family = family_of(detector_config)
    queries = arguments.max_proposals if family.own_loss else num_queries(detector_config)
    require_fitting_sizes(detector_config, arguments.image_sizes)
    if arguments.max_proposals > queries:
        accelerator.print(f"The detector has {queries} queries: at most {queries} proposals per image are used.")
    views = ProposalViews(
        dataset,
        ViewConfig(
            sizes=arguments.image_sizes,
            max_size=arguments.max_size,
            resize=family.resize,
            flip_probability=arguments.flip_probability,
            color=arguments.color,
            crop_scale=arguments.crop_scale and tuple(arguments.crop_scale),
        ),
        seed=arguments.seed,
        max_proposals=min(arguments.max_proposals, queries),
        proposal_sampling=arguments.proposal_sampling,
        use_clusters=arguments.use_clusters,
    )
    return views, collate_views


def build_loader(arguments: PretrainArguments, accelerator: Accelerator, views: Dataset, collate: Callable):
    """The sampler, and a loader of which one item is one optimizer step of this process: a list of micro-batches."""
    images = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
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
            seed=arguments.seed,
            buffer_size=arguments.stream_buffer,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=arguments.dataloader_num_workers,
            num_classes=arguments.num_clusters if arguments.use_clusters else 1,
        )
        loader = DataLoader(stream, batch_size=images, collate_fn=partial(_with_position, collate=collate), **options)
        batches = StreamBatches(stream, loader, arguments.max_steps)
        return batches, batches
    sampler = EpochBatchSampler(
        len(views),
        images,
        seed=arguments.seed,
        drop_last=True,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    loader = DataLoader(views, batch_sampler=sampler, collate_fn=collate, **options)
    return sampler, loader


def _collate_step(items: list[dict], collate: Callable, micro_batch_size: int) -> list[dict]:
    return [collate(items[i : i + micro_batch_size]) for i in range(0, len(items), micro_batch_size)]


def _with_position(items: list[dict], collate) -> tuple:
    """A batch of a stream, and where the stream is after it."""
    return items[-1]["position"], collate(items)


def to_device(batch: dict, device: torch.device, image_processor) -> dict:
    """Copy a batch to the device, and normalise its images there."""
    batch = send_to_device(batch, device, non_blocking=True)
    for prefix in ("", "momentum_"):
        batch[f"{prefix}pixel_values"] = normalize_images(
            batch[f"{prefix}pixel_values"],
            batch[f"{prefix}pixel_mask"],
            image_processor.image_mean,
            image_processor.image_std,
        )
    return batch


def export(model: AlignDetForPreTraining, output_dir: Path, image_processor) -> None:
    """Write the plain detector with its image processor to `output_dir/detector`."""
    model.export_detector(output_dir / "detector", image_processor)


def build_optimizer(model: torch.nn.Module, arguments: PretrainArguments) -> torch.optim.Optimizer:
    """AdamW, or LARS (You et al., 2017) with momentum 0.9, which leaves what does not decay at the common rate."""
    groups = parameter_groups(model, arguments)
    if arguments.optimizer == "lars":
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
