"""Metrics of anomaly detection and localisation: exact, or streaming with error bounds.

`recontrast.metrics.exact` has the functions, `recontrast.metrics.streaming` the accumulator,
`recontrast.metrics.curves` the curves, `recontrast.metrics.saturated` sPRO, and `recontrast.metrics.views` the scores
of samples with several views.
"""

from recontrast.metrics.exact import (
    REGIONS_BACKEND,
    ImageMetrics,
    PixelMetrics,
    accuracy,
    ap,
    aupro,
    auroc,
    count_pixels_at,
    f1_at,
    f1_max,
    f1_of_counts,
    image_metrics,
    pixel_metrics,
)
from recontrast.metrics.inputs import regions
from recontrast.metrics.saturated import SaturatedOverlap, aupro_saturated, saturation_area
from recontrast.metrics.streaming import Estimate, StreamedMetrics, Streaming
from recontrast.metrics.views import merge_views

__all__ = [
    "REGIONS_BACKEND",
    "Estimate",
    "ImageMetrics",
    "PixelMetrics",
    "SaturatedOverlap",
    "StreamedMetrics",
    "Streaming",
    "accuracy",
    "ap",
    "aupro",
    "aupro_saturated",
    "auroc",
    "count_pixels_at",
    "f1_at",
    "f1_max",
    "f1_of_counts",
    "image_metrics",
    "merge_views",
    "pixel_metrics",
    "regions",
    "saturation_area",
]
