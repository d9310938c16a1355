"""The network for inference alone: every BatchNorm becomes part of the convolution before it.

In eval mode a BatchNorm multiplies each channel by a number and adds one, and so may the convolution that it follows:
its kernel is scaled, and its bias takes the rest. The map stays the same but for rounding; a pass over the features is
saved for each layer. Which convolution a norm follows is read from a trial run, not from names: the autograd graph
says what a norm was given, and whether anything else reads it too.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from recontrast.models.backbone import Backbone
from recontrast.models.partial_norm import PartialNorm2d
from recontrast.models.recontrast import ReContrast

# By exact type: a subclass may do other things with its weights (standardise them, say).
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, BatchNormAct2d, PartialNorm2d)


def fold(model: ReContrast, size: int | tuple[int, int] | None = None, *, keep: bool = True) -> "FoldedModel":
    """A copy of ``model`` for inference, with each BatchNorm folded into the convolution before it, in float64.

    A norm that follows no convolution, or one whose result is also read elsewhere, stays as it is. Activations stay.

    Args:
        model: trained; it is not changed.
        size: of the images of the trial run, pixels, for an encoder that takes no others; None: the smallest.
        keep: False: nothing is copied, ``model`` becomes part of the result and is of no other use any more.

    Returns:
        The copy, on the device and in the dtype and layout of ``model``.

    Raises:
        ValueError: a size that the model's strides do not divide.
    """
    folded = copy.deepcopy(model) if keep else model
    folded.eval()
    size = size or model.stride
    model.map_sizes(size)  # refuses what the strides do not divide
    pairs = _norms_of_convolutions(folded, size)
    places = {module: name for name, module in folded.named_modules()}
    for convolution, norm in pairs:
        _absorb(convolution, norm)
        parent, _, name = places[norm].rpartition(".")
        setattr(folded.get_submodule(parent), name, _what_follows(norm))
    folded.requires_grad_(False)
    return FoldedModel(folded, len(pairs))


class FoldedModel(nn.Module):
    """What `fold` gives: `ReContrast` in eval mode, for good.

    Attributes:
        model: the copy without those norms.
        norms_folded, norms_left: how many BatchNorms became part of a convolution, and how many did not.
        frozen, mean, std, stride, config: as `ReContrast` has them.
    """

    def __init__(self, model: ReContrast, norms_folded: int) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std, self.stride, self.config = model.mean, model.std, model.stride, model.config
        self.norms_folded = norms_folded
        self.norms_left = sum(isinstance(m, nn.modules.batchnorm._BatchNorm | PartialNorm2d) for m in self.modules())
        self.eval()

    @property
    def frozen(self) -> nn.Module | None:
        """The frozen encoder; None where there is one encoder alone."""
        return self.model.frozen

    def train(self, mode: bool = True) -> "FoldedModel":
        """Only eval mode exists: the statistics are gone.

        Args:
            mode: False.

        Returns:
            The model itself.

        Raises:
            ValueError: ``mode`` is True.
        """
        if mode:
            raise ValueError("fold: a folded model has no training mode; train the model that it was made from")
        return super().train(False)

    def forward(
        self, images: Tensor, views: Literal["both", "trained", "frozen"] = "both"
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (teacher, student), as `ReContrast.forward` gives them in eval mode.

        Args:
            images: (N, 3, H, W), normalised.
            views: as in `ReContrast.forward`.

        Returns:
            2 L pairs of (N, C, h, w), or L, in the dtype of the weights.

        Raises:
            ValueError: as `ReContrast.forward`.
        """
        return self.model(images, views)

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """The height and width of each level's features for images of ``size``: `ReContrast.map_sizes`."""
        return self.model.map_sizes(size)


def _norms_of_convolutions(model: ReContrast, size: int | tuple[int, int]) -> list[tuple[nn.Module, nn.Module]]:
    """Each norm that can be folded, behind its convolution."""
    made: dict[Any, nn.Module] = {}  # node of the graph -> the convolution that made it
    given: dict[nn.Module, list[Any]] = {}  # norm -> nodes of what it was given
    calls: Counter[nn.Module] = Counter()

    def convolved(module: nn.Module, _: Any, result: Tensor) -> None:
        made[result.grad_fn] = module
        calls[module] += 1

    def normed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.setdefault(module, []).append(inputs[0].grad_fn)

    hooks = [m.register_forward_hook(convolved) for m in model.modules() if type(m) in CONVOLUTIONS]
    hooks += [m.register_forward_pre_hook(normed) for m in model.modules() if type(m) in NORMS and _is_fixed(m)]
    encoders = [m for m in model.modules() if isinstance(m, Backbone)]
    frozen = [encoder.frozen for encoder in encoders]
    weight = next(model.parameters())
    height, width = (size, size) if isinstance(size, int) else size
    model.requires_grad_(True)
    for encoder in encoders:
        encoder.frozen = False  # it runs without a graph otherwise
    try:
        nothing: Any = lambda _: None  # noqa: E731 - the graph's shape will do, no activation is kept
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(nothing, nothing),
        ):
            images = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
            results = [feature.grad_fn for pair in model(images) for feature in pair]
    finally:
        for encoder, was in zip(encoders, frozen, strict=True):
            encoder.frozen = was
        for hook in hooks:
            hook.remove()
    readers = Counter(_edges(results))
    return [
        (made[nodes[0]], norm)
        for norm, nodes in given.items()
        if len(nodes) == 1 and nodes[0] in made and readers[nodes[0]] == 1 and calls[made[nodes[0]]] == 1
    ]


def _edges(results: list[Any]) -> Iterator[Any]:
    """Every node of the graph below ``results``, once for each that reads it; the caller reads the results."""
    yield from results
    seen, waiting = set(results), list(set(results))
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                yield node
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)


def _is_fixed(norm: Any) -> bool:
    """Whether what it does in eval mode does not depend on the batch."""
    return norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def _absorb(convolution: Any, norm: Any) -> None:
    """Let ``convolution`` do what ``norm`` does after it."""
    wide = torch.float64
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    shift = -norm.running_mean.to(wide) * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight.to(wide), shift * norm.weight.to(wide)
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    if convolution.bias is not None:
        shift = shift + convolution.bias.to(wide) * scale
    kernel = convolution.weight
    if isinstance(convolution, nn.ConvTranspose2d):  # (inputs, outputs / groups, h, w), one group after the other
        each = scale.view(convolution.groups, 1, -1, 1, 1)
        scaled = (kernel.to(wide).view(convolution.groups, -1, *kernel.shape[1:]) * each).view(kernel.shape)
    else:
        scaled = kernel.to(wide) * scale.view(-1, 1, 1, 1)
    kernel.copy_(scaled)  # keeps dtype and layout
    convolution.bias = nn.Parameter(shift.to(kernel.dtype), requires_grad=False)


def _what_follows(norm: Any) -> nn.Module:
    """The activation that timm's norms hold."""
    if isinstance(norm, PartialNorm2d):
        return norm.after
    return norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
