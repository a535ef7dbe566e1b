"""`aligndet finetune`: fine-tune a detector on labelled images, starting from a pre-trained one."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from datasets import Dataset
from transformers import EarlyStoppingCallback, set_seed

from ..cards import command_line, told, versions
from ..data.bit_depth import saved_window, settle_pixel_window, window_line
from ..data.checks import leak_note, mask_note, metric_note, objects_per_image, query_note
from ..data.columns import validate_objects
from ..data.dataset import LabelledImages, MixedImages
from ..data.door import listed
from ..data.errors import DataError
from ..data.formats import category_names, load_dataset_source, load_labelled, split_names
from ..data.launch import Launch
from ..data.readers.spellings import with_categories
from ..data.shards import content_hash
from ..data.sources import model_hash
from ..data.splits import nested_subsets
from ..data.views import PUBLISHED_SIZES, ViewConfig, choose_sizes
from ..detectors.backbones import freeze_batch_norms, get_backbone, set_backbone_trainable
from ..detectors.build import (
    DetectorArguments,
    build_image_processor,
    find_detector,
    ignored_note,
    is_new,
    load_detector,
    require_useful_backbone,
    save_image_processor,
)
from ..detectors.criterion import use_correct_loss
from ..detectors.families import family_of, num_queries, require_fitting_sizes
from ..detectors.transfer import TransferReport, transfer_detector
from ..evaluation.coco_metrics import format_table
from ..evaluation.detections import EvaluationImages
from ..evaluation.image_matches import MATCHES, ImageMatches
from ..evaluation.speed import measure_speed
from ..files import clear_write_errors, read_json, write_json
from ..flags import local_paths, names_of, takes_arguments
from ..hub import open_repository
from ..objects import Given
from ..processes import require_one_gpu
from ..reporting.predictions import PREDICTIONS, WORST, tell_predictions
from ..reporting.run_record import DIAGNOSIS, RESULTS, SETTINGS, SPEED
from ..runs import RunFolder
from ..training.batch_size import largest_batch, trial_step
from ..training.checkpointing import find_last_checkpoint
from ..training.detection_trainer import DetectionTrainer
from ..training.finetune_arguments import FinetuneArguments, require_metric
from ..training.publish import finished_metrics, publish_run
from ..training.run_length import TellForecast, finetuning_note, warmup_note
from ..training.start import start_hashes, tell_anchors, tell_weights, training_folder, training_view

BATCH_SIZE = "batch_size.json"
# What is written to `output_dir`, beside the results and what every training writes.
WRITTEN = [
    SETTINGS, "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "*processor_config.json", "trainer_state.json", BATCH_SIZE, MATCHES, DIAGNOSIS, PREDICTIONS, WORST, SPEED,
]  # fmt: skip


@dataclass(frozen=True)
class FinetuneResult:
    """
    What [`finetune`] returns.

    Attributes:
        output_dir (`Path`): The plain detector with its image processor, results, trainer state and card.
        metrics (`dict`): What `CocoMetrics.compute()` gave at the end; empty if nothing was measured.
    """

    output_dir: Path
    metrics: dict


@takes_arguments
def finetune(arguments: FinetuneArguments) -> FinetuneResult:
    """
    Fine-tune a detector on labelled images: one that was pre-trained, any other checkpoint, or a new one.

    Writes to `output_dir` a plain `transformers` detector with its image processor, `results.json`,
    `trainer_state.json` (the log), `transfer_report.json` (or, for a new detector whose backbone got weights,
    `backbone_report.json`), a model card, `report.html`, and `checkpoint-<step>` folders. The same call again resumes
    from the last checkpoint, exactly; of a finished run it only repeats the upload, if one is asked for.

    Args:
        arguments ([`FinetuneArguments`]): The configuration.

    Returns:
        [`FinetuneResult`]

    Raises:
        DataError: a dataset is broken, or the two do not have the same categories.
        ValueError: a configuration that cannot run, or `output_dir` is in use or holds something else, such as a run
            of another configuration or of other data. `max_steps` and `num_train_epochs` may change: the run goes on,
            with the schedule of its new length.
        OSError: `output_dir` cannot be written to, or the disk is full. The last checkpoint stays.
        Interrupted: SIGTERM or SIGINT; a checkpoint was written.
    """
    require_one_gpu(arguments.n_gpu, "finetune")
    processes = PartialState()
    with training_folder(arguments, "finetune", WRITTEN, RESULTS) as folder:
        settings = settings_of(arguments)
        changes = folder.claim({"max_steps", "num_train_epochs"}, local_paths(arguments), settings=settings)
        repo_id = Launch().on_main(open_repository, arguments, folder.path)
        data = _load_data(arguments, folder, processes)
        if folder.is_finished and not changes:
            return FinetuneResult(folder.path, finished_metrics(folder.path, RESULTS, arguments, repo_id))
        if arguments.image_sizes is None:
            arguments = copy.copy(arguments)
            arguments.image_sizes = data.image_sizes
            arguments.eval_size = arguments.eval_size or max(data.image_sizes)
        last = Launch().on_main(find_last_checkpoint, folder.path)
        checkpoint = last and last.path
        trainer, about = _start(arguments, data, folder, processes)
        if changes:
            trainer.require_steps(checkpoint)
            folder.extend()
            listed = ", ".join(f"{name}: {before} before, {now} now" for name, (before, now) in changes.items())
            processes.print(
                f"The run is {trainer.total_steps()} steps long now ({listed}). From its checkpoint on, the learning "
                "rates follow the schedule of that length; until there they followed the former schedule."
            )
        if last:
            processes.print(f"Resuming from {checkpoint}.")
        if processes.is_main_process:
            write_json(folder.path / SETTINGS, settings_of(arguments))
        trainer.fit(checkpoint)
        metrics = _finish(arguments, trainer, about, folder.path, processes)
        if processes.is_main_process:
            publish_run(folder.path, arguments, repo_id)
        processes.wait_for_everyone()
        report = " Look at report.html there." if arguments.write_report else ""
        processes.print(
            f"Finished. The detector is in {folder.path}.{report} Next: aligndet predict --detector {folder.path} ..."
        )
    return FinetuneResult(folder.path, metrics)


class _Data(NamedTuple):
    """What a run is trained with and measured on."""

    images: Dataset
    truth: Dataset | None
    pseudo: Dataset | None
    categories: list[str]
    window: tuple | None  # see `settle_pixel_window`
    image_sizes: list[int]


def _load_data(arguments: FinetuneArguments, folder: RunFolder, processes: PartialState) -> _Data:
    """The data, whose content is a part of what the run is, even if it is finished."""
    with processes.main_process_first():
        dataset, categories, report = _load_labelled(arguments.dataset, arguments.split, arguments.image_dir)
        require_metric(arguments.metric_for_best_model, categories)
        truth = None
        if arguments.do_eval:
            source = (arguments.eval_dataset, arguments.eval_split, arguments.eval_image_dir)
            try:
                _require_another_file(arguments)
                truth, _, _ = _load_labelled(*source, categories)
            except DataError as error:
                choices = "--eval_dataset and --eval_split say what to measure on, --do_eval false leaves it out"
                raise DataError(f"{error} ({choices}.)") from error
        pseudo = _pseudo_images(arguments)
    saved = _saved_start(arguments)
    known = saved and saved_window(saved)
    parts = [part for part in (dataset, truth, pseudo) if part is not None]
    window = settle_pixel_window(parts, arguments.pixel_window, known)
    if window is not None:
        processes.print(window_line(window))
    sizes, line = choose_sizes(PUBLISHED_SIZES, report.images.sizes)  # of all images, however few have labels
    if arguments.image_sizes is None:
        processes.print(line)
    rows = nested_subsets(len(dataset), [arguments.label_fraction], arguments.label_seed)[arguments.label_fraction]
    dataset = dataset.select(rows)
    on_main = Launch().on_main
    content = on_main(_fingerprint, arguments, dataset, truth, pseudo)
    content |= {"image_sizes": sizes} if arguments.image_sizes is None else {}
    folder.claim(data=content, start=on_main(start_hashes, arguments))
    return _Data(dataset, truth, pseudo, categories, window, sizes)


def _start(
    arguments: FinetuneArguments, data: _Data, folder: RunFolder, processes: PartialState
) -> tuple[DetectionTrainer, dict]:
    """The trainer, and what the results say of the run."""
    dataset, truth, pseudo, categories, window, _ = data
    if truth is not None and processes.is_main_process:
        notes = [leak_note(dataset, truth, arguments.eval_dataset), metric_note(objects_per_image(truth)[1])]
        for note in filter(None, notes):
            print(f"note: {note}")

    set_seed(arguments.seed)
    detector, report = _start_detector(arguments, categories)
    require_fitting_sizes(detector.config, [*arguments.image_sizes, arguments.eval_size])
    image_processor = build_image_processor(detector, arguments.eval_size, arguments.max_size)
    if window is not None:
        image_processor.pixel_window = list(window)
    view = training_view(arguments, family_of(detector.config).resize)
    images = _train_images(arguments, dataset, pseudo, categories, view, family_of(detector.config).masks)
    if arguments.auto_find_batch_size:
        arguments = _with_fitting_batch(arguments, detector, images, image_processor, folder)
    trainer = DetectionTrainer(
        detector,
        arguments,
        train_dataset=images,
        eval_dataset=EvaluationImages(truth, categories, image_processor) if truth else None,
        processing_class=image_processor,
        transferred=report.kept if isinstance(report, TransferReport) else (),
    )
    trainer.add_callback(TellForecast())
    if arguments.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(arguments.early_stopping_patience))
    if note := query_note(objects_per_image(dataset)[0], num_queries(detector.config)):
        processes.print(f"note: {note}")
    tell_anchors(detector, images)
    if family_of(detector.config).masks:
        processes.print(mask_note(dataset))
    together = f", in {processes.num_processes} processes" if processes.num_processes > 1 else ""
    processes.print(f"Fine-tuning on {len(dataset)} images with {len(categories)} categories{together}.")
    is_detr = not family_of(detector.config).own_loss
    if is_detr and (note := finetuning_note(trainer.total_steps())):
        processes.print(f"note: {note}")
    if note := warmup_note(arguments.get_warmup_steps(trainer.total_steps()), trainer.total_steps()):
        processes.print(f"note: {note}")
    tell_weights(report, folder.path)
    evaluation = {"dataset": told(arguments.eval_dataset), "split": arguments.eval_split, "images": len(truth or ())}
    return trainer, {"images": len(dataset), "evaluation": evaluation}


def _with_fitting_batch(
    arguments: FinetuneArguments, detector, images, image_processor, folder: RunFolder
) -> FinetuneArguments:
    """The same images per step, in the largest batches that fit into memory; a resumed run keeps the size it has."""
    arguments, path = copy.copy(arguments), folder.path / BATCH_SIZE
    arguments.auto_find_batch_size = False  # `Trainer`'s own would begin anew with the weights it has by then
    asked, known = arguments.per_device_train_batch_size, Launch().on_main(read_json, path)
    if known is not None:
        fitting = known["per_device_train_batch_size"]
    else:
        labelled = images.labelled if isinstance(images, MixedImages) else images
        fitting = largest_batch(trial_step(detector, labelled, image_processor, arguments), asked)
        Launch().on_main(write_json, path, {"per_device_train_batch_size": fitting})
    arguments.per_device_train_batch_size = fitting
    arguments.gradient_accumulation_steps = asked * arguments.gradient_accumulation_steps // fitting
    PartialState().print(
        f"Batches of {fitting} of {asked} images fit into memory: per_device_train_batch_size {fitting}, "
        f"gradient_accumulation_steps {arguments.gradient_accumulation_steps}."
    )
    return arguments


def _fingerprint(
    arguments: FinetuneArguments, dataset: Dataset, truth: Dataset | None, pseudo: Dataset | None
) -> dict:
    """Hashes of the content of all that has an influence on the weights."""
    data = {"images": len(dataset), "content": content_hash(dataset, arguments.disable_tqdm)}
    if truth is not None and arguments.is_led_by_measurements:
        data["eval_content"] = content_hash(truth, arguments.disable_tqdm)
    if pseudo is not None:
        data["pseudo_content"] = content_hash(pseudo, arguments.disable_tqdm)
    if saved := _saved_start(arguments):
        data["detector_content"] = model_hash(saved)
    return data


def _saved_start(arguments: FinetuneArguments) -> str | None:
    """The folder or Hub id of the detector to start from; of one in memory the name tells the content."""
    return None if is_new(arguments) or isinstance(arguments.detector, Given) else find_detector(arguments.detector)


def _finish(
    arguments: FinetuneArguments, trainer: DetectionTrainer, about: dict, output_dir: Path, processes: PartialState
) -> dict:
    """Measures and saves what training gave; the results come last, as the mark of a finished run."""
    if arguments.load_best_model_at_end and trainer.state.best_global_step:
        processes.print(
            f"The best measured weights are kept: {arguments.metric_for_best_model} "
            f"{100 * trainer.state.best_metric:.1f} after step {trainer.state.best_global_step} of "
            f"{trainer.state.global_step}."
        )
    choice, metrics = trainer.choose_weights(), {}
    if "AP_average" in choice:
        processes.print(
            f"AP {100 * choice['AP_average']:.1f} with the average of the weights, {100 * choice['AP_last']:.1f} with "
            f"the last ones: the {choice['kept']} is kept."
        )
    if trainer.eval_dataset is not None:
        if trainer.measured_at != trainer.state.global_step or arguments.load_best_model_at_end:
            trainer.evaluate()
        metrics = trainer.results
    if processes.is_main_process:
        with clear_write_errors(output_dir):
            trainer.model.save_pretrained(output_dir)
            save_image_processor(trainer.processing_class, output_dir)
            trainer.save_state()
            if metrics:
                ImageMatches.of(trainer.measured).save(output_dir / MATCHES)
                shown = arguments.num_pictures if arguments.write_report else 0
                tell_predictions(trainer.eval_dataset, trainer.measured, output_dir, shown)
            write_json(output_dir / SPEED, measure_speed(trainer.model, trainer.processing_class))
        results = {
            "metrics": metrics,
            "steps": trainer.state.global_step,
            "images": about["images"],
            "evaluation": about["evaluation"] if metrics else {},
            **({"weights": choice} if choice else {}),
            "card_license": arguments.card_license,
            "command": command_line("finetune", FinetuneArguments, arguments.given),
            "versions": versions(),
        }
        write_json(output_dir / RESULTS, results)
        if metrics:
            print(format_table(metrics))
    return metrics


def settings_of(arguments: FinetuneArguments) -> dict:
    """What makes a run this run and no other: everything that has an influence on its weights, as plain values."""
    own = names_of(
        FinetuneArguments, "result", "data", "start", *(["best"] if arguments.is_led_by_measurements else [])
    )
    own -= {"detector", "transfer"} if is_new(arguments) else names_of(DetectorArguments, "start")
    plain = arguments.to_dict()  # enums by value
    settings = {"detector": arguments.detector} | {name: plain[name] for name in sorted(own)}
    settings["images_per_step"] = (
        arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    )
    return json.loads(json.dumps(settings))  # tuples become lists, as they will when read back


def _require_another_file(arguments: FinetuneArguments) -> None:
    """A label file of one split is either for training or for measuring; one with several splits may be for both."""
    path = Path(arguments.dataset).expanduser()
    if arguments.eval_dataset == arguments.dataset and path.is_file() and len(split_names(path)) == 1:
        raise DataError(f"{path} is one split, which is trained on: measure on another file")


def _load_labelled(source: str, split: str | None, image_dir: str | None, categories: list[str] | None = None):
    """A validated dataset, the names of its categories (`categories` if those are given), and what was found in it."""
    flag = "--split" if categories is None else "--eval_split"
    dataset, names, report = load_labelled(source, split, image_dir, flag)
    if categories not in (None, names):
        if others := [name for name in names if name not in categories]:
            raise DataError(
                f"{source} (split {split}) has other categories than the training data: {listed(others, 8)}, which "
                f"are not among {listed(categories, 8)}. Rename or remove them."
            )
        dataset, names = with_categories(dataset, names, categories), categories
    PartialState().print(report)
    return dataset, names, report


def _train_images(arguments: FinetuneArguments, dataset, pseudo, categories: list[str], view: ViewConfig, masks: bool):
    """The labelled images, with masks if wanted, or these and the pseudo-labelled ones."""
    options = {
        "seed": arguments.seed,
        "augmentations": arguments.augmentations,
        "augmentation_probability": arguments.augmentation_probability,
    }
    labelled = LabelledImages(dataset, view, masks=masks, **options)
    if pseudo is None:
        return labelled
    source = arguments.pseudo_dataset
    if missing := {"score", "ignore"} - set(pseudo.features["objects"]):
        raise DataError(
            f"{source}: column 'objects' has no field {sorted(missing)[0]!r}. Expected what `aligndet pseudolabel` "
            "writes; images with labels of people belong into --dataset."
        )
    if (names := category_names(pseudo, source)) != categories:
        raise DataError(
            f"{source} has the categories {', '.join(names)}, the labelled images have {', '.join(categories)}. Give "
            "the pseudo-labels that a teacher of the same categories made."
        )
    PartialState().print(validate_objects(pseudo, names, source))
    return MixedImages(labelled, LabelledImages(pseudo, view, **options, pseudo=True), arguments.labelled_share)


def _pseudo_images(arguments: FinetuneArguments) -> Dataset | None:
    if arguments.pseudo_dataset is None:
        return None
    try:
        return load_dataset_source(
            arguments.pseudo_dataset, arguments.pseudo_split, labels=True, split_flag="--pseudo_split"
        )
    except DataError as error:
        raise DataError(f"--pseudo_dataset takes what `aligndet pseudolabel` writes. {error}") from error


def _start_detector(arguments: FinetuneArguments, categories: list[str]):
    """The detector to train, and the report of what it got from a checkpoint, or its backbone from weights."""
    id2label = dict(enumerate(categories))
    if note := ignored_note(arguments):
        PartialState().print(f"note: {note}.")
    if is_new(arguments):
        detector, report = load_detector(arguments, len(categories), id2label)
        is_frozen = arguments.freeze_backbone or arguments.trainable_backbone_stages is not None
        if note := require_useful_backbone(detector, report is None, is_frozen, arguments.freeze_batch_norm):
            PartialState().print(f"note: {note}.")
    else:
        detector, report = transfer_detector(arguments.detector, len(categories), id2label, arguments.transfer)
    # Always set, never trusted: transformers freezes by patterns that miss, and forgets it when it loads.
    set_backbone_trainable(detector, not arguments.freeze_backbone, arguments.trainable_backbone_stages)
    if arguments.freeze_backbone_norms:
        freeze_batch_norms(get_backbone(detector))
    if isinstance(report, TransferReport):
        report.frozen = [name for name, parameter in detector.named_parameters() if not parameter.requires_grad]
    return use_correct_loss(detector), report
