"""`aligndet clusters`: sorts the proposals of a dataset into pseudo-classes and stores them as the field `cluster`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
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
    is_trained,
)
from ..data.arrow_boxes import read_boxes
from ..data.columns import arrow_batches, validate_proposals
from ..data.dataset_card import push_dataset
from ..data.errors import DataError, ImageError
from ..data.formats import load_dataset_source, split_names
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
from ..data.splits import Splits
from ..detectors.backbones import check_backbone
from ..detectors.build import open_detector
from ..evaluation.box_features import BoxFeatures, BoxImages, around_backbone
from ..evaluation.feature_files import BATCH, FeatureFiles, seen_boxes
from ..files import is_sound, seal_file
from ..flags import flag, names_of, takes_arguments
from ..hub import HubDatasetArguments, open_repository
from ..processes import device_of, init_worker
from ..proposals.clusters import Clustering, choose_num_clusters, fit_clusters
from ..ranges import COUNT
from ..reporting.pseudo_classes import cluster_report, draw_clusters, print_cluster_report
from ..runs import RunFolder

PICTURE = "clusters.png"
_SHARD_SIZE = 64  # images between two saves


@dataclass(kw_only=True)
class ClustersArguments(HubDatasetArguments, RunArguments, LoadingArguments, FeatureArguments, DatasetArguments):
    """Arguments of [`cluster_proposals`]: the flags of `aligndet clusters` and the keys of its recipes."""

    help_groups = {"backbone": "Features", "num_clusters": "Clusters", "num_pictures": "Output"}

    output_dir: str = again(RunArguments, "output_dir", help="folder for the dataset with the clusters; must be new")
    split: str | None = again(
        DatasetArguments, "split", help="split of the dataset; all of them, with the same clusters, if not given"
    )

    backbone: str = flag(
        "resnet50",
        "start",
        "timm name of the frozen backbone, or a folder, whose weights come with it; best the one to pre-train with",
    )
    backbone_weights: str | None = flag(
        None, "start", "a .safetensors file with timm's names, or 'timm' to download timm's own weights"
    )
    detector: str | None = again(
        ReadyDetectorArguments,
        "detector",
        default=None,
        help="folder, published file or Hub id of a detector whose backbone to take, instead of these two",
    )
    short_side: int = again(
        FeatureArguments,
        "short_side",
        help="shorter side in pixels of the images that the backbone sees; smaller ones stay as they are",
    )
    normalize: bool = flag(True, "result", "scale the features of a box to length 1, each stride's by themselves")

    num_clusters: int | None = flag(
        None,
        "result",
        "sort the boxes into this many pseudo-classes; if not given, a number chosen from the number of boxes, 256 "
        "as in AlignDet at most",
        range=COUNT,
    )
    pca_dim: int = flag(128, "result", "numbers per box that PCA leaves for k-means", range=COUNT)
    fit_boxes: int = flag(
        50_000, "result", "boxes that PCA and k-means are fitted to, of random images; all get a cluster", range=COUNT
    )
    fit_boxes_per_image: int = flag(
        50, "result", "take at most this many boxes of each of these images, the best first", range=COUNT
    )
    seed: int = again(OptimisationArguments, "seed", help="seed of the choice of images and of k-means")

    num_pictures: int = flag(
        0, "output", f"draw boxes of this many clusters, the largest first: {PICTURE} in output_dir"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fit_boxes < (self.num_clusters or 1):
            raise ValueError(
                f"{self.num_clusters} clusters cannot be fitted to {self.fit_boxes} boxes: raise fit_boxes"
            )
        if self.detector is None:
            is_clear = is_trained(self.backbone, self.backbone_weights)
        else:
            is_clear = self.given.keys().isdisjoint({"backbone", "backbone_weights"})
        if not is_clear:
            raise ValueError(
                "give either backbone_weights (a .safetensors file, or 'timm' to download) with their backbone, or a "
                "detector to take the backbone of, without these two: features of a random backbone say little"
            )


@takes_arguments
def cluster_proposals(arguments: ClustersArguments) -> datasets.Dataset | datasets.DatasetDict:
    """
    Sorts the proposals of a dataset into clusters and saves the dataset with them.

    RoIAlign features of a frozen backbone, PCA, k-means. The backbone sees every image once: first some, as many as
    `fit_boxes` takes, to fit PCA and k-means (their features wait in files, in half precision), then the others.
    Memory does not grow with the dataset, but for some bytes a box.

    The output is the input with the field `cluster` (int32, 0 to `num_clusters` - 1) in its `proposals`; a box that
    cannot be used (see [`~aligndet_hf.data.arrow_boxes.find_faults`]) is in cluster 0, and pre-training drops it.
    Beside the data, `proposals.json` has all that the input's had, the settings and versions of the clusters, and the
    report of [`cluster_report`]. Images that cannot be read are left out and listed there.

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
    with data_folder(arguments, "clusters", ["clustering-*.npz", "features-*.npz"]) as folder:
        repo_id = open_repository(arguments, output, "dataset")
        sources = _load_sources(arguments)
        arguments = _with_num_clusters(arguments, sources)
        features = load_features(arguments)
        report = _new_report(arguments, sources, features)
        folder.claim(places={"clusters.backbone"}, settings=_deciding(report))
        if folder.is_finished:
            print(f"{output} is complete: these proposals have been clustered with these settings. Nothing to do.")
        else:
            known = len(report["skipped"])
            with writing_to(output):
                _cluster(sources, features, report, folder, arguments)
            print_cluster_report(report, known, output)
        result = datasets.load_from_disk(str(output))
        if arguments.num_pictures:
            splits = result if isinstance(result, datasets.DatasetDict) else {"": result}
            print(f"Pictures in {draw_clusters(splits, output / PICTURE, arguments.num_pictures, arguments.seed)}")
        if repo_id is not None:
            push_dataset(result, read_report(output), repo_id, arguments)
    return result


