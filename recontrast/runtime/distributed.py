"""Training and evaluation in several processes started by torchrun, with the same result as in one process.

Each process takes its share of every batch (`World.share`). BatchNorm computes its statistics over all images
(`recontrast.runtime.sync_batchnorm`), and the mining rule over the distances of all images (`recontrast.loss`). The
loss of a process is weighted by its share, so that DistributedDataParallel's mean over processes is the mean over
images. If a batch has fewer images than there are processes, some processes have no images, but still take part in the
collectives. Every collective runs with gloo (CPU) and NCCL (GPU). Only the first process writes files.
"""

import atexit
import gc
import inspect
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import accumulate, count
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recontrast.runtime.device import resolve_device
from recontrast.runtime.sync_batchnorm import convert_sync_batchnorm

TIMEOUT = timedelta(minutes=30)  # the others wait while a process decodes its images or writes a checkpoint


@dataclass(frozen=True)
class World:
    """Rank of this process and number of processes of a run.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and log lines."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in at least one process; a collective, which all processes must call."""
        return any(_gather_objects(flag)) if self.size > 1 else flag

    def shares(self, count: int) -> list[int]:
        """Return how many of ``count`` items each process gets: equally many, or one more on the first ranks."""
        quotient, remainder = divmod(count, self.size)
        return [quotient + (rank < remainder) for rank in range(self.size)]

    def share(self, count: int) -> slice:
        """Return the slice of this process out of ``count`` items; the slices of all ranks cover all items in order."""
        bounds = [0, *accumulate(self.shares(count))]
        return slice(bounds[self.rank], bounds[self.rank + 1])


@contextmanager
def join_processes(device: str | torch.device | None = None) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started while the block runs; without torchrun there is a single process.

    Args:
        device: Device of this process; by default the GPU whose index is the local rank, or the CPU if there is no GPU.

    Yields:
        The world, as seen from this process, and the device of this process.

    Raises:
        ValueError: If there are more processes on this machine than GPUs, or the device is Apple's "mps".
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(), resolve_device(device)
        return
    resolved = resolve_device(device)
    if resolved.type == "mps":
        raise ValueError("torchrun: wanted the CPU or CUDA GPUs, got 'mps', where processes cannot exchange data")
    if resolved.type == "cuda" and resolved.index is None:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            got = f"got process {local_rank + 1}"
            raise ValueError(f"torchrun: wanted at most one process for each of {gpus} GPUs, {got}")
        resolved = torch.device("cuda", local_rank)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
    _settle_at_exit()
    if dist.is_initialized():  # by the calling program
        yield current_world(), resolved
        return
    _init_process_group("nccl" if resolved.type == "cuda" else "gloo")
    try:
        yield current_world(), resolved
    finally:
        _release_process_groups()
        dist.destroy_process_group()


def current_world() -> World:
    """Return the world of the initialised process group, or of a single process if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def wrap_model(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Wrap a model in DistributedDataParallel, with BatchNorm over all processes.

    Args:
        model: Model on ``device``; its BatchNorm layers are converted in place.
        world: Rank and number of processes.
        device: Device of this process.

    Returns:
        The wrapped model, which shares the parameters of ``model``; ``model`` itself for a single process.
    """
    if world.size == 1:
        return model
    _settle_at_exit()
    convert_sync_batchnorm(model)
    devices = [device] if device.type == "cuda" else None
    # BatchNorm statistics are equal in all processes, so buffers need no broadcast. The option's name depends on torch.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, **options)


# ---- start and end of a process group --------------------------------------------------------------------------------
#
# A gloo worker thread releases the tensor of a collective shortly after the collective has returned, and needs the GIL
# to do so. If the interpreter shuts down at that moment, the process aborts with "terminate called without an active
# exception". The destructor of the process group joins these threads, but it does not run while a
# DistributedDataParallel refers to the group.


@cache
def _connect_store(*environment: str | None) -> tuple[dist.Store, int, int, Iterator[int]]:
    """Connect to the key-value store of the processes; return it with rank, world size and a counter of groups.

    Connected once for each environment, because rank 0 may serve the store, which must not close between two groups.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    return store, rank, size, count()


def _init_process_group(backend: str) -> None:
    """Initialise the default process group from the environment, also after an earlier one was destroyed."""
    variables = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    store, rank, size, groups = _connect_store(*map(os.environ.get, variables))
    # Each group has its own prefix, because the store still has the addresses of earlier groups.
    store = dist.PrefixStore(f"group{next(groups)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


class _DestroyedGroup:
    """Placeholder for a destroyed process group; reading any attribute raises RuntimeError."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("DistributedDataParallel: wanted a process group, got one that is already destroyed")


def _release_process_groups() -> None:
    """Remove the references to process groups from every DistributedDataParallel in this process.

    The wrappers stay usable for inference under `torch.no_grad`, and for their state dict.
    """
    destroyed = _DestroyedGroup()
    for instance in gc.get_objects():
        kind = type(instance)  # isinstance would execute the code of proxy objects
        # functools.wraps, which torch.compile applies to wrappers, copies their attributes to functions.
        copied = kind is FunctionType and isinstance(getattr(instance, "reducer", None), dist.Reducer)
        if copied or DistributedDataParallel in kind.__mro__:
            # The reducer also refers to the group, and would join its threads while holding the GIL, a deadlock. The
            # Python object of the group releases the GIL first, so it must hold the last reference.
            vars(instance).update(_comm_hooks=[], logger=destroyed, reducer=destroyed, process_group=destroyed)


@cache
def _settle_at_exit() -> None:
    """Let the threads of all process groups finish at exit, also those of groups that the caller created."""

    def settle() -> None:
        _release_process_groups()
        time.sleep(0.1)  # releases the GIL for the threads of groups that other objects refer to

    atexit.register(settle)


# ---- agreement and collectives ------------------------------------------------------------------------------------


def check_agreement(world: World, arguments: Mapping[str, Any], op: str) -> None:
    """Check that all processes were given equal arguments.

    Args:
        world: Rank and number of processes.
        arguments: Arguments by name; their values must support pickling and comparison.
        op: Name of the operation, for the error.

    Raises:
        ValueError: In every process, with the first argument that differs and the rank where it differs.
    """
    if world.size == 1:
        return
    gathered = _gather_objects(dict(arguments))
    for name in arguments:
        for rank, others in enumerate(gathered):
            if others[name] != gathered[0][name]:
                wanted, got = _abbreviate(gathered[0][name]), _abbreviate(others[name])
                raise ValueError(
                    f"{op}: {name}: wanted the same on every process, got {wanted} on 0 and {got} on {rank}"
                )


def sum_over_processes(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Sum tensors over all processes.

    Args:
        tensors: Tensors of any shape and dtype, replaced by their sums in place.
        device: Device that the backend supports, on which the sums are computed.
    """
    for tensor in tensors:
        total = tensor.to(device)
        dist.all_reduce(total)
        tensor.copy_(total)


def mean_loss(world: World, losses: Tensor) -> Tensor:
    """Compute the losses of full batches from the losses of all processes.

    Args:
        world: Rank and number of processes.
        losses: Losses of this process, (steps,), weighted by its share of each batch as in `recontrast.loss`. With
            several processes they are overwritten.

    Returns:
        The losses of the full batches, (steps,), in the dtype of ``losses``.
    """
    if world.size > 1:
        dist.all_reduce(losses)
        losses = losses / world.size
    return losses


def broadcast_from_first(world: World, value: Any) -> Any:
    """Return the first process's value in every process.

    Args:
        world: Rank and number of processes.
        value: Value that supports pickling; ignored except in the first process.

    Returns:
        The value of the first process.
    """
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_from_all(world: World, value: Any) -> list[Any]:
    """Return the values of all processes, in every process.

    Args:
        world: Rank and number of processes.
        value: Value of this process that supports pickling.

    Returns:
        The values in the order of ranks.
    """
    return [value] if world.size == 1 else _gather_objects(value)


def _gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _abbreviate(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
