"""Cards of data sets with proposals, and their upload to the Hub."""

from collections.abc import Mapping
from pathlib import Path

import datasets
import yaml

from .. import __version__
from ..cards import BEGIN, END, citations, inert, told, told_settings
from ..hub import HubArguments, clear_hub_errors, upload

TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
SIZES = [("n<1K", 1000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000), ("1M<n<10M", 10**7)]
COLUMNS = {
    "image": "the image, byte for byte as it was",
    "proposals": "`bbox`: boxes in pixels, `[x, y, width, height]`, best first; `score`: higher is better",
    "objects": "the labels that the data set came with; no proposal knows of them",
}


def push_dataset(
    dataset: datasets.Dataset | datasets.DatasetDict, report: Mapping, repo_id: str, arguments: HubArguments
) -> None:
    """
    Uploads a data set with proposals, as Parquet files, and its card.

    Args:
        dataset (`datasets.Dataset` or `datasets.DatasetDict`): With the column `proposals`.
        report (`Mapping`): The content of its `proposals.json`.
        repo_id (`str`): The repository, see [`~aligndet_hf.hub.open_repository`].
        arguments ([`HubArguments`]): `hub_revision` and `card_license` count.

    Raises:
        OSError: the upload failed. The data set is complete on disk; to repeat the upload, run the same command.
    """
    message = f"Images with proposals (aligndet_hf {__version__})"
    images = sum(numbers["images"] for numbers in report["statistics"].values())
    print(f"Uploading a data set to {repo_id}: all of its {images:,} images, and their boxes")
    with clear_hub_errors(repo_id):
        dataset.push_to_hub(repo_id, commit_message=message, revision=arguments.hub_revision)
    card = dataset_card(dataset, report, repo_id, arguments.card_license)
    message = f"Card of the proposals (aligndet_hf {__version__})"
    address = upload(repo_id, {}, card, message=message, repo_type="dataset", revision=arguments.hub_revision)
    print(f"Uploaded to {address}")


def dataset_card(
    dataset: datasets.Dataset | datasets.DatasetDict, report: Mapping, repo_id: str, license: str | None = None
) -> str:
    """
    The card of a data set with proposals.

    Args:
        dataset (`datasets.Dataset` or `datasets.DatasetDict`): With the column `proposals`.
        report (`Mapping`): The content of its `proposals.json`.
        repo_id (`str`): What to load it by.
        license (`str`, *optional*): Hub name of its licence. Left out if it is not given.

    Returns:
        `str`: the card, metadata first.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    splits = dataset if isinstance(dataset, datasets.DatasetDict) else {str(dataset.split or "train"): dataset}
    columns = next(iter(splits.values())).column_names
    statistics, settings = report["statistics"], report["settings"]
    is_searched = settings.get("source") in ("selective_search", "opencv")
    images = sum(numbers["images"] for numbers in statistics.values())
    card = DatasetCard.from_template(
        DatasetCardData(
            license=license,
            task_categories=["object-detection"],
            tags=["object-detection", "aligndet-hf", "object-proposals"],
            size_categories=[next((name for name, limit in SIZES if images < limit), "n>10M")],
        ),
        template_path=str(TEMPLATE),
        begin=BEGIN,
        end=END,
        title=f"{inert(told(report['dataset']))} with object proposals",
        inert=inert,
        repo_id=repo_id,
        split=next(iter(splits)),
        images=images,
        statistics=statistics,
        columns=[(name, COLUMNS.get(name, "of the data set it was made from")) for name in columns],
        has_clusters="clusters" in settings,
        agreement=report.get("clusters", {}).get("agreement"),
        proposals=describe_proposals(report),
        settings=yaml.safe_dump(_shown(settings), sort_keys=False, allow_unicode=True, width=100).strip(),
        versions=yaml.safe_dump(dict(report["versions"]), sort_keys=False).strip(),
        is_searched=is_searched,
        citations=citations(*(["selective_search"] if is_searched else []), "aligndet"),
    )
    return str(card)


def describe_proposals(report: Mapping | None) -> str | None:
    """
    How proposals were made, in a sentence.

    Args:
        report (`Mapping`, *optional*): With `settings`, see [`~aligndet_hf.data.columns.proposal_record`], and
            optionally the number of `boxes`.
    """
    if not (report and report.get("settings")):
        return None
    settings = report["settings"]
    shown = {key: settings[key] for key in ("preset", "mode", "max_boxes", "nms_threshold") if settings.get(key)}
    number = f"{report['boxes']:,} " if report.get("boxes") else ""
    words = f"The {number}proposals are {_source(settings)}" + "".join(f", {key} {shown[key]}" for key in shown)
    if clusters := settings.get("clusters"):
        words += f"; their {clusters['num_clusters']} pseudo-classes are clusters of features of a frozen backbone"
    return words + "."


def _source(settings: Mapping) -> str:
    return {
        "selective_search": "boxes of selective search",
        "opencv": "boxes of OpenCV's selective search",
        "detector": f"what a trained model finds ({inert(told(settings.get('detector')))})",
        "json": "boxes of a proposal file",
        "column": "boxes that the data set had",
        "random": "random boxes, as a control",
    }.get(settings.get("source"), "boxes of an unrecorded source")


def _shown(settings: Mapping) -> dict:
    """The settings without the hashes of the input."""
    settings = told_settings(settings)
    return {
        key: _shown(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not key.startswith("input_") and not key.endswith("_content")
    }
