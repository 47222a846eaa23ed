"""The training mix: real text full of needles, with questions about them in many places.

One question at the end of a row teaches next to nothing for a long time; a question in most chunks does. So a row of
the mix is what an evaluation is, only denser: needles are hidden anywhere in it, every question asks for something
hidden earlier in the row, and its answer follows at once.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drt.data.formats import (
    ANSWER_END,
    DECOYS,
    NUM_VALUES,
    Hidden,
    NamePool,
    chain,
    fact,
    name_uses,
    only_uses,
)
from drt.data.haystack import Haystack
from drt.data.lookalikes import LookAlikes
from drt.data.tokens import TextCodec, TokenIds, Tokenizer
from drt.errors import DRTError

_STREAM = zlib.crc32(b"needle mix")  # keeps the batches apart from evaluation samples of the same seed
_FILL = 0.7  # largest share of a row that is not text
_SPARSEST = 1 / 16  # questions of the sparsest rows, as a share of a dense row's
_ATTEMPTS = 20
_BEFORE = 3  # tokens before a decoy that it may complete: `|ab`, where `=` makes a needle begin

_TEXT, _OTHER, _ANSWER, _CHAIN_ANSWER = range(4)  # what a token belongs to


@dataclass(frozen=True, kw_only=True)
class NeedleMixConfig:
    """What a batch is made of; stages of a curriculum differ in these.

    Args:
        rows: rows of a batch.
        row_length: tokens of a row.
        chunk_size: tokens of the model's full chunk.
        question_rate: questions of a dense row for every chunk_size + 1 tokens.
        dense_share: share of the rows that are dense; the others have 1 to 1/16 as many questions, at least one.
        needles_per_question: things hidden for each question. With fewer than one, each is asked for several times,
            and the fewer there are, the sooner a fresh model learns to read; above one, the rest is never asked for.
        spare_needles: up to so many more are hidden and never asked for.
        chain_share: share of the hidden things that are chains of links, not facts.
        min_hops, max_hops: links of a chain; each number is equally likely.
        min_distance: a question comes at least so many tokens after what it asks for, so that with more than the
            attention window the answer must be retrieved. Where nothing lies so far back, no question is asked.
        hard_name_rate: share of the names that have a letter in common with another one of the row.
        decoy_rate: pieces of text that look like a part of a needle, for each needle.
        lookalike_rate: pieces of the real texts that are most like a needle of the row, for each needle.
        border_rate: share of the needles that are moved on, so that the end of a full chunk cuts them. An answer in
            two chunks must be read from both; left to chance, the rarest cuts are what a model gets wrong.
        text_positions: tokens of ordinary text in `text_mask`, over the whole batch.

    Raises:
        ValueError: a value that does not fit.
    """

    rows: int
    row_length: int
    chunk_size: int
    question_rate: float = 0.7
    dense_share: float = 0.75
    needles_per_question: float = 1.25
    spare_needles: int = 4
    chain_share: float = 0.0
    min_hops: int = 2
    max_hops: int = 2
    min_distance: int = 0
    hard_name_rate: float = 0.25
    decoy_rate: float = 0.1
    lookalike_rate: float = 0.0
    border_rate: float = 0.0
    text_positions: int = 128

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("row_length", 64), ("chunk_size", 1), ("spare_needles", 0)):
            _require(
                getattr(self, name) >= least, f"{name}: expected at least {least}, got {getattr(self, name)}"
            )
        for name in ("dense_share", "chain_share", "hard_name_rate", "decoy_rate", "border_rate"):
            _require(0 <= getattr(self, name) <= 1, f"{name}: expected 0..1, got {getattr(self, name)}")
        _require(self.lookalike_rate >= 0, f"lookalike_rate: expected at least 0, got {self.lookalike_rate}")
        for name in ("question_rate", "needles_per_question"):
            _require(
                getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}"
            )
        _require(
            1 <= self.min_hops <= self.max_hops,
            f"min_hops, max_hops: expected 1 <= min_hops <= max_hops, got {self.min_hops}, {self.max_hops}",
        )
        for name in ("min_distance", "text_positions"):
            _require(getattr(self, name) >= 0, f"{name}: expected at least 0, got {getattr(self, name)}")


class MixBatch(NamedTuple):
    """A batch of rows; every array is (rows, row_length).

    Attributes:
        input_ids: int64 token ids.
        answer_mask: bool, the tokens of answers.
        chain_mask: bool, the tokens of the answers that name a chain.
        text_mask: bool, random tokens of ordinary text, none at the start of a row; `text_positions` of them, or as
            many as there are.
        chunk_ends: bool, the last token of each question: the chunk closes there, as it does at the end of a prompt.
    """

    input_ids: NDArray[np.int64]
    answer_mask: NDArray[np.bool_]
    chain_mask: NDArray[np.bool_]
    text_mask: NDArray[np.bool_]
    chunk_ends: NDArray[np.bool_]


class NeedleMix:
    """Makes batches; a batch depends on (step, stage, seed) and on nothing that was made before.

    Args:
        sources: texts that rows are cut from; each is tokenised whole, once.
        tokenizer: a Hugging Face tokenizer.
        weights: (len(sources),) how often a row comes from each source, in proportion; default: by its tokens.

    Raises:
        DRTError: no source, or weights that do not fit.
    """

    def __init__(
        self, sources: Sequence[Haystack], tokenizer: Tokenizer, weights: Sequence[float] | None = None
    ) -> None:
        _require(bool(sources), "expected at least one source of text, got none")
        self._codec = TextCodec(tokenizer)
        self._sources = [(source.names, _narrow(self._codec.encode(source.text))) for source in sources]
        shares = np.array([len(ids) for _, ids in self._sources] if weights is None else weights, np.float64)
        fits = shares.shape == (len(sources),) and bool((shares >= 0).all()) and shares.sum() > 0
        _require(fits, f"weights: expected one for each of {len(sources)} sources, not all 0, got {weights}")
        self._shares = shares / shares.sum()
        self._lookalikes = LookAlikes([source.text for source in sources])

    def batch(self, step: int, stage: NeedleMixConfig, seed: int) -> MixBatch:
        """The batch of a step.

        Args:
            step: number of the step, from 0.
            stage: what the batch is made of.
            seed: of the run.

        Raises:
            DRTError: a source is shorter than a row, or a row has no room for one question.
        """
        rng = np.random.default_rng([seed, _STREAM, step])
        rows = [self._row(stage, rng) for _ in range(stage.rows)]
        input_ids = np.stack([row.ids for row in rows]).astype(np.int64)
        kinds = np.stack([row.kinds for row in rows])
        chunk_ends = np.zeros(kinds.shape, np.bool_)
        for number, row in enumerate(rows):
            chunk_ends[number, row.question_ends] = True
        answer_mask = kinds >= _ANSWER
        text_mask = np.zeros(kinds.shape, np.bool_)
        positions = np.argwhere(kinds[:, 1:] == _TEXT)  # nothing predicts the first token of a row
        chosen = rng.permutation(len(positions))[: stage.text_positions]
        text_mask[positions[chosen, 0], positions[chosen, 1] + 1] = True
        return MixBatch(
            input_ids=input_ids,
            answer_mask=answer_mask,
            chain_mask=kinds == _CHAIN_ANSWER,
            text_mask=text_mask,
            chunk_ends=chunk_ends,
        )

    def _row(self, stage: NeedleMixConfig, rng: np.random.Generator) -> _Row:
        for _ in range(_ATTEMPTS):
            window = self._window(stage.row_length, rng)
            names = NamePool(rng, name_uses(self._codec.decode(window)))
            tasks, questions = _plan(stage, self._codec, names, rng)
            row = _lay_out(stage, self._codec, window, tasks, questions, self._lookalikes, rng)
            if only_uses(self._codec.decode(row.ids), row.pieces):
                return row
        raise DRTError(
            f"found no place for needles in {_ATTEMPTS} windows of the text: it completes them to others, "
            "or the tokenizer does not give back the text it is given"
        )

    def _window(self, length: int, rng: np.random.Generator) -> TokenIds:
        names, ids = self._sources[rng.choice(len(self._sources), p=self._shares)]
        if len(ids) < length:
            raise DRTError(
                f"a text of the mix ({', '.join(names) or 'unnamed'}) is too short: "
                f"expected {length} tokens, got {len(ids)}"
            )
        start = int(rng.integers(len(ids) - length + 1))
        return ids[start : start + length].astype(np.int32)


class _Row(NamedTuple):
    ids: TokenIds  # (row_length,)
    kinds: NDArray[np.int8]  # (row_length,)
    question_ends: list[int]
    pieces: list[str]  # every needle and question, to be checked against the finished text


class _Task(NamedTuple):
    """Something hidden, with its tokens."""

    hidden: Hidden
    names: tuple[str, ...]
    needles: list[TokenIds]
    question: TokenIds
    answer: TokenIds
    kind: int  # of the answer's tokens


def _plan(
    stage: NeedleMixConfig, codec: TextCodec, names: NamePool, rng: np.random.Generator
) -> tuple[list[_Task], int]:
    """What a row hides, and the number of its questions. Any of them may be asked: there is room for the dearest."""
    density = 1.0 if rng.random() < stage.dense_share else math.exp(rng.uniform(math.log(_SPARSEST), 0))
    wanted = max(1, round(density * stage.question_rate * stage.row_length / (stage.chunk_size + 1)))
    hidden = max(1, round(wanted * stage.needles_per_question)) + int(rng.integers(stage.spare_needles + 1))
    answer_end = len(codec.encode(ANSWER_END))
    tasks: list[_Task] = []
    used: list[str] = []
    questions = telling = asking = (
        0  # number of questions, tokens of all needles, tokens of the dearest question
    )
    for value in rng.choice(NUM_VALUES, size=hidden, replace=False).tolist():
        task = _make_task(stage, codec, names, used, value, rng)
        if task is None:
            break
        telling += sum(map(len, task.needles))
        asking = max(asking, len(task.question) + len(task.answer) + answer_end)
        ask = wanted if stage.needles_per_question < 1 else min(len(tasks) + 1, wanted)
        ask = min(ask, int((_FILL * stage.row_length - telling) / asking))
        if ask < max(questions, 1):
            break
        tasks.append(task)
        questions = ask
    if not tasks:
        raise DRTError(
            f"row_length {stage.row_length} leaves no room or no name for a question and what it asks for"
        )
    return tasks, questions


def _make_task(
    stage: NeedleMixConfig,
    codec: TextCodec,
    names: NamePool,
    used: list[str],
    value: int,
    rng: np.random.Generator,
) -> _Task | None:
    """A fact or a chain with names that are not `used` yet; None when too few are left."""
    is_chain = rng.random() < stage.chain_share
    count = 1 + (int(rng.integers(stage.min_hops, stage.max_hops + 1)) if is_chain else 0)
    if len(names) < count:
        return None
    drawn = []
    for _ in range(count):
        is_hard = used and rng.random() < stage.hard_name_rate
        drawn.append(names.draw_like(used[int(rng.integers(len(used)))]) if is_hard else names.draw())
        used.append(drawn[-1])
    hidden = chain(tuple(drawn)) if is_chain else fact(drawn[0], value)
    return _Task(
        hidden=hidden,
        names=tuple(drawn),
        needles=[codec.encode(needle) for needle in hidden.needles],
        question=codec.encode(hidden.question),
        answer=codec.encode_continuation(hidden.question, hidden.answer),
        kind=_CHAIN_ANSWER if is_chain else _ANSWER,
    )


def _lay_out(
    stage: NeedleMixConfig,
    codec: TextCodec,
    window: TokenIds,
    tasks: list[_Task],
    questions: int,
    lookalikes: LookAlikes,
    rng: np.random.Generator,
) -> _Row:
    """Spread needles, decoys and questions over the text.

    Questions come at even intervals with jitter. Each has a task hidden before it, at a place that is uniform over
    what lies before; so there is something to ask at each of them, though which of the waiting tasks it asks for is
    drawn anew. An event is (place in 0..1, its needle or None for a question, number of the needle's task).
    """
    asked = (np.arange(questions) + rng.random(questions)) / questions
    events: list[tuple[float, TokenIds | None, int]] = [(float(place), None, -1) for place in asked]
    for number, task in enumerate(tasks):
        latest = asked[number] if number < questions else 1.0
        events += [(float(latest * rng.random()), needle, number) for needle in task.needles]
    dearest = max(len(task.question) + len(task.answer) for task in tasks) + len(codec.encode(ANSWER_END))
    room = len(window) - questions * dearest - sum(len(needle) for task in tasks for needle in task.needles)
    for decoy in _decoys(stage, codec, tasks, lookalikes, rng):
        if len(decoy) > room // 2:  # leave some text in the shortest rows
            break
        events.append((rng.random(), decoy, -1))
        room -= len(decoy)
    events.sort(key=lambda event: event[0])

    writer = _RowWriter(window, codec, stage, room)
    for place, needle, number in events:
        writer.write_text(int(place * (room + 1)))
        if needle is not None and number >= 0 and rng.random() < stage.border_rate:
            writer.move_to_border(len(needle), rng)
        if needle is None:
            writer.ask(rng)
        elif number < 0:
            writer.write_decoy(needle)
        else:
            writer.write_needle(needle, tasks[number])
    return writer.finish([needle for task in tasks for needle in task.hidden.needles])


def _decoys(
    stage: NeedleMixConfig,
    codec: TextCodec,
    tasks: list[_Task],
    lookalikes: LookAlikes,
    rng: np.random.Generator,
) -> list[TokenIds]:
    """Texts that look like a part of a needle, most with a name of the row."""
    names = [name for task in tasks for name in task.names]
    needles = sum(len(task.needles) for task in tasks)
    count = int(rng.binomial(needles, stage.decoy_rate))
    texts = [
        DECOYS[int(rng.integers(len(DECOYS)))].format(
            name=names[int(rng.integers(len(names)))], digits=f"{int(rng.integers(NUM_VALUES)):05d}"
        )
        for _ in range(count)
    ]
    for _ in range(int(rng.poisson(stage.lookalike_rate * needles))):
        texts.append(lookalikes.draw(names[int(rng.integers(len(names)))], rng))
    return [codec.encode(text) for text in texts]


class _RowWriter:
    """Writes a row from left to right.

    Args:
        window: (row_length,) text that the row is filled with.
        codec: of its tokens.
        stage: what the batch is made of. With fewer needles than questions, what was asked for waits to be asked for
            again, as far from its answer as from its needle.
        room: tokens of text that the row has place for.
    """

    def __init__(self, window: TokenIds, codec: TextCodec, stage: NeedleMixConfig, room: int) -> None:
        self._window = window
        self._codec = codec
        self._answer_end = codec.encode(ANSWER_END)
        self._min_distance = stage.min_distance
        self._ask_again = stage.needles_per_question < 1
        self._chunk_size = stage.chunk_size
        self._room = room
        self._parts: list[TokenIds] = []
        self._kinds: list[int] = []
        self._copied = 0  # tokens of the window
        self._length = 0
        self._written: Counter[str] = Counter()  # question of a task -> needles of it so far
        self._waiting: list[tuple[int, _Task]] = []  # where its last needle ends, and the task
        self._question_ends: list[int] = []
        self._questions: list[str] = []

    def write(self, ids: TokenIds, kind: int) -> None:
        """Append tokens."""
        if len(ids) == 0:
            return
        self._parts.append(ids)
        self._kinds.append(kind)
        self._length += len(ids)

    def write_text(self, until: int) -> None:
        """Append the window's tokens up to `until`, where they are not written yet."""
        self.write(self._window[self._copied : until], _TEXT)
        self._copied = max(self._copied, until)

    def move_to_border(self, size: int, rng: np.random.Generator) -> None:
        """Append so much text that a needle of `size` tokens will begin in one full chunk and end in the next."""
        chunk_start = self._question_ends[-1] + 1 if self._question_ends else 0
        offset = (self._length - chunk_start) % self._chunk_size
        wanted = self._chunk_size - int(rng.integers(1, max(size, 2)))
        text = (wanted - offset) % self._chunk_size
        if self._copied + text <= self._room:
            self.write_text(self._copied + text)

    def write_decoy(self, decoy: TokenIds) -> None:
        """Append a piece that is no needle, unless what stands before it makes it one. (What follows may: rarely.)"""
        before = np.concatenate([decoy[:0], *self._parts[-_BEFORE:]])[-_BEFORE:]
        joined = np.concatenate([before, decoy])
        *apart, together = (name_uses(self._codec.decode(ids)).total() for ids in (before, decoy, joined))
        if together == sum(apart):
            self.write(decoy, _OTHER)

    def write_needle(self, needle: TokenIds, task: _Task) -> None:
        """Append a needle; after the last one of its task the task may be asked for."""
        self.write(needle, _OTHER)
        key = task.hidden.question
        self._written[key] += 1
        if self._written[key] == len(task.needles):
            self._waiting.append((self._length, task))

    def ask(self, rng: np.random.Generator) -> None:
        """Append a question about a random waiting task that lies far enough back, if there is one."""
        count = sum(end + self._min_distance <= self._length for end, _ in self._waiting)
        if count == 0:
            return
        _, task = self._waiting.pop(int(rng.integers(count)))  # the first `count` lie farthest back
        self.write(task.question, _OTHER)
        self._question_ends.append(self._length - 1)
        self._questions.append(task.hidden.question)
        self.write(task.answer, task.kind)
        self.write(self._answer_end, _OTHER)
        if self._ask_again:
            self._waiting.append((self._length, task))

    def finish(self, needles: list[str]) -> _Row:
        """Fill the row with text."""
        self.write_text(self._copied + len(self._window) - self._length)
        kinds = np.repeat(np.array(self._kinds, np.int8), [len(part) for part in self._parts])
        return _Row(np.concatenate(self._parts), kinds, self._question_ends, needles + self._questions)


def _narrow(ids: TokenIds) -> NDArray[np.uint16] | TokenIds:
    """The same ids in half the memory where they fit."""
    return ids.astype(np.uint16) if len(ids) and int(ids.max()) < 2**16 else ids


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DRTError(message)
