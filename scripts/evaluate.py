"""Print the COCO table of a detector on labelled images, with the AP of every class.

    python scripts/evaluate.py --detector outputs/finetuned --dataset labelled/ --split validation

The same as `aligndet evaluate`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
