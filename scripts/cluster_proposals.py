"""Sort proposals into pseudo-classes, for `use_clusters` of pre-training. The same command again resumes.

    python scripts/cluster_proposals.py --dataset outputs/proposals --backbone resnet50 --backbone_weights timm \\
        --output_dir outputs/clusters

The same as `aligndet clusters`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("clusters"))
