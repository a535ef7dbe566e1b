"""`aligndet report`: one HTML file on a run."""

from dataclasses import dataclass
from pathlib import Path

from ..arguments import Arguments
from ..files import similar_path
from ..flags import REQUIRED, flag, takes_arguments
from ..reporting.html_report import REPORT, write_report
from ..runs import RunFolder


@dataclass(kw_only=True)
class ReportArguments(Arguments):
    """Arguments of [`report`]: the flags of `aligndet report` and the keys of its recipes."""

    run: str = flag(REQUIRED, "data", "folder that an aligndet command has written")
    output: str | None = flag(None, "place", f"the HTML file; {REPORT} in the folder if not given")


@takes_arguments
def report(arguments: ReportArguments) -> Path:
    """
    Writes the report of a run.

    Args:
        arguments ([`ReportArguments`]): The configuration.

    Returns:
        `Path`: the HTML file.

    Raises:
        ValueError: the folder is not there, or holds nothing to report.
    """
    folder = Path(arguments.run).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder{similar_path(folder)}")
    with RunFolder(folder, "report"):  # not while another process works there
        path = write_report(folder, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file with everything in it. Open it in a browser.")
    return path
