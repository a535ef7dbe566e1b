"""`aligndet proposals`: looks for objects in the images of a dataset and adds the boxes as the column `proposals`."""

import concurrent.futures
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from tqdm.auto import tqdm

from .. import __version__
from ..arguments import (
    InferenceArguments,
    LabelledArguments,
    LoadingArguments,
    PixelWindowArguments,
    ProgressArguments,
    RunArguments,
    again,
)
from ..data.bit_depth import parse_rule, pixel_window, record_pixel_window, settle_pixel_window, window_line
from ..data.columns import require_columns
from ..data.dataset_card import push_dataset
from ..data.errors import DataError, ImageError
from ..data.formats import load_dataset_source, split_names
from ..data.images import decode_image, image_name
from ..data.launch import Launch
from ..data.proposal_files import export_proposals, import_proposals
from ..data.shards import (
    REPORT,
    Shard,
    content_hash,
    data_folder,
    join_proposals,
    make_shards,
    put_in_place,
    read_report,
    reopened,
    telling_progress,
    write_arrow,
    write_shard,
    writing_to,
)
from ..data.sources import SOURCES, Search, file_hash, model_hash
from ..data.stream_shards import read_rows, read_streams
from ..data.streaming import load_stream, stream_splits
from ..flags import takes_old_names
from ..hub import HubArguments, HubDatasetArguments, open_repository
from ..objects import name_objects
from ..proposals.filters import parse_strategy
from ..proposals.opencv import MODES
from ..proposals.selective_search import PRESETS
from ..ranges import COUNT, POSITIVE, SHARE, Range, check_values
from ..runs import RunFolder

_LISTED_IMAGES = 10

# Sources that find boxes everywhere, and what is kept of any source if nothing else is said. A detector that learns
# from overlapping boxes finds every object several times (docs/results.md): of a search a few boxes that are apart.
SEARCHES = ("selective_search", "opencv")
KEPT = {
    "search": {
        "max_boxes": 10,
        "nms_threshold": 0.2,
        "min_side": 0,
        "min_relative_size": 0.04,
        "max_relative_size": 0.8,
    },
    "other": {
        "max_boxes": 300,
        "nms_threshold": 0.7,
        "min_side": 0,
        "min_relative_size": 0.04,
        "max_relative_size": 1.0,
    },
    # AlignDet's and SoCo's `ratio3size0008`; neither paper says how many boxes it keeps, or how far apart.
    "paper": {
        "max_boxes": 300,
        "nms_threshold": 0.7,
        "min_side": 32,
        "min_relative_size": 0.0,
        "max_relative_size": 0.8,
    },
}


