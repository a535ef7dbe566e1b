"""A clean end on SIGTERM and SIGINT: the signal is noted, and the loop ends itself at the next step boundary."""

import signal
import threading

import torch
from accelerate import Accelerator


class StopSignals:
    """
    Context in which SIGTERM and the first SIGINT (Ctrl-C) are noted instead of ending the process.

    A second Ctrl-C interrupts at once, wherever the run is. Outside the main thread, where Python cannot handle
    signals, nothing changes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def received(self) -> int:
        """The number of the signal that any process received, or 0; all processes get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.number
        number = torch.tensor([self.number], device=self.accelerator.device)
        return int(self.accelerator.gather(number).max())
