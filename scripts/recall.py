"""Say how many objects the proposals find, beside random boxes and a grid; draw the first of them on images.

    python scripts/recall.py --dataset outputs/proposals --output_dir outputs/recall --num_pictures 8

The same as `aligndet recall`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("recall"))
