"""Object proposals without labels: boxes that probably hold something, from pixels alone."""

from .controls import grid_boxes, random_boxes
from .filters import filter_proposals, nms, parse_strategy, select_proposals
from .opencv import opencv_selective_search
from .selective_search import PRESETS, selective_search

__all__ = [
    "PRESETS",
    "filter_proposals",
    "grid_boxes",
    "nms",
    "opencv_selective_search",
    "parse_strategy",
    "random_boxes",
    "select_proposals",
    "selective_search",
]