@takes_old_names
@dataclass(kw_only=True)
class ProposalsArguments(
    HubDatasetArguments, RunArguments, ProgressArguments, PixelWindowArguments, LabelledArguments
):
    """Arguments of [`generate_proposals`]: the flags of `aligndet proposals` and the keys of its recipes."""

    help_groups = {
        "streaming": "Data",
        "source": "Where boxes come from",
        "max_boxes": "Which to keep",
        "dataloader_num_workers": "Run",
        "export_json": "Output",
    }

    dataset: str = again(
        LabelledArguments,
        "dataset",
        help="images: folder, label file, folder of save_to_disk or Hub id; labels are not needed",
    )
    output_dir: str = again(
        RunArguments, "output_dir", help="folder for the dataset with the column `proposals`; must be new"
    )
    split: str | None = again(
        LabelledArguments, "split", help="split of the dataset; all of them, each by itself, if not given"
    )
    streaming: bool = field(
        default=False,
        metadata={
            "role": "data",
            "help": "search images while they are downloaded, instead of all of them after that",
        },
    )

    source: str | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "selective_search; opencv: the same as OpenCV has it; detector: the boxes of a trained model; "
            "column: boxes that the dataset has; json: a proposal file of AlignDet or SoCo; random: boxes that "
            "have not seen the image, as a control. If not given, the one that the following flags are of, else "
            "selective_search",
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "selective_search: tiny (fastest), default, or quality (most boxes); of any source `paper`: keep "
            "boxes as AlignDet does, with its bounds of size, instead of a few that are apart",
        },
    )
    mode: str | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "opencv: single, fast (the default) or quality (about 0.03, 0.2 and 0.8 s an image)",
        },
    )
    short_side: int | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "opencv: search on a copy with this shorter side in pixels, 200 if not given",
            "range": COUNT,
        },
    )
    detector: str | None = field(
        default=None,
        metadata={
            "role": "start",
            "help": "detector: folder or Hub id of any transformers detector, or of a mask generator like SAM",
        },
    )
    score_threshold: float | None = field(
        default=None,
        metadata={"role": "result", "help": "detector: lowest score of a box, 0.05 if not given", "range": SHARE},
    )
    per_device_eval_batch_size: int | None = again(
        InferenceArguments,
        "per_device_eval_batch_size",
        default=None,
        help="detector: images per forward pass, 8 if not given",
    )
    column: str | None = field(
        default=None,
        metadata={"role": "data", "help": "column: its name, proposals if not given; objects for the labels"},
    )
    proposals_file: str | None = field(
        default=None,
        metadata={"role": "data", "help": "json: the file, in COCO format; every annotation is a proposal"},
    )

    max_boxes: int | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "store at most this many boxes of an image, the best first; 10 of a search, 300 of other sources "
            "if not given",
            "range": COUNT,
        },
    )
    nms_threshold: float | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "drop a box that overlaps a better one by more (IoU); less variety, more objects; 0.2 "
            "for a search, 0.7 for other sources if not given",
            "range": SHARE,
        },
    )
    max_aspect_ratio: float = field(
        default=3.0,
        metadata={"role": "result", "help": "longer side over shorter side", "range": Range(1, also=math.inf)},
    )
    min_side: float | None = field(
        default=None,
        metadata={"role": "result", "help": "smallest width and height in pixels of the image; 0 if not given"},
    )
    min_relative_size: float | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "smallest sqrt(box area / image area); large values lose small objects; 0.04 if not given",
        },
    )
    max_relative_size: float | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "largest sqrt(box area / image area); 0.8 for a search, 1 for other sources if not given",
            "range": POSITIVE,
        },
    )
    max_borders: int = field(
        default=4,
        metadata={
            "role": "result",
            "help": "drop boxes that touch more than this many borders of the image; 1 leaves more objects among them",
            "range": Range(0, 4),
        },
    )
    relax_if_empty: bool = field(
        default=True,
        metadata={
            "role": "result",
            "help": "for an image left without boxes drop the bounds of size and borders, then the aspect ratio",
        },
    )
    strategy: str | None = field(
        default=None,
        metadata={
            "role": "result",
            "help": "a filter of SoCo or AlignDet by name, e.g. ratio3size0308post, instead of the six above",
        },
    )
    rerank: Literal["ring", "none"] = field(
        default="none",
        metadata={
            "role": "result",
            "help": "ring: put those boxes first that differ most from the ring around them, in features of a frozen "
            "backbone; so more of the first ones are objects",
        },
    )
    backbone: str | None = field(
        default=None, metadata={"role": "start", "help": "rerank: timm name of that backbone, or a folder"}
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "role": "start",
            "help": "rerank: a .safetensors file with timm's names, or 'timm' to download them",
        },
    )

    dataloader_num_workers: int | None = again(
        LoadingArguments,
        "dataloader_num_workers",
        default=None,
        help="processes that load images and search them; 0: this one; one per core, but 0 for the source detector, "
        "if not given",
    )
    shard_size: int = field(
        default=32,
        metadata={"role": "run", "help": "images between two saves; a killed run loses no more", "range": COUNT},
    )
    export_json: str | None = field(
        default=None,
        metadata={"role": "output", "help": "also write the proposals to this file, in AlignDet's COCO format"},
    )

    def __post_init__(self):
        name_objects(self)
        check_values(self)
        is_paper = self.preset == "paper"
        self.preset = None if is_paper else self.preset
        if self.source is None:
            owners = (
                name for name, row in SOURCES.items() if any(getattr(self, key) is not None for key in row.settings)
            )
            self.source = next(owners, "selective_search")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        for source, (_, settings, _) in SOURCES.items():
            for name, default in settings.items():
                given = getattr(self, name)
                if source != self.source and given is not None:
                    raise ValueError(f"{name} is for --source {source}, not for {self.source}")
                if source == self.source and given is None:
                    if default is None:
                        raise ValueError(f"--source {source} needs --{name}")
                    setattr(self, name, default)
        kept = KEPT["paper"] if is_paper else KEPT["search" if self.source in SEARCHES else "other"]
        for name, default in kept.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        for name, known in (("preset", PRESETS), ("mode", MODES)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.streaming and (self.source == "json" or self.image_dir):
            raise ValueError("streaming does not go with --source json and image_dir: leave it out")
        if self.min_relative_size > self.max_relative_size:
            raise ValueError(
                f"no box has a relative size from {self.min_relative_size:g} (min_relative_size) to "
                f"{self.max_relative_size:g} (max_relative_size)"
            )
        if self.strategy is not None:
            parse_strategy(self.strategy)
        parse_rule(self.pixel_window)
        if self.rerank == "none":
            self.backbone = self.backbone_weights = (
                None  # a chain gives its backbone to all commands that know the flag
            )
        if self.rerank == "ring" and not (self.backbone and self.backbone_weights):
            raise ValueError("--rerank ring needs --backbone and --backbone_weights: random features rank nothing")

    def source_settings(self) -> dict:
        """What the chosen source takes of these arguments."""
        return {name: getattr(self, name) for name in SOURCES[self.source].settings}

    def input_column(self) -> str | None:
        """The column that the source reads, beside the images."""
        return {"column": self.column, "json": "proposals"}.get(self.source)

    def selection(self) -> dict:
        """Keyword arguments of [`~aligndet_hf.proposals.filters.select_indices`]."""
        names = ["max_aspect_ratio", "min_side", "min_relative_size", "max_relative_size", "max_borders"]
        filters = {name: getattr(self, name) for name in [*names, "relax_if_empty"]}
        return {
            "max_boxes": self.max_boxes,
            "nms_threshold": self.nms_threshold,
            **(filters if self.strategy is None else parse_strategy(self.strategy)),
        }


def generate_proposals(arguments: ProposalsArguments) -> datasets.Dataset | datasets.DatasetDict:
    """
    Finds proposals in all images of a dataset and saves the dataset with them.

    The output holds all columns of the input, the images byte for byte, and `proposals` (see
    [`~aligndet_hf.data.columns.proposals_feature`]). Beside the data, `proposals.json` has the settings, the versions,
    statistics, and the images that could not be read, which the output leaves out.

    A run that was interrupted, in whatever way, continues with the same command: finished shards wait in
    `<output_dir>.partial`. Where the output is complete and neither images nor settings have changed, nothing is done.

    The processes of `accelerate launch` or `torchrun`, on one machine or many that share the disk of `output_dir`,
    divide the shards among them; the main one joins them at the end.

    Args:
        arguments ([`ProposalsArguments`]): The configuration.

    Returns:
        `datasets.Dataset`, or `datasets.DatasetDict` if the input has several splits and none was chosen.

    Raises:
        DataError: the input is missing or has no readable image.
        ValueError: `output_dir` is in use, or holds something else.
        Interrupted: SIGTERM or SIGINT; what is finished is kept.
        OSError: the output cannot be written or uploaded, or there is no such detector.
    """
    with Launch() as launch, data_folder(arguments, "proposals", ["*.rows"], launch.on_main) as folder:
        repo_id = launch.on_main(open_dataset_repository, arguments, folder.path)
        sources = _load_sources(arguments, launch)
        if not arguments.streaming:
            window = launch.on_main(settle_pixel_window, list(sources.values()), arguments.pixel_window)
            if window is not None:
                for source in sources.values():
                    record_pixel_window(source, window)
                if launch.is_main:
                    print(window_line(window))
        settings = launch.on_main(_settings, sources, arguments)
        folder.claim(settings=settings)
        if folder.is_finished:
            if launch.is_main:
                print(
                    f"{folder.path} is complete: these images have been searched with these settings. Nothing to do."
                )
        else:
            with writing_to(folder.path):
                _generate(sources, settings, folder, arguments, launch)
        result = datasets.load_from_disk(str(folder.path))
        if arguments.export_json is not None:
            launch.on_main(_export, result, Path(arguments.export_json))
        if repo_id is not None:
            launch.on_main(push_dataset, result, read_report(folder.path), repo_id, arguments)
    return result


def open_dataset_repository(arguments: HubArguments, output: Path) -> str | None:
    """The repository to upload a data set to, if that is asked for; see [`~aligndet_hf.hub.open_repository`]."""
    if not arguments.push_to_hub:
        return None
    return open_repository(
        arguments.hub_dataset_id or output.name,
        repo_type="dataset",
        private=arguments.hub_private_repo,
        revision=arguments.hub_revision,
        license=arguments.card_license,
    )


def _settings(sources: dict[str, datasets.Dataset], arguments: ProposalsArguments) -> dict:
    """Everything that decides what is found: the settings, and hashes of the images and of other files."""
    settings = {"source": arguments.source, **arguments.source_settings(), **arguments.selection()}
    if arguments.source == "detector":
        settings["detector_content"] = model_hash(_box_finder(arguments.detector))
    if arguments.source == "json":
        settings["proposals_file_content"] = file_hash(arguments.proposals_file)
    if arguments.rerank != "none":
        settings |= {"rerank": arguments.rerank, "backbone_content": _ring_features(arguments).weights_hash()}
    if arguments.streaming:
        return settings | {f"input_{name}": load_stream(arguments.dataset, name)[1] for name in sources}
    if windows := list(filter(None, map(pixel_window, sources.values()))):
        settings["pixel_window"] = windows[0]
    return settings | {
        f"input_{name}": content_hash(source, arguments.disable_tqdm) for name, source in sources.items()
    }


def _generate(
    sources: dict[str, datasets.Dataset],
    settings: dict,
    folder: RunFolder,
    arguments: ProposalsArguments,
    launch: Launch,
) -> None:
    """Does the work of [`generate_proposals`] in a folder beside the output, and puts it in place."""
    versions = {
        "aligndet_hf": __version__,
        "numpy": np.__version__,
        "datasets": datasets.__version__,
        **SOURCES[arguments.source].versions(),
        **({name: version(name) for name in ("torch", "torchvision", "timm")} if arguments.rerank != "none" else {}),
    }
    work, shards_of = folder.work, {"versions": versions, "shard_size": arguments.shard_size}
    folder.claim(shards=shards_of)
    state = settings | shards_of
    if not arguments.streaming:
        launch.on_main(_write_inputs, sources, work, arguments)
        sources = _mapped_inputs(sources, work, arguments)
    column = arguments.input_column()
    with_clusters = column is not None and all("cluster" in source.features[column] for source in sources.values())

    shards = []
    if arguments.streaming:
        stored = read_streams(sources, work, arguments.shard_size, state, launch)
        _search_shards(stored, None, with_clusters, arguments, launch)
    else:
        shards = make_shards(sources, work, arguments.shard_size, state)
        with telling_progress(shards):
            _search_shards(shards[launch.rank :: launch.size], sources, with_clusters, arguments, launch)
    launch.wait()

    def finish():
        nonlocal sources, shards
        if arguments.streaming:
            sources, shards = read_rows(sources, work, state)
        missing = [shard.path for shard in shards if not os.path.exists(shard.path)]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(shards)} shards are not there, such as {missing[0]}: all machines must see "
                "the same output_dir."
            )
        report = {
            "dataset": arguments.dataset,
            "settings": settings,
            "versions": versions,
            "statistics": {},
            "skipped": [],
        }
        plain = {name: _without_proposals(source) for name, source in sources.items()}
        put_in_place(join_proposals(plain, shards, work, report, with_clusters), report, folder)
        _print_report(report, folder.path)

    launch.on_main(finish)


