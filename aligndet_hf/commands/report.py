"""`aligndet report`: one HTML file on a run."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ..arguments import Arguments
from ..flags import REQUIRED, flag
from ..reporting.html_report import REPORT, write_report
from ..runs import RunFolder


@dataclass(kw_only=True)
class ReportArguments(Arguments):
    """Arguments of [`report`]: the flags of `aligndet report` and the keys of its recipes."""

    run: str = flag(REQUIRED, "data", "folder that an aligndet command has written")
    output: str | None = flag(None, "place", f"the HTML file; {REPORT} in the folder if not given")


def report(arguments: ReportArguments) -> Path:
    """
    Writes the report of a run.

    Args:
        arguments ([`ReportArguments`]): The configuration.

    Returns:
        `Path`: the HTML file.

    Raises:
        ValueError: the folder holds nothing to report.
    """
    folder = Path(arguments.run).expanduser()
    # Not while another process works there.
    with RunFolder(folder, "report") if folder.is_dir() else contextlib.nullcontext():
        path = write_report(arguments.run, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file with everything in it. Open it in a browser.")
    return path
