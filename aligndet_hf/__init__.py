"""Pre-train whole object detectors without labels, and fine-tune them, with Hugging Face Transformers."""

from .models import (
    AlignDetConfig,
    AlignDetForPreTraining,
    AlignDetOutput,
    SoCoConfig,
    SoCoForPreTraining,
    SoCoOutput,
)

__version__ = "0.1.0"

__all__ = [
    "AlignDetConfig",
    "AlignDetForPreTraining",
    "AlignDetOutput",
    "SoCoConfig",
    "SoCoForPreTraining",
    "SoCoOutput",
]
