import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligndet_hf.data.splits import nested_subsets


@given(st.integers(1, 300), st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5), st.integers(0, 5))
def test_smaller_subsets_lie_inside_larger_ones(num_rows, fractions, seed):
    subsets = nested_subsets(num_rows, fractions, seed)
    assert set(subsets) == set(fractions)
    for small, large in zip(sorted(fractions), sorted(fractions)[1:], strict=False):
        assert set(subsets[small]) <= set(subsets[large])
    for fraction, rows in subsets.items():
        assert rows == sorted(set(rows)) and 0 <= rows[0] and rows[-1] < num_rows
        assert len(rows) == max(1, round(fraction * num_rows))


def test_a_fraction_alone_gives_the_same_subset():
    together = nested_subsets(200, [0.01, 0.1, 1.0], seed=4)
    assert nested_subsets(200, [0.1], seed=4)[0.1] == together[0.1]
    assert nested_subsets(200, [0.1], seed=5)[0.1] != together[0.1]
    assert together[1.0] == list(range(200))


@pytest.mark.parametrize("num_rows, fraction", [(0, 0.5), (10, 0.0), (10, 1.5), (10, -0.1)])
def test_impossible_arguments(num_rows, fraction):
    with pytest.raises(ValueError):
        nested_subsets(num_rows, [fraction], seed=0)
