"""Zip archives as PyTorch writes them: read without PyTorch, with every byte checked against its CRC-32.

PyTorch stores a CRC-32 for each member of its archives but does not compare it when it reads. The functions here do.
They accept only what PyTorch writes: members that are not compressed, that do not overlap, and that lie in one folder.
"""

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from recontrast.data.system import count_cpus

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then lengths of the name and of the extra field
_END_BYTES = 22  # of the end record, without a comment
LARGEST_SMALL_MEMBER = 2**28  # bytes of a member that is read as a whole, such as the pickle of a checkpoint
_ALIGNMENT = 16  # bytes; tensors with another address are copied


class DamagedArchiveError(ValueError):
    """An archive is cut off, differs from its checksums, or was not written by PyTorch."""


@dataclass(frozen=True)
class Member:
    """Member of an archive.

    Attributes:
        start: Position of its first byte in the file.
        size: Number of bytes.
        crc32: CRC-32 of its bytes, from the directory of the archive.
    """

    start: int
    size: int
    crc32: int


class Archive:
    """Archive, read from an open file.

    Args:
        file: Binary file, open for reading. It must stay open while members are read, unless ``mapped``.
        mapped: Whether to map the file into memory, so that a member is read from disk when it is first used. Changes
            to the arrays are private. The file must then not be changed in place.

    Attributes:
        members: Members by name, without the folder that holds all of them.

    Raises:
        DamagedArchiveError: If the directory of the archive is not as PyTorch writes it.
    """

    def __init__(self, file: BinaryIO, *, mapped: bool = False) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        try:
            self.members = self._read_directory()
        except (DamagedArchiveError, MemoryError):
            raise
        except Exception as error:  # zipfile raises many types of exceptions for a damaged directory
            raise DamagedArchiveError(f"its directory cannot be read ({error})") from error
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None

    def read(self, name: str, *, verify: bool = True) -> NDArray[np.uint8]:
        """Read a member.

        Args:
            name: Name of the member, without the folder.
            verify: Whether to compare the bytes with the CRC-32 in the directory.

        Returns:
            The bytes, (size,) uint8; a view of the file if it is mapped.

        Raises:
            DamagedArchiveError: If there is no such member, or its bytes differ from the checksum.
        """
        if (member := self.members.get(name)) is None:
            raise DamagedArchiveError(f"{name} is missing")
        if self._map is not None:
            content = np.frombuffer(self._map, np.uint8, member.size, member.start)
            if member.start % _ALIGNMENT:
                content = content.copy()
        else:
            content = np.empty(member.size, np.uint8)
            self._file.seek(member.start)
            if _read_into(self._file, content.data) != member.size:
                raise DamagedArchiveError(f"{name} is cut off")
        if verify and zlib.crc32(content.data) != member.crc32:
            raise DamagedArchiveError(f"{name} differs from its checksum")
        return content

    def read_small(self, name: str) -> bytes:
        """Read and verify a member of at most `LARGEST_SMALL_MEMBER` bytes.

        Args:
            name: Name of the member, without the folder.

        Returns:
            The bytes.

        Raises:
            DamagedArchiveError: If there is no such member, it is too large, or its bytes differ from the checksum.
        """
        if name in self.members and self.members[name].size > LARGEST_SMALL_MEMBER:
            raise DamagedArchiveError(f"{name} has more than {LARGEST_SMALL_MEMBER:,} bytes")
        return self.read(name).tobytes()

    def verify(self, names: Iterable[str]) -> None:
        """Compare members with their CRC-32, on several threads if the file is mapped.

        Args:
            names: Names of the members, without the folder.

        Raises:
            DamagedArchiveError: If a member is missing or differs from its checksum.
        """
        workers = min(4, count_cpus()) if self._map is not None else 1
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(self.read, names):
                pass

    def _read_directory(self) -> dict[str, Member]:
        """Read the directory, and find the bytes of each member."""
        self._file.seek(max(self._size - _END_BYTES, 0))
        end = self._file.read(_END_BYTES)
        if not end.startswith(b"PK\5\6") or end[-2:] != b"\0\0":  # PyTorch writes no comment behind it
            raise DamagedArchiveError("its end is missing")
        with zipfile.ZipFile(self._file) as archive:
            infos, directory_start = archive.infolist(), archive.start_dir
        members: dict[str, Member] = {}
        folders, free_from = set(), 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            folder, _, name = info.filename.partition("/")
            folders.add(folder)
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise DamagedArchiveError(f"{name} is compressed or encrypted")
            if not name or name in members or ".." in name.split("/"):
                raise DamagedArchiveError("two members have one name, or a member has an invalid name")
            self._file.seek(info.header_offset)
            header = self._file.read(_LOCAL_HEADER.size)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            start = info.header_offset + len(header) + name_length + extra_length
            is_named = self._file.read(name_length) == info.orig_filename.encode()
            if signature != b"PK\3\4" or not is_named or info.header_offset < free_from:
                raise DamagedArchiveError(f"{name} is not where the directory says")
            free_from = start + info.file_size
            members[name] = Member(start, info.file_size, info.CRC)
        if free_from > directory_start:
            raise DamagedArchiveError("a member is longer than the file")
        if len(folders) != 1:
            raise DamagedArchiveError(f"its members lie in {len(folders)} folders")
        return members


def _read_into(file: BinaryIO, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends; return the number of bytes."""
    done = 0
    while done < len(buffer) and (count := file.readinto(buffer[done:])):  # type: ignore[attr-defined]
        done += count
    return done
