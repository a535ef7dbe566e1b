"""`aligndet pretrain`: pre-train a detector, or with SoCo a backbone, on images with proposals."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from ..cards import versions
from ..data.bit_depth import pixel_window, settle_pixel_window, window_line
from ..data.columns import proposal_record, validate_proposals
from ..data.formats import load_dataset_source
from ..files import write_json
from ..hub import open_repository
from ..reporting.run_record import SUMMARY
from ..training import sharding
from ..training.checkpointing import (
    prepare_output_dir,
    remove_checkpoints,
    require_same_run,
)
from ..training.compilation import compile_networks
from ..training.pretrain_arguments import PretrainArguments
from ..training.pretrain_loop import Run, train, write_result
from ..training.pretrain_methods import METHODS
from ..training.pretrain_setup import (
    build_accelerator,
    build_loader,
    build_optimizer,
    compared_configuration,
    open_stream,
)
from ..training.publish import publish_run

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """
    What [`pretrain`] returns.

    Attributes:
        output_dir (`Path`): The checkpoint of the method's model, with the log, the summary and the card.
        detector_dir (`Path`): The plain detector and its image processor; of SoCo the backbone.
        metrics (`dict[str, float]`): The last entry of the log.
    """

    output_dir: Path
    detector_dir: Path
    metrics: dict[str, float]


def pretrain(arguments: PretrainArguments) -> PretrainResult:
    """
    Pre-train a detector, or with SoCo a backbone, on images with proposals, and export it.

    Writes to `output_dir`: the method's model (`save_pretrained`), `detector/` (a plain `transformers` detector with
    its image processor; of SoCo `backbone/` and `torchvision.safetensors`), `log.jsonl`, `pretrain_summary.json`, a
    model card, `report.html`, `backbone_report.json` or `transfer_report.json` if weights were loaded, and
    `checkpoint-<step>` folders. The same call again resumes from the last checkpoint, exactly; of a finished run it
    only repeats the upload, if one is asked for.

    Args:
        arguments ([`PretrainArguments`]): The configuration.

    Returns:
        [`PretrainResult`]

    Raises:
        DataError: the dataset lacks proposals or is broken.
        ValueError: a configuration that cannot run, or that differs from that of the run in `output_dir`.
        OSError: `output_dir` cannot be written to, or the disk is full. The last checkpoint stays.
        FloatingPointError: the gradients stay infinite or NaN.
        Interrupted: SIGTERM or SIGINT; a checkpoint was written.
    """
    method = METHODS[arguments.method]
    accelerator = build_accelerator(arguments)
    configuration = compared_configuration(arguments, accelerator)
    output_dir = prepare_output_dir(arguments.output_dir)
    if accelerator.is_main_process:
        remove_checkpoints(output_dir, only_unfinished=not arguments.overwrite_output_dir)
        if arguments.overwrite_output_dir:
            (output_dir / SUMMARY).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    # Before any work, so that a missing token does not end a run that took days.
    repo_id = None
    if arguments.push_to_hub and accelerator.is_main_process:
        name = arguments.hub_model_id or output_dir.resolve().name
        repo_id = open_repository(
            name,
            private=arguments.hub_private_repo,
            revision=arguments.hub_revision,
            license=arguments.card_license,
        )
    if (output_dir / SUMMARY).exists():
        summary = json.loads((output_dir / SUMMARY).read_text())
        require_same_run(summary["configuration"], configuration, output_dir)
        accelerator.print(f"The run in {output_dir} is finished; --overwrite_output_dir starts it anew.")
        if accelerator.is_main_process:
            publish_run(output_dir, arguments, repo_id, anew=False)
        return PretrainResult(output_dir, output_dir / method.product, summary["metrics"])

    if arguments.streaming:
        dataset, report, data = open_stream(arguments)
    else:
        with accelerator.main_process_first():
            dataset = load_dataset_source(arguments.dataset, arguments.split)
        report = validate_proposals(dataset, arguments.dataset, with_clusters=arguments.use_clusters)
        data = {"images": report.rows, "proposals": report.boxes}
        window = settle_pixel_window([dataset])
        if window is not None:
            accelerator.print(window_line(window))
    accelerator.print(report)
    model, image_processor, loaded = method.build_model(arguments, dataset)
    if loaded is not None:
        accelerator.print(loaded)
        if accelerator.is_main_process:
            write_json(output_dir / loaded.file_name, loaded.to_dict())
    if (window := pixel_window(dataset)) is not None:
        image_processor.pixel_window = list(window)
    views, collate = method.build_views(arguments, accelerator, dataset, model.config)
    sampler, loader = build_loader(arguments, accelerator, views, collate)
    optimizer = build_optimizer(model, arguments)
    if arguments.torch_compile:
        compile_networks(method.networks(model))
    model, optimizer = sharding.prepare(accelerator, model, optimizer)
    run = Run(
        arguments,
        accelerator,
        model,
        optimizer,
        image_processor,
        sampler,
        loader,
        about={
            "configuration": configuration,
            "data": data,
            "world_size": accelerator.num_processes,
            "proposals": proposal_record(dataset),
            "versions": versions(),
        },
    )
    run.resume()
    accelerator.init_trackers("aligndet", config={key: str(value) for key, value in configuration.items()})
    train(run)
    model = sharding.whole_model(accelerator, run.method_model)
    if accelerator.is_main_process:
        write_result(run, model)
        publish_run(output_dir, arguments, repo_id)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return PretrainResult(output_dir, output_dir / method.product, run.metrics)
