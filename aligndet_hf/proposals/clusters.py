"""Pseudo-classes: features of boxes -> PCA -> k-means, and how well the clusters agree with labels.

AlignDet (Li et al., ICCV 2023) takes 256 such clusters as classes; its clustering was not released, this one is ours.
"""

from dataclasses import dataclass

import numpy as np

from .filters import box_iou

# Rows of features that are in memory at a time.
_CHUNK = 4096
_MOST_CLUSTERS = 256


@dataclass(frozen=True)
class Clustering:
    """
    A PCA and the centres of k-means behind it.

    Attributes:
        mean (`np.ndarray` [D]), components (`np.ndarray` [P, D]): The PCA, float32.
        centers (`np.ndarray` [K, P]): The centres, float32.
        explained_variance (`float`): Share of the variance that the P components keep, 0 to 1.
        inertia (`float`): Mean squared distance of the fitted features to their centres, after the PCA.
    """

    mean: np.ndarray
    components: np.ndarray
    centers: np.ndarray
    explained_variance: float
    inertia: float

    def project(self, features: np.ndarray) -> np.ndarray:
        """Features [N, D] -> float32 [N, P]."""
        return _project(features, self.mean, self.components)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """The nearest centre of each row: features [N, D] -> int32 [N]; of equally near ones the first."""
        # |x - c|^2 without |x|^2, which is the same for all centres.
        distances = (self.centers**2).sum(axis=1) - 2 * self.project(features) @ self.centers.T
        return distances.argmin(axis=1).astype(np.int32)


def choose_num_clusters(num_boxes: int) -> int:
    """
    A number of clusters for a number of boxes: the square root of half of it (Mardia et al., Multivariate Analysis,
    1979, section 13.2), and at most the 256 of AlignDet.
    """
    return max(1, min(_MOST_CLUSTERS, round((num_boxes / 2) ** 0.5)))


def fit_clusters(features: np.ndarray, num_clusters: int, num_components: int, seed: int) -> Clustering:
    """
    Fits PCA and k-means.

    The features are read in chunks and may be mapped from a file: what is held at a time is a chunk, their covariance
    [D, D] and their projections [N, P]. The PCA is exact; of scikit-learn's, the incremental one is approximate and
    much slower, and the exact ones hold all features.

    Args:
        features (`np.ndarray` [N, D]): Of any floating type.
        num_clusters (`int`): K.
        num_components (`int`): P, at most; never more than N or D.
        seed (`int`): Of k-means. The same input and seed give the same result.

    Returns:
        [`Clustering`]

    Raises:
        `ValueError`: if there are fewer features than clusters.
    """
    if len(features) < num_clusters:
        raise ValueError(f"{num_clusters} clusters need at least as many boxes, there are {len(features)}")
    from sklearn.cluster import MiniBatchKMeans

    mean, components, explained_variance = _principal_components(features, min(num_components, *features.shape))
    chunks = (features[start : start + _CHUNK] for start in range(0, len(features), _CHUNK))
    projections = np.concatenate([_project(chunk, mean, components) for chunk in chunks])
    # Not `KMeans`: its sums depend on which thread is done first.
    kmeans = MiniBatchKMeans(num_clusters, random_state=seed, batch_size=4096, n_init=3).fit(projections)
    return Clustering(
        mean=mean,
        components=components,
        centers=kmeans.cluster_centers_.astype(np.float32),
        explained_variance=explained_variance,
        inertia=float(kmeans.inertia_) / len(features),
    )


def _project(features: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    return (np.asarray(features, dtype=np.float32) - mean) @ components.T


def _principal_components(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The mean [D] and the first principal components [count, D], float32, and the share of variance they keep."""
    total, products = 0.0, 0.0
    for start in range(0, len(features), _CHUNK):
        chunk = np.asarray(features[start : start + _CHUNK], dtype=np.float64)
        total = total + chunk.sum(axis=0)
        products = products + chunk.T @ chunk
    mean = total / len(features)
    variances, vectors = np.linalg.eigh(products / len(features) - np.outer(mean, mean))
    variances = variances[::-1].clip(min=0)
    components = vectors.T[::-1][:count]
    kept = variances[:count].sum() / variances.sum() if variances.sum() > 0 else 1.0
    return mean.astype(np.float32), components.astype(np.float32), float(kept)


# ---- how good are they ----


def match_labels(boxes: np.ndarray, objects: np.ndarray, labels: np.ndarray, min_iou: float = 0.5) -> np.ndarray:
    """
    Gives each box the label of the object that it overlaps best.

    Args:
        boxes (`np.ndarray` [N, 4]): Absolute xywh.
        objects (`np.ndarray` [M, 4]): Boxes of the labelled objects of the same image, absolute xywh.
        labels (`np.ndarray` [M]): Their classes.
        min_iou (`float`, *optional*, defaults to 0.5): Least overlap.

    Returns:
        `np.ndarray` int64 [N]: the label, or -1 for a box that overlaps no object well enough.
    """
    if len(boxes) == 0 or len(objects) == 0:
        return np.full(len(boxes), -1, dtype=np.int64)
    iou = box_iou(np.asarray(objects, dtype=np.float64), boxes)
    return np.where(iou.max(axis=0) >= min_iou, np.asarray(labels)[iou.argmax(axis=0)], -1).astype(np.int64)


def cluster_agreement(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    How well clusters agree with labels. More clusters raise all numbers but the last: compare with shuffled clusters.

    Args:
        clusters (`np.ndarray` [N]): Cluster of each box.
        labels (`np.ndarray` [N]): Class of each box.

    Returns:
        `dict[str, float]`: from 0 to 1, `purity` (share of boxes whose class is the most frequent one of their
        cluster), `balanced_purity` (the same where every class counts as if it had equally many boxes), `nmi`
        (normalised mutual information, arithmetic mean), and `ami` (the same adjusted for chance, Vinh et al. 2010:
        0 for random clusters of these sizes).
    """
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels, clusters)
    balanced = table / table.sum(axis=1, keepdims=True)
    return {
        "purity": float(table.max(axis=0).sum() / table.sum()),
        "balanced_purity": float(balanced.max(axis=0).sum() / balanced.sum()),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
    }
