"""A small data set of rendered scenes with exact boxes: for the demo and for tests, without a download."""

import json
from pathlib import Path

import cv2
import datasets
import numpy as np

from .columns import objects_feature

SYNTHETIC_CATEGORIES = ["disk", "square", "triangle", "star", "ring"]

_MAX_OVERLAP = 0.15  # the share of an object that later ones may hide, and that it may hide of another


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Noise in 0..1 [H, W, 1] with about `cells` blobs along a side."""
    noise = rng.random((cells + 1, cells + 1), dtype=np.float32)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)[:, :, None]


def _stripes(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Soft stripes in 0..1 [H, W, 1] of a period in pixels, in a random direction."""
    angle = rng.uniform(0, np.pi)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    phase = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) * np.float32(2 * np.pi / period)
    return (0.5 + 0.5 * np.sin(phase + np.float32(rng.uniform(0, 6.3))))[:, :, None]


def _color(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], dtype=np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two muted colours mixed by noise of two scales and, half the time, faint stripes: float32 [H, W, 3]."""
    first, second = (_color(rng, (0.1, 0.5), (0.25, 0.85)) for _ in range(2))
    mix = 0.7 * _smooth_noise(rng, height, width, 3) + 0.3 * _smooth_noise(rng, height, width, 12)
    if rng.random() < 0.5:
        mix = 0.75 * mix + 0.25 * _stripes(rng, height, width, rng.uniform(12, 40))
    return first + (second - first) * mix


def _outline(category: int, rng: np.random.Generator) -> np.ndarray | None:
    """Corners [N, 2] of a randomly turned polygon of radius 1, or `None` for a round shape."""
    turn = rng.uniform(0, 2 * np.pi)
    name = SYNTHETIC_CATEGORIES[category]
    if name in ("disk", "ring"):
        return None
    corners = {"square": 4, "triangle": 3, "star": 10}[name]
    angles = turn + np.arange(corners) * (2 * np.pi / corners)
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == "star" else np.ones(corners)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _mask(category: int, outline: np.ndarray | None, centre: np.ndarray, radius: float, shape: tuple) -> np.ndarray:
    """Coverage 0..255 [H, W] with smooth edges."""
    mask = np.zeros(shape, dtype=np.uint8)
    shift = 4  # OpenCV's fixed-point coordinates: 1/16 pixel
    point = np.rint(centre * 2**shift).astype(int).tolist()
    if outline is not None:
        corners = np.rint((centre + radius * outline) * 2**shift).astype(np.int32)
        cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, shift)
    else:
        cv2.circle(mask, point, round(radius * 2**shift), 255, -1, cv2.LINE_AA, shift)
        if SYNTHETIC_CATEGORIES[category] == "ring":
            cv2.circle(mask, point, round(0.5 * radius * 2**shift), 0, -1, cv2.LINE_AA, shift)
    return mask


def _fill(category: int, rng: np.random.Generator, height: int, width: int, radius: float) -> np.ndarray:
    """The texture of an object, typical of its category: float32 [H, W, 3]."""
    color = _color(rng, (0.6, 1.0), (0.6, 1.0))
    other = _color(rng, (0.3, 1.0), (0.1, 0.5)) if rng.random() < 0.5 else _color(rng, (0.0, 0.3), (0.85, 1.0))
    name = SYNTHETIC_CATEGORIES[category]
    if name == "square":
        mix = _stripes(rng, height, width, max(4.0, radius / 2)) > 0.5
    elif name == "disk":
        mix = 0.6 * _smooth_noise(rng, height, width, 6)
    elif name == "triangle":
        mix = 0.7 * np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    elif name == "star":
        mix = 0.15 * _smooth_noise(rng, height, width, 20)
    else:
        mix = _stripes(rng, height, width, max(4.0, radius / 2)) * _stripes(rng, height, width, max(4.0, radius / 2))
    return color + (other - color) * np.broadcast_to(mix, (height, width, 1)).astype(np.float32)


def render_scene(
    rng: np.random.Generator, height: int, width: int, max_objects: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Renders one scene.

    Args:
        rng (`np.random.Generator`): Source of all that is random.
        height, width (`int`): Size of the image in pixels, at least 32.
        max_objects (`int`, *optional*, defaults to 8): Most objects; there is at least one.

    Returns:
        `tuple`: the image (uint8 [H, W, 3], RGB), the boxes (float32 [N, 4], xywh in pixels: whole pixels, tight about
        the visible part of each object) and the categories (int64 [N]).
    """
    image = _background(rng, height, width)
    owner = np.full((height, width), -1, dtype=np.int16)  # which object a pixel shows
    areas, categories = [], []
    for _ in range(rng.integers(1, max_objects + 1)):
        category = int(rng.integers(len(SYNTHETIC_CATEGORIES)))
        outline = _outline(category, rng)
        for _ in range(10):  # places to try
            radius = min(height, width) * np.exp(rng.uniform(np.log(0.05), np.log(0.24)))
            centre = rng.uniform(radius + 1, np.array([width, height]) - radius - 2)
            mask = _mask(category, outline, centre, radius, (height, width))
            covered = mask > 127
            area = int(covered.sum())
            hidden = np.bincount(owner[covered] + 1, minlength=len(areas) + 1)[1:]
            visible = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:] - hidden
            uncovered = (visible >= (1 - _MAX_OVERLAP) * np.array(areas)).all()
            if uncovered and hidden.sum() <= _MAX_OVERLAP * area:
                break
        else:
            continue
        owner[covered] = len(areas)
        areas.append(area)
        categories.append(category)
        top, left = np.floor(centre[::-1] - radius - 1).astype(int)
        region = np.s_[max(0, top) : top + 2 * int(radius) + 5, max(0, left) : left + 2 * int(radius) + 5]
        alpha = mask[region][:, :, None] * np.float32(1 / 255)
        fill = _fill(category, rng, *alpha.shape[:2], radius)
        image[region] += (fill - image[region]) * alpha
    image += rng.normal(0, 4, (height, width, 1)).astype(np.float32)  # grain
    boxes = [cv2.boundingRect((owner == number).astype(np.uint8)) for number in range(len(areas))]
    return (
        np.clip(np.rint(image), 0, 255).astype(np.uint8),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(categories, dtype=np.int64),
    )


