"""Text to a corpus: documents are read one after the other and tokenised by several processes at once.

What was finished survives a kill: whenever enough tokens have come together every open shard is closed, and
`progress.json` says how far the documents were read. The result does not depend on the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from drt.data.corpus import MANIFEST, SPLITS, TOKENIZER, Manifest, read_manifest
from drt.data.corpus_writer import (
    SHARD_TOKENS,
    ShardWriter,
    token_dtype,
    write_atomically,
    write_manifest,
)
from drt.data.sources import Document, Source, place_of, read_documents
from drt.data.tokenizer import describe_tokenizer, load_tokenizer, save_tokenizer
from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

PROGRESS = "progress.json"
_BATCH_BYTES = 2**21  # text given to a process at once
_WAITING = 3  # batches a process may have in its queue

Tokenised = tuple[str, TokenIds, int]  # name, token ids, bytes


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What a corpus is made of.

    Args:
        sources: documents, in order.
        tokenizer: `bytes`, a folder with a tokenizer, or a name on the Hugging Face hub that was downloaded before.
        validation_share, test_share: of the documents of sources without a split; drawn by a document's name.
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
            raise DRTError("wanted at least one source of text, got none")
        for source in self.sources:
            if source.split is not None and source.split not in SPLITS:
                raise DRTError(f"split: wanted one of {', '.join(SPLITS)}, got {source.split!r}")
        shares = (self.validation_share, self.test_share, self.train_share or 0.0)
        if min(shares) < 0 or sum(shares) > 1:
            raise DRTError(f"shares of validation, test and train: wanted 0..1 in all, got {shares}")


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
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(config.tokenizer)
    described = describe_tokenizer(tokenizer, config.tokenizer)
    request = _describe_request(config, described["fingerprint"])
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        if manifest.sources != request:
            raise DRTError(f"{output} holds a corpus of other settings; choose another folder or delete it")
        return manifest
    state = _load_progress(output, request)
    save_tokenizer(tokenizer, output / TOKENIZER)
    writer = _CorpusWriter(output, token_dtype(described["vocab_size"]), state, shard_tokens)
    documents = islice(chain.from_iterable(map(_with_source, config.sources)), state["documents"], None)
    try:
        for batch in _tokenise(documents, config.tokenizer, processes):
            for source, (name, ids, size) in batch:
                split = source.split or split_of(
                    name, config.validation_share, config.test_share, config.train_share
                )
                least = config.min_tokens if split == "train" else config.min_test_tokens
                writer.add(split if len(ids) >= least else None, name, ids, size)
            on_progress(writer.progress())
        writer.commit()
    finally:
        writer.abandon()
    if not state["shards"].get("train") and not state["shards"].get("test"):
        raise DRTError(f"{output}: the sources hold no document of at least {config.min_tokens} tokens")
    shards = {split: state["shards"][split] for split in SPLITS if state["shards"].get(split)}
    write_manifest(output, token_dtype(described["vocab_size"]), described, shards, request)
    (output / PROGRESS).unlink()
    return read_manifest(output)


def split_of(
    name: str, validation_share: float, test_share: float, train_share: float | None = None
) -> str | None:
    """The split of a document, drawn by its name: the same wherever and whenever it is prepared under that name.

    None for a document that no split takes.
    """
    place = place_of(name)
    held_out = test_share + validation_share
    if place < held_out:
        return "test" if place < test_share else "validation"
    return "train" if train_share is None or place < held_out + train_share else None


def _describe_request(config: PrepareConfig, fingerprint: str) -> list[dict[str, Any]]:
    """All that the corpus depends on, in the manifest's form: what may be gone on with, and what is finished."""
    settings = {
        name: value for name, value in vars(config).items() if name not in ("sources", "tokenizer")
    } | {"fingerprint": fingerprint}
    return [asdict(source) | settings for source in config.sources]


