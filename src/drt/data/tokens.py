"""Text to token ids and back, fast where tokens are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]

BYTE_OFFSET = 3  # ByT5: ids 0, 1, 2 are pad, eos, unk; byte b is id b + 3
_PIECE = 2**20  # bytes of text given to a tokenizer at once: its working memory is many times its input
_PROBE = "".join(map(chr, range(128))) + "é€😀"


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        """Token ids of a text."""

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
        """(n,) int32 token ids, no special tokens. Bytes at either end that are no whole UTF-8 character are dropped,
        unless tokens are bytes."""
        if self.is_bytes:
            data = text.encode() if isinstance(text, str) else text
            return np.frombuffer(data, np.uint8) + np.int32(BYTE_OFFSET)
        string = text if isinstance(text, str) else text.decode("utf-8", errors="ignore")
        pieces, start = [], 0
        while start < len(string):
            end = string.find("\n", start + _PIECE) + 1 or len(string)
            ids = self._tokenizer.encode(string[start:end], add_special_tokens=False)
            pieces.append(np.array(ids, np.int32))
            start = end
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def encode_continuation(self, text: str, continuation: str) -> TokenIds:
        """Token ids of `continuation` as they follow `text`: where the tokenizer keeps a boundary between the two,
        the rest of their joint encoding, otherwise the encoding of `continuation` alone."""
        if not self.is_bytes:
            start, joint = self.encode(text), self.encode(text + continuation)
            if len(joint) > len(start) and np.array_equal(joint[: len(start)], start):
                return joint[len(start) :]
        return self.encode(continuation)

    def decode(self, token_ids: TokenIds | Sequence[int]) -> bytes:
        """The text of token ids, as UTF-8; exactly the bytes where tokens are bytes."""
        ids = np.asarray(token_ids)
        if self.is_bytes:
            return (ids[ids >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes()
        return str(self._tokenizer.decode(ids.tolist())).encode()
