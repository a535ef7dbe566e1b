"""`aligndet pretrain`: pre-train a detector, or with SoCo a backbone, on images with proposals."""

import copy
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset

from ..cards import versions
from ..data.bit_depth import pixel_window, settle_pixel_window, window_line
from ..data.columns import has_clusters, proposal_record, validate_proposals
from ..data.formats import load_dataset_source
from ..data.launch import Launch
from ..data.shards import content_hash
from ..data.views import choose_sizes
from ..detectors.families import family_of
from ..flags import local_paths, takes_arguments
from ..hub import open_repository
from ..models import AlignDetForPreTraining, SoCoForPreTraining
from ..reporting.run_record import SUMMARY
from ..runs import RunFolder
from ..training import pretrain_aligndet, pretrain_soco, sharding
from ..training.best_boxes import BOXES, BestBoxes
from ..training.compilation import compile_networks
from ..training.pretrain_arguments import DEFAULTS, PretrainArguments
from ..training.pretrain_loop import Run, train, write_result
from ..training.pretrain_setup import (
    build_accelerator,
    build_batches,
    build_optimizer,
    compared_configuration,
    open_stream,
)
from ..training.publish import finished_metrics, publish_run
from ..training.run_length import length_note, warmup_note
from ..training.schedules import Schedules
from ..training.start import start_hashes, tell_anchors, tell_weights, training_folder

# What is written to `output_dir`, beside the summary and what every training writes.
WRITTEN = ["log.jsonl", "model.safetensors", "detector", "backbone", BOXES, "torchvision.safetensors"]

# What the data decide where it is not given.
CHOSEN = {"image_sizes", "use_clusters"}

# Of each method the model, and the module that builds the model and its views.
METHODS = {"aligndet": (AlignDetForPreTraining, pretrain_aligndet), "soco": (SoCoForPreTraining, pretrain_soco)}


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """
    What [`pretrain`] returns.

    Attributes:
        output_dir (`Path`): The checkpoint of the method's model, with the log, the summary and the card.
        metrics (`dict[str, float]`): The last entry of the log.
        detector_dir (`Path`, *optional*): The plain detector and its image processor, of AlignDet.
        backbone_dir (`Path`, *optional*): The backbone, of SoCo.
    """

    output_dir: Path
    metrics: dict[str, float]
    detector_dir: Path | None = None
    backbone_dir: Path | None = None


@takes_arguments
def pretrain(arguments: PretrainArguments) -> PretrainResult:
    """
    Pre-train a detector, or with SoCo a backbone, on images with proposals, and export it.

    Writes to `output_dir`: the method's model (`save_pretrained`), `detector/` (a plain `transformers` detector with
    its image processor; of SoCo `backbone/` and `torchvision.safetensors`), `log.jsonl`, `pretrain_summary.json`, a
    model card, `report.html`, `boxes.jpg` (what the detector finds before and after), `backbone_report.json` or
    `transfer_report.json` if weights were loaded, and `checkpoint-<step>` folders. The same call again resumes from
    the last checkpoint, exactly; of a finished run it only repeats the upload, if one is asked for. Every checkpoint
    has what the run exports, as far as it is.

    Args:
        arguments ([`PretrainArguments`]): The configuration.

    Returns:
        [`PretrainResult`]

    Raises:
        DataError: the dataset lacks proposals or is broken.
        ValueError: a configuration that cannot run, or `output_dir` is in use or holds something else, such as a run
            of another configuration or of other data. `max_steps` and `num_train_epochs` may change: the run goes on,
            with the schedules of its new length.
        OSError: `output_dir` cannot be written to, or the disk is full. The last checkpoint stays.
        FloatingPointError: the gradients stay infinite or NaN.
        Interrupted: SIGTERM or SIGINT; a checkpoint was written.
    """
    accelerator = build_accelerator(arguments)
    with training_folder(arguments, "pretrain", WRITTEN, SUMMARY) as folder:
        configuration = compared_configuration(arguments, accelerator)
        places = local_paths(arguments) - ({"dataset"} if arguments.streaming else set())  # a stream is not hashed
        changes = folder.claim({"max_steps", "num_train_epochs"}, places, settings=configuration)
        repo_id = Launch().on_main(open_repository, arguments, folder.path)
        dataset, data = _load_data(arguments, accelerator, folder)
        if folder.is_finished and not changes:
            return _result(arguments, folder.path, finished_metrics(folder.path, SUMMARY, arguments, repo_id))
        arguments = copy.copy(arguments)
        for name in CHOSEN & data.keys():
            setattr(arguments, name, data[name])
        run, best_boxes = _start(arguments, accelerator, configuration, dataset, data, folder)
        if changes:
            run.tell_changes(changes)
            folder.extend()
        train(run)
        model = sharding.whole_model(accelerator, run.model)
        if accelerator.is_main_process:
            write_result(run, model)
            if best_boxes is not None:
                best_boxes.draw(folder.path / model.product, folder.path / BOXES)
            publish_run(folder.path, arguments, repo_id)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return _result(arguments, folder.path, run.progress.metrics)


