"""Convolution weights in the dtype that autocast would convert them to."""

import torch
from torch import nn

from recontrast.models.fold import CONVOLUTIONS


def cast_convolutions(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of all convolutions once, in place, for inference under autocast.

    Without gradients, autocast converts them anew in each forward pass, which takes longer than the convolutions of one
    image. Their results do not change, and all other weights keep their dtype.

    Args:
        module: Network in inference.
        dtype: Dtype of autocast.
    """
    for layer in module.modules():
        if type(layer) in CONVOLUTIONS:
            for name, weight in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
