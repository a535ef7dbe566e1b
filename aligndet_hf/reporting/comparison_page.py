"""The page of a comparison: what its Markdown report says, with its curves and pictures in it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from .comparison import REPORT
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
        folder (`Path`): Its folder, with `report.md`.
        results (`Mapping`): Its `results.json`.
        pictures (`str`): The title of the section with pictures of the data.
    """
    text = (folder / REPORT).read_text(encoding="utf-8")
    title, sections = "", [Section("What was compared")]
    for kind, content in _blocks(text):
        if kind == "title":
            title = content
        elif kind == "heading":
            sections.append(Section(content))
        elif kind == "picture":
            name, file = content
            sections[-1].more.append(Section(pictures=[(name, picture_uri(folder / file))]))
        else:
            sections[-1].more.append(Section(**{kind: [content] if kind == "tables" else content}))
    told = verdict(results)
    sections[0].more[:] = [part for part in sections[0].more if part.text != [" ".join(told)]]
    shown = {
        f"{100 * float(fraction):g} % of the labels": folder / ARMS.format(fraction=fraction)
        for fraction in results["statistics"]
    }
    shown = [(name, picture_uri(path)) for name, path in shown.items() if path.is_file()]
    seed = results["config"]["seeds"][0]
    words = [f"The same images after fine-tuning from each start, seed {seed}."] if shown else []
    sections.insert(2, Section(pictures, text=words, pictures=shown))
    return title, " ".join(told), sections


def _blocks(text: str) -> Iterator[tuple[str, object]]:
    """The blocks of a Markdown text: title, heading, text, tables, code or picture, and what is in it."""
    parts = iter(text.strip().split("\n\n"))
    for part in parts:
        if part.startswith("```"):
            while not part.endswith("```"):
                part += "\n\n" + next(parts)
            yield "code", part.split("\n", 1)[1].removesuffix("```").rstrip()
        elif part.startswith("# "):
            yield "title", part[2:]
        elif part.startswith("#"):
            yield "heading", part.lstrip("# ")
        elif part.startswith("!["):
            yield "picture", part[2:-1].rsplit("](", 1)
        elif part.startswith("| "):
            rows = [line[2:-2].split(" | ") for line in part.splitlines()]
            yield (
                "tables",
                [tuple(cell.replace("\\|", "|").strip("`") for cell in row) for row in (rows[0], *rows[2:])],
            )
        else:
            yield "text", part.replace("**", "").removeprefix("- ").split("\n- ")
