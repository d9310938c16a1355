"""Read the pickle in a PyTorch archive without running code from it.

A pickle is a program. The programs that `torch.save` writes for dictionaries of tensors use a few operations and name
a few classes; a pickle with any other operation or class is refused before it is run. The classes it may name are
replaced by functions of this module, which build tensors from members of the archive.
"""

import io
import pickle
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recontrast.data.archive import Archive, DamagedArchiveError

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
_OPERATIONS = frozenset(
    """PROTO STOP FRAME MARK GLOBAL REDUCE BUILD BINPERSID MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3""".split()
)
_PUT = ("BINPUT", "LONG_BINPUT")
_CLASSES = frozenset(
    ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", *(f"torch {name}" for name in _STORAGES))
)


class ForeignPickleError(ValueError):
    """A pickle names classes or uses operations that checkpoints do not have."""


def unpickle(
    archive: Archive, device: str | torch.device = "cpu", *, verify: bool = True
) -> tuple[Any, dict[int, str]]:
    """Read the content that `torch.save` stored in an archive.

    Args:
        archive: Archive with the member ``data.pkl``.
        device: Device of the tensors.
        verify: Whether to compare the bytes of the tensors with their checksums.

    Returns:
        The content, and the name of the member of each tensor by the ``id`` of the tensor.

    Raises:
        DamagedArchiveError: If a member is missing or damaged.
        ForeignPickleError: If the pickle holds anything but numbers, strings, containers and tensors.
    """
    if "data.pkl" not in archive.members:
        raise ForeignPickleError("the archive has no data.pkl")
    if "byteorder" in archive.members and archive.read_small("byteorder").decode("ascii", "replace") != sys.byteorder:
        raise DamagedArchiveError(f"the byte order is not {sys.byteorder}")
    program = archive.read_small("data.pkl")
    _check_operations(program)
    reader = _Unpickler(program, archive, device, verify)
    try:
        return reader.load(), reader.sources
    except (DamagedArchiveError, ForeignPickleError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises many types of exceptions
        raise ForeignPickleError(f"{type(error).__name__} in data.pkl") from error
    finally:
        reader.release()


def _check_operations(program: bytes) -> None:
    """Raise ForeignPickleError if a pickle has an operation or names a class that is not allowed."""
    try:
        for count, (operation, value, _) in enumerate(pickletools.genops(program)):
            if operation.name not in _OPERATIONS:
                raise ForeignPickleError(f"operation {operation.name}")
            if operation.name == "GLOBAL" and value not in _CLASSES:
                raise ForeignPickleError(f"class {value}"[:80])
            if operation.name in _PUT and int(value or 0) > count:  # the reader would allocate memory up to this index
                raise ForeignPickleError(f"index {value}")
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError) as error:
        if isinstance(error, ForeignPickleError):
            raise
        raise ForeignPickleError("data.pkl is not a pickle") from error


class _Unpickler(pickle.Unpickler):
    """Unpickler that can build nothing but tensors and containers.

    Attributes:
        sources: Name of the member that holds each tensor, by the ``id`` of the tensor.
    """

    def __init__(self, program: bytes, archive: Archive, device: str | torch.device, verify: bool) -> None:
        super().__init__(io.BytesIO(program))
        self._archive, self._device, self._verify = archive, torch.device(device), verify
        self._storages: dict[str, Tensor] = {}
        self.sources: dict[int, str] = {}

    def release(self) -> None:
        """Drop all references to the file: the reader refers to itself, and would keep the file mapped."""
        self.memo.clear()
        del self._archive, self._storages

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of an allowed class."""
        classes: dict[str, Callable[..., Any] | torch.dtype] = {
            "collections OrderedDict": OrderedDict,
            "torch._utils _rebuild_tensor_v2": self._build_tensor,
            **{f"torch {storage}": dtype for storage, dtype in _STORAGES.items()},
        }
        try:
            return classes[f"{module} {name}"]
        except KeyError:
            raise ForeignPickleError(f"class {module}.{name}"[:80]) from None

    def persistent_load(self, pid: Any) -> tuple[str, Tensor]:
        """Return the name and the content of a storage: a member of the archive, as a tensor with one dimension."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ForeignPickleError("a storage of another kind")
        name = f"data/{key}"
        if name not in self._storages:
            content = self._archive.read(name, verify=self._verify)
            # PyTorch cannot view an empty array as another type.
            storage = torch.from_numpy(content).view(dtype) if content.size else torch.empty(0, dtype=dtype)
            self._storages[name] = storage.to(self._device)
        storage = self._storages[name]
        if storage.dtype != dtype or len(storage) != count:
            raise DamagedArchiveError(f"{name} has another size or type than its tensor")
        return name, storage

    def _build_tensor(
        self, storage: tuple[str, Tensor], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        """Build a tensor on a storage, in place of torch._utils._rebuild_tensor_v2."""
        name, content = storage
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
            raise DamagedArchiveError(f"{name} has an invalid shape")
        extent = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
        count = 1
        for length in size:
            count *= length
        if max(extent if count else offset, count) > len(content):  # a count above the length: an expanded tensor
            raise DamagedArchiveError(f"{name} is shorter than its tensor")
        tensor = content.as_strided(size, stride, offset)
        self.sources[id(tensor)] = name
        return tensor
