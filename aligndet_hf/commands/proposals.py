"""`aligndet proposals`: looks for objects in the images of a dataset and adds the boxes as the column `proposals`."""

from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from .. import __version__
from ..data.bit_depth import parse_rule, pixel_window, record_pixel_window, settle_pixel_window, window_line
from ..data.columns import require_columns
from ..data.dataset_card import push_dataset
from ..data.errors import DataError
from ..data.formats import load_dataset_source, split_names
from ..data.images import print_left_out
from ..data.launch import Launch
from ..data.proposal_arguments import ProposalsArguments
from ..data.proposal_files import export_proposals
from ..data.proposal_inputs import mapped_inputs, write_inputs
from ..data.shard_search import Work, number_of_cores, search_shard, work_on_shards
from ..data.shards import (
    REPORT,
    Shard,
    content_hash,
    data_folder,
    join_proposals,
    make_shards,
    put_in_place,
    read_report,
    require_all,
    telling_progress,
    writing_to,
)
from ..data.sources import SOURCES, Search, model_hash
from ..data.splits import Splits
from ..data.stream_shards import read_rows, read_streams
from ..data.streaming import load_stream, stream_splits
from ..files import file_hash, is_sound
from ..flags import local_paths, takes_arguments
from ..hub import open_repository
from ..runs import RunFolder

# What processes that search have imported before their work.
_PRELOADED = [__name__, "aligndet_hf.proposals.kernels"]


@takes_arguments
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
    with Launch() as launch, data_folder(arguments, "proposals", ["*.rows"], on_main=launch.on_main) as folder:
        repo_id = launch.on_main(open_repository, arguments, folder.path, "dataset")
        sources = _load_inputs(arguments, launch)
        if not arguments.streaming:
            window = launch.on_main(settle_pixel_window, list(sources.values()), arguments.pixel_window)
            if window is not None:
                for source in sources.values():
                    record_pixel_window(source, window)
                launch.on_main(print, window_line(window))
        settings = launch.on_main(_settings, sources, arguments)
        folder.claim(places=local_paths(arguments), settings=settings)
        if folder.is_finished:
            done = "these images have been searched with these settings. Nothing to do."
            launch.on_main(print, f"{folder.path} is complete: {done}")
        else:
            with writing_to(folder.path):
                _generate(sources, settings, folder, arguments, launch)
        result = datasets.load_from_disk(str(folder.path))
        if arguments.export_json is not None:
            launch.on_main(_export, result, Path(arguments.export_json))
        if repo_id is not None:
            launch.on_main(push_dataset, result, read_report(folder.path), repo_id, arguments)
    return result


def _load_inputs(arguments: ProposalsArguments, launch: Launch) -> Splits | dict[str, datasets.IterableDataset]:
    """Opens the splits to search; an earlier column `proposals` stays only if it is the source."""
    source, column, sources = arguments.dataset, arguments.column, {}
    names = [arguments.split]
    if arguments.split is None:
        names = stream_splits(source) if arguments.streaming else split_names(source)
    for name in names:
        if arguments.streaming:
            split, _ = load_stream(source, name)
        else:
            split = load_dataset_source(source, name, image_dir=arguments.image_dir)
            if len(split) == 0:
                raise DataError(f"{source}: the split '{name}' has no rows.")
        if column is not None:
            require_columns(split, [column], f"{source}, split '{name}'")
        if "proposals" in split.column_names and column != "proposals":
            launch.on_main(print, f"{source}: the column 'proposals' of the split '{name}' is replaced.")
            split = split.remove_columns("proposals")
        sources[name] = split
    return sources


def _settings(sources: Splits, arguments: ProposalsArguments) -> dict:
    """Everything that decides what is found: the settings, and hashes of the images and of other files."""
    own = {name: value for name, value in arguments.source_settings().items() if name not in local_paths(arguments)}
    settings = {"source": arguments.source, **own, **arguments.selection()}
    if arguments.source == "detector":
        settings["detector_content"] = model_hash(_box_finder(arguments.detector))
    if arguments.source == "json":
        settings["proposals_file_content"] = file_hash(arguments.proposals_file)
    if arguments.rerank != "none":
        from ..evaluation.ring_contrast import ring_features

        features = ring_features(arguments.backbone, arguments.backbone_weights)
        settings |= {"rerank": arguments.rerank, "backbone_content": features.weights_hash()}
    if arguments.streaming:
        return settings | {f"input_{name}": load_stream(arguments.dataset, name)[1] for name in sources}
    if windows := list(filter(None, map(pixel_window, sources.values()))):
        settings["pixel_window"] = windows[0]
    return settings | {
        f"input_{name}": content_hash(source, arguments.disable_tqdm) for name, source in sources.items()
    }


