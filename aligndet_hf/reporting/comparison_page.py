"""The page of a comparison: what its report says, with its curves and pictures in it."""

from collections.abc import Mapping
from pathlib import Path

from .comparison import pictures_of, sections_of
from .page import Section, picture_uri
from .verdict import verdict

ARMS = "arms-{fraction}.jpg"  # what the arms find in the same images


def is_comparison(results: Mapping | None) -> bool:
    """Whether this is the `results.json` of `aligndet compare`."""
    return results is not None and {"arms", "statistics", "baseline"} <= results.keys()


def comparison_page(folder: Path, results: Mapping, pictures: str) -> tuple[str, str, list[Section]]:
    """
    Title, verdict and sections of the page of a comparison.

    Args:
        folder (`Path`): Its folder, with the plots.
        results (`Mapping`): Its `results.json`.
        pictures (`str`): The title of the section with pictures of the data.
    """
    drawn = {name: title for name, title in pictures_of(results).items() if (folder / name).is_file()}
    sections = sections_of(results, drawn)
    for part in (part for section in sections for part in section.more):
        part.pictures[:] = [(title, picture_uri(folder / name)) for title, name in part.pictures]
    shown = {
        f"{100 * float(fraction):g} % of the labels": folder / ARMS.format(fraction=fraction)
        for fraction in results["statistics"]
    }
    shown = [(name, picture_uri(path)) for name, path in shown.items() if path.is_file()]
    seed = results["config"]["seeds"][0]
    words = [f"The same images after fine-tuning from each start, seed {seed}."] if shown else []
    sections.insert(2, Section(pictures, text=words, pictures=shown))
    return " · ".join(results["arms"]), " ".join(verdict(results)), sections
