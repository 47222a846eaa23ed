"""A corpus on disk: documents as token ids in memory-mapped shards, described by a manifest.

    manifest.json                  tokenizer, dtype, and for each split its shards with sizes and checksums
    tokenizer/                     the tokenizer, as `save_pretrained` writes it
    train-00000.tokens.bin         token ids, little-endian uint16 or uint32, one document after the other
    train-00000.documents.bin      (N, 2) little-endian int64: tokens and UTF-8 bytes of each document
    train-00000.names.jsonl        a JSON string a line: the name of each document

A document never spans shards. Where the manifest's `document_end` is not null, every document ends with that token:
it is counted in the document's tokens and not in its bytes.
"""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drt.errors import DRTError
from drt.files import describe_kind, read_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
FORMAT = 1
SPLITS = ("train", "validation", "test")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
DOCUMENT_DTYPE = "<i8"

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Manifest:
    """What a corpus folder holds.

    Args:
        folder: the corpus.
        dtype: `uint16` or `uint32`.
        tokenizer: `name`, `fingerprint` (see `drt.data.tokenizer`), `vocab_size` and `document_end` (id or None).
        splits: for each split `documents`, `tokens`, `bytes` and `shards`; a shard has a `name`, the same three
            counts, and `files`: name -> `size` in bytes and `sha256`.
        sources: where the text came from, in plain values.
        digest: of all documents, in order; None in corpora that were made before there was one.
    """

    folder: Path
    dtype: str
    tokenizer: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    sources: list[dict[str, Any]]
    digest: str | None = None


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a corpus folder.

    Raises:
        DRTError: there is none, it is damaged, or of another format.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise DRTError(
            f"{folder} is no corpus: it has no {MANIFEST}. `drt data prepare` makes one, and writes it last"
        )
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise DRTError(f"{path}: expected a corpus of format {FORMAT}, got {found!r}")
    try:
        _check_manifest(values)
    except KeyError as error:
        raise DRTError(f"{path} is damaged: {error} is missing") from error
    except ValueError as error:
        raise DRTError(f"{path} is damaged: {error}") from error
    names = ("dtype", "tokenizer", "splits", "sources")
    return Manifest(folder, **{name: values[name] for name in names}, digest=values.get("digest"))


def _check_manifest(values: dict[str, Any]) -> None:
    """Make sure that all that is read of a manifest is there and possible: it may come from a stranger."""
    _check_kinds(values, "manifest", dtype=str, tokenizer=dict, splits=dict, sources=list)
    if values["dtype"] not in DTYPES:
        raise ValueError(f"expected dtype {' or '.join(DTYPES)}, got {values['dtype']!r}")
    _check_kinds(values["tokenizer"], "tokenizer", name=str, fingerprint=str, vocab_size=int)
    if values["tokenizer"]["document_end"] is not None:
        _check_kinds(values["tokenizer"], "tokenizer", document_end=int)
    token_bytes = np.dtype(DTYPES[values["dtype"]]).itemsize
    for split, listed in values["splits"].items():
        _check_kinds(listed, split, documents=int, tokens=int, bytes=int, shards=list)
        for shard in listed["shards"]:
            _check_kinds(shard, split, name=str, documents=int, tokens=int, bytes=int, files=dict)
            if not 0 < shard["documents"] <= shard["tokens"]:
                raise ValueError(f"{shard['name']}: expected documents of at least a token each")
            sizes = {"tokens.bin": token_bytes * shard["tokens"], "documents.bin": 16 * shard["documents"]}
            for suffix in (*sizes, "names.jsonl"):
                name = f"{shard['name']}.{suffix}"
                if Path(name).name != name:
                    raise ValueError(f"expected the name of a file, got {name!r}")
                _check_kinds(shard["files"], split, **{name: dict})
                _check_kinds(shard["files"][name], name, size=int, sha256=str)
                if shard["files"][name]["size"] != sizes.get(suffix, shard["files"][name]["size"]):
                    raise ValueError(f"{name} has another size than what it is said to hold")


def _check_kinds(values: Any, where: str, **kinds: type) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    for name, kind in kinds.items():
        value = values[name]
        is_absurd = isinstance(value, int) and not 0 <= value < 2**48
        if not isinstance(value, kind) or isinstance(value, bool) or is_absurd:
            raise ValueError(f"{where}: {name} cannot be {str(value)[:50]!r}")


