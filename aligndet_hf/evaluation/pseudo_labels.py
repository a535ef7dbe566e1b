"""Boxes of a teacher as labels: which to keep, and whether their classes can be true."""

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torchvision.ops import nms

from ..data.collate import normalize_images
from .box_features import BoxFeatures

CONTEXT = 1.3  # sides of a crop, relative to the longer side of its box
_CROP_SIZE = 96  # pixels
_BATCH = 64


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """
    Non-maximum suppression over all classes: two labels of one object teach that it is two.

    Args:
        boxes (`np.ndarray`): float [N, 4], xywh.
        scores (`np.ndarray`): float [N].
        threshold (`float`): IoU with a better box above which a box is left out.

    Returns:
        `np.ndarray`: int64 [M], the boxes that stay, best first.
    """
    corners = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)).float()
    return nms(corners, torch.from_numpy(np.asarray(scores)).float(), threshold).numpy()


@torch.inference_mode()
def crop_features(features: BoxFeatures, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """
    Features of objects from crops around them: the means of the last two feature maps, each scaled to length 1.

    A crop is a square with sides of 1.3 times the longer side of its box, at one size for all: a small object is seen
    as large as a large one, which is what tells classes apart.

    Args:
        features ([`BoxFeatures`]): The frozen backbone, with the strides to use.
        image (`np.ndarray`): RGB uint8 [height, width, 3].
        boxes (`np.ndarray`): float [N, 4], xywh in pixels of the image.

    Returns:
        `np.ndarray`: float32 [N, D].
    """
    vectors = [np.zeros((0, features.size), np.float32)]
    for start in range(0, len(boxes), _BATCH):
        crops = np.stack([_crop(image, box) for box in boxes[start : start + _BATCH]])
        pixel_values = torch.from_numpy(crops).permute(0, 3, 1, 2).to(features.device)
        mask = torch.ones_like(pixel_values[:, 0])
        maps = features.feature_maps(normalize_images(pixel_values, mask, features.mean, features.std))
        pooled = [F.normalize(maps[level].mean((2, 3)), dim=1) for level in features.levels]
        vectors.append(torch.cat(pooled, dim=1).cpu().numpy())
    return np.concatenate(vectors)


def _crop(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The square around a box, what lies outside the image being black."""
    x, y, w, h = (float(value) for value in box)
    scale = _CROP_SIZE / (CONTEXT * max(w, h, 1.0))
    left, top = (centre - _CROP_SIZE / scale / 2 for centre in (x + w / 2, y + h / 2))
    matrix = np.float64([[scale, 0, -left * scale], [0, scale, -top * scale]])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.warpAffine(image, matrix, (_CROP_SIZE, _CROP_SIZE), flags=method)


def check_classes(labelled: np.ndarray, classes: np.ndarray, unlabelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Classes of unlabelled objects by labelled ones: of the nearest one, and by label spreading (Zhou et al. 2003).

    Args:
        labelled (`np.ndarray`): float [L, D], features of the labelled objects.
        classes (`np.ndarray`): int [L], their classes.
        unlabelled (`np.ndarray`): float [N, D], features of the others.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 [N], the class of the nearest labelled object, and bool [N], whether
        label spreading finds the same: such a class is kept, in place of the teacher's.

    Raises:
        `ValueError`: there is no labelled object.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.semi_supervised import LabelSpreading

    if not len(labelled):
        raise ValueError("there is no labelled object to compare boxes with: give labels, or --class_check none")
    classes = np.asarray(classes, dtype=np.int64)
    if not len(unlabelled) or len(np.unique(classes)) == 1:
        return np.full(len(unlabelled), classes[0]), np.ones(len(unlabelled), dtype=bool)
    vectors = np.concatenate([labelled, unlabelled])
    vectors = vectors - vectors.mean(axis=0)  # what all objects have in common says nothing
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    known = vectors[: len(labelled)], classes
    nearest = KNeighborsClassifier(1).fit(*known).predict(vectors[len(labelled) :])
    targets = np.concatenate([classes, np.full(len(unlabelled), -1)])
    # What a round changes shrinks by alpha: it ends by itself, before 2,000 rounds.
    spreading = LabelSpreading("knn", n_neighbors=min(20, len(vectors) - 1), alpha=0.99, max_iter=10_000)
    spread = spreading.fit(vectors, targets).transduction_[len(labelled) :]
    return nearest.astype(np.int64), nearest == spread
