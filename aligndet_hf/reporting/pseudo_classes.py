"""What became of pseudo-classes: their sizes, how well they agree with labels, and pictures of them."""

import itertools
from pathlib import Path

import datasets
import numpy as np

from ..data.arrow_boxes import clean_boxes, read_boxes, read_crowds, read_values
from ..data.bit_depth import pixel_window
from ..data.columns import arrow_batches
from ..data.images import decode_image
from ..proposals.clusters import Clustering, cluster_agreement, match_labels
from .drawing import crop_sheet

_CROPS = 12  # pictures of a cluster


def cluster_report(splits: dict[str, datasets.Dataset], clustering: Clustering, seed: int) -> dict:
    """
    What became of the clusters, over all splits.

    Args:
        splits (`dict[str, datasets.Dataset]`):
            With the column `proposals`, which has the field `cluster`, and optionally `objects`.
        clustering ([`Clustering`]): The clustering.
        seed (`int`): Of the shuffling.

    Returns:
        `dict`: `boxes`; `sizes` (smallest, median, largest and number of empty clusters); `explained_variance` and
        `inertia` of the [`Clustering`]; and, where objects overlap proposals, `agreement` with their labels: a
        proposal has the class of the object it overlaps best, with an IoU of at least 0.5, and others are left out.
        It has the number of proposals `matched`, their `matched_share` of all, the `majority_share` of the most
        frequent class among them, and the numbers of [`cluster_agreement`] for the `clusters`, for the same clusters
        `shuffled`, and for as many clusters by the area of the box alone (`by_size`).
    """
    clusters, labels, areas = [], [], []
    for dataset in splits.values():
        labelled = "objects" in dataset.column_names
        for _, table in arrow_batches(dataset, ["proposals", "objects"] if labelled else ["proposals"]):
            boxes, counts = read_boxes(table["proposals"])
            clusters.append(read_values(table["proposals"], "cluster")[0].astype(np.int64))
            areas.append(boxes[:, 2] * boxes[:, 3])
            if labelled:
                objects, object_counts = read_boxes(table["objects"])
                objects[read_crowds(table["objects"])] = 0  # overlaps nothing
                categories = read_values(table["objects"], "category")[0]
                per_row = zip(
                    _split(boxes, counts),
                    _split(objects, object_counts),
                    _split(categories, object_counts),
                    strict=True,
                )
                labels += [match_labels(*row) for row in per_row]
    clusters, areas = np.concatenate(clusters), np.concatenate(areas)
    sizes = np.bincount(clusters, minlength=len(clustering.centers))
    report = {
        "boxes": len(clusters),
        "sizes": {
            "min": int(sizes.min()),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
            "empty": int((sizes == 0).sum()),
        },
        "explained_variance": float(clustering.explained_variance),
        "inertia": float(clustering.inertia),
    }
    if labels and (matched := (labels := np.concatenate(labels)) >= 0).any():
        clusters, labels, areas = clusters[matched], labels[matched], areas[matched]
        by_size = areas.argsort(kind="stable").argsort() * len(sizes) // len(areas)
        report["agreement"] = {
            "matched": len(labels),
            "matched_share": len(labels) / len(matched),
            "majority_share": float(np.bincount(labels).max() / len(labels)),
            "clusters": cluster_agreement(clusters, labels),
            "by_size": cluster_agreement(by_size, labels),
            "shuffled": cluster_agreement(np.random.default_rng(seed).permutation(clusters), labels),
        }
    return report


