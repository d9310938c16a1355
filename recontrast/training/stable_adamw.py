"""StableAdamW: AdamW whose step is scaled down where the gradient is larger than its second moment suggests.

Wortsman et al., NeurIPS 2023, https://arxiv.org/abs/2304.13013, algorithm 2, in the form of Dinomaly and INP-Former
(optimizers/StableAdamW.py of both codes).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Parameters that one batch of kernels updates on a GPU; bounds the memory for intermediate results to twice that.
_CHUNK = 1 << 24


class StableAdamW(Optimizer):
    """AdamW with update clipping.

    With ``u = gradient / (sqrt(second moment) + eps)``, the step of each parameter tensor is divided by
    ``max(1, rms(u) / clip_threshold)``. Nothing is read from the device: on a GPU all tensors are updated by
    for-each kernels, on a CPU one after the other, while it is in the processor's cache.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Constant added to the denominator.
        weight_decay: Decoupled weight decay, applied before the step.
        amsgrad: Whether to divide by the largest second moment so far.
        clip_threshold: Root mean square of ``u`` above which the step is scaled down.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        clip_threshold: float = 1.0,
    ) -> None:
        options = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "clip_threshold": clip_threshold}
        for name, value in options.items():
            if not value >= 0 or (name == "clip_threshold" and value == 0):
                raise ValueError(f"StableAdamW: {name}: wanted a number of at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"StableAdamW: betas: wanted two numbers of at least 0 and below 1, got {betas}")
        super().__init__(params, {**options, "betas": betas, "amsgrad": amsgrad})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # two overloads there
        """Update all parameters that have a gradient.

        Args:
            closure: Function that computes the loss and its gradients, or None.

        Returns:
            The result of ``closure``; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                self._prepare_state(p, group["amsgrad"])
            for chunk in _divide(trained):
                self._update(chunk, group)
        return loss

    def _prepare_state(self, parameter: Tensor, amsgrad: bool) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one device and dtype, with as few kernels as their number allows."""
        states = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), steps = group["betas"], [float(state["step"]) for state in states]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        if group["amsgrad"]:
            largest = [state["max_exp_avg_sq"] for state in states]
            torch._foreach_maximum_(largest, second)
            second = largest
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(gradients, denominators)
        scales = torch._foreach_norm(updates)
        torch._foreach_div_(scales, [math.sqrt(p.numel()) * group["clip_threshold"] for p in parameters])
        torch._foreach_clamp_min_(scales, 1.0)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, [-group["lr"] / (1 - beta1**step) for step in steps])
        torch._foreach_copy_(updates, first)
        torch._foreach_div_(updates, denominators)
        torch._foreach_mul_(updates, scales)
        torch._foreach_add_(parameters, updates)


def _divide(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Divide parameters into chunks of one device and dtype: single tensors on the CPU, else up to `_CHUNK` numbers."""
    chunk: list[Tensor] = []
    for parameter in parameters:
        fits = sum(p.numel() for p in chunk) + parameter.numel() <= _CHUNK and parameter.device.type != "cpu"
        same = not chunk or (chunk[0].device, chunk[0].dtype) == (parameter.device, parameter.dtype)
        if chunk and not (fits and same):
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk
