"""torchvision's four detectors as models of transformers."""

from .modeling_torchvision import MODELS

__all__ = ["MODELS"]
