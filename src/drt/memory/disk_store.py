"""The ``disk`` tier: chunks in files without a name, which vanish with the process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from drt.memory.chunk_codec import Fields, FieldSpec, pack, unpack
from drt.memory.paged_store import Page, PagedStore
from drt.memory.record_file import RecordFile

LANDMARK_BLOCK = 8192  # landmarks read at a time


class DiskStore(PagedStore):
    """Pages of chunks in two temporary files: one of chunks, one of landmarks.

    For a memory that outlives the process see `drt.memory.Archive`.

    Args:
        directory: where the files are made; ``None``: the system's folder for temporary files.
        dtype: "bfloat16", "float32", "float16" or "int8".
        page_size: as for `DeviceStore`.
    """

    def __init__(
        self, directory: Path | str | None = None, dtype: str = "bfloat16", page_size: int | None = None
    ) -> None:
        super().__init__(dtype, page_size)
        self._directory = directory
        self._files: tuple[RecordFile, RecordFile] | None = None
        self._specs: tuple[FieldSpec, ...] = ()
        self._records = 0

    def clear(self) -> None:
        super().clear()
        self._files, self._records = None, 0

    def _new_page(self, fields: Fields, landmarks: Tensor) -> Page:
        if self._files is None:
            self._specs = (
                *self._codec.specs(*fields[0].shape[2:]),
                FieldSpec((), torch.int64),
            )
            chunk_bytes = sum(spec.num_bytes for spec in self._specs)
            self._files = (
                _temporary(self._directory, chunk_bytes),
                _temporary(self._directory, landmarks.shape[2] * landmarks.element_size()),
            )
        return self._allocate(landmarks.shape[0], landmarks.dtype)

    def _allocate(self, rows: int, landmark_dtype: torch.dtype) -> FilePage:
        """A page at the end of the files."""
        assert self._files is not None
        base, self._records = self._records, self._records + rows * self._page_size
        return FilePage(
            *self._files, self._specs, landmark_dtype, rows, self._page_size, base, self._allocate
        )

    def _index_device(self, chunk_indices: Tensor) -> torch.device:
        return torch.device("cpu")


class FilePage:
    """Chunk slots in files: record base + row * capacity + slot of each.

    Args:
        chunks: file of the packed fields of each chunk.
        landmark_file: file of the landmarks.
        specs: the fields of a chunk.
        landmark_dtype: of the landmarks in the file.
        rows: rows P.
        capacity: slots of a row.
        base: number of the first record.
        allocate: makes a page for so many rows, to copy this one to.
    """

    def __init__(
        self,
        chunks: RecordFile,
        landmark_file: RecordFile,
        specs: tuple[FieldSpec, ...],
        landmark_dtype: torch.dtype,
        rows: int,
        capacity: int,
        base: int,
        allocate: Callable[[int, torch.dtype], FilePage],
    ) -> None:
        self._chunks, self._landmarks, self._specs = chunks, landmark_file, specs
        self._dtype, self._rows, self._capacity, self._base = landmark_dtype, rows, capacity, base
        self._allocate = allocate
        # Slots not yet written are copied, and their landmarks scored and masked: a file that is long enough holds
        # zeros there, and takes no room for them.
        for file in (chunks, landmark_file):
            file.truncate(base + rows * capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    def write(self, row: Tensor, slot: Tensor, fields: Fields, landmarks: Tensor) -> None:
        numbers = self._numbers(row, slot)
        self._chunks.scatter(numbers, pack(fields))
        self._landmarks.scatter(numbers, pack((landmarks.to(self._dtype),)))

    def read(self, row: Tensor, slot: Tensor) -> Fields:
        return unpack(self._chunks.read(self._numbers(row, slot)), self._specs)

    def copy(self, rows: Tensor) -> FilePage:
        copied = self._allocate(len(rows), self._dtype)
        slot = torch.arange(self._capacity)
        for row, source in enumerate(rows.tolist()):
            target, origin = (slot.new_full(slot.shape, number) for number in (row, source))
            copied._chunks.scatter(
                copied._numbers(target, slot), self._chunks.read(self._numbers(origin, slot))
            )
            copied._landmarks.scatter(
                copied._numbers(target, slot), self._landmarks.read(self._numbers(origin, slot))
            )
        return copied

    def landmark_ranges(self, held: int) -> list[tuple[int, int]]:
        return [(first, min(first + LANDMARK_BLOCK, held)) for first in range(0, held, LANDMARK_BLOCK)]

    def landmarks(self, first: int, last: int) -> Tensor:
        rows = torch.arange(self._rows).unsqueeze(1)
        slots = torch.arange(first, last)
        numbers = self._base + rows * self._capacity + slots
        return self._landmarks.read(numbers.flatten()).view(self._dtype).unflatten(0, (self._rows, -1))

    def landmarks_at(self, row: Tensor, slot: Tensor) -> Tensor:
        return self._landmarks.read(self._numbers(row, slot)).view(self._dtype)

    def _numbers(self, row: Tensor, slot: Tensor) -> Tensor:
        return self._base + row.cpu() * self._capacity + slot.cpu()


def _temporary(directory: Path | str | None, record_bytes: int) -> RecordFile:
    with tempfile.TemporaryFile(dir=directory) as file:
        return RecordFile(os.dup(file.fileno()), record_bytes, "a temporary file of the chunk memory")
