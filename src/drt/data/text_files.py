"""Texts that people have, read in one way: plain, .gz and .xz, HTML and PDF, alone or in folders.

Whatever a file holds comes out as UTF-8. What is no text is an error that says what it seems to be, and what to do.
"""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import math
import os
import stat
import zlib
from codecs import BOM_UTF8, getincrementaldecoder
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from drt.data.text_converters import CONVERTERS, ConversionError
from drt.errors import DRTError
from drt.files import open_regular

BLOCK_BYTES = 2**20
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}  # of compressed files
# A file may expand to so many bytes, or to so many times its own: books do 4 times, logs 50 times, a bomb 1,000.
_FREE_BYTES, _MOST_EXPANSION = 2**26, 200
_SIGNATURES = {
    b"%PDF-": "a PDF: name it .pdf",
    b"PK\x03\x04": "a ZIP container, as .docx, .odt and .epub are: convert it to text, for example with pandoc",
    b"\x1f\x8b": "compressed by gzip: name it .gz",
    b"\xfd7zXZ\x00": "compressed by xz: name it .xz",
    b"BZh": "compressed by bzip2: unpack it with bunzip2",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it with unzstd",
    b"\xff\xfe": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
}
_LATIN1 = "Latin-1 or Windows-1252: convert it with iconv -f WINDOWS-1252 -t UTF-8"
_NAMED = 3  # files that one message names
_log = logging.getLogger(__name__)
T = TypeVar("T")


class NotTextError(DRTError):
    """A file that holds no UTF-8 text; of a folder such files are left out."""


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, apart from its compression: `.jsonl` of `books.jsonl.xz`."""
    return (Path(path.stem) if path.suffix.lower() in _OPENERS else path).suffix.lower()


def text_blocks(path: Path | str, skip: int = 0) -> Iterator[bytes]:
    """The text of a file as UTF-8, in blocks; memory does not depend on its size.

    Args:
        path: a text, HTML (.html, .htm, .xhtml) or PDF (.pdf), which are converted, plain or compressed (.xz, .gz). A
            byte order mark at its beginning is no text.
        skip: bytes of the text to leave out; they are read all the same.

    Raises:
        DRTError: the file is missing, damaged, no regular file, or expands beyond measure.
        NotTextError: it is binary or in another encoding.
    """
    path = Path(path)
    decoder = getincrementaldecoder("utf-8")()
    read = 0
    with _open(path) as (file, most):
        head = file.read(8)
        file.seek(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
        while block := file.read(BLOCK_BYTES):
            _check_expansion(path, file, most)
            try:
                text = decoder.decode(block).encode()
            except UnicodeDecodeError as error:
                raise _not_text(path, head, error, read + error.start) from error
            if b"\0" in text:
                raise _not_text(path, head, "a NUL", read + text.index(b"\0"))
            if len(text) > max(skip - read, 0):
                yield text[max(skip - read, 0) :]
            read += len(text)
        if decoder.getstate()[0]:
            raise _not_text(path, head, "it ends within a character", read)


def read_text(path: Path | str) -> bytes:
    """The whole text of a file, as `text_blocks` reads it.

    Raises:
        DRTError: as `text_blocks`, or the text is empty.
    """
    text = io.BytesIO()  # gives its content without a copy
    for block in text_blocks(path):
        text.write(block)
    if not text.tell():
        raise DRTError(f"{path} is empty; expected a text of at least one character")
    return text.getvalue()


def text_size(path: Path | str) -> int:
    """Bytes of a file's text, which is read once to see that it is one; raises as `read_text`."""
    size = sum(map(len, text_blocks(path)))
    if not size:
        raise DRTError(f"{path} is empty; expected a text of at least one character")
    return size


def text_lines(path: Path | str) -> Iterator[bytes]:
    """The lines of a text file without their ends; raises as `text_blocks`."""
    begun: list[bytes] = []
    for block in text_blocks(path):
        first, *others = block.split(b"\n")
        begun.append(first)
        for line in others:
            yield _take(begun)
            begun.append(line)
    if any(begun):
        yield _take(begun)


def _take(parts: list[bytes]) -> bytes:
    """Parts as one, and out of the list: a line may be a whole book, which is not to be held twice."""
    whole = b"".join(parts)
    parts.clear()
    return whole