def _write_inputs(sources: dict[str, datasets.Dataset], work: Path, arguments: ProposalsArguments) -> None:
    """Writes what only this process's memory holds to files that all processes map: image paths, imported boxes."""
    for name, source in sources.items():
        if not source.cache_files:
            write_arrow(source, work / f"{name}-input.arrow")
    if arguments.source == "json":
        for name, column in import_proposals(arguments.proposals_file, sources).items():
            write_arrow(column, work / f"{name}-imported.arrow")


def _mapped_inputs(
    sources: dict[str, datasets.Dataset], work: Path, arguments: ProposalsArguments
) -> dict[str, datasets.Dataset]:
    """The splits with all their columns in files."""
    mapped = {}
    for name, source in sources.items():
        if not source.cache_files:
            source = datasets.Dataset.from_file(str(work / f"{name}-input.arrow"), source.info, source.split)
        if arguments.source == "json":
            imported = datasets.Dataset.from_file(str(work / f"{name}-imported.arrow"))
            source = datasets.concatenate_datasets([source, imported], axis=1)
        mapped[name] = source
    return mapped


def _export(result: datasets.Dataset | datasets.DatasetDict, path: Path) -> None:
    """Writes the proposals in COCO format; of several splits, each to a file of its own."""
    splits = {path: result}
    if isinstance(result, datasets.DatasetDict):
        splits = {path.with_name(f"{path.stem}-{name}{path.suffix}"): split for name, split in result.items()}
    for place, split in splits.items():
        export_proposals(split.cast_column("image", datasets.Image(decode=False)), place)
        print(f"Exported to {place}")


