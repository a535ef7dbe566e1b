"""Boxes drawn into an image at its own size, quickly and without matplotlib; and many such images on one sheet."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageDraw
import PIL.ImageFont

from ..data.masks import Region
from .pictures import INK, color_of, luminance

JPEG_QUALITY = 88
_CROP_SIDE = 96  # of a picture on a sheet of crops, in pixels
_TINT = 0.45  # how much of the colour of its class covers a mask


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int | None],
    tags: Sequence[str],
    max_side: int | None = None,
    dashed: Sequence[bool] | None = None,
) -> PIL.Image.Image:
    """
    Draws boxes with tags into a copy of an image.

    A tag stands above its box, or below, inside or beside it where there is room: tags do not hide each other. One for
    which no place is free is left out; the colour of the box tells its class.

    Args:
        image (`np.ndarray`): RGB uint8 `[H, W, 3]`.
        boxes (`np.ndarray`): `[n, 4]`, absolute xywh in pixels of the image, the most important first.
        labels (`Sequence[int | None]`): The class of each, which gives it its colour; white without one.
        tags (`Sequence[str]`): A short text for each; empty: none.
        max_side (`int`, *optional*): The image is made smaller to fit, before it is drawn into.
        dashed (`Sequence[bool]`, *optional*): The boxes to draw in dashes.

    Returns:
        `PIL.Image.Image`
    """
    scale = min(1.0, max_side / max(image.shape[:2])) if max_side else 1.0
    if scale < 1:
        image = _resized(image, *(max(1, round(side * scale)) for side in image.shape[:2]))
    picture = PIL.Image.fromarray(image)
    draw = PIL.ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 250))
    font = PIL.ImageFont.load_default(size=max(10, min(picture.size) / 38))
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4) * scale
    corners[:, 2:] += corners[:, :2]
    dashed = [False] * len(corners) if dashed is None else dashed
    for corner, label, in_dashes in reversed(list(zip(corners, labels, dashed, strict=True))):
        box = corner.round().tolist()
        if in_dashes:
            _draw_dashes(draw, box, color_of(label), line)
        else:
            draw.rectangle(box, outline=color_of(label), width=line)
    taken = np.zeros((0, 4))
    for corner, label, tag in zip(corners, labels, tags, strict=True):
        if not tag:
            continue
        tag = _in_one_line(tag).replace(" ", "  ")  # the spaces of this font are narrow
        place = _free_place(corner, draw.textbbox((0, 0), tag, font=font), picture.size, taken)
        if place is None:
            continue
        taken = np.concatenate([taken, [place]])
        color = color_of(label)
        draw.rectangle(place.tolist(), fill=color)
        ink = INK if luminance(color) > 0.55 else "white"
        draw.text((place[0] + 2, place[1] + 1), tag, font=font, fill=ink, anchor="la")
    return picture


def tint_masks(image: np.ndarray, masks: Iterable[str | Mapping], labels: Sequence[int]) -> np.ndarray:
    """
    Lays the colour of its class over each mask.

    Args:
        image (`np.ndarray`): RGB uint8 `[H, W, 3]`.
        masks (`Iterable[str | Mapping]`): Regions in the image, as [`~aligndet_hf.data.masks.segmentation_text`] takes
            them.
        labels (`Sequence[int]`): The class of each.

    Returns:
        `np.ndarray`: RGB uint8 `[H, W, 3]`.
    """
    tinted = image.copy()
    for mask, label in zip(masks, labels, strict=True):
        inside = Region.of(mask, *image.shape[:2]).draw(*image.shape[:2]).astype(bool)
        color = np.array(PIL.ImageColor.getrgb(color_of(label)))
        tinted[inside] = (1 - _TINT) * tinted[inside] + _TINT * color
    return tinted


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image at another size, for the eye: without OpenCV, which takes 20 MB of memory."""
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR))


