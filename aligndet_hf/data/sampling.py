"""Which images form which batch: a pure function of (seed, epoch), whatever the number of processes and workers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Sampler


class SampleKey(NamedTuple):
    """What a data set needs to know to draw one sample, and all that its randomness may depend on.

    Attributes:
        index (`int`): Row of the data set.
        epoch (`int`): Epoch, from 0.
        batch (`int`): Global batch number since the start of training; the same on all processes.
        visit (`tuple[int, ...]`): Of a stream, which has no epochs: the number of the visit to the row's shard.
    """

    index: int  # type: ignore[assignment]  # a tuple's own `index` is not needed
    epoch: int
    batch: int
    visit: tuple[int, ...] = ()


@dataclass(eq=False)
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

    num_samples: int
    batch_size: InitVar[int]
    _: KW_ONLY
    seed: int
    drop_last: bool
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1

    def __post_init__(self, batch_size):
        if self.num_samples < 1:
            raise ValueError("The data set is empty: there is nothing to sample from.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {self.rank} of {self.world_size}.")
        self.global_batch_size = batch_size * self.world_size
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


class MixedBatchSampler(EpochBatchSampler):
    """
    Batches with a fixed share of labelled rows; the rest is pseudo-labelled.

    Of both kinds all rows are seen equally often, in an order drawn anew for each pass over them. An epoch is one pass
    over the kind that needs more batches. As with [`EpochBatchSampler`], a batch follows from the seed and its number.

    Args:
        num_labelled, num_pseudo (`int`): Rows of both kinds; the labelled ones come first in the data set.
        labelled_share (`float`): Share of labelled rows in a batch; there is at least one row of each kind.
        batch_size (`int`): Rows per batch and process.
        **share: `seed`, `rank` and `world_size`, see [`EpochBatchSampler`].

    Raises:
        `ValueError`: a batch over all processes has less than two rows.
    """

    def __init__(self, num_labelled: int, num_pseudo: int, labelled_share: float, batch_size: int, **share):
        super().__init__(num_labelled + num_pseudo, batch_size, drop_last=True, **share)
        if self.global_batch_size < 2:
            raise ValueError("a batch of labelled and pseudo-labelled images has at least 2 of them, got 1")
        of_labelled = min(max(1, round(labelled_share * self.global_batch_size)), self.global_batch_size - 1)
        # For each kind: its first row, its rows, and how many of a batch.
        self.kinds = [(0, num_labelled, of_labelled), (num_labelled, num_pseudo, self.global_batch_size - of_labelled)]

    def __len__(self) -> int:
        """Batches per epoch (and process)."""
        return max(-(-rows // share) for _, rows, share in self.kinds)

    def _rows(self, kind: int, batch: int) -> np.ndarray:
        """The rows of one kind in a batch, counted from the start of training."""
        first, count, share = self.kinds[kind]
        places = np.arange(batch * share, (batch + 1) * share)
        orders = {
            number: np.random.default_rng((self.seed, kind, number)).permutation(count)
            for number in np.unique(places // count).tolist()
        }
        return np.array([first + orders[place // count][place % count] for place in places.tolist()])

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for k in range(self.start_batch, len(self)):
            batch = self.epoch * len(self) + k
            rows = np.concatenate([self._rows(kind, batch) for kind in range(2)])
            # Each process gets its share of both kinds.
            rows = rows[np.argsort(np.arange(len(rows)) % self.world_size, kind="stable")]
            rows = np.array_split(rows, self.world_size)[self.rank]
            yield [SampleKey(int(row), self.epoch, batch) for row in rows]


class StepBatches(ABC):
    """
    The batches of one process for a loop of optimizer steps, which goes on after any of them.

    Attributes:
        global_batch_size (`int`): Images of one step, over all processes.
    """

    global_batch_size: int

    @property
    def positions(self) -> dict:
        """What a checkpoint has to keep, besides the step, for the next batches; JSON can hold it."""
        return {}

    @abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch."""

    @abstractmethod
    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the batch that the next iteration begins with."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The batches from the chosen one to the end of the epoch."""

    @abstractmethod
    def rows(self, step: int) -> list:
        """What tells the images of a step, the last that was yielded: rows of the data set, or places in a stream."""

    @abstractmethod
    def resume(self, step: int, positions: list[dict]) -> None:
        """Goes on with a step; `positions` are what every process had before it."""

    def from_step(self, step: int) -> Iterator[Any]:
        """The batches from a step on, epoch after epoch, without end."""
        while True:
            self.set_epoch(*divmod(step, len(self)))
            for batch in self:
                yield batch
                step += 1


class EpochBatches(StepBatches):
    """
    The batches of a data set whose rows have numbers: they follow from the step.

    Args:
        sampler ([`EpochBatchSampler`]): Chooses the rows.
        loader (`torch.utils.data.DataLoader`): With this batch sampler.
    """

    def __init__(self, sampler: EpochBatchSampler, loader: DataLoader):
        self.sampler = sampler
        self.loader = loader
        self.global_batch_size = sampler.global_batch_size

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.sampler.set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def resume(self, step: int, positions: list[dict]) -> None:
        """There is nothing to do."""

    def rows(self, step: int) -> list[int]:
        """The rows of a step, on all processes."""
        own = self.sampler
        whole = EpochBatchSampler(own.num_samples, own.global_batch_size, seed=own.seed, drop_last=own.drop_last)
        whole.set_epoch(*divmod(step, len(whole)))
        return [key.index for key in next(iter(whole))]