# ---- the input and the folders ----


def _load_sources(
    arguments: ProposalsArguments, launch: Launch
) -> dict[str, datasets.Dataset] | dict[str, datasets.IterableDataset]:
    """The splits to search; with an earlier `proposals` column only if that is the source."""
    names = stream_splits(arguments.dataset) if arguments.streaming else None
    if arguments.split is not None:
        names = [arguments.split]
    elif names is None:
        names = split_names(arguments.dataset)
    column = arguments.column
    sources = {}
    for name in names:
        if arguments.streaming:
            source, _ = load_stream(arguments.dataset, name)
        else:
            source = load_dataset_source(arguments.dataset, name, image_dir=arguments.image_dir)
            if len(source) == 0:
                raise DataError(f"{arguments.dataset}: the split '{name}' has no rows.")
        if column is not None:
            require_columns(source, [column], f"{arguments.dataset}, split '{name}'")
        if "proposals" in source.column_names and column != "proposals":
            if launch.is_main:
                print(f"{arguments.dataset}: the column 'proposals' of the split '{name}' is replaced.")
            source = _without_proposals(source)
        sources[name] = source
    return sources


def _without_proposals(source: datasets.Dataset) -> datasets.Dataset:
    return source.remove_columns([name for name in source.column_names if name == "proposals"])


