"""Whether a comparison could flatter: is the baseline trained to its end, with crops, and do the images decide?"""

from collections.abc import Iterator, Mapping

CONVERGED = 0.01  # AP; twice the steps move a converged arm by less
LENGTH = {"max_steps", "num_train_epochs"}


def longer_arms(results: Mapping) -> list[str]:
    """The arms that start as the baseline does, and differ from it in nothing but a longer fine-tuning."""
    found = []
    for arm, differences in results["arms"].items():
        changed = differences["protocol"]
        if changed and not differences["start"] and changed.keys() <= LENGTH and arm != results["baseline"]:
            if all(value > results["protocol"].get(name, 0) for name, value in changed.items()):
                found.append(arm)
    return found


def cautions(results: Mapping) -> list[str]:
    """
    What a reader should know before the numbers: sentences, the gravest first.

    Args:
        results (`Mapping`): What [`~aligndet_hf.commands.compare.compare`] writes to `results.json`.
    """
    return [*_about_convergence(results), *_about_crops(results), *_about_images(results)]


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
        moved = {
            fraction: found[arm]["gain"]["mean"]
            for fraction, found in results["statistics"].items()
            if "gain" in found.get(arm, {})
        }
        if not moved:
            continue
        listed = ", ".join(f"{100 * gain:+.1f} at {100 * float(fraction):g} %" for fraction, gain in moved.items())
        if all(abs(gain) < CONVERGED for gain in moved.values()):
            yield f"{baseline} has converged: longer fine-tuning ({arm}) moves its AP by less than 1 ({listed})."
        else:
            yield (
                f"{baseline} has not converged: longer fine-tuning ({arm}) moves its AP ({listed} of the labels). "
                f"Gains over {baseline} are in part gains of speed; compare with {arm} too."
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
