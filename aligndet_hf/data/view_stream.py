"""Endless views of a stream: an order that is a function of the seed, and a position to go on from."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import NamedTuple

import fsspec.asyn
import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .dataset import ProposalViews
from .errors import DataError
from .sampling import SampleKey, StepBatches
from .streaming import read_shard


class Position(NamedTuple):
    """
    Where a reader is: it took `taken` rows of the window that begins at row `row` of the `turn`-th shard it reads.
    """

    turn: int = 0
    row: int = 0
    taken: int = 0


@dataclass(eq=False)
class ViewStream(IterableDataset):
    """
    Endless [`ProposalViews`] of a stream, in batches that a loader's workers make in turn.

    The shards of the stream, in an order drawn anew for each round, are one endless sequence. Of `n` readers
    (processes times workers) each reads every `n`-th shard of it. Where there are fewer shards than readers, several
    share a shard: all of them read it whole, and use every other of its rows. A reader shuffles windows of
    `buffer_size` rows. All of it follows from the seed and the number of readers, so that a [`Position`] is enough to
    go on.

    An item is one of [`ProposalViews`] with `position`, a pair of the reader's number in its process and where it
    will be after this item.

    Args:
        views ([`ProposalViews`]): Of a `datasets.IterableDataset`.
        batch_size (`int`): Rows that one worker gives to a batch.
        seed (`int`): Seed of the order.
        buffer_size (`int`): Rows that are shuffled together.
        rank, world_size (`int`, *optional*): This process, of how many.
        num_workers (`int`, *optional*, defaults to 0): As the loader has.
        num_classes (`int`, *optional*): How many classes the model has; any number by default.

    Raises:
        [`DataError`]: items of a stream without rows, and proposals of a cluster that is not one of the classes.
    """

    views: ProposalViews
    batch_size: int
    _: KW_ONLY
    seed: int
    buffer_size: int
    rank: int = 0
    world_size: InitVar[int] = 1
    num_workers: InitVar[int] = 0
    num_classes: InitVar[int | None] = None

    def __post_init__(self, world_size, num_workers, num_classes):
        self.num_shards = self.views.rows.num_shards
        self.classes = set(range(num_classes or 0))
        self.readers_here = max(1, num_workers)
        self.first_reader = self.rank * self.readers_here
        self.num_readers = world_size * self.readers_here
        self.num_stripes = -(-self.num_readers // self.num_shards)
        self.start(0, {})

    def start(self, batch: int, positions: dict[int, Position]) -> None:
        """Goes on with a batch, counted from 0, and the position that each reader of this process had then."""
        self.batch = batch
        self.positions = {int(reader): Position(*position) for reader, position in positions.items()}

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        if info:
            fsspec.asyn.reset_lock()  # of the process that this one was forked from
        # The loader asks its workers in turn, from the first on.
        batch = self.batch + (info.id if info else 0)
        reader = batch % self.readers_here
        rows = self._rows(reader, self.positions.get(reader, Position()))
        for number, ((index, visit), row, position) in enumerate(rows):
            place = batch + number // self.batch_size * self.readers_here
            item = self.views.make_views(row, SampleKey(index, 0, place, (visit,)))
            unknown = set(item["labels"]["class_labels"].tolist()) - self.classes
            if self.classes and unknown:
                raise DataError(
                    f"A proposal is of cluster {unknown.pop()}, expected 0 to {len(self.classes) - 1}: num_clusters"
                )
            yield item | {"position": (reader, position)}

    def _rows(self, reader: int, position: Position) -> Iterator[tuple[tuple[int, int], pa.Table, Position]]:
        """Yields the numbers of a row in its shard and of the shard in the sequence, the row, and where it leads."""
        reader += self.first_reader
        rows = self._in_order(reader, position.turn, position.row)
        begin, taken = (position.turn, position.row), position.taken
        while True:
            window = [next(rows) for _ in range(self.buffer_size)]
            order = np.random.default_rng((self.seed, reader, *begin)).permutation(len(window))
            turn, row, _ = window[-1]
            after = Position(turn, row + 1)
            for count in range(taken, len(window)):
                turn, row, content = window[order[count]]
                done = count + 1 == len(window)
                yield (row, turn * self.num_readers + reader), content, after if done else Position(*begin, count + 1)
            begin, taken = after[:2], 0

    def _in_order(self, reader: int, turn: int, start: int) -> Iterator[tuple[int, int, pa.Table]]:
        """Yields (turn, row, content) without end, from a row of the reader's `turn`-th shard on."""
        is_empty, last = True, turn + self.num_shards * self.num_stripes
        while True:
            shard, stripe = self._shard_of(reader, turn)
            for row, content in read_shard(self.views.rows, shard, start):
                if row % self.num_stripes == stripe:
                    is_empty = False
                    yield turn, row, content
            turn, start = turn + 1, 0
            if is_empty and turn > last:
                raise DataError("The stream has no rows.")

    def _shard_of(self, reader: int, turn: int) -> tuple[int, int]:
        """The shard, and the stripe of its rows, that stands at a reader's turn in the sequence."""
        count = self.num_shards * self.num_stripes
        round_, place = divmod(turn * self.num_readers + reader, count)
        chosen = np.random.default_rng((self.seed, round_)).permutation(count)[place]
        return divmod(int(chosen), self.num_stripes)


@dataclass(eq=False)
class StreamBatches(StepBatches):
    """
    The batches of a [`ViewStream`], which all count as one epoch.

    Args:
        stream ([`ViewStream`]): The stream.
        loader (`torch.utils.data.DataLoader`): Over it; yields (position, batch).
        num_batches (`int`): Of the run.
    """

    stream: ViewStream
    loader: DataLoader
    num_batches: int

    def __post_init__(self):
        self.global_batch_size = self.stream.batch_size * self.stream.num_readers // self.stream.readers_here

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses the batch that the next iteration begins with; the `positions` must be those before it."""
        self.stream.start(start_batch, self.stream.positions)

    @property
    def positions(self) -> dict[int, Position]:
        """Where the readers of this process are, after the batch that was yielded last."""
        return self.stream.positions

    def resume(self, step: int, positions: list[dict]) -> None:
        self.stream.start(step, positions[self.stream.rank])

    def rows(self, step: int) -> list[Position]:
        return list(self.positions.values())

    def __iter__(self) -> Iterator:
        for (reader, position), batch in self.loader:
            self.stream.positions[reader] = position
            yield batch