def _generate(
    sources: Splits, settings: dict, folder: RunFolder, arguments: ProposalsArguments, launch: Launch
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
        launch.on_main(write_inputs, sources, work, arguments.proposals_file)
        sources = mapped_inputs(sources, work, with_imported=arguments.proposals_file is not None)
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
        require_all([Path(shard.path) for shard in shards])
        told = settings | arguments.source_settings()
        report = {"dataset": arguments.dataset, "settings": told, "versions": versions}
        report |= {"statistics": {}, "skipped": []}
        put_in_place(join_proposals(sources, shards, work, report, with_clusters), report, folder)
        _print_report(report, folder.path)

    launch.on_main(finish)


def _export(result: datasets.Dataset | datasets.DatasetDict, path: Path) -> None:
    """Writes the proposals in COCO format; of several splits, each to a file of its own."""
    splits = {path: result}
    if isinstance(result, datasets.DatasetDict):
        splits = {path.with_name(f"{path.stem}-{name}{path.suffix}"): split for name, split in result.items()}
    for place, split in splits.items():
        export_proposals(split.cast_column("image", datasets.Image(decode=False)), place)
        print(f"Exported to {place}")


def _search_shards(
    shards: Iterable[Shard], sources: Splits | None, with_clusters: bool, arguments: ProposalsArguments, launch: Launch
) -> None:
    """Writes the files of the shards that are not there yet. Without `sources` their rows lie beside these files."""
    inputs, total, done = None, None, 0
    if sources is not None:
        needed = {"image", arguments.input_column() or "image"}
        inputs = {name: source.select_columns(sorted(needed)) for name, source in sources.items()}
        total = sum(shard.stop - shard.start for shard in shards)
        shards = [shard for shard in shards if not is_sound(shard.path)]
        done = total - sum(shard.stop - shard.start for shard in shards)
    workers = arguments.dataloader_num_workers
    if workers is None:
        workers = 0 if arguments.source == "detector" else max(1, number_of_cores() // launch.local_size)
    if inputs is not None:
        workers = min(workers, len(shards)) if len(shards) > 1 else 0
    disable = arguments.disable_tqdm or not launch.is_main
    with tqdm(total=total, initial=done, desc="proposals", unit="image", disable=disable) as progress:
        open_work = partial(_open_work, inputs, with_clusters, arguments, workers > 0)
        work_on_shards(shards, open_work, workers, lambda shard: progress.update(shard.stop - shard.start), _PRELOADED)


def _open_work(inputs: Splits | None, with_clusters: bool, arguments: ProposalsArguments, in_worker: bool) -> Work:
    """What a process does with each shard."""
    if in_worker and arguments.rerank != "none":
        import torch

        torch.set_num_threads(1)  # the processes are the parallelism
    search, batch_size = _open_source(arguments), arguments.source_settings().get("per_device_eval_batch_size", 1)
    rule = parse_rule(arguments.pixel_window)
    return lambda shard: search_shard(shard, inputs, search, with_clusters, batch_size, rule)


def _open_source(arguments: ProposalsArguments) -> Search:
    source, selection = SOURCES[arguments.source], arguments.selection()
    settings = arguments.source_settings()
    if "detector" in settings:
        settings["detector"] = _box_finder(settings["detector"])
    if arguments.rerank == "none":
        return source.open(**settings, selection=selection)
    # torchvision takes seconds to import
    from ..evaluation.ring_contrast import CANDIDATES, RingContrast, reranked, ring_features

    candidates = {name: max(selection[name], least) for name, least in CANDIDATES.items()}
    search = source.open(**settings, selection=selection | candidates)
    return reranked(search, RingContrast(ring_features(arguments.backbone, arguments.backbone_weights)), selection)


def _box_finder(model: str) -> str:
    """The folder or Hub id of what finds boxes: of a run, its checkpoint or a published file, the detector."""
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "detector").is_dir():
        return str(path)
    from ..detectors.build import find_detector  # which imports torch: other sources need none

    return find_detector(model)


def _print_report(report: dict, output: Path) -> None:
    for split, numbers in report["statistics"].items():
        boxes = numbers["boxes_per_image"]
        print(
            f"{split}: {numbers['images']} images, {numbers['images_without_boxes']} of them without boxes; boxes an "
            f"image: mean {boxes['mean']:.1f}, min {boxes['min']}, median {boxes['median']:g}, max {boxes['max']}"
        )
    skipped = [f"{image['split']}, row {image['row']}: {image['reason']}" for image in report["skipped"]]
    print_left_out(skipped, output / REPORT)
    print(f"Saved to {output}")
