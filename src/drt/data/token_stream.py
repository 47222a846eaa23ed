"""A text file as token ids, a piece at a time, with the place in its text where each token ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drt.data.text_files import text_blocks
from drt.data.tokens import TextCodec, TokenIds, text_pieces
from drt.errors import DRTError


class TokenPiece(NamedTuple):
    """A piece of a text: its bytes, its tokens (n,) int32, and where each ends (n,), in bytes from the text's start."""

    text: bytes
    ids: TokenIds
    stops: NDArray[np.int64]


class TokenStream:
    """Tokens of a text file in order; memory in use does not depend on its size.

    A tokenizer of words gives the tokens of the whole text but for merges across the ends of pieces.

    Args:
        path: of the file, which `drt.data.text_files` reads.
        tokenizer: one that tokenises bytes, or a fast one.

    Raises:
        DRTError: a slow tokenizer that is not of bytes: it cannot say where a token ends.
    """

    def __init__(self, path: Path | str, tokenizer: Any) -> None:
        self.path, self._tokenizer = Path(path), tokenizer
        self._is_bytes = TextCodec(tokenizer).is_bytes
        if not self._is_bytes and not getattr(tokenizer, "is_fast", False):
            raise DRTError(
                f"{type(tokenizer).__name__} cannot say where a token ends; expected a fast tokenizer or one of bytes"
            )

    def pieces(self, skip_tokens: int = 0, skip_bytes: int = 0) -> Iterator[TokenPiece]:
        """The text in order, but for its first tokens.

        Args:
            skip_tokens: tokens to leave out.
            skip_bytes: the bytes that they are.

        Raises:
            DRTError: the file cannot be read or is no text.
        """
        offset = 0
        # Where tokens are not bytes, pieces have to be cut in the same places again.
        for text in text_pieces(text_blocks(self.path, skip_bytes if self._is_bytes else 0)):
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

    def _encode(self, text: bytes, offset: int) -> TokenPiece:
        string = text.decode()
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
