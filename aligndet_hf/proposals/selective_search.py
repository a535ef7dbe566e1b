"""
Selective search (Uijlings et al., IJCV 2013) on graph segmentations (Felzenszwalb and Huttenlocher, IJCV 2004).

An image is segmented in several colour spaces at several scales; from each segmentation, similar neighbours are joined
one by one until one region is left. Every region on the way is a proposal. The compiled parts are in `kernels`.

Departures from the papers: a larger scale continues the segmentation of the smaller one, on its regions instead of the
pixels; texture is the gradient of one channel; and the order, which Uijlings et al. draw at random, goes by agreement
and persistence (see [`rank_regions`]).
"""

from dataclasses import dataclass

import numpy as np

from .filters import select_proposals

# Uijlings et al., section 3.2: which of the similarities in colour, texture, size and fill are added up.
_STRATEGIES = {
    "colour+texture+size+fill": (1, 1, 1, 1),
    "texture+size+fill": (0, 1, 1, 1),
    "size+fill": (0, 0, 1, 1),
    "fill": (0, 0, 0, 1),
}


@dataclass(frozen=True)
class Preset:
    """
    Settings of [`selective_search`].

    Args:
        pixels (`int`): Larger images are shrunk to about so many pixels.
        spaces (`tuple[str, ...]`): Colour spaces, of `"lab"`, `"hsv"` and `"rgb"`.
        scales (`tuple[float, ...]`):
            The k of Felzenszwalb and Huttenlocher, ascending, for an image of 200 x 300 pixels and intensities 0..255;
            adapted to other sizes.
        strategies (`tuple[str, ...]`): What similarity is made of: names joined by `+`, see the code.
        min_size (`float`): Smallest region of a segmentation as a share of the image.
    """

    pixels: int
    spaces: tuple[str, ...] = ("lab", "hsv")
    scales: tuple[float, ...] = (50, 100, 200, 400)
    strategies: tuple[str, ...] = ("colour+texture+size+fill", "texture+size+fill")
    min_size: float = 1 / 600


PRESETS = {
    "tiny": Preset(pixels=20_000, scales=(50, 150), strategies=("colour+texture+size+fill",)),
    "default": Preset(pixels=53_000),
    "quality": Preset(pixels=120_000, scales=(30, 60, 120, 240), strategies=tuple(_STRATEGIES), min_size=1 / 1200),
}


