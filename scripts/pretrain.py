"""Pre-train a whole detector on unlabelled images with proposals. The same command again resumes.

python scripts/pretrain.py --dataset outputs/proposals --detector rt_detr --output_dir outputs/pretrained
accelerate launch --num_processes 8 scripts/pretrain.py --config aligndet_detr_r50_coco
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("pretrain"))
