"""Figures of a run: loss curves, curves of precision and recall, and average precision of several arms.

Every function writes one PNG and returns its path. matplotlib is an extra (`pip install "aligndet-hf[plots]"`) and is
imported on first use; the figures never touch `pyplot`, so they need no display and leave no global state.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..evaluation.coco_metrics import exists
from ..evaluation.diagnosis import RECALLS
from .pictures import INK, PALETTE, legend_below, new_figure, plain_axes, save_figure

__all__ = ["plot_arms", "plot_bands", "plot_curves", "plot_precision", "read_history", "smooth"]


def read_history(source) -> list[dict]:
    """
    Reads what a run logged.

    Args:
        source (`str`, `Path` or `list[dict]`):
            A `trainer_state.json` (its `log_history`), a `.jsonl` file with one dict per line, a folder that holds
            either, or the list itself.

    Returns:
        `list[dict]`: The records, each with a `step`.

    Raises:
        FileNotFoundError: The folder holds no log.
    """
    if not isinstance(source, str | Path):
        return list(source)
    path = Path(source)
    if path.is_dir():
        found = [path / "trainer_state.json", *sorted(path.glob("*.jsonl"))]
        found = [candidate for candidate in found if candidate.is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither trainer_state.json nor a .jsonl log.")
        path = found[0]
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return json.loads(text)["log_history"]
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the half-written last line of a run that was killed
            continue
    return records


def smooth(values: Sequence[float], radius: int) -> np.ndarray:
    """Mean of each value with its `radius` neighbours on either side: unlike an exponential average, without lag."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - radius, 0), np.minimum(places + radius + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _points(history: Sequence[Mapping], key: str) -> list[tuple[int, float]]:
    """Steps and values, the first of each step: the last one is measured again, with the weights that are kept."""
    points = {}
    for record in history:
        if key in record and "step" in record:
            points.setdefault(record["step"], record[key])
    return list(points.items())


def plot_curves(runs: Mapping[str, object], path, keys: Sequence[str] = ("loss",), title: str | None = None) -> Path:
    """
    Draws logged values over the steps: one panel per key, one line per run, raw values faint behind the smoothed ones
    (the moving average of a twentieth of the series). Fewer than 20 values, as of evaluations, are not smoothed.

    Args:
        runs (`Mapping[str, Any]`): Name of each run to its log, see [`read_history`].
        path (`str` or `Path`): The PNG to write.
        keys (`Sequence[str]`, *optional*, defaults to `("loss",)`):
            What to draw, such as `loss`, `loss_contrastive` or `eval_AP`. A run may lack a key.
        title (`str`, *optional*): Title over the panels.

    Returns:
        `Path`: `path`.

    Raises:
        ValueError: No run has any of `keys`.
    """
    histories = {name: read_history(source) for name, source in runs.items()}
    series = {key: {name: _points(history, key) for name, history in histories.items()} for key in keys}
    series = {key: {name: s for name, s in lines.items() if s} for key, lines in series.items()}
    series = {key: lines for key, lines in series.items() if lines}
    if not series:
        logged = sorted({key for history in histories.values() for record in history for key in record})
        raise ValueError(f"None of {list(keys)} was logged; there is {logged}.")

    columns = min(len(series), 3)
    rows = math.ceil(len(series) / columns)
    figure = new_figure(5.2 * columns, 3.4 * rows + 0.3)
    for place, (key, lines) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        plain_axes(axes, key, "step", None)
        for name, points in lines.items():
            color = PALETTE[list(runs).index(name) % len(PALETTE)]
            steps, values = np.array(points, dtype=float).T
            if len(values) < 20:
                axes.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.5, label=name)
            else:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(steps, smooth(values, round(len(values) / 40)), color=color, linewidth=1.8, label=name)
        if len(runs) > 1:
            axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path, title)


