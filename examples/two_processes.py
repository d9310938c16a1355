"""Custom training loop in two processes on the CPU (gloo), with the same losses as in one process.

    torchrun --nproc_per_node 2 examples/two_processes.py        # two processes
    python examples/two_processes.py                             # one process

Both commands print the same losses, up to rounding errors that AdamW amplifies: BatchNorm and hard mining use the
images of all processes. The command line needs no custom loop:

    torchrun --nproc_per_node 2 -m recontrast train DATA
"""

import torch

from recontrast import ReContrast, deviation, pairs_loss
from recontrast.data.images import normalise
from recontrast.data.synthetic import photographs
from recontrast.runtime import distributed

STEPS, BATCH, SIZE = 6, 8, 64


def batches(seed: int = 0) -> torch.Tensor:
    """Return random crops of a photograph, (STEPS, BATCH, SIZE, SIZE, 3) uint8, the same in every process."""
    photograph = torch.tensor(photographs()["brick"])
    corners = torch.randint(512 - SIZE, (STEPS * BATCH, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    crops = torch.stack([photograph[y : y + SIZE, x : x + SIZE] for y, x in corners])
    return crops[..., None].expand(-1, -1, -1, 3).reshape(STEPS, BATCH, SIZE, SIZE, 3)


torch.set_num_threads(1)
with distributed.join_processes("cpu") as (world, device):  # one process without torchrun
    torch.manual_seed(0)  # equal weights in all processes
    model = ReContrast("resnet10t", weights="random", encoder_bn="train").to(device).train()
    network = distributed.wrap_model(model, world, device)  # DistributedDataParallel, BatchNorm over all images
    optimiser = torch.optim.AdamW(
        [{"params": model.decoder_parameters(), "lr": 2e-3}, {"params": model.encoder_parameters(), "lr": 1e-5}]
    )
    for step, images in enumerate(batches()):
        own_images = images[world.share(len(images))].contiguous()  # this process's part of the batch
        loss = pairs_loss(network(normalise(own_images, model.mean, model.std)), deviation(alpha=1.0))
        optimiser.zero_grad()
        loss.backward()  # averages the gradients over processes, weighted by their shares
        optimiser.step()
        batch_loss = distributed.mean_loss(world, loss.detach().clone())
        if world.first:
            print(f"step {step} of {world.size} processes: loss {batch_loss.item():.4f}")