# ---- searching, in several processes ----


def _search_shards(
    shards: Iterable[Shard],
    sources: dict[str, datasets.Dataset] | None,
    with_clusters: bool,
    arguments: ProposalsArguments,
    launch: Launch,
) -> None:
    """Writes the files of the shards that are not there yet. Without `sources` their rows lie beside these files."""
    inputs, total, done = None, None, 0
    if sources is not None:
        needed = {"image", arguments.input_column() or "image"}
        inputs = {name: source.select_columns(sorted(needed)) for name, source in sources.items()}
        total = sum(shard.stop - shard.start for shard in shards)
        shards = [shard for shard in shards if not os.path.exists(shard.path)]
        done = total - sum(shard.stop - shard.start for shard in shards)
    workers = arguments.dataloader_num_workers
    if workers is None:
        workers = 0 if arguments.source == "detector" else max(1, _number_of_cores() // launch.local_size)
    if inputs is not None:
        workers = min(workers, len(shards)) if len(shards) > 1 else 0
    disable = arguments.disable_tqdm or not launch.is_main
    with tqdm(total=total, initial=done, desc="proposals", unit="image", disable=disable) as progress:
        if workers == 0:
            search = None
            for shard in shards:
                search = search or _open_source(arguments)
                _search_shard(shard, inputs, search, with_clusters, arguments)
                progress.update(shard.stop - shard.start)
            return
        pool = concurrent.futures.ProcessPoolExecutor(
            workers,
            _process_context(),
            initializer=_init_worker,
            initargs=(inputs, with_clusters, arguments),
        )
        try:
            futures = {}
            for shard in itertools.chain(shards, [None]):
                if shard is not None:
                    futures[pool.submit(_search_in_worker, shard)] = shard
                # A stream is not read further than the search needs it.
                while len(futures) >= (2 * workers if shard else 1):
                    finished, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                        shard_done = futures.pop(future)
                        progress.update(shard_done.stop - shard_done.start)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A worker process died, perhaps for lack of memory (or, in a script of your own, of the line "
                "`if __name__ == '__main__':`). What is finished is kept: run the same again, with fewer num_workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _open_source(arguments: ProposalsArguments) -> Search:
    source, selection = SOURCES[arguments.source], arguments.selection()
    settings = arguments.source_settings()
    if "detector" in settings:
        settings["detector"] = _box_finder(settings["detector"])
    if arguments.rerank == "none":
        return source.open(**settings, selection=selection)
    from ..evaluation.ring_contrast import CANDIDATES, RingContrast, reranked  # torchvision takes seconds to import

    search = source.open(**settings, selection=selection | CANDIDATES)
    return reranked(search, RingContrast(_ring_features(arguments)), selection)


def _ring_features(arguments: ProposalsArguments):
    """What boxes are ranked by: features of the frozen backbone, on a GPU if there is one."""
    import torch

    from ..detectors.build import build_detector
    from ..evaluation.box_features import BoxFeatures
    from ..evaluation.ring_contrast import STRIDES

    detector = build_detector(  # for its backbone only, so any family will do
        "detr", backbone=arguments.backbone, backbone_weights=arguments.backbone_weights, strides=tuple(STRIDES)
    )
    return BoxFeatures(detector, STRIDES, normalize=False, device="cuda" if torch.cuda.is_available() else "cpu")


def _box_finder(model: str) -> str:
    """The model that finds boxes: of a run, its checkpoint or a published file the detector, else what is named."""
    path = Path(model).expanduser()
    if not path.is_file() and not (path / "detector").is_dir():
        return str(path) if path.exists() else model
    from ..detectors.build import find_detector  # which imports torch: other sources need none

    return find_detector(path)


def _number_of_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))  # those this process may use; Linux only
    except AttributeError:
        return os.cpu_count() or 1


