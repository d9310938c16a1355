"""Whether an anomaly map is finite."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_finite(anomaly: NDArray[Any]) -> bool:
    """Return whether all values of a map are finite, without a copy of the map.

    Args:
        anomaly: Anomaly map (H, W), floating point.

    Returns:
        False if a value is NaN or infinite. True for a map without pixels.
    """
    return not anomaly.size or bool(np.isfinite(anomaly.min()) and np.isfinite(anomaly.max()))
