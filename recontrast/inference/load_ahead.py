"""Loading of the next batch while a network runs."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def compute_batches(
    load: Callable[[int], Batch], compute: Callable[[Batch], Result], count: int, batch: int
) -> Iterator[Result]:
    """Load and compute batch after batch; the next one is loaded in another thread while one is computed.

    Args:
        load: Function that loads the batch that begins at a position.
        compute: Function of a loaded batch.
        count: Number of items.
        batch: Number of items per batch.

    Yields:
        The results of ``compute``, in order.
    """
    with ThreadPoolExecutor(1) as pool:
        loading = (pool.submit(load, start) for start in range(0, count, batch))
        queue = deque(islice(loading, 1))
        while queue:
            queue.extend(islice(loading, 1))
            yield compute(queue.popleft().result())
