"""BatchNorm folding for inference: each BatchNorm becomes part of the convolution before it.

In eval mode, BatchNorm multiplies each channel by a factor and adds an offset. A convolution can do both: the factor
scales its kernel, and the offset goes into its bias. The anomaly map changes by rounding alone, and each fold saves one
pass over the features. A trial run finds the convolution before each norm: the autograd graph shows which operation
produced the input of the norm and whether another operation reads it too.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from recontrast.device_limits import to_float64
from recontrast.models.backbone import Backbone
from recontrast.models.network import Network, Views
from recontrast.models.norm_act import AddAct, NormAct2d
from recontrast.models.partial_norm import PartialNorm2d
from recontrast.models.replacement import replace_modules

# Compared by exact type, because a subclass may transform its weights (by standardisation, for example).
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, BatchNormAct2d, PartialNorm2d, NormAct2d)


def fold(model: Network, size: int | tuple[int, int] | None = None, *, keep: bool = True) -> "FoldedModel":
    """Copy ``model`` for inference and fold each BatchNorm into the convolution before it, in float64.

    A norm stays in place if it does not follow a convolution, or if another operation reads the output of that
    convolution. Activations stay in place.

    Args:
        model: Trained model. It is not changed unless ``keep`` is False.
        size: Image size of the trial run in pixels, for encoders with a fixed input size. None uses the smallest size.
        keep: Whether to keep ``model``. False folds the model itself without a copy; do not use it afterwards.

    Returns:
        The folded model, on the device and in the dtype and memory layout of ``model``.

    Raises:
        ValueError: If ``size`` is not a multiple of the model's stride.
    """
    folded = copy.deepcopy(model) if keep else model
    folded.eval()
    size = size or model.stride
    model.map_sizes(size)  # raises if the size does not fit
    pairs = _find_foldable_norms(folded, size)
    for convolution, norm in pairs:
        _fold_norm(convolution, norm)
    replace_modules(folded, {norm: _get_activation(norm) for _, norm in pairs})
    folded.requires_grad_(False)
    return FoldedModel(folded, len(pairs))


class FoldedModel(Network):
    """A network without the BatchNorms that `fold` removed, always in eval mode.

    Args:
        model: Model after folding.
        norms_folded: Number of BatchNorms that were folded.

    Attributes:
        model: Model after folding.
        norms_folded: Number of BatchNorms that were folded.
        norms_left: Number of BatchNorms that stay in place.
        frozen, mean, std, stride, config: See `Network`.
    """

    def __init__(self, model: Network, norms_folded: int) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std, self.stride = model.mean, model.std, model.stride
        self.align_corners, self.has_bounded_distances = model.align_corners, model.has_bounded_distances
        self.norms_folded = norms_folded
        self.norms_left = sum(isinstance(m, nn.modules.batchnorm._BatchNorm | PartialNorm2d) for m in self.modules())
        self.eval()

    @property
    def encoder(self) -> Backbone:  # type: ignore[override]
        """Encoder of the network."""
        return self.model.encoder

    @property
    def frozen(self) -> Backbone | None:  # type: ignore[override]
        """Frozen encoder; None if the network has a single encoder."""
        return self.model.frozen

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor of the network, see `Network.config`."""
        return self.model.config

    @property
    def max_distance(self) -> float:
        """Upper end of the scale of distances, see `Network.max_distance`."""
        return self.model.max_distance

    def train(self, mode: bool = True) -> "FoldedModel":
        """Accept eval mode only, because folding removes the BatchNorms that training needs.

        Args:
            mode: False for eval mode.

        Returns:
            The model itself.

        Raises:
            ValueError: If ``mode`` is True.
        """
        if mode:
            raise ValueError("fold: a folded model has no training mode; train the original model and fold it again")
        return super().train(False)

    def forward(self, images: Tensor, *arguments: Any) -> Any:
        """Compute what the network computes in eval mode.

        Args:
            images: Normalised images (N, 3, H, W).
            arguments: Further arguments of the network's ``forward``, such as ``views`` of `ReContrast`.

        Returns:
            Features in the dtype of the weights: for `ReContrast`, pairs (teacher, student).

        Raises:
            ValueError: If the network raises it.
        """
        return self.model(images, *arguments)

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Compute point distances and image scores, see `Network.distances`.

        Args:
            images: Normalised images (N, 3, H, W).
            views: Encoders whose features serve as targets.
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            distances: Distances (N, h, w), float32.
            scores: The network's own image scores, (N,), float32; None if it has none.

        Raises:
            ValueError: If the network raises it.
        """
        return self.model.distances(images, views, exportable=exportable)

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of each level's features for images of ``size``, see `Network.map_sizes`."""
        return self.model.map_sizes(size)

    def cast(self, dtype: torch.dtype) -> "FoldedModel":
        """Convert the weights, see `Network.cast`.

        Args:
            dtype: Floating-point dtype.

        Returns:
            The network itself.
        """
        self.model.cast(dtype)
        return self

    def fix_size(self, size: tuple[int, int]) -> "FoldedModel":
        """Fix the image size, see `Network.fix_size`.

        Args:
            size: Height and width of images in pixels.

        Returns:
            The network itself.
        """
        self.model.fix_size(size)
        return self

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the network, whose ``distances`` calls it.

        Args:
            arguments: Arguments of `torch.nn.Module.compile`.
            options: Keyword arguments of the same.
        """
        self.model.compile(*arguments, **options)


def _find_foldable_norms(model: Network, size: int | tuple[int, int]) -> list[tuple[nn.Module, nn.Module]]:
    """Return (convolution, norm) for each norm that can be folded."""
    producers: dict[Any, nn.Module] = {}  # graph node -> convolution that produced it
    inputs: dict[nn.Module, list[Any]] = {}  # norm -> graph node of its input in each call
    calls: Counter[nn.Module] = Counter()

    def record_convolution(module: nn.Module, _: Any, result: Tensor) -> None:
        producers[result.grad_fn] = module
        calls[module] += 1

    def record_norm(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.setdefault(module, []).append(arguments[0].grad_fn)

    hooks = [m.register_forward_hook(record_convolution) for m in model.modules() if type(m) in CONVOLUTIONS]
    norms = [m for m in model.modules() if type(m) in NORMS and _has_running_statistics(m)]
    hooks += [norm.register_forward_pre_hook(record_norm) for norm in norms]
    try:
        outputs = _run_with_graph(model, size)
    finally:
        for hook in hooks:
            hook.remove()
    readers = Counter(_iterate_edges(outputs))
    return [
        (producers[nodes[0]], norm)
        for norm, nodes in inputs.items()
        if len(nodes) == 1 and nodes[0] in producers and readers[nodes[0]] == 1 and calls[producers[nodes[0]]] == 1
    ]


def _run_with_graph(model: Network, size: int | tuple[int, int]) -> list[Any]:
    """Run ``model`` on a black image and return the graph node of each output; frozen encoders get a graph too."""
    encoders = [m for m in model.modules() if isinstance(m, Backbone)]
    was_frozen = [encoder.frozen for encoder in encoders]
    weight = next(model.parameters())
    height, width = (size, size) if isinstance(size, int) else size
    model.requires_grad_(True)
    for encoder in encoders:
        encoder.frozen = False  # a frozen encoder runs without a graph
    try:
        discard: Any = lambda _: None  # noqa: E731 - only the structure of the graph matters, not its activations
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(discard, discard),
        ):
            images = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
            return [feature.grad_fn for feature in _iterate_tensors(model(images))]
    finally:
        for encoder, frozen in zip(encoders, was_frozen, strict=True):
            encoder.frozen = frozen


def _iterate_tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in the outputs of a network: a tensor, or nested sequences of them."""
    if isinstance(outputs, Tensor):
        yield outputs
        return
    for output in outputs:
        yield from _iterate_tensors(output)


