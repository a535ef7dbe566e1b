"""A page of HTML that needs nothing else to be read: what is in it, and how it is written."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from ..files import write_text
from .drawing import jpeg_bytes

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_SIDE = 1600  # pixels; a page shows no picture larger


@dataclass(frozen=True)
class Section:
    """
    A part of a page; whatever is given is shown, in this order.

    Attributes:
        title (`str`): The heading.
        text (`list[str]`): Paragraphs.
        code (`str`, *optional*): Lines to copy.
        tables (`list[list[tuple]]`): Tables of rows of cells; the first row is the head.
        heat (`list[list[tuple]]`): Tables of numbers, each number coloured by its share of its row.
        bars (`list[tuple[str, str, float]]`): Name, value and length (0 to 1) of bars.
        pictures (`list[tuple[str, str]]`): Title and data URI of pictures, see [`picture_uri`].
        details (`list[tuple[str, str]]`): Title and text of what is folded away.
        more (`list[Section]`): What follows, with smaller headings or without.
    """

    title: str = ""
    text: list[str] = field(default_factory=list)
    code: str | None = None
    tables: list[list[tuple]] = field(default_factory=list)
    heat: list[list[tuple]] = field(default_factory=list)
    bars: list[tuple[str, str, float]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    more: list["Section"] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything under the heading."""
        return self != Section(self.title)


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    lead: str = "",
    tiles: Sequence[tuple[str, str]] = (),
) -> Path:
    """
    Writes one HTML file. All texts are escaped, pictures are in it, and nothing is loaded from elsewhere.

    Args:
        path (`Path`): The file.
        title (`str`): The heading.
        sections (`Sequence[Section]`): The parts; empty ones are left out.
        subtitle (`str`, *optional*): A paragraph below the heading.
        lead (`str`, *optional*): What came of it all, in large letters.
        tiles (`Sequence[tuple[str, str]]`, *optional*): Name and value of the numbers at the top.

    Returns:
        `Path`: `path`.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = [section for section in sections if section]
    write_text(path, template.render(title=title, subtitle=subtitle, lead=lead, tiles=tiles, sections=shown))
    return path


def picture_uri(path: Path) -> str:
    """A picture as a `data:` address: as JPEG no larger than a page shows, or as the file is where that is smaller."""
    with PIL.Image.open(path) as stored:
        kind, picture = stored.format, stored.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE), PIL.Image.Resampling.LANCZOS)
    small, content = jpeg_bytes(picture), path.read_bytes()
    kind, content = (kind.lower(), content) if len(content) <= len(small) else ("jpeg", small)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
