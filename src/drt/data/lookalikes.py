"""Pieces of real text that a retriever takes for a needle of some name: hard negatives.

Among a million chunks the best few are, the needle's aside, those that are most like it: `j1+j2=j` where `|ij=48213|`
is asked for. A training row of some dozen chunks has none of them by chance, so they are looked for, by the letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
from numpy.typing import NDArray

SIZE = 32  # bytes of a piece
SIGNS = b"0123456789|=>?"  # what needles are made of beside letters
LEAST_SIGNS = 3
CANDIDATES = 4096  # pieces that a name's is the best of
# A name where a needle or a question would begin, or the start or the end of one, which the text beside it completes.
_PART_OF_A_NEEDLE = re.compile(rb"\|[a-z]{2}[=>?]|^[a-z]{0,2}[=>?]|\|[a-z]{0,2}$")


class LookAlikes:
    """Finds pieces of texts that look like needles and are none.

    Args:
        texts: UTF-8.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        is_sign = np.zeros(256, np.bool_)
        is_sign[list(SIGNS)] = True
        pieces = [np.frombuffer(text, np.uint8, len(text) // SIZE * SIZE).reshape(-1, SIZE) for text in texts]
        found = np.concatenate([piece[is_sign[piece].sum(1) >= LEAST_SIGNS] for piece in pieces])
        harmless = [_PART_OF_A_NEEDLE.search(piece.tobytes()) is None for piece in found]
        self._pieces: NDArray[np.uint8] = found[np.array(harmless, np.bool_)]
        # (26, pieces): a letter counts, and more so before a sign, as a name stands in a needle.
        signs = is_sign[self._pieces]
        self._likeness = np.stack(
            [
                (letter := self._pieces == ord(character)).sum(1, np.uint8)
                + 2 * (letter[:, :-1] & signs[:, 1:]).sum(1, np.uint8)
                for character in ascii_lowercase
            ]
        )

    def draw(self, name: str, rng: np.random.Generator) -> str:
        """The piece most like a needle of that name among `CANDIDATES` random ones; "" where no text has any."""
        if len(self._pieces) == 0:
            return ""
        drawn = rng.integers(len(self._pieces), size=CANDIDATES)
        letters = [ascii_lowercase.index(letter) for letter in set(name)]
        likeness = sum(self._likeness[letter, drawn].astype(np.int64) for letter in letters)
        return self._pieces[drawn[likeness.argmax()]].tobytes().decode(errors="ignore")