def folder_texts(folder: Path, read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """The text files below a folder: a directory's own, then those of its subdirectories, in the order of their names.

    Hidden files and directories, empty files, links, and what is no UTF-8 text are left out; the log tells how many.

    Args:
        folder: to look into.
        read: gives what is required of a file, such as `read_text`.

    Returns:
        Each file with what `read` gave.

    Raises:
        DRTError: a folder or file may not be read, or is damaged.
    """
    left_out: dict[str, list[Path]] = defaultdict(list)
    for path in _walk(folder):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            left_out["links or special files"].append(path)
        elif found.st_size:
            try:
                yield path, read(path)
            except NotTextError:
                left_out["not UTF-8 text"].append(path)
            except ConversionError as error:
                left_out[str(error)].append(path)
    for reason, paths in left_out.items():
        names = ", ".join(str(path.relative_to(folder)) for path in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
        _log.warning("%s: %s files are left out (%s): %s%s", folder, f"{len(paths):,}", reason, names, more)


def text_files(paths: Iterable[Path | str]) -> dict[Path, int]:
    """The text files that paths name, and those of the folders that they name, with the bytes of their texts.

    Every file is read once, so that a mistake shows before hours go into the first.

    Raises:
        DRTError: as `text_size`; a file comes twice; a folder holds no text.
    """
    sizes: dict[Path, int] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        found = dict(folder_texts(path, text_size)) if path.is_dir() else {path: text_size(path)}
        if not found:
            raise DRTError(f"{path}: expected a folder with text files in it, got none")
        for file in found:
            if file.resolve() in seen:
                raise DRTError(f"{file} is named twice")
            seen.add(file.resolve())
        sizes |= found
    return sizes


def check_text(text: bytes, name: str) -> None:
    """Make sure that bytes are UTF-8.

    Args:
        text: to look at.
        name: of it, for the message.

    Raises:
        NotTextError: they are not.
    """
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise _not_text(name, text, error, error.start) from error


def _check_expansion(path: Path, file: IO[bytes], most: float) -> None:
    if file.tell() > most:
        raise DRTError(
            f"{path}: expands to more than {_MOST_EXPANSION} times its size, as a bomb does; unpack it first if it is "
            "what you want"
        )


def _read_all(path: Path, file: IO[bytes], most: float) -> bytes:
    content = io.BytesIO()
    while block := file.read(BLOCK_BYTES):
        _check_expansion(path, file, most)
        content.write(block)
    return content.getvalue()


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], float]]:
    """A stream of a file's text, and the most bytes that it may have."""
    suffix = path.suffix.lower()
    opener, convert = _OPENERS.get(suffix), CONVERTERS.get(kind_of(path))
    try:
        with os.fdopen(open_regular(path, follow=True), "rb") as raw:
            file: IO[bytes] = raw if opener is None else opener(raw)
            size = os.fstat(raw.fileno()).st_size
            most = math.inf if opener is None else max(_FREE_BYTES, _MOST_EXPANSION * size)
            if convert is not None:
                file = io.BytesIO(convert(path, _read_all(path, file, most)).encode())
            yield file, most
    except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        if opener is None:
            raise DRTError(f"{path}: cannot be read: {error}") from error
        raise DRTError(f"{path}: expected a whole {suffix} file, but it is damaged: {error}") from error


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder that are not hidden, in order."""

    def refuse(error: OSError) -> None:
        raise DRTError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for directory, subdirectories, names in os.walk(folder, onerror=refuse):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if not name.startswith("."))


def _not_text(name: Path | str, head: bytes, reason: UnicodeDecodeError | str, position: int) -> NotTextError:
    """What is told of a file that is no text: why, what it seems to be, and what to do."""
    guess = next((kind for start, kind in _SIGNATURES.items() if head.startswith(start)), None)
    if isinstance(reason, UnicodeDecodeError):
        guess, reason = guess or _LATIN1, reason.reason
    looks = "it is binary" if guess is None else f"it looks like {guess}"
    return NotTextError(f"{name} is not UTF-8 text: {reason} at byte {position}; {looks}")
