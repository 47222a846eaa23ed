"""Writes the shards and the manifest of a corpus; the format is told in `drt.data.corpus`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drt.data.corpus import DOCUMENT_DTYPE, DTYPES, FORMAT, MANIFEST
from drt.errors import DRTError
from drt.files import atomic_write, open_regular, write_text

SHARD_TOKENS = 2**26  # 128 MiB of uint16: what is lost at most when preparing is killed
_TEMPORARY = ".tmp"


class ShardWriter:
    """Writes documents into shards of one split; a shard is there whole or not at all.

    Args:
        folder: the corpus.
        split: `train`, `validation` or `test`.
        dtype: `uint16` or `uint32`; the token ids must fit.
        first: number of the first shard.
        shard_tokens: a shard is closed when it holds so many tokens.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, first: int = 0, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = DTYPES[dtype]
        self._number = first
        self._shard_tokens = shard_tokens
        self._file: BufferedWriter | None = None
        self._hash = hashlib.sha256()
        self._table: list[tuple[int, int]] = []
        self._names: list[str] = []
        self._tokens = 0  # in the open shard

    def add(
        self, name: str, tokens: NDArray[Any] | Sequence[NDArray[Any]], size: int
    ) -> dict[str, Any] | None:
        """Append a document.

        Args:
            name: of the document.
            tokens: (T,) token ids, the end token included, or pieces of them.
            size: UTF-8 bytes of the text.

        Returns:
            The description of the shard that this document filled, or None.

        Raises:
            DRTError: the disk is full or fails; the message names the file.
        """
        path = self._folder / (self._file_name("tokens.bin") + _TEMPORARY)
        pieces = [tokens] if isinstance(tokens, np.ndarray) else tokens
        if self._file is None:
            self._file = os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb")
        try:
            for piece in pieces:
                content = np.ascontiguousarray(piece, self._dtype).data
                self._file.write(content)
                self._hash.update(content)
        except OSError as error:
            raise DRTError(f"{path}: cannot be written: {error.strerror}") from error
        count = sum(map(len, pieces))
        self._table.append((count, size))
        self._names.append(name)
        self._tokens += count
        return self.close() if self._tokens >= self._shard_tokens else None

    def close(self) -> dict[str, Any] | None:
        """Finish the open shard: its files are on the disk when this returns. None if it holds no document.

        Raises:
            DRTError: the disk is full or fails; the message names the file.
        """
        if self._file is None:
            return None
        path = self._folder / self._file_name("tokens.bin")
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            os.replace(path.with_name(path.name + _TEMPORARY), path)
        except OSError as error:
            raise DRTError(f"{path}: cannot be written: {error.strerror}") from error
        table = np.array(self._table, DOCUMENT_DTYPE)
        names = "".join(json.dumps(name) + "\n" for name in self._names).encode()
        described = {
            path.name: {"size": path.stat().st_size, "sha256": self._hash.hexdigest()},
            **self._write("documents.bin", table.tobytes()),
            **self._write("names.jsonl", names),
        }
        shard = {
            "name": self._file_name("").rstrip("."),
            "documents": len(table),
            "tokens": self._tokens,
            "bytes": int(table[:, 1].sum()),
            "files": described,
        }
        self._number += 1
        self._file, self._hash, self._table, self._names = None, hashlib.sha256(), [], []
        self._tokens = 0
        return shard

    def _write(self, suffix: str, content: bytes) -> dict[str, Any]:
        """Write a whole file, and sync the folder with it; returns its description."""
        name = self._file_name(suffix)
        with atomic_write(self._folder / name) as file:
            file.write(content)
        return {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}

    def abandon(self) -> None:
        """Delete what is written of the open shard."""
        if self._file is not None:
            with suppress(OSError):  # what cannot be written any more goes anyway
                self._file.close()
            (self._folder / (self._file_name("tokens.bin") + _TEMPORARY)).unlink(missing_ok=True)
            self._file = None

    def _file_name(self, suffix: str) -> str:
        return f"{self._split}-{self._number:05d}.{suffix}"


def write_manifest(
    folder: Path,
    dtype: str,
    tokenizer: dict[str, Any],
    shards: dict[str, list[dict[str, Any]]],
    sources: list[dict[str, Any]],
    digest: str | None = None,
) -> None:
    """Write manifest.json, whole or not at all: with it the corpus is finished.

    Args:
        folder: the corpus.
        dtype: `uint16` or `uint32`.
        tokenizer: `name`, `fingerprint`, `vocab_size` and `document_end`.
        shards: of each split, as `ShardWriter` describes them.
        sources: where the text came from, in plain values.
        digest: of all documents, in order, as `drt.data.prepare` makes it.
    """
    splits = {
        split: {name: sum(shard[name] for shard in listed) for name in ("documents", "tokens", "bytes")}
        | {"shards": listed}
        for split, listed in shards.items()
    }
    manifest = {
        "format": FORMAT,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "sources": sources,
        "digest": digest,
        "splits": splits,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds the ids of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
