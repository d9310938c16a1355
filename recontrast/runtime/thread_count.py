"""Number of threads of a runtime that is not PyTorch's."""

import os
import sys

from recontrast.data.system import count_cpus
from recontrast.runtime.threads import requested_threads


def count_threads() -> int:
    """Return the number of `choose_threads`, else PyTorch's where it is imported, else ``OMP_NUM_THREADS`` or CPUs."""
    requested = requested_threads()
    if requested is not None:
        return requested
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else count_cpus()
