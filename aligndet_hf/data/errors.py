"""The errors of the data room: one sentence that says where, what was expected and how to mend it."""


class DataError(ValueError):
    """Input that cannot be used: the message names the source, row and column, what was expected, and the fix."""


class ImageError(DataError):
    """An image that cannot be decoded; the message names the file."""
