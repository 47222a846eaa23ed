"""Text to a corpus: documents are read one after the other and tokenised, in pieces, by several processes at once.

What was finished survives a kill: whenever enough tokens have come together every open shard is closed, and
`progress.json` says how far the documents were read and what they were. The result does not depend on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drt.data.corpus import DTYPES, MANIFEST, SPLITS, TOKENIZER, Manifest, Tokens, read_manifest
from drt.data.corpus_writer import SHARD_TOKENS, ShardWriter, token_dtype, write_manifest
from drt.data.sources import HUB, Source, place_of, read_sources
from drt.data.tokenizer import describe_tokenizer, load_tokenizer, save_tokenizer
from drt.data.tokens import TextCodec, text_pieces
from drt.errors import DRTError
from drt.files import lock_folder, read_json, write_text

PROGRESS = "progress.json"
_BATCH_BYTES = 2**21  # text given to a process at once
_WAITING = 3  # batches a process may have in its queue


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What a corpus is made of.

    Args:
        sources: documents, in order.
        tokenizer: `bytes`, a folder with a tokenizer, or a name on the Hugging Face hub that was downloaded before.
        validation_share, test_share: of the documents of sources without a split; drawn by their keys.
        train_share: the same; None: all that is left. A smaller corpus of the same text keeps its other splits.
        min_tokens: documents with fewer tokens are left out.
        min_test_tokens: the same for validation and test.

    Raises:
        DRTError: a value that does not fit.
    """

    sources: Sequence[Source]
    tokenizer: str
    validation_share: float = 0.01
    test_share: float = 0.01
    train_share: float | None = None
    min_tokens: int = 1
    min_test_tokens: int = 1

    def __post_init__(self) -> None:
        if not self.sources:
            raise DRTError("expected at least one source of text, got none")
        for source in self.sources:
            if source.split is not None and source.split not in SPLITS:
                raise DRTError(f"split: expected one of {', '.join(SPLITS)}, got {source.split!r}")
        shares = (self.validation_share, self.test_share, self.train_share or 0.0)
        if not (all(share >= 0 for share in shares) and sum(shares) <= 1):  # NaN is neither
            raise DRTError(f"shares of validation, test and train: expected 0..1 in all, got {shares}")


@dataclass(frozen=True)
class Progress:
    """How far preparing has come: documents read, tokens and bytes written."""

    documents: int
    tokens: int
    bytes: int


