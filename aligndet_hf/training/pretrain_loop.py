"""Pre-training: a loop over Accelerate in which everything is a pure function of (seed, step).

Which images, which views, dropout and denoising noise, learning rate and momentum all follow from the seed and the
step, so that a checkpoint needs no random state, and a run interrupted anywhere ends with the weights of one that was
not.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers.utils import logging

from ..cards import command_line
from ..data.sampling import EpochBatchSampler
from ..files import write_json
from ..flags import told_of
from ..models import AlignDetForPreTraining, SoCoForPreTraining
from ..momentum import cosine_momentum, suited_momentum
from ..reporting.run_record import SUMMARY
from ..runs import Interrupted
from . import sharding
from .checkpointing import (
    clear_write_errors,
    find_last_checkpoint,
    save_checkpoint,
)
from .interrupts import StopSignals, stopped
from .pretrain_methods import METHODS
from .run_log import RunLog
from .schedules import learning_rate, milestone_steps

logger = logging.get_logger(__name__)

LOG = "log.jsonl"
# How many steps in a row may be skipped for infinite or NaN gradients; loss scaling of fp16 needs some to settle.
MAX_SKIPPED_STEPS = 20
# The attributes of a run that its checkpoints keep.
RUN_STATE = ("step", "skipped_steps", "skipped_in_a_row", "is_collapsed", "metrics")
# What the progress bar shows.
SHOWN = {"loss": "loss", "contrastive": "loss_contrastive", "rank_accuracy": "rank_accuracy"}
# Below these diagnostics (see `contrastive_diagnostics`) embeddings have collapsed.
MIN_SPREAD, MIN_MARGIN = 0.05, 0.005
MAX_SAMENESS = 0.8  # above it (see `best_box_diagnostics`) the best box is the same in all images
# After this part of the run, and this many steps, that is told: those of a new detector are alike.
SETTLED, SETTLED_STEPS = 0.1, 50


class Run:
    """What the loop works on: the model and its surroundings, and how far it is."""

    def __init__(self, arguments, accelerator, model, optimizer, image_processor, sampler, loader, about: dict):
        self.arguments = arguments
        self.method = METHODS[arguments.method]
        self.accelerator = accelerator
        self.model = model
        self.method_model: AlignDetForPreTraining | SoCoForPreTraining = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.image_processor = image_processor
        self.sampler = sampler
        self.loader = loader
        self.about = about
        self.total_steps = arguments.max_steps
        if self.total_steps <= 0:
            self.total_steps = max(1, math.ceil(arguments.num_train_epochs * len(sampler)))
        self.learning_rate = partial(
            learning_rate,
            peak=arguments.learning_rate,
            total_steps=self.total_steps,
            schedule=arguments.lr_scheduler_type,
            warmup_steps=arguments.warmup_steps,
            milestones=milestone_steps(arguments.lr_milestones, self.total_steps, len(sampler)),
        )
        config = self.method_model.config
        if arguments.method == "aligndet" and arguments.preset == "suited":
            if "base_momentum" not in arguments.aligndet_config:
                config.base_momentum = suited_momentum(self.total_steps)
        momenta = {"total_steps": self.total_steps, "base": config.base_momentum, "end": config.end_momentum}
        self.momentum = lambda step: cosine_momentum(step + self.method.momentum_delay, **momenta)
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.is_collapsed = False
        self.metrics: dict[str, float] = {}

    def resume(self, on_main: Callable) -> None:
        """Continue from the last checkpoint, if there is one, and open the log."""
        output_dir, totals = Path(self.arguments.output_dir), {}
        if checkpoint := on_main(find_last_checkpoint, output_dir):
            state = checkpoint.state
            if state["step"] > self.total_steps:
                raise ValueError(
                    f"{checkpoint.path} is beyond the {self.total_steps} steps that are asked for: give at least "
                    f"--max_steps {state['step']}, which ends the run there"
                )
            saved = sharding.load_checkpoint(self.accelerator, checkpoint, self.method_model, self.optimizer)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            totals = state["totals"]
            for name in RUN_STATE:
                setattr(self, name, state[name])
            if self.arguments.streaming:
                self.sampler.stream.start(self.step, state["stream"][self.accelerator.process_index])
            self.accelerator.print(f"Resuming from {checkpoint.path}: step {self.step} of {self.total_steps}.")
        self.log = RunLog(self.accelerator, output_dir / LOG, self.step, totals)

    def tell_changes(self, changes: dict[str, tuple]) -> None:
        """Say what a length that was changed on resuming does to the schedules."""
        listed = ", ".join(f"{name}: {before} before, {now} now" for name, (before, now) in changes.items())
        self.accelerator.print(
            f"The run is {self.total_steps} steps long now ({listed}). From step {self.step} on, the learning rate "
            f"({self.learning_rate(self.step):.3g}) and the momentum ({self.momentum(self.step):.4f}) follow the "
            "schedules of that length; until here they followed those of the length before."
        )

    def save(self) -> None:
        """Write a checkpoint. All processes must call this."""
        totals = self.log.totals()
        model = sharding.whole_model(self.accelerator, self.method_model)
        optimizer_state = sharding.whole_optimizer_state(self.accelerator, self.optimizer)
        positions = gather_object([self.sampler.positions]) if self.arguments.streaming else None
        if self.accelerator.is_main_process:
            # Skipped steps leave the weights alone, but not the running statistics of norms.
            if broken := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
                raise FloatingPointError(f"step {self.step}: {', '.join(broken)} infinite or NaN; nothing was saved")
            scaler = self.accelerator.scaler
            tensors = {"optimizer": optimizer_state, "scaler": scaler.state_dict() if scaler else None}
            state = {name: getattr(self, name) for name in RUN_STATE} | self.about
            state |= {"totals": totals, "epoch": self.step / len(self.sampler), "stream": positions}
            keep = self.arguments.save_total_limit
            save_checkpoint(
                self.arguments.output_dir,
                model,
                tensors,
                state,
                keep,
                export=lambda folder: self.method.export(model, folder, self.image_processor),
            )
        self.accelerator.wait_for_everyone()

    def steps(self):
        """Yield the micro-batches of every step that is left, epoch after epoch."""
        step = self.step
        while step < self.total_steps:
            self.sampler.set_epoch(*divmod(step, len(self.sampler)))
            for micro_batches in self.loader:
                yield micro_batches
                step += 1
                if step == self.total_steps:
                    return

    def rows(self) -> list:
        """The rows of the dataset that the current step uses, on all processes; of a stream, where this one is."""
        own = self.sampler
        if self.arguments.streaming:
            return list(own.positions.values())
        whole = EpochBatchSampler(own.num_samples, own.global_batch_size, seed=own.seed, drop_last=True)
        whole.set_epoch(*divmod(self.step, len(whole)))
        return [key.index for key in next(iter(whole))]


def train(run: Run) -> None:
    """The loop, from `run.step` to the end or to a signal."""
    arguments, accelerator, model, log = run.arguments, run.accelerator, run.model, run.log
    show_progress = accelerator.is_main_process and not arguments.disable_tqdm
    progress = tqdm(total=run.total_steps, initial=run.step, desc="pre-training", disable=not show_progress)
    with StopSignals(accelerator) as stop, progress:
        for micro_batches in run.steps():
            for group in run.optimizer.param_groups:
                group["lr"] = run.learning_rate(run.step)
            for index, batch in enumerate(micro_batches):
                # Dropout and denoising noise depend on the place of the micro-batch, not on what came before.
                place = accelerator.process_index * len(micro_batches) + index
                torch.manual_seed(_seed(arguments.seed, run.step, place))
                is_last = index + 1 == len(micro_batches)
                with nullcontext() if is_last else accelerator.no_sync(model):
                    with accelerator.autocast():
                        output = model(**run.method.to_device(batch, accelerator.device, run.image_processor))
                    accelerator.backward(output.loss / len(micro_batches))
                log.add({"loss": output.loss, **output.loss_dict, **output.metrics})
            gradient_norm = sharding.whole(accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm))
            log.add({"gradient_norm": gradient_norm})
            if _is_usable(run, gradient_norm):
                run.optimizer.step()
            run.optimizer.zero_grad()
            run.method.update_momentum(run.method_model, run.momentum(run.step))
            sharding.share_buffers(accelerator, model)

            run.step += 1
            progress.update()
            is_over = run.step == run.total_steps
            if run.step % arguments.logging_steps == 0 or is_over:
                _write_log(run, progress)
            signal_number = stop.received()
            if run.step % arguments.save_steps == 0 or is_over or signal_number:
                run.save()
            if signal_number and not is_over:
                message = stopped(signal_number, run.step, run.total_steps, arguments.output_dir)
                raise Interrupted(message, signal_number)


def _is_usable(run: Run, gradient_norm: torch.Tensor) -> bool:
    """Whether to take the optimizer step: not with infinite or NaN gradients, which are those of all processes."""
    if gradient_norm.isfinite():  # Waits for the device, as the matching does in every forward pass.
        run.skipped_in_a_row = 0
        return True
    run.skipped_steps += 1
    run.skipped_in_a_row += 1
    fp16 = run.accelerator.scaler is not None
    where = f"step {run.step + 1}: infinite or NaN gradients, from the images of rows {run.rows()}"
    if run.skipped_in_a_row == MAX_SKIPPED_STEPS:
        raise FloatingPointError(
            f"{where}. {MAX_SKIPPED_STEPS} steps in a row were skipped. Try a lower --learning_rate, a longer "
            "--warmup_steps or --mixed_precision bf16, and look at these images; the last checkpoint is sound."
        )
    if run.accelerator.is_main_process and not fp16:
        logger.warning(f"{where}; the step is skipped")
    return fp16  # The scaler skips the step by itself, and has to see it to lower its scale.


def _write_log(run: Run, progress: tqdm) -> None:
    """Write an entry of the log, and warn when the embeddings collapse."""
    rates = {"learning_rate": run.learning_rate(run.step - 1), "momentum": run.momentum(run.step - 1)}
    run.metrics = run.log.write(
        run.step,
        run.sampler.global_batch_size,
        epoch=run.step / len(run.sampler),
        **rates,
        skipped_steps=run.skipped_steps,
    )
    progress.set_postfix({name: f"{run.metrics[key]:.3g}" for name, key in SHOWN.items() if key in run.metrics})
    problem = _problem(run.metrics) if run.step >= max(SETTLED * run.total_steps, SETTLED_STEPS) else None
    if problem and not run.is_collapsed and run.accelerator.is_main_process:
        logger.warning(f"step {run.step}: {problem}")
    run.is_collapsed = problem is not None


def _problem(metrics: dict[str, float]) -> str | None:
    """What is wrong with a run that goes on as it is, told by an entry of its log."""
    margin = metrics.get("positive_similarity", math.nan) - metrics.get("negative_similarity", math.nan)
    spread, sameness = metrics.get("embedding_spread", math.nan), metrics.get("best_box_sameness", math.nan)
    if spread < MIN_SPREAD or margin < MIN_MARGIN:
        return (
            f"the embeddings of all objects are alike (spread {spread:.3f}, positive minus negative similarity "
            f"{margin:.3f}): the contrastive loss teaches nothing yet. If that stays so, try a lower learning rate, a "
            "lower contrastive_temperature (AlignDet), or more proposals per image."
        )
    if sameness > MAX_SAMENESS:
        return (
            f"the detector's best box is the same in all images (mean IoU {sameness:.2f}, "
            f"{100 * metrics['best_box_borders']:.0f} % touch two borders): it does not look at them yet, and has "
            "nothing to pass on. If that stays so, train for more steps, or give fewer and smaller proposals "
            "(--max_proposals; --max_relative_size of aligndet proposals) with clusters as classes (--use_clusters)."
        )
    return None


def _seed(*numbers: int) -> int:
    """A seed for torch, of any numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def write_result(run: Run, model: AlignDetForPreTraining | SoCoForPreTraining) -> None:
    """Save and export the model. The summary comes last: it says that the run is finished."""
    output_dir = Path(run.arguments.output_dir)
    with clear_write_errors(output_dir):
        model.save_pretrained(output_dir)
        run.method.export(model, output_dir, run.image_processor)
        summary = {
            "metrics": run.metrics,
            "steps": run.total_steps,
            "epochs": run.total_steps / len(run.sampler),
            "skipped_steps": run.skipped_steps,
            **run.about,
            "arguments": told_of(run.arguments),
            "card_license": run.arguments.card_license,
            "command": command_line("pretrain", run.arguments),
        }
        write_json(output_dir / SUMMARY, summary)
    product = output_dir / run.method.product
    run.accelerator.print(f"Finished. The {run.method.product} is in {product}: {run.method.next_stage} {product} ...")
