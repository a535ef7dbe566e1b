"""Model cards of pre-trained and fine-tuned detectors: Hub metadata, what was run, what was measured, and the limits.

A card states only what the record of the run does: no number without a measurement, no licence that nobody chose, no
path of the machine it was written on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from ..cards import BEGIN, END, citations, hub_ids, inert, told, told_settings
from ..data.dataset_card import describe_proposals
from ..detectors.families import family_of
from ..evaluation.coco_metrics import exists
from .run_record import RunRecord

TEMPLATE = Path(__file__).with_name("model_card_template.md")

# The numbers a leaderboard reads; the card's table has all twelve.
INDEXED = {"AP": "AP (IoU 0.50:0.95)", "AP50": "AP50", "AP75": "AP75", "AR100": "AR (100 detections)"}
CODE_NOTE = " The model's code lies beside its weights."
COCO_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


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
    if record.kind == "finetune":
        return _finetuning_card(record, name, picture)
    return (_soco_card if record.method == "soco" else _pretraining_card)(record, name, subfolder, picture)


def _pretraining_card(record: RunRecord, name: str, subfolder: str | None, picture: str | None) -> str:
    place = f'path, subfolder="{subfolder}"' if subfolder else "path"
    has_code = _has_code(record)
    trust = ", trust_remote_code=True" if has_code else ""
    return _card(
        record,
        picture=picture,
        summary=(
            "The whole detector, not only its backbone, was pre-trained on unlabelled images: it learnt to find the "
            "boxes that an unsupervised proposal algorithm draws and to tell their contents apart. **It is a start "
            "for fine-tuning, not a detector**: its classes are proposals, not categories."
        ),
        usage=(
            "from transformers import AutoImageProcessor, AutoModelForObjectDetection\n\n"
            f'path = "{name}"\n'
            'id2label = {0: "cat", 1: "dog"}  # yours\n'
            "label2id = {name: index for index, name in id2label.items()}\n"
            f"processor = AutoImageProcessor.from_pretrained({place})\n"
            f"# A new class layer; everything else is kept.{CODE_NOTE if has_code else ''}\n"
            "detector = AutoModelForObjectDetection.from_pretrained(\n"
            f"    {place}, id2label=id2label, label2id=label2id, ignore_mismatched_sizes=True{trust}\n"
            ")"
        ),
        limits=[
            "The class scores mean nothing before fine-tuning.",
            "What it takes for an object is what the proposal algorithm took for one: things with a closed, "
            "contrasting outline. Parts, crowds and textures are among them.",
            *_unmeasured(record),
        ],
        tags=["aligndet", "self-supervised-learning", "pretraining"],
    )


def _soco_card(record: RunRecord, name: str, subfolder: str | None, picture: str | None) -> str:
    has_head = record.config.variant != "c4"
    path = f"{name}/{subfolder}" if subfolder else name
    usage = (
        "from aligndet_hf.detectors.build import build_detector\n\n"
        f'detector = build_detector("rt_detr", backbone="{path}", num_labels=3)  # any family'
    )
    if has_head:
        usage += (
            "\n\n# Backbone, pyramid and box head, in a detector of torchvision with the same trunk:\n"
            "from aligndet_hf.detectors.torchvision_weights import load_torchvision_weights\n\n"
        )
        weights = f'"{name}/torchvision.safetensors"'
        if not subfolder:
            usage += "from huggingface_hub import hf_hub_download\n\n"
            weights = f'hf_hub_download("{name}", "torchvision.safetensors")'
        usage += f"print(load_torchvision_weights(faster_rcnn, {weights}))"
    return _card(
        record,
        picture=picture,
        summary=(
            f"A backbone{', its feature pyramid and a box head were' if has_head else ' was'} pre-trained on "
            "unlabelled images: boxes that an unsupervised proposal algorithm draws are to be recognised in other "
            "crops, sizes and colours. **It is a start for training detectors, and detects nothing by itself.**"
        ),
        usage=usage,
        limits=["What it takes for an object is what the proposal algorithm took for one.", *_unmeasured(record)],
        tags=["soco", "self-supervised-learning", "pretraining"],
    )


def _unmeasured(record: RunRecord) -> list[str]:
    return [] if record.comparison else ["Nothing was measured on labelled data for this card."]


def _finetuning_card(record: RunRecord, name: str, picture: str | None) -> str:
    names = [inert(record.config.id2label[index]) for index in sorted(record.config.id2label)]
    limits = [
        "One run with one seed: differences of a point or two of AP can be chance.",
        "It knows the classes and the kind of images it was trained on, and was tested on no others.",
    ]
    if not record.metrics:
        limits.insert(0, "Nothing was measured for this card: the run had no evaluation data.")
    return _card(
        record,
        picture=picture,
        summary=f"Detects {len(names)} {'class' if len(names) == 1 else 'classes'}: {_some(names)}.",
        usage=_pipeline_usage(record, name),
        limits=limits,
    )


def _has_code(record: RunRecord) -> bool:
    """Whether transformers lacks the model, whose code then lies beside its weights."""
    return bool(getattr(record.config, "auto_map", None))


def _pipeline_usage(record: RunRecord, name: str) -> str:
    """How to detect objects in a file; one with more than 8 bits becomes the picture that training has seen."""
    file, note, trust = "image.jpg", "", ""
    if _has_code(record):
        note = f"#{CODE_NOTE}\n"
    if record.pixel_window is not None:
        low, high = record.pixel_window
        file = "image.png"
        note = (
            f"# The grey levels {low:g} to {high:g} become 0 to 255, as in training: deep_images.py, beside the\n"
            "# weights, does it. Without it all levels above 255 would be white.\n"
        )
    if note:
        trust = ", trust_remote_code=True"
    return (
        f'from transformers import pipeline\n\n{note}detect = pipeline("object-detection", model="{name}"{trust})\n'
        f'detect("{file}", threshold={record.threshold or 0.3:.2g})'
    )


def _card(record: RunRecord, *, summary, usage, limits, picture, tags=()) -> str:
    """Fills the template; the functions above say what with."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title, is_detector = run_title(record), record.method == "aligndet"
    measured = record.metrics if record.kind == "finetune" else {}
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
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection" if is_detector else "image-feature-extraction",
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
        title=inert(title),
        inert=inert,
        plain=is_detector,
        has_code=_has_code(record),
        summary=summary,
        picture=picture,
        facts=_facts(record),
        usage=usage,
        training=describe_training(record, inert),
        proposals=describe_proposals(record.proposals),
        settings=yaml.safe_dump(_recipe(record), sort_keys=False, allow_unicode=True, width=100).strip(),
        command=record.command,
        versions=", ".join(f"{name} {version}" for name, version in record.versions.items()),
        limits=limits,
        citations=papers(record),
        protocol=describe_protocol(record, inert),
        results=percentages(measured, COCO_KEYS),
        per_class=_per_class(record, measured),
        pretrained=_describe_pretraining(record),
        comparison=record.comparison,
        transfer=_transfer_table(record),
        backbone=inert(describe_backbone(record.backbone)) if record.backbone else None,
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


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What one wants to know before a download: rows of name and value."""
    facts = []
    if record.parameters:
        facts.append(("parameters", f"{record.parameters / 1e6:.1f} million"))
    if size := record.input_size:
        if "height" in size:
            facts.append(("input", f"{size['height']} × {size['width']} pixels"))
        elif "shortest_edge" in size:
            facts.append(
                ("input", f"shorter side {size['shortest_edge']} pixels, longer at most {size.get('longest_edge')}")
            )
    if record.threshold:
        facts.append(("threshold", f"{record.threshold:.2f}, where F1 was highest on the evaluation images"))
    if speed := record.speed:
        threads = f", {speed['threads']} thread{'s' * (speed['threads'] > 1)}" if "threads" in speed else ""
        facts.append(
            (
                "latency",
                f"{speed['milliseconds']:.1f} ms: forward pass of one image ({speed['height']} × {speed['width']}, "
                f"{speed['dtype']}) on {speed['device']}{threads}, the device of this run, measured at its end",
            )
        )
    return facts


def _per_class(record: RunRecord, measured: Mapping) -> list[tuple[str, str, str]]:
    """Name, AP and best threshold of each class."""
    best = (record.diagnosis or {}).get("per_class", {})
    rows = percentages(measured.get("per_class", {}))
    return [(name, ap, f"{best[name]['best_threshold']:.2f}" if name in best else "–") for name, ap in rows]


def _describe_pretraining(record: RunRecord) -> str | None:
    if record.pretrained is None:
        return None
    before = record.pretrained
    told = (
        f"Before fine-tuning: {describe_training(before, inert)} {describe_proposals(before.proposals) or ''}".strip()
    )
    if before.backbone:
        told += f" {inert(describe_backbone(before.backbone))}"
    return told


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


def percentages(values: Mapping, keys: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Names and values as a table shows them, of numbers from 0 to 1."""
    keys = [key for key in (values if keys is None else keys) if key in values]
    return [(key, f"{100 * values[key]:.1f}" if exists(values[key]) else "no such object") for key in keys]


def _some(names: Sequence[str], limit: int = 40) -> str:
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def _transfer_table(record: RunRecord) -> str | None:
    if record.transfer is None:
        return None
    lines = [f"From {inert(told(record.base_model))}, by tensor:" if record.base_model else "By tensor:", ""]
    lines += ["| what became of it | tensors | such as |", "|---|---|---|"]
    for kind in ("kept", "reset", "mismatched", "frozen"):
        names = list(record.transfer.get(kind, ()))
        lines.append(f"| {kind} | {len(names)} | {', '.join(f'`{name}`' for name in names[:3])} |")
    return "\n".join(lines)