def prepare_corpus(
    config: PrepareConfig,
    output: Path,
    *,
    processes: int = 1,
    on_progress: Callable[[Progress], None] = lambda _: None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Make a corpus, or go on with one that was interrupted; a finished one is left as it is.

    Args:
        config: what it is made of.
        output: folder, made if it is not there.
        processes: that tokenise; memory grows by some 50 MB for each.
        on_progress: called after every batch of documents.
        shard_tokens: tokens after which the open shards are closed.

    Raises:
        DRTError: a source or the tokenizer cannot be read, the folder holds a corpus of other settings, or there is
            no document to train on.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    described = describe_tokenizer(tokenizer, config.tokenizer)
    request = _describe_request(config, described["fingerprint"])
    if (output / MANIFEST).exists():
        return _finished_corpus(output, config, request)
    with lock_folder(output, f"another process is preparing {output}; wait until it has finished"):
        if (output / MANIFEST).exists():  # another process has finished it meanwhile
            return _finished_corpus(output, config, request)
        state = _load_progress(output, request)
        dtype = token_dtype(described["vocab_size"])
        writer = _CorpusWriter(output, dtype, state, shard_tokens)
        documents = _read(config)
        writer.skip(documents)
        try:
            for document, tokens in _tokenise(documents, config.tokenizer, dtype, processes):
                least = config.min_tokens if document.split == "train" else config.min_test_tokens
                writer.add(document, tokens, least)
                on_progress(writer.progress())
            writer.commit()
        finally:
            writer.abandon()
        if not state["shards"].get("train") and not state["shards"].get("test"):
            if not state["shards"]:  # nothing that other settings would stand beside
                (output / PROGRESS).unlink()
            raise DRTError(f"{output}: the sources hold no document of at least {config.min_tokens} tokens")
        save_tokenizer(tokenizer, output / TOKENIZER)
        shards = {split: state["shards"][split] for split in SPLITS if state["shards"].get(split)}
        write_manifest(output, dtype, described, shards, request, state["digest"])
        (output / PROGRESS).unlink()
    return read_manifest(output)


def split_of(
    key: str, validation_share: float, test_share: float, train_share: float | None = None
) -> str | None:
    """The split of a document, drawn by its key: the same wherever and whenever it is prepared under that name.

    None for a document that no split takes.
    """
    place = place_of(key)
    held_out = test_share + validation_share
    if place < held_out:
        return "test" if place < test_share else "validation"
    return "train" if train_share is None or place < held_out + train_share else None


def _finished_corpus(output: Path, config: PrepareConfig, request: list[dict[str, Any]]) -> Manifest:
    """The manifest of a corpus that is there already, if it is what would be made now.

    The sources are read again, but for those on the hub, which keeps its versions.
    """
    manifest = read_manifest(output)
    if manifest.sources != request:
        raise DRTError(f"{output} holds a corpus of other settings; choose another folder or delete it")
    if manifest.digest is None or any(source.path.startswith(HUB) for source in config.sources):
        return manifest
    digest = _NO_DOCUMENTS
    for document in _read(config):
        digest = document.after(digest)
    if digest != manifest.digest:
        raise DRTError(
            f"{output} holds a corpus of other text: the sources have changed since; choose another folder or delete it"
        )
    return manifest


def _describe_request(config: PrepareConfig, fingerprint: str) -> list[dict[str, Any]]:
    """All that the corpus depends on, in the manifest's form: what may be resumed, and what is finished."""
    settings = {
        name: value for name, value in vars(config).items() if name not in ("sources", "tokenizer")
    } | {"fingerprint": fingerprint}
    return [asdict(source) | settings for source in config.sources]


def _load_progress(output: Path, request: list[dict[str, Any]]) -> dict[str, Any]:
    """What an interrupted call left: `documents` read so far and `shards` of each split."""
    path = output / PROGRESS
    if not path.exists():
        return {"request": request, "documents": 0, "digest": _NO_DOCUMENTS, "shards": {}}
    state = read_json(path)
    if not isinstance(state, dict) or not state.keys() >= {"request", "documents", "digest", "shards"}:
        raise DRTError(f"{path} is damaged or of another version; delete {output} to begin anew")
    if state["request"] != request:
        raise DRTError(
            f"{output} holds an unfinished corpus of other settings; choose another folder or delete it"
        )
    return state


_NO_DOCUMENTS = ""  # the digest before the first document


class _Document(NamedTuple):
    """A document that was read.

    Attributes:
        name: of it.
        split: that it belongs to; None: it is left out.
        text: UTF-8.
    """

    name: str
    split: str | None
    text: bytes

    def after(self, digest: str) -> str:
        """The digest of this document and all before it, in order."""
        parts = (self.name.encode("utf-8", "replace"), self.text)
        own = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hashlib.sha256(digest.encode() + own).hexdigest()


def _read(config: PrepareConfig) -> Iterator[_Document]:
    shares = (config.validation_share, config.test_share, config.train_share)
    for source, document in read_sources(config.sources):
        yield _Document(document.name, source.split or split_of(document.key, *shares), document.text)


class _CorpusWriter:
    """Shards of every split, closed together.

    Args:
        output: the corpus.
        dtype: of the tokens.
        state: as `_load_progress` gives it; kept up to date.
        shard_tokens: tokens after which the open shards are closed.
    """

    def __init__(self, output: Path, dtype: str, state: dict[str, Any], shard_tokens: int) -> None:
        self._output = output
        self._dtype = dtype
        self._state = state
        self._shard_tokens = shard_tokens
        self._writers: dict[str, ShardWriter] = {}
        self._read, self._digest = state["documents"], state["digest"]
        written = [shard for shards in state["shards"].values() for shard in shards]
        self._tokens = sum(shard["tokens"] for shard in written)
        self._bytes = sum(shard["bytes"] for shard in written)
        self._committed = self._tokens

    def skip(self, documents: Iterator[_Document]) -> None:
        """Leave out the documents that an interrupted call has written.

        Raises:
            DRTError: they are not the ones that it read.
        """
        digest = _NO_DOCUMENTS
        for document in islice(documents, self._read):
            digest = document.after(digest)
        if digest != self._digest:
            raise DRTError(
                f"{self._output} holds an unfinished corpus, and the sources have changed since it was begun; "
                "choose another folder or delete it"
            )

    def add(self, document: _Document, tokens: list[Tokens], least: int) -> None:
        """Write a document, unless no split takes it or it has fewer tokens than `least`."""
        self._read += 1
        self._digest = document.after(self._digest)
        split, count = document.split, sum(map(len, tokens))
        if split is None or count < least:
            return
        if split not in self._writers:
            first = len(self._state["shards"].get(split, []))
            # Its own limit is out of reach: shards are closed here, all together.
            self._writers[split] = ShardWriter(
                self._output, split, self._dtype, first, 2 * self._shard_tokens + count
            )
        filled = self._writers[split].add(document.name, tokens, len(document.text))
        assert filled is None
        self._tokens += count
        self._bytes += len(document.text)
        if self._tokens - self._committed >= self._shard_tokens:
            self.commit()

    def commit(self) -> None:
        """Close the open shards and say in `progress.json` what is finished."""
        for split, writer in self._writers.items():
            shard = writer.close()
            if shard is not None:
                self._state["shards"].setdefault(split, []).append(shard)
        self._writers = {}
        self._state.update(documents=self._read, digest=self._digest)
        self._committed = self._tokens
        write_text(self._output / PROGRESS, json.dumps(self._state))

    def abandon(self) -> None:
        """Delete what is not finished."""
        for writer in self._writers.values():
            writer.abandon()

    def progress(self) -> Progress:
        """So far, what an interrupted call did included."""
        return Progress(self._read, self._tokens, self._bytes)


def _tokenise(
    documents: Iterator[_Document], tokenizer: str, dtype: str, processes: int
) -> Iterator[tuple[_Document, list[Tokens]]]:
    """Documents with their tokens, piece by piece, in their order."""
    tokens: list[Tokens] = []  # of the document whose end has not come yet
    for document, is_end, ids in _encoded(documents, tokenizer, dtype, processes):
        tokens.append(ids)
        if is_end:
            yield document, tokens
            tokens = []


def _encoded(
    documents: Iterator[_Document], tokenizer: str, dtype: str, processes: int
) -> Iterator[tuple[_Document, bool, Tokens]]:
    """Pieces of documents as tokens, in order, and whether they are a document's end."""
    pieces = ((document, piece) for document in documents for piece in _pieces(document))
    if processes == 1:
        encode = _Encoder(tokenizer, dtype)
        yield from ((document, piece is None, encode(piece)) for document, piece in pieces)
        return
    # Not forked: a process with threads (the tokenizer's, PyTorch's) must not be.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (tokenizer, dtype)) as pool:
        waiting: deque[tuple[list[tuple[_Document, bool]], Future[list[Tokens]]]] = deque()
        try:
            for batch in _batches(pieces):
                parts = [(document, piece is None) for document, piece in batch]
                waiting.append((parts, pool.submit(_encode_batch, [piece for _, piece in batch])))
                if len(waiting) >= _WAITING * processes:
                    yield from _finished(*waiting.popleft())
            while waiting:
                yield from _finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(
    parts: list[tuple[_Document, bool]], future: Future[list[Tokens]]
) -> Iterator[tuple[_Document, bool, Tokens]]:
    try:
        encoded = future.result()
    except BrokenProcessPool as error:
        raise DRTError(
            "a process that tokenises has ended before its work, as where memory is short; run the same command again, "
            "with fewer --processes, and it goes on"
        ) from error
    return ((*part, ids) for part, ids in zip(parts, encoded, strict=True))


def _pieces(document: _Document) -> Iterator[bytes | None]:
    """What is tokenised of a document: pieces of its text, unless it is left out, and `None` for its end."""
    if document.split is not None:
        yield from text_pieces([document.text])
    yield None


def _batches(
    pieces: Iterator[tuple[_Document, bytes | None]],
) -> Iterator[list[tuple[_Document, bytes | None]]]:
    """Lists of pieces with at least `_BATCH_BYTES` of text, but the last."""
    batch, size = [], 0
    for item in pieces:
        batch.append(item)
        size += len(item[1] or b"")
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Encoder:
    """Callable (piece of text) -> its tokens; (None) -> the token that ends a document, if there is one."""

    def __init__(self, name: str, dtype: str) -> None:
        tokenizer = load_tokenizer(name)
        self._codec, self._dtype = TextCodec(tokenizer), DTYPES[dtype]
        end = tokenizer.eos_token_id
        self._end: Tokens = np.array([] if end is None else [end], self._dtype)

    def __call__(self, piece: bytes | None) -> Tokens:
        return self._end if piece is None else self._codec.encode(piece).astype(self._dtype)


_encoders: list[_Encoder] = []  # of a tokenising process: its one encoder


def _start_process(tokenizer: str, dtype: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoders.append(_Encoder(tokenizer, dtype))


def _encode_batch(pieces: list[bytes | None]) -> list[Tokens]:
    return [_encoders[0](piece) for piece in pieces]