def _new_report(arguments: ClustersArguments, sources: Splits, features: BoxFeatures) -> dict:
    """The report of the input with the settings of the clusters: all that decides which clusters come out."""
    own = {
        "backbone": arguments.detector or arguments.backbone,
        "backbone_weights": features.weights_hash(),
        **{name: getattr(arguments, name) for name in sorted(names_of(ClustersArguments, "result"))},
        **{f"input_{name}": content_hash(source, arguments.disable_tqdm) for name, source in sources.items()},
    }
    packages = ("torch", "torchvision", "timm", "scikit-learn", "numpy", "datasets")
    versions = {"aligndet_hf": __version__} | {name: version(name) for name in packages}
    before = read_report(Path(arguments.dataset).expanduser())
    return {
        "dataset": before.get("dataset", arguments.dataset),
        "settings": before.get("settings", {}) | {"clusters": own},
        "versions": before.get("versions", {}) | {"clusters": versions},
        "statistics": {},
        "skipped": list(before.get("skipped", [])),
    }


def _deciding(report: dict) -> dict:
    """The settings of a report without the name of the backbone: a hash of its weights is among them."""
    own = report["settings"]["clusters"]
    return report["settings"] | {"clusters": {name: own[name] for name in own if name != "backbone"}}


def load_features(arguments: ClustersArguments) -> BoxFeatures:
    """The features of boxes that the arguments ask for."""
    if arguments.detector is not None:
        detector = open_detector(arguments.detector, is_whole=False)  # its features
        check_backbone(detector)
    else:
        detector = around_backbone(arguments.backbone, arguments.backbone_weights, arguments.strides)
    return BoxFeatures(detector, arguments.strides, arguments.normalize, device_of(arguments.use_cpu))


