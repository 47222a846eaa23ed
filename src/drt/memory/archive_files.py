"""The data files of an archive: opening, checking what is read, and the page that a store sees of them."""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drt.errors import DRTError
from drt.files import open_regular
from drt.memory.approximate_index import INDEX_FILE, ApproximateIndex
from drt.memory.chunk_codec import ChunkCodec, FieldSpec, is_finite, unpack
from drt.memory.manifest import DATA_FILES, ArchiveDescription, Segment
from drt.memory.record_file import RecordFile

# Where a chunk's text lies in its document, in bytes, and the checksum of its record.
INDEX = np.dtype([("start", "<i8"), ("stop", "<i8"), ("crc32", "<u4")])
LANDMARK_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LANDMARK_BLOCK = 8192  # landmarks read at a time, or one segment's if it has more
MAX_BLOCK_BYTES = 2**30  # of one segment's landmarks
READ_BYTES = 2**24  # read at a time where a whole file is read
CHUNKS, LANDMARKS, INDICES, TEXT = range(len(DATA_FILES))


class Extent(NamedTuple):
    """The records of one segment in one file."""

    first: int
    last: int
    crc32: int


class ArchiveFiles:
    """The four data files, and which records of them each committed segment has.

    Args:
        path: folder of the archive.
        description: of the archive.
        writable: open for writing.
        verify: check whatever is read, each time, with all of its segment.
        create: make the files that do not exist.

    Raises:
        DRTError: a file is missing or cannot be opened.
    """

    def __init__(
        self, path: Path, description: ArchiveDescription, writable: bool, verify: bool, create: bool = False
    ) -> None:
        self.codec, self.chunk_size = ChunkCodec(description.dtype), description.chunk_size
        shape = (description.chunk_size, description.num_heads, description.head_dim)
        self.specs = (*self.codec.specs(*shape), FieldSpec((), torch.int64))
        self.landmark_dtype = LANDMARK_DTYPES[description.landmark_dtype]
        sizes = (
            sum(spec.num_bytes for spec in self.specs),
            description.landmark_size * self.landmark_dtype.itemsize,
            INDEX.itemsize,
            1,
        )
        mode = os.O_RDWR if writable else os.O_RDONLY
        mode |= os.O_CREAT if create else 0
        self.files = [
            RecordFile(open_regular(path / name, mode), size, path / name, writable=writable)
            for name, size in zip(DATA_FILES, sizes, strict=True)
        ]
        self.verify = verify
        self._chunk_starts, self._text_starts = (
            [0],
            [0],
        )  # chunks and text bytes before each segment, and in all
        self._segments: list[Segment] = []
        self._sound: list[set[int]] = [set() for _ in DATA_FILES]  # segments found whole, of each file

    def add(self, segment: Segment) -> None:
        """One more segment is committed."""
        self._segments.append(segment)
        self._chunk_starts.append(self._chunk_starts[-1] + segment.chunks)
        self._text_starts.append(self._text_starts[-1] + segment.text_bytes)

    def too_large(self, segment: Segment) -> list[str]:
        """What is wrong with a segment whose landmarks, which are searched as one block, do not fit memory."""
        file = self.files[LANDMARKS]
        size = segment.chunks * file.record_bytes
        if size <= MAX_BLOCK_BYTES:
            return []
        return [f"{file.name}: expected at most {MAX_BLOCK_BYTES:,} bytes in a segment, got {size:,}"]

    @property
    def num_chunks(self) -> int:
        """Chunks in the committed segments."""
        return self._chunk_starts[-1]

    def extent(self, number: int, file: int) -> Extent:
        """What segment ``number`` has of a file."""
        starts = self._starts(file)
        return Extent(starts[number], starts[number + 1], self._segments[number].crc32[file])

    def _starts(self, file: int) -> list[int]:
        return self._text_starts if file == TEXT else self._chunk_starts

    def check(self, number: int, file: int) -> None:
        """Read what a segment has of a file.

        Raises:
            DRTError: it is not what was written, the file ends before it, or it cannot be read.
        """
        for _ in self._blocks(number, file):
            pass

    def _blocks(self, number: int, file: int) -> Iterator[tuple[int, Tensor]]:
        """The records of a segment, some at a time with the number of the first; raises as `check` after the last."""
        extent = self.extent(number, file)
        step = max(1, READ_BYTES // self.files[file].record_bytes)
        crc, strange = 0, None
        is_known = number in self._sound[file]
        for first in range(extent.first, extent.last, step):
            records = self.files[file].read_range(first, min(first + step, extent.last))
            crc = zlib.crc32(records.numpy().data, crc)
            if not is_known:
                strange = strange or self.strange(file, records)
            yield first, records
        self._judge(number, file, crc, strange)

    def _judge(self, number: int, file: int, crc: int, strange: str | None) -> None:
        name = self.files[file].name
        if crc != self._segments[number].crc32[file]:
            raise DRTError(f"{name} is damaged: segment {number} is not what was written")
        if strange is not None:
            raise DRTError(f"{name}: segment {number} holds {strange}")
        self._sound[file].add(number)

    def strange(self, file: int, records: Tensor) -> str | None:
        """What no archive holds, though its checksum be right, in records (n, record_bytes) of a file."""
        if file == CHUNKS:
            *fields, lengths = unpack(records, self.specs)
            if bool(((lengths < 0) | (lengths > self.chunk_size)).any()):
                return f"chunks of fewer than 0 or more than {self.chunk_size} tokens"
            floats = [field for field in fields if field.is_floating_point()]
        elif file == INDICES:
            entries = records.numpy().view(INDEX)
            start, stop, most = entries["start"], entries["stop"], self._text_starts[-1]
            outside = (start < 0) | (stop < start) | (stop > most)
            return f"chunks of text that is not in bytes 0 to {most}" if outside.any() else None
        else:
            floats = [records.view(self.landmark_dtype)] if file == LANDMARKS else []
        if all(map(is_finite, floats)):
            return None
        return "values that are not finite; build the archive anew, with --dtype bfloat16 or float32"

    def read(self, file: int, numbers: Tensor) -> Tensor:
        """Records (m, record_bytes) of numbers (m,), each from a buffer that was checked with its segment.

        Segments are read whole each time: what was right once may be damaged when it is read again.

        Raises:
            DRTError: a segment is damaged.
        """
        if not self.verify:
            return self.files[file].read(numbers)
        found = torch.empty(len(numbers), self.files[file].record_bytes, dtype=torch.uint8, device="cpu")
        starts = torch.tensor(self._starts(file), device="cpu")
        segment = torch.bucketize(numbers.contiguous(), starts, right=True) - 1
        for number in segment.unique().tolist():
            (at,) = (segment == number).nonzero(as_tuple=True)
            if number == len(self._segments):  # not committed yet, written by this process
                found[at] = self.files[file].read(numbers[at])
                continue
            for first, records in self._blocks(number, file):
                here = at[(numbers[at] >= first) & (numbers[at] < first + len(records))]
                found[here] = records[numbers[here] - first]
        return found

    def index(self, chunks: Tensor) -> NDArray[np.void]:
        """Entries (m,) of `INDEX` of chunks (m,)."""
        return self.read(INDICES, chunks).numpy().view(INDEX).reshape(-1)

    def text(self, first: int, last: int) -> bytes:
        """Bytes [first, last) of all documents' text."""
        starts, parts, read = self._text_starts, [], first
        number = bisect_right(starts, first) - 1
        while self.verify and read < min(last, starts[-1]):
            for low, records in self._blocks(number, TEXT):
                parts.append(records[max(0, first - low) : max(0, last - low)].numpy().tobytes())
            number, read = number + 1, starts[number + 1]
        if read < last:  # not committed yet, written by this process; or not to be checked
            parts.append(self.files[TEXT].read_range(read, last).numpy().tobytes())
        return b"".join(parts)

    def landmarks(self, first: int, last: int) -> Tensor:
        """Landmarks (last - first, H) of a range that `landmark_ranges` gave."""
        found, starts = self.files[LANDMARKS].read_range(first, last), self._chunk_starts
        number = bisect_right(starts, first) - 1
        while self.verify and number < len(self._segments) and starts[number] < last:
            records = found[starts[number] - first : starts[number + 1] - first]
            strange = None if number in self._sound[LANDMARKS] else self.strange(LANDMARKS, records)
            self._judge(number, LANDMARKS, zlib.crc32(records.numpy().data), strange)
            number += 1
        return found.view(self.landmark_dtype)

    def landmark_ranges(self, held: int) -> list[tuple[int, int]]:
        """Ranges of chunks to search at a time: whole segments, then what is not committed yet."""
        ranges, first = [], 0
        for end in [*self._chunk_starts[1:], held]:
            if end > first and (end - first >= LANDMARK_BLOCK or end == held):
                ranges.append((first, min(end, held)))
                first = min(end, held)
        return ranges

    def wrong_sizes(self, chunks: int, text_bytes: int) -> list[str]:
        """What is wrong with the sizes of files that shall hold at least so much, and of segments, a line each."""
        problems = []
        for file, wanted in zip(self.files, (chunks, chunks, chunks, text_bytes), strict=True):
            if file.size() < wanted * file.record_bytes:
                problems.append(
                    f"{file.name} is truncated: expected {wanted * file.record_bytes} bytes, got {file.size()}"
                )
        return problems + [problem for segment in self._segments for problem in self.too_large(segment)]

    def close(self) -> None:
        """Close them; again is no error."""
        for file in self.files:
            file.close()


class ArchivePage:
    """The chunks of an archive as a page of one row.

    Args:
        files: of the archive.
        capacity: chunks that a reader sees.
        index: of its landmarks, if they are searched by one.
    """

    def __init__(self, files: ArchiveFiles, capacity: int, index: ApproximateIndex | None = None) -> None:
        self._files, self._capacity, self._index = files, capacity, index

    @property
    def capacity(self) -> int:
        return self._capacity

    def read(self, row: Tensor, slot: Tensor) -> tuple[Tensor, ...]:
        chunks = slot.cpu()
        records = self._files.files[CHUNKS].read(chunks)
        if self._files.verify:
            self._check(chunks, records)
        return unpack(records, self._files.specs)

    def write(self, row: Tensor, slot: Tensor, fields: tuple[Tensor, ...], landmarks: Tensor) -> None:
        raise DRTError("this archive was opened for reading")

    def copy(self, rows: Tensor) -> ArchivePage:
        raise DRTError(
            "an archive that is written to has one row; open it for reading to ask several questions at once"
        )

    def landmark_ranges(self, held: int) -> list[tuple[int, int]]:
        return self._files.landmark_ranges(held)

    def landmarks(self, first: int, last: int) -> Tensor:
        return self._files.landmarks(first, last).unsqueeze(0)

    def landmarks_at(self, row: Tensor, slot: Tensor) -> Tensor:
        chunks, dtype = slot.cpu(), self._files.landmark_dtype
        if self._index is None:
            return self._files.read(LANDMARKS, chunks).view(dtype)
        # Candidates lie anywhere: to check their segments would be to read nearly all that the index saves.
        indexed, name = chunks < self._index.num_landmarks, self._files.files[LANDMARKS].name
        records = self._files.files[LANDMARKS].read(chunks[indexed])
        if self._files.verify and not self._index.is_sound(chunks[indexed], records.view(dtype)):
            raise DRTError(f"{name} is damaged: a landmark is not the one that {INDEX_FILE} was made of")
        strange = self._files.strange(LANDMARKS, records)
        if strange is not None:
            raise DRTError(f"{name}: chunks {chunks[indexed].tolist()} have {strange}")
        landmarks = records.new_empty(len(chunks), records.shape[1])
        landmarks[indexed], landmarks[~indexed] = records, self._files.read(LANDMARKS, chunks[~indexed])
        return landmarks.view(dtype)

    def _check(self, chunks: Tensor, records: Tensor) -> None:
        committed = chunks < self._files.num_chunks  # what is not, was written by this process
        chunks, records = chunks[committed], records[committed]
        wanted = self._files.index(chunks)["crc32"]
        for chunk, record, crc in zip(chunks.tolist(), records.numpy(), wanted.tolist(), strict=True):
            if zlib.crc32(record) != crc:
                name = self._files.files[CHUNKS].name
                raise DRTError(f"{name} is damaged: chunk {chunk} is not what was written")
        strange = self._files.strange(CHUNKS, records)
        if strange is not None:
            raise DRTError(f"{self._files.files[CHUNKS].name}: chunks {chunks.tolist()} hold {strange}")
