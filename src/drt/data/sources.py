"""Documents out of files, folders and Hugging Face data sets, one after the other, never all at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from drt.data.json_rows import json_rows, text_field_of
from drt.data.text_files import folder_texts, kind_of, read_text
from drt.errors import DRTError

HUB = "hf:"
FILES, DIRECTORIES = "files", "directories"
_NAME_FIELDS = ("title", "name", "id", "path")
_PARQUET_ROWS = 64  # read at once: rows may be whole books


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, and which split they go to.

    Args:
        path: a file, a folder, or `hf:NAME[:CONFIGURATION]@SPLIT`, a data set on the Hugging Face hub. By its ending a
            file is JSON lines (.jsonl, .json), Parquet (.parquet) or one text, as `drt.data.text_files` reads it.
        split: `train`, `validation` or `test`; None: by each document's key.
        text_field: of a JSON object or a table's row: the text.
        documents: what a document of a folder is: `files`, each text file below it and each row of its .jsonl and
            .parquet files, or `directories`, the text files that lie directly in one directory, joined in the order of
            their names.

    Raises:
        DRTError: `documents` is something else.
    """

    path: str
    split: str | None = None
    text_field: str = "text"
    documents: str = FILES

    def __post_init__(self) -> None:
        if self.documents not in (FILES, DIRECTORIES):
            raise DRTError(f"documents: expected {FILES} or {DIRECTORIES}, got {self.documents!r}")


@dataclass(frozen=True)
class Document:
    """A text.

    Args:
        name: of it: a file's path in its folder, or what a row calls itself.
        text: UTF-8.
        is_namesake: another document before it has the same name.
    """

    name: str
    text: bytes
    is_namesake: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """What its split is drawn by: the name, but for namesakes, which must not all fall together, the text too."""
        return f"{self.name}\0{hashlib.sha256(self.text).hexdigest()}" if self.is_namesake else self.name


def read_sources(sources: Iterable[Source]) -> Iterator[tuple[Source, Document]]:
    """The documents of several sources, one after the other; raises as `read_documents`."""
    seen: set[bytes] = set()
    for source in sources:
        for document in read_documents(source):
            name = hashlib.blake2b(document.name.encode("utf-8", "replace"), digest_size=8).digest()
            yield source, replace(document, is_namesake=name in seen)
            seen.add(name)


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, always in the same order; empty ones are left out.

    Raises:
        DRTError: the source is missing or damaged, or a row has no text; the message says where.
    """
    for document in _reader(source):
        if document.text and not document.text.isspace():
            yield document


def place_of(key: str) -> float:
    """Where a document's key falls between 0 and 1: random among keys, and the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def sample_texts(sources: Iterable[Source], size: int, share: float = 1.0) -> list[str]:
    """Whole documents, `size` bytes of text or a little more, from the beginning of the sources on.

    Args:
        sources: to read.
        size: bytes of UTF-8.
        share: of the documents that is looked at. Those that `drt.data.prepare` keeps for validation and test come
            last: with no more than 1 minus their shares none of them is.

    Raises:
        DRTError: as `read_documents`; or there is no text.
    """
    texts: list[str] = []
    left = size
    for _, document in read_sources(sources):
        if left <= 0:
            break
        if place_of(document.key) >= 1 - share:
            texts.append(document.text.decode())
            left -= len(document.text)
    if not texts:
        raise DRTError("the sources hold no text")
    return texts


def _reader(source: Source) -> Iterator[Document]:
    if source.path.startswith(HUB):
        return _read_hub(source)
    path = Path(source.path)
    if not path.exists():
        raise DRTError(
            f"{path}: no such file or folder; expected a text, JSON lines, Parquet, or {HUB}NAME@SPLIT"
        )
    if path.is_dir():
        return _read_folder(path, source)
    return _read_rows(path, source.text_field) or iter([Document(path.name, read_text(path))])


def _read_rows(path: Path, text_field: str) -> Iterator[Document] | None:
    """The documents of a file that is a table by its ending, or `None`."""
    kind = kind_of(path)
    if kind == ".parquet":
        return _read_parquet(path, text_field)
    if kind in (".jsonl", ".json"):
        return (_from_row(row, text_field, where) for where, row in json_rows(path))
    return None


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        columns = [name for name in (text_field, *_NAME_FIELDS) if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _from_row(row, text_field, f"{path}:{number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DRTError(f"{path}: expected a Parquet file: {error}") from error


def _read_hub(source: Source) -> Iterator[Document]:
    import datasets

    address, separator, split = source.path.removeprefix(HUB).partition("@")
    name, _, configuration = address.partition(":")
    if not separator or not name or not split:
        raise DRTError(f"{source.path}: expected {HUB}NAME@SPLIT or {HUB}NAME:CONFIGURATION@SPLIT")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _from_row(row, source.text_field, f"{source.path}:{number}")
    except (OSError, ValueError) as error:
        if isinstance(error, DRTError):
            raise
        raise DRTError(f"{source.path}: the data set cannot be read: {error}") from error


def _from_row(row: Any, text_field: str, where: str) -> Document:
    text = text_field_of(row, text_field, where)
    name = next((str(row[field]) for field in _NAME_FIELDS if row.get(field)), where)
    return Document(name, text.encode("utf-8", "replace"))  # JSON may hold half a surrogate pair


def _read_folder(folder: Path, source: Source) -> Iterator[Document]:
    if source.documents == DIRECTORIES:
        for directory, found in groupby(folder_texts(folder, read_text), key=lambda text: text[0].parent):
            joined = b"\n".join(text for _, text in found)
            yield Document(str(directory.relative_to(folder.parent)), joined)
        return
    tables = (".jsonl", ".parquet")  # a .json in a folder is as often a text of its own
    for path, text in folder_texts(folder, lambda path: None if kind_of(path) in tables else read_text(path)):
        if text is None:
            yield from _read_rows(path, source.text_field) or ()
        else:
            yield Document(str(path.relative_to(folder.parent)), text)
