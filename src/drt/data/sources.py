"""Documents out of files, folders and Hugging Face data sets, one after the other, never all at once."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from drt.data.haystack import load_haystack
from drt.errors import DRTError

HUB = "hf:"
FILES, DIRECTORIES = "files", "directories"
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}  # of compressed files
_NAME_FIELDS = ("title", "name", "id", "path")
_PARQUET_ROWS = 64  # read at once: rows may be whole books


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, and which split they go to.

    Args:
        path: a file, a folder, or `hf:NAME[:CONFIGURATION]@SPLIT`, a data set on the Hugging Face hub. By its ending a
            file is JSON lines (.jsonl, .json), Parquet (.parquet) or one text; each but Parquet may be
            compressed (.xz, .gz).
        split: `train`, `validation` or `test`; None: by the documents' names.
        text_field: of a JSON object or a table's row: the text.
        documents: what a document of a folder is: `files`, each text file below it, or `directories`, the text files
            that lie directly in one directory, joined in the order of their names.

    Raises:
        DRTError: `documents` is something else.
    """

    path: str
    split: str | None = None
    text_field: str = "text"
    documents: str = FILES

    def __post_init__(self) -> None:
        if self.documents not in (FILES, DIRECTORIES):
            raise DRTError(f"documents: wanted {FILES} or {DIRECTORIES}, got {self.documents!r}")


@dataclass(frozen=True)
class Document:
    """A text, UTF-8, and its name."""

    name: str
    text: bytes


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, always in the same order; empty ones are left out.

    Raises:
        DRTError: the source is missing or damaged, or a row has no text; the message says where.
    """
    for document in _reader(source):
        if document.text.strip():
            yield document


def place_of(name: str) -> float:
    """Where a document's name falls between 0 and 1: random among names, and the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


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
    for document in chain.from_iterable(map(read_documents, sources)):
        if left <= 0:
            break
        if place_of(document.name) >= 1 - share:
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
            f"{path}: no such file or folder; wanted a text, JSON lines, Parquet, or {HUB}NAME@SPLIT"
        )
    if path.is_dir():
        return _read_folder(path, source.documents)
    kind = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    if kind in (".jsonl", ".json"):
        return _read_json_lines(path, source.text_field)
    if kind == ".parquet":
        return _read_parquet(path, source.text_field)
    return iter([Document(path.name, load_haystack([path]).text)])


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    opener = OPENERS.get(path.suffix, open)
    try:
        with cast(IO[str], opener(path, "rt", encoding="utf-8")) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _from_row(json.loads(line), text_field, f"{path}:{number}")
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        if isinstance(error, DRTError):
            raise
        raise DRTError(
            f"{path}: wanted JSON lines, but the file is damaged or no such file: {error}"
        ) from error


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
        raise DRTError(f"{path}: wanted a Parquet file: {error}") from error


def _read_hub(source: Source) -> Iterator[Document]:
    import datasets

    address, separator, split = source.path.removeprefix(HUB).partition("@")
    name, _, configuration = address.partition(":")
    if not separator or not name or not split:
        raise DRTError(f"{source.path}: wanted {HUB}NAME@SPLIT or {HUB}NAME:CONFIGURATION@SPLIT")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _from_row(row, source.text_field, f"{source.path}:{number}")
    except (OSError, ValueError) as error:
        if isinstance(error, DRTError):
            raise
        raise DRTError(f"{source.path}: the data set cannot be read: {error}") from error


def _from_row(row: Any, text_field: str, where: str) -> Document:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DRTError(f"{where}: wanted a text in the field {text_field!r}, got {fields}")
    name = next((str(row[field]) for field in _NAME_FIELDS if row.get(field)), where)
    return Document(name, text.encode("utf-8", "replace"))  # JSON may hold half a surrogate pair


def _read_folder(folder: Path, documents: str) -> Iterator[Document]:
    """Hidden files, links and files that are no UTF-8 text are left out."""
    for directory, subdirectories, names in _sorted_walk(folder):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        texts = []
        for name in names:
            path = directory / name
            text = None if name.startswith(".") or path.is_symlink() else _read_text(path)
            if text is not None:
                texts.append(Document(str(path.relative_to(folder.parent)), text))
        if documents == FILES:
            yield from texts
        elif texts:
            yield Document(str(directory.relative_to(folder.parent)), b"\n".join(text.text for text in texts))


def _sorted_walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` in the order of the names; the list of subdirectories may be changed."""
    for directory, subdirectories, names in os.walk(folder):
        subdirectories.sort()
        yield Path(directory), subdirectories, sorted(names)


def _read_text(path: Path) -> bytes | None:
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        content.decode()
    except UnicodeDecodeError:
        return None
    return content
