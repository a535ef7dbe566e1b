"""Boxes that have not seen the image: what any proposal method must beat."""

import numpy as np

# Sizes relative to the image, `sqrt(w * h / (W * H))`: from what the default filters let pass to the whole image.
_MIN_RELATIVE_SIZE = 0.04
_MAX_ASPECT_RATIO = 3.0

_GRID_SIZES = (0.8, 0.57, 0.4, 0.28, 0.2, 0.14, 0.1)
_GRID_RATIOS = (1.0, 0.5, 2.0)


def random_boxes(image_size: tuple[int, int], num_boxes: int, seed: int) -> np.ndarray:
    """
    Draws boxes at random: log-uniform in size and aspect ratio, uniform in place.

    Args:
        image_size (`tuple[int, int]`): `(height, width)` of the image in pixels.
        num_boxes (`int`): How many.
        seed (`int`): Seed; a longer list of one seed begins with the shorter one.

    Returns:
        `np.ndarray` of shape `[num_boxes, 4]`: Boxes inside the image, absolute `xywh` in pixels, float32. Sizes
        relative to the image are 0.04 to 1, aspect ratios 1/3 to 3 unless a side would leave the image.
    """
    height, width = image_size
    draws = np.random.default_rng(seed).random((num_boxes, 4))
    side = _MIN_RELATIVE_SIZE ** draws[:, 0] * np.sqrt(height * width)
    stretch = np.sqrt(_MAX_ASPECT_RATIO) ** (2 * draws[:, 1] - 1)
    size = np.minimum(np.stack([side * stretch, side / stretch], axis=1), [width, height])
    return np.concatenate([draws[:, 2:] * (np.array([width, height]) - size), size], axis=1).astype(np.float32)


def grid_boxes(image_size: tuple[int, int], num_boxes: int | None = None) -> np.ndarray:
    """
    Lays boxes of 7 sizes and 3 aspect ratios over the image, each on a grid of about half its sides, large ones first.

    Args:
        image_size (`tuple[int, int]`): `(height, width)` of the image in pixels.
        num_boxes (`int`, *optional*): At most this many, the first; all by default.

    Returns:
        `np.ndarray` of shape `[N, 4]`: Boxes inside the image, absolute `xywh` in pixels, float32.
    """
    image = np.array(image_size[::-1], dtype=np.float64)
    grids = []
    for relative_size in _GRID_SIZES:
        for ratio in _GRID_RATIOS:
            size = np.minimum(relative_size * np.sqrt(image.prod() * np.array([ratio, 1 / ratio])), image)
            columns, rows = np.ceil(2 * (image / size - 1)).astype(int) + 1
            x, y = np.meshgrid(np.linspace(0, image[0] - size[0], columns), np.linspace(0, image[1] - size[1], rows))
            grids.append(np.stack([x.ravel(), y.ravel(), *np.broadcast_to(size[:, None], (2, x.size))], axis=1))
    return np.concatenate(grids)[:num_boxes].astype(np.float32)
