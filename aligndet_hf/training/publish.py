"""What ends a run: its card, its report, and the upload of both with the detector."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import PartialState

from .. import __version__
from ..cards import write_card
from ..hub import upload
from ..reporting.comparison import summary
from ..reporting.html_report import REPORT, pictures_of, write_report
from ..reporting.model_card import eval_results, model_card, run_title
from ..reporting.predictions import PREDICTIONS
from ..reporting.run_record import read_run
from .best_boxes import BOXES

# Of a folder what loads a model; the rest of a run tells of the machine it ran on, or is for resuming.
_MODEL_FILES = ("config.json", "*processor_config.json", "model*.safetensors", "*.safetensors.index.json")

IN_CARDS = (PREDICTIONS, BOXES)  # the picture that a card shows, the first that there is
EVAL_RESULTS = ".eval_results/aligndet_hf.yaml"


def finished_metrics(output_dir: Path, result: str, arguments, repo_id: str | None) -> dict[str, float]:
    """Says that a run is finished, repeats its upload if one is asked for, and reads its metrics from `result`."""
    processes = PartialState()
    processes.print(f"The run in {output_dir} is finished; --overwrite_output_dir starts it anew.")
    if processes.is_main_process:
        publish_run(output_dir, arguments, repo_id, anew=False)
    return json.loads((output_dir / result).read_text())["metrics"]


def publish_run(output_dir: Path, arguments, repo_id: str | None = None, anew: bool = True) -> None:
    """
    Writes the card and the report of a finished run and, if asked to, uploads them with the detector.

    The repository has the plain detector (of SoCo the backbone) at its top, the report, the log and, of pre-training,
    the whole model with its momentum copy in a folder named after the method. The report goes up without the pictures
    of the user's images unless `push_pictures` is set, and what goes up is said before.

    Args:
        output_dir (`Path`): The folder of the run.
        arguments: The run's, from which `write_report`, `card_license`, `push_pictures`, `hub_revision` and
            `hub_token` count.
        repo_id (`str`, *optional*): The repository to upload to, see [`~aligndet_hf.hub.open_repository`].
        anew (`bool`, *optional*, defaults to `True`): Whether to replace the report if there is one.

    Raises:
        OSError: the upload failed. The run is complete; to call this again, run the same command.
    """
    record = read_run(output_dir)
    record.license = arguments.card_license or record.license
    shown = _picture(output_dir)
    card = model_card(record, output_dir.resolve().name, record.product, shown)
    card = write_card(output_dir / "README.md", card)
    if arguments.write_report and (anew or not (output_dir / REPORT).exists()):
        write_report(output_dir)
    if repo_id is None:
        return

    files = {
        name: output_dir / name for name in (REPORT, "log.jsonl", "transfer_report.json", "torchvision.safetensors")
    }
    files = {name: path for name, path in files.items() if path.is_file()}
    if record.product is None:
        files |= _model_files(output_dir)
    else:
        files |= _model_files(output_dir / record.product)
        files |= {f"{record.method}/{name}": path for name, path in _model_files(output_dir).items()}
    pictures = [path.name for path in pictures_of(output_dir)] if REPORT in files else [shown] if shown else []
    with tempfile.TemporaryDirectory() as scratch:
        if pictures and REPORT in files and not arguments.push_pictures:
            files[REPORT] = write_report(output_dir, Path(scratch) / REPORT, with_pictures=False)
        if shown is not None and arguments.push_pictures:
            files[shown] = output_dir / shown
        if results := eval_results(record):
            files[EVAL_RESULTS] = Path(scratch) / "results.yaml"
            files[EVAL_RESULTS].write_text(results, encoding="utf-8")
        print(f"Uploading {len(files)} files to {repo_id}, {_told_pictures(pictures, arguments.push_pictures)}")
        address = upload(
            repo_id,
            files,
            model_card(record, repo_id, picture=shown if shown in files else None),
            message=f"{run_title(record)}: {record.steps} steps (aligndet_hf {__version__})",
            local_card=card,
            revision=arguments.hub_revision,
            token=getattr(arguments, "hub_token", None),
        )
    print(f"Uploaded to {address}")


def tell_comparison(folders: Iterable[Path], results: Mapping) -> None:
    """
    Writes the cards of runs anew, with what came of the comparison that they are part of.

    Args:
        folders (`Iterable[Path]`): The folders of finished runs of pre-training and fine-tuning.
        results (`Mapping`): What [`~aligndet_hf.commands.compare.compare`] writes to `results.json`.
    """
    for folder in folders:
        record = read_run(folder)
        record.comparison = summary(results)
        write_card(folder / "README.md", model_card(record, folder.name, record.product, _picture(folder)))


def _picture(folder: Path) -> str | None:
    """The picture that the card of a run shows."""
    return next((name for name in IN_CARDS if (folder / name).is_file()), None)


def _told_pictures(names: list[str], are_uploaded: bool) -> str:
    """How much of the user's images an upload shows."""
    if not names:
        return "none of them shows your images"
    listed = f"{len(names)} picture{'s' * (len(names) > 1)} of your images ({', '.join(names)})"
    return f"with {listed} in {REPORT}" if are_uploaded else f"without the {listed}: --push_pictures uploads them too"


def _model_files(folder: Path) -> dict[str, Path]:
    """What loads the model of a folder: also the code that its config names, and no other."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pipelines = [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
    code = {f"{name.split('.')[0]}.py" for name in [*config.get("auto_map", {}).values(), *pipelines]}
    found = [path for pattern in _MODEL_FILES for path in folder.glob(pattern)]
    return {path.name: path for path in [*found, *(path for path in folder.glob("*.py") if path.name in code)]}