def _iterate_edges(outputs: list[Any]) -> Iterator[Any]:
    """Yield each node of the graph once for every operation that reads it; the caller counts as a reader of outputs."""
    yield from outputs
    visited, waiting = set(outputs), list(set(outputs))
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                yield node
                if node not in visited:
                    visited.add(node)
                    waiting.append(node)


def _has_running_statistics(norm: Any) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def _fold_norm(convolution: Any, norm: Any) -> None:
    """Scale the kernel and set the bias of ``convolution`` so that it includes ``norm``."""
    scale = torch.rsqrt(to_float64(norm.running_var) + norm.eps)
    shift = -to_float64(norm.running_mean) * scale
    if norm.weight is not None:
        scale, shift = scale * to_float64(norm.weight), shift * to_float64(norm.weight)
    if norm.bias is not None:
        shift = shift + to_float64(norm.bias)
    if convolution.bias is not None:
        shift = shift + to_float64(convolution.bias) * scale
    kernel = convolution.weight
    if isinstance(convolution, nn.ConvTranspose2d):  # (inputs, outputs / groups, h, w), group by group
        by_group = scale.view(convolution.groups, 1, -1, 1, 1)
        scaled = (to_float64(kernel).view(convolution.groups, -1, *kernel.shape[1:]) * by_group).view(kernel.shape)
    else:
        scaled = to_float64(kernel) * scale.view(-1, 1, 1, 1)
    kernel.copy_(scaled.to(kernel.dtype))  # in place, to keep dtype and memory layout
    convolution.bias = nn.Parameter(shift.to(kernel.dtype).to(kernel.device), requires_grad=False)


def _get_activation(norm: Any) -> nn.Module:
    """Return what a norm does besides normalising: nothing, or an activation after an optional residual add."""
    if isinstance(norm, NormAct2d):
        return AddAct(norm.act)
    if isinstance(norm, PartialNorm2d):
        return norm.after
    return norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
