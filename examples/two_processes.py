"""Two processes that train as one, on the CPU over gloo: what an own loop needs, checked against one process.

    torchrun --nproc_per_node 2 examples/two_processes.py        # or python examples/two_processes.py, alone

The command line needs none of this: ``torchrun --nproc_per_node 2 -m recontrast train DATA`` does it all.
Both print the same losses, up to rounding that AdamW amplifies: BatchNorm and the mining of hard points see the images
of all processes.
"""

import torch

from recontrast import ReContrast, deviation, pairs_loss
from recontrast.data.images import normalise
from recontrast.data.synthetic import photographs
from recontrast.runtime import distributed

STEPS, BATCH, SIZE = 6, 8, 64


def batches(seed: int = 0) -> torch.Tensor:
    """Squares cut from photographs of bricks: (STEPS, BATCH, SIZE, SIZE, 3) uint8, the same in every process."""
    photograph = torch.tensor(photographs()["brick"])
    places = torch.randint(512 - SIZE, (STEPS * BATCH, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = torch.stack([photograph[y : y + SIZE, x : x + SIZE] for y, x in places])
    return cut[..., None].expand(-1, -1, -1, 3).reshape(STEPS, BATCH, SIZE, SIZE, 3)


torch.set_num_threads(1)
with distributed.join_processes("cpu") as (place, device):  # joins the processes; alone without torchrun
    torch.manual_seed(0)  # the same weights everywhere
    model = ReContrast("resnet10t", weights="random", encoder_bn="train").to(device).train()
    together = distributed.wrap_model(model, place, device)  # DistributedDataParallel, BatchNorm over all images
    optimiser = torch.optim.AdamW(
        [{"params": model.decoder_parameters(), "lr": 2e-3}, {"params": model.encoder_parameters(), "lr": 1e-5}]
    )
    for step, images in enumerate(batches()):
        mine = images[place.share(len(images))].contiguous()  # this process's part of the batch
        loss = pairs_loss(together(normalise(mine, model.mean, model.std)), deviation(alpha=1.0))
        optimiser.zero_grad()
        loss.backward()  # of the whole batch: a process counts by its share
        optimiser.step()
        whole = distributed.mean_loss(place, loss.detach().clone())
        if place.first:
            print(f"step {step} of {place.size} processes: loss {whole.item():.4f}")
