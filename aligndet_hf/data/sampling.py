"""Which images form which batch: a pure function of (seed, epoch), whatever the number of processes and workers."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What a data set needs to know to draw one sample, and all that its randomness may depend on.

    Attributes:
        index (`int`): Row of the data set.
        epoch (`int`): Epoch, from 0.
        batch (`int`): Global batch number since the start of training; the same on all processes.
        visit (`tuple[int, ...]`): Of a stream, which has no epochs: the number of the visit to the row's shard.
    """

    index: int
    epoch: int
    batch: int
    visit: tuple[int, ...] = ()


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """
    Yields the batches of one process as lists of [`SampleKey`]. Use it as `batch_sampler` of a `DataLoader`.

    The global batch `k` of an epoch holds `batch_size * world_size` rows and is cut into contiguous slices by rank, so
    the union over ranks is the batch that one process with `batch_size * world_size` sees. Nothing is stored between
    batches: `set_epoch(epoch, start_batch)` resumes exactly.

    Args:
        num_samples (`int`):
            Number of rows of the data set.
        batch_size (`int`):
            Rows per batch and process.
        seed (`int`):
            Seed of the order, which is drawn anew for each epoch.
        drop_last (`bool`):
            Whether to leave out the rows of an epoch that do not fill a global batch. If the data set is smaller than
            one global batch, its rows are repeated so that one batch exists. Without `drop_last` the last batch is
            smaller and shared out as evenly as possible; if it has fewer rows than there are processes, rows from the
            start of the epoch fill it up to one each (an empty batch would leave the other processes waiting).
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the rows.
        rank (`int`, *optional*, defaults to 0):
            This process.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes.

    Raises:
        `ValueError`: if there are no rows, or if `batch_size`, `rank` or `world_size` is impossible.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        if num_samples < 1:
            raise ValueError("The data set is empty: there is nothing to sample from.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank={rank} and world_size={world_size}.")
        self.num_samples = num_samples
        self.global_batch_size = batch_size * world_size
        self.seed = seed
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the epoch that the next iteration yields, from its batch `start_batch` on."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches per epoch (and process)."""
        if self.drop_last:
            return max(1, self.num_samples // self.global_batch_size)
        return -(-self.num_samples // self.global_batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        for k in range(self.start_batch, len(self)):
            start = k * self.global_batch_size
            stop = start + self.global_batch_size
            if not self.drop_last:
                stop = max(min(stop, self.num_samples), start + self.world_size)
            rows = order[np.arange(start, stop) % self.num_samples]
            rows = np.array_split(rows, self.world_size)[self.rank]
            yield [SampleKey(int(row), self.epoch, self.epoch * len(self) + k) for row in rows]
