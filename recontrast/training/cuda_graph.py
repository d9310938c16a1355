"""Training steps as a CUDA graph: recorded once, then replayed with one launch instead of about a thousand.

A recorded step reads its inputs at fixed addresses, so images, alpha and learning rates are copied into static buffers.
Steps that differ from the recorded one run eagerly: the first ones, a smaller last batch, other active optimisers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Eager steps before the first recording. A first call selects cuDNN's algorithms, compiles kernels of Triton and
# torch.compile, and allocates the optimisers' states; none of that may happen during a recording.
WARMUP_STEPS = 3

Step = Callable[[Sequence[Optimizer], Tensor, Tensor], Tensor]  # active optimisers, images, alpha (0-dim) -> loss
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # function -> its replay, its result
Recording = tuple[list[int], Callable[[], None], Tensor]  # addresses of the optimisers' states, replay, loss


class GraphedStep:
    """Training step that runs as a CUDA graph after `WARMUP_STEPS` eager calls.

    The optimisers must keep their states on the device, as fused AdamW does. If a state is reset or loaded, the step is
    recorded again.

    Args:
        step: Training step that never waits for the device: forward, backward and optimisers.
        batch: Batch size to record; other batches run eagerly.
        device: Device of the step.
        record: Replacement for `record_graph`, for tests without a GPU.

    Attributes:
        replays: Number of replayed steps.
    """

    def __init__(self, step: Step, batch: int, device: torch.device, record: Record | None = None) -> None:
        self.step, self.batch, self.device, self.record = step, batch, device, record or record_graph
        self.alpha = torch.zeros((), device=device)
        self.learning_rates: dict[int, list[Tensor]] = {}  # by id of the optimiser, one for each parameter group
        self.images: Tensor | None = None  # static input of the recorded steps
        self.recordings: dict[tuple[int, ...], Recording] = {}  # by ids of the active optimisers
        self.side_stream: torch.cuda.Stream | None = None
        self.calls = self.replays = 0

    def __call__(self, active: Sequence[Optimizer], images: Tensor, alpha: float) -> Tensor:
        """Run or replay the step.

        Args:
            active: Optimisers that update their parameters in this step.
            images: Normalised images on the device, (N, 3, H, W).
            alpha: Parameter of `recontrast.deviation`.

        Returns:
            The loss before the update, a scalar on the device.
        """
        self.alpha.fill_(alpha)
        original_options = self._move_learning_rates(active)
        try:
            return self._run(active, images)
        finally:
            for group, options in original_options:
                group.update(options)

    def _run(self, active: Sequence[Optimizer], images: Tensor) -> Tensor:
        if len(images) != self.batch:
            return self.step(active, images, self.alpha)
        self.calls += 1
        addresses = [_state_address(optimiser) for optimiser in active]
        if self.calls <= WARMUP_STEPS or 0 in addresses:  # 0: the next step allocates the state
            return self._run_eagerly(active, images)
        if self.images is None or self.images.shape != images.shape:
            self.images = torch.empty_like(images)
            self.recordings.clear()
        static_images = self.images.copy_(images)
        key = tuple(id(optimiser) for optimiser in active)
        if key not in self.recordings or self.recordings[key][0] != addresses:
            self.recordings.pop(key, None)  # frees its memory for the new recording
            for optimiser in active:
                for group in optimiser.param_groups:
                    group["capturable"] = self.device.type == "cuda"  # set only here: eager steps would warn
            replay, loss = self.record(lambda: self.step(active, static_images, self.alpha))
            self.recordings[key] = (addresses, replay, loss)
        _, replay, loss = self.recordings[key]
        replay()
        self.replays += 1
        return loss.clone()  # the next replay overwrites the original

    def _move_learning_rates(self, active: Sequence[Optimizer]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Replace the learning rates by tensors on the device and return each group with its original options."""
        original_options = []
        for optimiser in active:
            groups = optimiser.param_groups
            if id(optimiser) not in self.learning_rates:
                self.learning_rates[id(optimiser)] = [torch.zeros((), device=self.device) for _ in groups]
            for group, rate in zip(groups, self.learning_rates[id(optimiser)], strict=True):
                original_options.append((group, {"lr": group["lr"], "capturable": group["capturable"]}))
                group["lr"] = rate.fill_(group["lr"])
        return original_options

    def _run_eagerly(self, active: Sequence[Optimizer], images: Tensor) -> Tensor:
        """Run the step on a side stream, which CUDA graphs require for warm-up steps."""
        if self.device.type != "cuda":
            return self.step(active, images, self.alpha)
        if self.side_stream is None:
            self.side_stream = torch.cuda.Stream(self.device)  # reused: the allocator pools memory by stream
        current_stream, side_stream = torch.cuda.current_stream(self.device), self.side_stream
        side_stream.wait_stream(current_stream)
        with torch.cuda.stream(side_stream):
            loss = self.step(active, images, self.alpha)
        current_stream.wait_stream(side_stream)
        return loss.clone()


def _state_address(optimiser: Optimizer) -> int:
    """Return the address of the first parameter's state, or 0 if it is not allocated."""
    state = optimiser.state.get(optimiser.param_groups[0]["params"][0], {})
    return state["exp_avg"].data_ptr() if "exp_avg" in state else 0


def record_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a function as a CUDA graph, without running it.

    Args:
        function: Function without host waits that returns a tensor.

    Returns:
        A function that replays the graph, and the tensor of any shape and dtype that each replay overwrites with the
        result.
    """
    torch.cuda.empty_cache()  # the graph allocates its own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
