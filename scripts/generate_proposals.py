"""Find object-like boxes in unlabelled images and store them as a `proposals` column. The same command again resumes.

    python scripts/generate_proposals.py --dataset images/ --output_dir outputs/proposals

The same as `aligndet proposals`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("proposals"))
