"""Are these files the documents of an archive? Told by what they hold, not by their names alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from drt.data.text_files import text_blocks
from drt.errors import DRTError
from drt.memory import Archive, ArchiveWriter, Document


def document_name(archive: Archive, path: Path) -> str:
    """What a file is called in an archive: its path as it was given, or in full where another text is called so."""
    taken = {document.name for document in archive.documents}
    return os.path.abspath(path) if str(path) in taken else str(path)


def find_held(archive: Archive, path: Path) -> Document | None:
    """The document that a file was read into, or None: one of its name, and with all of its text.

    Raises:
        DRTError: the file cannot be read, or the archive is damaged.
    """
    documents = (document for document in archive.documents if has_name(document, path))
    return next((document for document in documents if _is_read(archive, document, path)), None)


def check_unfinished(writer: ArchiveWriter, paths: Sequence[Path]) -> None:
    """Make sure that files begin with those that an unfinished build or append has read.

    Raises:
        DRTError: they do not, or have changed meanwhile.
    """
    begun = writer.unfinished_documents
    same = all(has_name(document, path) for document, path in zip(begun, paths, strict=False))
    if len(begun) > len(paths) or not same:
        raise DRTError(
            f"{writer.path} has an unfinished build of {', '.join(document.name for document in begun)}; expected "
            f"files that begin with these, got {', '.join(map(str, paths)) or 'none'}. {how_to_drop(writer)}"
        )
    if begun and begun[-1].complete and len(begun) == len(paths):
        raise DRTError(
            f"{writer.path}: the unfinished build was of more files than {', '.join(map(str, paths))}. "
            + how_to_drop(writer)
        )
    for document, path in zip(begun, paths, strict=False):
        if not _is_read(writer, document, path):
            raise DRTError(f"{path} has changed since {writer.path} began to read it. {how_to_drop(writer)}")


def check_not_own(writer: ArchiveWriter, paths: Sequence[Path]) -> None:
    """Make sure that an archive does not read its own files, which grow while they are read.

    Raises:
        DRTError: a file is one of them, under whatever name, or cannot be read.
    """
    with os.scandir(writer.path) as entries:
        own = {_identity(entry.stat(follow_symlinks=False)) for entry in entries}
    for path in paths:
        try:
            is_own = _identity(path.stat()) in own
        except OSError as error:
            raise DRTError(f"{path}: cannot be read: {error.strerror}") from error
        if is_own:
            raise DRTError(f"{path} is a file of {writer.path}, which would read it; expected another text")


def how_to_drop(archive: Archive) -> str:
    """What to do with an unfinished build or append that cannot be resumed."""
    return f"To drop what is not finished: drt memory rollback {archive.path}"


def has_name(document: Document, path: Path) -> bool:
    """Whether a document may be of this file: its name is the same as given, or as seen from here."""
    return document.name == str(path) or os.path.abspath(document.name) == os.path.abspath(path)


def _is_read(archive: Archive, document: Document, path: Path) -> bool:
    """Whether a file has the text of a document, or, of one that was not read to its end, goes on after it."""
    read = 0
    for block in text_blocks(path):
        if not block.startswith(archive.text(document, read, min(read + len(block), document.num_bytes))):
            return False
        read += len(block)
        if read > document.num_bytes:
            return not document.complete
    return document.complete and read == document.num_bytes


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
