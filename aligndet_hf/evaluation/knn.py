"""What features know without being trained further: the accuracy of nearest neighbours."""

import numpy as np


def knn_accuracy(
    features: np.ndarray, labels: np.ndarray, *, k: int = 10, seed: int = 0, groups: np.ndarray | None = None
) -> dict[str, float]:
    """
    How often the nearest neighbours of a sample vote for its label: cosine similarity, cross-validation in five parts.

    Args:
        features (`np.ndarray` [N, D]): One row per sample; scaled to length 1 here.
        labels (`np.ndarray` [N]): Class of each sample.
        k (`int`, *optional*, defaults to 10): Number of neighbours; those at the same place decide alone.
        seed (`int`, *optional*, defaults to 0): Seed of the division into parts.
        groups (`np.ndarray` [N], *optional*): Samples of one group, such as the objects of one image, are in one part:
            they are never each other's neighbours.

    Returns:
        `dict[str, float]`: `accuracy`; `balanced_accuracy`, the mean over the classes; and `majority`, the accuracy of
        always saying the most frequent class.

    Raises:
        `ValueError`: if there are fewer than ten samples, two classes or five groups.
    """
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = np.asarray(features, dtype=np.float32), np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if not len(features) == len(labels) == len(groups):
        raise ValueError(f"{len(features)} features, {len(labels)} labels and {len(groups)} groups: expected as many")
    classes, counts = np.unique(labels, return_counts=True)
    if len(labels) < 10 or len(classes) < 2 or len(np.unique(groups)) < 5:
        raise ValueError(
            f"{len(labels)} samples of {len(classes)} classes in {len(np.unique(groups))} groups are too few: the "
            "accuracy of neighbours takes at least 10 samples, 2 classes and 5 groups"
        )
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    predicted = np.empty_like(labels)
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(features, labels, groups):
        # Of vectors of length 1, the nearest are the most similar.
        neighbours = KNeighborsClassifier(min(k, len(train)), weights="distance").fit(features[train], labels[train])
        predicted[test] = neighbours.predict(features[test])
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "majority": float(counts.max() / len(labels)),
    }
