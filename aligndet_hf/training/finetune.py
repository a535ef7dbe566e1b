"""Fine-tuning: transformers' `Trainer` with the data, loss, checkpoints and measuring that detectors need."""

import json
import math
import re
import shutil
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..cards import command_line, told, versions
from ..data.collate import collate_labelled, normalize_images
from ..data.columns import validate_objects
from ..data.dataset import LabelledImages, init_worker
from ..data.errors import DataError
from ..data.formats import category_names, load_dataset_source
from ..data.sampling import EpochBatchSampler
from ..data.splits import nested_subsets
from ..data.views import ViewConfig
from ..detectors.backbones import eval_frozen, freeze_batch_norms, get_backbone, set_backbone_trainable
from ..detectors.build import DetectorArguments, build_image_processor, is_new, load_detector
from ..detectors.criterion import use_correct_loss
from ..detectors.families import family_of, require_fitting_sizes
from ..detectors.transfer import TransferReport, transfer_detector
from ..evaluation.coco_metrics import format_table
from ..evaluation.evaluate import EvaluationImages, draw_predictions, normalization_of, predict_batches
from ..evaluation.pictures import has_matplotlib
from ..files import write_json
from ..hub import open_repository
from ..reporting.run_record import RESULTS, SETTINGS
from .checkpointing import (
    clear_write_errors,
    prepare_output_dir,
    remove_checkpoints,
    require_same_run,
)
from .finetune_arguments import FinetuneArguments
from .publish import publish_run
from .schedules import learning_rate, milestone_steps
from .sharding import whole

logger = logging.get_logger(__name__)

