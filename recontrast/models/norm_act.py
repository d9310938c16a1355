"""BatchNorm, residual add and activation as one layer, and the conversion of networks to it.

A training step is limited by memory outside its convolutions. Stock PyTorch reads and writes the features once for the
norm, once for the residual add and once for the activation; `recontrast.ops.norm_act` does all three in one pass, and
recomputes in the backward pass what the stock layers keep.
"""

import itertools
import operator
from collections import Counter
from collections.abc import Set
from typing import Any, TypeGuard

import torch
from timm.layers import BatchNormAct2d
from timm.models import resnet
from timm.models._features import FeatureDictNet, FeatureListNet
from torch import Tensor, fx, nn

from recontrast import ops
from recontrast.models.blocks import ResidualBlock

RESIDUAL_BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)  # of timm, by exact type; their forward can be traced
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has no such function
ADDITIONS = (operator.add, operator.iadd, torch.add)


class NormAct2d(nn.BatchNorm2d):
    """BatchNorm2d with an optional residual add and activation, computed by `recontrast.ops.norm_act`.

    Parameters and buffers keep the names of nn.BatchNorm2d, so state dicts fit in both directions. Where the operator
    has no kernel, and in ``torch.export``, the layer runs the stock operators.

    Args:
        norm: Layer to replace. Its parameters, statistics and mode are shared.
        act: "none", "relu" or "gelu".

    Attributes:
        act: Name of the activation.
    """

    def __init__(self, norm: nn.BatchNorm2d, act: str = "none") -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, "meta")
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.act = act
        self.train(norm.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``act(norm(x) + residual)``.

        Args:
            x: Features (N, C, H, W).
            residual: Features to add before the activation, (N, C, H, W).

        Returns:
            Features (N, C, H, W), in the dtype of ``x``.
        """
        if not ops.has_kernel("norm_act", x.device) or x.dtype not in ops.DTYPES or _is_exporting():
            return add_and_activate(super().forward(x), residual, self.act)
        uses_batch = self.training or self.running_mean is None or self.running_var is None
        statistics = {} if uses_batch else {"mean": self.running_mean, "var": self.running_var}
        residual = None if residual is None else residual.to(x.dtype)
        y, moments = ops.norm_act(x, residual, self.weight, self.bias, act=self.act, eps=self.eps, **statistics)
        if self.training and self.track_running_stats:
            self._update_statistics(moments, x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _update_statistics(self, moments: Tensor, count: int) -> None:
        """Update the running statistics as nn.BatchNorm2d does, with the unbiased variance of ``count`` values."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if not count:
            return
        mean, var = moments.to(self.running_mean.dtype)
        self.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        self.running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))

    def extra_repr(self) -> str:
        """Return the arguments of nn.BatchNorm2d and the activation."""
        return f"{super().extra_repr()}, act={self.act}"


class AddAct(nn.Module):
    """What remains of `NormAct2d` after its norm was folded into a convolution: residual add and activation.

    Args:
        act: "none", "relu" or "gelu".
    """

    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``act(x + residual)`` in place of x (N, C, H, W)."""
        return add_and_activate(x, residual, self.act)


def add_and_activate(x: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Add the residual and apply the activation with the stock operators.

    Args:
        x: Features (N, C, H, W), overwritten.
        residual: Features (N, C, H, W), or None.
        act: "none", "relu" or "gelu".

    Returns:
        Features (N, C, H, W).
    """
    x = x if residual is None else x.add_(residual)
    return x.relu_() if act == "relu" else nn.functional.gelu(x) if act == "gelu" else x


def fuse_norm_act(module: nn.Module) -> nn.Module:
    """Replace BatchNorm2d and the residual adds and activations after it by `NormAct2d`, in place.

    Activations and adds are fused where the order of the layers is known: in sequences, in `ResidualBlock`, in the
    residual blocks of timm's ResNets, which are traced, and in timm's BatchNormAct2d. Other norms are replaced alone,
    as are those in subclasses of nn.Sequential with a ``forward`` of their own. Layers with hooks, subclasses of
    BatchNorm2d with other statistics, and modules that are registered under several names are left as they are. State
    dicts keep their names.

    Args:
        module: Module, changed in place.

    Returns:
        ``module``, or its replacement if it is a BatchNorm2d or a residual block of timm itself.
    """
    counts = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    # Two fused layers of one norm would have its statistics in common only until they move to another device.
    return _fuse(module, {key for key, count in counts.items() if count > 1})


def _fuse(module: nn.Module, shared: Set[int]) -> nn.Module:
    """Fuse the layers of a module, except those in ``shared``, by identity."""
    if id(module) in shared:
        return module
    if type(module) in (nn.BatchNorm2d, BatchNormAct2d):
        return _convert(module) or module
    if isinstance(module, ResidualBlock):
        _fuse_residual_block(module, shared)
    if _is_sequence(module):
        _fuse_sequence(module, shared)
    if type(module) in RESIDUAL_BLOCKS and not _has_hooks(module):
        module = _fuse_traced(module, shared)
    for name, child in module.named_children():
        setattr(module, name, _fuse(child, shared))
    return module


