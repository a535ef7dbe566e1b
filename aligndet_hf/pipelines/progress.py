"""How far a comparison is: lines that say what begins, ends and fails, and about how long the rest will take."""

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from ..training.run_length import FORECAST
from .outcomes import TRAINED, images_per_step
from .runner import is_finished, record_of
from .stages import Stage, origin_of, setting


class Progress:
    """
    Prints a line when a stage begins, and one when it ends or fails.

    Args:
        stages (`Sequence[Stage]`): All stages.
        names (`Mapping[Stage, str]`): What to call them.
        steps (`Mapping[Stage, int]`): Optimizer steps of each that trains, see [`planned_steps`].
        num_parallel (`int`): How many run at the same time.
    """

    _SECONDS = 5  # between two looks at a log

    def __init__(
        self, stages: Sequence[Stage], names: Mapping[Stage, str], steps: Mapping[Stage, int], num_parallel: int
    ):
        self.names, self.steps, self.total, self.num_parallel = names, steps, len(stages), max(1, num_parallel)
        self.done = [stage for stage in stages if is_finished(stage)]
        self.left = [stage for stage in stages if stage not in self.done]
        # Of stages without a forecast: up to where their log is read, and the time of the next look.
        self.logs: dict[Stage, tuple[int, float]] = {}

    def __str__(self) -> str:
        """What there is to do."""
        steps = sum(self.steps.get(stage, 0) for stage in self.left)
        return (
            f"{self.total} stages; {len(self.done)} are finished. The others train for about {steps:,} steps in all."
        )

    def begin(self, stage: Stage) -> None:
        """To be called before a stage runs."""
        print(f"{self.names[stage]}: {stage.command} begins, its log is {stage.beside('.log')}", flush=True)
        log = stage.beside(".log")
        self.logs[stage] = log.stat().st_size if log.exists() else 0, 0.0  # what an interrupted run has said is over

    def wait(self, stage: Stage) -> None:
        """To be called while a stage runs: passes on when it ends, which a training says in its log after a minute."""
        place, due = self.logs.get(stage, (0, math.inf))
        if time.monotonic() < due:
            return
        self.logs[stage] = place, time.monotonic() + self._SECONDS
        with open(stage.beside(".log"), errors="replace") as log:
            log.seek(place)
            if told := next((line.strip() for line in log if FORECAST in line and line.endswith("\n")), None):
                print(f"{self.names[stage]}: {told}", flush=True)
                del self.logs[stage]

    def end(self, stage: Stage, failure: str | None, *told: str) -> None:
        """To be called when a stage has ended, with the reason if it failed, and else with what came of it."""
        self.logs.pop(stage, None)
        self.left.remove(stage)
        line = f"[{self.total - len(self.left)}/{self.total}] {self.names[stage]}: "
        if failure is None:
            self.done.append(stage)
            line += ", ".join([f"{record_of(stage)['seconds']:.0f} s", *told, *self._time_left()])
        else:
            line += f"{stage.command} failed: {failure}"
        print(line, flush=True)

    def _time_left(self) -> list[str]:
        """By the pace of finished stages of the same command; nothing where there is none."""
        seconds, unknown = 0.0, []
        for command in dict.fromkeys(stage.command for stage in self.left):
            done, left = ([stage for stage in part if stage.command == command] for part in (self.done, self.left))
            if done:
                pace = sum(record_of(stage)["seconds"] for stage in done) / self._amount(done)
                seconds += pace * self._amount(left) / self.num_parallel
            else:
                unknown.append(command)
        if not seconds:
            return []
        return [f"about {timedelta(seconds=round(seconds))} left"] + [f"{command} not counted" for command in unknown]

    def _amount(self, stages: Sequence[Stage]) -> int:
        """Steps of stages that train; others count alike."""
        return sum(self.steps.get(stage, 1) for stage in stages)


def planned_steps(jobs: Sequence[Sequence[Stage]], images: Mapping[tuple, int]) -> dict[Stage, int]:
    """
    About how many optimizer steps each stage that trains will take.

    Args:
        jobs (`Sequence[Sequence[Stage]]`): The stages of each run.
        images (`Mapping[tuple, int]`): The number of images, by where they come from: see [`origin_of`].
    """
    steps = {}
    for stages in jobs:
        for stage in stages:
            if stage.command in TRAINED and stage not in steps:
                used = images[origin_of(stage, stages)] * (setting(stage, "label_fraction") or 1)
                epochs, length = setting(stage, "num_train_epochs"), setting(stage, "max_steps")
                steps[stage] = length if length > 0 else math.ceil(epochs * max(1, used // images_per_step(stage)))
    return steps
