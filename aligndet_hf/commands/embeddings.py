"""`aligndet embeddings`: what the decoders of detectors make of labelled objects, drawn and measured."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..arguments import (
    InferenceArguments,
    LabelledArguments,
    NeighborArguments,
    OptimisationArguments,
    OutputArguments,
    ReadyDetectorArguments,
    again,
)
from ..boxes import cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh
from ..cards import told, versions
from ..data.collate import normalize_images
from ..data.errors import DataError
from ..data.formats import load_labelled
from ..detectors.backbones import get_backbone
from ..detectors.build import detector_from_config, find_detector, open_detector, open_image_processor
from ..detectors.families import family_of
from ..evaluation.detections import EvaluationImages, normalization_of
from ..files import write_json
from ..flags import flag, takes_arguments
from ..matching import match_queries
from ..processes import device_of
from ..reporting.pictures import PALETTE, legend_below, new_figure, plain_axes, save_figure
from ..runs import measuring_folder
from .knn import knn_accuracy

PICTURE, RESULTS = "embeddings.png", "embeddings.json"
UNTRAINED = "before: random but for the backbone"


@dataclass(kw_only=True)
class EmbeddingsArguments(
    OutputArguments, InferenceArguments, NeighborArguments, LabelledArguments, ReadyDetectorArguments
):
    """Arguments of [`compare_embeddings`]: the flags of `aligndet embeddings` and the keys of its recipes."""

    help_groups = {"seed": "Neighbours"}

    detector: list[str] = again(
        ReadyDetectorArguments,
        "detector",
        help="folders or Hub ids of detectors with their image processors, or folders of runs",
    )
    untrained: bool = flag(
        True, "result", "add the first detector as it was before pre-training: random but for its backbone"
    )
    output_dir: str = again(OutputArguments, "output_dir", help=f"folder for {PICTURE} and {RESULTS}")
    split: str | None = again(LabelledArguments, "split", default="validation", help="split of the dataset")
    max_objects: int = again(
        NeighborArguments,
        "max_objects",
        default=2000,
        help="look at a random choice of at most this many objects in the picture; the numbers take all",
    )
    seed: int = again(
        OptimisationArguments, "seed", help="seed of the choice, of t-SNE, and of the untrained detector"
    )


@dataclass(frozen=True)
class ObjectEmbeddings:
    """
    What a detector's decoder makes of labelled objects: of each the query whose box fits it best.

    Attributes:
        features (`np.ndarray` float32 [N, D]): Embedding of the query in the last decoder layer.
        labels (`np.ndarray` int64 [N]): Category of the object.
        rows (`np.ndarray` int64 [N]): Row of its image.
        ious (`np.ndarray` float32 [N]): IoU of the query's box and the object.
        missed (`int`): Objects without a query, in images with more objects than queries.
    """

    features: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    ious: np.ndarray
    missed: int


@takes_arguments
def compare_embeddings(arguments: EmbeddingsArguments) -> dict:
    """
    Draws the embeddings of labelled objects by t-SNE (van der Maaten and Hinton, 2008), a panel for each detector, and
    measures how often the nearest neighbours of an object in other images share its class.

    Nothing is trained. Of every object the query is taken whose box fits it best, in the last layer of the decoder,
    whatever the classes: so detectors with other classes, and those that were pre-trained without labels, compare.

    Args:
        arguments ([`EmbeddingsArguments`]): The configuration.

    Returns:
        `dict`: per detector the numbers of [`~aligndet_hf.commands.knn.knn_accuracy`], the number of `objects`, of
        those `missed`, and their mean `iou` with the boxes of their queries.

    Raises:
        DataError: the dataset is broken, or has too few objects.
        ValueError: what is named is not a detector.
        OSError: there is none on the Hub, or it has no image processor.
    """
    with measuring_folder(arguments.output_dir, "embeddings", [PICTURE, RESULTS]) as folder:
        return _measure(arguments, folder)


def _measure(arguments: EmbeddingsArguments, folder: Path) -> dict:
    """Does the work of [`compare_embeddings`]."""
    new_figure(1, 1)  # says now, not after the forward passes, that matplotlib is missing
    dataset, categories, report = load_labelled(arguments.dataset, arguments.split, arguments.image_dir)
    print(report)
    device = device_of(arguments.use_cpu)
    arms = dict(zip(_short_names(arguments.detector), arguments.detector, strict=True))
    if arguments.untrained:
        arms = {UNTRAINED: arguments.detector[0]} | arms
    for source in arguments.detector:
        find_detector(source)  # before hours of work

    found, results = {}, {}
    for name, source in arms.items():
        detector = open_detector(source)
        if name == UNTRAINED:
            detector = untrained_copy(detector, arguments.seed)
        images = EvaluationImages(dataset, categories, open_image_processor(source))
        loading = arguments.per_device_eval_batch_size, arguments.dataloader_num_workers, arguments.disable_tqdm
        own = found[name] = embed_objects(detector.to(device), images, *loading)
        try:
            measured = knn_accuracy(
                own.features, own.labels, k=arguments.num_neighbors, seed=arguments.seed, groups=own.rows
            )
        except ValueError as error:
            raise DataError(f"{arguments.dataset}, split {arguments.split}: {error}") from error
        counts = {"objects": len(own.labels), "missed": own.missed}
        results[name] = measured | counts | {"iou": float(own.ious.mean())}

    path = plot_embeddings(found, results, categories, folder / PICTURE, arguments.max_objects, arguments.seed)
    record = {
        "dataset": told(arguments.dataset),
        "split": arguments.split,
        "neighbors": arguments.num_neighbors,
        "seed": arguments.seed,
        "detectors": results,
        "versions": versions(),
    }
    write_json(folder / RESULTS, record)
    print(_format(results))
    print(f"Saved to {path}")
    return results


def _short_names(detectors: Sequence[str]) -> list[str]:
    """The last parts of paths and ids, as many as tell them apart."""
    parts = [os.path.realpath(name).removesuffix("/detector").split("/") for name in detectors]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same detector twice: {', '.join(detectors)}")


def untrained_copy(detector: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A detector as it was before pre-training: all is random but the backbone, which is the same."""
    torch.manual_seed(seed)
    copied = detector_from_config(copy.deepcopy(detector.config))
    get_backbone(copied).load_state_dict(get_backbone(detector).state_dict())
    return copied


