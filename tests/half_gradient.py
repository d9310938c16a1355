"""The gradient of half a batch in one of two processes; a module of its own, since spawned processes import it."""

import torch.distributed as dist

from recontrast import deviation, hard_mined_cosine, hardest, point_cosine, power

RULES = (deviation(0.3, 0.2), hardest(0.25, 0.1), power(3.0))


def compute_gradient_of_half(rank, file, teacher, student, gradients):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    half = student.chunk(2)[rank].clone().requires_grad_()
    hard_mined_cosine(teacher.chunk(2)[rank], half, deviation(1.0)).backward()
    gradients[rank] = half.grad / 2  # DistributedDataParallel averages over processes
    dist.destroy_process_group()


def compute_masked_gradients_of_half(rank, file, teacher, student, inside, gradients):
    """Compute the gradients of the mined losses, and of the mean over points, of the points inside."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    first = slice(0, 3) if rank == 0 else slice(3, 4)  # uneven shares
    own = {"inside": inside if len(inside) == 1 else inside[first]}
    for number, rule in enumerate((*RULES, None)):
        part = student[first].clone().requires_grad_()
        loss = point_cosine(teacher[first], part, **own) if rule is None else hard_mined_cosine(
            teacher[first], part, rule, **own)  # fmt: skip
        loss.backward()
        gradients[number, first] = part.grad / 2  # DistributedDataParallel averages over processes
    dist.destroy_process_group()
