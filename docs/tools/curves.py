"""Draw the learning curves of docs/results.md and of the comparisons in model_cards/ as docs/results.png.

python docs/tools/curves.py
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from aligndet_hf.reporting.plots import plot_bands

ROOT = Path(__file__).parents[2]
# The tables with a row for each draw and start, in the order in which the page has them.
TABLES = [
    "runways, RT-DETR, 1 % of the labels",
    "runways, RT-DETR, 2.4 %",
    "raccoons and kangaroos, RT-DETR, 20 %",
    "blood cells, RT-DETR, 10 %",
]
COMPARISONS = {
    "runways, FCOS, 10 %": ("fcos_fod", "0.1"),
    "runways, FCOS, 2.4 %": ("fcos_fod", "0.024"),
    "runways, Faster R-CNN, 10 %": ("faster_rcnn_fod", "0.1"),
    "runways, Faster R-CNN, 2.4 %": ("faster_rcnn_fod", "0.024"),
    "runways, RetinaNet, 10 %": ("retinanet_fod", "0.1"),
    "runways, RetinaNet, 2.4 %": ("retinanet_fod", "0.024"),
    "blood cells, Deformable DETR, 10 %": ("deformable_detr_bccd", "0.1"),
    "blood cells, RetinaNet, 10 %": ("retinanet_bccd", "0.1"),
    "blood cells, FCOS, 10 %": ("fcos_bccd", "0.1"),
    "blood cells, Faster R-CNN, 10 %": ("faster_rcnn_bccd", "0.1"),
}
TABLE = re.compile(r"^\| draw \| start \| AP after (200 / .*) steps.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


def tables(page: str) -> Iterator[dict[str, dict]]:
    """From each table of a page the plain start and the last of the others, as `plot_bands` takes them."""
    for steps, rows in TABLE.findall(page):
        curves: dict[str, list] = {}
        for row in rows.splitlines():
            _, _, start, curve, *_ = (cell.strip() for cell in row.split("|"))
            curves.setdefault(start, []).append([float(value) / 100 for value in curve.split(" / ")])
        _, *others = curves
        x = [int(step.replace(",", "")) for step in steps.split(" / ")]
        yield {name: band(x, curves[start]) for name, start in (("plain", "plain"), ("pre-trained", others[-1]))}


def band(x: list[int], draws: list[list[float]]) -> dict[str, list]:
    """The mean of the draws and their range, at each step."""
    points = list(zip(*draws, strict=True))
    mean = [sum(point) / len(point) for point in points]
    return {"x": x, "mean": mean, "min": list(map(min, points)), "max": list(map(max, points))}


def comparison(name: str, fraction: str) -> dict[str, dict]:
    """The two arms of a comparison in `model_cards/`, with one share of the labels."""
    results = json.loads((ROOT / "model_cards" / name / "results.json").read_text(encoding="utf-8"))
    curves = {arm: found["curve"] for arm, found in results["statistics"][fraction].items()}
    shown = {"plain": curves["plain"], "pre-trained": curves["aligndet"]}
    return {start: {"x": curve["step"], **curve} for start, curve in shown.items()}


def panels() -> dict[str, dict]:
    """Title of each panel to its two lines."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    drawn = dict(zip(TABLES, tables(page), strict=True))
    return drawn | {title: comparison(*place) for title, place in COMPARISONS.items()}


if __name__ == "__main__":
    title = "COCO average precision after steps of fine-tuning, mean and range of three draws of the labels"
    plot_bands(panels(), ROOT / "docs" / "results.png", "step", title)
