"""Writing an archive: one process at a time, a segment at a time."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drt.errors import DRTError
from drt.files import FileLock, atomic_write, open_regular
from drt.memory.approximate_index import INDEX_FILE, build_index, dump_index, training_size
from drt.memory.archive import JOURNAL, MANIFEST, Archive, ArchiveStore, Document, dump_state
from drt.memory.archive_files import CHUNKS, INDEX, INDICES, LANDMARKS, TEXT, ArchiveFiles, ArchivePage
from drt.memory.archive_folder import NewFolder, lock_archive, remove_stale
from drt.memory.chunk_codec import Fields, pack, round_to
from drt.memory.manifest import DATA_FILES, ArchiveDescription, DocumentPart, Manifest, Point, Segment
from drt.memory.record_file import RecordFile

_UNBOUNDED = 2**62


class ArchiveWriter(Archive):
    """An archive opened for writing. What is appended to its `store` belongs to it from the next `commit` on.

    Make it with `ArchiveWriter.create`, `ArchiveWriter.open` or `ArchiveWriter.rollback`. It sees all that is
    committed, and holds the lock until it is closed or its process ends. After a failed write it writes no more, for
    it cannot tell what the files hold then; opened again, the archive is as of its last commit. Leaving its `with`
    block by an error removes an archive that `create` has made and to which nothing was committed.
    """

    def __init__(
        self, path: Path, manifest: Manifest, files: ArchiveFiles, journal: RecordFile, lock: FileLock
    ) -> None:
        super().__init__(path, manifest, manifest.head, files)
        self._manifest, self._journal, self._lock = manifest, journal, lock
        self._unusable = ""  # why it is
        self._new: NewFolder | None = None  # until the first commit
        self._crc32 = [0] * len(DATA_FILES)
        self._parts: list[DocumentPart] = []
        self._record_crc32: list[int] = []  # of chunks that have no entry in the index yet
        self._entries = manifest.head.chunks  # chunks that have
        self._stop = 0  # bytes of the open document's text so far
        self._journal_digest = sha256()

    @classmethod
    def create(cls, path: Path | str, description: ArchiveDescription) -> Self:
        """Make an archive without chunks, also in the place of one to which nothing was committed.

        Raises:
            DRTError: the folder is an archive already, or holds something else, or cannot be written; another process
                is making it. What was made until then is removed.
        """
        folder = Path(path)
        new = NewFolder(folder)
        try:
            manifest = Manifest(description, Point(), None)
            writer = cls._start(folder, manifest, new.lock, verify=True, create=True)
            writer._replace(MANIFEST, manifest.dump())
        except BaseException:
            new.discard()
            raise
        writer._new = new
        return writer

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Self:
        """Open an archive to go on with it: what an interrupted writer left after its last commit is removed.

        Raises:
            DRTError: as `Archive.open`, but for an unfinished one; another process is writing to it.
        """
        folder = Path(path)
        Manifest.load(folder / MANIFEST)  # no lock file in a folder that is no archive
        lock = lock_archive(folder)
        try:
            return cls._start(folder, Manifest.load(folder / MANIFEST), lock, verify)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def rollback(cls, path: Path | str) -> Self:
        """Open an archive as of its last finished build or append, and drop what was committed since.

        Where no build has finished, nothing is left: `create` may then make another archive in its place.

        Raises:
            DRTError: as `open`.
        """
        folder = Path(path)
        Manifest.load(folder / MANIFEST)
        lock = lock_archive(folder)
        try:
            manifest = Manifest.load(folder / MANIFEST)
            if manifest.head != manifest.finished:
                manifest = replace(manifest, head=manifest.finished or Point())
                with atomic_write(folder / MANIFEST) as file:
                    file.write(manifest.dump())
            return cls._start(folder, manifest, lock, verify=True)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def _start(
        cls, folder: Path, manifest: Manifest, lock: FileLock, verify: bool, create: bool = False
    ) -> Self:
        head, path = manifest.head, folder / JOURNAL
        files = ArchiveFiles(folder, manifest.description, writable=True, verify=verify, create=create)
        descriptor = open_regular(path, os.O_RDWR | (os.O_CREAT if create else 0))
        journal = RecordFile(descriptor, 1, path, writable=True)
        writer = cls(folder, manifest, files, journal, lock)
        try:
            writer._load(head)
        except FileNotFoundError as error:
            raise DRTError(f"{error.filename}: missing") from error
        for file, records in zip(
            (*files.files, journal),
            (head.chunks,) * 3 + (head.text_bytes, head.journal_bytes),
            strict=True,
        ):
            file.truncate(records)
        writer._journal_digest.update(journal.read_range(0, head.journal_bytes).numpy().tobytes())
        writer._remove_stale()
        last = writer._documents[-1] if writer._documents else None
        if last is not None and not last.complete:
            writer._stop = last.num_bytes
            writer._parts = [DocumentPart(last.name, False, False, 0, 0, 0)]
        return writer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._new is not None and self._lock.is_held:
            self._new.discard()
        self.close()

    def close(self) -> None:
        """Let another process write; what is not committed is dropped. Again is no error."""
        super().close()
        self._journal.close()
        self._lock.close()
        self._unusable = self._unusable or "this writer is closed"

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
        self._check_usable()
        if len(chunk_stops) != len(self._record_crc32) or (
            len(text) and chunk_stops[-1] != self._stop + len(text)
        ):
            raise ValueError(
                f"expected the text of {len(self._record_crc32)} chunks from byte {self._stop}, got {len(text)} bytes "
                f"and {len(chunk_stops)} stops"
            )
        entries = np.empty(len(chunk_stops), INDEX)
        entries["start"] = np.concatenate([[self._stop], chunk_stops[:-1]])[: len(entries)]
        entries["stop"], entries["crc32"] = chunk_stops, self._record_crc32
        with self._changing():
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
        with self._changing():
            if self._record_crc32:  # chunks of a text that is not kept
                self.add_text(b"", np.full(len(self._record_crc32), self._stop, np.int64))
            self._commit(state, finished)

    def _commit(self, state: Mapping[str, Tensor], finished: bool) -> None:
        for file in self._files.files:
            file.sync()
        head = self.point
        parts = [part for part in self._parts if part.chunks or (part.ends and not part.begins)]
        segment = Segment(tuple(self._crc32), tuple(parts))
        for problem in self._files.too_large(segment):
            raise DRTError(f"{problem}; commit more often")
        line, content = segment.line(), dump_state(state)
        digest = self._journal_digest.copy()
        digest.update(line)
        point = Point(
            segments=head.segments + 1,
            journal_bytes=head.journal_bytes + len(line),
            journal_sha256=digest.hexdigest(),
            chunks=head.chunks + segment.chunks,
            tokens=head.tokens + segment.tokens,
            text_bytes=head.text_bytes + segment.text_bytes,
            state_bytes=len(content),
            state_sha256=sha256(content).hexdigest() if content else "",
        )
        if point.state_file is not None:
            self._replace(point.state_file, content)
        self._journal.write(head.journal_bytes, line)
        self._journal.sync()
        self._manifest = Manifest(self.description, point, point if finished else self._manifest.finished)
        self._replace(MANIFEST, self._manifest.dump())
        self._new, self._journal_digest = None, digest
        self._advance(point, segment, state, finished)

    def index(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Make the index of all landmarks, in place of one that the archive has; readers then search it.

        Args:
            on_progress: called with numbers of landmarks just added.

        Raises:
            DRTError: the archive is not finished or holds nothing, a segment is damaged, faiss is not installed, the
                disk is full or fails.
        """
        self._check_usable()
        count = self.num_chunks
        if not self.finished or not count:
            raise DRTError(
                f"{self.path} is not finished: finish its build before it is indexed, or drop what is not finished: "
                f"drt memory rollback {self.path}"
            )
        page = ArchivePage(self._files, count)
        size = training_size(count)
        chosen = torch.arange(size, device="cpu") * count // size

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
        self._check_usable()
        first = self._entries + len(self._record_crc32)
        if slot.tolist() != list(range(first, first + len(slot))):
            raise ValueError(f"expected chunks from number {first} on, got {slot.tolist()}")
        if not self._parts or self._parts[-1].ends:
            raise ValueError("begin a document before its chunks are appended")
        landmarks = round_to(self._files.landmark_dtype, landmarks, "landmarks")
        records, vectors = pack(fields), pack((landmarks,))
        for file, offered in zip(self._files.files, (records, vectors), strict=False):
            if offered.shape[1] != file.record_bytes:
                raise ValueError(
                    f"{file.name}: expected {file.record_bytes} bytes a chunk, as the archive's description says, got "
                    f"{offered.shape[1]}"
                )
        with self._changing():
            self._write(CHUNKS, first, records.numpy().tobytes())
            self._write(LANDMARKS, first, vectors.numpy().tobytes())
            self._record_crc32 += [zlib.crc32(record) for record in records.numpy()]
            self._grow(chunks=len(slot), tokens=int(fields[-1].sum()))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the files. What fails on the way makes this writer unusable: what they hold is not known then."""
        self._check_usable()
        try:
            yield
        except BaseException:
            self._unusable = "an earlier write has failed"
            raise

    def _check_usable(self) -> None:
        if self._unusable:
            raise DRTError(
                f"{self.path}: {self._unusable}; open the archive again, it is as of its last commit"
            )

    def _grow(self, **more: int) -> None:
        part = self._parts[-1]
        self._parts[-1] = replace(part, **{name: getattr(part, name) + count for name, count in more.items()})

    def _text_end(self) -> int:
        return self.point.text_bytes + sum(part.text_bytes for part in self._parts)

    def _write(self, file: int, first: int, data: bytes) -> None:
        self._files.files[file].write(first, data)
        self._crc32[file] = zlib.crc32(data, self._crc32[file])

    def _replace(self, name: str, content: bytes) -> None:
        """Write a whole file, or leave it as it was."""
        with atomic_write(self.path / name) as file:
            file.write(content)

    def _remove_stale(self) -> None:
        points = (self._manifest.head, self._manifest.finished)
        remove_stale(self.path, {point.state_file for point in points if point is not None})


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
