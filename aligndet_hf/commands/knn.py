"""What features know without being trained further: the accuracy of nearest neighbours, and `aligndet knn`."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ..arguments import (
    DeviceArguments,
    FeatureArguments,
    LabelledArguments,
    MeasureArguments,
    NeighborArguments,
    OptimisationArguments,
    again,
    is_trained,
)
from ..data.arrow_boxes import read_values
from ..data.errors import ImageError
from ..data.formats import load_labelled
from ..evaluation.box_features import BoxFeatures, BoxImages, around_backbone
from ..files import write_json
from ..flags import REQUIRED, flag, takes_arguments, told_of
from ..processes import device_of
from ..runs import measuring_folder


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # a rare class is in fewer parts, no more
        parts = list(StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(features, labels, groups))
    for train, test in parts:
        # Of vectors of length 1, the nearest are the most similar.
        neighbours = KNeighborsClassifier(min(k, len(train)), weights="distance").fit(features[train], labels[train])
        predicted[test] = neighbours.predict(features[test])
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "majority": float(counts.max() / len(labels)),
    }


@dataclass(kw_only=True)
class KnnArguments(MeasureArguments, DeviceArguments, NeighborArguments, FeatureArguments, LabelledArguments):
    """Arguments of [`measure_knn`]: the flags of `aligndet knn` and the keys of its recipes."""

    help_groups = {"backbone": "Features", "seed": "Neighbours"}

    split: str | None = again(LabelledArguments, "split", help="split of the dataset, if there are several")
    backbone: str = flag(
        REQUIRED, "start", "a timm name, or the folder of a backbone, such as SoCo's, whose weights come with it"
    )
    backbone_weights: str | None = flag(None, "start", "its weights, if it does not come with any")
    seed: int = again(
        OptimisationArguments, "seed", help="seed of the choice, of the five parts, and of random weights"
    )
    output_dir: str | None = again(MeasureArguments, "output_dir", help="folder for knn.json")

    def __post_init__(self):
        super().__post_init__()
        if not is_trained(self.backbone, self.backbone_weights):
            raise ValueError(
                f"{self.backbone} has random weights, which are measured beside trained ones anyway: give "
                "backbone_weights (a .safetensors file, or 'timm' to download), or the folder of a backbone"
            )


@takes_arguments
def measure_knn(arguments: KnnArguments) -> dict[str, dict[str, float]]:
    """
    Measures how well the neighbours of labelled objects tell their class, in the features of a backbone.

    Objects of one image are never each other's neighbours. Beside it, the same backbone with random weights.

    Args:
        arguments ([`KnnArguments`]): The configuration.

    Returns:
        `dict`: what [`knn_accuracy`] returns, for the weights (`"trained"`) and for `"random"` ones.

    Raises:
        DataError: there are no labels, they are broken, or an image cannot be read.
        ValueError: for an unknown backbone, weights that do not fit, or too few objects.
    """
    with measuring_folder(arguments.output_dir, "knn", ["knn.json"]) as folder:
        dataset, _, report = load_labelled(arguments.dataset, arguments.split, arguments.image_dir)
        print(report)
        results = {}
        for name in ("trained", "random"):
            detector = around_backbone(arguments.backbone, arguments.backbone_weights, arguments.strides)
            if name == "random":
                torch.manual_seed(arguments.seed)
                detector = type(detector)(detector.config)
            features = BoxFeatures(detector, arguments.strides, device=device_of(arguments.use_cpu))
            found = _object_features(features, dataset, arguments)
            results[name] = knn_accuracy(*found[:2], groups=found[2], k=arguments.num_neighbors, seed=arguments.seed)
            shown = ", ".join(f"{key.replace('_', ' ')} {100 * value:.1f}" for key, value in results[name].items())
            print(f"{name} weights, {len(found[1])} objects: {shown} %")
        if folder is not None:
            write_json(folder / "knn.json", told_of(arguments) | {"results": results})
        return results


def _object_features(features: BoxFeatures, dataset, arguments: KnnArguments):
    """Features [N, D], class [N] and row of the image [N] of the objects, or of `max_objects` of them."""
    images = BoxImages({"": dataset}, [("", row) for row in range(len(dataset))], arguments.short_side, "objects")
    column = dataset.select_columns(["objects"]).with_format("arrow")[:]["objects"]
    labels, counts = read_values(column, "category")
    labels = np.split(labels.astype(np.int64), np.cumsum(counts)[:-1])
    vectors, classes, rows = [], [], []
    for row in tqdm(range(len(images)), desc="features", unit="image", disable=arguments.disable_tqdm):
        item = images[row]
        if "reason" in item:
            raise ImageError(item["reason"])
        if len(item["kept"]):
            vectors.append(features(item["image"], item["boxes"]))
            classes.append(labels[row][item["kept"].numpy()])
            rows.append(np.full(len(item["kept"]), row))
    vectors, classes, rows = np.concatenate(vectors), np.concatenate(classes), np.concatenate(rows)
    if len(classes) > arguments.max_objects:
        chosen = np.random.default_rng(arguments.seed).choice(len(classes), arguments.max_objects, replace=False)
        vectors, classes, rows = vectors[chosen], classes[chosen], rows[chosen]
    return vectors, classes, rows