# What TrainingArguments bring that makes another run of it.
INHERITED_SETTINGS = {
    "lr_scheduler_kwargs", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "fp16",
}  # fmt: skip
# What has no influence on the weights. The batch counts as the images of one step, however they are spread over
# processes and forward passes.
NOT_COMPARED = {
    "output_dir", "overwrite_output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "do_eval",
    "logging_steps", "logging_nan_inf_filter", "save_strategy", "save_total_limit", "dataloader_num_workers",
    "dataloader_persistent_workers", "remove_unused_columns", "push_to_hub", "hub_model_id", "card_license",
    "write_report", "num_pictures", "hub_strategy",
}  # fmt: skip
# What has one only if the weights are chosen by it.
OF_THE_BEST = {"eval_dataset", "eval_split", "eval_image_dir", "eval_strategy", "metric_for_best_model"}


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
        ValueError: a configuration that cannot run, or that differs from that of the run in `output_dir`.
        OSError: `output_dir` cannot be written to, or the disk is full. The last checkpoint stays.
    """
    require_one_gpu_per_process(arguments)
    output_dir = prepare_output_dir(arguments.output_dir)
    settings = settings_of(arguments)
    processes = PartialState()
    if any(output_dir.glob("checkpoint-*")) and not (output_dir / SETTINGS).exists():
        raise ValueError(f"{output_dir} holds checkpoints, but not of `aligndet finetune`: choose another output_dir")
    if arguments.overwrite_output_dir and processes.is_main_process:
        remove_checkpoints(output_dir)
        (output_dir / RESULTS).unlink(missing_ok=True)
    processes.wait_for_everyone()
    checkpoint = last_complete_checkpoint(output_dir)
    finished = (output_dir / RESULTS).exists()
    if checkpoint or finished:
        require_same_run(json.loads((output_dir / SETTINGS).read_text()), settings, output_dir)
    repo_id = _open_repository(arguments) if arguments.push_to_hub and processes.is_main_process else None
    if finished:
        processes.print(f"The run in {output_dir} is finished; --overwrite_output_dir starts it anew.")
        if processes.is_main_process:
            publish_run(output_dir, arguments, repo_id, anew=False)
        return FinetuneResult(output_dir, json.loads((output_dir / RESULTS).read_text())["metrics"])
    if processes.is_main_process:
        write_json(output_dir / SETTINGS, settings)

    with processes.main_process_first():
        dataset, categories = _load_labelled(arguments.dataset, arguments.split, arguments.image_dir)
        truth = None
        if arguments.do_eval:
            source = (arguments.eval_dataset, arguments.eval_split, arguments.eval_image_dir)
            try:
                truth, _ = _load_labelled(*source, categories)
            except DataError as error:
                choices = "--eval_dataset and --eval_split say what to measure on, --do_eval false leaves it out"
                raise DataError(f"{error} ({choices}.)") from error
    rows = nested_subsets(len(dataset), [arguments.label_fraction], arguments.label_seed)[arguments.label_fraction]
    dataset = dataset.select(rows)

    set_seed(arguments.seed)
    detector, report = _start(arguments, categories)
    require_fitting_sizes(detector.config, [*arguments.image_sizes, arguments.eval_size])
    image_processor = build_image_processor(detector, arguments.eval_size, arguments.max_size)
    view = ViewConfig(
        arguments.image_sizes,
        arguments.max_size,
        family_of(detector.config).resize,
        arguments.flip_probability,
        arguments.color,
        tuple(arguments.crop_scale) if arguments.crop_scale else None,
    )
    trainer = DetectionTrainer(
        detector,
        arguments,
        train_dataset=LabelledImages(dataset, view, seed=arguments.seed),
        eval_dataset=EvaluationImages(truth, categories, image_processor) if truth else None,
        processing_class=image_processor,
    )
    processes.print(f"Fine-tuning on {len(dataset)} images with {len(categories)} categories.")
    if report is not None:
        processes.print(report)
        if processes.is_main_process:
            write_json(output_dir / report.file_name, report.to_dict())
    trainer.fit(checkpoint)
    metrics = {}
    if truth is not None:
        if trainer.measured_at != trainer.state.global_step or arguments.load_best_model_at_end:
            trainer.evaluate()
        metrics = trainer.results

    if processes.is_main_process:
        with clear_write_errors(output_dir):
            detector.save_pretrained(output_dir)
            image_processor.save_pretrained(output_dir)
            trainer.save_state()
            if truth is not None and arguments.write_report and arguments.num_pictures and has_matplotlib():
                draw_predictions(detector, trainer.eval_dataset, output_dir, arguments.num_pictures)
        evaluation = {
            "dataset": told(arguments.eval_dataset),
            "split": arguments.eval_split,
            "images": len(truth or ()),
        }
        results = {
            "metrics": metrics,
            "steps": trainer.state.global_step,
            "images": len(dataset),
            "evaluation": evaluation if metrics else {},
            "card_license": arguments.card_license,
            "command": command_line("finetune", arguments),
            "versions": versions(),
        }
        write_json(output_dir / RESULTS, results)  # last, as the mark of a finished run
        if metrics:
            print(format_table(metrics))
        publish_run(output_dir, arguments, repo_id)
    processes.wait_for_everyone()
    return FinetuneResult(output_dir, metrics)


def _open_repository(arguments: FinetuneArguments) -> str:
    return open_repository(
        arguments.hub_model_id or Path(arguments.output_dir).resolve().name,
        private=arguments.hub_private_repo,
        revision=arguments.hub_revision,
        license=arguments.card_license,
        token=arguments.hub_token,
    )


def require_one_gpu_per_process(arguments: TrainingArguments) -> None:
    """
    Refuses what `Trainer` would turn into `DataParallel`, which cannot split a detector's labels.

    Raises:
        ValueError: several GPUs are visible to a process that no launcher started. The message has the right line.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible, but this is a single process. Use them all with\n"
            f"  accelerate launch --num_processes {arguments.n_gpu} -m aligndet_hf.cli finetune ...\n"
            "and the same flags, or one of them with CUDA_VISIBLE_DEVICES=0 before the command."
        )


def settings_of(arguments: FinetuneArguments) -> dict:
    """What makes a run this run and no other: everything that has an influence on its weights, as plain values."""
    own = (_declared(FinetuneArguments) | INHERITED_SETTINGS) - NOT_COMPARED
    own -= set() if arguments.load_best_model_at_end else OF_THE_BEST
    own |= _declared(DetectorArguments) - {"detector"} if is_new(arguments) else set()
    own -= {"transfer"} if is_new(arguments) else set()
    plain = arguments.to_dict()  # enums by value
    settings = {"detector": arguments.detector} | {name: plain[name] for name in sorted(own)}
    settings["images_per_step"] = (
        arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    )
    return json.loads(json.dumps(settings))  # tuples become lists, as they will when read back


def _declared(cls) -> set[str]:
    return {item.name for item in fields(cls) if item.name in cls.__annotations__}


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint of a run that was written to its end, or `None`.

    `Trainer` writes `trainer_state.json` last, so a folder without a readable one was cut short; it is removed, since
    `Trainer` would count it as a checkpoint when it decides which ones to delete.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return folder
        except (OSError, ValueError):
            logger.warning(f"{folder} was not written to its end and is removed.")
            if PartialState().is_main_process:
                shutil.rmtree(folder)
    return None


