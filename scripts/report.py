"""Write one HTML file on a run, with its curves, pictures, numbers and settings.

    python scripts/report.py --run outputs/finetuned

The same as `aligndet report`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("report"))
