"""Training steps as a CUDA graph: recorded once, then replayed with one launch instead of about a thousand.

A recorded step reads its inputs at fixed addresses, so images, cached features, alpha and learning rates are copied
into static buffers. Steps that differ from the recorded one run eagerly: the first ones, a smaller last batch, other
active optimisers.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Eager steps before the first recording. A first call selects cuDNN's algorithms, compiles kernels of Triton and
# torch.compile, and allocates the optimisers' states; none of that may happen during a recording.
WARMUP_STEPS = 3

# Active optimisers, images, alpha (0-dim), cached features of the frozen encoder or None -> loss
Step = Callable[[Sequence[Optimizer], Tensor, Tensor, Sequence[Tensor] | None], Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]  # function -> its replay, its result


@dataclass(frozen=True)
class Recording:
    """A recorded step.

    Attributes:
        states: Tensors of the optimisers' states that it reads and writes. They are kept, so that no other tensors
            can be allocated at their addresses.
        replay: Repeats the step.
        loss: Loss, which each replay overwrites.
    """

    states: list[Tensor]
    replay: Callable[[], None]
    loss: Tensor

    def is_valid(self, states: list[Tensor]) -> bool:
        """Return whether the optimisers still have these states, and not others at the same addresses."""
        return len(states) == len(self.states) and all(map(operator.is_, states, self.states))


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
        self.inputs: list[Tensor] = []  # static inputs of the recorded steps: images, cached features
        self.recordings: dict[tuple[int, ...], Recording] = {}  # by ids of the active optimisers
        self.side_stream: torch.cuda.Stream | None = None
        self.calls = self.replays = 0

    def __call__(
        self,
        active: Sequence[Optimizer],
        images: Tensor,
        alpha: float,
        frozen_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run or replay the step.

        Args:
            active: Optimisers that update their parameters in this step.
            images: Normalised images on the device, (N, 3, H, W).
            alpha: Parameter of `recontrast.deviation`.
            frozen_features: Cached features of the frozen encoder, (N, ...) of each level on the device; None lets the
                step compute them. Either all calls have them or none.

        Returns:
            The loss before the update, a scalar on the device.
        """
        self.alpha.fill_(alpha)
        original_options = self._move_learning_rates(active)
        try:
            return self._run(active, images, frozen_features)
        finally:
            for group, options in original_options:
                group.update(options)

    def _run(self, active: Sequence[Optimizer], images: Tensor, frozen_features: Sequence[Tensor] | None) -> Tensor:
        if len(images) != self.batch:
            return self.step(active, images, self.alpha, frozen_features)
        self.calls += 1
        states = _list_states(active)
        if self.calls <= WARMUP_STEPS or states is None:  # None: the next step allocates states
            return self._run_eagerly(active, images, frozen_features)
        self._copy_inputs([images, *(frozen_features or ())])
        key = tuple(id(optimiser) for optimiser in active)
        recording = self.recordings.get(key)
        if recording is None or not recording.is_valid(states):
            recording = None
            self.recordings.pop(key, None)  # frees its memory for the new recording
            for optimiser in active:
                for group in optimiser.param_groups:
                    if "capturable" in group:  # SGD has no such option
                        group["capturable"] = self.device.type == "cuda"  # set only here: eager steps would warn
            static_images, *static_features = self.inputs
            features = None if frozen_features is None else static_features
            replay, loss = self.record(lambda: self.step(active, static_images, self.alpha, features))
            recording = self.recordings[key] = Recording(states, replay, loss)
        recording.replay()
        self.replays += 1
        return recording.loss.clone()  # the next replay overwrites the original

    def _copy_inputs(self, inputs: list[Tensor]) -> None:
        """Copy the inputs of a step into the static buffers; new ones, and no recordings, if their shapes differ."""
        if [(t.shape, t.dtype) for t in inputs] != [(t.shape, t.dtype) for t in self.inputs]:
            self.inputs = [torch.empty_like(t) for t in inputs]
            self.recordings.clear()
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)

    def _move_learning_rates(self, active: Sequence[Optimizer]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Replace the learning rates by tensors on the device and return each group with its original options."""
        original_options = []
        for optimiser in active:
            groups = optimiser.param_groups
            if id(optimiser) not in self.learning_rates:
                self.learning_rates[id(optimiser)] = [torch.zeros((), device=self.device) for _ in groups]
            for group, rate in zip(groups, self.learning_rates[id(optimiser)], strict=True):
                original: dict[str, Any] = {name: group[name] for name in ("lr", "capturable") if name in group}
                original_options.append((group, original))
                group["lr"] = rate.fill_(group["lr"])
        return original_options

    def _run_eagerly(
        self, active: Sequence[Optimizer], images: Tensor, frozen_features: Sequence[Tensor] | None
    ) -> Tensor:
        """Run the step on a side stream, which CUDA graphs require for warm-up steps."""
        if self.device.type != "cuda":
            return self.step(active, images, self.alpha, frozen_features)
        if self.side_stream is None:
            self.side_stream = torch.cuda.Stream(self.device)  # reused: the allocator pools memory by stream
        current_stream, side_stream = torch.cuda.current_stream(self.device), self.side_stream
        side_stream.wait_stream(current_stream)
        with torch.cuda.stream(side_stream):
            loss = self.step(active, images, self.alpha, frozen_features)
        current_stream.wait_stream(side_stream)
        return loss.clone()


def _list_states(active: Sequence[Optimizer]) -> list[Tensor] | None:
    """Return all tensors of the optimisers' states, or None if an optimiser has none yet."""
    states: list[Tensor] = []
    for optimiser in active:
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        values = [value for parameter in parameters for value in optimiser.state.get(parameter, {}).values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not tensors:
            return None
        states += tensors
    return states


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
