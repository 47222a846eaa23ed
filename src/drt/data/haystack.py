"""Haystacks: long real texts that needles are hidden in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

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
        start = int(place * (len(self.text) - span + 1))
        begin = start
        while begin > 0 and self.text[begin] & 0xC0 == 0x80:
            begin -= 1
        return self.text[begin : start + span]