def _process_context():
    """
    Workers are not forked from this process, whose threads (OpenCV, Arrow, torch) would not survive that, but from a
    server that has imported what they need and done nothing else.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "aligndet_hf.proposals.kernels"])
    return context


_worker = {}


def _init_worker(
    inputs: dict[str, datasets.Dataset] | None, with_clusters: bool, arguments: ProposalsArguments
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and lets us finish the shard
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if arguments.rerank != "none":
        import torch

        torch.set_num_threads(1)  # the processes are the parallelism
    _worker.update(inputs=inputs, search=_open_source(arguments), with_clusters=with_clusters, arguments=arguments)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _search_in_worker(shard: Shard) -> None:
    _search_shard(shard, _worker["inputs"], _worker["search"], _worker["with_clusters"], _worker["arguments"])


def _search_shard(
    shard: Shard,
    inputs: dict[str, datasets.Dataset] | None,
    search: Search,
    with_clusters: bool,
    arguments: ProposalsArguments,
) -> None:
    """Searches the images of a shard, a batch at a time, and writes its file."""
    if inputs is None:
        inputs = datasets.Dataset.from_file(str(Path(shard.path).with_suffix(".rows")))
    else:
        inputs = reopened(inputs[shard.split], range(shard.start, shard.stop))
    batch_size = arguments.source_settings().get("per_device_eval_batch_size", 1)
    window = pixel_window(inputs) or parse_rule(arguments.pixel_window)
    results = []
    for start in range(shard.start, shard.stop, batch_size):
        rows, images, faults = [], [], {}
        for place in range(start, min(start + batch_size, shard.stop)):
            row = inputs[place - shard.start]
            try:
                images.append(decode_image(row["image"], window))
                rows.append(row)
            except ImageError as error:
                faults[place] = {"file": image_name(row["image"]), "reason": str(error)}
        found = iter(search(images, rows) if images else [])
        for place in range(start, min(start + batch_size, shard.stop)):
            results.append(faults.get(place) or {"proposals": {k: v.tolist() for k, v in next(found).items()}})
    write_shard(shard, results, with_clusters)


def _print_report(report: dict, output: Path) -> None:
    for split, numbers in report["statistics"].items():
        boxes = numbers["boxes_per_image"]
        print(
            f"{split}: {numbers['images']} images, {numbers['images_without_boxes']} of them without boxes; boxes an "
            f"image: mean {boxes['mean']:.1f}, min {boxes['min']}, median {boxes['median']:g}, max {boxes['max']}"
        )
    skipped = report["skipped"]
    if skipped:
        print(f"Left out, for they cannot be read: {len(skipped)}")
        for image in skipped[:_LISTED_IMAGES]:
            print(f"  {image['split']}, row {image['row']}: {image['reason']}")
        if len(skipped) > _LISTED_IMAGES:
            print(f"  ... all of them in {output / REPORT}")
    print(f"Saved to {output}")
