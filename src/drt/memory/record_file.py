"""Records of one size in a file: written by number, read by number, never held."""

from __future__ import annotations

import os
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from drt.errors import DRTError


class RecordFile:
    """Numbered records of ``record_bytes`` bytes.

    Reads are `pread` into fresh buffers and not a memory map: pages of a map count as the process's own memory,
    a read past the end of a damaged file would kill the process, and a map would have to grow with the file. The
    operating system's page cache is the cache all the same.

    A copy of one that only reads has a descriptor of its own. One that writes cannot be copied, nor be used by a child
    process: two writers would write over each other. None can be pickled: a descriptor means another file elsewhere.

    Args:
        descriptor: of a file opened for what is asked of it; closed with this object.
        record_bytes: size of a record.
        name: of the file, for messages.
        writable: the descriptor may write.
    """

    def __init__(
        self, descriptor: int, record_bytes: int, name: Path | str, *, writable: bool = False
    ) -> None:
        self.record_bytes, self.name = record_bytes, name
        self._descriptor, self._process = descriptor, os.getpid() if writable else None
        self.close = weakref.finalize(self, os.close, descriptor)  # again is no error

    @property
    def descriptor(self) -> int:
        """Of the open file.

        Raises:
            TypeError: another process opened it for writing.
            ValueError: it is closed, and the number may be another file's by now.
        """
        if self._process not in (None, os.getpid()):
            raise TypeError(
                f"{self.name} was opened for writing by another process; open the archive in this one"
            )
        if not self.close.alive:
            raise ValueError(f"{self.name} is closed; open the archive again")
        return self._descriptor

    def __copy__(self) -> Self:
        if self._process is not None:
            raise TypeError(f"{self.name} is open for writing and cannot be copied")
        return type(self)(os.dup(self.descriptor), self.record_bytes, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self.name} is an open file and cannot be pickled; open the archive where it is used"
        )

    def write(self, first: int, data: Tensor | bytes) -> None:
        """Write whole records, uint8 (n, record_bytes) or bytes, from number ``first`` on.

        Raises:
            DRTError: the disk is full or fails.
        """
        view = memoryview(data) if isinstance(data, bytes) else data.contiguous().numpy().data.cast("B")
        offset = first * self.record_bytes
        try:
            while len(view):
                written = os.pwrite(self.descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise DRTError(f"{self.name}: cannot be written: {error.strerror}") from error

    def read(self, numbers: Tensor) -> Tensor:
        """Records (m, record_bytes) uint8 of numbers (m,) int64; a record asked for twice is read once.

        Raises:
            DRTError: the file ends before a record, or fails.
        """
        if len(numbers) == 0:
            return torch.empty(0, self.record_bytes, dtype=torch.uint8, device="cpu")
        unique, inverse = numbers.unique(return_inverse=True)
        found = torch.empty(len(unique), self.record_bytes, dtype=torch.uint8, device="cpu")
        runs = _runs(unique)
        if len(runs) > 1:
            for low, high in runs:  # the disk may fetch them all while the first is copied
                first, last = int(unique[low]), int(unique[high - 1]) + 1
                os.posix_fadvise(
                    self.descriptor,
                    first * self.record_bytes,
                    (last - first) * self.record_bytes,
                    os.POSIX_FADV_WILLNEED,
                )
        for low, high in runs:
            self._read_into(found[low:high], int(unique[low]))
        return found[inverse]

    def read_range(self, first: int, last: int) -> Tensor:
        """Records [first, last) as (last - first, record_bytes) uint8; raises as `read`."""
        found = torch.empty(last - first, self.record_bytes, dtype=torch.uint8, device="cpu")
        self._read_into(found, first)
        return found

    def _read_into(self, target: Tensor, first: int) -> None:
        if len(target) == 0:  # of which numpy makes no view
            return
        view = target.numpy().data.cast("B")
        offset = first * self.record_bytes
        try:
            while len(view):
                count = os.preadv(self.descriptor, [view], offset)
                if count == 0:
                    raise DRTError(f"{self.name} is truncated: it ends before byte {offset + len(view)}")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise DRTError(f"{self.name}: cannot be read: {error.strerror}") from error

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.descriptor).st_size

    def truncate(self, count: int) -> None:
        """Make the file ``count`` records long; what it gains is zeros, and takes no room until it is written.

        Raises:
            DRTError: the disk fails.
        """
        try:
            os.ftruncate(self.descriptor, count * self.record_bytes)
        except OSError as error:
            raise DRTError(f"{self.name}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Return when all that was written is on the disk.

        Raises:
            DRTError: the disk is full or fails.
        """
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise DRTError(f"{self.name}: cannot be written: {error.strerror}") from error


def _runs(numbers: Tensor) -> list[tuple[int, int]]:
    """[low, high) positions of the runs of consecutive numbers in a sorted (m,) tensor."""
    if len(numbers) == 0:
        return []
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    return list(pairwise(edges))