@torch.no_grad()
def embed_objects(
    detector: PreTrainedModel,
    images: EvaluationImages,
    batch_size: int = 8,
    num_workers: int = 0,
    disable_tqdm: bool = True,
) -> ObjectEmbeddings:
    """
    The decoder's embeddings of labelled objects.

    Args:
        detector (`PreTrainedModel`): A detector of a supported family; it is left in evaluation mode, on its device.
        images ([`~aligndet_hf.commands.evaluate.EvaluationImages`]): The images, prepared for this detector.
        batch_size, num_workers (`int`): Images per forward pass, and processes that load them.
        disable_tqdm (`bool`): Whether to show no progress bar.

    Returns:
        [`ObjectEmbeddings`]: the objects in the order of the rows.
    """
    detector.eval()
    device = next(detector.parameters()).device
    family, normalization = family_of(detector.config), normalization_of(images.image_processor)
    costs = family.losses(detector.config)
    parts, row, total = [], 0, 0
    for batch in tqdm(images.batches(batch_size, num_workers), desc="embedding", disable=disable_tqdm):
        pixel_values, pixel_mask = (batch[name].to(device) for name in ("pixel_values", "pixel_mask"))
        outputs = detector(
            pixel_values=normalize_images(pixel_values, pixel_mask, **normalization),
            pixel_mask=pixel_mask,
            output_hidden_states=True,
        )
        object_rows = family.object_rows(detector, outputs, None)
        features = object_rows.features[object_rows.last].unflatten(0, (len(pixel_values), -1))
        rows = range(row, row := row + len(features))
        shapes = [label["orig_size"].tolist() for label in batch["labels"]]
        objects = [images.objects(number, *shape) for number, shape in zip(rows, shapes, strict=True)]
        boxes = [_normalized(truth["boxes"], *shape).to(device) for truth, shape in zip(objects, shapes, strict=True)]
        predicted = outputs.pred_boxes[:, : features.shape[1]].float()
        matching = match_queries(
            predicted.new_zeros(1, *predicted.shape[:2], 1),
            predicted[None],
            [box.new_zeros(len(box), dtype=torch.long) for box in boxes],
            boxes,
            class_cost=0.0,
            bbox_cost=costs.bbox_cost,
            giou_cost=costs.giou_cost,
        )
        place, target = (matching.image, matching.query), matching.target
        iou, _ = iou_and_giou(cxcywh_to_xyxy(predicted[place]), cxcywh_to_xyxy(torch.cat(boxes)[target]))
        labels = np.concatenate([truth["labels"] for truth in objects])
        total += len(labels)
        target = target.cpu().numpy()
        parts.append(
            (features[place].float().cpu().numpy(), labels[target], matching.image.cpu().numpy() + rows[0], iou.cpu())
        )
    features, labels, rows, ious = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ObjectEmbeddings(features, labels, rows, ious, total - len(labels))


