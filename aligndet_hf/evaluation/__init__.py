"""How good a detector is."""

from .coco_metrics import CocoMetrics, format_table

__all__ = ["CocoMetrics", "format_table"]
