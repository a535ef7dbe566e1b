"""How long a run is: whether that is enough to learn or to pass on anything, and when it ends."""

import math
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import torch
from transformers import TrainerCallback

# What a small RT-DETR gained from on 4,175 photographs; after a seventh of it the detector answered every image alike.
ENOUGH_STEPS, ENOUGH_EPOCHS = 4000, 7
# A fine-tuning below this length is told what a small RT-DETR had learnt by then: docs/results.md, first table.
ENOUGH_LABELLED_STEPS = 1000
_FIRST_SECONDS = 60
FORECAST = "the run ends in"  # by which others know the line in a log


def length_note(steps: int, epochs: float) -> str | None:
    """
    What to say of a run of AlignDet that may be too short.

    Args:
        steps (`int`): Optimizer steps of the run.
        epochs (`float`): How often it sees each image.

    Returns:
        `str`, or `None` where the run is long enough.
    """
    if steps >= ENOUGH_STEPS and epochs >= ENOUGH_EPOCHS:
        return None
    needed = max(ENOUGH_STEPS, math.ceil(ENOUGH_EPOCHS * steps / epochs))
    return (
        f"{steps} steps show each image {epochs:.1f} times. Less than {ENOUGH_STEPS} steps, or than {ENOUGH_EPOCHS} "
        f"epochs, may pass nothing on to a DETR: give --max_steps {needed} or more. A detector that does not look at "
        "images yet has a best_box_sameness near 1 in the log."
    )


def finetuning_note(steps: int) -> str | None:
    """
    What to say of a fine-tuning that may be too short.

    Args:
        steps (`int`): Optimizer steps of the run.

    Returns:
        `str`, or `None` where the run is long enough.
    """
    if steps >= ENOUGH_LABELLED_STEPS:
        return None
    return (
        f"{steps} steps are few for a DETR: from an ImageNet backbone and 42 labelled images a small RT-DETR had 4 AP "
        "after 200 steps and 40 after 1,200. Give --max_steps 1200 or more; while training is short, whole images "
        "(--crop_scale 1 1) may do better than crops."
    )


def warmup_note(warmup_steps: int, steps: int) -> str | None:
    """
    What to say of a warm-up that takes the whole run.

    Args:
        warmup_steps (`int`): Optimizer steps of the warm-up.
        steps (`int`): Optimizer steps of the run.

    Returns:
        `str`, or `None` where the warm-up is shorter.
    """
    if warmup_steps < steps:
        return None
    return (
        f"the run has {steps} steps and the warm-up {warmup_steps}, so the learning rate never reaches its peak: "
        "lower --warmup_steps."
    )


class Forecast:
    """
    Says when a run ends, once, from the speed of its first minute.

    Args:
        step (`int`): Steps that were done before.
        total_steps (`int`): Steps of the whole run.
        clock (`Callable`, *optional*): Seconds that pass.
    """

    def __init__(self, step: int, total_steps: int, clock: Callable[[], float] = time.monotonic):
        self.step, self.total_steps, self.clock = step, total_steps, clock
        self.started: float | None = clock()

    def after(self, step: int) -> str | None:
        """What there is to say after a step: the end of the run, or nothing."""
        if self.started is None or (seconds := self.clock() - self.started) < _FIRST_SECONDS:
            return None
        self.started = None
        pace = seconds / (step - self.step)
        left = timedelta(seconds=round(pace * (self.total_steps - step)))
        return (
            f"step {step} of {self.total_steps}: {60 / pace:.3g} steps a minute, up to {_memory()}; {FORECAST} "
            f"{left}, at {datetime.now() + left:%Y-%m-%d %H:%M}."
        )


def _memory() -> str:
    """The most memory that this process has had, without its data loading processes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{peak / 1e9:.1f} GB of memory"
    if torch.cuda.is_available():
        text += f" and {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"
    return text


class TellForecast(TrainerCallback):
    """Prints the [`Forecast`] of a run of a `Trainer`."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.forecast = Forecast(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if (told := self.forecast.after(state.global_step)) and state.is_world_process_zero:
            print(told, flush=True)
