"""Pre-training: a loop over Accelerate in which everything is a pure function of (seed, step).

Which images, which views, dropout and denoising noise, learning rate and momentum all follow from the seed and the
step, so that a checkpoint needs no random state, and a run interrupted anywhere ends with the weights of one that was
not.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..cards import command_line
from ..data.sampling import StepBatches
from ..files import clear_write_errors, write_json
from ..flags import told_of
from ..models import MomentumModel
from ..reporting.run_record import SUMMARY
from ..runs import Interrupted
from . import sharding
from .checkpointing import find_last_checkpoint, require_within, save_checkpoint
from .interrupts import StopSignals, stopped
from .pretrain_arguments import PretrainArguments
from .pretrain_setup import to_device
from .run_length import Forecast
from .run_log import RunLog
from .schedules import Schedules

logger = logging.get_logger(__name__)

LOG = "log.jsonl"
# How many steps in a row may be skipped for infinite or NaN gradients; loss scaling of fp16 needs some to settle.
MAX_SKIPPED_STEPS = 20
# What the progress bar shows.
SHOWN = {"loss": "loss", "contrastive": "loss_contrastive", "rank_accuracy": "rank_accuracy"}
# Below these diagnostics (see `contrastive_diagnostics`) embeddings have collapsed.
MIN_SPREAD, MIN_MARGIN = 0.05, 0.005
MAX_SAMENESS = 0.8  # above it (see `best_box_diagnostics`) the best box is the same in all images
# After this part of the run, and this many steps, that is told: the embeddings of a new detector are alike.
SETTLED, SETTLED_STEPS = 0.1, 100


@dataclass
class Progress:
    """How far a run is: what its checkpoints keep of it."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    is_collapsed: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """
    What the loop works on.

    Attributes:
        arguments ([`PretrainArguments`]): The configuration.
        accelerator (`Accelerator`): Devices and processes.
        model ([`MomentumModel`]): The model itself.
        prepared (`nn.Module`): The same model as the accelerator wraps it, to be called.
        optimizer (`Optimizer`): Of its trained parameters.
        image_processor (`BaseImageProcessor`): Normalises the images, and is saved with what is exported.
        batches ([`StepBatches`]): One for each step.
        schedules ([`Schedules`]): The length of the run, learning rate and momentum.
        about (`dict`): What checkpoints and summary tell of configuration, data and versions.
        progress ([`Progress`]): How far the run is.
    """

    arguments: PretrainArguments
    accelerator: Accelerator
    model: MomentumModel
    prepared: nn.Module
    optimizer: Optimizer
    image_processor: BaseImageProcessor
    batches: StepBatches
    schedules: Schedules
    about: dict
    progress: Progress = field(default_factory=Progress)
    log: RunLog = field(init=False)

    def resume(self, on_main: Callable) -> None:
        """Continue from the last checkpoint, if there is one, and open the log."""
        output_dir, totals, total_steps = Path(self.arguments.output_dir), {}, self.schedules.total_steps
        if checkpoint := on_main(find_last_checkpoint, output_dir):
            state = checkpoint.state
            require_within(checkpoint.path, state["step"], total_steps)
            saved = sharding.load_checkpoint(self.accelerator, checkpoint, self.model, self.optimizer)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            totals = state["totals"]
            self.progress = Progress(**{entry.name: state[entry.name] for entry in fields(Progress)})
            self.batches.resume(self.progress.step, state["stream"])
            self.accelerator.print(f"Resuming from {checkpoint.path}: step {state['step']} of {total_steps}.")
        self.log = RunLog(self.accelerator, output_dir / LOG, self.progress.step, totals)

    def tell_changes(self, changes: dict[str, tuple]) -> None:
        """Say what a length that was changed on resuming does to the schedules."""
        listed = ", ".join(f"{name}: {before} before, {now} now" for name, (before, now) in changes.items())
        step, schedules = self.progress.step, self.schedules
        self.accelerator.print(
            f"The run is {schedules.total_steps} steps long now ({listed}). From step {step} on, the learning rate "
            f"({schedules.learning_rate(step):.3g}) and the momentum ({schedules.momentum(step):.4f}) follow the "
            "schedules of that length; until here they followed the schedules of the length before."
        )

    def save(self) -> None:
        """Write a checkpoint. All processes must call this."""
        step, totals = self.progress.step, self.log.totals()
        model = sharding.whole_model(self.accelerator, self.model)
        optimizer_state = sharding.whole_optimizer_state(self.accelerator, self.optimizer)
        positions = gather_object([self.batches.positions])
        if self.accelerator.is_main_process and model is not None:
            # Skipped steps leave the weights alone, but not the running statistics of norms.
            if broken := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
                raise FloatingPointError(f"step {step}: {', '.join(broken)} infinite or NaN; nothing was saved")
            scaler = self.accelerator.scaler
            tensors = {"optimizer": optimizer_state, "scaler": scaler.state_dict() if scaler else None}
            state = asdict(self.progress) | self.about
            state |= {"totals": totals, "epoch": step / len(self.batches), "stream": positions}
            save_checkpoint(
                self.arguments.output_dir,
                model,
                tensors,
                state,
                self.arguments.save_total_limit,
                export=lambda folder: model.export(folder, self.image_processor),
            )
        self.accelerator.wait_for_everyone()


def train(run: Run) -> None:
    """The loop, from where the run is to its end or to a signal."""
    arguments, accelerator, model, log = run.arguments, run.accelerator, run.prepared, run.log
    progress, schedules, total_steps = run.progress, run.schedules, run.schedules.total_steps
    forecast = Forecast(progress.step, total_steps)
    show_progress = accelerator.is_main_process and not arguments.disable_tqdm
    bar = tqdm(total=total_steps, initial=progress.step, desc="pre-training", disable=not show_progress)
    with StopSignals(accelerator) as stop, bar:
        steps = range(progress.step, total_steps)
        for step, micro_batches in zip(steps, run.batches.from_step(progress.step), strict=False):
            for group in run.optimizer.param_groups:
                group["lr"] = schedules.learning_rate(step)
            for index, batch in enumerate(micro_batches):
                # Dropout and denoising noise depend on the place of the micro-batch, not on what came before.
                place = accelerator.process_index * len(micro_batches) + index
                torch.manual_seed(_seed(arguments.seed, step, place))
                is_last = index + 1 == len(micro_batches)
                with nullcontext() if is_last else accelerator.no_sync(model):
                    with accelerator.autocast():
                        output = model(**to_device(batch, accelerator.device, run.image_processor))
                    accelerator.backward(output.loss / len(micro_batches))
                log.add({"loss": output.loss, **output.loss_dict, **output.metrics})
            gradient_norm = sharding.whole(accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm))
            log.add({"gradient_norm": gradient_norm})
            if _is_usable(run, gradient_norm):
                run.optimizer.step()
            run.optimizer.zero_grad()
            run.model.update_momentum(schedules.momentum(step))
            sharding.share_buffers(accelerator, model)

            progress.step += 1
            bar.update()
            if told := forecast.after(progress.step):
                accelerator.print(told, flush=True)  # compare looks for it in the log
            is_over = progress.step == total_steps
            if progress.step % arguments.logging_steps == 0 or is_over:
                _write_log(run, bar)
            signal_number = stop.received()
            if progress.step % arguments.save_steps == 0 or is_over or signal_number:
                run.save()
            if signal_number and not is_over:
                message = stopped(signal_number, progress.step, total_steps, arguments.output_dir)
                raise Interrupted(message, signal_number)


def _is_usable(run: Run, gradient_norm: torch.Tensor) -> bool:
    """Whether to take the optimizer step: not with infinite or NaN gradients, in any of the processes."""
    progress = run.progress
    if gradient_norm.isfinite():  # Waits for the device, as the matching does in every forward pass.
        progress.skipped_in_a_row = 0
        return True
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    fp16 = run.accelerator.scaler is not None
    rows = run.batches.rows(progress.step)
    where = f"step {progress.step + 1}: infinite or NaN gradients, from the images of rows {rows}"
    if progress.skipped_in_a_row == MAX_SKIPPED_STEPS:
        raise FloatingPointError(
            f"{where}. {MAX_SKIPPED_STEPS} steps in a row were skipped. Try a lower --learning_rate, a longer "
            "--warmup_steps or --bf16, and look at these images; the last checkpoint is sound."
        )
    if run.accelerator.is_main_process and not fp16:
        logger.warning(f"{where}; the step is skipped")
    return fp16  # The scaler skips the step by itself, and has to see it to lower its scale.


def _write_log(run: Run, bar: tqdm) -> None:
    """Write an entry of the log, and warn when the embeddings collapse."""
    progress, schedules = run.progress, run.schedules
    progress.metrics = run.log.write(
        progress.step,
        run.batches.global_batch_size,
        epoch=progress.step / len(run.batches),
        learning_rate=schedules.learning_rate(progress.step - 1),
        momentum=schedules.momentum(progress.step - 1),
        skipped_steps=progress.skipped_steps,
    )
    bar.set_postfix({name: f"{progress.metrics[key]:.3g}" for name, key in SHOWN.items() if key in progress.metrics})
    is_settled = progress.step >= max(SETTLED * schedules.total_steps, SETTLED_STEPS)
    problem = _problem(progress.metrics) if is_settled else None
    if problem and not progress.is_collapsed and run.accelerator.is_main_process:
        logger.warning(f"step {progress.step}: {problem}")
    progress.is_collapsed = problem is not None


def _problem(metrics: dict[str, float]) -> str | None:
    """What is wrong with a run that goes on as it is, told by an entry of its log."""
    own, other = (metrics.get(f"{kind}_similarity", math.nan) for kind in ("positive", "negative"))
    spread, sameness = metrics.get("embedding_spread", math.nan), metrics.get("best_box_sameness", math.nan)
    if spread < MIN_SPREAD or own - other < MIN_MARGIN:
        what = f"the embeddings of all objects are alike (spread {spread:.3f})"
        if spread >= MIN_SPREAD:
            what = (
                f"an object's two embeddings are no more alike than two objects' (cosines {own:.3f} and {other:.3f})"
            )
        return (
            f"{what}: the contrastive loss teaches nothing yet. If that stays so, try a lower learning rate, a lower "
            "contrastive_temperature (AlignDet), or more proposals per image."
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


def write_result(run: Run, model: MomentumModel) -> None:
    """Save and export the model. The summary comes last: it says that the run is finished."""
    output_dir, total_steps = Path(run.arguments.output_dir), run.schedules.total_steps
    with clear_write_errors(output_dir):
        model.save_pretrained(output_dir)
        model.export(output_dir, run.image_processor)
        summary = {
            "metrics": run.progress.metrics,
            "steps": total_steps,
            "epochs": total_steps / len(run.batches),
            "skipped_steps": run.progress.skipped_steps,
            **run.about,
            "arguments": told_of(run.arguments),
            "card_license": run.arguments.card_license,
            "command": command_line("pretrain", PretrainArguments, run.arguments.given),
        }
        write_json(output_dir / SUMMARY, summary)
    place = output_dir / model.product
    run.accelerator.print(f"Finished. The {model.product} is in {place}. Next: {model.next_stage} {place} ...")
