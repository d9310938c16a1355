"""Pairs of processes that train together and then end, each in a way that once could abort.

python tests/process_endings.py REPETITIONS [CASE ...]

The processes are forked, so that torch is imported once. Prints the exit codes of all processes for each case as JSON,
negative for signals.
"""

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel and torch.compile import it: once, before the processes are forked
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recontrast.runtime import distributed

STEPS = 3


def train(world, device, wrap=distributed.wrap_model):
    """Wrap a small model, make a few steps and return the wrapper."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), world, device)
    step(model, world)
    return model


def step(model, world):
    """Make a few steps. The last collective returns right before the caller goes on."""
    for _ in range(STEPS):
        loss = model(torch.randn(2, 3, 4, 4)).square().sum()
        loss.backward()
        distributed.mean_loss(world, loss.detach().clone())


def in_global():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        kept = train(world, device)


def in_closure():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        model = train(world, device)

        def evaluate(images):
            return model(images)

        kept = evaluate


def in_traceback():
    global kept
    try:
        with distributed.join_processes("cpu") as (world, device):
            model = train(world, device)
            raise ValueError(type(model).__name__)
    except ValueError as error:
        kept = error


def in_cycle():
    with distributed.join_processes("cpu") as (world, device):
        model = train(world, device)
        model.own_cycle = [model]


def by_exception():
    with distributed.join_processes("cpu") as (world, device):
        model = train(world, device)
        raise ValueError(type(model).__name__)


def by_sys_exit():
    with distributed.join_processes("cpu") as (world, device):
        model = train(world, device)
        sys.exit(3 if model.training else 4)


def by_interrupt():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        kept = train(world, device)
        signal.raise_signal(signal.SIGINT)


def wrapped_twice():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        first = train(world, device)
        kept = first, distributed.wrap_model(first.module, world, device)
        step(kept[1], world)


def several_worlds():
    global kept
    kept = []
    for _ in range(3):
        with distributed.join_processes("cpu") as (world, device):
            kept.append(train(world, device))


def compiled():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        kept = torch.compile(distributed.wrap_model(nn.Linear(3, 4), world, device), backend="eager")
        kept(torch.randn(2, 3)).sum().backward()
        distributed.mean_loss(world, torch.ones(1))


def wrapped_by_user():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        kept = train(world, device, wrap=lambda model, *_: DistributedDataParallel(model))


def group_in_global():
    global kept
    with distributed.join_processes("cpu") as (world, device):
        kept = dist.group.WORLD, train(world, device)


def users_group():
    global kept
    dist.init_process_group("gloo")
    with distributed.join_processes("cpu") as (world, device):
        kept = train(world, device)
    step(kept, world)
    dist.destroy_process_group()


def users_group_left_open():
    global kept
    dist.init_process_group("gloo")
    kept = train(distributed.current_world(), torch.device("cpu"))


def example():
    """Run the example as its script does, where the wrapped model is a global when the process ends."""
    global kept
    path = Path(__file__).parents[1] / "examples" / "two_processes.py"
    sys.stdout = open(os.devnull, "w")  # stdout has the exit codes
    kept = runpy.run_path(str(path), {"__name__": "__main__"})


EXIT_CODES = {
    example: 0,
    in_global: 0,
    in_closure: 0,
    in_traceback: 0,
    in_cycle: 0,
    by_exception: 1,
    by_sys_exit: 3,
    by_interrupt: -signal.SIGINT,
    wrapped_twice: 0,
    several_worlds: 0,
    compiled: 0,
    wrapped_by_user: 0,
    group_in_global: 0,
    users_group: 0,
    users_group_left_open: 0,
}
CASES = {case.__name__: code for case, code in EXIT_CODES.items()}
KEPT_OPEN = ("group_in_global", "users_group", "users_group_left_open")  # something else than a wrapper keeps the group


def gloo_threads():
    """Number of threads of this process that carry out collectives; 0 where the system does not tell."""
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def serve_store():
    """Fork a process that serves a store, as torchrun does; return its id and port."""
    read, write = os.pipe()
    server = os.fork()
    if not server:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        signal.pause()
    port = os.read(read, 8).decode()
    os.close(read)
    os.close(write)
    return server, port


def start(case):
    """Fork the processes of a case; return their exit codes. Return None in the forked processes."""
    server, port = serve_store()
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=port)
            return None
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    return codes


def main(repetitions, *cases):
    """Run each case a number of times. Forked processes return from here as well, and end as a script does."""
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    gc.freeze()  # the processes share the objects of all modules, and end sooner
    exit_codes = {}
    for case in cases or CASES:
        exit_codes[case] = []
        for _ in range(int(repetitions)):
            codes = start(case)
            if codes is None:
                sys.setswitchinterval(60)  # the threads of a group wait for the GIL as long as possible
                globals()[case]()
                if gloo_threads() and case not in KEPT_OPEN:
                    sys.exit(f"{case}: {gloo_threads()} threads of gloo outlive the process group")
                return
            exit_codes[case] += codes
    print(json.dumps(exit_codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
