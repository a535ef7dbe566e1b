"""Pictures of detections beside the truth, and the look that all figures of this package share.

matplotlib is an extra (`pip install "aligndet-hf[plots]"`) and is imported on first use; the figures never touch
`pyplot`, so they need no display and leave no global state.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Subset

from ..data.collate import collate_labelled
from ..data.views import resize_image
from ..evaluation.detections import EvaluationImages, predict_batches

# Bright enough for boxes on photographs, ordered so that the first few are told apart by colour-blind readers too.
PALETTE = "#e8601c #1f9ede #22a45d #d6338a #f2c40f #7b4fd1 #10b5a8 #8c564b #8fbf26 #5f6b7a".split()
INK = "#22262b"
GRID = "#dfe3e8"


def draw_predictions(detector, images: EvaluationImages, folder: Path, number: int) -> None:
    """Draws what a detector makes of this many images beside the truth: `predictions.png` in `folder`."""
    rows = images.spread(number)
    loader = DataLoader(Subset(images, rows), batch_size=4, collate_fn=collate_labelled)
    batches = predict_batches(detector, loader, images.image_processor)
    found = [prediction for _, predictions in batches for prediction in predictions]
    draw_detections(images, dict(zip(rows, found, strict=True)), folder / "predictions.png")


def draw_detections(
    images: EvaluationImages, predictions: dict[int, dict], path: str | Path, threshold: float = 0.3
) -> None:
    """Draws the predictions of some rows (`dict` from row to prediction) beside the truth."""
    pictures = [images.read_image(row) for row in predictions]
    truth = [images.objects(row, *picture.shape[:2]) for row, picture in zip(predictions, pictures, strict=True)]
    plot_predictions(pictures, truth, list(predictions.values()), images.categories, path, threshold)


def plot_predictions(
    images: Sequence[np.ndarray],
    ground_truth: Sequence[Mapping],
    predictions: Sequence[Mapping] | Mapping[str, Sequence[Mapping]],
    class_names: Sequence[str],
    path,
    threshold: float = 0.3,
    title: str | None = None,
) -> Path:
    """
    Draws one row per image: the ground truth on the left, the predictions of one or several arms to its right.

    A prediction is solid where it agrees with a still free box of its class (IoU >= 0.5) and dashed where it does not.

    Args:
        images (`Sequence[np.ndarray]`): RGB images, uint8 `[height, width, 3]`.
        ground_truth (`Sequence[Mapping]`): Per image `boxes` (`[n, 4]`, absolute pixels, xyxy) and `labels` (`[n]`).
        predictions (`Sequence[Mapping]` or `Mapping[str, Sequence[Mapping]]`):
            Per image `boxes`, `labels` and `scores` in the same form; for several arms a mapping from name to that.
        class_names (`Sequence[str]`): Name of each class index.
        path (`str` or `Path`): The PNG to write.
        threshold (`float`, *optional*, defaults to 0.3): Predictions with a lower score are not drawn.
        title (`str`, *optional*): Title of the figure.

    Returns:
        `Path`: `path`.
    """
    if not isinstance(predictions, Mapping):
        predictions = {"predictions": predictions}
    columns = 1 + len(predictions)
    width = 4.6
    heights = [width * image.shape[0] / image.shape[1] for image in images]
    figure = new_figure(width * columns, sum(heights) + 0.3 * len(images) + 0.5)
    from matplotlib.patches import Patch  # after `_figure`, which says what to install

    grid = figure.subplots(len(images), columns, squeeze=False, height_ratios=heights)
    shown = set()
    for row, (image, truth) in enumerate(zip(images, ground_truth, strict=True)):
        panels = {"ground truth": dict(truth)}
        for name, per_image in predictions.items():
            found = {key: np.asarray(per_image[row][key]) for key in ("boxes", "labels", "scores")}
            kept = found["scores"] >= threshold
            panels[name] = {key: value[kept] for key, value in found.items()}
            panels[name]["right"] = _agreeing(panels[name], truth)
        for axes, (name, panel) in zip(grid[row], panels.items(), strict=True):
            axes.imshow(image, interpolation="lanczos")
            axes.set_axis_off()
            count = len(panel["labels"])
            if "right" in panel:
                name = f"{name}: {int(panel['right'].sum())} of {len(truth['labels'])} found, {count} drawn"
            axes.set_title(name if row == 0 or "right" in panel else "", fontsize=9, loc="left", color=INK)
            _draw_boxes(axes, panel, class_names, image.shape)
            shown.update(int(label) for label in panel["labels"])
    handles = [Patch(color=color_of(label), label=class_names[label]) for label in sorted(shown)]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False, fontsize=9
        )
    note = (
        f"scores from {threshold:g}; solid: finds an object of its class (IoU 0.5), dashed: none, or one found before"
    )
    return save_figure(figure, path, f"{title} ({note})" if title else note, title_size=9)


def plot_proposals(
    images: Sequence[np.ndarray],
    proposals: Sequence[np.ndarray],
    path,
    objects: Sequence[np.ndarray] | None = None,
    columns: int = 4,
) -> Path:
    """
    Draws boxes on images, numbered in their order, over the objects (white) if they are known.

    Args:
        images (`Sequence[np.ndarray]`): RGB images, uint8 `[height, width, 3]`.
        proposals (`Sequence[np.ndarray]`): Per image the boxes `[n, 4]` to draw, absolute `xywh`, best first.
        path (`str` or `Path`): The PNG to write.
        objects (`Sequence[np.ndarray]`, *optional*): Per image the true boxes `[m, 4]`, absolute `xywh`.
        columns (`int`, *optional*, defaults to 4): Images in a row.

    Returns:
        `Path`: `path`.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = 3.4 * float(np.median([image.shape[0] / image.shape[1] for image in images]))
    figure = new_figure(3.4 * columns, height * rows + 0.4)
    from matplotlib.patches import Rectangle  # after `new_figure`, which says what to install

    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, axes in enumerate(grid):
        axes.set_axis_off()
        if number >= len(images):
            continue
        axes.imshow(images[number], interpolation="lanczos")
        for box in objects[number] if objects is not None else ():
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor=INK, linewidth=3.4))
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor="white", linewidth=1.8))
        for rank, box in reversed(list(enumerate(proposals[number]))):
            axes.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor=color_of(rank), linewidth=1.2))
            place = {"x": box[0], "y": box[1], "verticalalignment": "top", "clip_on": True}
            tag = {"facecolor": color_of(rank), "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            axes.text(s=str(rank + 1), fontsize=5.5, color="white", bbox=tag, **place)
        axes.set_xlim(-0.5, images[number].shape[1] - 0.5)
        axes.set_ylim(images[number].shape[0] - 0.5, -0.5)
    known = "; white: the objects" if objects is not None else ""
    return save_figure(figure, path, f"the first {max(map(len, proposals))} boxes, in their order{known}", 9)


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
    plain_axes(panels[2], f"average recall of the first {shown}, by size of the object, %", None, None)
    for number, (name, values) in enumerate(results.items()):
        places = np.arange(len(sizes)) + (number - (len(results) - 1) / 2) * 0.8 / len(results)
        heights = [100 * values[size][f"AR@{shown}"] for size in sizes]
        panels[2].bar(places, heights, 0.75 / len(results), color=PALETTE[number], label=name)
    panels[2].grid(axis="x", visible=False)
    panels[2].set_xticks(range(len(sizes)), [f"{size}\n({first[size]['objects']})" for size in sizes], fontsize=7.5)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(results), frameon=False, fontsize=9)
    return save_figure(figure, path)


