"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    peak: float,
    total_steps: int,
    schedule: str,
    warmup_steps: int = 0,
    milestones: Sequence[int] = (),
    decay: float = 0.1,
) -> float:
    """
    The learning rate of one optimizer step.

    During warm-up it rises linearly, `peak * (step + 1) / (warmup_steps + 1)`: step 0 learns already.

    Args:
        step (`int`): Optimizer steps done before this one.
        peak (`float`): The highest learning rate.
        total_steps (`int`): Optimizer steps of the whole run.
        schedule (`str`): `"constant"`, `"step"` (times `decay` from each milestone on) or `"cosine"` (half a cosine
            from the end of the warm-up down to 0).
        warmup_steps (`int`, defaults to 0): Steps of the warm-up.
        milestones (`Sequence[int]`, *optional*): Steps at which `"step"` decays.
        decay (`float`, defaults to 0.1): Factor of each decay.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "step":
        return peak * decay ** sum(step >= milestone for milestone in milestones)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2
    return peak


def milestone_steps(milestones: Sequence[float], total_steps: int, steps_per_epoch: int) -> list[int]:
    """Steps of milestones given as fractions of the run (below 1) or as epochs (1 and above)."""
    return [round(at * (total_steps if at < 1 else steps_per_epoch)) for at in milestones]
