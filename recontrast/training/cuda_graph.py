"""A training step recorded once as a CUDA graph and replayed: one launch instead of a thousand.

What a recorded step reads must stay where it was: images, alpha and learning rates are copied into buffers of its own.
Whatever it was not recorded for runs eagerly: the first steps, a ragged last batch, another set of optimisers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Eager steps before one is recorded: what is chosen or built at a first call (cuDNN's algorithms, Triton's and
# torch.compile's kernels, the optimisers' states) must be there.
WARMUP_STEPS = 3

Step = Callable[[Sequence[Optimizer], Tensor, Tensor], Tensor]  # optimisers, images, alpha (0-dim) -> loss
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # work -> how to repeat it, its result


class GraphedStep:
    """Calls a step, from its `WARMUP_STEPS` + 1st call on as a recorded graph.

    The optimisers must keep their state on the device (fused AdamW does). A state that was thrown away or loaded anew
    is noticed: the step is then recorded again.

    Args:
        step: one step of training without a wait for the device: gradients cleared, loss, backward, optimisers.
        batch: images of a batch that is worth recording; others run eagerly.
        device: the step's.
        record: for tests. None: `record_graph`.

    Attributes:
        replays: steps that were replayed.
    """

    def __init__(self, step: Step, batch: int, device: torch.device, record: Record | None = None) -> None:
        self.step, self.batch, self.device, self.record = step, batch, device, record or record_graph
        self.alpha = torch.zeros((), device=device)
        self.rates: dict[int, list[Tensor]] = {}  # optimiser -> learning rate of each group
        self.images: Tensor | None = None
        # optimisers that move -> where their states were, how to repeat the step, its loss
        self.graphs: dict[tuple[int, ...], tuple[list[int], Callable[[], None], Tensor]] = {}
        self.aside: torch.cuda.Stream | None = None
        self.calls = self.replays = 0

    def __call__(self, moving: Sequence[Optimizer], images: Tensor, alpha: float) -> Tensor:
        """One step.

        Args:
            moving: the optimisers that take part.
            images: (N, 3, H, W), normalised, on the device.
            alpha: of `recontrast.deviation`.

        Returns:
            The loss of before the step, a scalar on the device.
        """
        self.alpha.fill_(alpha)
        before = self._borrow(moving)
        try:
            return self._run(moving, images)
        finally:
            for group, kept in before:
                group.update(kept)

    def _run(self, moving: Sequence[Optimizer], images: Tensor) -> Tensor:
        if len(images) != self.batch:
            return self.step(moving, images, self.alpha)
        self.calls += 1
        places = [_place(optimiser) for optimiser in moving]
        if self.calls <= WARMUP_STEPS or 0 in places:  # 0: its state is made by the next step
            return self._aside(moving, images)
        if self.images is None or self.images.shape != images.shape:
            self.images = torch.empty_like(images)
            self.graphs.clear()
        static = self.images.copy_(images)
        which = tuple(id(optimiser) for optimiser in moving)
        if which not in self.graphs or self.graphs[which][0] != places:
            self.graphs.pop(which, None)  # its memory is free for the next
            for optimiser in moving:
                for group in optimiser.param_groups:
                    group["capturable"] = self.device.type == "cuda"  # eager steps warn where it is set
            self.graphs[which] = (places, *self.record(lambda: self.step(moving, static, self.alpha)))
        _, repeat, loss = self.graphs[which]
        repeat()
        self.replays += 1
        return loss.clone()  # the next replay overwrites it

    def _borrow(self, moving: Sequence[Optimizer]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Put the learning rates into tensors on the device; what the groups held, to be put back."""
        before = []
        for optimiser in moving:
            groups = optimiser.param_groups
            if id(optimiser) not in self.rates:
                self.rates[id(optimiser)] = [torch.zeros((), device=self.device) for _ in groups]
            for group, rate in zip(groups, self.rates[id(optimiser)], strict=True):
                before.append((group, {"lr": group["lr"], "capturable": group["capturable"]}))
                group["lr"] = rate.fill_(group["lr"])
        return before

    def _aside(self, moving: Sequence[Optimizer], images: Tensor) -> Tensor:
        """An eager step as a recording will run it: off the default stream."""
        if self.device.type != "cuda":
            return self.step(moving, images, self.alpha)
        if self.aside is None:
            self.aside = torch.cuda.Stream(self.device)  # one: each keeps the memory of its own tensors
        here, aside = torch.cuda.current_stream(self.device), self.aside
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            loss = self.step(moving, images, self.alpha)
        here.wait_stream(aside)
        return loss.clone()


def _place(optimiser: Optimizer) -> int:
    """Where the state of the first parameter lies; 0 where there is none."""
    state = optimiser.state.get(optimiser.param_groups[0]["params"][0], {})
    return state["exp_avg"].data_ptr() if "exp_avg" in state else 0


def record_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``work`` as a CUDA graph, without running it: how to run it, and where its result then is."""
    torch.cuda.empty_cache()  # the graph takes memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result
