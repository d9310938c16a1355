"""Number of threads of a runtime that is not PyTorch's."""

import os
import sys

from recontrast.data.system import count_cpus


def count_threads() -> int:
    """Return PyTorch's number of threads where it is imported, else ``OMP_NUM_THREADS``, else the processors."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else count_cpus()
