"""Block sizes of Triton kernels: autotuned on a GPU, fixed in the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import triton

OPTIONS = {"enable_fp_fusion": True}  # for every launch; explicit, because Triton is about to change the default


class Untuned:
    """Kernel that is always launched with the first of its configurations."""

    def __init__(self, kernel: Any, configs: Sequence[triton.Config]):
        self.kernel, self.options = kernel, configs[0].all_kwargs()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.kernel[grid](*args, **kwargs, **self.options)


def autotuned(kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> Any:
    """Return ``kernel`` with the fastest of ``configs`` for each value of the arguments ``key`` and each set of dtypes.

    The configurations are timed at the first launch and the choice is kept for the life of the process. Timing runs the
    kernel many times, so it must be idempotent. The interpreter (TRITON_INTERPRET=1) takes the first configuration.
    """
    if isinstance(kernel, triton.JITFunction):
        return triton.autotune(configs=list(configs), key=list(key))(kernel)
    return Untuned(kernel, configs)