def _load_labelled(source: str, split: str | None, image_dir: str | None, categories: list[str] | None = None):
    """A validated dataset and the names of its categories, which must be `categories` if those are given."""
    dataset = load_dataset_source(source, split, labels=True, image_dir=image_dir)
    names = category_names(dataset, source)
    if categories is not None and names != categories:
        raise DataError(
            f"{source} (split {split}) has other categories than the training data: {', '.join(names)} instead of "
            f"{', '.join(categories)}. Number them alike in both."
        )
    PartialState().print(validate_objects(dataset, names, source))
    return dataset, names


def _start(arguments: FinetuneArguments, categories: list[str]):
    """The detector to train, and the report of what it got from a checkpoint, or its backbone from weights."""
    id2label = dict(enumerate(categories))
    if is_new(arguments):
        detector, report = load_detector(arguments, len(categories), id2label)
    elif (Path(arguments.detector) / "detector" / "config.json").is_file():
        raise ValueError(
            f"{arguments.detector} is a pre-training run: its detector is {Path(arguments.detector) / 'detector'}"
        )
    else:
        detector, report = transfer_detector(arguments.detector, len(categories), id2label, arguments.transfer)
    # Always set, never trusted: transformers freezes by patterns that miss, and forgets it when it loads.
    set_backbone_trainable(detector, not arguments.freeze_backbone, arguments.trainable_backbone_stages)
    if arguments.freeze_backbone_norms:
        freeze_batch_norms(get_backbone(detector))
    if isinstance(report, TransferReport):
        report.frozen = [name for name, parameter in detector.named_parameters() if not parameter.requires_grad]
    return use_correct_loss(detector), report


class EpochLoader(DataLoader):
    """A loader that passes on the epoch that `Trainer` announces to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class FiniteGradients(TrainerCallback):
    """
    Ends a run before an optimizer step that would make its weights infinite or NaN, and later checkpoints worthless.

    Raises:
        FloatingPointError: the gradients are infinite or NaN. Not with fp16, whose scaler skips such steps.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not whole(torch.nn.utils.get_total_norm(gradients)).isfinite():
            raise FloatingPointError(
                f"step {state.global_step + 1}: infinite or NaN gradients. Try a lower --learning_rate, more "
                "--warmup_steps or another precision, and look at the images; the last checkpoint is sound."
            )


