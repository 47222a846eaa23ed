"""A text file as token ids, a piece at a time, with the place in the file where each token ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

PIECE_BYTES = 2**20


class TokenPiece(NamedTuple):
    """A piece of a text: its bytes, its tokens (n,) int32, and where each ends (n,), in bytes from the text's start."""

    text: bytes
    ids: TokenIds
    stops: NDArray[np.int64]


class TokenStream:
    """Tokens of a UTF-8 text file in order; memory in use does not depend on its size.

    Pieces end after a line where there is one: a tokenizer of words gives the tokens of the whole text but for
    merges across such a place.

    Args:
        path: of the file.
        tokenizer: one that tokenises bytes, or a fast one.

    Raises:
        DRTError: a slow tokenizer that is not of bytes: it cannot say where a token ends.
    """

    def __init__(self, path: Path | str, tokenizer: Any) -> None:
        self.path, self._tokenizer = Path(path), tokenizer
        self._is_bytes = TextCodec(tokenizer).is_bytes
        if not self._is_bytes and not getattr(tokenizer, "is_fast", False):
            raise DRTError(
                f"{type(tokenizer).__name__} cannot say where a token ends; wanted a fast tokenizer or one of bytes"
            )

    def pieces(self, skip_tokens: int = 0, skip_bytes: int = 0) -> Iterator[TokenPiece]:
        """The text in order, but for its first tokens.

        Args:
            skip_tokens: tokens to leave out.
            skip_bytes: the bytes that they are.

        Raises:
            DRTError: the file cannot be read or is not UTF-8.
        """
        offset = 0
        for text in self._texts(skip_bytes if self._is_bytes else 0):
            if self._is_bytes:
                ids = TextCodec(self._tokenizer).encode(text)
                start = skip_bytes + offset
                yield TokenPiece(text, ids, np.arange(start + 1, start + len(text) + 1))
            else:
                piece = self._encode(text, offset)
                skipped = min(skip_tokens, len(piece.ids))
                skip_tokens -= skipped
                begin = piece.stops[skipped - 1] - offset if skipped else 0
                if skipped < len(piece.ids):
                    yield TokenPiece(text[begin:], piece.ids[skipped:], piece.stops[skipped:])
            offset += len(text)

    def _texts(self, start: int) -> Iterator[bytes]:
        """The file from a byte on, in pieces that end after a line, or else after a character."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                rest = b""
                while block := file.read(PIECE_BYTES):
                    text = rest + block
                    end = len(text) if self._is_bytes else text.rfind(b"\n") + 1 or _last_character(text)
                    rest = text[end:]
                    if end:
                        yield text[:end]
                if rest:
                    yield rest
        except OSError as error:
            raise DRTError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _encode(self, text: bytes, offset: int) -> TokenPiece:
        try:
            string = text.decode()
        except UnicodeDecodeError as error:
            raise DRTError(
                f"{self.path} is not UTF-8 text: {error.reason} at byte {offset + error.start}"
            ) from error
        encoded = self._tokenizer(
            string, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        code = np.frombuffer(string.encode("utf-32-le"), np.uint32)
        width = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
        byte = np.concatenate([[0], np.cumsum(width)])
        starts = byte[[first for first, _ in encoded["offset_mapping"]]]
        stops = np.append(
            np.maximum.accumulate(starts)[1:], len(text)
        )  # what lies between tokens is the first one's
        return TokenPiece(text, np.array(encoded["input_ids"], np.int32), stops + offset)


def _last_character(text: bytes) -> int:
    """Where the last character of a text begins: a cut there splits none."""
    end = len(text) - 1
    while end > 0 and text[end] & 0xC0 == 0x80:
        end -= 1
    return end
