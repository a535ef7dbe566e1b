"""Learning rate and momentum as pure functions of the step, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Sequence

from ..models import MomentumModel
from ..momentum import cosine_momentum, suited_momentum
from .pretrain_arguments import PretrainArguments


class Schedules:
    """
    The length of a pre-training run, and the learning rate and the momentum of its steps.

    Args:
        arguments ([`PretrainArguments`]): The configuration.
        model ([`MomentumModel`]): Its config has the momenta. The config gets the one that suits the length of the
            run, unless one was given.
        steps_per_epoch (`int`): Optimizer steps of one epoch.
    """

    def __init__(self, arguments: PretrainArguments, model: MomentumModel, steps_per_epoch: int):
        self.arguments = arguments
        self.model = model
        self.total_steps = arguments.max_steps
        if self.total_steps <= 0:
            self.total_steps = max(1, math.ceil(arguments.num_train_epochs * steps_per_epoch))
        self.milestones = milestone_steps(arguments.lr_milestones, self.total_steps, steps_per_epoch)
        is_suited = arguments.method == "aligndet" and arguments.preset == "suited"
        self.chosen: list[str] = []  # what nobody gave, in words
        if is_suited and "base_momentum" not in arguments.aligndet_config:
            model.config.base_momentum = suited_momentum(self.total_steps)
            self.chosen.append(f"base_momentum {model.config.base_momentum:.4g}")
        self.warmup_steps = 0
        if arguments.warmup_steps is not None:
            share = self.total_steps if arguments.warmup_steps < 1 else 1
            self.warmup_steps = int(arguments.warmup_steps * share)
        elif is_suited:
            self.warmup_steps = min(self.total_steps // 20, 500)
            self.chosen.append(f"warmup_steps {self.warmup_steps}")

    def __str__(self) -> str:
        """What was chosen for this run, and why: one line."""
        steps = f"{self.total_steps} steps"
        if not self.chosen:
            return f"{steps}; nothing was left to choose."
        return f"{steps}, so {', '.join(self.chosen)} (--preset paper takes the published values)."

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step after `step` others."""
        return learning_rate(
            step,
            peak=self.arguments.learning_rate,
            total_steps=self.total_steps,
            schedule=self.arguments.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            milestones=self.milestones,
        )

    def momentum(self, step: int) -> float:
        """The momentum of the update in that step."""
        config, step = self.model.config, step + self.model.momentum_delay
        return cosine_momentum(step, self.total_steps, config.base_momentum, config.end_momentum)


def learning_rate(
    step: int, peak: float, total_steps: int, schedule: str, warmup_steps: int = 0, milestones: Sequence[int] = ()
) -> float:
    """
    The learning rate of one optimizer step.

    During warm-up it rises linearly, `peak * (step + 1) / (warmup_steps + 1)`: step 0 learns already.

    Args:
        step (`int`): Optimizer steps done before this one.
        peak (`float`): The highest learning rate.
        total_steps (`int`): Optimizer steps of the whole run.
        schedule (`str`): `"constant"`, `"step"` (a tenth from each milestone on) or `"cosine"` (half a cosine
            from the end of the warm-up down to 0).
        warmup_steps (`int`, defaults to 0): Steps of the warm-up.
        milestones (`Sequence[int]`, *optional*): Steps at which `"step"` decays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "step":
        return peak * 0.1 ** sum(step >= milestone for milestone in milestones)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2
    return peak


def milestone_steps(milestones: Sequence[float], total_steps: int, steps_per_epoch: int) -> list[int]:
    """Steps of milestones given as fractions of the run (below 1) or as epochs (1 and above)."""
    return [round(at * (total_steps if at < 1 else steps_per_epoch)) for at in milestones]
