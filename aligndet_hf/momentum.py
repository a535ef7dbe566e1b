"""The momentum (EMA) copy of a detector: its schedule and its update."""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from .ranges import SHARE, require


def cosine_momentum(step: int, total_steps: int, base: float = 0.996, end: float = 1.0) -> float:
    """
    Momentum of the update after optimizer step `step`, rising from `base` to `end` along half a cosine.

    `m_k = end - (end - base) * (cos(pi k / K) + 1) / 2` (BYOL, Grill et al. 2020, as AlignDet and SoCo use it).

    Args:
        step (`int`): optimizer steps done before this one, `k` in `0 .. total_steps - 1`.
        total_steps (`int`): number of optimizer steps of the whole run, `K`.
        base (`float`, *optional*, defaults to 0.996): momentum of the first step.
        end (`float`, *optional*, defaults to 1.0): momentum that the schedule approaches.

    Raises:
        `ValueError`: if `total_steps` is not positive, or a momentum not from 0 to 1.

    Example:

    ```python
    >>> from aligndet_hf.momentum import cosine_momentum

    >>> [round(cosine_momentum(step, 4), 4) for step in range(4)]
    [0.996, 0.9966, 0.998, 0.9994]

    ```
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= min(base, end) <= max(base, end) <= 1:
        raise ValueError(f"momenta must lie in [0, 1], got base_momentum {base} and end_momentum {end}")
    return end - (end - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def suited_momentum(total_steps: int) -> float:
    """
    The momentum to start a run of this many steps with.

    The momentum detector is to leave its random start behind within a fiftieth of the run: 0.996, as published, from
    12,500 steps on, and never less than 0.95, which a thousand steps have.

    Args:
        total_steps (`int`): Optimizer steps of the whole run.
    """
    return 1 - min(max(50 / total_steps, 0.004), 0.05)


@torch.no_grad()
def update_momentum(
    online: nn.Module, momentum_module: nn.Module, momentum: float, *, copied: tuple[str, ...] = ()
) -> None:
    """
    Moves a momentum module towards its online twin: `theta_m = momentum * theta_m + (1 - momentum) * theta_o`.

    Parameters are interpolated and buffers (running statistics) are copied. Tensors that both modules share, such as
    a frozen backbone, are left alone. Modules are paired by name. A momentum module without tensors may stand for one
    that has some; all others must hold the same.

    Args:
        online (`nn.Module`): the trained module, *after* its optimizer step.
        momentum_module (`nn.Module`): the momentum copy, changed in place.
        momentum (`float`): share of the old value that stays, in [0, 1].
        copied (`tuple[str, ...]`, *optional*): parameters with one of these strings in their name are copied by
            value instead. AlignDet does so with the query embeddings, so that query slots mean the same in both
            detectors; the official code shares their storage, this one never does.

    Raises:
        `ValueError`: for a momentum out of its range, or if a pair of modules hold tensors or modules of other names,
            as where adapters (LoRA) or parametrizations were put into one of them: what they learn would never reach
            the other.
    """
    require("momentum", momentum, SHARE)
    lists = defaultdict(list)  # of pairs that one call can move
    for name, target, source in dict(_pairs(online, momentum_module)).values():
        is_averaged = isinstance(target, nn.Parameter) and not any(part in name for part in copied)
        lists[is_averaged, target.dtype].append((target, source))
    for (is_averaged, _), pairs in lists.items():
        if is_averaged:
            torch._foreach_lerp_(*zip(*pairs, strict=True), 1.0 - momentum)
        else:
            torch._foreach_copy_(*zip(*pairs, strict=True))


def _pairs(online: nn.Module, momentum_module: nn.Module, prefix: str = "") -> Iterator[tuple[int, tuple]]:
    """
    Every tensor of the momentum module that is its own: `id`, and name, tensor and the online module's of that name.

    A walk of both modules side by side, in half the time of a look-up in the names of all online tensors; a
    frozen backbone has the most of them.
    """
    if momentum_module is online:
        return
    names, others = ({*part._parameters, *part._buffers, *part._modules} for part in (momentum_module, online))
    if names and names != others:
        raise ValueError(
            f"{prefix or 'the module '}({type(online).__name__}) holds other tensors or modules in the online network "
            f"than in the momentum network: {sorted(names ^ others)}. Adapters and other wrappers of modules are not "
            "averaged: merge or remove them"
        )
    for name, target in (*momentum_module._parameters.items(), *momentum_module._buffers.items()):
        if target is not None and (source := getattr(online, name)) is not target:
            yield id(target), (prefix + name, target, source)
    for name, child in momentum_module.named_children():
        yield from _pairs(getattr(online, name), child, f"{prefix}{name}.")
