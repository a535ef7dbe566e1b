"""Model cards of pre-trained and fine-tuned detectors: Hub metadata, what was run, what was measured, and the limits.

A card states only what it is given: no number without a measurement, no licence that nobody chose, no path of the
machine it was written on.
"""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

import yaml

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PACKAGES = ("aligndet-hf", "transformers", "torch", "torchvision", "timm", "datasets", "accelerate")

ALIGNDET = """@inproceedings{li2023aligndet,
  title = {AlignDet: Aligning Pre-training and Fine-tuning in Object Detection},
  author = {Li, Ming and Wu, Jie and Wang, Xionghui and Chen, Chen and Qin, Jie and Xiao, Xuefeng and Wang, Rui
            and Zheng, Min and Pan, Xin},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023},
  eprint = {2307.11077},
  archivePrefix = {arXiv}
}"""
SOCO = """@inproceedings{wei2021aligning,
  title = {Aligning Pretraining for Detection via Object-Level Contrastive Learning},
  author = {Wei, Fangyun and Gao, Yue and Wu, Zhirong and Hu, Han and Lin, Stephen},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021},
  eprint = {2106.02637},
  archivePrefix = {arXiv}
}"""
SELECTIVE_SEARCH = """@article{uijlings2013selective,
  title = {Selective Search for Object Recognition},
  author = {Uijlings, Jasper R. R. and van de Sande, Koen E. A. and Gevers, Theo and Smeulders, Arnold W. M.},
  journal = {International Journal of Computer Vision},
  volume = {104},
  pages = {154--171},
  year = {2013}
}"""

# The numbers a leaderboard reads; the card's table has all twelve.
INDEXED = {"AP": "AP (IoU 0.50:0.95)", "AP50": "AP50", "AP75": "AP75", "AR100": "AR (100 detections)"}
COCO_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Not part of how a model came to be, or nobody else's business.
UNTOLD = {
    "output_dir",
    "run_name",
    "project",
    "hub_token",
    "hub_model_id",
    "logging_dir",
    "card_license",
    "local_rank",
}


