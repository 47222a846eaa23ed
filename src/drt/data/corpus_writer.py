"""Writes the shards and the manifest of a corpus; the format is told in `drt.data.corpus`."""

from __future__ import annotations

import hashlib
import json
import os
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drt.data.corpus import DOCUMENT_DTYPE, DTYPES, FORMAT, MANIFEST

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

    def add(self, name: str, tokens: NDArray[Any], size: int) -> dict[str, Any] | None:
        """Append a document.

        Args:
            name: of the document.
            tokens: (T,) token ids, the end token included.
            size: UTF-8 bytes of the text.

        Returns:
            The description of the shard that this document filled, or None.
        """
        if self._file is None:
            self._file = (self._folder / (self._file_name("tokens.bin") + _TEMPORARY)).open("wb")
        content = tokens.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._table.append((len(tokens), size))
        self._names.append(name)
        full = sum(length for length, _ in self._table) >= self._shard_tokens
        return self.close() if full else None

    def close(self) -> dict[str, Any] | None:
        """Finish the open shard: its files are on the disk when this returns. None if it holds no document."""
        if self._file is None:
            return None
        _close(self._file)
        table = np.array(self._table, DOCUMENT_DTYPE)
        files = {self._file_name("tokens.bin"): self._hash.hexdigest()}
        for suffix, content in (
            ("documents.bin", table.tobytes()),
            ("names.jsonl", "".join(json.dumps(name) + "\n" for name in self._names).encode()),
        ):
            name = self._file_name(suffix)
            with (self._folder / (name + _TEMPORARY)).open("wb") as file:
                file.write(content)
                _close(file)
            files[name] = hashlib.sha256(content).hexdigest()
        described = {}
        for name, checksum in files.items():
            os.replace(self._folder / (name + _TEMPORARY), self._folder / name)
            described[name] = {"size": (self._folder / name).stat().st_size, "sha256": checksum}
        shard = {
            "name": self._file_name("").rstrip("."),
            "documents": len(table),
            "tokens": int(table[:, 0].sum()),
            "bytes": int(table[:, 1].sum()),
            "files": described,
        }
        self._number += 1
        self._file, self._hash, self._table, self._names = None, hashlib.sha256(), [], []
        return shard

    def abandon(self) -> None:
        """Delete what is written of the open shard."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _file_name(self, suffix: str) -> str:
        return f"{self._split}-{self._number:05d}.{suffix}"


def write_manifest(
    folder: Path,
    dtype: str,
    tokenizer: dict[str, Any],
    shards: dict[str, list[dict[str, Any]]],
    sources: list[dict[str, Any]],
) -> None:
    """Write manifest.json, whole or not at all: with it the corpus is finished.

    Args:
        folder: the corpus.
        dtype: `uint16` or `uint32`.
        tokenizer: `name`, `fingerprint`, `vocab_size` and `document_end`.
        shards: of each split, as `ShardWriter` describes them.
        sources: where the text came from, in plain values.
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
        "splits": splits,
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole; it is on the disk when this returns."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("wb") as file:
        file.write(content)
        _close(file)
    os.replace(temporary, path)


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds the ids of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _close(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
