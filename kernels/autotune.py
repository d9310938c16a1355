"""How a Triton kernel gets its block sizes: by autotuning on a GPU, fixed in the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import triton

OPTIONS = {"enable_fp_fusion": True}  # of every launch: one rounding less, and Triton is about to change its default


class First:
    """A kernel launched with one configuration, untimed."""

    def __init__(self, kernel: Any, configs: Sequence[triton.Config]):
        self.kernel, self.options = kernel, configs[0].all_kwargs()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.kernel[grid](*args, **kwargs, **self.options)


def tuned(kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> Any:
    """``kernel`` with the fastest of ``configs`` for each value of the arguments ``key`` (and each set of dtypes).

    They are timed at the first launch and remembered for the life of the process; the kernel must bear repetition.
    The interpreter (TRITON_INTERPRET=1) has no driver to time with: there it is the first.
    """
    if isinstance(kernel, triton.JITFunction):
        return triton.autotune(configs=list(configs), key=list(key))(kernel)
    return First(kernel, configs)
