"""Which trackers a training may report to."""

from collections.abc import Collection, Iterable


def require_trackers(names: Iterable[str], known: Collection[str], installed: Collection[str]) -> None:
    """
    Refuses a tracker that is not installed before any work: transformers fails for it at the first step, and
    Accelerate trains without a word to it.

    Args:
        names (`Iterable[str]`): What `report_to` says.
        known (`Collection[str]`): The trackers that the library below knows; it refuses others itself.
        installed (`Collection[str]`): The trackers that are installed.

    Raises:
        ValueError: one is not installed.
    """
    for name in names:
        if name in known and name not in installed:
            there = f"; installed are {', '.join(sorted(installed))}" if installed else ""
            raise ValueError(f"report_to: {name} is not installed{there}. Install it, or leave it out")
