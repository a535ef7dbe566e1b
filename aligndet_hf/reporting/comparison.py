"""The report of a comparison: Markdown and plots, made of nothing but its results."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from accelerate.utils import recursively_apply

from ..cards import describe_versions, told
from ..files import write_text
from .fairness import cautions, longer_arms
from .page import Section
from .plots import plot_arms, plot_bands
from .verdict import verdict

REPORT = "report.md"
Part = str | Section  # of a section: a paragraph or something else
CURVES, LABELS, CLASSES = "learning_curves.png", "labels.png", "ap-{fraction}.png"


def write_report(output_dir: str | Path, results: Mapping, with_plots: bool = True) -> Path:
    """
    Writes `report.md`, and the plots that it shows.

    Args:
        output_dir (`str` or `Path`): Where to.
        results (`Mapping`): What [`~aligndet_hf.commands.compare.compare`] writes to `results.json`.
        with_plots (`bool`, *optional*, defaults to `True`): Draw the plots, too.

    Returns:
        `Path`: the report.
    """
    output_dir = Path(output_dir)
    pictures = pictures_of(results) if with_plots else {}
    if pictures:
        _plot(output_dir, results)
    first, *others = sections_of(results, pictures)
    title, verdicts = " · ".join(results["arms"]), " ".join(verdict(results))
    blocks = [f"# {title}", f"**{verdicts}**", *_markdown(Section(more=first.more))]
    path = output_dir / REPORT
    write_text(path, "\n\n".join(blocks + [block for section in others for block in _markdown(section)]) + "\n")
    return path


def pictures_of(results: Mapping) -> dict[str, str]:
    """The title of each plot of a comparison, by the name of its file."""
    fractions = list(results["statistics"])
    found = {CURVES: "Average precision in the course of fine-tuning"} if fractions else {}
    if len(fractions) > 1:
        found[LABELS] = "Average precision by number of labels"
    title = "All metrics, and average precision of each class, with"
    return found | {CLASSES.format(fraction=share): f"{title} {_percent_of_labels(share)}" for share in fractions}


def sections_of(results: Mapping, pictures: Mapping[str, str]) -> list[Section]:
    """
    What came of a comparison, and how it was run, for its report and its page.

    Args:
        results (`Mapping`): As for [`write_report`].
        pictures (`Mapping[str, str]`): The plots to show, see [`pictures_of`]; a section names their files.
    """
    statistics, baseline, evaluation = results["statistics"], results["baseline"], results["evaluation"]
    arms, failures = list(results["arms"]), results["failures"]
    failed = f", {len(failures)} stages failed or could not run" if failures else ""
    about = (
        f"Fine-tuning from {len(arms)} starting points, measured on {evaluation['images']} images "
        f"({_split(evaluation['dataset'], evaluation['split'])}). Every number is COCO average precision, IoU "
        "0.50:0.95, in percent, at the last step of fine-tuning unless it says otherwise. "
        f"{len(results['runs'])} of {results['planned']} runs are finished{failed}."
    )
    before = [Section(text=["Before the numbers:", *cautions(results)])] if statistics else []
    shown = [Section(pictures=[(title, name)]) for name, title in pictures.items()]
    sections = [
        _section("What was compared", about, *before),
        _section("Results", *_result_tables(statistics, results["images"], arms, baseline), *shown),
        _section("Steps to reach an average precision", *_steps_table(statistics, baseline)),
        _section("By class", *_class_table(statistics, baseline)),
        _section("Protocol", *_protocol(results)),
        _section("Leakage", *_leakage(results["leakage"])),
        _section("What failed", *[_table(["stage", "why"], list(failures.items()))] * bool(failures)),
        _section("How it was run", *_how(results)),
    ]
    return [section for section in sections if section]


def summary(results: Mapping) -> str:
    """
    What came of a comparison, in Markdown for other pages: averages, differences and steps, without how it was run.

    Args:
        results (`Mapping`): As for [`write_report`].
    """
    statistics, baseline, evaluation = results["statistics"], results["baseline"], results["evaluation"]
    steps = sorted({found["curve"]["step"][-1] for arms in statistics.values() for found in arms.values()})
    parts = [
        f"COCO average precision (IoU 0.50:0.95, in percent) on {evaluation['images']} images "
        f"({_split(evaluation['dataset'], evaluation['split'])}) after {' or '.join(map(str, steps))} steps of "
        f"fine-tuning from {len(results['arms'])} starting points, seeds "
        f"{', '.join(map(str, results['config']['seeds']))}.",
        *_result_tables(statistics, results["images"], list(results["arms"]), baseline),
        *_steps_table(statistics, baseline),
    ]
    return "\n\n".join(_markdown(_section("", *parts)))


def told_results(results: Mapping) -> dict:
    """
    The results of a comparison as others may read them: of paths of this machine only the last part.

    Args:
        results (`Mapping`): As for [`write_report`].
    """
    shown = ("folder", "command", "seconds")
    stages = [{key: stage[key] for key in shown} for stage in results["stages"]]
    return recursively_apply(told, {**results, "stages": stages}, test_type=_is_place)


def _is_place(value) -> bool:
    """Whether it is a path that only this machine has; those inside the comparison are relative to it."""
    return isinstance(value, str) and value.startswith(("/", "./", "../", "~"))


def _plot(output_dir: Path, results: Mapping) -> None:
    """Draws the plots."""
    statistics = results["statistics"]
    curves = {
        _percent_of_labels(fraction): {
            arm: {"x": found["curve"]["step"], **found["curve"]} for arm, found in arms.items()
        }
        for fraction, arms in statistics.items()
    }
    num_seeds = len(results["config"]["seeds"])
    plot_bands(
        curves, output_dir / CURVES, "step", f"mean and range of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    )
    if len(statistics) > 1:
        lines = {arm: {key: [] for key in ("x", "mean", "min", "max")} for arm in results["arms"]}
        for fraction, arms in statistics.items():
            for arm, found in arms.items():
                lines[arm]["x"].append(100 * float(fraction))
                for key in ("mean", "min", "max"):
                    lines[arm][key].append(found["metrics"]["AP"][key])
        lines = {arm: line for arm, line in lines.items() if line["x"]}
        plot_bands({"at the last step": lines}, output_dir / LABELS, "labels, %", log_x=True)
    for fraction, arms in statistics.items():
        means = {
            arm: {name: value["mean"] for name, value in found["metrics"].items()}
            | {"per_class": {name: value["mean"] for name, value in found["per_class"].items()}}
            for arm, found in arms.items()
        }
        name = CLASSES.format(fraction=fraction)
        plot_arms(means, output_dir / name, f"{_percent_of_labels(fraction)}, mean over seeds")


def _result_tables(statistics: Mapping, images: Mapping, arms: Sequence[str], baseline: str) -> list[Part]:
    if not statistics:
        return ["Nothing is finished yet."]
    rows, gains = [], []
    over_images = _has_image_intervals(statistics)
    for fraction, found in statistics.items():
        cells = [_mean(found[arm]["metrics"]["AP"]) if arm in found else "–" for arm in arms]
        rows.append([_percent_of_labels(fraction), images[fraction], *cells])
        for arm in arms:
            if gain := found.get(arm, {}).get("gain"):
                each = ", ".join(f"{100 * value:+.1f}" for value in gain["differences"])
                intervals = [_interval(gain["interval"])] + [_interval(gain.get("image_interval"))] * over_images
                gains.append(
                    [_percent_of_labels(fraction), arm, _signed(gain["mean"]), each, *intervals]
                    + [f"{gain['wins']} of {len(gain['seeds'])}"]
                )
    parts = ["Mean over seeds ± standard deviation (number of seeds).", _table(["labels", "images", *arms], rows)]
    if gains:
        parts += [
            f"Difference to {baseline} on the same labels, seed by seed:",
            _table(
                ["labels", "arm", "mean", "each seed", "bootstrap interval"]
                + ["bootstrap over images"] * over_images
                + ["better in"],
                gains,
            ),
            _about_intervals(statistics),
        ]
    return parts


def _about_intervals(statistics: Mapping) -> str:
    gains = [found["gain"] for arms in statistics.values() for found in arms.values() if "gain" in found]
    fewest = min(gains, key=lambda gain: len(gain["seeds"]))
    over_images = _has_image_intervals(statistics)
    if len(fewest["seeds"]) < 2:
        text = "One seed says nothing about chance: give more."
    else:
        text = (
            "The interval is the percentile bootstrap (95 %) of the mean over seeds. It cannot reach beyond the "
            f"smallest and the largest difference: with {len(fewest['seeds'])} seeds it covers the true value in at "
            f"most {100 * fewest['most_coverage']:.0f} % of all comparisons, whatever its name promises."
        )
        if not over_images:
            text += " It does not tell how much another choice of evaluation images would change."
    if over_images:
        text += (
            " The bootstrap over images (95 %) says how much another choice of evaluation images would change, with "
            "the labels and the training of these seeds."
        )
    return text


def _has_image_intervals(statistics: Mapping) -> bool:
    """Whether runs have told which images their detections are right in; older ones have not."""
    gains = (found.get("gain", {}) for arms in statistics.values() for found in arms.values())
    return any(gain.get("image_interval") for gain in gains)


def _steps_table(statistics: Mapping, baseline: str) -> list[Part]:
    rows = []
    for fraction, arms in statistics.items():
        for arm, found in arms.items():
            for name, reached in found["steps_to"].items():
                if reached["AP"] > 0:
                    last = found["curve"]["step"][-1]
                    share = "" if reached["mean_curve"] is None else f"{100 * reached['mean_curve'] / last:.0f} %"
                    what = f"{100 * reached['AP']:.1f}" + (f" ({baseline} at the end)" if name == "baseline" else "")
                    each = ", ".join("never" if step is None else str(step) for step in reached["seeds"])
                    mean = "never" if reached["mean_curve"] is None else str(reached["mean_curve"])
                    rows.append([_percent_of_labels(fraction), what, arm, mean, share, each])
    if not rows:
        return []
    return [
        "The first evaluated step at which the mean over seeds, and each seed by itself, is there.",
        _table(["labels", "AP", "arm", "steps", "of all", "each seed"], rows),
    ]


def _class_table(statistics: Mapping, baseline: str) -> list[Part]:
    rows = []
    for fraction, arms in statistics.items():
        for arm, found in arms.items():
            for name, gain in found.get("gain_per_class", {}).items():
                base = arms[baseline]["per_class"][name]
                if base["mean"] >= 0:
                    rows.append(
                        [_percent_of_labels(fraction), arm, name, f"{100 * base['mean']:.1f}"]
                        + [f"{100 * found['per_class'][name]['mean']:.1f}", _signed(gain["mean"])]
                        + [_interval(gain["interval"]), f"{gain['wins']} of {len(gain['differences'])}"]
                    )
    header = ["labels", "arm", "class", baseline, "arm's AP", "difference", "bootstrap interval", "better in"]
    return [_table(header, rows)] if rows else []


def _protocol(results: Mapping) -> list[Part]:
    rows = []
    for arm, changes in results["arms"].items():
        start = _settings(changes["start"]) or ("the baseline" if arm == results["baseline"] else "as the baseline")
        minutes = [results["seconds"][arm][part] for part in ("before", "measured")]
        rows.append([arm, start, *("–" if part is None else f"{part / 60:.1f}" for part in minutes)])
    parts = [
        "Where the arms start from, in what they differ from the baseline, and the minutes that a run takes: the "
        "stages before fine-tuning (several runs may share one; what a given checkpoint took is not known), "
        "and fine-tuning.",
        _table(["arm", "start", "minutes before fine-tuning", "minutes of fine-tuning"], rows),
    ]
    parts += _costs(results)
    longer = longer_arms(results)
    unequal = [
        [arm, _settings(changes["protocol"])]
        for arm, changes in results["arms"].items()
        if changes["protocol"] and arm not in longer
    ]
    if longer:
        listed = "; ".join(f"{arm}: {_settings(results['arms'][arm]['protocol'])}" for arm in longer)
        parts.append(f"Like {results['baseline']}, but longer on purpose: {listed}.")
    if unequal:
        parts += ["**Not under the same protocol**: these arms also differ in", _table(["arm", "settings"], unequal)]
    seeds = ", ".join(map(str, results["config"]["seeds"]))
    parts += [
        f"Everything else is the same for all arms. Seeds: {seeds}; each draws the labelled images, smaller subsets "
        "inside larger ones (`label_subsets.json`), and is the seed of training. Settings of the fine-tuning:",
        _yaml(results["protocol"]),
    ]
    return parts


def _costs(results: Mapping) -> list[Part]:
    """What a run of each arm cost, all stages that lead to it included."""
    rows = []
    for arm, cost in results.get("costs", {}).items():
        if cost is not None:
            minutes = (cost["seconds_before"] + cost["seconds"]) / 60
            row = [cost["steps_before"], cost["steps"], cost["images"]]
            rows.append([arm, *(f"{value:.0f}" for value in row), f"{minutes:.1f}"])
    if not rows:
        return []
    return [
        "What a run cost in all, shared stages counted in full: steps of pre-training and teachers, steps of "
        "fine-tuning, images seen in training (pre-training sees each in two views; per process), minutes.",
        _table(["arm", "steps before", "steps", "images", "minutes"], rows),
    ]


def _leakage(leakage: Mapping) -> list[Part]:
    sources = "; ".join(_split(source[0], source[1]) for source in leakage["sources"]["training"])
    counts = f"{sum(leakage['training_images'])} training images ({sources})"
    copies = sum(leak["same_file"] for leak in leakage["leaks"])
    alike = len(leakage["leaks"]) - copies
    parts = [
        f"Of {leakage['images']} evaluation images {copies} are, byte for byte, among the {counts} of all stages "
        f"run here, and {alike} more look like one of them (difference hash). {leakage['unreadable']} images could "
        "not be read. What a given checkpoint was trained on was not looked at.",
    ]
    if leakage["leaks"]:
        rows = [
            [Path(leak["image"]).name, Path(leak["seen"]).name, "same file" if leak["same_file"] else leak["distance"]]
            for leak in leakage["leaks"][:20]
        ]
        parts.append(_table(["evaluation image", "training image", "differing bits of 256"], rows))
        if len(leakage["leaks"]) > 20:
            parts.append(f"and {len(leakage['leaks']) - 20} more, in `leakage.json`.")
    return parts


def environment() -> str:
    """The versions and the machine of this process, in a sentence."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{describe_versions()}. {platform.machine()}, {os.cpu_count()} CPU cores, {device}"


