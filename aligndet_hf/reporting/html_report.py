"""One HTML file that tells a run, with its pictures in it, and needs nothing else to be read."""

import base64
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..cards import told, told_settings
from ..data.dataset_card import describe_proposals
from ..files import write_text
from .model_card import (
    COCO_KEYS,
    describe_backbone,
    describe_protocol,
    describe_training,
    exists,
    percentages,
    run_title,
)
from .pictures import has_matplotlib
from .plots import plot_curves, read_history
from .run_record import RunRecord, read_json, read_run

TEMPLATE = Path(__file__).with_name("report_template.html")
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


@dataclass(frozen=True)
class Section:
    """
    A part of a report; whatever is given is shown, in this order.

    Attributes:
        title (`str`): The heading.
        text (`list[str]`): Paragraphs.
        tables (`list[list[tuple]]`): Tables of rows of cells; the first row is the head.
        bars (`list[tuple[str, str, float]]`): Name, value and length (0 to 1) of bars.
        pictures (`list[tuple[str, str]]`): Title and data URI of pictures.
        code (`str`, *optional*): Lines to copy.
        details (`list[tuple[str, str]]`): Title and text of what is folded away.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[list[tuple]] = field(default_factory=list)
    bars: list[tuple[str, str, float]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    code: str | None = None
    details: list[tuple[str, str]] = field(default_factory=list)


def write_report(folder: str | Path, path: str | Path | None = None, with_pictures: bool = True) -> Path:
    """
    Writes one HTML file on what is in the folder of a run: numbers, curves, pictures, settings, versions.

    Everything is in the file, and all that came from data is escaped. Curves need matplotlib, and are left out without
    it. Of the files in the folder are read: what `aligndet pretrain` and `aligndet finetune` record, every other JSON
    file of an aligndet command, and every PNG.

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
    import jinja2

    folder = Path(folder)
    path = Path(path) if path else folder / REPORT
    try:
        record = read_run(folder)
        title, subtitle, sections = _of_run(record, folder)
        tiles = _tiles(record)
    except ValueError as error:
        title, subtitle, tiles = f"What is in {folder.resolve().name}", "", []
        sections = _of_files(folder)
        if not sections:
            raise ValueError(f"{error}, nor a JSON file or a picture of another command") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=[section for section in sections if with_pictures or section.title != PICTURES],
    )
    write_text(path, page)
    return path


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    tiles = []
    for key, name, is_share in TILES[record.kind]:
        if exists(value := record.metrics.get(key)):
            tiles.append((name, f"{100 * value:.1f} %" if is_share else f"{value:.3g}"))
    counts = [("images", record.images), ("steps", record.steps)]
    return tiles + [(name, f"{count:,}") for name, count in counts if count]


def _of_run(record: RunRecord, folder: Path) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of a run of pre-training or fine-tuning."""
    subtitle = " ".join(filter(None, [describe_training(record), describe_proposals(record.proposals)]))
    sections = []
    if record.kind == "finetune" and record.metrics:
        classes = record.metrics["per_class"]
        values = dict(percentages(classes))
        sections.append(
            Section(
                "Results",
                text=[describe_protocol(record)],
                tables=[[("metric", "value"), *percentages(record.metrics, COCO_KEYS)]],
                bars=[(name, values[name], max(classes[name], 0) if exists(classes[name]) else 0) for name in classes],
            )
        )
    sections.append(Section("Curves", pictures=list(_curves(folder))))
    sections.append(Section(PICTURES, pictures=list(_pictures(folder))))
    start = [describe_backbone(record.backbone)] if record.backbone else []
    if record.transfer:
        names = {kind: record.transfer.get(kind, []) for kind in ("kept", "reset", "mismatched", "frozen")}
        start.insert(0, f"Transfer {record.transfer.get('preset', '')}" + _source(record))
        rows = [("tensors", "number"), *((kind, len(tensors)) for kind, tensors in names.items())]
        details = [(f"{kind}: {len(tensors)}", "\n".join(tensors)) for kind, tensors in names.items() if tensors]
        sections.append(Section("What the weights started from", text=start, tables=[rows], details=details))
    elif start:
        sections.append(Section("What the weights started from", text=start))
    if (record.proposals or {}).get("settings"):
        sections.append(Section("Proposals", tables=[_table(told_settings(record.proposals))]))
    sections.append(
        Section(
            "How it was made",
            code=record.command,
            tables=[_table(told_settings(record.settings)), [("package", "version"), *record.versions.items()]],
        )
    )
    return run_title(record), subtitle, [section for section in sections if section != Section(section.title)]


def _source(record: RunRecord) -> str:
    return f" from {told(record.base_model)}" if record.base_model else ""


def _of_files(folder: Path) -> list[Section]:
    """A section for every JSON file of a folder, and the pictures."""
    sections = [Section(PICTURES, pictures=list(_pictures(folder)))]
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if isinstance(content, Mapping) and path.name not in ("state.json", "dataset_info.json", "dataset_dict.json"):
            sections.append(Section(path.stem, tables=[_table(told_settings(content))]))
    return [section for section in sections if section != Section(section.title)]


def _table(values: Mapping) -> list[tuple]:
    """A table of nested settings: `{"a": {"b": 1}}` is the row `a.b`, `1`."""
    return [("name", "value"), *_rows(values)]


def _rows(values: Mapping, prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _rows(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.6g}"
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _curves(folder: Path) -> Iterable[tuple[str, str]]:
    """What a run logged, drawn."""
    if not has_matplotlib():
        return
    try:
        history = read_history(folder)
    except FileNotFoundError:
        return
    logged = {key for entry in history for key in entry}
    with tempfile.TemporaryDirectory() as scratch:
        for name, keys in CURVES.items():
            if keys := [key for key in keys if key in logged]:
                yield name, data_uri(plot_curves({name: history}, Path(scratch) / "curves.png", keys))


def pictures_of(folder: Path) -> list[Path]:
    """The pictures in the folder of a run, which show images of its data."""
    return sorted(folder.glob("*.png"))


def _pictures(folder: Path) -> Iterable[tuple[str, str]]:
    for path in pictures_of(folder):
        yield path.stem.replace("_", " "), data_uri(path)


def data_uri(path: Path) -> str:
    """A PNG as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
