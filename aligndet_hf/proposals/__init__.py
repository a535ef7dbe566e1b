"""Object proposals without labels: boxes that probably hold something, from pixels alone."""

from .filters import filter_proposals, nms, parse_strategy, select_proposals
from .opencv import opencv_selective_search

__all__ = ["filter_proposals", "nms", "opencv_selective_search", "parse_strategy", "select_proposals"]
