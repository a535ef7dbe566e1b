"""A clean end on SIGTERM and SIGINT: the signal is noted, and the loop ends itself at the next step boundary."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator
from transformers import IntervalStrategy, TrainerCallback

from ..runs import Interrupted, NotedSignals


class StopSignals(NotedSignals):
    """
    Context in which SIGTERM and the first SIGINT (Ctrl-C) are noted instead of ending the process.

    A second Ctrl-C interrupts at once, wherever the run is. A signal that has not ended the run by the end of the
    context comes again then: it is meant for what would follow, too. Outside the main thread, where Python cannot
    handle signals, nothing changes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def __exit__(self, kind: type | None = None, *error):
        super().__exit__()
        if self.number and not issubclass(kind or Exception, KeyboardInterrupt):
            signal.raise_signal(self.number)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        super().note(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def received(self) -> int:
        """The number of the signal that any process received, or 0; all processes get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.number
        number = torch.tensor([self.number], device=self.accelerator.device)
        return int(self.accelerator.gather(number).max())


class StopAfterSaving(TrainerCallback):
    """
    Ends `Trainer` after a signal, with a checkpoint of the step that it was in.

    Raises:
        Interrupted: the checkpoint was written. The message says how to go on.
    """

    def __init__(self, stop: StopSignals):
        self.stop = stop
        self.number = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.number = self.stop.received()
        if self.number:
            control.should_save = True
            if state.epoch == int(state.epoch):  # the run that goes on begins with the next epoch
                control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
                control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH

    def on_save(self, args, state, control, **kwargs):
        if self.number and state.global_step < state.max_steps:
            raise Interrupted(stopped(self.number, state.global_step, state.max_steps, args.output_dir), self.number)


def stopped(number: int, step: int, total_steps: int, output_dir: str) -> str:
    """What a run says that a signal ended after a checkpoint."""
    return (
        f"{signal.Signals(number).name}: stopped after step {step} of {total_steps}, saved in "
        f"{output_dir}/checkpoint-{step}. Run the same command again to resume."
    )