def _how(results: Mapping) -> list[Part]:
    minutes = sum(stage["seconds"] for stage in results["stages"]) / 60
    rows = [
        [f"{stage['seconds']:.0f}", f"`aligndet {stage['command']} --config FOLDER/{stage['folder']}.yaml`"]
        for stage in results["stages"]
    ]
    return [
        f"{results['environment']}; {minutes:.0f} minutes in all.",
        "`aligndet compare --config FILE --output_dir FOLDER` with this file runs it again, where what it names is:",
        _yaml(results["config"]),
        "Its stages, with the seconds that each took:",
        _table(["s", "stage"], rows),
    ]


def _section(title: str, *parts: Part) -> Section:
    return Section(title, more=[Section(text=[part]) if isinstance(part, str) else part for part in parts])


def _table(header: Sequence, rows: Sequence[Sequence]) -> Section:
    return Section(tables=[[tuple(row) for row in (header, *rows)]])


def _yaml(content: Mapping) -> Section:
    return Section(code=yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100).strip())


def _markdown(section: Section) -> Iterator[str]:
    """The blocks of a section; what follows the first of several paragraphs is a list."""
    if section.title:
        yield f"## {section.title}"
    yield from section.text[:1]
    if section.text[1:]:
        yield "\n".join(f"- {paragraph}" for paragraph in section.text[1:])
    if section.code:
        yield f"```yaml\n{section.code}\n```"
    for header, *rows in section.tables:
        lines = [list(map(str, header)), ["---"] * len(header)]
        lines += [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        yield "\n".join("| " + " | ".join(line) + " |" for line in lines)
    for title, name in section.pictures:
        yield f"![{title}]({name})"
    for part in section.more:
        yield from _markdown(part)


def _settings(settings: Mapping) -> str:
    return ", ".join(f"{key}: {value}" for key, value in settings.items())


def _split(dataset: str, split: str | None) -> str:
    return f"`{dataset}`" + (f", split {split}" if split else "")


def _percent_of_labels(fraction: str) -> str:
    return f"{100 * float(fraction):g} % of the labels"


def _mean(summary: Mapping) -> str:
    if summary["mean"] < 0:
        return "–"
    spread = "" if summary["std"] is None else f" ± {100 * summary['std']:.1f}"
    return f"{100 * summary['mean']:.1f}{spread} ({len(summary['values'])})"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else " to ".join(f"{100 * bound:+.1f}" for bound in interval)
