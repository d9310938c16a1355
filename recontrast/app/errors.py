"""Texts of errors: one sentence each, without a traceback."""

import errno
import os
import re
from typing import Any

USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
)  # caused by arguments, files or the installation: one sentence, no traceback
# Modules of required packages, which an installation without dependencies lacks.
_REQUIRED = {"torch": "torch", "timm": "timm", "safetensors": "timm", "sklearn": "scikit-learn", "scipy": "scipy"}
# Texts of allocation failures: PyTorch on a CPU and on a GPU, cuDNN, cuBLAS, C++, ONNX Runtime.
_MEMORY_TEXTS = re.compile(
    r"DefaultCPUAllocator|out of memory|can(?:no|')t allocate memory|(?:CUDNN|CUBLAS)_STATUS_ALLOC_FAILED|"
    r"bad[_ ]alloc|failed to allocate memory",
    re.IGNORECASE,
)


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error means that memory could not be allocated, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch and ONNX Runtime have error types of their own; importing them only for this would cost seconds.
    return not isinstance(error, USER_ERRORS) and _MEMORY_TEXTS.search(f"{type(error).__name__} {error}") is not None


def describe_error(error: BaseException) -> str:
    """Describe an error in one line; ``file: reason`` if the system gave both."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name in _REQUIRED:
        package = _REQUIRED[error.name]
        return (
            f"wanted the package {package} for this command, got none installed: pip install {package} (recontrast "
            "predict with an exported .onnx or .xml file works without)"
        )
    return " ".join(str(error).split()) or type(error).__name__


def describe_usage_error(error: Any) -> str:
    """Describe an error in the syntax of a command line, such as ``--batch: wanted an integer, got 'x'``."""
    text = " ".join(error.format_message().split()).rstrip(".")
    if (invalid := re.fullmatch(r"Invalid value for '(\S+?)(?: / \S+)*': (.*)", text)) is not None:
        name, reason = invalid.groups()
        # Typer's own texts: "'x' is not a valid integer", newer "Input should be a valid integer, unable to ...".
        if (other := re.fullmatch(r"(.*) is not a valid (\w+)(?: range)?", reason)) is not None:
            reason = f"wanted a valid {other[2]}, got {other[1]}"
        elif (other := re.match(r"Input should be ([^,]*)", reason)) is not None:
            reason = f"wanted {other[1]}, got another value"
        return f"{name}: {reason}"
    names = [] if error.ctx is None else error.ctx.command_path.split()[1:]
    prefix = "".join(f"{name}: " for name in names)
    return f"{prefix}{text[:1].lower()}{text[1:]} (see {' '.join(['recontrast', *names, '--help'])})"
