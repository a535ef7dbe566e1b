"""What is right and wrong with a detector, as a part of a page."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..evaluation.diagnosis import SIZES, threshold_text
from .page import Section, picture_uri
from .pictures import has_matplotlib
from .plots import plot_precision

MOST_CLASSES = 20  # with more of them the confusions are listed, not shown as a matrix
KINDS = {
    "wrong class": "on an object, but of another class",
    "wrong place": "near an object of its class, with an IoU of 0.1 to 0.5",
    "wrong class and place": "near an object of another class",
    "double": "on an object that a surer detection has found",
    "background": "near no object",
    "missed": "objects that no detection hints at",
}


def diagnosis_section(diagnosis: Mapping) -> Section:
    """
    Curves, thresholds, confusions, kinds of error and the worst images.

    Args:
        diagnosis (`Mapping`): What [`~aligndet_hf.evaluation.diagnosis.Diagnosis.compute`] returned.
    """
    per_class = diagnosis["per_class"]
    thresholds = [("class", "objects", "best threshold", "precision", "recall", "F1")]
    for name, found in per_class.items():
        numbers = [f"{100 * found[key]:.0f} %" for key in ("precision", "recall", "f1")]
        thresholds.append((name, found["objects"], threshold_text(found), *numbers))
    text = (
        "A detection finds an object with an IoU of at least 0.5 and the same class. The best threshold of a class is "
        "the score at which F1, the harmonic mean of precision and recall, is highest; it was chosen on these images, "
        "so that on new ones precision and recall are somewhat lower. What follows counts detections from there on."
    )
    if "best_threshold" in diagnosis:
        text += f" The best single threshold for all classes is {diagnosis['best_threshold']:.2f}."
    return Section(
        "Diagnosis",
        text=[text],
        tables=[thresholds],
        pictures=_curves(per_class),
        more=[
            _confusions(diagnosis["confusion"], list(per_class)),
            Section("Kinds of error", tables=_errors(diagnosis)),
            _worst(diagnosis["worst_images"]),
        ],
    )


def _curves(per_class: Mapping) -> list[tuple[str, str]]:
    if not has_matplotlib() or not any(found["objects"] for found in per_class.values()):
        return []
    with tempfile.TemporaryDirectory() as scratch:
        return [("Precision and recall", picture_uri(plot_precision(per_class, Path(scratch) / "curves.png")))]


def _confusions(confusion: list[list[int]], names: list[str]) -> Section:
    """The whole matrix, or its largest numbers off the diagonal."""
    title, names = "What was taken for what", [*names, "background"]
    if len(names) <= MOST_CLASSES + 1:
        rows = [("object, taken for →", *names)]
        rows += [(name, *row) for name, row in zip(names, confusion, strict=True)]
        return Section(title, heat=[rows])
    pairs = [
        (number, names[row], names[column])
        for row, numbers in enumerate(confusion)
        for column, number in enumerate(numbers)
        if number and row != column
    ]
    pairs.sort(key=lambda pair: -pair[0])
    return Section(title, tables=[[("number", "object", "taken for"), *pairs[:MOST_CLASSES]]])


def _errors(diagnosis: Mapping) -> list[list[tuple]]:
    """Kinds of error, and the objects found, by size."""
    by_size, sizes = diagnosis.get("errors_by_size", {}), list(SIZES)
    rows = [("kind", *(sizes if by_size else ()), "all", "what it is")]
    for kind, number in diagnosis["errors"].items():
        rows.append((kind, *(of_size[kind] for of_size in by_size.values()), number, KINDS[kind]))
    found = [("objects", "number", "found")]
    for size, counts in diagnosis["by_size"].items():
        share = f" ({100 * counts['found'] / counts['objects']:.0f} %)" if counts["objects"] else ""
        found.append((size, counts["objects"], f"{counts['found']}{share}"))
    return [rows, found]


def _worst(images: list[Mapping]) -> Section:
    rows = [(image.get("file_name", image["image_id"]), image["false"], image["missed"]) for image in images]
    if not rows:
        return Section()
    return Section("Worst images", tables=[[("image", "false detections", "objects not found"), *rows[:10]]])