def write_pretraining_card(
    output_dir,
    *,
    detector_config,
    dataset: str,
    settings: Mapping,
    num_images: int | None = None,
    steps: int | None = None,
    base_model: str | None = None,
    license: str | None = None,
    proposals: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """
    Writes the card of a detector that AlignDet pre-trained without labels.

    Args:
        output_dir (`str` or `Path`): The folder to describe; the card is its `README.md`.
        detector_config (`PreTrainedConfig`): The configuration of the exported detector.
        dataset (`str`): Hub id or path of the images. A Hub id goes into the metadata.
        settings (`Mapping`): What was run, see [`told_settings`].
        num_images (`int`, *optional*): Number of training images.
        steps (`int`, *optional*): Number of optimizer steps taken.
        base_model (`str`, *optional*): Hub id or path of the detector that pre-training started from.
        license (`str`, *optional*): Hub name of the licence of the weights. Left out if it is not given.
        proposals (`str`, *optional*): A sentence on how the proposals were made.
        subfolder (`str`, *optional*): Where the exported detector lies in `output_dir`, if not at its top.

    Returns:
        `Path`: The card.
    """
    place = f'path, subfolder="{subfolder}"' if subfolder else "path"
    return _write(
        output_dir,
        title=f"{_family(detector_config)} pre-trained with AlignDet on {_told(dataset)}",
        summary=(
            "The whole detector, not only its backbone, was pre-trained on unlabelled images: it learnt to find the "
            "boxes that an unsupervised proposal algorithm draws and to tell their contents apart. **It is a start "
            "for fine-tuning, not a detector**: its classes are proposals, not categories."
        ),
        usage=(
            "from transformers import AutoImageProcessor, AutoModelForObjectDetection\n\n"
            f'path = "{Path(output_dir).name}"  # this folder, or its id on the Hub\n'
            'id2label = {0: "cat", 1: "dog"}  # yours\n'
            "label2id = {name: index for index, name in id2label.items()}\n"
            f"processor = AutoImageProcessor.from_pretrained({place})\n"
            "# A new class layer; everything else is kept.\n"
            "detector = AutoModelForObjectDetection.from_pretrained(\n"
            f"    {place}, id2label=id2label, label2id=label2id, ignore_mismatched_sizes=True\n"
            ")"
        ),
        training=" ".join([f"`aligndet pretrain` on {_amount(dataset, num_images, steps)}.", proposals or ""]).strip(),
        settings=settings,
        limits=[
            "The class scores mean nothing before fine-tuning.",
            "What it takes for an object is what the proposal algorithm took for one: things with a closed, "
            "contrasting outline. Parts, crowds and textures are among them.",
            "Nothing was measured on labelled data for this card.",
        ],
        metadata={"tags": ["aligndet", "self-supervised-learning", "pretraining"], "license": license}
        | _sources(dataset, base_model),
        citations=[ALIGNDET, SELECTIVE_SEARCH],
    )


def write_soco_card(
    output_dir, *, config, dataset: str, settings: Mapping, num_images: int | None = None, steps: int | None = None
) -> Path:
    """
    Writes the card of a backbone that SoCo pre-trained without labels.

    Args:
        output_dir (`str` or `Path`): The folder to describe, with the backbone in `backbone`.
        config (`SoCoConfig`): The configuration of the model.
        dataset, settings, num_images, steps: As for [`write_pretraining_card`].

    Returns:
        `Path`: The card.
    """
    backbone = getattr(config.backbone_config, "backbone", None) or config.backbone_config.model_type
    has_head = config.variant != "c4"
    return _write(
        output_dir,
        title=f"{backbone} pre-trained with SoCo on {_told(dataset)}",
        summary=(
            f"A backbone{', its feature pyramid and a box head were' if has_head else ' was'} pre-trained on "
            "unlabelled images: boxes that an unsupervised proposal algorithm draws are to be recognised in other "
            "crops, sizes and colours. **It is a start for training detectors, and detects nothing by itself.**"
        ),
        usage=(
            "from aligndet_hf.detectors.build import build_detector\n\n"
            f'path = "{Path(output_dir).name}/backbone"  # in a copy of this folder\n'
            'detector = build_detector("rt_detr", backbone=path, num_labels=3)  # any family'
            + (
                "\n\n# Backbone, pyramid and box head, in a detector of torchvision with the same trunk:\n"
                "from aligndet_hf.detectors.torchvision_weights import load_torchvision_weights\n\n"
                f'print(load_torchvision_weights(faster_rcnn, "{Path(output_dir).name}/torchvision.safetensors"))'
                if has_head
                else ""
            )
        ),
        training=f"`aligndet pretrain --method soco` on {_amount(dataset, num_images, steps)}.",
        settings=settings,
        limits=[
            "What it takes for an object is what the proposal algorithm took for one.",
            "Nothing was measured on labelled data for this card.",
        ],
        metadata={"tags": ["soco", "self-supervised-learning", "pretraining"]} | _sources(dataset, None),
        citations=[SOCO, SELECTIVE_SEARCH],
        plain=False,
    )


def write_finetuning_card(
    output_dir,
    *,
    detector_config,
    dataset: str,
    settings: Mapping,
    results: Mapping | None = None,
    eval_dataset: str | None = None,
    eval_split: str | None = None,
    num_images: int | None = None,
    num_eval_images: int | None = None,
    steps: int | None = None,
    base_model: str | None = None,
    license: str | None = None,
    transfer: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """
    Writes the card of a fine-tuned detector.

    Args:
        output_dir (`str` or `Path`): The folder of the detector; the card is its `README.md`.
        detector_config (`PreTrainedConfig`): The configuration of the detector.
        dataset (`str`): Hub id or path of the training data. A Hub id goes into the metadata.
        settings (`Mapping`): What was run, see [`told_settings`].
        results (`Mapping`, *optional*): What `CocoMetrics.compute()` gave, 0 to 1. Without it the card has no numbers.
        eval_dataset, eval_split (`str`, *optional*): What `results` were measured on; `dataset` by default.
        num_images, num_eval_images, steps (`int`, *optional*): Training images, evaluated images, optimizer steps.
        base_model (`str`, *optional*): Hub id or path of the detector that fine-tuning started from.
        license (`str`, *optional*): Hub name of the licence of the weights. Left out if it is not given.
        transfer (`Mapping[str, Sequence[str]]`, *optional*):
            The transfer report: names of tensors under `kept`, `reset`, `mismatched`, `frozen`.

    Returns:
        `Path`: The card.
    """
    names = [detector_config.id2label[index] for index in sorted(detector_config.id2label)]
    eval_dataset = eval_dataset or dataset
    measured_on = _told(eval_dataset) + (f", split `{eval_split}`" if eval_split else "")
    measured_on += f", {num_eval_images:,} images" if num_eval_images else ""
    limits = [
        "One run with one seed: differences of a point or two of AP can be chance.",
        "It knows the classes and the kind of images it was trained on, and was tested on no others.",
    ]
    if not results:
        limits.insert(0, "Nothing was measured for this card: the run had no evaluation data.")
    return _write(
        output_dir,
        title=f"{_family(detector_config)} fine-tuned on {_told(dataset)}",
        summary=f"Detects {len(names)} {'class' if len(names) == 1 else 'classes'}: {_some(names)}.",
        usage=(
            "from transformers import pipeline\n\n"
            f'path = "{Path(output_dir).name}"  # this folder, or its id on the Hub\n'
            'detect = pipeline("object-detection", model=path)\n'
            'detect("image.jpg", threshold=0.3)'
        ),
        training=f"`aligndet finetune` on {_amount(dataset, num_images, steps)}.",
        settings=settings,
        limits=limits,
        metadata={"license": license} | _sources(dataset, base_model),
        citations=[ALIGNDET] if base_model else [],  # a new detector owes the method nothing
        results=results,
        result_dataset=(eval_dataset, eval_split),
        protocol=(
            f"COCO box metrics in percent on {measured_on}: images as the saved image processor prepares them, no "
            "test-time augmentation, no threshold on the scores."
        ),
        transfer=_transfer_table(transfer, base_model),
    )


def _write(
    output_dir,
    *,
    title,
    summary,
    usage,
    training,
    settings,
    limits,
    metadata,
    citations,
    results=None,
    result_dataset=(None, None),
    protocol=None,
    transfer=None,
    plain=True,
) -> Path:
    """Fills the template; the two public functions say what with."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    entries = []
    if results:
        dataset, split = result_dataset
        entries = [
            EvalResult(
                task_type="object-detection",
                dataset_type=(_hub_ids(dataset) or [_told(dataset)])[0],
                dataset_name=_told(dataset),
                dataset_split=split,
                metric_type="mean_average_precision" if key.startswith("AP") else "mean_average_recall",
                metric_name=name,
                metric_value=round(100 * float(results[key]), 2),
            )
            for key, name in INDEXED.items()
            if _exists(results.get(key))
        ]
    metadata = {key: value for key, value in metadata.items() if value}
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection" if plain else "image-feature-extraction",
        model_name=title if entries else None,
        eval_results=entries or None,
        **metadata | {"tags": ["object-detection", "aligndet-hf", *metadata.get("tags", [])]},
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        summary=summary,
        usage=usage,
        training=training,
        settings=yaml.safe_dump(told_settings(settings), sort_keys=False, allow_unicode=True, width=100).strip(),
        versions=versions(),
        limits=limits,
        citations=citations,
        protocol=protocol,
        plain=plain,
        results=_rows(results, COCO_KEYS),
        per_class=_rows((results or {}).get("per_class"), (results or {}).get("per_class", ())),
        transfer=transfer,
    )
    path = Path(output_dir) / "README.md"
    card.save(path)
    return path


def told_settings(settings: Mapping) -> dict:
    """The settings of a run as a card tells them: plain values, no secrets, and of paths only the last part."""
    return {
        key: _plain(value)
        for key, value in settings.items()
        if key not in UNTOLD and not key.endswith("token") and value is not None
    }


def _plain(value):
    """What YAML can hold: enums by value, paths by their last part."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value)):
        return _told(value)
    return value if isinstance(value, bool | int | float | str) else str(value)


def _sources(dataset: str, base_model: str | None) -> dict:
    """Metadata about where a model comes from: what is on the Hub."""
    return {"datasets": _hub_ids(dataset), "base_model": (_hub_ids(base_model) or [None])[0]}


def _amount(dataset: str, num_images: int | None, steps: int | None) -> str:
    amount = [f"{count:,} {unit}" for count, unit in ((num_images, "images"), (steps, "optimizer steps")) if count]
    return _told(dataset) + (f" ({', '.join(amount)})" if amount else "")


def _hub_ids(source) -> list[str]:
    """`[source]` if it can be a Hub id and is not a path of this machine, else nothing."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(source, str) or Path(source).exists() or source.count("/") != 1:
        return []
    try:
        validate_repo_id(source)
    except HFValidationError:
        return []
    return [source]


def _told(source) -> str:
    """A Hub id as it is; of a path only the last part."""
    return source if _hub_ids(source) else Path(str(source).replace("\\", "/")).name


def _family(config) -> str:
    return type(config).__name__.removesuffix("Config")


def _some(names: Sequence[str], limit: int = 40) -> str:
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def _exists(value) -> bool:
    """COCO says -1 (and some tools NaN) where there is nothing to measure."""
    return value is not None and value >= 0


def _rows(values: Mapping | None, keys) -> list[tuple[str, str]]:
    if not values:
        return []
    return [(key, f"{100 * values[key]:.1f}" if _exists(values[key]) else "no such object") for key in keys]


def versions() -> str:
    """Python and the packages that decide what training gives, with their versions."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return ", ".join(found)


def _transfer_table(transfer: Mapping[str, Sequence[str]] | None, base_model: str | None) -> str | None:
    if transfer is None:
        return None
    lines = [f"From {_told(base_model)}, by tensor:" if base_model else "By tensor:", ""]
    lines += ["| what became of it | tensors | such as |", "|---|---|---|"]
    for kind in ("kept", "reset", "mismatched", "frozen"):
        names = list(transfer.get(kind, ()))
        lines.append(f"| {kind} | {len(names)} | {', '.join(f'`{name}`' for name in names[:3])} |")
    return "\n".join(lines)
