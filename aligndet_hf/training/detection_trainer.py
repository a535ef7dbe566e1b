"""transformers' `Trainer` with the data, loss, checkpoints and measuring that detectors need."""

import math
import re
import shutil
from functools import partial
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.collate import collate_labelled, normalize_images
from ..data.dataset import MixedImages
from ..data.launch import Launch
from ..data.sampling import EpochBatchSampler, MixedBatchSampler
from ..detectors.backbones import eval_frozen, get_backbone
from ..detectors.build import build_image_processor, save_image_processor
from ..evaluation.detections import EvaluationImages, normalization_of, predict_batches
from ..files import UNFINISHED, clear_write_errors
from ..processes import init_worker, require_one_gpu
from .checkpointing import STATE, damage_of, require_within, rotate, seal
from .finetune_arguments import require_effect, require_metric
from .interrupts import StopAfterSaving, StopSignals
from .parameter_groups import parameter_groups
from .plain_datasets import DEFAULT_SIZE, evaluation_images, require_items, training_images
from .schedules import learning_rate, milestone_steps
from .sharding import whole
from .told_log import tell_in_words
from .weight_average import WeightAverage

logger = logging.get_logger(__name__)


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


class KeepBest(TrainerCallback):
    """Has a run that is resumed know its best checkpoint, which may lie elsewhere than when the state was written."""

    def __init__(self, best: str | None):
        self.best = best

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = self.best


def _ended_early(state: TrainerState) -> bool:
    """Whether early stopping had ended the run when this state was saved; `Trainer` would take a step more."""
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
    if stopping is None:
        return False
    return stopping["attributes"]["early_stopping_patience_counter"] >= stopping["args"]["early_stopping_patience"]


_WITHOUT_EFFECT = {"compute_metrics", "preprocess_logits_for_metrics"}  # of the arguments of `Trainer`


