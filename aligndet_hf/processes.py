"""What processes that train together tell each other: means of numbers, and each other's rows."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def device_of(use_cpu: bool) -> str:
    """What a network runs on: a GPU if there is one, each process of this machine on its own; or else the CPU."""
    if not use_cpu and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return "mps" if not use_cpu and torch.backends.mps.is_available() else "cpu"


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every number over all processes, or the numbers themselves in a single process."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.no_grad()
def rows_of_other_processes(rows: Tensor) -> Tensor:
    """
    The rows that all other processes call this with, without a gradient.

    Args:
        rows (`torch.Tensor` of shape `[N, D]`): this process's rows; the processes may have different numbers of them.

    Returns:
        `torch.Tensor` of shape `[M, D]`: the others' rows, in the order of the processes; none in a single process.
    """
    if not is_distributed():
        return rows[:0]
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    counts = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    gathered = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    del gathered[dist.get_rank()]
    return torch.cat(gathered)
