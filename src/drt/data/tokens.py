"""Text to token ids and back, fast where tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]

BYTE_OFFSET = 3  # ByT5: ids 0, 1, 2 are pad, eos, unk; byte b is id b + 3
_PIECE = 2**20  # bytes of text given to a tokenizer at once: its working memory is many times its input
_PROBE = "".join(map(chr, range(128))) + "é€😀"


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False) -> Any:
        """Token ids of a text; with `split_special_tokens` the characters of `<eos>` are characters."""

    def decode(self, token_ids: list[int]) -> Any:
        """The text of token ids."""


class TextCodec:
    """Encodes text with a tokenizer; byte tokenizers are recognised by what they do and bypassed with numpy.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with its `encode` and `decode`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        probe = [byte + BYTE_OFFSET for byte in _PROBE.encode()]
        self.is_bytes = list(tokenizer.encode(_PROBE, add_special_tokens=False)) == probe

    def encode(self, text: str | bytes) -> TokenIds:
        """(n,) int32 token ids, no special tokens: what spells one is text. Bytes at either end that are no whole UTF-8
        character are dropped, unless tokens are bytes."""
        data = text.encode() if isinstance(text, str) else text
        if self.is_bytes:
            return np.frombuffer(data, np.uint8) + np.int32(BYTE_OFFSET)
        ids = [self._encode_piece(piece) for piece in text_pieces([data])]
        return np.concatenate(ids) if ids else np.empty(0, np.int32)

    def encode_continuation(self, text: str, continuation: str) -> TokenIds:
        """Token ids of `continuation` as they follow `text`: where the tokenizer keeps a boundary between the two,
        the rest of their joint encoding, otherwise the encoding of `continuation` alone."""
        if not self.is_bytes:
            start, joint = self.encode(text), self.encode(text + continuation)
            if len(joint) > len(start) and np.array_equal(joint[: len(start)], start):
                return joint[len(start) :]
        return self.encode(continuation)

    def _encode_piece(self, text: bytes) -> TokenIds:
        string = text.decode("utf-8", errors="ignore")
        ids = self._tokenizer.encode(string, add_special_tokens=False, split_special_tokens=True)
        return np.array(ids, np.int32)

    def decode(self, token_ids: TokenIds | Sequence[int]) -> bytes:
        """The text of token ids, as UTF-8; exactly the bytes where tokens are bytes."""
        ids = np.asarray(token_ids)
        if self.is_bytes:
            return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()
        return str(self._tokenizer.decode(ids.tolist())).encode()


def text_pieces(blocks: Iterable[bytes], size: int | None = None) -> Iterator[bytes]:
    """A text in pieces that can be tokenised one by one: few tokens are other ones than those of the whole.

    A piece ends with the first line that makes it long enough. In a line that is too long it ends before a space, or
    else before a character.

    Args:
        blocks: the text, UTF-8, cut anywhere.
        size: bytes of a piece at least, but for the last; a piece has at most twice as many. None: 1 MiB.
    """
    size = size or _PIECE
    held = bytearray()
    for block in blocks:
        for start in range(0, len(block), size):
            held += block[start : start + size]
            while end := _piece_end(held, size):
                yield bytes(held[:end])
                del held[:end]
    if held:
        yield bytes(held)


def _piece_end(text: bytearray, size: int) -> int:
    """Where the first piece of a text ends; 0: more text has to be seen first."""
    most = 2 * size
    end = text.find(b"\n", size, most) + 1
    if end or len(text) <= most:
        return end
    end = text.rfind(b" ", size, most)
    if end < 0:
        end = most
        while text[end] & 0xC0 == 0x80 and end > size:
            end -= 1
    return end
