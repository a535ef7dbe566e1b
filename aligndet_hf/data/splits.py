"""Parts of a data set: nested subsets, to compare runs with few and many labels, and rows spread over all of it."""

from pathlib import Path

import datasets
import numpy as np

Splits = dict[str, datasets.Dataset]  # by the names of the splits


def is_same_split(*parts: tuple[str, str | None]) -> bool:
    """Whether these sources and splits are the same, however the path is written; no split: there is one, or all."""
    places = {Path(str(source)).expanduser().resolve() for source, _ in parts}
    return len(places) == 1 and len({split for _, split in parts} - {None}) < 2


def nested_subsets(num_rows: int, fractions: list[float], seed: int) -> dict[float, list[int]]:
    """
    Draws random subsets; each smaller one lies inside each larger one, so that adding labels never takes
    others away.

    Args:
        num_rows (`int`): Rows of the data set.
        fractions (`list[float]`): Sizes of the subsets, in (0, 1]. A subset has at least one row.
        seed (`int`): Seed of the draw.

    Returns:
        `dict[float, list[int]]`: sorted row numbers by fraction.

    Raises:
        `ValueError`: if there are no rows, or for a fraction outside (0, 1].
    """
    if num_rows < 1:
        raise ValueError("The data set is empty: there is nothing to draw from.")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"A fraction must lie in (0, 1], got {fraction}.")
    order = np.random.default_rng(seed).permutation(num_rows)
    return {fraction: sorted(order[: max(1, round(fraction * num_rows))].tolist()) for fraction in fractions}


def spread_rows(num_rows: int, number: int) -> list[int]:
    """At most this many of the row numbers from 0, evenly spaced; none where there are no rows."""
    return np.unique(np.linspace(0, num_rows - 1, min(number, num_rows)).round().astype(int)).tolist()
