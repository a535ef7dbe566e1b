"""The errors of the data room: one sentence that says where, what was expected and how to mend it."""

import re


class DataError(ValueError):
    """Input that cannot be used: the message names the source, row and column, what was expected, and the fix."""

    def __init__(self, message: str = ""):
        super().__init__(re.sub(r"(\S{300})\S{200,}", r"\1...", str(message)))  # a damaged file has long values


class ImageError(DataError):
    """An image that cannot be decoded; the message names the file."""
