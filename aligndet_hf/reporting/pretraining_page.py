"""What the numbers of a pre-training run say, as a part of its page."""

from collections.abc import Mapping, Sequence

from .page import Section
from .run_record import RunRecord

# What is logged: the value of a detector that knows nothing, and what the number is.
TOLD = {
    "loss": ("–", "what training lowers: all terms by their weights"),
    "loss_contrastive": (
        "its first value",
        "how hard it is to tell an object from the others by its embedding; it falls as embeddings become distinct",
    ),
    "rank_accuracy": (
        "{rank:.1%}",
        "share of objects whose most similar embedding in the other view is their own",
    ),
    "positive_similarity": ("as negative", "mean cosine of the embeddings of an object in both views; 1: the same"),
    "negative_similarity": ("as positive", "mean cosine of the embeddings of two objects; 0: nothing in common"),
    "embedding_spread": ("–", "distance of embeddings from their mean; 1: all directions, 0: all alike (collapse)"),
    "matched_proposals": ("–", "share of proposals that have a query of their own"),
    "best_box_sameness": ("1", "mean IoU of the surest boxes of two images; 1: images are ignored"),
    "best_box_borders": ("–", "share of surest boxes that touch two borders; high: boxes are too large"),
}  # fmt: skip


def numbers_section(record: RunRecord, history: Sequence[Mapping]) -> Section:
    """
    Each metric at the start and the end, with its value by chance, and a sentence.

    Args:
        record ([`RunRecord`]): A run of pre-training.
        history (`Sequence[Mapping]`): Its log.
    """
    rows = [("metric", "first entry", "last entry", "by chance", "what it is")]
    for key, (chance, sentence) in TOLD.items():
        values = [entry[key] for entry in history if entry.get(key) is not None]
        if values:
            rank = _rank_by_chance(record)
            chance = "–" if "{rank" in chance and rank is None else chance.format(rank=rank)
            rows.append((key, f"{values[0]:.3g}", f"{values[-1]:.3g}", chance, sentence))
    if len(rows) == 1:
        return Section()
    text = (
        "Entries are means over the steps since the entry before. By chance: of a detector that tells nothing apart."
    )
    return Section("What the numbers say", text=[text], tables=[rows])


def _rank_by_chance(record: RunRecord) -> float | None:
    """One by the number of objects in a batch, as far as the record tells it."""
    boxes, images = (record.proposals or {}).get("boxes"), record.images
    batch, most = (record.settings.get(key) for key in ("per_device_train_batch_size", "max_proposals"))
    if not (boxes and images and batch and most):
        return None
    return 1 / max(batch * min(most, boxes / images), 1)