def _load_sources(arguments: ClustersArguments) -> Splits:
    names = split_names(arguments.dataset) if arguments.split is None else [arguments.split]
    sources = {}
    for name in names:
        sources[name] = load_dataset_source(arguments.dataset, name)
        with contextlib.suppress(ImageError):  # will be left out, and listed
            print(validate_proposals(sources[name], f"{arguments.dataset}, {name}"))
    return sources


def _with_num_clusters(arguments: ClustersArguments, sources: Splits) -> ClustersArguments:
    """The arguments with the number of clusters that the data suggests, if none is given."""
    if arguments.num_clusters is not None:
        return arguments
    boxes = int(sum(counts.sum() for _, counts in _box_counts(sources)))
    number = min(choose_num_clusters(boxes), arguments.fit_boxes)
    print(f"{number} clusters, for {boxes} boxes; choose another number with --num_clusters.")
    return dataclasses.replace(arguments, num_clusters=number)


def _box_counts(sources: Splits) -> Iterator[tuple[list[tuple[str, int]], np.ndarray]]:
    """Rows (split and number) and how many boxes each has, batch by batch."""
    for name, source in sources.items():
        for start, table in arrow_batches(source, ["proposals"]):
            counts = read_boxes(table["proposals"])[1]
            yield [(name, start + row) for row in range(len(counts))], counts


def _cluster(
    sources: Splits, features: BoxFeatures, report: dict, folder: RunFolder, arguments: ClustersArguments
) -> None:
    """Does the work of [`cluster_proposals`] in a folder beside the output, and puts it in place."""
    work, state = folder.work, _deciding(report) | {"versions": report["versions"]}
    folder.claim(shards={"versions": report["versions"]})
    key = settings_hash(state)
    rows, total = _choose_images(sources, arguments)
    boxes = _Work(sources, features, FeatureFiles(work, key, rows), arguments)
    clustering = boxes.fit(total, work / f"clustering-{key}.npz")
    shards = make_shards(sources, work, _SHARD_SIZE, state)
    with telling_progress(shards):
        boxes.assign(shards, clustering)

    results = join_proposals(sources, shards, work, report, with_clusters=True)
    report["clusters"] = cluster_report(results, clustering, arguments.seed)
    put_in_place(results, report, folder)


# ---- fitting and assigning ----


def _choose_images(sources: Splits, arguments: ClustersArguments) -> tuple[list[tuple[str, int]], int]:
    """Random images with boxes, just enough to fit to, in their order, and the number of boxes that they give."""
    rows, counts = [], []
    for places, numbers in _box_counts(sources):
        rows += [place for place, number in zip(places, numbers, strict=True) if number]
        counts += numbers[numbers > 0].tolist()
    order = np.random.default_rng(arguments.seed).permutation(len(rows))
    reached = np.minimum(counts, arguments.fit_boxes_per_image)[order].cumsum()
    total = min(int(reached[-1]), arguments.fit_boxes) if rows else 0
    if total < arguments.num_clusters:
        raise DataError(
            f"{arguments.dataset}: {arguments.num_clusters} clusters cannot be fitted to {total} boxes (of each image "
            f"the best {arguments.fit_boxes_per_image}). Choose fewer num_clusters."
        )
    used = int(np.searchsorted(reached, arguments.fit_boxes)) + 1
    return [rows[index] for index in sorted(order[:used])], total


