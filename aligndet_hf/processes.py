"""What processes that train together tell each other: means of numbers, and each other's rows; whom they obey."""

import functools
import logging
import multiprocessing
import os
import signal
import threading

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


def device_of(use_cpu: bool) -> str:
    """What a network runs on: a GPU if there is one, each process of this machine on its own; or else the CPU."""
    warn_without_gpu(use_cpu)
    if not use_cpu and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return "mps" if not use_cpu and torch.backends.mps.is_available() else "cpu"


def trains_on_cpu(use_cpu: bool) -> bool:
    """Whether Accelerate is to use the CPU: not told so without a GPU, each process of a launcher trains alone."""
    warn_without_gpu(use_cpu)
    return use_cpu or ("LOCAL_RANK" in os.environ and not torch.accelerator.is_available())


@functools.cache
def warn_without_gpu(use_cpu: bool) -> None:
    """Warns, once a process, where a GPU would be used if there were one."""
    if not use_cpu and not torch.accelerator.is_available() and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "There is no GPU that torch %s can use: this runs on the CPU. Give --use_cpu if that is meant; if there "
            "is a GPU, install torch for it (https://pytorch.org/get-started).",
            torch.__version__,
        )


def require_one_gpu(visible: int, command: str) -> None:
    """
    Refuses several GPUs in a process that no launcher started, which would train on one of them, or wrongly.

    Args:
        visible (`int`): The GPUs that this process may use.
        command (`str`): The command, as `aligndet` has it.

    Raises:
        ValueError: there are several. The message has the right line.
    """
    if visible > 1:
        raise ValueError(
            f"{visible} GPUs are visible, but this is a single process. Use them all with\n"
            f"  accelerate launch --num_processes {visible} -m aligndet_hf {command} ...\n"
            "and the same flags, or one of them with CUDA_VISIBLE_DEVICES=0 before the command."
        )


def leave_signals_to_parent() -> None:
    """
    Has this process, which works for another one, live through SIGINT and SIGTERM, unless they come from that one.

    Ctrl-C and batch systems signal all processes of a run. The one that was started ends the run and then the others;
    if they ended first, it would fail for want of them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux; elsewhere nobody says whose a signal is
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in the threads that start from here
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def init_worker(worker_id: int) -> None:
    """`worker_init_fn` of a `DataLoader`: its parent ends it, no signal, and OpenCV has no threads beside it."""
    import cv2  # 20 MB, which a process without workers may not need

    leave_signals_to_parent()
    # 0, not 1: both mean sequential, but 1 waits for the threads of the pool, which do not exist after a fork.
    cv2.setNumThreads(0)


def _end_when_parent_says() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def number_of_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every number over all processes, or the numbers themselves in a single process."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / number_of_processes()


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