class Corpus:
    """The documents of one split, memory-mapped: opening costs 16 bytes of memory a document.

    Attributes:
        manifest: of the folder.
        split: `train`, `validation` or `test`.
        document_lengths: (N,) int64, tokens of each document, its end token included.
        document_bytes: (N,) int64, UTF-8 bytes of each document's text.
        document_starts: (N + 1,) int64, where each document begins in the stream of all tokens; the last is its end.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        self.split = split
        if split not in manifest.splits:
            raise DRTError(
                f"{manifest.folder} has no split {split!r}; it has {', '.join(manifest.splits) or 'none'}"
            )
        self._shards = manifest.splits[split]["shards"]
        for shard in self._shards:
            for name, file in shard["files"].items():
                _check_size(manifest.folder / name, file["size"])
        self._maps = [self._map(shard) for shard in self._shards]
        documents = [self._documents(shard) for shard in self._shards]
        table = np.concatenate([*documents, np.empty((0, 2), np.int64)])
        self.document_lengths: NDArray[np.int64] = table[:, 0].copy()
        self.document_bytes: NDArray[np.int64] = table[:, 1].copy()
        self.document_starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.document_lengths)])
        self._shard_starts = np.cumsum([0, *(len(tokens) for tokens in self._maps)])

    def __len__(self) -> int:
        return len(self.document_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.document_starts[-1])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents' texts."""
        return int(self.document_bytes.sum())

    @property
    def document_end(self) -> int | None:
        """The token that ends every document, or None."""
        end = self.manifest.tokenizer["document_end"]
        return None if end is None else int(end)

    @cached_property
    def names(self) -> list[str]:
        """The name of each document; read when it is first asked for."""
        names: list[str] = []
        for shard in self._shards:
            path = self.manifest.folder / f"{shard['name']}.names.jsonl"
            try:
                found = [str(json.loads(line)) for line in path.read_bytes().splitlines()]
            except (ValueError, RecursionError) as error:
                raise DRTError(f"{path} is damaged: expected names, a JSON string a line") from error
            if len(found) != shard["documents"]:
                raise DRTError(f"{path} is damaged: expected {shard['documents']} names, got {len(found)}")
            names += found
        return names

    def document(self, index: int) -> Tokens:
        """(T,) token ids of a document, a read-only view of the file.

        Raises:
            IndexError: no document of that index; it counts from 0.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index}: expected 0..{len(self) - 1}")
        return self.tokens(int(self.document_starts[index]), int(self.document_starts[index + 1]))

    def tokens(self, start: int, stop: int) -> Tokens:
        """(stop - start,) tokens of the stream of all documents; a view where they lie in one shard.

        Raises:
            IndexError: unless 0 <= start <= stop <= num_tokens.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}..{stop}: expected 0 <= start <= stop <= {self.num_tokens}")
        first, last = np.searchsorted(self._shard_starts[1:], [start, stop - 1], side="right")
        parts = [
            self._maps[number][max(start - self._shard_starts[number], 0) : stop - self._shard_starts[number]]
            for number in range(first, last + 1)
            if start < stop
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self._dtype)])

    def verify(self) -> None:
        """Compare every file with its checksum; reads the whole split.

        Raises:
            DRTError: a file is damaged; the message names it.
        """
        for shard in self._shards:
            for name, file in shard["files"].items():
                path = self.manifest.folder / name
                with path.open("rb") as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()
                if found != file["sha256"]:
                    raise DRTError(
                        f"{path} is damaged: expected SHA-256 {file['sha256']}, got {found}; "
                        "fetch or prepare the corpus anew"
                    )

    @property
    def _dtype(self) -> str:
        return DTYPES[self.manifest.dtype]

    def _map(self, shard: dict[str, Any]) -> Tokens:
        path = self.manifest.folder / f"{shard['name']}.tokens.bin"
        return np.memmap(path, self._dtype, mode="r", shape=(shard["tokens"],))

    def _documents(self, shard: dict[str, Any]) -> NDArray[np.int64]:
        path = self.manifest.folder / f"{shard['name']}.documents.bin"
        table = np.fromfile(path, DOCUMENT_DTYPE).reshape(-1, 2).astype(np.int64)
        if len(table) != shard["documents"] or table[:, 0].sum() != shard["tokens"] or table.min() < 0:
            raise DRTError(f"{path} is damaged: its documents are not those that {MANIFEST} counts")
        return table


def open_corpus(
    folder: Path | str, split: str, *, fingerprint: str | None = None, verify: bool = False
) -> Corpus:
    """Open one split of a corpus.

    Args:
        folder: the corpus.
        split: `train`, `validation` or `test`.
        fingerprint: of the tokenizer that the model reads with; a corpus of another one is refused.
        verify: also compare every file with its checksum, which reads it all.

    Raises:
        DRTError: no corpus, no such split, a file that is missing, truncated or damaged, another tokenizer.
    """
    manifest = read_manifest(folder)
    made_with = manifest.tokenizer["fingerprint"]
    if fingerprint is not None and fingerprint != made_with:
        raise DRTError(
            f"{folder} was made with another tokenizer ({manifest.tokenizer['name']}): "
            f"expected fingerprint {fingerprint[:12]}, got {made_with[:12]}"
        )
    corpus = Corpus(manifest, split)
    if verify:
        corpus.verify()
    return corpus


def _check_size(path: Path, wanted: int) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise DRTError(f"{path}: a file of the corpus cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):  # a pipe and a device have a size too
        raise DRTError(f"{path} is damaged: expected a regular file, got {describe_kind(path)}")
    if found.st_size != wanted:
        raise DRTError(f"{path} is damaged: expected {wanted} bytes, got {found.st_size}")
