"""Writing an archive: one process at a time, a segment at a time."""

from __future__ import annotations

import fcntl
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor

from drt.errors import DRTError
from drt.memory.approximate_index import INDEX_FILE, build_index, dump_index, training_size
from drt.memory.archive import JOURNAL, MANIFEST, Archive, ArchiveStore, Document
from drt.memory.archive_files import CHUNKS, INDEX, INDICES, LANDMARKS, TEXT, ArchiveFiles, ArchivePage
from drt.memory.chunk_codec import Fields, pack
from drt.memory.manifest import DATA_FILES, ArchiveDescription, DocumentPart, Manifest, Point, Segment

LOCK = "lock"
_OWN_FILES = re.compile(r"state-\d+\.safetensors|.*\.tmp")
_UNBOUNDED = 2**62


class ArchiveWriter(Archive):
    """An archive opened for writing. What is appended to its `store` belongs to it from the next `commit` on.

    Make it with `ArchiveWriter.create` or `ArchiveWriter.open`. It sees all that is committed, and holds the lock
    until it is closed or its process ends.
    """

    def __init__(self, path: Path, manifest: Manifest, files: ArchiveFiles, lock: int) -> None:
        super().__init__(path, manifest, manifest.head, files)
        self._manifest, self._lock = manifest, lock
        self._crc32 = [0] * len(DATA_FILES)
        self._parts: list[DocumentPart] = []
        self._record_crc32: list[int] = []  # of chunks that have no entry in the index yet
        self._entries = manifest.head.chunks  # chunks that have
        self._stop = 0  # bytes of the open document's text so far
        self._journal = sha256()

    @classmethod
    def create(cls, path: Path | str, description: ArchiveDescription) -> Self:
        """Make an archive without chunks.

        Raises:
            DRTError: the folder is an archive already, or holds something else; another process is making it.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DRTError(f"{folder}: cannot be made: {error.strerror}") from error
        lock = _lock(folder)
        found = {file.name for file in folder.iterdir()}
        if MANIFEST in found:
            os.close(lock)
            raise DRTError(f"{folder} is an archive already; append to it, or choose another folder")
        others = sorted(
            name for name in found - {LOCK, JOURNAL, *DATA_FILES} if not _OWN_FILES.fullmatch(name)
        )
        if others:
            os.close(lock)
            raise DRTError(f"{folder} holds other files ({', '.join(others[:3])}); choose an empty folder")
        (folder / JOURNAL).write_bytes(b"")
        writer = cls._start(folder, Manifest(description, Point(), None), lock, verify=True)
        writer._replace(MANIFEST, writer._manifest.dump())
        return writer

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Self:
        """Open an archive to go on with it: what an interrupted writer left after its last commit is removed.

        Raises:
            DRTError: as `Archive.open`, but for an unfinished one; another process is writing to it.
        """
        folder = Path(path)
        Manifest.load(folder / MANIFEST)  # no lock file in a folder that is no archive
        lock = _lock(folder)
        try:
            manifest = Manifest.load(folder / MANIFEST)
            return cls._start(folder, manifest, lock, verify)
        except (DRTError, OSError):
            os.close(lock)
            raise

    @classmethod
    def _start(cls, folder: Path, manifest: Manifest, lock: int, verify: bool) -> Self:
        head = manifest.head
        files = ArchiveFiles(folder, manifest.description, writable=True, verify=verify)
        writer = cls(folder, manifest, files, lock)
        try:
            writer._load(head)
        except FileNotFoundError as error:
            raise DRTError(f"{error.filename}: missing") from error
        for file, records in zip(files.files, (head.chunks,) * 3 + (head.text_bytes,), strict=True):
            file.truncate(records)
        os.truncate(folder / JOURNAL, head.journal_bytes)
        writer._journal.update((folder / JOURNAL).read_bytes())
        writer._remove_stale()
        last = writer._documents[-1] if writer._documents else None
        if last is not None and not last.complete:
            writer._stop = last.num_bytes
            writer._parts = [DocumentPart(last.name, False, False, 0, 0, 0)]
        return writer

    def close(self) -> None:
        """Let another process write; what is not committed is dropped. Again is no error."""
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __reduce__(self) -> NoReturn:  # also what copy and deepcopy ask for
        raise TypeError(f"{self.path} is open for writing and can be neither copied nor pickled")

    def store(self) -> ArchiveStore:
        """The chunks as a store of one row; what is appended to it goes to the files."""
        return _WrittenStore(_GrowingPage(self), self.num_chunks, self.description.dtype)

    @property
    def unfinished_documents(self) -> list[Document]:
        """The documents of a build or append that has not come to its end."""
        finished = self._manifest.finished
        chunks = 0 if finished is None else finished.chunks
        return [document for document in self._documents if document.first_chunk >= chunks]

    def begin_document(self, name: str) -> None:
        """What is appended from now on is a new document's.

        Raises:
            ValueError: the last one has not ended.
        """
        if self._parts and not self._parts[-1].ends:
            raise ValueError(f"the document {self._parts[-1].name} has not ended")
        self._parts.append(DocumentPart(name, True, False, 0, 0, 0))
        self._stop = 0

    def add_text(self, text: bytes, chunk_stops: NDArray[np.int64]) -> None:
        """Keep the text of the chunks appended since the last call.

        Args:
            text: their bytes, one chunk's after the other's.
            chunk_stops: (n,) where each chunk's text ends, in bytes from the beginning of its document.

        Raises:
            ValueError: counts that do not fit.
        """
        if len(chunk_stops) != len(self._record_crc32) or (
            len(text) and chunk_stops[-1] != self._stop + len(text)
        ):
            raise ValueError(
                f"wanted the text of {len(self._record_crc32)} chunks from byte {self._stop} on, got {len(text)} bytes "
                f"and {len(chunk_stops)} stops"
            )
        entries = np.empty(len(chunk_stops), INDEX)
        entries["start"] = np.concatenate([[self._stop], chunk_stops[:-1]])[: len(entries)]
        entries["stop"], entries["crc32"] = chunk_stops, self._record_crc32
        self._write(INDICES, self._entries, entries.tobytes())
        self._write(TEXT, self._text_end(), text)
        self._entries += len(entries)
        self._record_crc32 = []
        self._stop += len(text)
        self._grow(text_bytes=len(text))

    def end_document(self) -> None:
        """The open document is whole."""
        self._parts[-1] = replace(self._parts[-1], ends=True)

    def commit(self, state: Mapping[str, Tensor], *, finished: bool) -> None:
        """Make what was appended since the last commit a segment; then it outlives everything but the disk.

        Args:
            state: the decoding state at this point.
            finished: readers shall see the archive as of now. Otherwise they keep seeing it as it was.

        Raises:
            DRTError: the disk is full or fails; the archive stays as of the last commit.
        """
        if self._record_crc32:  # chunks of a text that is not kept
            self.add_text(b"", np.full(len(self._record_crc32), self._stop, np.int64))
        for file in self._files.files:
            file.sync()
        head, parts = (
            self.point,
            [part for part in self._parts if part.chunks or (part.ends and not part.begins)],
        )
        segment = Segment(tuple(self._crc32), tuple(parts))
        line, content = segment.line(), save_tensors(dict(state)) if state else b""
        journal = self._journal.copy()
        journal.update(line)
        point = Point(
            segments=head.segments + 1,
            journal_bytes=head.journal_bytes + len(line),
            journal_sha256=journal.hexdigest(),
            chunks=head.chunks + segment.chunks,
            tokens=head.tokens + segment.tokens,
            text_bytes=head.text_bytes + segment.text_bytes,
            state_bytes=len(content),
            state_sha256=sha256(content).hexdigest() if content else "",
        )
        if point.state_file is not None:
            self._replace(point.state_file, content)
        self._append_line(line)
        self._manifest = Manifest(self.description, point, point if finished else self._manifest.finished)
        self._replace(MANIFEST, self._manifest.dump())
        self._journal = journal
        self._advance(point, segment, state, finished)

    def index(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Make the index of all landmarks, in place of one that the archive has; readers then search it.

        Args:
            on_progress: called with numbers of landmarks just added.

        Raises:
            DRTError: the archive is not finished or holds nothing, a segment is damaged, faiss is not installed, the
                disk is full or fails.
        """
        count = self.num_chunks
        if not self.finished or not count:
            raise DRTError(f"{self.path} is not finished: finish its build before it is indexed")
        page = ArchivePage(self._files, count)
        size = training_size(count)
        chosen = torch.arange(size) * count // size

        def blocks() -> Iterator[Tensor]:
            for first, last in page.landmark_ranges(count):
                yield page.landmarks(first, last)[0]
                if on_progress is not None:
                    on_progress(last - first)

        arrays = build_index(page.landmarks_at(torch.zeros_like(chosen), chosen), count, blocks())
        self._replace(INDEX_FILE, dump_index(self.point, arrays))

    def _advance(self, point: Point, segment: Segment, state: Mapping[str, Tensor], finished: bool) -> None:
        """See the archive as it now is."""
        self.point, self.finished, self._state = point, finished, dict(state)
        self._files.add(segment)
        self._add_documents(segment)
        self._crc32 = [0] * len(DATA_FILES)
        last = self._parts[-1] if self._parts else None
        self._parts = []
        if last is not None and not last.ends:
            self._parts = [DocumentPart(last.name, last.begins and not last.chunks, False, 0, 0, 0)]
        self._remove_stale()

    def append(self, slot: Tensor, fields: Fields, landmarks: Tensor) -> None:
        """Write chunks behind those held: slot (n,) their numbers, in order; called by the store."""
        first = self._entries + len(self._record_crc32)
        if slot.tolist() != list(range(first, first + len(slot))):
            raise ValueError(f"wanted chunks from number {first} on, got {slot.tolist()}")
        if not self._parts or self._parts[-1].ends:
            raise ValueError("begin a document before its chunks are appended")
        records = pack(fields)
        self._write(CHUNKS, first, records.numpy().tobytes())
        self._write(LANDMARKS, first, pack((landmarks.to(self._files.landmark_dtype),)).numpy().tobytes())
        self._record_crc32 += [zlib.crc32(record) for record in records.numpy()]
        self._grow(chunks=len(slot), tokens=int(fields[-1].sum()))

    def _grow(self, **more: int) -> None:
        part = self._parts[-1]
        self._parts[-1] = replace(part, **{name: getattr(part, name) + count for name, count in more.items()})

    def _text_end(self) -> int:
        return self.point.text_bytes + sum(part.text_bytes for part in self._parts)

    def _write(self, file: int, first: int, data: bytes) -> None:
        self._files.files[file].write(first, data)
        self._crc32[file] = zlib.crc32(data, self._crc32[file])

    def _append_line(self, line: bytes) -> None:
        path = self.path / JOURNAL
        try:
            with path.open("r+b") as file:
                file.seek(self.point.journal_bytes)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DRTError(f"{path}: cannot be written: {error.strerror}") from error

    def _replace(self, name: str, content: bytes) -> None:
        """Write a whole file, or leave it as it was."""
        path = self.path / name
        temporary = path.with_name(f"{name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise DRTError(f"{path}: cannot be written: {error.strerror}") from error

    def _remove_stale(self) -> None:
        """Delete decoding states that no point names, and halves of files that were being replaced."""
        points = (self._manifest.head, self._manifest.finished)
        wanted = {point.state_file for point in points if point is not None}
        for file in self.path.iterdir():
            if _OWN_FILES.fullmatch(file.name) and file.name not in wanted:
                file.unlink()


class _WrittenStore(ArchiveStore):
    """The chunks of an archive that is written to."""

    def clear(self) -> None:
        raise ValueError("an archive that is written to cannot be cleared: make another one")


class _GrowingPage(ArchivePage):
    """The chunks of an archive that is written to, and room for all that will come."""

    def __init__(self, writer: ArchiveWriter) -> None:
        super().__init__(writer._files, _UNBOUNDED)
        self._writer = writer

    def write(self, row: Tensor, slot: Tensor, fields: Fields, landmarks: Tensor) -> None:
        self._writer.append(slot, fields, landmarks)


def _lock(folder: Path) -> int:
    """Lock an archive for writing, until the descriptor is closed or the process ends.

    Raises:
        DRTError: another process has locked it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DRTError(f"another process is writing to {folder}; wait until it has finished") from error
    return descriptor
