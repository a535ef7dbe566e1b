from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligndet_hf.data.sampling import EpochBatchSampler, SampleKey

counts = st.integers(1, 60)
small = st.integers(1, 5)
booleans = st.booleans()


def rows(batches):
    return [[key.index for key in batch] for batch in batches]


@given(counts, small, small, booleans, booleans, st.integers(0, 3))
def test_union_over_ranks_is_the_batch_of_one_process(n, batch_size, world_size, drop_last, shuffle, epoch):
    options = {"seed": 3, "drop_last": drop_last, "shuffle": shuffle}
    one = EpochBatchSampler(n, batch_size * world_size, **options)
    ranks = [EpochBatchSampler(n, batch_size, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for sampler in [one, *ranks]:
        sampler.set_epoch(epoch)
    whole = list(one)
    parts = [list(sampler) for sampler in ranks]
    assert {len(part) for part in parts} == {len(whole)} == {len(one)}
    for k, batch in enumerate(whole):
        union = [key for part in parts for key in part[k]]
        if len(batch) >= world_size:
            assert union == batch  # contiguous slices in rank order, with the same epoch and batch number
        else:  # too few for all: filled up, so that no process waits for another
            assert union[: len(batch)] == batch and len(union) == world_size
        assert min(len(part[k]) for part in parts) >= 1
        assert max(len(part[k]) for part in parts) <= batch_size


@given(counts, small, small)
def test_no_row_is_lost_without_drop_last(n, batch_size, world_size):
    seen = Counter()
    for rank in range(world_size):
        sampler = EpochBatchSampler(n, batch_size, seed=0, drop_last=False, rank=rank, world_size=world_size)
        seen.update(key.index for batch in sampler for key in batch)
    assert set(seen) == set(range(n))
    assert sum(seen.values()) - n < world_size  # at most one to spare per other process


@given(counts, small, st.integers(0, 4))
def test_drop_last_gives_full_batches_of_different_rows(n, batch_size, epoch):
    sampler = EpochBatchSampler(n, batch_size, seed=1, drop_last=True)
    sampler.set_epoch(epoch)
    batches = rows(sampler)
    assert len(batches) == len(sampler) == max(1, n // batch_size)
    assert all(len(batch) == batch_size for batch in batches)
    seen = Counter(row for batch in batches for row in batch)
    if n >= batch_size:
        assert max(seen.values()) == 1
    else:  # one batch that goes round
        assert set(seen) == set(range(n)) and max(seen.values()) - min(seen.values()) <= 1


@given(counts, small, st.integers(0, 3), st.integers(0, 20))
def test_resume_in_the_middle_continues_exactly(n, batch_size, epoch, start):
    sampler = EpochBatchSampler(n, batch_size, seed=5, drop_last=False)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    fresh = EpochBatchSampler(n, batch_size, seed=5, drop_last=False)
    fresh.set_epoch(epoch, start_batch=start)
    assert list(fresh) == whole[start:]
    assert len(fresh) == len(whole)


def test_batch_numbers_count_on_over_epochs():
    sampler = EpochBatchSampler(10, 3, seed=0, drop_last=True)
    numbers = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in sampler:
            assert {(key.epoch, key.batch) for key in batch} == {(epoch, batch[0].batch)}
            numbers.append(batch[0].batch)
    assert numbers == list(range(9))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpochBatchSampler(100, 100, seed=seed, drop_last=True)
        sampler.set_epoch(epoch)
        return rows(sampler)[0]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_in_order_without_shuffle():
    sampler = EpochBatchSampler(5, 2, seed=0, drop_last=False, shuffle=False)
    assert rows(sampler) == [[0, 1], [2, 3], [4]]
    assert next(iter(sampler))[1] == SampleKey(index=1, epoch=0, batch=0)


@pytest.mark.parametrize(
    "change, message",
    [({"num_samples": 0}, "empty"), ({"batch_size": 0}, "batch_size"), ({"rank": 2, "world_size": 2}, "rank")],
)
def test_impossible_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        EpochBatchSampler(**({"num_samples": 4, "batch_size": 2, "seed": 0, "drop_last": True} | change))
