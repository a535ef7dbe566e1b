"""The statistics of a comparison, by numbers worked out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aligndet_hf.evaluation.coco_metrics import SUMMARY
from aligndet_hf.reporting.paired import (
    Run,
    compare_runs,
    mean_curve,
    paired_difference,
    steps_to_reach,
    summarize,
)


def test_mean_and_spread():
    assert summarize([1, 2, 6]) == {"values": [1, 2, 6], "mean": 3, "std": pytest.approx(7**0.5), "min": 1, "max": 6}
    assert summarize([4])["std"] is None


def test_pairs_by_hand():
    found = paired_difference([0.3, 0.5, 0.4], [0.2, 0.5, 0.1])
    assert found["differences"] == pytest.approx([0.1, 0, 0.3])
    assert found["mean"] == pytest.approx(0.4 / 3) and found["wins"] == 2 and found["most_coverage"] == 0.75
    # Of the 27 samples of three 1 is all zeros and 1 all 0.3: 3.7 % each, more than the 2.5 % that are cut off.
    assert found["interval"] == pytest.approx([0, 0.3])


def test_the_interval_is_that_of_all_samples_for_five_seeds():
    differences = [-1.0, 0.0, 2.0, 3.0, 7.0]
    means = [np.mean(sample) for sample in itertools.product(differences, repeat=5)]
    expected = np.quantile(means, [0.025, 0.975])
    found = paired_difference(differences, [0.0] * 5, resamples=100_000)
    assert found["interval"] == pytest.approx(expected, abs=0.1)
    assert found["interval"][0] > -1 and found["interval"][1] < 7


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_the_interval_lies_between_the_extremes_and_turns_with_the_sign(pairs):
    ours, theirs = zip(*pairs, strict=True)
    found, turned = paired_difference(ours, theirs, 200), paired_difference(theirs, ours, 200)
    low, high = found["interval"]
    assert min(found["differences"]) - 1e-12 <= low <= high <= max(found["differences"]) + 1e-12
    assert turned["interval"] == pytest.approx([-high, -low])
    assert found["wins"] + turned["wins"] + sum(a == b for a, b in pairs) == len(pairs)


def test_what_cannot_be_paired_is_refused():
    assert paired_difference([0.2], [0.1])["interval"] is None
    for values, baseline in (([], []), ([1], [1, 2])):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired_difference(values, baseline)


def test_steps_to_reach():
    assert steps_to_reach([10, 20, 30], [0.1, 0.4, 0.3], 0.3) == 20
    assert steps_to_reach([10, 20, 30], [0.1, 0.4, 0.3], 0.1) == 10
    assert steps_to_reach([10, 20, 30], [0.1, 0.4, 0.3], 0.5) is None


def test_the_mean_curve_has_the_steps_that_all_curves_have():
    one = [{"step": 1, "AP": 0.1}, {"step": 2, "AP": 0.2}, {"step": 4, "AP": 0.6}]
    other = [{"step": 2, "AP": 0.4}, {"step": 3, "AP": 0.9}, {"step": 4, "AP": 0.2}]
    found = mean_curve([one, other])
    assert found["step"] == [2, 4]
    assert found["mean"] == pytest.approx([0.3, 0.4]) and found["min"] == [0.2, 0.2] and found["max"] == [0.4, 0.6]


def run(arm: str, seed: int, curve: list[float], fraction: float = 0.1) -> Run:
    """A run of an evaluation every 100 steps; class `a` has the AP of all, `b` none of it, `c` no objects."""
    points = [{"step": 100 * number, "AP": ap} for number, ap in enumerate(curve, start=1)]
    metrics = dict.fromkeys(SUMMARY, curve[-1]) | {"per_class": {"a": curve[-1], "b": 0.0, "c": -1.0}}
    return Run(arm, fraction, seed, metrics, points)


def test_arms_are_compared_seed_by_seed():
    runs = [
        run("ours", 1, [0.2, 0.5]),
        run("plain", 0, [0.1, 0.2]),
        run("plain", 1, [0.2, 0.4]),
        run("ours", 0, [0.4, 0.3]),
        run("ours", 2, [0.9, 0.9]),  # without its pair yet
        run("ours", 0, [0.5, 0.6], fraction=1.0),
    ]
    found = compare_runs(runs, "plain", targets=[0.45])
    assert list(found) == [0.1, 1.0] and list(found[0.1]) == ["plain", "ours"] and list(found[1.0]) == ["ours"]
    ours, plain = found[0.1]["ours"], found[0.1]["plain"]
    assert ours["seeds"] == [0, 1, 2] and ours["metrics"]["AP50"]["values"] == [0.3, 0.5, 0.9]
    assert ours["gain"]["seeds"] == [0, 1] and ours["gain"]["differences"] == pytest.approx([0.1, 0.1])
    assert ours["gain_per_class"]["a"]["mean"] == pytest.approx(0.1) and ours["gain_per_class"]["b"]["mean"] == 0
    assert "gain" not in plain and "gain" not in found[1.0]["ours"]
    # The baseline ends at 0.3 in the mean. Its own mean curve is there at step 200, ours (0.5, 0.57) at step 100.
    assert plain["steps_to"]["baseline"] == {"AP": pytest.approx(0.3), "mean_curve": 200, "seeds": [None, 200]}
    assert ours["steps_to"]["baseline"]["mean_curve"] == 100
    assert ours["steps_to"]["baseline"]["seeds"] == [100, 200, 100]
    assert ours["steps_to"]["0.45"] == {"AP": 0.45, "mean_curve": 100, "seeds": [None, 200, 100]}
    assert "baseline" not in found[1.0]["ours"]["steps_to"]
