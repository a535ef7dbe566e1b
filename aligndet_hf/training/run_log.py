"""The log of a run: means over the steps since the last entry, in a file that survives interruptions."""

import json
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..files import write_text


class RunLog:
    """
    Collects scalars on the device, and writes their means as one JSON line per entry, to the trackers too.

    Nothing waits for the device until an entry is written. A resumed run drops the entries after its checkpoint and
    takes up the means where the checkpoint left them, so that every step counts once.

    Args:
        accelerator (`Accelerator`): Means are over all its processes; the main one writes.
        path (`Path`): The file, one JSON object per line.
        step (`int`, defaults to 0): The step the run starts from.
        totals (`dict[str, list[float]]`, *optional*): What [`RunLog.totals`] returned at that step.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int = 0, totals: dict | None = None):
        self.accelerator = accelerator
        self.path = path
        self.since = (time.perf_counter(), step)
        self._totals = dict(totals or {}) if accelerator.is_main_process else {}
        self._pending: list[tuple[list[str], Tensor]] = []
        if accelerator.is_main_process:
            lines = path.read_text().splitlines() if path.exists() else []
            write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= step))

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one observation of each scalar tensor. NaN says "nothing to measure" and is left out of the mean."""
        self._pending.append((list(scalars), torch.stack([value.detach().float() for value in scalars.values()])))

    def totals(self) -> dict[str, list[float]]:
        """Sum and count of every scalar since the last entry, over all processes (which all must call this)."""
        for names, values in self._pending:
            for name, value in zip(names, values.tolist(), strict=True):
                if math.isfinite(value):
                    total, count = self._totals.get(name, (0.0, 0))
                    self._totals[name] = [total + value, count + 1]
        self._pending = []
        merged: dict[str, list[float]] = {}
        for totals in gather_object([self._totals]):
            for name, (total, count) in totals.items():
                before = merged.get(name, (0.0, 0))
                merged[name] = [before[0] + total, before[1] + count]
        return merged

    def write(self, step: int, images_per_step: int, **values: float) -> dict[str, float]:
        """Write the entry of a step (all processes must call this), and return it."""
        means = {name: total / count for name, (total, count) in self.totals().items()}
        self._totals = {}
        now = time.perf_counter()
        started, started_at = self.since
        self.since = (now, step)
        entry = {"step": step, **values, **means}
        entry["images_per_second"] = (step - started_at) * images_per_step / (now - started)
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.accelerator.log(entry, step=step)
        return entry


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # The last line of a process that was killed while it wrote.
