"""Fine-tune a detector on labelled images: a pre-trained one, any other checkpoint, or a new one.

    python scripts/finetune.py --config finetune --output_dir outputs/finetuned
    accelerate launch scripts/finetune.py --dataset labelled/ --detector outputs/pretrained/detector \\
        --output_dir outputs/finetuned

The same as `aligndet finetune`; `--help` lists the flags.
"""

import sys

from aligndet_hf.cli import run

if __name__ == "__main__":
    sys.exit(run("finetune"))
