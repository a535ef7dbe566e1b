"""Where training writes to, what it starts from, as files have it, and how it sees images."""

from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..arguments import AugmentationArguments, TrainingRunArguments
from ..data.launch import Launch
from ..data.sampling import SampleKey
from ..data.sources import model_hash
from ..data.views import ViewConfig
from ..detectors.anchors import anchor_note
from ..detectors.build import DetectorArguments, find_detector
from ..files import file_hash, write_json
from ..runs import RunFolder
from .checkpointing import CHECKPOINTS, DAMAGED

# What every training writes, beside what is its own.
_REPORTS = ["README.md", "report.html", "backbone_report.json", "transfer_report.json"]
_WRITTEN = [f"{DAMAGED}{CHECKPOINTS}", "config.json", *_REPORTS]
_LOOKED_AT = 16  # training images, to see whether the anchors fit


def training_folder(arguments: TrainingRunArguments, command: str, written: list[str], result: str) -> RunFolder:
    """
    The folder of a training, for all of its processes; it goes on from its checkpoints.

    Args:
        arguments ([`TrainingRunArguments`]): Where it is, and whether to start anew.
        command (`str`): The command, as `aligndet` has it.
        written (`list[str]`): Names, or glob patterns, of what this command alone writes there.
        result (`str`): The file that is written last.
    """
    options = {"overwrite": arguments.overwrite_output_dir, "on_main": Launch().on_main}
    written = [*_WRITTEN, *written]
    return RunFolder(arguments.output_dir, command, written=written, kept=[CHECKPOINTS], result=result, **options)


def tell_weights(report, folder: Path) -> None:
    """Says what a detector got from a checkpoint, or its backbone from weights, and writes it; nothing without."""
    if report is not None:
        PartialState().print(report)
        Launch().on_main(write_json, folder / report.file_name, asdict(report))


def tell_anchors(detector: PreTrainedModel, images: Dataset) -> None:
    """Says if a dense detector has too few anchors on the objects of its training images, by some of them."""
    chosen = range(0, len(images), -(-len(images) // _LOOKED_AT))
    items = (images[SampleKey(number, 0, 0)] for number in chosen)
    if note := Launch().on_main(anchor_note, detector, items):
        PartialState().print(f"note: {note}")


def training_view(arguments: AugmentationArguments, resize: str) -> ViewConfig:
    """How a training sees images, for a family that resizes them in this way."""
    options = {name: getattr(arguments, name) for name in ("max_size", "flip_probability", "color")}
    crop_scale = tuple(arguments.crop_scale) if arguments.crop_scale else None
    return ViewConfig(arguments.image_sizes, resize=resize, crop_scale=crop_scale, **options)


def start_hashes(arguments: DetectorArguments) -> dict[str, str]:
    """
    Hashes of the local files and folders that a training starts from: a run with others is another run.

    Args:
        arguments ([`DetectorArguments`]): Which detector, and a new detector's backbone and its weights.

    Returns:
        `dict[str, str]`: by the name of the flag; nothing for what is no path.

    Raises:
        ValueError: the folder of the detector holds none.
    """
    given = {name: getattr(arguments, name) for name in ("detector", "backbone", "backbone_weights")}
    if getattr(arguments, "method", "aligndet") == "soco":
        del given["detector"]
    paths = {name: Path(value).expanduser() for name, value in given.items() if value is not None}
    hashes = {name: file_hash(path) for name, path in paths.items() if path.is_file()}
    for name, path in paths.items():
        if path.is_dir():
            hashes[name] = model_hash(find_detector(path) if name == "detector" else str(path))
    return hashes
