"""A chunk memory on disk that outlives the process: read a text once, ask of it for ever.

An archive is a folder:
    manifest.json            what made it, and up to where it is committed (`drt.memory.manifest`)
    segments.jsonl           a line a committed segment: its checksums, and what it holds of which document
    chunks.bin               keys, values and length of each chunk
    landmarks.bin            its landmark
    index.bin                where its text lies, and the checksum of its record
    text.bin                 the text of the documents
    state-N.safetensors      the decoding state at the end of the text, of segment N
    landmarks.faiss          an index of landmarks, where one was made (`drt.memory.approximate_index`)
    lock                     locked by the process that writes

Data files only grow, and whatever lies in them past the committed point does not exist: a writer that is killed
leaves the archive as it was at its last commit. Readers need no lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from drt.errors import DRTError
from drt.files import open_regular
from drt.memory.approximate_index import (
    INDEX_FILE,
    ApproximateIndex,
    EarlierIndexError,
    indexed_point,
    load_index,
)
from drt.memory.archive_files import ArchiveFiles, ArchivePage
from drt.memory.chunk_codec import Fields, is_finite
from drt.memory.landmark_index import LandmarkIndex, NearestLandmarks, PlacedPage
from drt.memory.manifest import DATA_FILES, Manifest, Point, Segment
from drt.memory.paged_store import Page, PagedStore
from drt.memory.tensor_page import TensorPage

MANIFEST, JOURNAL = "manifest.json", "segments.jsonl"
SEARCHES = ("auto", "exact", "index")
INDEXED_FROM = 2**20  # chunks; benchmarks/landmark_index.py measured where a search by index is worth it
MAX_READ_BYTES = 2**30  # of a journal and of a decoding state, which are read whole
_log = logging.getLogger(__name__)
_ATTEMPTS = 50  # a reader meets a commit between two of its reads very seldom twice in a row


@dataclass(frozen=True)
class Document:
    """A text in an archive.

    Attributes:
        name: as it was given, for a file its path.
        first_chunk: number of its first chunk.
        num_chunks: its chunks are [first_chunk, first_chunk + num_chunks).
        num_tokens: tokens in them.
        text_start: where its text begins in the archive's.
        num_bytes: of its text; 0 where the text is not kept.
        complete: it was read to its end.
    """

    name: str
    first_chunk: int
    num_chunks: int
    num_tokens: int
    text_start: int
    num_bytes: int
    complete: bool


class ChunkSource(NamedTuple):
    """Where a chunk comes from: bytes [start, stop) of a document, and those bytes (empty where they are not kept)."""

    document: Document
    start: int
    stop: int
    text: bytes


class Archive:
    """An archive opened for reading, as of its last finished build or append; writers do not disturb it.

    Make it with `Archive.open`; it is a context manager, or is closed with `close`.

    Attributes:
        search: of landmarks by the stores that are made of it: "exact" scores all; "index" asks the archive's index
            (`ArchiveWriter.index`) for candidates among those that it covers; "auto", the default, does so where an
            index covers at least `INDEXED_FROM`, and warns of one of an earlier format, which it does without. A
            writer's store is searched exactly.
    """

    def __init__(self, path: Path, manifest: Manifest, point: Point, files: ArchiveFiles) -> None:
        self.path, self.description, self.point = path, manifest.description, point
        self.search = "auto"
        self.finished = manifest.finished == manifest.head
        self._files = files
        self._documents: list[Document] = []
        self._state: dict[str, Tensor] = {}

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Archive:
        """Open an archive.

        Args:
            path: its folder.
            verify: check the manifest, the journal, the decoding state and the files' sizes now, and every chunk,
                landmark and text when it is first read; nothing that is damaged is used. False checks the manifest
                alone.

        Raises:
            DRTError: no archive, one of a later format, a damaged one, or one of which no build has finished.
        """
        folder = Path(path)
        before: Manifest | None = None
        for _ in range(_ATTEMPTS):
            manifest = Manifest.load(folder / MANIFEST)
            if manifest == before:  # no writer was at work: what is missing will not come
                break
            before = manifest
            if manifest.finished is None:
                raise DRTError(
                    f"{folder} is not finished: its build stopped after {manifest.head.tokens:,} tokens; run it again "
                    f"to resume, or drop them: drt memory rollback {folder}"
                )
            files = ArchiveFiles(folder, manifest.description, writable=False, verify=verify)
            archive = cls(folder, manifest, manifest.finished, files)
            try:
                archive._load(manifest.head)
            except FileNotFoundError as error:  # a writer has committed since the manifest was read
                files.close()
                missing = error
                continue
            return archive
        raise DRTError(f"{missing.filename}: missing")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    @property
    def num_chunks(self) -> int:
        return self.point.chunks

    @property
    def num_tokens(self) -> int:
        return self.point.tokens

    @property
    def num_segments(self) -> int:
        return self.point.segments

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of each file that the archive consists of."""
        sizes = {
            name: file.record_bytes * (self.point.text_bytes if name == DATA_FILES[-1] else self.num_chunks)
            for name, file in zip(DATA_FILES, self._files.files, strict=True)
        }
        sizes[JOURNAL] = self.point.journal_bytes
        sizes[MANIFEST] = (self.path / MANIFEST).stat().st_size
        if self.point.state_file is not None:
            sizes[self.point.state_file] = self.point.state_bytes
        if (self.path / INDEX_FILE).exists():
            sizes[INDEX_FILE] = (self.path / INDEX_FILE).stat().st_size
        return sizes

    @property
    def num_indexed(self) -> int:
        """Leading chunks whose landmarks the archive's index covers, 0 without one.

        Raises:
            DRTError: it is not this archive's, or damaged.
        """
        point = indexed_point(self.path)
        if point is None:
            return 0
        check_index(self.path, point)
        return point.chunks

    @property
    def documents(self) -> list[Document]:
        """The documents, in order."""
        return list(self._documents)

    def source(self, chunk: int) -> ChunkSource:
        """Where a chunk comes from.

        Raises:
            ValueError: no such chunk.
            DRTError: its text is damaged.
        """
        if not 0 <= chunk < self.num_chunks:
            raise ValueError(f"chunk must be in [0, {self.num_chunks}), got {chunk}")
        number = bisect_right(self._documents, chunk, key=lambda document: document.first_chunk) - 1
        document = self._documents[number]
        entry = self._files.index(torch.tensor([chunk], device="cpu"))[0]
        start, stop = int(entry["start"]), int(entry["stop"])
        if not 0 <= start <= stop <= document.num_bytes:
            raise DRTError(
                f"{self.path / DATA_FILES[2]} is damaged: chunk {chunk} has bytes {start} to {stop} of "
                f"{document.num_bytes}"
            )
        text = self._files.text(document.text_start + start, document.text_start + stop)
        return ChunkSource(document, start, stop, text)

    def text(self, document: Document, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a document; a few megabytes at a time are required.

        Raises:
            DRTError: they are damaged.
        """
        return self._files.text(document.text_start + start, document.text_start + stop)

    def store(self) -> ArchiveStore:
        """The chunks as a store of one row. What is appended to it stays in this process's memory.

        Raises:
            DRTError: the index that is to be searched is missing, damaged or another archive's.
            ValueError: an unknown `search`.
        """
        index = self._index()
        page = ArchivePage(self._files, self.num_chunks, index)
        return ArchiveStore(page, self.num_chunks, self.description.dtype, index)

    def _index(self) -> ApproximateIndex | None:
        """What `search` says: the index, or ``None`` for an exact search."""
        if self.search not in SEARCHES:
            raise ValueError(f"search must be {', '.join(SEARCHES)}, got {self.search!r}")
        if self.search == "exact":
            return None
        try:
            indexed = self.num_indexed
        except EarlierIndexError as error:
            if self.search == "index":
                raise
            _log.warning("every chunk is scored: %s", error)
            return None
        if indexed > self.num_chunks:  # made after this archive was opened
            indexed = 0
        if self.search == "index" and not indexed:
            raise DRTError(f"{self.path} has no landmark index; drt memory index makes one")
        if self.search == "auto" and indexed < INDEXED_FROM:
            return None
        index = load_index(self.path, self.description.landmark_size, verify=self._files.verify)
        return index if index.num_landmarks <= self.num_chunks else None  # replaced by a writer just now

    def state(self) -> dict[str, Tensor]:
        """The decoding state at the end of the text, as it was committed; empty before the first commit."""
        return dict(self._state)

    def check(self, model_fingerprint: str | None = None, tokenizer_fingerprint: str | None = None) -> None:
        """Check that a model, and its tokenizer, are those that made the archive.

        Raises:
            DRTError: they are not.
        """
        made_by = self.description
        if model_fingerprint not in (None, made_by.model_fingerprint):
            raise DRTError(
                f"{self.path} was made by another model, {made_by.model_name}: its fingerprint is "
                f"{made_by.model_fingerprint[:12]}, this model's is {str(model_fingerprint)[:12]}"
            )
        if tokenizer_fingerprint not in (None, made_by.tokenizer_fingerprint):
            raise DRTError(
                f"{self.path} was made with another tokenizer: its fingerprint is "
                f"{made_by.tokenizer_fingerprint[:12]}, this one's is {str(tokenizer_fingerprint)[:12]}"
            )

    def _load(self, head: Point) -> None:
        """Read the journal as far as it is committed, and the state.

        Raises:
            DRTError: either is damaged.
            FileNotFoundError: no state of that name.
        """
        for segment in read_journal(self.path / JOURNAL, head, self._files.verify)[: self.point.segments]:
            self._files.add(segment)
            self._add_documents(segment)
        last = self._documents[-1] if self._documents else None
        tokens = sum(document.num_tokens for document in self._documents)
        text = last.text_start + last.num_bytes if last else 0
        if (self._files.num_chunks, tokens, text) != (
            self.num_chunks,
            self.num_tokens,
            self.point.text_bytes,
        ):
            raise DRTError(f"{self.path / JOURNAL} is damaged: its counts are not those of {MANIFEST}")
        for problem in self._files.wrong_sizes(self.num_chunks, self.point.text_bytes):
            raise DRTError(problem)
        self._state = read_state(self.path, self.point, self._files.verify)

    def _add_documents(self, segment: Segment) -> None:
        for part in segment.parts:
            if part.begins:
                last = self._documents[-1] if self._documents else None
                chunk, text = (
                    (last.first_chunk + last.num_chunks, last.text_start + last.num_bytes) if last else (0, 0)
                )
                before = Document(part.name, chunk, 0, 0, text, 0, False)
            else:
                if not self._documents:
                    raise DRTError(f"{self.path / JOURNAL} is damaged: {part.name} has no beginning")
                before = self._documents.pop()
            self._documents.append(
                Document(
                    before.name,
                    before.first_chunk,
                    before.num_chunks + part.chunks,
                    before.num_tokens + part.tokens,
                    before.text_start,
                    before.num_bytes + part.text_bytes,
                    part.ends,
                )
            )


class ArchiveStore(PagedStore):
    """The chunks of an archive, and in memory those that are appended to them."""

    def __init__(self, page: Page, count: int, dtype: str, index: NearestLandmarks | None = None) -> None:
        super().__init__(dtype, None)
        self._pages = [PlacedPage(page, 0)]
        self._counts, self._index = torch.tensor([count], device="cpu"), index

    def landmark_blocks(self) -> LandmarkIndex:
        return LandmarkIndex(self._pages, self._counts, self._index)

    def clear(self) -> None:
        super().clear()
        self._index = None  # it knows the archive's landmarks

    def append(
        self, keys: Tensor, values: Tensor, landmarks: Tensor, lengths: Tensor, new_counts: Tensor
    ) -> None:
        super().append(keys.cpu(), values.cpu(), landmarks.cpu(), lengths.cpu(), new_counts)

    def _new_page(self, fields: Fields, landmarks: Tensor) -> Page:
        return TensorPage.like(fields, landmarks, self._page_size)

    def _index_device(self, chunk_indices: Tensor) -> torch.device:
        return torch.device("cpu")


def read_journal(path: Path, point: Point, verify: bool) -> list[Segment]:
    """The segments of a journal up to a point.

    Raises:
        DRTError: it is damaged.
    """
    content = _read_start(path, point.journal_bytes)
    if len(content) < point.journal_bytes:
        raise DRTError(f"{path} is truncated: expected {point.journal_bytes} bytes, got {len(content)}")
    if verify and hashlib.sha256(content).hexdigest() != point.journal_sha256:
        raise DRTError(f"{path} is damaged: its checksum is not the one in {MANIFEST}")
    try:
        segments = [Segment.parse(line) for line in content.splitlines()]
    except (ValueError, RecursionError) as error:
        raise DRTError(f"{path} is damaged: {error}") from error
    if len(segments) != point.segments:
        raise DRTError(f"{path} is damaged: expected {point.segments} segments, got {len(segments)}")
    for name in ("chunks", "tokens", "text_bytes"):
        count = sum(getattr(segment, name) for segment in segments)
        if count != getattr(point, name):
            raise DRTError(f"{path} is damaged: expected {getattr(point, name)} {name} in all, got {count}")
    return segments


def check_index(folder: Path, point: Point) -> None:
    """Make sure that an index was made of this archive, as it was at some point.

    Raises:
        DRTError: of another one.
    """
    content = _read_start(folder / JOURNAL, min(point.journal_bytes, MAX_READ_BYTES))
    if hashlib.sha256(content).hexdigest() != point.journal_sha256:
        raise DRTError(f"{folder / INDEX_FILE} was made of another archive; drt memory index makes it anew")


def dump_state(state: Mapping[str, Tensor]) -> bytes:
    """What `read_state` reads.

    Raises:
        DRTError: it is not finite, or larger than what is read.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise DRTError(
                f"expected a decoding state that is finite, got NaN or infinity in {name}: the model computes them"
            )
    content = save_tensors(dict(state)) if state else b""
    if len(content) > MAX_READ_BYTES:
        raise DRTError(f"expected a decoding state of at most {MAX_READ_BYTES:,} bytes, got {len(content):,}")
    return content


def read_state(folder: Path, point: Point, verify: bool) -> dict[str, Tensor]:
    """The decoding state of a point; empty where it has none.

    Raises:
        DRTError: it is damaged.
        FileNotFoundError: there is no such file.
    """
    if point.state_file is None:
        return {}
    path = folder / point.state_file
    try:
        content = _read_start(path, point.state_bytes + 1)
    except DRTError as error:
        if isinstance(
            error.__cause__, FileNotFoundError
        ):  # a writer may have removed it: the caller looks again
            raise error.__cause__ from None
        raise
    if verify and (len(content), hashlib.sha256(content).hexdigest()) != (
        point.state_bytes,
        point.state_sha256,
    ):
        raise DRTError(f"{path} is damaged: its checksum is not the one in {MANIFEST}")
    try:
        state = load_tensors(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise DRTError(f"{path} is damaged: {error}") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise DRTError(f"{path}: {name} holds values that are not finite; build the archive anew")
    return state


def _read_start(path: Path, num_bytes: int) -> bytes:
    """The first ``num_bytes`` of a file, all of it where it has fewer.

    Raises:
        DRTError: it is no regular file, or cannot be read.
    """
    if num_bytes > MAX_READ_BYTES + 1:
        raise DRTError(f"{path}: expected at most {MAX_READ_BYTES:,} bytes, got {num_bytes:,}")
    with os.fdopen(open_regular(path), "rb") as file:
        try:  # no more is allocated than there is: the number may be a stranger's
            return file.read(min(num_bytes, os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise DRTError(f"{path}: cannot be read: {error.strerror}") from error
