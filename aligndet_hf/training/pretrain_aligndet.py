"""AlignDet's own part of a pre-training run: its model and its views."""

from collections.abc import Callable

import datasets
import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..data.arrow_boxes import read_values
from ..data.collate import collate_views
from ..data.dataset import ProposalViews
from ..data.errors import DataError
from ..detectors.backbone_weights import BackboneReport
from ..detectors.build import build_image_processor, ignored_note, is_new, load_detector, require_useful_backbone
from ..detectors.families import family_of, num_queries, require_fitting_sizes
from ..detectors.transfer import TransferReport, transfer_detector
from ..models import AlignDetConfig, AlignDetForPreTraining
from .pretrain_arguments import PretrainArguments
from .start import training_view

logger = logging.get_logger(__name__)


def class_names(arguments: PretrainArguments, dataset: datasets.Dataset) -> dict[int, str]:
    """One class, or one for each cluster that the proposals mention."""
    if not arguments.use_clusters:
        return {0: "object"}
    if arguments.streaming:
        return {cluster: f"cluster_{cluster}" for cluster in range(arguments.num_clusters)}
    highest = 0
    for table in dataset.select_columns(["proposals"]).with_format("arrow").iter(batch_size=1000):
        clusters, _ = read_values(table["proposals"], "cluster")
        if len(clusters) and clusters.min() < 0:
            raise DataError(
                f"{arguments.dataset}: column 'proposals', field 'cluster' holds {clusters.min()}; expected 0, 1, ..."
            )
        highest = max(highest, int(clusters.max(initial=0)))
    return {cluster: f"cluster_{cluster}" for cluster in range(highest + 1)}


def build_model(
    arguments: PretrainArguments, dataset: datasets.Dataset
) -> tuple[AlignDetForPreTraining, BaseImageProcessor, BackboneReport | TransferReport | None]:
    """
    The model to train, the image processor to export with the detector, and the report of the weights that a new
    detector's backbone got, or of what a checkpoint for other classes passed on.
    """
    id2label = class_names(arguments, dataset)
    if note := ignored_note(arguments):
        logger.warning(f"note: {note}.")
    torch.manual_seed(arguments.seed)
    detector, report = load_detector(arguments, len(id2label), id2label)
    if detector.config.num_labels != len(id2label):  # A checkpoint for other classes.
        detector, report = transfer_detector(detector, len(id2label), id2label)
    detector.config.id2label, detector.config.label2id = id2label, {name: i for i, name in id2label.items()}
    config, is_random = dict(arguments.aligndet_config), is_new(arguments) and report is None
    is_frozen = config.get("freeze_backbone", False) or config.get("trainable_backbone_stages") is not None
    if note := require_useful_backbone(detector, is_random, is_frozen, arguments.freeze_batch_norm):
        logger.warning(f"note: {note}.")
        config["freeze_backbone"] = False
    model = AlignDetForPreTraining.from_detector(detector, **config).train()
    if arguments.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    sizes = sorted(arguments.image_sizes)
    # Families of square images are evaluated at the middle of the sizes they were trained with, others at the largest.
    size = sizes[len(sizes) // 2] if family_of(detector.config).resize == "square" else sizes[-1]
    return model, build_image_processor(detector, size, arguments.max_size), report


def enable_gradient_checkpointing(model: AlignDetForPreTraining) -> None:
    """
    Has the layers of encoder and decoder computed again in the backward pass, instead of kept.

    Raises:
        `ValueError`: the family's layers cannot be, in transformers.
    """
    # Asked of this model, since some detectors deny what all of their layers can do.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the new name
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"gradient_checkpointing: transformers has none for {model.config.detector_config.model_type} "
            "(docs/families.md). To save memory, lower the image_sizes or the batch, or give --bf16"
        ) from error


def build_views(
    arguments: PretrainArguments, accelerator: Accelerator, dataset: datasets.Dataset, config: AlignDetConfig
) -> tuple[ProposalViews, Callable]:
    """The data set of views for a model of this config, and the function that makes batches of its items."""
    detector_config = config.detector_config
    family = family_of(detector_config)
    queries = arguments.max_proposals if family.own_loss else num_queries(detector_config)
    require_fitting_sizes(detector_config, arguments.image_sizes)
    if arguments.max_proposals > queries:
        accelerator.print(f"The detector has {queries} queries: at most {queries} proposals per image are used.")
    views = ProposalViews(
        dataset,
        training_view(arguments, family.resize),
        seed=arguments.seed,
        max_proposals=min(arguments.max_proposals, queries),
        proposal_sampling=arguments.proposal_sampling,
        use_clusters=arguments.use_clusters,
    )
    return views, collate_views
