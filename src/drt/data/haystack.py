"""Haystacks: long real texts that needles are hidden in."""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

DOCUMENT_END = b"\n\n"  # between the files of a haystack

_OPENERS = {".xz": lzma.decompress, ".gz": gzip.decompress}
_FIRST_GUESS = 4.5  # bytes a token, to begin with, where a token is not a byte


@dataclass(frozen=True)
class Haystack:
    """A long text.

    Args:
        text: UTF-8.
        names: where the text comes from, for records.
    """

    text: bytes = field(repr=False)
    names: tuple[str, ...] = ()

    def window(self, codec: TextCodec, tokens: int, rng: np.random.Generator) -> tuple[TokenIds, bytes]:
        """A random contiguous piece; only about as much text as it needs is tokenised.

        Args:
            codec: encodes the text.
            tokens: length of the piece.
            rng: says where the piece lies.

        Returns:
            (tokens,) int32 token ids, and a text that contains theirs.

        Raises:
            DRTError: the whole text has fewer tokens.
        """
        place = rng.random()
        size = len(self.text)
        span = tokens if codec.is_bytes else math.ceil(tokens * _FIRST_GUESS)
        while True:
            text = self._piece(place, min(span, size))
            ids = codec.encode(text)
            if len(ids) >= tokens:
                return ids[:tokens], text
            if span >= size:
                raise DRTError(
                    f"the haystack ({', '.join(self.names) or 'text'}) is too short: "
                    f"wanted {tokens} tokens of text, got {len(ids)} ({size} bytes)"
                )
            span = math.ceil(span * tokens / max(len(ids), 1) * 1.05) + 16

    def _piece(self, place: float, span: int) -> bytes:
        """`span` bytes, or up to 3 more so that the piece does not begin inside a character."""
        end = int(place * (len(self.text) - span + 1)) + span
        start = end - span
        while start > 0 and self.text[start] & 0xC0 == 0x80:
            start -= 1
        return self.text[start:end]


def load_haystack(paths: Sequence[Path | str] | None = None) -> Haystack:
    """Read texts, one after the other.

    Args:
        paths: UTF-8 text files, plain or compressed (.xz, .gz), and folders, of which every text file is taken, in the
            order of the names; hidden files and files that are no text are left out of a folder. None or empty: the
            sample that ships with the package.

    Raises:
        DRTError: a path does not exist or cannot be read, a file is not UTF-8 text or is damaged, there is no text.
    """
    if not paths:
        return sample_haystack()
    texts = [text for path in paths for text in _read(Path(path))]
    return Haystack(DOCUMENT_END.join(texts), tuple(map(str, paths)))


def sample_haystack() -> Haystack:
    """Four English novels in the public domain, 1.29 MB, that nothing here is trained on; see sample/README.md."""
    packed = files("drt.data").joinpath("sample", "books.txt.xz").read_bytes()
    return Haystack(lzma.decompress(packed), ("sample",))


def _read(path: Path) -> list[bytes]:
    """The texts of a file or folder."""
    if not path.exists():
        raise DRTError(f"{path}: no such file or folder; wanted a text. `drt data haystack` fetches some")
    if not path.is_dir():
        return [_read_file(path)]
    inside = sorted(file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
    contents = (file.read_bytes() for file in inside if file.is_file())
    texts = [content for content in contents if content and _is_text(content)]
    if not texts:
        raise DRTError(f"{path}: wanted a folder with text files in it, got none")
    return texts


def _read_file(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        text = _OPENERS.get(path.suffix, bytes)(content)
    except OSError as error:  # includes gzip.BadGzipFile
        raise DRTError(f"{path}: cannot be read: {error}") from error
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DRTError(f"{path}: wanted a whole {path.suffix} file, but it is damaged: {error}") from error
    if not text:
        raise DRTError(f"{path}: wanted a text, but the file is empty")
    if not _is_text(text):
        raise DRTError(f"{path}: wanted UTF-8 text, but the file is binary or in another encoding")
    return text


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
