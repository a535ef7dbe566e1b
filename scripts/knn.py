"""Say what a backbone knows of labelled objects: the accuracy of nearest neighbours, beside random weights.

    python scripts/knn.py --dataset labelled/ --split train --backbone outputs/soco/backbone

The same as `aligndet knn`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("knn"))
