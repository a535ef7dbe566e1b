"""What is known of flags without importing anything heavy."""

import difflib


def nearest(name: str, valid) -> str:
    """What to add to a message about a name that does not exist: the valid one that it is closest to, if any."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
