"""
Selective search (Uijlings et al., IJCV 2013) on graph segmentations (Felzenszwalb and Huttenlocher, IJCV 2004).

An image is segmented in several colour spaces at several scales; from each segmentation, similar neighbours are joined
one by one until one region is left. Every region on the way is a proposal. The compiled parts are in `kernels`.

Departures from the papers, each for time or for the recall of the first boxes on photographs and blood cells:

- The heaviest edge of every triangle of pixels is left out (`prune_edges`), at no cost in recall. A larger scale
  continues the segmentation of the smaller one on its regions, at the cost of some diversity. Together they save most
  of the time.
- Hierarchies built on colour and on texture apart, and at two resolutions, err in different ways, so that their
  agreement says more. Adding up all four similarities was worse for the first boxes.
- Texture is the gradient of one channel.
- The order, which Uijlings et al. draw at random, goes by agreement and persistence, see [`rank_regions`].

What did not help the first 100 boxes on photographs: four instead of eight neighbours, a third colour space, a third
resolution, larger or smaller least regions, votes weighted by persistence, and weights of the score fitted to labels
by logistic regression, also with the shape of a region among its features (which helps on blood cells).
"""

from dataclasses import dataclass

import numpy as np

from .filters import select_proposals

# Uijlings et al., section 3.2: the similarities that a strategy adds up.
_SIMILARITIES = ("colour", "texture", "size", "fill")


@dataclass(frozen=True)
class Preset:
    """
    Settings of [`selective_search`]. There is a hierarchy of regions for every combination of the last four.

    Args:
        pixels (`int`): Larger images are shrunk to about this many pixels.
        shares (`tuple[float, ...]`): Resolutions, as shares of these pixels, descending.
        spaces (`tuple[str, ...]`): Colour spaces, of `"lab"`, `"hsv"` and `"rgb"`.
        scales (`tuple[float, ...]`):
            The k of Felzenszwalb and Huttenlocher, ascending, for an image of 200 x 267 pixels and intensities 0..255;
            adapted to other resolutions.
        strategies (`tuple[str, ...]`):
            What makes two regions similar: some of `"colour"`, `"texture"`, `"size"` and `"fill"`, joined by `+`.
        min_size (`float`): Smallest region of a segmentation as a share of the image.
    """

    pixels: int
    shares: tuple[float, ...] = (1.0, 0.5)
    spaces: tuple[str, ...] = ("lab", "hsv")
    scales: tuple[float, ...] = (100, 200, 400)
    strategies: tuple[str, ...] = ("colour+size+fill", "texture+size+fill")
    min_size: float = 1 / 533

    def __post_init__(self):
        hierarchies = len(self.shares) * len(self.spaces) * len(self.scales) * len(self.strategies)
        if not 1 <= hierarchies <= 63:
            raise ValueError(f"A preset makes 1 to 63 hierarchies of regions, not {hierarchies}.")


PRESETS = {
    "tiny": Preset(pixels=15_000, shares=(1.0,), scales=(200,)),
    "default": Preset(pixels=60_000),
    "quality": Preset(pixels=80_000, scales=(50, 100, 200, 400), min_size=1 / 800),
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
    image = np.asarray(image)
    if not isinstance(preset, Preset):
        if preset not in PRESETS:
            raise ValueError(f"Unknown preset {preset!r}: expected one of {', '.join(PRESETS)}.")
        preset = PRESETS[preset]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"Expected an RGB image, uint8 of shape [H, W, 3], got {image.dtype} {list(image.shape)}.")
    size = image.shape[:2]
    boxes, scores = rank_regions(_hierarchies(image, preset), size)
    boxes[:, 2:] -= boxes[:, :2]
    return select_proposals(boxes, scores, size, **selection)


