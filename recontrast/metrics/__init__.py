"""Metrics of detection and localisation: exact from one sort, or streaming in constant memory with proven bounds."""

from recontrast.metrics.exact import (
    REGIONS_BACKEND,
    ImageMetrics,
    PixelMetrics,
    accuracy,
    ap,
    aupro,
    auroc,
    f1_max,
    image_metrics,
    pixel_metrics,
)
from recontrast.metrics.inputs import regions
from recontrast.metrics.streaming import Estimate, StreamedMetrics, Streaming

__all__ = [
    "REGIONS_BACKEND",
    "Estimate",
    "ImageMetrics",
    "PixelMetrics",
    "StreamedMetrics",
    "Streaming",
    "accuracy",
    "ap",
    "aupro",
    "auroc",
    "f1_max",
    "image_metrics",
    "pixel_metrics",
    "regions",
]