class DetectionTrainer(Trainer):
    """
    `transformers.Trainer` for detectors.

    What is different: images are normalised on the device; which images and views are seen is a pure function of the
    seed and the epoch; gradients that are not finite end the run; checkpoints restore every tensor, on resuming and
    for `load_best_model_at_end`, or fail; evaluation streams through [`CocoMetrics`] and counts every image once, also
    in the last batch and with several processes; the backbone has a learning rate of its own, and what is frozen of it
    stays in evaluation mode; the terms of the loss are logged.

    Evaluation logs `eval_AP`, `eval_AP50` and the other COCO numbers (0 to 1), and `eval_AP_<class>`: any of them can
    be `metric_for_best_model`. There is no `eval_loss`.

    Args:
        model (`PreTrainedModel`): A detector. Whether its backbone is trained is up to its `requires_grad`, and which
            loss it computes up to its `loss_function`: see `set_backbone_trainable` and `use_correct_loss`.
        args (`TrainingArguments`): Of `FinetuneArguments` also `backbone_learning_rate` and `lr_milestones` count.
        train_dataset ([`LabelledImages`], *optional*): A dataset of [`SampleKey`]s.
        eval_dataset ([`EvaluationImages`], *optional*): What to measure on.
        processing_class (`BaseImageProcessor`): The image processor to normalise with and to save.
        kwargs: Further arguments of `Trainer`.
    """

    def __init__(self, model, args, *, train_dataset=None, eval_dataset=None, processing_class, **kwargs):
        require_one_gpu_per_process(args)
        kwargs.setdefault("data_collator", collate_labelled)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(FiniteGradients)
        self.normalization = normalization_of(processing_class)
        self.backbone = get_backbone(model)
        self.results, self.measured_at = {}, None  # the last evaluation and its step
        self._terms, self._terms_count = {}, 0

    # ---- data ----

    def _loader(self, cls, dataset, **kwargs) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return cls(
            dataset,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            worker_init_fn=init_worker,
            # The loader draws a seed for its workers, which need none: not from the state that dropout draws from.
            generator=torch.Generator(),
            **kwargs,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process: the sampler knows the processes, so Accelerate must not split them again."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        args = self.args
        sampler = EpochBatchSampler(
            len(self.train_dataset),
            self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return self._loader(
            EpochLoader,
            self.train_dataset,
            batch_sampler=sampler,
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every image once: each process has every `world_size`-th, and nothing is repeated to make numbers even."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset] if eval_dataset else self.eval_dataset
        if eval_dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        rows = range(self.args.process_index, len(eval_dataset), self.args.world_size)
        return self._loader(DataLoader, eval_dataset, batch_size=self.args.eval_batch_size, sampler=rows)

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = normalize_images(
                inputs["pixel_values"], inputs["pixel_mask"], **self.normalization
            )
        return inputs

    # ---- training ----

    def fit(self, checkpoint: str | Path | None = None) -> None:
        """Trains on from a checkpoint, or from the start; a checkpoint of the last step is only loaded."""
        state = checkpoint and TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if not state or state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        eval_frozen(self.backbone)  # `Trainer` has just put all of the model in training mode
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._terms_count += 1
            for name, value in outputs.loss_dict.items():
                if re.fullmatch(r"loss_[a-z]+", name):  # not those of each decoder layer
                    self._terms[name] = self._terms.get(name, 0) + value.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs and self._terms_count:
            means = torch.stack(list(self._terms.values())).float() / self._terms_count
            logs |= dict(zip(self._terms, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._terms, self._terms_count = {}, 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """What `optim` says, with groups: the backbone apart, no decay of norms and biases, nothing frozen."""
        if self.optimizer is None:
            args = self.args
            backbone = {id(parameter) for parameter in self.backbone.parameters()}
            rates = {False: args.learning_rate, True: getattr(args, "backbone_learning_rate", args.learning_rate)}
            groups = {}
            for parameter in (model or self.model).parameters():
                if parameter.requires_grad:
                    key = (id(parameter) in backbone, parameter.ndim > 1)
                    groups.setdefault(key, []).append(parameter)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = cls(
                [
                    {"params": params, "lr": rates[of_backbone], "weight_decay": args.weight_decay if decays else 0.0}
                    for (of_backbone, decays), params in sorted(groups.items(), key=lambda item: item[0])
                ],
                **kwargs,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and getattr(self.args, "lr_milestones", None):
            batches = len(self.get_train_dataloader())
            steps_per_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
            factor = partial(
                learning_rate,
                peak=1.0,
                total_steps=num_training_steps,
                schedule="step",
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                milestones=milestone_steps(self.args.lr_milestones, num_training_steps, steps_per_epoch),
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- checkpoints ----

    def _save_checkpoint(self, *args, **kwargs) -> None:
        with clear_write_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """
        Saves the weights by the names they have in the model.

        By default `save_pretrained` writes the names of the original checkpoints, which `from_pretrained` translates
        back but `Trainer` does not: it would load what happens to have the same name, and go on.
        """
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
            self.processing_class.save_pretrained(folder)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Where `Trainer` warns that tensors of a checkpoint were missing or unknown, refuse it."""
        tensors = self.model.state_dict(keep_vars=True)
        # Tied tensors are saved once: under the one name or the other.
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(tensors[name]) not in loaded]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint is not one of this model and trainer: {len(missing)} tensors are missing from it "
                f"(such as {missing[:3]}) and {len(load_result.unexpected_keys)} are unknown (such as "
                f"{load_result.unexpected_keys[:3]}). Load its weights with from_pretrained instead of resuming."
            )

    # ---- measuring ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Streams the images through the detector; the truth comes from the dataset, never from the batches."""
        images: EvaluationImages = dataloader.dataset
        self.callback_handler.eval_dataloader = dataloader  # the progress bar counts its batches
        metrics = images.metrics()
        with self.accelerator.autocast():
            for ids, predictions in predict_batches(self.model, dataloader, self.processing_class):
                metrics.update(predictions, ids)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics.gather()
        self.results = metrics.compute()
        self.measured_at = self.state.global_step
        numbers = {key: value for key, value in self.results.items() if key != "per_class"}
        numbers |= {f"AP_{name}": value for name, value in self.results["per_class"].items()}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{key}": value for key, value in numbers.items()},
            num_samples=len(images),
        )
