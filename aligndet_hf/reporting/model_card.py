"""Model cards of pre-trained and fine-tuned detectors: Hub metadata, what was run, what was measured, and the limits.

A card states only what the record of the run does: no number without a measurement, no licence that nobody chose, no
path of the machine it was written on.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml

from ..cards import BEGIN, END, citations, hub_ids, inert, told, told_settings
from ..data.dataset_card import describe_proposals
from ..detectors.families import family_of
from ..evaluation.coco_metrics import SUMMARY, exists
from ..evaluation.diagnosis import threshold_text
from .run_record import RunRecord

TEMPLATE = Path(__file__).with_name("model_card_template.md")

# The numbers a leaderboard reads; the card's table has all twelve.
INDEXED = {"AP": "AP (IoU 0.50:0.95)", "AP50": "AP50", "AP75": "AP75", "AR100": "AR (100 detections)"}


def model_card(record: RunRecord, name: str, subfolder: str | None = None, picture: str | None = None) -> str:
    """
    The card of a detector, to be written by [`~aligndet_hf.hub.write_card`] or uploaded.

    Args:
        record ([`RunRecord`]): The run that made it.
        name (`str`): What to load it by: a Hub id, or the name of a folder.
        subfolder (`str`, *optional*): Where in it the detector lies, if not at its top.
        picture (`str`, *optional*): A file beside the card, which shows images of the user.

    Returns:
        `str`: the card, metadata first.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title, is_finetuned = run_title(record), record.kind == "finetune"
    measured = record.metrics if is_finetuned else {}
    dataset, split = record.evaluation.get("dataset") or record.dataset, record.evaluation.get("split")
    entries = [
        EvalResult(
            task_type="object-detection",
            dataset_type=told(dataset),
            dataset_name=told(dataset),
            dataset_split=split,
            metric_type="mean_average_precision" if key.startswith("AP") else "mean_average_recall",
            metric_name=name,
            metric_value=round(100 * float(measured[key]), 2),
        )
        for key, name in INDEXED.items()
        if exists(measured.get(key))
    ]
    tags = [] if is_finetuned else [record.method, "self-supervised-learning", "pretraining"]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection" if record.method == "aligndet" else "image-feature-extraction",
        tags=["object-detection", "aligndet-hf", *tags],
        license=record.license,
        datasets=hub_ids(record.dataset) or None,
        base_model=_base_model(record),
        model_name=title if entries else None,
        eval_results=entries or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        begin=BEGIN,
        end=END,
        record=record,
        title=inert(title),
        inert=inert,
        name=name,
        subfolder=subfolder,
        # The code of a model that transformers lacks lies beside its weights.
        has_code=bool(getattr(record.config, "auto_map", None)),
        classes=[inert(name) for _, name in sorted(record.config.id2label.items())] if is_finetuned else [],
        picture=picture,
        told=told,
        describe_training=describe_training,
        describe_proposals=describe_proposals,
        describe_backbone=describe_backbone,
        settings=yaml.safe_dump(_recipe(record), sort_keys=False, allow_unicode=True, width=100).strip(),
        citations=papers(record),
        protocol=describe_protocol(record, inert),
        results=percentages(measured, SUMMARY),
        per_class=_per_class(record, measured),
    )
    return str(card)


