"""Several processes as one, started by torchrun: the whole batch's statistics, every image exactly once, one writer.

`k` processes make the steps that one would make with the whole batch: each takes its share of the indices that
`Batches` gives to all, BatchNorm sees the moments of all images (`synchronise`), the mining rule the distances of all
(`recontrast.loss`), and a process's loss counts by its share, so that DistributedDataParallel's mean over processes is
the mean over images. A batch that is smaller than the number of processes leaves some without images: they take part
with nothing. Every collective here runs on gloo (CPU) as on NCCL.
"""

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recontrast.runtime.device import resolve_device
from recontrast.runtime.sync_batchnorm import convert_sync_batchnorm

TIMEOUT = timedelta(minutes=30)  # a process decodes its images, or writes a checkpoint, while the others wait


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on one process at least; all must ask, and wait for each other."""
        return any(_all(flag)) if self.size > 1 else flag

    def shares(self, count: int) -> list[int]:
        """How many of ``count`` items each process takes: as equal as can be, the first ones more."""
        least, more = divmod(count, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def share(self, count: int) -> slice:
        """Which of ``count`` items this process takes; the shares of all, in order, are the whole."""
        ends = [0, *accumulate(self.shares(count))]
        return slice(ends[self.rank], ends[self.rank + 1])


@contextmanager
def join_processes(device: str | torch.device | None = None) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun started, joined while the block runs; alone where there was no torchrun.

    Args:
        device: as asked for; by default each process takes the GPU of its number on its machine, or the CPU.

    Yields:
        This process's place, and its device.

    Raises:
        ValueError: there are more processes on this machine than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(), resolve_device(device)
        return
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"torchrun: wanted at most one process for each of {count} GPUs, got process {local + 1}")
        chosen = torch.device("cuda", local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by the program around us
        yield current_world(), chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield current_world(), chosen
    finally:
        dist.destroy_process_group()


def current_world() -> World:
    """The place of this process among those joined; alone where none are."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def wrap_model(model: nn.Module, place: World, device: torch.device) -> nn.Module:
    """``model`` as DistributedDataParallel, its BatchNorm synchronised; itself where there is one process."""
    if place.size == 1:
        return model
    convert_sync_batchnorm(model)
    devices = [device] if device.type == "cuda" else None
    # Statistics are equal everywhere by construction: nothing to broadcast. Newer torch has another name for it.
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, **options)


# ---- BatchNorm over all processes ----------------------------------------------------------------------------------


# ---- agreeing, gathering -------------------------------------------------------------------------------------------


def check_agreement(place: World, what: Mapping[str, Any], op: str) -> None:
    """Refuse a run whose processes were given different things.

    Args:
        place: of this process.
        what: by name, what must be equal everywhere; anything that can be pickled and compared.
        op: named in the error.

    Raises:
        ValueError: on every process, with the first name that differs and the process that differs.
    """
    if place.size == 1:
        return
    everyone = _all(dict(what))
    for name in what:
        for rank, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                wanted, got = _short(everyone[0][name]), _short(theirs[name])
                raise ValueError(
                    f"{op}: {name}: wanted the same on every process, got {wanted} on 0 and {got} on {rank}"
                )


def sum_over_processes(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Replace each tensor by the sum over processes, in place; ``device`` is one that the backend knows."""
    for tensor in tensors:
        total = tensor.to(device)
        dist.all_reduce(total)
        tensor.copy_(total)


def mean_loss(place: World, losses: Tensor) -> Tensor:
    """Losses of the whole batches from this process's, which count by its share; see `recontrast.loss`."""
    if place.size > 1:
        dist.all_reduce(losses)
        losses = losses / place.size
    return losses


def broadcast_from_first(place: World, value: Any) -> Any:
    """What the first process holds, on every process."""
    if place.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _all(value: Any) -> list[Any]:
    """What each process holds."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
