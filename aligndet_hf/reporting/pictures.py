"""Figures of recall, and the look that all figures of this package share.

matplotlib is an extra (`pip install "aligndet-hf[plots]"`) and is imported on first use; the figures never touch
`pyplot`, so they need no display and leave no global state.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Bright enough for boxes on photographs, ordered so that the first few are told apart by colour-blind readers too.
PALETTE = "#e8601c #1f9ede #22a45d #d6338a #f2c40f #7b4fd1 #10b5a8 #8c564b #8fbf26 #5f6b7a".split()
INK = "#22262b"
GRID = "#dfe3e8"


def plot_recall(results: Mapping[str, Mapping], path) -> Path:
    """
    Draws recall and average recall over the number of boxes, and the average recall by size of the object.

    Args:
        results (`Mapping[str, Mapping]`):
            Name of each list of boxes to what [`~aligndet_hf.commands.recall.RecallMeter.compute`] returns for it.
        path (`str` or `Path`): The PNG to write.

    Returns:
        `Path`: `path`.
    """
    first = next(iter(results.values()))
    limits = [int(name.removeprefix("AR@")) for name in first["all"] if name.startswith("AR@")]
    sizes = [name for name, values in first.items() if isinstance(values, Mapping) and values["objects"]]
    shown = 100 if 100 in limits else limits[-1]
    figure = new_figure(12, 3.6)
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    for axes, kind, heading in zip(panels, ("recall", "AR"), ("recall, IoU 0.5", "average recall"), strict=False):
        plain_axes(axes, f"{heading}, %", "first boxes of an image", None)
        for number, (name, values) in enumerate(results.items()):
            heights = [100 * values["all"][f"{kind}@{limit}"] for limit in limits]
            axes.plot(limits, heights, color=PALETTE[number], linewidth=1.8, marker="o", markersize=3.5, label=name)
        axes.set_xscale("log")
        axes.set_xticks(limits, limits, minor=False)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    sizes_label = "size of the object, in pixels or as a part of the image"
    plain_axes(panels[2], f"average recall of the first {shown}, by size of the object, %", sizes_label, None)
    for number, (name, values) in enumerate(results.items()):
        places = np.arange(len(sizes)) + (number - (len(results) - 1) / 2) * 0.8 / len(results)
        heights = [100 * values[size][f"AR@{shown}"] for size in sizes]
        panels[2].bar(places, heights, 0.75 / len(results), color=PALETTE[number], label=name)
    panels[2].grid(axis="x", visible=False)
    panels[2].set_xticks(range(len(sizes)), [f"{size}\n({first[size]['objects']})" for size in sizes], fontsize=7.5)
    legend_below(figure)
    return save_figure(figure, path)


def color_of(label: int | None) -> str:
    """A colour for a class, white for none. Where the palette begins anew, it is darker, three rounds long."""
    if label is None:
        return "#ffffff"
    turn, place = divmod(label, len(PALETTE))
    red, green, blue = (int(PALETTE[place][i : i + 2], 16) * 0.62 ** (turn % 3) for i in (1, 3, 5))
    return f"#{round(red):02x}{round(green):02x}{round(blue):02x}"


def luminance(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float):
    """A figure of its own, without pyplot; the one place that imports matplotlib first."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "aligndet-hf[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure, path, title=None) -> Path:
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def legend_below(figure) -> None:
    """One legend for all panels, below them."""
    lines = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    style = {"ncols": min(len(lines), 6), "frameon": False, "fontsize": 9}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", **style)


def plain_axes(axes, title, xlabel, ylabel) -> None:
    """Titles and a faint grid instead of a frame."""
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(xlabel or "", fontsize=9)
    axes.set_ylabel(ylabel or "", fontsize=9)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa3ad")
