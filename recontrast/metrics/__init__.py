"""Metrics of anomaly detection and localisation: exact, or streaming with error bounds.

`recontrast.metrics.exact` has the functions, `recontrast.metrics.streaming` the accumulator, and
`recontrast.metrics.curves` the curves.
"""

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