def _result(arguments: PretrainArguments, output_dir: Path, metrics: dict[str, float]) -> PretrainResult:
    product = METHODS[arguments.method][0].product
    return PretrainResult(output_dir=output_dir, metrics=metrics, **{f"{product}_dir": output_dir / product})


def _load_data(arguments: PretrainArguments, accelerator: Accelerator, folder: RunFolder) -> tuple[Dataset, dict]:
    """The data, whose content is a part of what the run is, even if it is finished; and how much it is."""
    on_main = Launch().on_main
    if arguments.streaming:
        dataset, report, data = open_stream(arguments)
    else:
        with accelerator.main_process_first():
            dataset = load_dataset_source(arguments.dataset, arguments.split)
        data, use_clusters = {}, arguments.use_clusters
        if use_clusters is None:
            data["use_clusters"] = use_clusters = has_clusters(dataset)
            if use_clusters:
                accelerator.print("The clusters of the proposals are the classes; --use_clusters false for one class.")
        report = validate_proposals(dataset, arguments.dataset, with_clusters=use_clusters)
        data |= {"images": report.rows, "proposals": report.boxes}
        if arguments.image_sizes is None:
            data["image_sizes"], line = choose_sizes(DEFAULTS["aligndet"]["image_sizes"], report.images.sizes)
            accelerator.print(line)
        window = settle_pixel_window([dataset])
        if window is not None:
            accelerator.print(window_line(window))
    accelerator.print(report)
    content = {} if arguments.streaming else {"content": on_main(content_hash, dataset, arguments.disable_tqdm)}
    folder.claim(data=data | content, start=on_main(start_hashes, arguments))
    return dataset, data


def _start(
    arguments: PretrainArguments,
    accelerator: Accelerator,
    configuration: dict,
    dataset: Dataset,
    data: dict,
    folder: RunFolder,
) -> tuple[Run, BestBoxes | None]:
    """The run, from its last checkpoint if it has one; and what its detector finds before, if that is to be drawn."""
    _, method = METHODS[arguments.method]
    model, image_processor, loaded = method.build_model(arguments, dataset)
    tell_weights(loaded, folder.path)
    if (window := pixel_window(dataset)) is not None:
        image_processor.pixel_window = list(window)
    views, collate = method.build_views(arguments, accelerator, dataset, model.config)
    if arguments.method == "aligndet" and not arguments.streaming:
        tell_anchors(model.online_detector, views)
    best_boxes = None
    if arguments.write_report and arguments.method == "aligndet" and not arguments.streaming:
        best_boxes = BestBoxes(model, dataset, image_processor) if accelerator.is_main_process else None
    batches = build_batches(arguments, accelerator, views, collate)
    optimizer = build_optimizer(model, arguments)
    if arguments.torch_compile:
        compile_networks(model.networks())
    prepared, optimizer = sharding.prepare(accelerator, model, optimizer)
    model = accelerator.unwrap_model(prepared)
    about = {
        "configuration": configuration,
        "data": data,
        "world_size": accelerator.num_processes,
        "proposals": proposal_record(dataset),
        "versions": versions(),
    }
    schedules = Schedules(arguments, model, len(batches))
    is_detr = arguments.method == "aligndet" and not family_of(model.online_detector.config).own_loss
    if is_detr and not arguments.streaming:
        if note := length_note(schedules.total_steps, schedules.total_steps / len(batches)):
            accelerator.print(f"note: {note}")
    if note := warmup_note(schedules.warmup_steps, schedules.total_steps):
        accelerator.print(f"note: {note}")
    run = Run(arguments, accelerator, model, prepared, optimizer, image_processor, batches, schedules, about)
    if accelerator.num_processes > 1:
        accelerator.print(f"Pre-training in {accelerator.num_processes} processes.")
    accelerator.print(schedules)
    run.resume(Launch().on_main)
    accelerator.init_trackers("aligndet", config={key: str(value) for key, value in configuration.items()})
    return run, best_boxes
