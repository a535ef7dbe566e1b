"""Boxes drawn into an image at its own size, quickly and without matplotlib; and many such images on one sheet."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ..data.views import resize_image
from .pictures import INK, color_of, luminance

JPEG_QUALITY = 88


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    tags: Sequence[str],
    max_side: int | None = None,
) -> PIL.Image.Image:
    """
    Draws boxes with tags into a copy of an image.

    A tag stands above its box, or below, inside or beside it where there is room: tags do not hide each other. One for
    which no place is free is left out; the colour of the box tells its class.

    Args:
        image (`np.ndarray`): RGB uint8 `[H, W, 3]`.
        boxes (`np.ndarray`): `[n, 4]`, absolute xywh in pixels of the image, the most important first.
        labels (`Sequence[int]`): The class of each, which gives it its colour.
        tags (`Sequence[str]`): A short text for each.
        max_side (`int`, *optional*): The image is made smaller to fit, before it is drawn into.

    Returns:
        `PIL.Image.Image`
    """
    scale = min(1.0, max_side / max(image.shape[:2])) if max_side else 1.0
    if scale < 1:
        image = resize_image(image, *(max(1, round(side * scale)) for side in image.shape[:2]))
    picture = PIL.Image.fromarray(image)
    draw = PIL.ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 250))
    font = PIL.ImageFont.load_default(size=max(10, min(picture.size) / 38))
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4) * scale
    corners[:, 2:] += corners[:, :2]
    for corner, label in reversed(list(zip(corners, labels, strict=True))):
        draw.rectangle(corner.round().tolist(), outline=color_of(label), width=line)
    taken = np.zeros((0, 4))
    for corner, label, tag in zip(corners, labels, tags, strict=True):
        place = _free_place(corner, draw.textbbox((0, 0), tag, font=font), picture.size, taken)
        if place is None:
            continue
        taken = np.concatenate([taken, [place]])
        color = color_of(label)
        draw.rectangle(place.tolist(), fill=color)
        ink = INK if luminance(color) > 0.55 else "white"
        draw.text((place[0] + 2, place[1] + 1), tag, font=font, fill=ink, anchor="la")
    return picture


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


def jpeg_bytes(picture: PIL.Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    """A picture as the content of a JPEG file."""
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def contact_sheet(pictures: Sequence[PIL.Image.Image], titles: Sequence[str], columns: int = 4, side: int = 400):
    """
    Puts pictures on one sheet, each with its title.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): The pictures.
        titles (`Sequence[str]`): A text below each; cut if it is too long.
        columns (`int`, *optional*, defaults to 4): Pictures in a row.
        side (`int`, *optional*, defaults to 400): The longest side of a picture on the sheet, in pixels.

    Returns:
        `PIL.Image.Image`
    """
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    columns = min(columns, len(small))
    rows = [small[start : start + columns] for start in range(0, len(small), columns)]
    gap, font = 8, PIL.ImageFont.load_default(size=13)
    heights = [max(picture.height for picture in row) + 18 for row in rows]
    sheet = PIL.Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap * (len(rows) + 1)), "white")
    draw, top, title = PIL.ImageDraw.Draw(sheet), gap, iter(titles)
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = gap + column * (side + gap)
            sheet.paste(picture, (left, top))
            words = next(title)
            while draw.textlength(words, font=font) > side and len(words) > 1:
                words = "…" + words[2:]
            draw.text((left, top + picture.height + 2), words, font=font, fill=INK)
        top += height + gap
    return sheet