@dataclass
class _Work:
    """
    The boxes of all images on their way to clusters.

    Attributes:
        sources (`dict[str, datasets.Dataset]`): The splits, with proposals.
        features ([`BoxFeatures`]): The backbone.
        files ([`FeatureFiles`]): The features of the images to fit to.
        arguments ([`ClustersArguments`]): The configuration.
    """

    sources: Splits
    features: BoxFeatures
    files: FeatureFiles
    arguments: ClustersArguments

    def fit(self, total: int, path: Path) -> Clustering:
        """
        Fits PCA and k-means to at most `total` boxes of the images of `files`, into a file; takes up what an
        interrupted run has left.
        """
        self._see_images()
        if is_sound(path):
            with np.load(path) as stored:
                return Clustering(**{name: stored[name] for name in stored.files})
        scratch_file, arguments = path.with_name("scratch.f16"), self.arguments
        filled = 0
        with open(scratch_file, "wb") as file:  # not through a mapping, which ends the process where the disk is full
            for found in self.files.best(arguments.fit_boxes_per_image, total):
                file.write(found.astype(np.float16).tobytes())
                filled += len(found)
        if filled < arguments.num_clusters:
            raise DataError(
                f"{arguments.dataset}: {arguments.num_clusters} clusters cannot be fitted to {filled} boxes, which "
                f"are all that can be used in {sum(map(len, self.files.batches))} images. Choose fewer num_clusters, "
                "or mend the images."
            )
        scratch = np.memmap(scratch_file, dtype=np.float16, mode="r", shape=(filled, self.features.size))
        clustering = fit_clusters(scratch, arguments.num_clusters, arguments.pca_dim, arguments.seed)
        part = path.with_name("part.npz")
        np.savez(part, **dataclasses.asdict(clustering))
        seal_file(part, path)
        del scratch
        scratch_file.unlink()
        return clustering

    def assign(self, shards: list[Shard], clustering: Clustering) -> None:
        """Writes the files of the shards that are not there yet: the proposals with their clusters."""
        pending = [shard for shard in shards if not is_sound(shard.path)]
        rows = [(shard.split, row) for shard in pending for row in range(shard.start, shard.stop)]
        stored = {name: source.select_columns(["proposals"]) for name, source in self.sources.items()}
        items = self._load([row for row in rows if row not in self.files])
        with self._progress("clusters", sum(map(len, self.sources.values())), len(rows)) as progress:
            for shard in pending:
                written = []
                for (split, row), found in self._found(shard, items):
                    written.append(_with_clusters(stored[split][row]["proposals"], found, clustering))
                    progress.update()
                write_shard(shard, written, with_clusters=True)

    def _see_images(self) -> None:
        """Writes the files of features that are not there yet."""
        missing = {number: self.files.batches[number] for number in self.files.missing()}
        rows = [row for batch in missing.values() for row in batch]
        items = self._load(rows)
        with self._progress("fitting", sum(map(len, self.files.batches)), len(rows)) as progress:
            for number, batch in missing.items():
                self.files.write(number, seen_boxes(self.features, [next(items) for _ in batch]))
                progress.update(len(batch))

    def _load(self, rows: list[tuple[str, int]]) -> Iterator[dict]:
        images = BoxImages(self.sources, rows, self.arguments.short_side, enlarge=False)
        workers = min(self.arguments.dataloader_num_workers, len(rows))
        return iter(DataLoader(images, batch_size=None, num_workers=workers, worker_init_fn=init_worker))

    def _progress(self, what: str, total: int, left: int) -> tqdm:
        return tqdm(total=total, initial=total - left, desc=what, unit="image", disable=self.arguments.disable_tqdm)

    def _found(self, shard: Shard, items: Iterator[dict]) -> Iterator[tuple[tuple[str, int], dict]]:
        """The rows of a shard and the features of their boxes: from the files, or from the next of `items`."""
        for start in range(shard.start, shard.stop, BATCH):
            rows = [(shard.split, row) for row in range(start, min(start + BATCH, shard.stop))]
            new = iter(seen_boxes(self.features, [next(items) for row in rows if row not in self.files]))
            for row in rows:
                yield row, self.files[row] if row in self.files else next(new)


def _with_clusters(proposals: dict | None, found: dict, clustering: Clustering) -> dict:
    """A row of a shard."""
    if "reason" in found:
        return found
    boxes, scores = ((proposals or {}).get(name) or [] for name in ("bbox", "score"))
    clusters = np.zeros(len(boxes), dtype=np.int32)
    if len(found["kept"]):
        clusters[found["kept"]] = clustering.assign(found["features"])
    return {"proposals": {"bbox": boxes, "score": scores, "cluster": clusters.tolist()}}