def eval_results(record: RunRecord) -> str | None:
    """
    The content of `.eval_results/*.yaml`, which the Hub reads beside the older `model-index` of the card.

    It names a data set of the Hub: `None` for images of this machine, and for what was not measured.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    datasets = hub_ids(record.evaluation.get("dataset"))
    if record.kind != "finetune" or not datasets or not exists(record.metrics.get("AP")):
        return None
    split = record.evaluation.get("split")
    entry = EvalResultEntry(
        dataset_id=datasets[0],
        task_id="object-detection",
        value=round(100 * float(record.metrics["AP"]), 2),
        notes=f"COCO AP, IoU 0.50:0.95, in percent{f', split {split}' if split else ''}; aligndet_hf",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _base_model(record: RunRecord) -> str | None:
    """The Hub id of what the weights come from: of the detector, what that was pre-trained from, or the backbone."""
    sources = [record.base_model, record.pretrained and record.pretrained.base_model]
    sources += [(one.backbone or {}).get("source") for one in (record, record.pretrained) if one]
    return next((source for source in sources if hub_ids(source)), None)


def _per_class(record: RunRecord, measured: Mapping) -> list[tuple[str, str, str]]:
    """Name, AP and best threshold of each class."""
    best = (record.diagnosis or {}).get("per_class", {})
    rows = percentages(measured.get("per_class", {}))
    return [(name, ap, threshold_text(best[name]) if name in best else "–") for name, ap in rows]


def _recipe(record: RunRecord) -> dict:
    """The settings of a run as a recipe that `--config` takes: flags only, and all that are required."""
    recipe = told_settings(record.settings)
    if (images := recipe.pop("images_per_step", None)) is not None:  # however they were spread
        recipe["per_device_train_batch_size"] = images
    return recipe | {"output_dir": f"outputs/{record.kind}"}


# ---- what cards and reports both say ----


def run_title(record: RunRecord) -> str:
    """Such as "RT-DETR fine-tuned on cells"."""
    if record.method == "soco":
        backbone = record.config.backbone_config
        name = getattr(backbone, "backbone", None) or backbone.model_type
    else:
        name = family_of(record.config).title
    methods = {"aligndet": "pre-trained with AlignDet", "soco": "pre-trained with SoCo"}
    return f"{name} {methods[record.method] if record.kind == 'pretrain' else 'fine-tuned'} on {record.data_name}"


def describe_training(record: RunRecord, quoted: Callable[[str], str] = str) -> str:
    """What was run on how much, in a sentence; `quoted` is what a page makes of names."""
    amount = [(record.images, "images"), (record.steps, "optimizer steps")]
    amount = ", ".join(f"{count:,} {unit}" for count, unit in amount if count)
    command = f"aligndet {record.kind}" + (" --method soco" if record.method == "soco" else "")
    return f"`{command}` on {quoted(record.data_name)}" + (f" ({amount})." if amount else ".")


def describe_protocol(record: RunRecord, quoted: Callable[[str], str] = str) -> str | None:
    """What the metrics of a fine-tuning run were measured on, and how; `quoted` is what a page makes of names."""
    if record.kind != "finetune" or not record.metrics:
        return None
    split, images = record.evaluation.get("split"), record.evaluation.get("images")
    where = quoted(told(record.evaluation.get("dataset") or record.dataset))
    where += (f", split `{quoted(split)}`" if split else "") + (f", {images:,} images" if images else "")
    return (
        f"COCO box metrics in percent on {where}: images as the saved image processor prepares them, no test-time "
        "augmentation, no threshold on the scores, at most 100 detections an image."
    )


def describe_backbone(report: Mapping | None) -> str | None:
    """Where the weights of a new detector's backbone come from."""
    if not report:
        return None
    return (
        f"The backbone started from {report['source']} ({len(report['matched'])} tensors loaded, "
        f"{len(report['missing'])} missing), all else from random numbers."
    )


def papers(record: RunRecord) -> list[str]:
    """The papers that a run owes: of its method, its detector family, and what its backbone's name tells."""
    started_from = [record.settings.get("backbone"), record.settings.get("backbone_weights")]
    words = re.findall(r"[a-z0-9]+", " ".join(map(str, started_from)).lower())
    source = (record.proposals or {}).get("settings", {}).get("source", "selective_search")
    keys = [record.method] if record.kind == "pretrain" else []
    keys += ["selective_search"] if keys and source in ("selective_search", "opencv") else []
    keys += ["aligndet"] if record.base_model else []  # a new detector owes the method nothing
    return citations(*keys, record.config.model_type, *(word for word in words if word in ("mae", "soco")))


def percentages(values: Mapping, keys: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Names and values as a table shows them, of numbers from 0 to 1."""
    keys = [key for key in (values if keys is None else keys) if key in values]
    return [(key, f"{100 * values[key]:.1f}" if exists(values[key]) else "no such object") for key in keys]
