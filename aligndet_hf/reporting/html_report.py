"""One HTML file that tells a run, with its pictures in it, and needs nothing else to be read."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..cards import told, told_settings
from ..data.dataset_card import describe_proposals
from ..evaluation.coco_metrics import SUMMARY, exists
from ..files import read_json
from ..runs import flattened
from .comparison_page import comparison_page, is_comparison
from .diagnosis_page import diagnosis_section
from .model_card import describe_backbone, describe_protocol, describe_training, percentages, run_title
from .page import Section, picture_uri, write_page
from .pictures import has_matplotlib
from .plots import plot_curves, read_history
from .pretraining_page import numbers_section
from .run_record import DIAGNOSIS, RESULTS, RunRecord, read_run

REPORT = "report.html"
PICTURES = "Pictures"  # the section with the images of the data

# What is drawn of a log, as far as it was logged: a panel each.
CURVES = {
    "Losses": ("loss", "loss_ce", "loss_vfl", "loss_bbox", "loss_giou", "loss_contrastive"),
    "Embeddings": (
        "positive_similarity", "negative_similarity", "rank_accuracy", "embedding_spread", "matched_proposals",
    ),
    "Best boxes": ("best_box_sameness", "best_box_borders"),
    "Accuracy": ("eval_AP", "eval_AP50", "eval_AP75"),
    "Training": ("learning_rate", "momentum", "gradient_norm", "grad_norm", "images_per_second"),
}  # fmt: skip
# The numbers at the top: key, name, and whether it is a share.
TILES = {
    "finetune": [("AP", "AP", True), ("AP50", "AP50", True), ("AP75", "AP75", True), ("AR100", "AR, 100 boxes", True)],
    "pretrain": [
        ("loss", "loss at the end", False), ("rank_accuracy", "rank accuracy", True),
        ("embedding_spread", "embedding spread", False), ("matched_proposals", "matched proposals", True),
    ],
}  # fmt: skip


def write_report(folder: str | Path, path: str | Path | None = None, with_pictures: bool = True) -> Path:
    """
    Writes one HTML file on what is in the folder of a run: numbers, curves, pictures, settings, versions.

    Everything is in the file, and all that came from data is escaped. Curves need matplotlib, and are left out without
    it. Of the files in the folder are read: what `aligndet pretrain` and `aligndet finetune` record, every other JSON
    file of an aligndet command, and every PNG and JPEG.

    Args:
        folder (`str` or `Path`): The `output_dir` of a command.
        path (`str` or `Path`, *optional*): The file to write; `report.html` in the folder by default.
        with_pictures (`bool`, *optional*, defaults to `True`): Whether to put the folder's pictures in it, which are
            made of the user's images.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: the folder holds nothing to report.
    """
    folder = Path(folder)
    path = Path(path) if path else folder / REPORT
    tiles, subtitle, lead = [], "", ""
    if is_comparison(content := read_json(folder / RESULTS)):
        title, lead, sections = comparison_page(folder, content, PICTURES)
    elif is_evaluation(content):
        title, subtitle, sections = _of_evaluation(content, folder)
        tiles = _tiles(content["metrics"], "finetune", images=content["images"])
    else:
        try:
            record = read_run(folder)
            title, subtitle, sections = _of_run(record, folder)
            tiles = _tiles(record.metrics, record.kind, images=record.images, steps=record.steps)
        except ValueError as error:
            title, sections = f"What is in {folder.resolve().name}", _of_files(folder)
            if not any(section.tables for section in sections):
                raise ValueError(f"{error}, nor a JSON file or a picture of another command") from error
    sections = [section for section in sections if with_pictures or section.title != PICTURES]
    return write_page(path, title, sections, subtitle, lead, tiles)


def is_evaluation(results: Mapping | None) -> bool:
    """Whether this is the `results.json` of `aligndet evaluate`."""
    return results is not None and {"detector", "dataset", "split", "metrics"} <= results.keys()


def _tiles(metrics: Mapping, kind: str, **counts: int | None) -> list[tuple[str, str]]:
    tiles = []
    for key, name, is_share in TILES[kind]:
        if exists(value := metrics.get(key)):
            tiles.append((name, f"{100 * value:.1f} %" if is_share else f"{value:.3g}"))
    return tiles + [(name, f"{count:,}") for name, count in counts.items() if count]


def _of_evaluation(results: Mapping, folder: Path) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of what `aligndet evaluate` has measured."""
    split, images = results["split"], results["images"]
    subtitle = f"{told(results['detector'])} on {told(results['dataset'])}, split {split}, {images:,} images."
    sections = [_results(results["metrics"], []), *_diagnosis(folder), Section(PICTURES, pictures=_pictures(folder))]
    return f"{told(results['detector'])} measured on {told(results['dataset'])}", subtitle, sections


