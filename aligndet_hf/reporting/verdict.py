"""What a comparison shows, in a sentence for each arm, and no more than it shows."""

from collections.abc import Mapping

import numpy as np

from .fairness import LEARNT, includes_zero, longer_arms, nothing_learnt
from .paired import points

ENOUGH_SEEDS = 6  # six agree by chance in 3 % of comparisons


def verdict(results: Mapping) -> list[str]:
    """
    A sentence for each arm beside the baseline, and one for all arms with a single seed.

    An arm is above or below the baseline where it is so in every seed that both have, to a tenth of a point;
    where the bootstrap over images includes 0, that is said. Nothing is decided where the AP of both is near 0, or
    with one seed.

    Args:
        results (`Mapping`): What [`~aligndet_hf.commands.compare.compare`] writes to `results.json`.
    """
    statistics, baseline = results["statistics"], results["baseline"]
    if not statistics:
        return ["Nothing is finished yet."]
    sentences, longer = [], longer_arms(results)
    for arm, differences in results["arms"].items():
        found = {fraction: arms for fraction, arms in statistics.items() if "gain" in arms.get(arm, {})}
        if found:
            unequal = ", not under the same protocol," if differences["protocol"] else ""
            if arm in longer:
                unequal = f", which is {baseline} with longer fine-tuning,"
            sentences.append(f"{arm}{unequal} {_of_arm(arm, baseline, found)}.")
    if any("in one seed, with" in sentence for sentence in sentences):
        sentences.append("One seed decides nothing.")
    return sentences or [f"There is nothing yet to compare {baseline} with."]


def _of_arm(arm: str, baseline: str, found: Mapping) -> str:
    """Of the label fractions of an arm: where it is above the baseline, below it, and where nothing can be told."""
    groups: dict[str, list[str]] = {}
    for fraction, arms in found.items():
        groups.setdefault(_outcome(arms[arm], arms[baseline]), []).append(fraction)
    clauses, seeds, open_ = [], [], []
    for outcome in ("above", "below"):
        if fractions := groups.get(outcome):
            gains = [found[fraction][arm]["gain"] for fraction in fractions]
            seeds += [len(gain["seeds"]) for gain in gains]
            open_ += [fraction for fraction in fractions if includes_zero(found[fraction][arm]["gain"])]
            size = sorted(abs(100 * gain["mean"]) for gain in gains)
            size = f"{size[0]:.1f}" + (f" to {size[-1]:.1f}" if len(size) > 1 else "")
            clauses.append(f"is {outcome} {baseline} in every seed, by {size} points of AP, with {_labels(fractions)}")
    if fractions := groups.get("undecided"):
        clauses.append(f"cannot be told from {baseline} with {_labels(fractions)}, where the seeds disagree")
    if fractions := groups.get("equal"):
        clauses.append(f"is equal to {baseline} to a tenth of a point in every seed, with {_labels(fractions)}")
    if fractions := groups.get("one seed"):
        gains = ", ".join(f"{100 * found[fraction][arm]['gain']['mean']:+.1f}" for fraction in fractions)
        clauses.append(f"differs from {baseline} by {gains} in one seed, with {_labels(fractions)}")
    if fractions := groups.get("nothing learnt"):
        clauses.append(
            f"cannot be compared with {baseline} with {_labels(fractions)}: the AP of both is below {100 * LEARNT:g}, "
            "so that nothing can be concluded"
        )
    text = "; it ".join(clauses)
    if open_:
        text += f"; with {_labels(open_)}, other evaluation images could say the opposite"
    if seeds and min(seeds) < ENOUGH_SEEDS:
        chance = 100 * 2.0 ** (1 - min(seeds))
        text += f" (a hint: {min(seeds)} seeds of equal arms agree by chance in {chance:.0f} % of all comparisons)"
    return text


def _outcome(arm: Mapping, baseline: Mapping) -> str:
    gain = arm["gain"]
    if nothing_learnt(arm, baseline):
        return "nothing learnt"
    if len(gain["seeds"]) < 2:
        return "one seed"
    signs = {np.sign(points(difference)) for difference in gain["differences"]}
    return {1: "above", 0: "equal", -1: "below"}[signs.pop()] if len(signs) == 1 else "undecided"


def _labels(fractions: list[str]) -> str:
    *others, last = [f"{100 * float(fraction):g} %" for fraction in fractions]
    return (f"{', '.join(others)} and {last}" if others else last) + " of the labels"
