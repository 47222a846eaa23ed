"""Needle tasks: something is hidden in a long text, and a question at its end asks for it.

`single` hides one fact; `multikey` hides several and asks for one; `multihop` hides chains of links, one of which must
be followed to its end. All three work over any tokenizer and any text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drt.data.formats import NUM_VALUES, Hidden, NamePool, chain, fact, name_uses, only_uses
from drt.data.haystack import Haystack, load_haystack
from drt.data.tokens import TextCodec, TokenIds, Tokenizer
from drt.errors import DRTError

__all__ = [
    "TASKS",
    "Haystack",
    "NeedleSample",
    "is_correct",
    "load_haystack",
    "make_sample",
    "parse_length",
]

TASKS = ("single", "multikey", "multihop")
_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_ATTEMPTS = 20  # a text that happens to complete a needle is met once in many thousands of samples
Span = tuple[int, int]


@dataclass(frozen=True)
class NeedleSample:
    """A prompt that ends with a question, and what is to be answered.

    Args:
        task: one of `TASKS`.
        length: tokens of the prompt, question included.
        depth: where the asked needle (of a chain: its first link) was wanted; 0 = at the start of the prompt,
            1 = directly before the question.
        input_ids: (length,) int32.
        question: text of the question.
        expected: text of the answer.
        answer_ids: (n,) int32, the answer's tokens.
        asked_spans: [start, end) token positions of the needles that the answer needs, a chain's in its order.
        needle_spans: the same of every needle, in the order of the text.
    """

    task: str
    length: int
    depth: float
    input_ids: TokenIds
    question: str
    expected: str
    answer_ids: TokenIds
    asked_spans: tuple[Span, ...]
    needle_spans: tuple[Span, ...]


def make_sample(
    task: str,
    tokenizer: Tokenizer,
    haystack: Haystack | str | bytes,
    length: int,
    depth: float,
    seed: int,
    index: int,
    *,
    needles: int = 6,
    hops: int = 2,
    chains: int = 2,
) -> NeedleSample:
    """Hide needles in a random window of a text and ask for one of them (or one chain) at its end.

    What is hidden follows from (seed, task, length, index) alone, whatever else is made. Names are distinct within a
    sample, and none begins anything else in its text that looks like a needle or a question. Needles fall anywhere;
    one that would break another is moved to the nearer end of that one (at most half a needle).

    Args:
        task: one of `TASKS`.
        tokenizer: a Hugging Face tokenizer.
        haystack: a text with at least `length` tokens, UTF-8 if bytes.
        length: tokens of the prompt.
        depth: 0..1, where the asked needle lies; see `NeedleSample`.
        seed: not negative.
        index: number of the sample, not negative.
        needles: facts in a `multikey` text.
        hops: links of each chain in a `multihop` text.
        chains: chains in a `multihop` text.

    Raises:
        DRTError: an unknown task, a depth outside 0..1, a negative seed or index, a count < 1, a length without room
            for the needles and the question, a text that is too short or that leaves too few names.
    """
    _check(task, depth, {"needles": needles, "hops": hops, "chains": chains}, {"seed": seed, "index": index})
    if not isinstance(haystack, Haystack):
        haystack = Haystack(haystack.encode() if isinstance(haystack, str) else haystack)
    codec = TextCodec(tokenizer)
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, index])
    for _ in range(_ATTEMPTS):
        # A window as long as the prompt holds at least the text that is left beside the needles: names can be drawn
        # before it is known how many tokens they make.
        window, text = haystack.window(codec, length, rng)
        hidden = _hide(task, NamePool(rng, name_uses(text)), rng, needles, hops, chains)
        sample = _lay_out(task, codec, window, hidden, depth, rng)
        pieces = [needle for one in hidden for needle in one.needles]
        if only_uses(codec.decode(sample.input_ids), [*pieces, sample.question]):
            return sample
    raise DRTError(
        f"found no place for {task} needles in {_ATTEMPTS} windows of the haystack: its text completes them to others, "
        "or the tokenizer does not give back the text it is given"
    )


def is_correct(sample: NeedleSample, generated_ids: Sequence[int] | NDArray[np.integer]) -> bool:
    """Whether every token of the answer was generated; what follows the answer does not count.

    Args:
        sample: what was asked.
        generated_ids: (n,) generated tokens, without the prompt.
    """
    generated = np.asarray(generated_ids)[: len(sample.answer_ids)]
    return np.array_equal(generated, sample.answer_ids)


def parse_length(text: str) -> int:
    """Tokens of a length such as `4096`, `64K` (K = 1024) or `1M` (M = 1024^2).

    Raises:
        DRTError: anything else.
    """
    match = re.fullmatch(r"0*([1-9][0-9]{0,14})([KM]?)", text.strip())
    if match is None:
        raise DRTError(f"expected a length such as 4096, 64K or 1M, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def _check(task: str, depth: float, counts: dict[str, int], numbers: dict[str, int]) -> None:
    if task not in TASKS:
        raise DRTError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise DRTError(f"depth: expected 0..1, got {depth}")
    for name, value in counts.items():
        if value < 1:
            raise DRTError(f"{name}: expected at least 1, got {value}")
    for name, value in numbers.items():
        if value < 0:
            raise DRTError(f"{name}: expected a number that is not negative, got {value}")


def _hide(
    task: str, names: NamePool, rng: np.random.Generator, needles: int, hops: int, chains: int
) -> list[Hidden]:
    """What is hidden, the asked one first."""
    if task == "multihop":
        return [chain(tuple(names.draw() for _ in range(hops + 1))) for _ in range(chains)]
    count = 1 if task == "single" else needles
    values = rng.choice(NUM_VALUES, size=count, replace=False)
    return [fact(names.draw(), int(value)) for value in values]


def _lay_out(
    task: str,
    codec: TextCodec,
    window: TokenIds,
    hidden: list[Hidden],
    depth: float,
    rng: np.random.Generator,
) -> NeedleSample:
    """Insert the needles into as much of the window as the prompt has room for; the question comes last."""
    length, asked = len(window), hidden[0]
    pieces = [codec.encode(needle) for one in hidden for needle in one.needles]
    question = codec.encode(asked.question)
    room = length - len(question) - sum(map(len, pieces))
    if room < 0:
        raise DRTError(f"length {length} is too short for {task}: expected at least {length - room} tokens")
    gaps = _place(pieces, room, round(depth * (length - len(question) - len(pieces[0]))), rng)

    parts: list[TokenIds] = []
    spans: dict[int, Span] = {}
    copied = written = 0
    for number, gap in gaps:
        parts += [window[copied:gap], pieces[number]]
        start = written + gap - copied
        copied, written = gap, start + len(pieces[number])
        spans[number] = (start, written)
    return NeedleSample(
        task=task,
        length=length,
        depth=depth,
        input_ids=np.concatenate([*parts, window[copied:room], question]),
        question=asked.question,
        expected=asked.answer,
        answer_ids=codec.encode_continuation(asked.question, asked.answer),
        asked_spans=tuple(spans[number] for number in range(len(asked.needles))),
        needle_spans=tuple(spans.values()),
    )


def _place(pieces: list[TokenIds], room: int, wanted: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(number of the piece, tokens of text before it), in order; piece 0 begins as near to `wanted` as it can."""
    others = rng.integers(0, room + 1, size=len(pieces) - 1)
    order = [(int(number) + 1, int(others[number])) for number in np.argsort(others, kind="stable")]
    before = position = lowest = 0  # tokens of needles, number of needles and least gap before piece 0
    for number, gap in order:
        if before + gap + len(pieces[number]) / 2 > wanted:
            break
        before, position, lowest = before + len(pieces[number]), position + 1, gap
    highest = order[position][1] if position < len(order) else room
    order.insert(position, (0, min(max(wanted - before, lowest), highest)))
    return order