class DetectionTrainer(Trainer):
    """
    `transformers.Trainer` for detectors.

    What is different: images are normalised on the device; which images and views are seen is a pure function of the
    seed and the epoch; gradients that are not finite end the run; checkpoints are complete or absent, and restore
    every tensor, on resuming and for `load_best_model_at_end`, or fail; SIGTERM and SIGINT end [`fit`] after a
    checkpoint; evaluation streams through [`CocoMetrics`] and counts every image once, also in the last batch and with
    several processes; the backbone has a learning rate of its own, and what is frozen of it stays in evaluation mode;
    the terms of the loss are logged.

    Evaluation logs `eval_AP`, `eval_AP50` and the other COCO numbers (0 to 1), and `eval_AP_<class>`: any of them can
    be `metric_for_best_model`. There is no `eval_loss`. `predict` returns the same numbers and what was found.

    Args:
        model (`PreTrainedModel`): A detector. Whether its backbone is trained is up to its `requires_grad`, and which
            loss it computes up to its `loss_function`: see `set_backbone_trainable` and `use_correct_loss`.
        args (`TrainingArguments`, *optional*): Of `FinetuneArguments` also `backbone_learning_rate` and
            `lr_milestones` count. With `ema_decay` the average of the weights ([`WeightAverage`]) is what is measured
            during training.
        train_dataset (`datasets.Dataset` or [`LabelledImages`], *optional*): With the columns `image` and `objects`,
            or a dataset of [`SampleKey`]s, see [`~aligndet_hf.training.plain_datasets.require_items`].
        eval_dataset (`datasets.Dataset` or [`EvaluationImages`], *optional*): What to measure on.
        processing_class (`BaseImageProcessor`, *optional*): The image processor to normalise with and to save. By
            default one for images of 640 pixels.
        transferred (`Collection[str]`, *optional*): Names of the tensors that a checkpoint passed on, for
            `transferred_learning_rate` and `layer_decay`.
        kwargs: Further arguments of `Trainer`, but for `compute_metrics`, `preprocess_logits_for_metrics` and
            `model_init`.
    """

    def __init__(
        self,
        model,
        args=None,
        *,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        transferred=(),
        **kwargs,
    ):
        if not isinstance(model, torch.nn.Module):
            raise ValueError(
                f"model must be a detector, got {model!r}: AutoModelForObjectDetection.from_pretrained(...) loads "
                "one, aligndet_hf.build_detector(...) makes a new one"
            )
        if model.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the weights are {str(model.dtype).removeprefix('torch.')}, in which training loses its small steps: "
                "give model.float(). bf16=True of the arguments calculates in bfloat16 where that is enough"
            )
        for name in _WITHOUT_EFFECT & kwargs.keys():
            if kwargs[name] is not None:
                raise ValueError(
                    f"{name} would have no effect: evaluation measures COCO's numbers itself, `trainer.measured` "
                    "holds the CocoMetrics of the last one. For numbers of your own override `evaluate`"
                )
        args = args or TrainingArguments(output_dir="outputs/trained", remove_unused_columns=False)
        require_effect(args)
        processing_class = processing_class or build_image_processor(model, DEFAULT_SIZE)
        is_collated = kwargs.get("data_collator") is not None
        train_dataset = training_images(train_dataset, model, args, processing_class, is_collated)
        require_items(train_dataset, is_collated)
        eval_dataset = evaluation_images(eval_dataset, model, processing_class)
        has_numbers_of_ours = isinstance(eval_dataset, EvaluationImages) and type(self).evaluate is Trainer.evaluate
        if args.eval_strategy != "no" and has_numbers_of_ours:
            require_metric(args.metric_for_best_model, eval_dataset.categories)  # not after an epoch
        require_one_gpu(args.n_gpu, "finetune")  # `Trainer` would take `DataParallel`, which cannot split labels
        kwargs["data_collator"] = kwargs.get("data_collator") or collate_labelled
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._aside: Path | None = None  # where a checkpoint is written that is not complete
        tell_in_words(self)
        self.add_callback(FiniteGradients)
        self.normalization = normalization_of(processing_class)
        self.backbone = get_backbone(model)
        self.transferred = transferred
        decay = getattr(args, "ema_decay", None)
        self.average = None if decay is None else WeightAverage(model, decay)
        if self.average is not None:
            self.add_callback(self.average)
        self.results, self.measured, self.measured_at = {}, None, None  # the last evaluation and its step
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
        own = {
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rank": args.process_index,
            "world_size": args.world_size,
        }
        images, batch_size = self.train_dataset, self._train_batch_size
        if isinstance(images, MixedImages):
            counts = len(images.labelled), len(images.pseudo)
            sampler = MixedBatchSampler(*counts, images.labelled_share, batch_size, **own)
        else:
            sampler = EpochBatchSampler(len(images), batch_size, drop_last=args.dataloader_drop_last, **own)
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
        eval_dataset = evaluation_images(eval_dataset, self.model, self.processing_class)
        rows = range(self.args.process_index, len(eval_dataset), self.args.world_size)
        return self._loader(DataLoader, eval_dataset, batch_size=self.args.eval_batch_size, sampler=rows)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        """What `predict` finds objects in: images as `evaluate` takes them."""
        return self.get_eval_dataloader(test_dataset)

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = normalize_images(
                inputs["pixel_values"], inputs["pixel_mask"], **self.normalization
            )
        return inputs

    # ---- training ----

    def total_steps(self) -> int:
        """How many optimizer steps training takes, as `Trainer` counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * max(per_epoch, 1))

    def require_steps(self, checkpoint: str | Path | None) -> TrainerState | None:
        """
        The state of a checkpoint that training can go on from.

        Raises:
            ValueError: it is beyond the last step.
        """
        if checkpoint is None:
            return None
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        require_within(checkpoint, state.global_step, self.total_steps())
        return state

    def fit(self, checkpoint: str | Path | None = None) -> None:
        """
        Trains on from a checkpoint, or from the start; a checkpoint of the last step, or where early stopping has
        ended the run, is only loaded.

        Raises:
            Interrupted: SIGTERM or SIGINT; a checkpoint was written.
            ValueError: the checkpoint is beyond the last step, or the best one, which is to be loaded at the end, is
                damaged.
        """
        state = self.require_steps(checkpoint)
        best = self._best_of(state) if state else None
        if not state or (state.global_step < self.total_steps() and not _ended_early(state)):
            with StopSignals(self.accelerator) as stop:
                callbacks = [StopAfterSaving(stop), KeepBest(best)]
                for callback in callbacks:
                    self.add_callback(callback)
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                for callback in callbacks:
                    self.remove_callback(callback)
            return
        self.state = state
        self.state.best_model_checkpoint = best
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()

    def choose_weights(self) -> dict:
        """
        Ends training with the average of the weights, if there is one and it is not worse than the weights themselves.

        Without an `eval_dataset` the average is kept unseen.

        Returns:
            `dict`: `kept` ("average" or "last") and, if measured, the AP of both; empty without an average.
        """
        if self.average is None:
            return {}
        choice = {"kept": "average"}
        if self.eval_dataset is not None:
            average, self.average = self.average, None
            choice |= {"AP_last": self.evaluate()["eval_AP"]}
            last, self.average = (self.results, self.measured, self.measured_at), average
            choice |= {"AP_average": self.evaluate()["eval_AP"]}
            if choice["AP_last"] > choice["AP_average"]:
                choice["kept"] = "last"
                self.results, self.measured, self.measured_at = last
        if choice["kept"] == "average":
            self.model.load_state_dict(self.average.detector.state_dict())
        return choice

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        eval_frozen(self.backbone)  # `Trainer` has just put all of the model in training mode
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._terms_count += 1
            for name, value in outputs.loss_dict.items():
                if re.fullmatch(r"loss_(rpn_)?[a-z]+", name):  # not the terms of each decoder layer
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
            cls, kwargs = self.get_optimizer_cls_and_kwargs(args, self.model)
            own = ("backbone_learning_rate", "transferred_learning_rate", "layer_decay")
            groups = parameter_groups(
                model or self.model,
                self.backbone,
                learning_rate=args.learning_rate,
                weight_decay=args.weight_decay,
                transferred=self.transferred,
                **{name: getattr(args, name) for name in own if hasattr(args, name)},
            )
            self.optimizer = cls(groups, **kwargs)
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

    def _determine_best_metric(self, metrics: dict, trial) -> bool:
        """Has what is better than all before it saved in any case, where training is to end with it."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model, trial) -> None:
        """What `Trainer` saves, written aside; complete, it gets its checksums and its name."""
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._aside = final.with_name(f"{UNFINISHED}{final.name}")
        on_main = Launch().on_main
        try:
            with clear_write_errors(Path(self.args.output_dir)):
                on_main(shutil.rmtree, self._aside, True)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                on_main(self._put_in_place, final)
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self._aside, ignore_errors=True)
            self._aside = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _put_in_place(self, final: Path) -> None:
        folder = self._aside / final.name
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(folder / STATE))
        seal(folder, final)
        rotate(final, self.args.save_total_limit, protected=self.state.best_model_checkpoint)

    def _get_output_dir(self, trial=None) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it is not complete
            super()._push_from_checkpoint(checkpoint_folder)

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
            save_image_processor(self.processing_class, folder)
            if self.average is not None:
                self.average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and isinstance(self.lr_scheduler, LambdaLR):  # the saved rates follow the length before
            scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in rates]
            for group, rate in zip(groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _best_of(self, state: TrainerState) -> str | None:
        """The best checkpoint of a run that is resumed: it lies beside the others, wherever they were before."""
        if state.best_model_checkpoint is None:
            return None
        best = Path(self.args.output_dir) / Path(state.best_model_checkpoint).name
        if self.args.load_best_model_at_end:
            self._require_sound(best)
        return str(best) if best.is_dir() else None

    def _require_sound(self, best: str | Path) -> None:
        if damage := damage_of(best):
            raise ValueError(
                f"{best}, the best checkpoint of this run, is damaged ({damage}). Give --load_best_model_at_end false "
                "and another output_dir, or --overwrite_output_dir to start anew."
            )

    def _load_best_model(self) -> None:
        self._require_sound(self.state.best_model_checkpoint)
        super()._load_best_model()
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)

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
        """
        Streams the images through the detector; the truth comes from the dataset, never from the batches.

        Predictions are, for each image, the `scores`, `labels` and `boxes` (xyxy in pixels) that were measured.
        """
        images: EvaluationImages = dataloader.dataset
        self.callback_handler.eval_dataloader = dataloader  # the progress bar counts its batches
        metrics = images.metrics()
        detector = self.model if self.average is None else self.average.detector
        with self.accelerator.autocast():
            for ids, predictions in predict_batches(
                detector, dataloader, self.processing_class, masks=metrics.has_masks
            ):
                metrics.update(predictions, ids)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics.gather()
        self.results, self.measured = metrics.compute(), metrics
        self.measured_at = self.state.global_step
        numbers = {key: value for key, value in self.results.items() if key != "per_class"}
        numbers |= {f"AP_{name}": value for name, value in self.results["per_class"].items()}
        found = (metrics.predictions[image_id] for image_id in images.image_ids)
        return EvalLoopOutput(
            predictions=[dict(zip(("scores", "labels", "boxes"), values, strict=True)) for values in found],
            label_ids=None,
            metrics={f"{metric_key_prefix}_{key}": value for key, value in numbers.items()},
            num_samples=len(images),
        )
