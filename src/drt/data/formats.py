"""How needles and questions are written, and which names they may use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from drt.errors import DRTError

FACT = "|{key}={value}|"
FACT_QUESTION = "|{key}?"
LINK = "|{key}>{target}|"
CHAIN_QUESTION = "|{key}?>"
CHAIN_JOINT = ">"
ANSWER_END = "|"  # in training text follows it; a generated answer is scored without it

# Texts that share a part with a needle or a question but are none.
DECOYS = ("|", "|{name}", "{name}=", "{name}={digits}", "={digits}|", "{name}>", ">{name}|", "{name}?")

NAMES = tuple("".join(letters) for letters in product(ascii_lowercase, repeat=2))
NUM_VALUES = 10**5
# A name where a needle or a question of it would begin. In `|ab=1|cd?` the second `|` counts for both names.
_NAME_USE = re.compile(rb"\|([a-z]{2})[=>?]")


class Hidden(NamedTuple):
    """Something hidden in a text, what asks for it, and what is then to be said."""

    needles: tuple[str, ...]
    question: str
    answer: str


def fact(key: str, value: int) -> Hidden:
    """One needle that gives `key` a value of five digits."""
    digits = f"{value:05d}"
    return Hidden((FACT.format(key=key, value=digits),), FACT_QUESTION.format(key=key), digits)


def chain(names: tuple[str, ...]) -> Hidden:
    """Links from each name to the next; the answer is every name after the first."""
    links = tuple(LINK.format(key=key, target=target) for key, target in pairwise(names))
    return Hidden(links, CHAIN_QUESTION.format(key=names[0]), CHAIN_JOINT.join(names[1:]))


def name_uses(text: bytes) -> Counter[str]:
    """How often each name stands in `text` where a needle or a question of it would begin."""
    return Counter(name.decode() for name in _NAME_USE.findall(text))


def only_uses(text: bytes, pieces: Iterable[str]) -> bool:
    """Whether the names that begin `pieces` begin nothing else in `text`, which holds all pieces."""
    expected = name_uses("\n".join(pieces).encode())
    found = name_uses(text)
    return all(found[name] == count for name, count in expected.items())


class NamePool:
    """Names in random order, each given once.

    Args:
        rng: source of the order.
        taken: names not to be given.
    """

    def __init__(self, rng: np.random.Generator, taken: Iterable[str]) -> None:
        excluded = set(taken)
        order: Iterator[str] = (NAMES[index] for index in rng.permutation(len(NAMES)))
        self._free = dict.fromkeys(name for name in order if name not in excluded)
        self._rng = rng

    def __len__(self) -> int:
        return len(self._free)

    def draw(self) -> str:
        """A free name.

        Raises:
            DRTError: none is left.
        """
        if not self._free:
            raise DRTError(
                f"no name left: all {len(NAMES)} are in use by needles or occur in the haystack's window"
            )
        name = next(iter(self._free))
        del self._free[name]
        return name

    def draw_like(self, name: str) -> str:
        """A free name with one letter of `name` in the same place; any free name if there is none.

        Raises:
            DRTError: no name is left.
        """
        place = int(self._rng.integers(2))
        for letter in self._rng.permutation(len(ascii_lowercase)):
            changed = ascii_lowercase[letter]
            similar = changed + name[1] if place else name[0] + changed
            if similar in self._free:
                del self._free[similar]
                return similar
        return self.draw()