def name_activation(module: Any) -> str | None:
    """Return the name of an activation of `NormAct2d`; None for any other module, and for one with hooks.

    Args:
        module: Module, compared by exact type.
    """
    if isinstance(module, nn.Module) and _has_hooks(module):
        return None
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks see the input, the output or their gradients, which a fused layer does not have."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _is_norm(module: Any) -> TypeGuard[nn.BatchNorm2d]:
    """Return whether a module is a BatchNorm2d, by exact type, without hooks."""
    return type(module) is nn.BatchNorm2d and not _has_hooks(module)


def _is_identity(module: Any) -> bool:
    """Return whether a module is an Identity, by exact type, without hooks."""
    return type(module) is nn.Identity and not _has_hooks(module)


def _is_sequence(module: nn.Module) -> bool:
    """Return whether a module calls its children one after the other and nothing else."""
    forward = getattr(module.forward, "__func__", None)  # of the object, which may have one of its own
    is_features = type(module) in (FeatureDictNet, FeatureListNet)
    return is_features or (isinstance(module, nn.Sequential) and forward is nn.Sequential.forward)


def _convert(norm: nn.Module) -> NormAct2d | None:
    """Return the replacement of a BatchNorm2d or BatchNormAct2d; None with hooks or where it has no kernel."""
    if _has_hooks(norm):
        return None
    if type(norm) is nn.BatchNorm2d:
        return NormAct2d(norm)
    if not isinstance(norm, BatchNormAct2d) or not _is_identity(norm.drop):
        return None
    act = "none" if _is_identity(norm.act) else name_activation(norm.act)
    return None if act is None else NormAct2d(norm, act)


def _fuse_residual_block(block: ResidualBlock, shared: Set[int]) -> None:
    norm, act = block.body[-1], name_activation(block.activation)
    if id(norm) in shared:
        return
    if _is_norm(norm) and act is not None and _is_sequence(block.body) and not _has_hooks(block.body):
        block.body[-1], block.activation = NormAct2d(norm, act), nn.Identity()
        block.adds_in_norm = True


def _fuse_sequence(module: nn.Module, shared: Set[int]) -> None:
    """Fuse each norm of a sequence with the activation after it, unless the output of the norm is returned as well."""
    children = list(module._modules.items())  # unlike named_children, a layer that is called twice is listed twice
    returned = getattr(module, "return_layers", {})
    for (name, norm), (next_name, following) in itertools.pairwise(children):
        act = name_activation(following)
        if _is_norm(norm) and act is not None and name not in returned and id(norm) not in shared:
            setattr(module, name, NormAct2d(norm, act))
            setattr(module, next_name, nn.Identity())


class _BlockTracer(fx.Tracer):
    """Traces the forward of a block and none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _fuse_traced(block: nn.Module, shared: Set[int]) -> nn.Module:
    """Trace a residual block of timm and fuse each norm with the add and the activation that read it alone."""
    try:
        graph = _BlockTracer().trace(block)
    except (fx.proxy.TraceError, TypeError):  # a forward that depends on its input
        return block
    modules = dict(block.named_modules())
    replaced: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and _is_identity(modules[node.target]):  # DropBlock of probability 0
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op != "call_module" or not _is_norm(modules[node.target]) or id(modules[node.target]) in shared:
            continue
        last, residual = node, None
        add = _sole_reader(node)
        if add is not None and add.op == "call_function" and add.target in ADDITIONS:
            others = [argument for argument in add.args if isinstance(argument, fx.Node) and argument is not node]
            if len(others) == 1:
                last, residual = add, others[0]
        reader = _sole_reader(last)
        if reader is None or reader.op != "call_module":
            continue
        act = name_activation(modules[reader.target])
        if act is None:
            continue
        with graph.inserting_before(reader):
            fused = graph.call_module(node.target, node.args if residual is None else (*node.args, residual))
        reader.replace_all_uses_with(fused)
        for unused in dict.fromkeys((reader, last, node)):
            graph.erase_node(unused)
        replaced[node.target] = NormAct2d(modules[node.target], act)
    for name, norm in replaced.items():
        block.set_submodule(name, norm)
    traced = fx.GraphModule(block, graph, type(block).__name__)
    used = dict(traced.named_children())
    traced._modules.clear()
    for name in block._modules:  # in the order of the block, which state dicts and optimisers rely on
        if name in used:
            traced.add_module(name, used[name])
    return traced.train(block.training)


def _sole_reader(node: fx.Node) -> fx.Node | None:
    """Return the only operation that reads the output of ``node``; None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