def selective_search(
    image: np.ndarray, preset: str | Preset = "default", **selection
) -> tuple[np.ndarray, np.ndarray]:
    """
    Proposes boxes by selective search: the same boxes in the same order on every run, thread count and machine.

    It runs on one thread and releases the GIL; the first call compiles (seconds, kept on disk for later processes).

    Args:
        image (`np.ndarray` of shape `[H, W, 3]`): RGB image, uint8.
        preset (`str` or [`Preset`], *optional*, defaults to `"default"`):
            `"tiny"` (fastest), `"default"` or `"quality"` (better if some hundred boxes are used), or own settings.
        **selection:
            Filters, NMS threshold and number of boxes, see [`select_proposals`].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Boxes float32 `[N, 4]`, absolute `xywh` in pixels of `image`, and scores
        float32 `[N]`, best first; see [`rank_regions`]. An image without structure yields its whole area.

    Raises:
        `ValueError`: If the image or the preset is not as described.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"Unknown preset {preset!r}: expected one of {', '.join(PRESETS)}.")
        preset = PRESETS[preset]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"Expected an RGB image, uint8 of shape [H, W, 3], got {image.dtype} {list(image.shape)}.")
    small = _shrink(image, preset.pixels)
    boxes, scores = rank_regions(_hierarchies(small, preset))

    (height, width), (small_height, small_width) = image.shape[:2], small.shape[:2]
    boxes[:, 2:] -= boxes[:, :2]
    boxes = boxes * (np.array([width, height] * 2) / np.array([small_width, small_height] * 2))
    return select_proposals(boxes, scores, (height, width), **selection)


def rank_regions(hierarchies: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """
    Orders the regions of several hierarchies, and drops those with the same box as a better one.

    Args:
        hierarchies (`list[tuple[np.ndarray, np.ndarray]]`):
            Of each, the boxes int32 `[N, 4]` in whole pixels, `xyxy`, and their persistence `[N]`: how much more alike
            the parts of a region are than the region and the neighbour it is joined with.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Boxes int64 `[M, 4]`, `xyxy`, and scores `[M]`, best first. The whole part of
        a score is the number of hierarchies with a region there (of an IoU of 3/4 and more), the fraction is the rank
        of its persistence within its own hierarchy.
    """
    from .kernels import count_votes

    boxes = np.concatenate([boxes for boxes, _ in hierarchies]).astype(np.int64)
    hierarchy = np.repeat(np.arange(len(hierarchies)), [len(boxes) for boxes, _ in hierarchies])
    rank = np.empty(len(boxes))
    start = 0
    for _, persistence in hierarchies:
        count = len(persistence)
        rank[start + np.argsort(persistence, kind="stable")] = np.arange(count) / count
        start += count

    by_area = np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    boxes, hierarchy, rank = boxes[by_area], hierarchy[by_area], rank[by_area]
    scores = count_votes(boxes, hierarchy, len(hierarchies)) + rank
    best_first = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[best_first], scores[best_first]
    x_end, y_end = boxes[:, 2].max() + 1, boxes[:, 3].max() + 1
    _, first = np.unique(np.ravel_multi_index(boxes.T, (x_end, y_end, x_end, y_end)), return_index=True)
    first.sort()
    return boxes[first], scores[first]


def _shrink(image: np.ndarray, pixels: int) -> np.ndarray:
    """The image with at most about so many pixels, in its own aspect ratio as far as whole pixels allow."""
    from .kernels import resize_area

    height, width = image.shape[:2]
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    # Of a line of pixels, one side cannot shrink.
    new_height, new_width = min(new_height, pixels // new_width + 1), min(new_width, pixels // new_height + 1)
    return resize_area(np.ascontiguousarray(image), new_height, new_width)


def _hierarchies(image: np.ndarray, preset: Preset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes and persistence of the regions of an image, per colour space, scale and strategy; see [`rank_regions`]."""
    from . import kernels

    height, width = image.shape[:2]
    area = height * width
    unit = 16 * area / 60_000  # `smooth` multiplies intensities by 16; F. scale with the size of the regions
    gradients, result = None, []
    for space in preset.spaces:
        colours = _to_space(image, space)
        smoothed = kernels.smooth(colours)
        if gradients is None:
            gradients = kernels.texture(np.ascontiguousarray(smoothed[:, :, 0]))
        weights = kernels.edge_weights(smoothed, True)
        order, starts = kernels.sort_edges(weights)
        labels, internal, neighbours = kernels.segment_pixels(
            order, starts, weights.shape[1], width, area, preset.scales[0] * unit, round(preset.min_size * area)
        )
        described = kernels.describe_regions(labels, len(internal), colours, gradients)
        for number, scale in enumerate(preset.scales):
            regions = (*described, neighbours)
            if number > 0:
                joined = kernels.join_regions(described[0], internal, neighbours, scale * unit)
                regions = kernels.join_descriptions(*joined, *regions)
            for strategy in preset.strategies:
                boxes, _, made, used, _ = kernels.group_regions(*regions, area, np.array(_STRATEGIES[strategy]))
                # Given regions and what is left at the end are on a par with the similarities 1 and 0.
                made = np.where(made < 0, kernels.ONE, made)
                result.append((boxes, made - np.maximum(used, 0)))
    return result


def _to_space(image: np.ndarray, space: str) -> np.ndarray:
    """An RGB image in another colour space, uint8 `[H, W, 3]`."""
    from . import kernels

    if space == "lab":
        return kernels.to_lab(image, *kernels.lab_tables())
    return kernels.to_hsv(image) if space == "hsv" else image
