"""Statistics of a comparison: arms x label fractions x seeds, with the seeds as pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.coco_metrics import SUMMARY
from ..evaluation.image_matches import ImageMatches


@dataclass(frozen=True)
class Run:
    """
    What one fine-tuning run reached.

    Attributes:
        arm (`str`): Where it started from.
        fraction (`float`): Share of the labels.
        seed (`int`): Of the choice of the labels, and of the training.
        metrics (`dict`): What `CocoMetrics.compute()` gave at the end.
        curve (`list[dict]`): The evaluations on the way, the last included: `step`, `AP`, and `per_class`.
    """

    arm: str
    fraction: float
    seed: int
    metrics: dict
    curve: list[dict]


def summarize(values: Sequence[float]) -> dict:
    """Mean, spread and range of one value per seed; the standard deviation (of the sample) is `None` for one seed."""
    values = np.asarray(values, dtype=float)
    return {
        "values": values.tolist(),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "min": float(values.min()),
        "max": float(values.max()),
    }


def points(difference: float) -> float:
    """A difference of AP in points, as a report shows it: to a tenth. Smaller ones are no win."""
    return round(100 * difference, 1)


def paired_difference(values: Sequence[float], baseline: Sequence[float], resamples: int = 10_000) -> dict:
    """
    What an arm gains over another one, seed by seed.

    The interval is the percentile bootstrap of the mean over seeds (95 %). It cannot reach beyond the smallest and the
    largest difference, so that with n seeds it holds the median of all possible differences with a probability of at
    most 1 - 2^(1 - n): 0.75 for 3 seeds, 0.94 for 5. Fewer than 6 seeds do not make a 95 % interval of it.

    Args:
        values (`Sequence[float]`): One value per seed.
        baseline (`Sequence[float]`): The values of the other arm, for the same seeds in the same order.
        resamples (`int`, *optional*, defaults to 10000): Bootstrap samples; their seed is fixed.

    Returns:
        `dict`: `differences`, their `mean` and `std`, the `interval` (`None` for one seed), `wins` (seeds in which the
        arm is better by what a report shows, see [`points`]), and `most_coverage`, the bound above.

    Raises:
        `ValueError`: if the lengths differ, or there is no seed.
    """
    if len(values) != len(baseline) or not len(values):
        raise ValueError(f"{len(values)} values and {len(baseline)} of the baseline cannot be paired")
    differences = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    interval, count = None, len(differences)
    if count > 1:
        rows = np.random.default_rng(0).integers(0, count, (resamples, count))
        interval = np.quantile(differences[rows].mean(axis=1), [0.025, 0.975]).tolist()
    summary = summarize(differences)
    return {
        "differences": summary["values"],
        "mean": summary["mean"],
        "std": summary["std"],
        "interval": interval,
        "wins": sum(points(difference) > 0 for difference in summary["values"]),
        "most_coverage": 1 - 2.0 ** (1 - count),
    }


def resampled_precisions(matches: ImageMatches, resamples: int = 300) -> np.ndarray:
    """
    The AP on samples of the evaluation images, drawn with replacement: the same samples for all runs.

    Args:
        matches ([`ImageMatches`]): What a run found.
        resamples (`int`, *optional*, defaults to 300): How many samples; their seed is fixed.

    Returns:
        `np.ndarray` of shape `[resamples]`: AP between 0 and 1.
    """
    count = matches.objects.shape[1]
    samples = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)
    different, places = np.unique(samples, axis=0, return_inverse=True)  # of few images many samples are the same
    return np.array([matches.average_precision(sample) for sample in different])[places]


def steps_to_reach(steps: Sequence[int], values: Sequence[float], target: float) -> int | None:
    """The first of the evaluated steps at which a curve is at the target or above, `None` if it never is."""
    return next((int(step) for step, value in zip(steps, values, strict=True) if value >= target), None)


def mean_curve(curves: Sequence[Sequence[Mapping]]) -> dict[str, list]:
    """
    The mean of several learning curves, and their spread, at the steps that all of them have.

    Where a curve has ended before others, its last value stands for it.

    Args:
        curves (`Sequence[Sequence[Mapping]]`): Per seed the evaluations, each with `step` and `AP`.

    Returns:
        `dict[str, list]`: `step`, `mean`, `min` and `max`.
    """
    by_step = [{record["step"]: record["AP"] for record in curve} for curve in curves]
    for known in by_step:
        end = max(known)
        known |= {step: known[end] for other in by_step for step in other if step > end}
    steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
    values = np.array([[curve[step] for step in steps] for curve in by_step], dtype=float)
    return {
        "step": steps,
        "mean": values.mean(axis=0).tolist(),
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
    }


def compare_runs(
    runs: Sequence[Run],
    baseline: str,
    targets: Sequence[float] = (),
    resampled: Mapping[tuple[str, float, int], np.ndarray] | None = None,
) -> dict[float, dict[str, dict]]:
    """
    Compares the arms with a baseline, for each label fraction by itself.

    Args:
        runs (`Sequence[Run]`): All runs that were finished. Only seeds that both arms have are paired.
        baseline (`str`): The arm to compare with.
        targets (`Sequence[float]`, *optional*): AP values (0 to 1) to count the steps to; the final AP of the baseline
            (its mean over the seeds that the arm has) is always one, as `"baseline"`.
        resampled (`Mapping`, *optional*): [`resampled_precisions`] of runs, by arm, fraction and seed. Where all pairs
            have them, `gain` has an `image_interval`: the 95 % bootstrap over evaluation images of the mean
            difference of these seeds.

    Returns:
        `dict[float, dict[str, dict]]`: per fraction and arm: `seeds`; `metrics`, a [`summarize`] of each COCO number;
        `per_class`, of each class; `curve`, a [`mean_curve`]; `gain` and `gain_per_class` (of the classes that both
        have), each a [`paired_difference`] to the baseline (not for itself, nor without common seeds); `steps_to`, per
        target the step of the mean curve and the step of each seed's curve.
    """
    result: dict[float, dict[str, dict]] = {}
    arms = list(dict.fromkeys(run.arm for run in runs))
    for fraction in sorted({run.fraction for run in runs}):
        found = {
            arm: {run.seed: run for run in runs if run.arm == arm and run.fraction == fraction}
            for arm in sorted(arms, key=lambda arm: (arm != baseline, arms.index(arm)))
        }
        base = found.get(baseline, {})
        result[fraction] = {
            arm: _arm_statistics(by_seed, base, arm == baseline, targets, resampled or {})
            for arm, by_seed in found.items()
            if by_seed
        }
    return result


def _image_interval(pairs: Sequence[tuple[Run, Run]], resampled: Mapping) -> list[float] | None:
    """The bootstrap over images of the mean difference of pairs; `None` if it is not known of all of them."""
    keys = [[(run.arm, run.fraction, run.seed) for run in pair] for pair in pairs]
    if not all(key in resampled for pair in keys for key in pair):
        return None
    differences = np.mean([resampled[ours] - resampled[theirs] for ours, theirs in keys], axis=0)
    return np.quantile(differences, [0.025, 0.975]).tolist()


def _arm_statistics(
    by_seed: Mapping[int, Run], base: Mapping[int, Run], is_base: bool, targets: Sequence[float], resampled: Mapping
) -> dict:
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    common = sorted(set(by_seed) & set(base))
    classes = list(runs[0].metrics["per_class"])
    curve = mean_curve([run.curve for run in runs])
    goals = {f"{target:g}": target for target in targets}
    if common:
        goals["baseline"] = float(np.mean([base[seed].metrics["AP"] for seed in common]))
    result = {
        "seeds": sorted(by_seed),
        "metrics": {name: summarize([run.metrics[name] for run in runs]) for name in SUMMARY},
        "per_class": {name: summarize([run.metrics["per_class"][name] for run in runs]) for name in classes},
        "curve": curve,
        "steps_to": {
            name: {
                "AP": goal,
                "mean_curve": steps_to_reach(curve["step"], curve["mean"], goal),
                "seeds": [
                    steps_to_reach([r["step"] for r in run.curve], [r["AP"] for r in run.curve], goal) for run in runs
                ],
            }
            for name, goal in goals.items()
        },
    }
    if common and not is_base:
        pairs = [(by_seed[seed].metrics, base[seed].metrics) for seed in common]
        result["gain"] = {"seeds": common} | paired_difference(
            [metrics["AP"] for metrics, _ in pairs], [metrics["AP"] for _, metrics in pairs]
        )
        images = _image_interval([(by_seed[seed], base[seed]) for seed in common], resampled)
        result["gain"] |= {"image_interval": images}
        result["gain_per_class"] = {
            name: paired_difference(
                [metrics["per_class"][name] for metrics, _ in pairs],
                [metrics["per_class"][name] for _, metrics in pairs],
            )
            for name in classes
            if all(name in metrics["per_class"] for _, metrics in pairs)
        }
    return result