def plot_bands(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    path,
    x_label: str,
    title: str | None = None,
    log_x: bool = False,
) -> Path:
    """
    Draws average precision as lines in bands, such as learning curves with their spread over seeds.

    Args:
        panels (`Mapping`): Heading of each panel to its lines: name of the arm to `x`, `mean`, `min` and `max`, lists
            of the same length; average precision from 0 to 1.
        path (`str` or `Path`): The PNG to write.
        x_label (`str`): What `x` is.
        title (`str`, *optional*): Title over the panels.
        log_x (`bool`, *optional*, defaults to `False`): Draw `x` on a logarithmic axis, with a tick at each value.

    Returns:
        `Path`: `path`.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(5.2 * columns, 3.4 * rows + 0.6)
    for place, (heading, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        plain_axes(axes, heading, x_label, "average precision, %" if place % columns == 1 % columns else None)
        for name, line in lines.items():
            color = PALETTE[names.index(name) % len(PALETTE)]
            low, mean, high = (100 * np.asarray(line[key], dtype=float) for key in ("min", "mean", "max"))
            axes.fill_between(line["x"], low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(line["x"], mean, color=color, linewidth=1.8, marker="o", markersize=3.5, label=name)
        if log_x:
            ticks = sorted({x for line in lines.values() for x in line["x"]})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    legend_below(figure)
    return save_figure(figure, path, title)


def plot_precision(per_class: Mapping[str, Mapping], path) -> Path:
    """
    Draws the precision over the recall of the nine classes with the most objects, and of all classes in the mean.

    Args:
        per_class (`Mapping[str, Mapping]`): What [`~aligndet_hf.evaluation.diagnosis.Diagnosis`] says of each class.
        path (`str` or `Path`): The file to write.

    Returns:
        `Path`: `path`.
    """
    known = {name: found["curve"] for name, found in per_class.items() if found["objects"]}
    shown = sorted(known, key=lambda name: -per_class[name]["objects"])[:9]
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    plain_axes(axes, "precision, %, at an IoU of 0.5", "recall, %", None)
    for number, name in enumerate(shown):
        axes.plot(100 * RECALLS, 100 * np.array(known[name]), color=PALETTE[number], linewidth=1.6, label=name)
    if len(known) > 1:
        mean = np.mean(list(known.values()), axis=0)
        label = f"mean of {len(known)} classes"
        axes.plot(100 * RECALLS, 100 * mean, color=INK, linewidth=2.4, linestyle=(0, (4, 2)), label=label)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 102)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_arms(arms: Mapping[str, Mapping], path, title: str | None = None) -> Path:
    """
    Draws the COCO average precision of several arms side by side, for all objects and per class.

    Args:
        arms (`Mapping[str, Mapping]`): Name of each arm to its results as `CocoMetrics.compute()` gives them (0 to 1).
        path (`str` or `Path`): The PNG to write.
        title (`str`, *optional*): Title of the figure.

    Returns:
        `Path`: `path`.
    """
    overall = [
        key for key in ("AP", "AP50", "AP75", "APs", "APm", "APl") if any(exists(a[key]) for a in arms.values())
    ]
    classes = list(dict.fromkeys(name for results in arms.values() for name in results.get("per_class", {})))
    panels = [("All classes", overall, lambda results, key: results[key])]
    if 1 < len(classes) <= 30:  # more bars than that cannot be read
        panels.append(("AP per class", classes, lambda results, name: results["per_class"].get(name, -1)))

    widths = [max(len(labels) * (0.35 + 0.42 * len(arms)), 2.5) for _, labels, _ in panels]
    figure = new_figure(sum(widths) + 1.2, 3.8)
    for axes, (heading, labels, value) in zip(
        figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0], panels, strict=True
    ):
        plain_axes(axes, heading, None, None)
        axes.grid(axis="x", visible=False)
        bar = 0.8 / len(arms)
        for position, (name, results) in enumerate(arms.items()):
            heights = [value(results, label) for label in labels]
            written = [f"{100 * h:.1f}" if exists(h) else "none" for h in heights]
            heights = [100 * h if exists(h) else 0 for h in heights]
            places = np.arange(len(labels)) + (position - (len(arms) - 1) / 2) * bar
            bars = axes.bar(places, heights, bar * 0.94, color=PALETTE[position % len(PALETTE)], label=name)
            axes.bar_label(bars, written, fontsize=7.5, padding=1.5, color=INK)
        rotated = {"rotation": 30, "ha": "right"} if max(map(len, labels)) > 10 else {}
        axes.set_xticks(range(len(labels)), labels, fontsize=9, **rotated)
        axes.margins(y=0.12)
    figure.axes[0].set_ylabel("average precision, %", fontsize=9)
    legend_below(figure)
    return save_figure(figure, path, title)