def _results(metrics: Mapping, text: list[str]) -> Section:
    classes = metrics["per_class"]
    values = dict(percentages(classes))
    bars = [(name, values[name], max(classes[name], 0) if exists(classes[name]) else 0) for name in classes]
    return Section(
        "Results",
        text=text,
        tables=[[("metric", "value"), *percentages(metrics, SUMMARY)]],
        more=[Section("AP of each class", bars=bars)],
    )


def _diagnosis(folder: Path) -> list[Section]:
    diagnosis = read_json(folder / DIAGNOSIS)
    return [diagnosis_section(diagnosis)] if diagnosis else []


def _of_run(record: RunRecord, folder: Path) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of a run of pre-training or fine-tuning."""
    subtitle = " ".join(filter(None, [describe_training(record), describe_proposals(record.proposals)]))
    sections = []
    if record.kind == "finetune" and record.metrics:
        sections.append(_results(record.metrics, [describe_protocol(record)]))
    history = _history(folder)
    if record.kind == "pretrain":
        sections.append(numbers_section(record, history))
    sections.append(Section("Curves", pictures=list(_curves(history))))
    sections += _diagnosis(folder)
    sections.append(Section(PICTURES, pictures=_pictures(folder)))
    start = [describe_backbone(record.backbone)] if record.backbone else []
    rows, details = [], []
    if record.transfer:
        names = {kind: record.transfer.get(kind, []) for kind in ("kept", "reset", "mismatched", "frozen")}
        source = f" from {told(record.base_model)}" if record.base_model else ""
        start.insert(0, f"Transfer {record.transfer.get('preset', '')}{source}")
        rows = [[("tensors", "number"), *((kind, len(tensors)) for kind, tensors in names.items())]]
        details = [(f"{kind}: {len(tensors)}", "\n".join(tensors)) for kind, tensors in names.items() if tensors]
    sections.append(Section("What the weights started from", text=start, tables=rows, details=details))
    if (record.proposals or {}).get("settings"):
        sections.append(Section("Proposals", tables=[_table(told_settings(record.proposals))]))
    sections.append(
        Section(
            "How it was made",
            code=record.command,
            tables=[_table(told_settings(record.settings)), [("package", "version"), *record.versions.items()]],
        )
    )
    return run_title(record), subtitle, sections


def _of_files(folder: Path) -> list[Section]:
    """A section for every JSON file of a folder, and the pictures."""
    sections = [Section(PICTURES, pictures=_pictures(folder))]
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if isinstance(content, Mapping) and path.name not in ("state.json", "dataset_info.json", "dataset_dict.json"):
            sections.append(Section(path.stem, tables=[_table(told_settings(content))]))
    return sections


def _table(values: Mapping) -> list[tuple]:
    """A table of nested settings: `{"a": {"b": 1}}` is the row `a.b`, `1`."""
    return [("name", "value"), *((name, _text(value)) for name, value in flattened(values).items())]


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _history(folder: Path) -> list[dict]:
    """What a run logged, if it did."""
    try:
        return read_history(folder)
    except FileNotFoundError:
        return []


def _curves(history: list[dict]) -> Iterable[tuple[str, str]]:
    """What a run logged, drawn."""
    logged = {key for entry in history for key in entry}
    with tempfile.TemporaryDirectory() as scratch:
        for name, keys in CURVES.items() if has_matplotlib() else ():
            if keys := [key for key in keys if key in logged]:
                yield name, picture_uri(plot_curves({name: history}, Path(scratch) / "curves.png", keys))


def pictures_of(folder: Path) -> list[Path]:
    """The pictures in the folder of a run, which show images of its data."""
    return sorted(path for pattern in ("*.png", "*.jpg") for path in folder.glob(pattern))


def _pictures(folder: Path) -> list[tuple[str, str]]:
    return [(path.stem.replace("_", " "), picture_uri(path)) for path in pictures_of(folder)]