def _split(values: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """The values of each row, of the values of all rows."""
    return np.split(values, counts.cumsum()[:-1])


def print_cluster_report(report: dict, known: int, output: Path) -> None:
    """
    Prints the report of a data set with clusters.

    Args:
        report (`dict`): What is saved beside the data; its `clusters` are what [`cluster_report`] gives.
        known (`int`): The number of images that had been left out before.
        output (`Path`): Where the data is.
    """
    numbers = report["clusters"]
    sizes = numbers["sizes"]
    print(
        f"{numbers['boxes']} boxes in {report['settings']['clusters']['num_clusters']} clusters of {sizes['min']} to "
        f"{sizes['max']} boxes, median {sizes['median']:g}, {sizes['empty']} empty. PCA keeps "
        f"{numbers['explained_variance']:.1%} of the variance; inertia {numbers['inertia']:.4g}."
    )
    if agreement := numbers.get("agreement"):
        print(
            f"Agreement with the labels of {agreement['matched']} boxes ({agreement['matched_share']:.1%}) that find "
            f"an object (IoU 0.5), {agreement['majority_share']:.1%} of them of one class, in %:\n"
            f"{'':<14}{'purity':>8}{'balanced':>10}{'NMI':>8}{'AMI':>8}"
        )
        for name in ("clusters", "by_size", "shuffled"):
            purity, balanced, nmi, ami = (100 * value for value in agreement[name].values())
            print(f"{name.replace('_', ' '):<14}{purity:>8.1f}{balanced:>10.1f}{nmi:>8.1f}{ami:>8.1f}")
    if skipped := report["skipped"][known:]:
        print(f"Left out, for they cannot be read: {len(skipped)} images, e.g. {skipped[0]['reason']}")
    print(f"Saved to {output}; pre-training takes the clusters for classes.")


def draw_clusters(splits: dict[str, datasets.Dataset], path: Path, num_clusters: int, seed: int) -> Path:
    """
    Draws random boxes of the largest clusters, a row each, of different images as far as there are.

    Args:
        splits (`dict[str, datasets.Dataset]`): With the columns `image` and `proposals`, which has `cluster`.
        path (`Path`): The PNG to write.
        num_clusters (`int`): Rows of the picture, at most.
        seed (`int`): Of the choice of boxes.

    Returns:
        `Path`: `path`.
    """
    places, clusters = [], []  # place: split, row, box
    for split, dataset in enumerate(splits.values()):
        for start, table in arrow_batches(dataset, ["proposals"]):
            values, counts = read_values(table["proposals"], "cluster")
            rows = np.repeat(np.arange(len(counts)), counts)
            box = np.arange(len(values)) - np.repeat(counts.cumsum() - counts, counts)
            places.append(np.stack([np.full(len(values), split), start + rows, box], axis=1).astype(np.int32))
            clusters.append(values)
    places, clusters = np.concatenate(places), np.concatenate(clusters).astype(np.int64)
    sizes = np.bincount(clusters)
    rng = np.random.default_rng(seed)
    tables = [dataset.with_format("arrow") for dataset in splits.values()]
    crops = {}
    for cluster in np.argsort(-sizes, kind="stable")[:num_clusters]:
        members = rng.permutation(places[clusters == cluster])
        _, first = np.unique(members[:, :2], axis=0, return_index=True)
        order = np.argsort(~np.isin(np.arange(len(members)), first), kind="stable")  # one of each image, then others
        found = (_crop(tables[split], int(row), box) for split, row, box in members[order])
        found = itertools.islice((crop for crop in found if crop is not None), _CROPS)
        crops[f"{cluster}: {sizes[cluster]} boxes"] = list(found)
    return crop_sheet(crops, path, f"Proposals of the largest of {len(sizes)} clusters")


def _crop(table: datasets.Dataset, row: int, box: int) -> np.ndarray | None:
    """The pixels of a box; none if it cannot be used."""
    stored = table[row]
    image = decode_image(stored["image"][0].as_py(), pixel_window(table))
    boxes, kept = clean_boxes(read_boxes(stored["proposals"])[0], image.shape[1], image.shape[0])
    if box not in kept:
        return None
    x, y, width, height = boxes[np.flatnonzero(kept == box)[0]]
    left, top = int(x), int(y)
    return image[top : max(top + 1, int(np.ceil(y + height))), left : max(left + 1, int(np.ceil(x + width)))]
