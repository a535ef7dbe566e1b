"""Draw what detectors make of labelled objects (t-SNE), and say how often neighbours share a class (kNN).

    python scripts/embeddings.py --dataset labelled/ --detector outputs/pretrained --output_dir outputs/embeddings

The same as `aligndet embeddings`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("embeddings"))