def _normalized(boxes: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Pixels xyxy -> normalised cxcywh."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return xyxy_to_cxcywh(boxes) / torch.tensor([width, height] * 2)


def plot_embeddings(
    embeddings: Mapping[str, ObjectEmbeddings],
    results: Mapping[str, Mapping],
    class_names: Sequence[str],
    path,
    max_objects: int = 2000,
    seed: int = 0,
) -> Path:
    """
    Draws embeddings in the plane by t-SNE, a panel for each detector, coloured by class.

    Args:
        embeddings (`Mapping[str, ObjectEmbeddings]`): Name of each detector to what it makes of the same objects.
        results (`Mapping[str, Mapping]`): Of each the numbers of [`~aligndet_hf.commands.knn.knn_accuracy`].
        class_names (`Sequence[str]`): Name of each category.
        path (`str` or `Path`): The PNG to write.
        max_objects (`int`): Objects to draw, of all a random choice.
        seed (`int`): Of the choice and of t-SNE.

    Returns:
        `Path`: `path`.
    """
    figure = new_figure(4.6 * len(embeddings), 5.0)
    panels = figure.subplots(1, len(embeddings), squeeze=False)[0]
    for axes, (name, found) in zip(panels, embeddings.items(), strict=True):
        order = np.random.default_rng(seed).permutation(len(found.labels))[:max_objects]
        points, labels = project(found.features[order], seed), found.labels[order]
        numbers = results[name]
        title = (
            f"{name}\nkNN {100 * numbers['accuracy']:.1f} %, balanced {100 * numbers['balanced_accuracy']:.1f} % "
            f"(always the most frequent class: {100 * numbers['majority']:.1f} %)"
        )
        plain_axes(axes, "", None, None)
        axes.set_title(title, fontsize=8.5, loc="left")
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
        for label in np.unique(labels):
            x, y = points[labels == label].T
            color = PALETTE[label % len(PALETTE)]
            axes.scatter(x, y, s=14, color=color, alpha=0.75, linewidths=0, label=class_names[label])
    if len({label for found in embeddings.values() for label in found.labels.tolist()}) <= 40:
        legend_below(figure)  # more colours than that cannot be told apart, nor ten
    return save_figure(figure, path, "Decoder embeddings of labelled objects (t-SNE)")


def project(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Places features in the plane so that the similar ones are near (t-SNE, of cosine distances).

    Args:
        features (`np.ndarray` [N, D]): One row per sample, at least 5.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same places.

    Returns:
        `np.ndarray` float32 [N, 2].
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    reduced = PCA(min(50, *features.shape), random_state=seed).fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def _format(results: Mapping[str, Mapping]) -> str:
    width = max(map(len, results))
    lines = [f"{'in %':<{width}}{'kNN':>8}{'balanced':>10}{'IoU':>8}"]
    for name, numbers in results.items():
        accuracy, balanced, iou = (100 * numbers[key] for key in ("accuracy", "balanced_accuracy", "iou"))
        lines.append(f"{name:<{width}}{accuracy:>8.1f}{balanced:>10.1f}{iou:>8.1f}")
    last = next(reversed(results.values()))
    lines.append(f"{last['objects']} objects; always the most frequent class: {100 * last['majority']:.1f} %")
    return "\n".join(lines)
