"""Whether a comparison could flatter: is the baseline trained to its end, with crops, and do the images decide?"""

from collections.abc import Iterator, Mapping

LEARNT = 0.05  # AP; below it nothing was learnt that a difference could be about
CONVERGED = 0.01  # AP; twice the steps move a converged arm by less
LENGTH = {"max_steps", "num_train_epochs"}


def longer_arms(results: Mapping) -> list[str]:
    """The arms that start as the baseline does, and differ from it in nothing but the length: they took more steps."""
    found = []
    for arm, differences in results["arms"].items():
        changed = differences["protocol"]
        if changed and not differences["start"] and changed.keys() <= LENGTH and arm != results["baseline"]:
            steps = [
                [arms[name]["curve"]["step"][-1] for name in (arm, results["baseline"])]
                for arms in results["statistics"].values()
                if {arm, results["baseline"]} <= arms.keys()
            ]
            if steps and all(own > base for own, base in steps):
                found.append(arm)
    return found


def nothing_learnt(*arms: Mapping) -> bool:
    """Whether the mean AP of all these arms is near 0: what they differ by says nothing."""
    return max(arm["metrics"]["AP"]["mean"] for arm in arms) < LEARNT


def cautions(results: Mapping) -> list[str]:
    """
    What a reader should know before the numbers: sentences, the gravest first.

    Args:
        results (`Mapping`): What [`~aligndet_hf.commands.compare.compare`] writes to `results.json`.
    """
    about = (_about_convergence, _about_best_weights, _about_crops, _about_images)
    return [sentence for part in about for sentence in part(results)]


def includes_zero(gain: Mapping) -> bool:
    """Whether the bootstrap over evaluation images, where there is one, includes no difference at all."""
    interval = gain.get("image_interval")
    return interval is not None and interval[0] <= 0 <= interval[1]


def _about_convergence(results: Mapping) -> Iterator[str]:
    baseline, longer = results["baseline"], longer_arms(results)
    if not longer:
        yield (
            f"Whether {baseline} is trained to its end was not looked at: --baseline_long adds an arm with twice its "
            "steps. Until then a gain may be one of speed."
        )
    for arm in longer:
        pairs = {
            fraction: (found[arm], found[baseline])
            for fraction, found in results["statistics"].items()
            if "gain" in found.get(arm, {})
        }
        moved = {share: pair[0]["gain"]["mean"] for share, pair in pairs.items() if not nothing_learnt(*pair)}
        lowered = {share: gain for share, gain in moved.items() if gain <= -CONVERGED}
        others = {share: gain for share, gain in moved.items() if share not in lowered}
        if pairs and not moved:
            yield (
                f"Whether {baseline} is trained to its end cannot be told: with longer fine-tuning ({arm}), too, its "
                f"AP is below {100 * LEARNT:g}. A gain may be one of speed."
            )
        if others and max(others.values()) < CONVERGED:
            listed = _moves(others)
            yield f"{baseline} has converged: longer fine-tuning ({arm}) moves its AP by less than 1 ({listed})."
        elif others:
            yield (
                f"{baseline} has not converged: longer fine-tuning ({arm}) moves its AP ({_moves(others)} of the "
                f"labels). Gains over {baseline} are in part gains of speed; compare with {arm} too."
            )
        if lowered:
            yield (
                f"Longer fine-tuning ({arm}) lowers the AP of {baseline} ({_moves(lowered)} of the labels): more "
                "steps do not help it there."
            )


def _moves(gains: Mapping[str, float]) -> str:
    return ", ".join(f"{100 * gain:+.1f} at {100 * float(fraction):g} %" for fraction, gain in gains.items())


def _about_best_weights(results: Mapping) -> Iterator[str]:
    if arms := results.get("best_weights"):
        yield (
            f"Measured with the best weights, not the last (load_best_model_at_end): {', '.join(arms)}. They are "
            "chosen on the evaluation images, so that their AP may be lower on others."
        )


def _about_crops(results: Mapping) -> Iterator[str]:
    if arms := results.get("without_crops"):
        yield (
            f"Fine-tuned without crops (crop_scale): {', '.join(arms)}. With few labels crops may be worth more than "
            "pre-training: give them to all arms."
        )


def _about_images(results: Mapping) -> Iterator[str]:
    unsure = []
    for fraction, arms in results["statistics"].items():
        for arm, found in arms.items():
            if includes_zero(found.get("gain") or {}):
                unsure.append(f"{arm} at {100 * float(fraction):g} %")
    if unsure:
        yield (
            "Another choice of evaluation images might turn the sign of the difference (95 % bootstrap over images): "
            f"{', '.join(unsure)}."
        )
