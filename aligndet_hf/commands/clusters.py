"""`aligndet clusters`: sorts the proposals of a dataset into pseudo-classes and stores them as the field `cluster`."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import __version__
from ..arguments import (
    DatasetArguments,
    FeatureArguments,
    LoadingArguments,
    OptimisationArguments,
    ReadyDetectorArguments,
    RunArguments,
    again,
)
from ..data.bit_depth import pixel_window
from ..data.columns import (
    arrow_batches,
    clean_boxes,
    read_boxes,
    read_crowds,
    read_values,
    validate_proposals,
)
from ..data.dataset import init_worker
from ..data.dataset_card import push_dataset
from ..data.errors import DataError, ImageError
from ..data.formats import load_dataset_source, split_names
from ..data.images import decode_image
from ..data.shards import (
    Shard,
    content_hash,
    data_folder,
    join_proposals,
    make_shards,
    put_in_place,
    read_report,
    settings_hash,
    telling_progress,
    write_shard,
    writing_to,
)
from ..detectors.backbones import check_backbone
from ..detectors.build import build_detector, open_detector
from ..evaluation.box_features import BoxFeatures, BoxImages
from ..files import sync
from ..flags import names_of, takes_old_names
from ..hub import HubDatasetArguments
from ..objects import name_objects
from ..processes import device_of
from ..proposals.clusters import Clustering, cluster_agreement, fit_clusters, match_labels
from ..ranges import COUNT, check_values
from ..reporting.pictures import new_figure, plot_crops
from ..runs import RunFolder
from .proposals import open_dataset_repository

PICTURE = "clusters.png"
_SHARD_SIZE = 64  # images between two saves
_CROPS = 12  # pictures of a cluster


@takes_old_names
@dataclass(kw_only=True)
class ClustersArguments(HubDatasetArguments, RunArguments, LoadingArguments, FeatureArguments, DatasetArguments):
    """Arguments of [`cluster_proposals`]: the flags of `aligndet clusters` and the keys of its recipes."""

    help_groups = {"backbone": "Features", "num_clusters": "Clusters", "num_pictures": "Output"}

    output_dir: str = again(RunArguments, "output_dir", help="folder for the dataset with the clusters; must be new")
    split: str | None = again(
        DatasetArguments, "split", help="split of the dataset; all of them, with the same clusters, if not given"
    )

    backbone: str = field(
        default="resnet50",
        metadata={"role": "start", "help": "timm name of the frozen backbone; best the one to pre-train with"},
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "role": "start",
            "help": "a .safetensors file with timm's names, or 'timm' to download timm's own weights",
        },
    )
    detector: str | None = again(
        ReadyDetectorArguments,
        "detector",
        default=None,
        help="folder, published file or Hub id of a detector whose backbone to take, instead of these two",
    )
    normalize: bool = field(
        default=True,
        metadata={
            "role": "result",
            "help": "scale the features of a box to length 1, those of each stride by themselves",
        },
    )

    num_clusters: int = field(
        default=256, metadata={"role": "result", "help": "pseudo-classes; AlignDet has 256", "range": COUNT}
    )
    pca_dim: int = field(
        default=128, metadata={"role": "result", "help": "numbers per box that PCA leaves for k-means", "range": COUNT}
    )
    fit_boxes: int = field(
        default=50_000,
        metadata={
            "role": "result",
            "help": "boxes that PCA and k-means are fitted to, of random images; all get a cluster",
            "range": COUNT,
        },
    )
    fit_boxes_per_image: int = field(
        default=50,
        metadata={
            "role": "result",
            "help": "take at most this many boxes of each of these images, the best first",
            "range": COUNT,
        },
    )
    seed: int = again(OptimisationArguments, "seed", help="seed of the choice of images and of k-means")

    num_pictures: int = field(
        default=0,
        metadata={
            "role": "output",
            "help": f"draw boxes of this many clusters, the largest first: {PICTURE} in output_dir",
        },
    )

    def __post_init__(self):
        name_objects(self)
        check_values(self)
        if self.fit_boxes < self.num_clusters:
            raise ValueError(
                f"{self.num_clusters} clusters cannot be fitted to {self.fit_boxes} boxes: raise fit_boxes"
            )
        if (self.detector is None) == (self.backbone_weights is None):
            raise ValueError(
                "give either backbone_weights (a .safetensors file, or 'timm' to download) or a detector to take the "
                "backbone of: features of a random backbone say little"
            )


def cluster_proposals(arguments: ClustersArguments) -> datasets.Dataset | datasets.DatasetDict:
    """
    Sorts the proposals of a dataset into clusters and saves the dataset with them.

    RoIAlign features of a frozen backbone, PCA, k-means. The backbone sees the images twice: some, as many as
    `fit_boxes` takes, to fit PCA and k-means (their features wait in a file, in half precision), and then all. Memory
    does not grow with the dataset, but for some bytes a box.

    The output is the input with the field `cluster` (int32, 0 to `num_clusters` - 1) in its `proposals`; a box that
    cannot be used (see [`~aligndet_hf.data.columns.find_faults`]) is in cluster 0, and pre-training drops it. Beside
    the data, `proposals.json` has all that the input's had, the settings and versions of the clusters, and the report
    of [`cluster_report`]. Images that cannot be read are left out and listed there.

    A run that was interrupted, in whatever way, continues with the same command. Where the output is complete and
    neither data, backbone nor settings have changed, nothing is done. The same input gives the same clusters.

    Args:
        arguments ([`ClustersArguments`]): The configuration.

    Returns:
        `datasets.Dataset`, or `datasets.DatasetDict` if the input has several splits and none was chosen.

    Raises:
        DataError: the input is missing, broken or has fewer boxes than clusters.
        Interrupted: SIGTERM or SIGINT; what is finished is kept.
        ValueError: the backbone has no feature maps of these strides, the weights do not fit, or `output_dir` is in
            use or holds something else.
        OSError: there is no such file of weights or detector.
    """
    output = Path(arguments.output_dir).expanduser().absolute()
    if Path(arguments.dataset).expanduser().resolve() == output.resolve():
        raise DataError(f"{output} holds the input. Choose another output_dir.")
    if arguments.num_pictures:
        new_figure(1, 1)  # says now, not after the clustering, that matplotlib is missing
    with data_folder(arguments, "clusters", ["clustering-*.npz"]) as folder:
        repo_id = open_dataset_repository(arguments, output)
        sources = _load_sources(arguments)
        features = load_features(arguments)
        report = _new_report(arguments, sources, features)
        folder.claim(settings=report["settings"])
        if folder.is_finished:
            print(f"{output} is complete: these proposals have been clustered with these settings. Nothing to do.")
        else:
            known = len(report["skipped"])
            with writing_to(output):
                _cluster(sources, features, report, folder, arguments)
            _print_report(report, known, output)
        result = datasets.load_from_disk(str(output))
        if arguments.num_pictures:
            splits = result if isinstance(result, datasets.DatasetDict) else {"": result}
            print(f"Pictures in {draw_clusters(splits, output / PICTURE, arguments.num_pictures, arguments.seed)}")
        if repo_id is not None:
            push_dataset(result, read_report(output), repo_id, arguments)
    return result


def _new_report(arguments: ClustersArguments, sources: dict[str, datasets.Dataset], features: BoxFeatures) -> dict:
    """The report of the input with the settings of the clusters: all that decides which clusters come out."""
    own = {
        "backbone": arguments.detector or arguments.backbone,
        "backbone_weights": features.weights_hash(),
        **{name: getattr(arguments, name) for name in names_of(ClustersArguments, "result")},
        **{f"input_{name}": content_hash(source, arguments.disable_tqdm) for name, source in sources.items()},
    }
    before = read_report(Path(arguments.dataset).expanduser())
    return {
        "dataset": before.get("dataset", arguments.dataset),
        "settings": before.get("settings", {}) | {"clusters": own},
        "versions": before.get("versions", {}) | {"clusters": _versions()},
        "statistics": {},
        "skipped": list(before.get("skipped", [])),
    }


def load_features(arguments: ClustersArguments) -> BoxFeatures:
    """The features of boxes that the arguments ask for."""
    if arguments.detector is not None:
        detector = open_detector(arguments.detector)
        check_backbone(detector)
    else:
        detector = build_detector(  # for its backbone only, so any family will do
            "detr",
            backbone=arguments.backbone,
            backbone_weights=arguments.backbone_weights,
            strides=tuple(sorted(arguments.strides)),
        )
    device = device_of(arguments.use_cpu)
    return BoxFeatures(detector, arguments.strides, arguments.normalize, device)


def _versions() -> dict:
    packages = ("torch", "torchvision", "timm", "scikit-learn", "numpy", "datasets")
    return {"aligndet_hf": __version__} | {name: version(name) for name in packages}


def _load_sources(arguments: ClustersArguments) -> dict[str, datasets.Dataset]:
    names = split_names(arguments.dataset) if arguments.split is None else [arguments.split]
    sources = {}
    for name in names:
        sources[name] = load_dataset_source(arguments.dataset, name)
        with contextlib.suppress(ImageError):  # will be left out, and listed
            print(validate_proposals(sources[name], f"{arguments.dataset}, {name}"))
    return sources


def _cluster(
    sources: dict[str, datasets.Dataset],
    features: BoxFeatures,
    report: dict,
    folder: RunFolder,
    arguments: ClustersArguments,
) -> None:
    """Does the work of [`cluster_proposals`] in a folder beside the output, and puts it in place."""
    work, state = folder.work, report["settings"] | {"versions": report["versions"]}
    folder.claim(shards={"versions": report["versions"]})
    clustering = _fit(sources, features, work / f"clustering-{settings_hash(state)}.npz", arguments)
    shards = make_shards(sources, work, _SHARD_SIZE, state)
    with telling_progress(shards):
        _assign(shards, sources, features, clustering, arguments)

    bare = {name: source.remove_columns("proposals") for name, source in sources.items()}
    results = join_proposals(bare, shards, work, report, with_clusters=True)
    report["clusters"] = cluster_report(results, clustering, arguments.seed)
    put_in_place(results, report, folder)


# ---- fitting and assigning ----


def _load_items(sources, rows: list[tuple[str, int]], arguments: ClustersArguments) -> Iterator[dict]:
    images = BoxImages(sources, rows, arguments.short_side)
    workers = min(arguments.dataloader_num_workers, len(rows))
    return iter(DataLoader(images, batch_size=None, num_workers=workers, worker_init_fn=init_worker))


def _fit(
    sources: dict[str, datasets.Dataset], features: BoxFeatures, path: Path, arguments: ClustersArguments
) -> Clustering:
    """Fits PCA and k-means to the boxes of random images, into a file; takes up what an interrupted run has fitted."""
    if path.is_file():
        with np.load(path) as stored:
            return Clustering(**{name: stored[name] for name in stored.files})

    rows, total = _choose_images(sources, arguments)
    if total < arguments.num_clusters:
        raise DataError(
            f"{arguments.dataset}: {arguments.num_clusters} clusters cannot be fitted to {total} boxes (of each image "
            f"the best {arguments.fit_boxes_per_image}). Choose fewer num_clusters."
        )
    scratch_file = path.with_name("features.f16")
    scratch = np.memmap(scratch_file, dtype=np.float16, mode="w+", shape=(total, features.size))
    filled = 0
    for item in tqdm(
        _load_items(sources, rows, arguments), total=len(rows), desc="fitting", unit="image",
        disable=arguments.disable_tqdm,
    ):  # fmt: skip
        boxes = item["boxes"][: min(arguments.fit_boxes_per_image, total - filled)] if "boxes" in item else []
        if len(boxes):
            scratch[filled : filled + len(boxes)] = features(item["image"], boxes)
            filled += len(boxes)
    if filled < arguments.num_clusters:
        raise DataError(
            f"{arguments.dataset}: {arguments.num_clusters} clusters cannot be fitted to {filled} boxes, which are "
            f"all that can be used in {len(rows)} images. Choose fewer num_clusters, or mend the images."
        )
    clustering = fit_clusters(scratch[:filled], arguments.num_clusters, arguments.pca_dim, arguments.seed)
    part = path.with_name("part.npz")
    np.savez(part, **dataclasses.asdict(clustering))
    sync(part)
    os.replace(part, path)
    del scratch
    scratch_file.unlink()
    return clustering


def _choose_images(
    sources: dict[str, datasets.Dataset], arguments: ClustersArguments
) -> tuple[list[tuple[str, int]], int]:
    """Random images with boxes, just enough to fit to, and the number of boxes that they give."""
    rows, counts = [], []
    for name, source in sources.items():
        for start, table in arrow_batches(source, ["proposals"]):
            numbers = read_boxes(table["proposals"])[1]
            rows += [(name, start + int(row)) for row in np.flatnonzero(numbers)]
            counts += numbers[numbers > 0].tolist()
    order = np.random.default_rng(arguments.seed).permutation(len(rows))
    reached = np.minimum(counts, arguments.fit_boxes_per_image)[order].cumsum()
    used = int(np.searchsorted(reached, arguments.fit_boxes)) + 1
    return [rows[index] for index in order[:used]], min(int(reached[-1]), arguments.fit_boxes)


def _assign(
    shards: list[Shard],
    sources: dict[str, datasets.Dataset],
    features: BoxFeatures,
    clustering: Clustering,
    arguments: ClustersArguments,
) -> None:
    """Writes the files of the shards that are not there yet: the proposals with their clusters."""
    pending = [shard for shard in shards if not os.path.exists(shard.path)]
    rows = [(shard.split, row) for shard in pending for row in range(shard.start, shard.stop)]
    total = sum(len(source) for source in sources.values())
    stored = {name: source.select_columns(["proposals"]) for name, source in sources.items()}
    items = _load_items(sources, rows, arguments)
    with tqdm(
        total=total, initial=total - len(rows), desc="clusters", unit="image", disable=arguments.disable_tqdm
    ) as progress:
        for shard in pending:
            written = []
            for row, item in zip(range(shard.start, shard.stop), items, strict=False):
                written.append(_with_clusters(stored[shard.split][row]["proposals"], item, features, clustering))
                progress.update()
            write_shard(shard, written, with_clusters=True)


def _with_clusters(proposals: dict | None, item: dict, features: BoxFeatures, clustering: Clustering) -> dict:
    """A row of a shard."""
    if "reason" in item:
        return item
    boxes, scores = ((proposals or {}).get(name) or [] for name in ("bbox", "score"))
    clusters = np.zeros(len(boxes), dtype=np.int32)
    if len(item["kept"]):
        clusters[item["kept"].numpy()] = clustering.assign(features(item["image"], item["boxes"]))
    return {"proposals": {"bbox": boxes, "score": scores, "cluster": clusters.tolist()}}


# ---- the report ----


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


def _print_report(report: dict, known: int, output: Path) -> None:
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
    print(f"Saved to {output}; pre-train with --use_clusters true.")


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
    return plot_crops(crops, path, title=f"Proposals of the largest of {len(sizes)} clusters")


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