def make_synthetic_dataset(
    num_images: int, *, seed: int, image_size: tuple[int, int] = (192, 256), max_objects: int = 8
) -> datasets.Dataset:
    """
    Makes a labelled data set of rendered scenes: textured backgrounds, five categories that differ in shape and
    texture, random sizes, rotations and colours, little occlusion.

    Args:
        num_images (`int`): Number of images. Image `i` of a seed is the same whatever their number.
        seed (`int`): Seed of the scenes.
        image_size (`tuple[int, int]`, *optional*, defaults to (192, 256)): Height and width in pixels.
        max_objects (`int`, *optional*, defaults to 8): Most objects per image.

    Returns:
        `datasets.Dataset`: with the columns `image` (JPEG, not decoded), `image_id` and `objects` (`bbox` in absolute
        xywh, `category`, `area`, `id`), as labelled data has.
    """
    features = datasets.Features(
        image=datasets.Image(decode=False),
        image_id=datasets.Value("int64"),
        objects=objects_feature(SYNTHETIC_CATEGORIES),
    )
    rows, next_id = [], 1
    for index in range(num_images):
        image, boxes, categories = render_scene(np.random.default_rng((seed, index)), *image_size, max_objects)
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
        objects = {
            "bbox": boxes.tolist(),
            "category": categories.tolist(),
            "area": boxes[:, 2:].prod(axis=1).tolist(),
            "id": list(range(next_id, next_id + len(boxes))),
        }
        picture = {"bytes": encoded.tobytes(), "path": f"{index:06d}.jpg"}
        rows.append({"image": picture, "image_id": index, "objects": objects})
        next_id += len(boxes)
    return datasets.Dataset.from_list(rows, features=features)


def write_synthetic_folder(path: str | Path, splits: dict[str, int], *, seed: int, **options) -> None:
    """
    Writes synthetic data as an image folder: per split a sub-folder with the images and their `metadata.jsonl`, and
    `labels.json` with the names of the categories.

    Args:
        path (`str` or `Path`): The folder, made if needed.
        splits (`dict[str, int]`): Number of images per split, e.g. `{"train": 200, "validation": 50}`.
        seed (`int`): Seed of the first split; the next splits take the next seeds.
        options: Passed on to [`make_synthetic_dataset`].
    """
    path = Path(path)
    for number, (split, num_images) in enumerate(splits.items()):
        folder = path / split
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for row in make_synthetic_dataset(num_images, seed=seed + number, **options):
                image = row.pop("image")
                (folder / image["path"]).write_bytes(image["bytes"])
                metadata.write(json.dumps({"file_name": image["path"], **row}) + "\n")
    (path / "labels.json").write_text(json.dumps(SYNTHETIC_CATEGORIES), encoding="utf-8")