def enlarged(image: np.ndarray, boxes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image as large as the side, if it is smaller, and its boxes: tags hide much of a small image."""
    times = max(1.0, side / max(image.shape[:2]))
    return _resized(image, *(round(times * own) for own in image.shape[:2])), np.asarray(boxes) * times


def _draw_dashes(draw: PIL.ImageDraw.ImageDraw, box: Sequence[float], color: str, width: int) -> None:
    """Draws the outline of a box (xyxy) in dashes."""
    x1, y1, x2, y2 = box
    dash, gap = 5 * width, 3 * width
    for start in np.arange(x1, x2, dash + gap):
        for y in (y1, y2):
            draw.line([start, y, min(start + dash, x2), y], fill=color, width=width)
    for start in np.arange(y1, y2, dash + gap):
        for x in (x1, x2):
            draw.line([x, start, x, min(start + dash, y2)], fill=color, width=width)


def _free_place(corner: np.ndarray, text: tuple, size: tuple[int, int], taken: np.ndarray) -> np.ndarray | None:
    """Where a tag of this extent goes: xyxy inside the picture, on no other tag."""
    width, height = text[2] + 4, text[3] + 2
    x1, y1, x2, y2 = corner
    candidates = [
        (x1, y1 - height),
        (x1, y2),
        (x1, y1),
        (x2 - width, y1 - height),
        (x2 - width, y2),
        (x2 - width, y1),
        (x2, y1),
        (x1 - width, y1),
    ]
    for left, top in candidates:
        left = min(max(left, 0), max(size[0] - width, 0))
        if top < 0 or top + height > size[1]:
            continue
        place = np.array([left, top, left + width, top + height])
        if not ((taken[:, :2] < place[2:]) & (taken[:, 2:] > place[:2])).all(axis=1).any():
            return place
    return None


def jpeg_bytes(picture: PIL.Image.Image) -> bytes:
    """A picture as the content of a JPEG file."""
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def contact_sheet(
    pictures: Sequence[PIL.Image.Image],
    titles: Sequence[str],
    columns: int = 4,
    side: int = 400,
    note: str = "",
    legend: Mapping[str, str] | None = None,
) -> PIL.Image.Image:
    """
    Puts pictures on one sheet, each with its title.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): The pictures.
        titles (`Sequence[str]`): A text below each; cut if it is too long.
        columns (`int`, *optional*, defaults to 4): Pictures in a row.
        side (`int`, *optional*, defaults to 400): The longest side of a picture on the sheet, in pixels.
        note (`str`, *optional*): A text above the pictures, broken into lines.
        legend (`Mapping[str, str]`, *optional*): Names and colours, written below the pictures.

    Returns:
        `PIL.Image.Image`
    """
    # The name of a class or file may hold a line break, which Pillow does not measure.
    titles, legend = map(_in_one_line, titles), {_in_one_line(name): color for name, color in (legend or {}).items()}
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    columns = min(columns, len(small))
    rows = [small[start : start + columns] for start in range(0, len(small), columns)]
    gap, font = 8, PIL.ImageFont.load_default(size=13)
    heights = [max(picture.height for picture in row) + 18 for row in rows]
    sheet_width = columns * (side + gap) + gap
    measure = PIL.ImageDraw.Draw(PIL.Image.new("RGB", (1, 1)))
    notes = _lines(note.split(), lambda words: measure.textlength(" ".join(words), font=font), sheet_width - 2 * gap)
    names = _lines(legend, lambda names: sum(30 + measure.textlength(name, font=font) for name in names), sheet_width)
    top = gap + 18 * len(notes)
    sheet_height = top + sum(heights) + gap * len(rows) + 18 * len(names)
    sheet = PIL.Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, line in enumerate(notes):
        draw.text((gap, gap / 2 + 18 * number), " ".join(line), font=font, fill=INK)
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = gap + column * (side + gap)
            sheet.paste(picture, (left, top))
            words = next(titles)
            while draw.textlength(words, font=font) > side and len(words) > 1:
                words = "…" + words[2:]
            draw.text((left, top + picture.height + 2), words, font=font, fill=INK)
        top += height + gap
    for line in names:
        left = gap
        for name in line:
            draw.rectangle([left, top + 2, left + 10, top + 12], fill=legend[name])
            draw.text((left + 15, top), name, font=font, fill=INK)
            left += 30 + draw.textlength(name, font=font)
        top += 18
    return sheet


def crop_sheet(rows: Mapping[str, Sequence[np.ndarray]], path: Path, note: str) -> Path:
    """
    Puts rows of small pictures on one sheet, and the name of each row below its first picture.

    Args:
        rows (`Mapping[str, Sequence[np.ndarray]]`): Name of each row and its pictures, uint8 `[height, width, 3]`.
        path (`Path`): The file to write.
        note (`str`): A text above the pictures.

    Returns:
        `Path`: `path`.
    """
    columns, pictures, titles = max(1, *map(len, rows.values())), [], []
    for name, crops in rows.items():
        blanks = [np.full((1, 1, 3), 255, np.uint8)] * (columns - len(crops))
        pictures += [PIL.Image.fromarray(enlarged(crop, [], _CROP_SIDE)[0]) for crop in (*crops, *blanks)]
        titles += [name, *[""] * (columns - 1)]
    contact_sheet(pictures, titles, columns, _CROP_SIDE, note).save(path)
    return path


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _lines(words: Iterable[str], length: Callable[[list[str]], float], limit: float) -> list[list[str]]:
    """Words in lines which are no longer than a limit, as far as that can be."""
    lines: list[list[str]] = []
    for word in words:
        if lines and length([*lines[-1], word]) <= limit:
            lines[-1].append(word)
        else:
            lines.append([word])
    return lines
