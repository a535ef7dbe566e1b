"""The statistics of a comparison, by numbers worked out by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aligndet_hf.evaluation.coco_metrics import SUMMARY
from aligndet_hf.evaluation.image_matches import ImageMatches
from aligndet_hf.reporting.fairness import cautions, longer_arms
from aligndet_hf.reporting.paired import (
    Run,
    compare_runs,
    mean_curve,
    paired_difference,
    points,
    resampled_precisions,
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
    assert found["wins"] + turned["wins"] + sum(points(a - b) == 0 for a, b in pairs) == len(pairs)


def test_a_difference_that_no_report_shows_is_no_win():
    assert paired_difference([0.40001, 0.4006, 0.3], [0.4, 0.4, 0.4])["wins"] == 1


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


def test_of_a_run_that_stopped_early_the_last_value_counts_on():
    stopped = [{"step": 1, "AP": 0.1}, {"step": 2, "AP": 0.3}]
    other = [{"step": 1, "AP": 0.1}, {"step": 2, "AP": 0.2}, {"step": 3, "AP": 0.5}]
    found = mean_curve([stopped, other])
    assert found["step"] == [1, 2, 3] and found["mean"] == pytest.approx([0.1, 0.25, 0.4])


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


def test_an_arm_is_counted_to_what_the_baseline_has_with_the_same_seeds():
    """The seed that the arm has not yet is an easy or a hard one."""
    runs = [run("plain", 0, [0.2, 0.3]), run("plain", 1, [0.5, 0.7]), run("ours", 0, [0.35, 0.4])]
    found = compare_runs(runs, "plain")[0.1]
    assert found["plain"]["steps_to"]["baseline"]["AP"] == pytest.approx(0.5)
    assert found["ours"]["steps_to"]["baseline"] == {"AP": 0.3, "mean_curve": 100, "seeds": [100]}


def test_only_classes_that_both_arms_have_are_compared():
    other = run("ours", 0, [0.4])
    other.metrics["per_class"] = {"d": 0.4, "a": 0.5}
    ours = compare_runs([run("plain", 0, [0.3]), other], "plain")[0.1]["ours"]
    assert list(ours["gain_per_class"]) == ["a"] and ours["gain_per_class"]["a"]["mean"] == pytest.approx(0.2)
    assert list(ours["per_class"]) == ["d", "a"]


# ---- could it flatter? ----


def found_in(*right: bool) -> ImageMatches:
    """One object in each image, and one detection, which is right or wrong; scores fall from image to image."""
    number = len(right)
    return ImageMatches(
        objects=np.ones((1, number), dtype=np.int64),
        categories=np.zeros(number, dtype=np.int64),
        images=np.arange(number),
        right=np.repeat(np.array(right)[:, None], 10, axis=1),
        ignored=np.zeros((number, 10), dtype=bool),
    )


def test_the_bootstrap_over_images_pairs_its_samples():
    ours, theirs = found_in(*[True] * 20), found_in(*[True] * 10, *[False] * 10)
    samples = [resampled_precisions(matches, 200) for matches in (ours, theirs)]
    assert (samples[0] == 1).all()
    # Without a wrong one before them, the right ones find as many objects as their share in the sample.
    shares = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), 200)[:, :10].sum(axis=1) / 20
    np.testing.assert_allclose(samples[1], (100 * shares + 1) / 101, atol=1.01 / 101)  # to a point of recall
    runs = [run("ours", 0, [0.9]), run("plain", 0, [0.5]), run("ours", 1, [0.9]), run("plain", 1, [0.9])]
    resampled = {("ours", 0.1, 0): samples[0], ("plain", 0.1, 0): samples[1]}
    gain = compare_runs(runs, "plain", resampled=resampled)[0.1]["ours"]["gain"]
    assert gain["image_interval"] is None  # the matches of the second seed are missing
    resampled |= {("ours", 0.1, 1): samples[0], ("plain", 0.1, 1): samples[0]}
    gain = compare_runs(runs, "plain", resampled=resampled)[0.1]["ours"]["gain"]
    assert gain["image_interval"] == pytest.approx(np.quantile((1 - samples[1]) / 2, [0.025, 0.975]).tolist())


def compared(arms: dict[str, tuple[dict, int, float]], baseline: str = "plain", **changes) -> dict:
    """Results of arms with these differences in protocol, steps and AP; two seeds, a tenth of the labels."""
    runs = [
        Run(arm, 0.1, seed, run(arm, seed, [ap]).metrics, [{"step": steps, "AP": ap}])
        for arm, (_, steps, ap) in arms.items()
        for seed in (0, 1)
    ]
    return {
        "baseline": baseline,
        "arms": {arm: {"start": {}, "protocol": protocol} for arm, (protocol, _, _) in arms.items()},
        "statistics": {f"{share:g}": found for share, found in compare_runs(runs, baseline).items()},
    } | changes


def test_an_arm_is_longer_by_the_steps_that_it_took():
    """Flags alone do not tell: they have defaults, and max_steps counts more than epochs."""
    arms = {
        "plain": ({}, 100, 0.3),
        "more": ({"max_steps": 200}, 200, 0.3),
        "epochs": ({"num_train_epochs": 20, "max_steps": None}, 150, 0.3),
        "fewer": ({"num_train_epochs": 5}, 10, 0.3),
        "overridden": ({"num_train_epochs": 1000}, 100, 0.3),
        "augmented": ({"max_steps": 200, "augmentations": ["mixup"]}, 200, 0.3),
    }
    results = compared(arms)
    results["arms"]["elsewhere"] = {"start": {"detector": "x"}, "protocol": {"max_steps": 200}}
    results["arms"]["unfinished"] = {"start": {}, "protocol": {"max_steps": 200}}
    results["statistics"]["0.1"]["elsewhere"] = results["statistics"]["0.1"]["more"]
    assert longer_arms(results) == ["more", "epochs"]


def test_what_a_reader_is_told_before_the_numbers():
    def told(plain: float, longer: float, **changes) -> list[str]:
        arms = {"plain": ({}, 100, plain), "plain_long": ({"max_steps": 200}, 200, longer)}
        return cautions(compared(arms, **changes))

    (alone,) = cautions(compared({"plain": ({}, 100, 0.3)}))
    assert alone.startswith("Whether plain is trained to its end was not looked at: --baseline_long")
    assert told(0.3, 0.309) == [
        "plain has converged: longer fine-tuning (plain_long) moves its AP by less than 1 (+0.9 at 10 %)."
    ]
    first, second, third = told(0.3, 0.311, without_crops=["plain", "other"], best_weights=["plain_long"])
    assert first.startswith("plain has not converged: longer fine-tuning (plain_long) moves its AP (+1.1 at 10 %")
    assert second.startswith("Measured with the best weights, not the last (load_best_model_at_end): plain_long.")
    assert third.startswith("Fine-tuned without crops (crop_scale): plain, other.")
    assert told(0.4, 0.35) == [
        "Longer fine-tuning (plain_long) lowers the AP of plain (-5.0 at 10 % of the labels): more steps do not help "
        "it there."
    ]
    assert told(0.002, 0.007) == [
        "Whether plain is trained to its end cannot be told: with longer fine-tuning (plain_long), too, its AP is "
        "below 5. A gain may be one of speed."
    ]
    results = compared({"plain": ({}, 100, 0.3), "other": ({}, 100, 0.35)})
    results["statistics"]["0.1"]["other"]["gain"]["image_interval"] = [-0.01, 0.1]
    assert cautions(results)[1].endswith("(95 % bootstrap over images): other at 10 %.")
