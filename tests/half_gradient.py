"""The gradient of half a batch in one of two processes; a module of its own, since spawned processes import it."""

import torch.distributed as dist

from recontrast import deviation, hard_mined_cosine


def compute_gradient_of_half(rank, file, teacher, student, gradients):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    half = student.chunk(2)[rank].clone().requires_grad_()
    hard_mined_cosine(teacher.chunk(2)[rank], half, deviation(1.0)).backward()
    gradients[rank] = half.grad / 2  # DistributedDataParallel averages over processes
    dist.destroy_process_group()