def _load_progress(output: Path, request: list[dict[str, Any]]) -> dict[str, Any]:
    """What an interrupted call left: `documents` read so far and `shards` of each split."""
    path = output / PROGRESS
    if not path.exists():
        return {"request": request, "documents": 0, "shards": {}}
    try:
        state = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DRTError(f"{path}: cannot be read; delete the folder to begin anew: {error}") from error
    if state["request"] != request:
        raise DRTError(
            f"{output} holds an unfinished corpus of other settings; choose another folder or delete it"
        )
    return state


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
        self._read = state["documents"]
        written = [shard for shards in state["shards"].values() for shard in shards]
        self._tokens = sum(shard["tokens"] for shard in written)
        self._bytes = sum(shard["bytes"] for shard in written)
        self._committed = self._tokens

    def add(self, split: str | None, name: str, ids: TokenIds, size: int) -> None:
        """Write a document; None: it was read and is left out."""
        self._read += 1
        if split is None:
            return
        if split not in self._writers:
            first = len(self._state["shards"].get(split, []))
            # Its own limit is out of reach: shards are closed here, all together.
            self._writers[split] = ShardWriter(
                self._output, split, self._dtype, first, 2 * self._shard_tokens + len(ids)
            )
        filled = self._writers[split].add(name, ids, size)
        assert filled is None
        self._tokens += len(ids)
        self._bytes += size
        if self._tokens - self._committed >= self._shard_tokens:
            self.commit()

    def commit(self) -> None:
        """Close the open shards and say in `progress.json` what is finished."""
        for split, writer in self._writers.items():
            shard = writer.close()
            if shard is not None:
                self._state["shards"].setdefault(split, []).append(shard)
        self._writers = {}
        self._state["documents"] = self._read
        self._committed = self._tokens
        write_atomically(self._output / PROGRESS, json.dumps(self._state).encode())

    def abandon(self) -> None:
        """Delete what is not finished."""
        for writer in self._writers.values():
            writer.abandon()

    def progress(self) -> Progress:
        """So far, what an interrupted call did included."""
        return Progress(self._read, self._tokens, self._bytes)


def _with_source(source: Source) -> Iterator[tuple[Source, Document]]:
    return ((source, document) for document in read_documents(source))


def _tokenise(
    documents: Iterator[tuple[Source, Document]], tokenizer: str, processes: int
) -> Iterator[list[tuple[Source, Tokenised]]]:
    """Batches of tokenised documents, in the order of the documents."""
    if processes == 1:
        encoder = _Encoder(tokenizer)
        yield from ([(source, encoder(document))] for source, document in documents)
        return
    # Not forked: a process with threads (the tokenizer's, PyTorch's) must not be.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (tokenizer,)) as pool:
        waiting: deque[tuple[list[Source], Future[list[Tokenised]]]] = deque()
        try:
            for batch in _batches(documents):
                sources = [source for source, _ in batch]
                waiting.append((sources, pool.submit(_encode_batch, [document for _, document in batch])))
                if len(waiting) >= _WAITING * processes:
                    yield _finished(waiting)
            while waiting:
                yield _finished(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(
    waiting: deque[tuple[list[Source], Future[list[Tokenised]]]],
) -> list[tuple[Source, Tokenised]]:
    sources, future = waiting.popleft()
    return list(zip(sources, future.result(), strict=True))


def _batches(documents: Iterator[tuple[Source, Document]]) -> Iterator[list[tuple[Source, Document]]]:
    """Lists of documents with at least `_BATCH_BYTES` of text, but the last."""
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Encoder:
    """Callable (document) -> name, token ids with the token that ends a document, bytes."""

    def __init__(self, name: str) -> None:
        tokenizer = load_tokenizer(name)
        self._codec = TextCodec(tokenizer)
        self._end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], np.int32)

    def __call__(self, document: Document) -> Tokenised:
        ids = np.concatenate([self._codec.encode(document.text), self._end])
        return document.name, ids, len(document.text)


_encoders: list[_Encoder] = []  # of a tokenising process: its one encoder


def _start_process(tokenizer: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoders.append(_Encoder(tokenizer))


def _encode_batch(documents: list[Document]) -> list[Tokenised]:
    return [_encoders[0](document) for document in documents]
