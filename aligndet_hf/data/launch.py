"""The processes of `accelerate launch` or `torchrun`, for work on the CPU that needs no model wrapped."""

import os
from collections.abc import Callable
from datetime import timedelta

# A rank waits for the slowest one, and for the main one's reading of the data: hours are in order.
_PATIENCE = timedelta(days=7)


class Launch:
    """
    The processes that a launcher started with the same command, or this one alone; a context manager.

    They find each other by the launcher's environment variables and talk over the network (gloo); GPUs are not needed.

    Attributes:
        rank (`int`): Number of this process; 0 is the main one.
        size (`int`): Number of processes.
        local_size (`int`): Those on this machine.
    """

    def __init__(self):
        self.rank, self.size, self.local_size = (
            int(os.environ.get(name, default))
            for name, default in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)]
        )
        self._started = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "Launch":
        if self.size > 1:
            self._started = not self._group.is_initialized()
            if self._started:
                self._group.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *_) -> None:
        if self._started:
            self._group.destroy_process_group()

    @property
    def _group(self):
        import torch.distributed  # takes seconds, and one process needs none

        return torch.distributed

    def on_main(self, function: Callable, *args):
        """Calls a function in the main process; all of them return its result, or raise what it raised."""
        if self.size == 1:
            return function(*args)
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function(*args)
            except Exception as error:
                outcome[1] = error
        self._group.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.size > 1:
            self._group.barrier()