def rank_regions(
    hierarchies: list[tuple[np.ndarray, np.ndarray]], image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """
    Orders the regions of several hierarchies, and drops those with the same box as a better one.

    A region with a clear boundary appears in many hierarchies, and persists: its parts are much more alike than the
    region and its neighbours. What touches the edge of the image is more often ground than object.

    Args:
        hierarchies (`list[tuple[np.ndarray, np.ndarray]]`):
            Of each, the boxes int64 `[N, 4]` in whole pixels, `xyxy`, and their persistence `[N]`: the similarity at
            which a region was made less that at which it was used up.
        image_size (`tuple[int, int]`): `(height, width)` of the image in the same pixels.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Boxes int64 `[M, 4]`, `xyxy`, and scores float64 `[M]`, best first. A score is
        the share of hierarchies with such a region (IoU at least 3/4), plus 0.12 times the rank 0..1 of its
        persistence in its own hierarchy, less 0.05 for each edge of the image that the box reaches.
    """
    from .kernels import collect_votes

    height, width = image_size
    boxes = np.concatenate([boxes for boxes, _ in hierarchies])
    keys = (boxes[:, :2] @ [height + 1, 1]) * ((height + 1) * (width + 1)) + boxes[:, 2:] @ [height + 1, 1]
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    boxes = boxes[first]
    holders, rank = np.zeros(len(boxes), np.int64), np.zeros(len(boxes))
    hierarchy = np.repeat(np.arange(len(hierarchies)), [len(boxes) for boxes, _ in hierarchies])
    np.bitwise_or.at(holders, index, 1 << hierarchy)
    # Of the persistence in its hierarchy, from 0 to (N - 1) / N; of equal ones, the first has the lowest.
    ranks = [values.argsort(kind="stable").argsort() / len(values) for _, values in hierarchies]
    np.maximum.at(rank, index, np.concatenate(ranks))

    by_area = np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    boxes, holders, rank = boxes[by_area], holders[by_area], rank[by_area]
    margin = np.array([width, height]) // 200
    edges = (boxes[:, :2] <= margin).sum(axis=1) + (boxes[:, 2:] >= [width, height] - margin).sum(axis=1)
    scores = collect_votes(boxes, holders) / len(hierarchies) + 0.12 * rank - 0.05 * edges
    best_first = np.argsort(-scores, kind="stable")
    return boxes[best_first], scores[best_first]


def _shrink(image: np.ndarray, pixels: float) -> np.ndarray:
    """The image with at most about this many pixels, in its own aspect ratio as far as whole pixels allow."""
    from .kernels import resize_area

    height, width = image.shape[:2]
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    # Of a line of pixels, one side cannot shrink.
    new_height, new_width = min(new_height, int(pixels / new_width) + 1), min(new_width, int(pixels / new_height) + 1)
    return resize_area(np.ascontiguousarray(image), new_height, new_width)


def _hierarchies(image: np.ndarray, preset: Preset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes (`xyxy`, whole pixels of `image`) and persistence of all regions, per hierarchy; see [`rank_regions`]."""
    strategies = [
        np.array([int(name in strategy.split("+")) for name in _SIMILARITIES]) for strategy in preset.strategies
    ]
    height, width = image.shape[:2]
    pixels = min(preset.pixels, height * width)
    result = []
    for share in preset.shares:
        image = _shrink(image, share * pixels)
        factor = np.array([width, height] * 2) / np.array([image.shape[1], image.shape[0]] * 2)
        for space in preset.spaces:
            for boxes, persistence in _group(_to_space(image, space), preset, strategies):
                result.append((np.rint(boxes * factor).astype(np.int64), persistence))
    return result


def _group(image: np.ndarray, preset: Preset, strategies: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes and persistence of the regions of one image uint8 `[H, W, 3]`, per scale and strategy."""
    from . import kernels

    area = image.shape[0] * image.shape[1]
    unit = 16 * area / 53_333  # `smooth` multiplies intensities by 16; F. scale with the size of the regions
    planes = kernels.smooth(image)
    edges = kernels.sort_edges(kernels.prune_edges(kernels.edge_weights(planes)))
    sizes, internal = np.ones(area, np.int32), np.zeros(area, np.int32)
    described, result = None, []
    for scale in preset.scales:
        labels, sizes, internal, edges = kernels.join_regions(sizes, internal, edges, scale * unit)
        if described is None:
            described = kernels.describe_regions(labels, len(sizes), image, kernels.texture(planes[0]))
        else:
            described = kernels.join_descriptions(labels, len(sizes), *described)
        labels, number, neighbours = kernels.absorb_small(sizes, edges, round(preset.min_size * area))
        regions = kernels.join_descriptions(labels, number, *described)
        for strategy in strategies:
            boxes, _, made, used, _ = kernels.group_regions(*regions, neighbours, area, strategy)
            # Given regions and what is left at the end are on a par with the similarities 1 and 0.
            result.append((boxes, np.where(made < 0, kernels.ONE, made) - np.maximum(used, 0)))
    return result


def _to_space(image: np.ndarray, space: str) -> np.ndarray:
    """An RGB image in another colour space, uint8 `[H, W, 3]`."""
    from . import kernels

    if space == "lab":
        return kernels.to_lab(image, *kernels.lab_tables())
    return kernels.to_hsv(image) if space == "hsv" else image
