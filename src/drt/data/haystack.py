"""Haystacks: long real texts that needles are hidden in."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from drt.data.text_files import folder_texts, read_text
from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

DOCUMENT_END = b"\n\n"  # between the files of a haystack

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
                    f"expected {tokens} tokens of text, got {len(ids)} ({size} bytes)"
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
        paths: files and folders, read as `drt.data.text_files` says. None or empty: the sample that ships with the
            package.

    Raises:
        DRTError: a path does not exist or cannot be read, a file is no text or is damaged, there is no text.
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
        raise DRTError(f"{path}: no such file or folder; expected a text. `drt data haystack` fetches some")
    if not path.is_dir():
        return [read_text(path)]
    texts = [text for _, text in sorted(folder_texts(path, read_text))]
    if not texts:
        raise DRTError(f"{path}: expected a folder with text files in it, got none")
    return texts
