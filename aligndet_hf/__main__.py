"""`python -m aligndet_hf pretrain ...`, and on several GPUs `accelerate launch -m aligndet_hf pretrain ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
