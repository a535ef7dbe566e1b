"""What training starts from, as files have it."""

from pathlib import Path

from ..data.sources import model_hash
from ..detectors.build import DetectorArguments, find_detector
from ..files import file_hash


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