def _draw_boxes(axes, panel, class_names, shape):
    """Draws the boxes of one panel, best scores on top, with a tag each (short ones where boxes are many)."""
    from matplotlib.patches import Rectangle

    boxes, labels = np.asarray(panel["boxes"], dtype=float).reshape(-1, 4), np.asarray(panel["labels"])
    scores = panel.get("scores")
    crowded = len(labels) > 12
    for index in range(len(labels)) if scores is None else np.argsort(scores):
        x1, y1, x2, y2 = boxes[index]
        color = color_of(int(labels[index]))
        style = "-" if "right" not in panel or panel["right"][index] else (0, (3, 2))
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.6, linestyle=style)
        )
        words = [] if crowded else [class_names[int(labels[index])]]
        words += [] if scores is None else [f"{scores[index]:.2f}"]
        if words:
            bright = luminance(color) > 0.55
            axes.text(
                np.clip(x1, 0, shape[1]),
                np.clip(y1, 0, shape[0]),
                " ".join(words),
                fontsize=5.5 if crowded else 7,
                color=INK if bright else "white",
                verticalalignment="bottom" if y1 > 0.06 * shape[0] else "top",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                clip_on=True,
            )
    axes.set_xlim(-0.5, shape[1] - 0.5)  # a box beyond the edge must not shrink the image
    axes.set_ylim(shape[0] - 0.5, -0.5)


