"""
What the images of a data set say of it: every header is read, and what is labelled is compared with the pixels.

Labels that were drawn on other pixels (thumbnails, before a resize or a rotation, on a scale of 0 to 1000) train a
detector on nonsense without an error. Each kind leaves a mark in the sizes, which is looked for here.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from .door import first, listed
from .errors import DataError, ImageError
from .images import decode_image, read_header

# Images of at most this many pixels together are decoded to see whether they are whole, a matter of seconds. Of
# more, the ends of the files are looked at.
MAX_DECODED_PIXELS = 300_000_000
_LISTED_ROWS = 10
_SCALE = 1000  # of the coordinates that some tools and language models give


@dataclass
class ImageFacts:
    """
    What the headers of all images say.

    Attributes:
        sizes (`np.ndarray`): int64 `[N, 2]`, height and width in pixels after the EXIF rotation; 0 if not readable.
        rotated (`np.ndarray`): bool `[N]`, whether that rotation exchanges height and width.
        kinds (`dict[str, int]`): Images by format and mode, `"JPEG RGB"` for one.
        deep (`list[int]`): Rows with more than 8 bits for one channel of grey.
        wide_colors (`list[int]`): Rows with more than 8 bits for each of several channels.
        alpha (`list[int]`): Rows with a fourth channel.
        faults (`dict[int, str]`): Why images cannot be read, by row.
    """

    sizes: np.ndarray
    rotated: np.ndarray
    kinds: dict[str, int] = field(default_factory=dict)
    deep: list[int] = field(default_factory=list)
    wide_colors: list[int] = field(default_factory=list)
    alpha: list[int] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    def require_readable(self, source: str) -> None:
        """
        Refuses images that are missing, damaged or too large.

        Raises:
            [`ImageError`]: lists them all at once (the first of many).
        """
        if self.faults:
            lines = [f"row {row}, column 'image': {reason}" for row, reason in self.faults.items()]
            raise ImageError(
                f"{source}: {len(lines)} of {len(self.sizes)} images cannot be read. Mend them, or remove them with "
                f"their labels.\n  {first(lines)}"
            )

    def notes(self) -> list[str]:
        """What one should know of the images, a line each."""
        notes = []
        if self.alpha:
            notes.append(
                f"{len(self.alpha)} images have a fourth channel, which is left out, as transformers does (rows "
                f"{listed(self.alpha, _LISTED_ROWS)})"
            )
        if self.wide_colors:
            notes.append(
                f"{len(self.wide_colors)} colour images have 16 bits a channel: the upper 8 are used, as Pillow and "
                f"transformers do (rows {listed(self.wide_colors, _LISTED_ROWS)})"
            )
        return notes


def inspect_images(batches: Callable[[], Iterable[pa.ChunkedArray]], num_rows: int) -> ImageFacts:
    """
    Reads the headers of all images, and finds those that are not whole: by decoding them all if they are few, else
    those whose files do not end as their format does.

    Args:
        batches (`Callable`): Gives the column `image`, not decoded, a few rows at a time; called twice.
        num_rows (`int`): Their number.

    Returns:
        [`ImageFacts`]
    """
    facts = ImageFacts(np.zeros((num_rows, 2), dtype=np.int64), np.zeros(num_rows, dtype=bool))
    kinds, doubtful = Counter(), []
    for row, header in enumerate(_outcomes(read_header, batches())):
        if isinstance(header, ImageError):
            facts.faults[row] = str(header)
            continue
        facts.sizes[row] = header.height, header.width
        facts.rotated[row] = header.is_rotated
        kinds[f"{header.format} {header.mode}"] += 1
        for rows, concerned in (
            (facts.deep, header.is_deep),
            (facts.wide_colors, header.has_wide_colors),
            (facts.alpha, header.has_alpha),
            (doubtful, not header.ends_well),
        ):
            if concerned:
                rows.append(row)
    facts.kinds = dict(kinds.most_common())
    is_cheap = facts.sizes.prod(axis=1).sum() <= MAX_DECODED_PIXELS
    chosen = set(range(num_rows) if is_cheap else doubtful) - set(facts.faults)
    if chosen:
        for row, outcome in enumerate(_outcomes(_decodes, batches(), chosen)):
            if isinstance(outcome, ImageError):
                facts.faults[row] = str(outcome)
    facts.faults = dict(sorted(facts.faults.items()))
    return facts


def find_deep(batches: Iterable[pa.ChunkedArray]) -> list[int]:
    """The rows of the images with more than 8 bits for one channel of grey, of the column `image`, not decoded."""
    headers = enumerate(_outcomes(read_header, batches))
    return [row for row, header in headers if not isinstance(header, ImageError) and header.is_deep]


def _decodes(value) -> None:
    decode_image(value, window=(0, 255))


def _outcomes(function, batches: Iterable[pa.ChunkedArray], chosen: set[int] | None = None):
    """Yields what a function makes of every image, or its [`ImageError`]; `None` for rows that are not chosen."""

    def outcome(image):
        if image is None:
            return None
        try:
            return function(image)
        except ImageError as error:
            return error

    row = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in batches:
            images = []
            for scalar in batch:
                images.append(_without_a_copy(scalar) if chosen is None or row in chosen else None)
                row += 1
            yield from pool.map(outcome, images)


def _without_a_copy(scalar: pa.StructScalar) -> dict:
    """The image of a row, its bytes where they lie: of a large set only the pages that are looked at are read."""
    if not scalar.is_valid:
        return {"bytes": None, "path": None}
    content = scalar["bytes"]
    return {"bytes": content.as_buffer() if content.is_valid else None, "path": scalar["path"].as_py()}


# ---- the sizes that are told ----


def check_declared_sizes(facts: ImageFacts, declared: np.ndarray, source: str) -> None:
    """
    Compares the sizes that a label file tells with the images' own.

    Args:
        facts ([`ImageFacts`]): Of the images.
        declared (`np.ndarray`): float `[N, 2]`, height and width as the labels have them; NaN or 0 where not told.
        source (`str`): The data set.

    Raises:
        [`DataError`]: if they disagree by more than a pixel. It says what happened to the images, and the fix.
    """
    told = (declared > 0).all(axis=1) & (facts.sizes > 0).all(axis=1)
    wrong = told & (np.abs(declared - facts.sizes) > 1).any(axis=1)
    if not wrong.any():
        return
    row = int(np.flatnonzero(wrong)[0])
    turned = (np.abs(declared[:, ::-1] - facts.sizes) <= 1).all(axis=1) & wrong
    factors = (facts.sizes / np.where(told[:, None], declared, 1))[wrong]
    height, width = facts.sizes[row]
    example = (
        f"{source}, row {row}: by the labels the image has width {declared[row, 1]:g} and "
        f"height {declared[row, 0]:g}, but it is {width} pixels wide and {height} high. "
        f"{int(wrong.sum())} of {int(told.sum())} images disagree: "
    )
    if (turned & facts.rotated).sum() * 2 > wrong.sum():
        reason = (
            "they were labelled without the rotation that their EXIF data ask for, so the boxes lie elsewhere. Remove "
            "the EXIF orientation from the images (`exiftool -Orientation= FILES`), or label the rotated ones"
        )
    elif turned.sum() * 2 > wrong.sum():
        reason = "width and height are exchanged. Exchange them in the labels, and look where the boxes lie"
    elif np.ptp(factors, axis=1).max() <= 0.02 * factors.max():
        factor = float(np.median(factors))
        same = np.ptp(factors) <= 0.02 * factors.max()
        by = f"by {factor:.4g}" if same else "by the factor of each image"
        reason = (
            f"the boxes were drawn on copies of another size, such as thumbnails, or the images were resized later. "
            f"Multiply the boxes {by} and correct width and height, or give the images that were labelled"
        )
    else:
        reason = "these are other images, or cropped ones. Give those that were labelled"
    raise DataError(f"{example}{reason}. If the boxes are right, correct or remove the sizes in the labels.")


# ---- the boxes ----


def check_box_format(boxes: np.ndarray, sizes: np.ndarray, rows: np.ndarray, column: str, source: str) -> list[str]:
    """
    Looks at where boxes lie in their images for the marks of another format.

    Args:
        boxes (`np.ndarray`): float `[N, 4]`, finite, meant as xywh in pixels.
        sizes (`np.ndarray`): `[N, 2]`, height and width of the image of each.
        rows (`np.ndarray`): `[N]`, the row of each.
        column (`str`): The column of the boxes.
        source (`str`): The data set.

    Returns:
        `list[str]`: what looks odd but may be right.

    Raises:
        [`DataError`]: if nearly all boxes fit another format, corners or relative ones, and not this one.
    """
    x, y, a, b = boxes.T.astype(np.float64)
    height, width = sizes.T
    where = f"{source}, row {{}}, column '{column}': the boxes look "

    # Slips of annotators stay within the tolerance.
    overflow = (x + a > 1.02 * width + 1) | (y + b > 1.02 * height + 1)
    before = (x < -0.02 * width - 1) | (y < -0.02 * height - 1)
    share = overflow.mean()
    for taken_for, start_x, start_y, outside, fix in (
        ("[x, y, width, height]", x, y, overflow, "Subtract x1 from x2 and y1 from y2."),
        ("a centre, width and height", x + a / 2, y + b / 2, overflow | before,
         "Write (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1."),
    ):  # fmt: skip
        fits_corners = (a > start_x) & (b > start_y) & (a <= width + 1) & (b <= height + 1)
        if outside.mean() >= 0.2 and fits_corners.mean() >= 0.95:
            number = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{where.format(rows[number])}like corners [x1, y1, x2, y2], expected {taken_for}: "
                f"{outside.mean():.0%} of the boxes reach out of their image, e.g. {boxes[number].tolist()} in an "
                f"image {width[number]} pixels wide and {height[number]} high. {fix}"
            )
    is_relative = (np.abs(boxes) <= 1).all(axis=1) & (np.minimum(width, height) > 2)
    if is_relative.mean() > 0.5:
        raise DataError(
            f"{where.format(rows[is_relative][0])}relative to the image ({is_relative.mean():.0%} have no number "
            "above 1), expected [x, y, width, height] in pixels. Multiply them by the image's width and height."
        )
    right, bottom = x + a, y + b
    as_corners = (a > x) & (b > y)
    of_scale = [("[x, y, width, height]", right, bottom)]
    if as_corners.all():
        of_scale.append(("[x1, y1, x2, y2]", a, b))
    for form, furthest_x, furthest_y in of_scale:
        reach = (furthest_x.max(), furthest_y.max())
        fills_scale = max(reach) <= _SCALE + 1 and min(reach) >= 0.9 * _SCALE
        is_unlike_images = share >= 0.2 or (len(boxes) >= 20 and min(width.min(), height.min()) > 1.2 * _SCALE)
        if fills_scale and is_unlike_images:
            number = int(np.argmax(furthest_x))
            raise DataError(
                f"{where.format(rows[number])}like {form} on a scale of 0 to {_SCALE}, whatever the image: "
                f"none reaches beyond {max(reach):g}, e.g. {boxes[number].tolist()} in an image {width[number]} "
                f"pixels wide and {height[number]} high. Expected [x, y, width, height] in pixels: multiply x by the "
                f"image's width / {_SCALE}, y by its height / {_SCALE}."
            )
    notes = []
    if is_relative.any():
        notes.append(
            f"boxes within the first pixel of their image: {is_relative.sum()} (rows "
            f"{listed(np.unique(rows[is_relative]), _LISTED_ROWS)}). Are they relative to its size?"
        )
    reach = ((right / width).max(), (bottom / height).max())
    if len(boxes) >= 50 and len(np.unique(rows)) >= 10 and max(reach) < 0.55:
        notes.append(
            f"all boxes lie in the upper left {max(reach):.0%} of the width and height of their images: were they "
            "drawn on smaller copies?"
        )
    return notes