def _agreeing(found, truth, threshold: float = 0.5) -> np.ndarray:
    """Which predictions take, best score first, a free true box of their class with an IoU of at least `threshold`."""
    import torch
    from torchvision.ops import box_iou

    right = np.zeros(len(found["labels"]), dtype=bool)
    boxes, labels = np.asarray(truth["boxes"], dtype=float).reshape(-1, 4), np.asarray(truth["labels"])
    if not len(labels) or not len(right):
        return right
    iou = box_iou(*(torch.as_tensor(np.asarray(b, dtype=float)) for b in (found["boxes"], boxes))).numpy()
    iou[np.asarray(found["labels"])[:, None] != labels[None]] = 0
    for index in np.argsort(-np.asarray(found["scores"]), kind="stable"):
        best = iou[index].argmax()
        if iou[index, best] >= threshold:
            right[index] = True
            iou[:, best] = 0
    return right


def plot_crops(rows: Mapping[str, Sequence[np.ndarray]], path, title: str | None = None, side: int = 96) -> Path:
    """
    Draws rows of small pictures, each scaled to fit a square.

    Args:
        rows (`Mapping[str, Sequence[np.ndarray]]`): Name of each row and its pictures, uint8 `[height, width, 3]`.
        path (`str` or `Path`): The PNG to write.
        title (`str`, *optional*): Title of the figure.
        side (`int`, *optional*, defaults to 96): Side of a square in pixels.

    Returns:
        `Path`: `path`.
    """
    step = side + 4
    sheet = np.full((step * len(rows), step * max(map(len, rows.values())), 3), 255, dtype=np.uint8)
    for row, pictures in enumerate(rows.values()):
        for column, picture in enumerate(pictures):
            scale = side / max(picture.shape[:2])
            height, width = (max(1, round(length * scale)) for length in picture.shape[:2])
            top, left = row * step + (side - height) // 2, column * step + (side - width) // 2
            sheet[top : top + height, left : left + width] = resize_image(picture, height, width)
    figure = new_figure(sheet.shape[1] / 130 + 1.6, sheet.shape[0] / 130 + 0.4)
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="none")
    axes.set_frame_on(False)
    axes.set_xticks([])
    axes.set_yticks([row * step + side / 2 for row in range(len(rows))], list(rows), fontsize=7, color=INK)
    axes.tick_params(length=0)
    return save_figure(figure, path, title, title_size=9)


def color_of(label: int) -> str:
    return PALETTE[label % len(PALETTE)]


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


def save_figure(figure, path, title=None, title_size=11) -> Path:
    if title:
        figure.suptitle(title, fontsize=title_size, color=INK, x=0.01, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


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
