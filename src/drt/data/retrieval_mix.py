"""Rows of real text that teach a language model to use its memory.

Between pieces of books stand invented facts, passages of question sets, and questions: about a fact, about a passage,
or a few words quoted from earlier in the row, to be continued word for word. A question comes at least `min_distance`
tokens after what answers it, so that with more than the attention window the answer must be retrieved. The mix knows
where each answer stands, which can guide the retrieval scores in training.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from drt.data.facts import FactMaker, answer_after, harvest_words, question_prompt
from drt.data.questions import Passage
from drt.data.tokens import TextCodec, TokenIds
from drt.errors import DRTError

KINDS = ("text", "fact", "list", "chain", "missing", "quote", "question")  # of a scored token
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_STREAM = zlib.crc32(b"retrieval mix")
_WORDS_FROM = 1_000_000  # tokens of text that keys and values are made from
_LEAST_WORDS = 20
_MOST_TARGETS = 4  # chunks that the answer of a question may be guided to


@dataclass(frozen=True, kw_only=True)
class RetrievalMixConfig:
    """What a row is made of.

    Args:
        row_length: tokens of a row.
        min_distance: a question comes at least so many tokens after what answers it.
        density: share of a row that is facts, passages and questions; the rest is text.
        facts, lists, chains, missing, quotes, questions: how often each kind is drawn, in proportion. A list asks for
            several values, a chain for all names of a value, missing for what is not in the row.
        plain_share: share of the rows that are text alone.
        text_share: share of the text tokens that are scored.
        plain_text_share: the same in rows of text alone.
    """

    row_length: int
    min_distance: int
    density: float = 0.5
    facts: float = 1.0
    lists: float = 0.0
    chains: float = 0.0
    missing: float = 0.0
    quotes: float = 0.0
    questions: float = 0.0
    plain_share: float = 0.0
    text_share: float = 0.15
    plain_text_share: float = 0.5

    def __post_init__(self) -> None:
        if self.row_length < 256:
            raise ValueError(f"row_length: expected at least 256, got {self.row_length}")
        if not 0 <= self.min_distance < self.row_length:
            raise ValueError(f"min_distance: expected 0 to row_length - 1, got {self.min_distance}")
        for name in ("density", "plain_share", "text_share", "plain_text_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        if min(self.weights()) < 0 or sum(self.weights()) <= 0:
            raise ValueError(
                "facts, lists, ..., questions: expected numbers of at least 0, one of them positive"
            )

    def weights(self) -> tuple[float, ...]:
        """How often each kind but text is drawn, in the order of `KINDS`."""
        return (self.facts, self.lists, self.chains, self.missing, self.quotes, self.questions)


class RetrievalBatch(NamedTuple):
    """Rows B of L tokens.

    Attributes:
        input_ids: (B, L) int64.
        chunk_ends: (B, L) bool, the last token of each question: its chunk closes there.
        kept: (B, n) int64, columns whose next token is scored, ascending; padded with the last column.
        labels: (B, n) int64, the token after each of them; -100 at padding.
        kinds: (B, n) int8, what each label belongs to, an index into `KINDS`.
        answers: (B, n) int32, number of the answer in its row that a label belongs to; -1 for text.
        targets: (m, 3) int64: row, column of a question's last token, column of a token that answers it.
    """

    input_ids: NDArray[np.int64]
    chunk_ends: NDArray[np.bool_]
    kept: NDArray[np.int64]
    labels: NDArray[np.int64]
    kinds: NDArray[np.int8]
    answers: NDArray[np.int32]
    targets: NDArray[np.int64]


class TokenStream(Protocol):
    """What is needed of a `drt.data.corpus.Corpus`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        ...

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """(stop - start,) tokens of the stream of all documents."""
        ...


class RetrievalMix:
    """Makes batches; a batch depends on its number, the seed and the settings alone.

    Args:
        corpus: rows are cut from the stream of its documents, and keys and values of facts take their words from it.
        passages: with questions; those whose answer does not stand in them are left out.
        codec: of the tokens.
        answer_end: the token that ends an answer.

    Raises:
        DRTError: too little text, or no question whose answer stands in its passage where passages are given.
    """

    def __init__(
        self, corpus: TokenStream, passages: Sequence[Passage], codec: TextCodec, answer_end: int
    ) -> None:
        self._corpus, self._codec, self._answer_end = corpus, codec, answer_end
        sample = codec.decode(corpus.tokens(0, min(corpus.num_tokens, _WORDS_FROM))).decode("utf-8", "ignore")
        words, names = harvest_words(sample)
        if min(len(words), len(names)) < _LEAST_WORDS:
            raise DRTError(
                f"the mix takes keys and values of facts from the corpus: expected {_LEAST_WORDS} words and as many "
                f"names in its first tokens, got {len(words)} and {len(names)}; give it more text"
            )
        self._facts = FactMaker(words, names)
        self._passages = [kept for kept in (_with_answers(passage) for passage in passages) if kept.questions]
        if passages and not self._passages:
            raise DRTError("expected questions whose answers stand in their passages, got none")

    def batch(self, number: int, rows: int, config: RetrievalMixConfig, seed: int) -> RetrievalBatch:
        """Batch ``number`` of ``rows`` rows."""
        rng = np.random.default_rng([seed, _STREAM, number])
        made = [self._row(config, rng) for _ in range(rows)]
        return _stack(made, config.row_length)

    def _row(self, config: RetrievalMixConfig, rng: np.random.Generator) -> _Row:
        window = self._window(config.row_length, rng)
        row = _Row(window, self._codec, config)
        if rng.random() >= config.plain_share:
            self._fill(row, config, rng)
        row.write_text(config.row_length)
        row.score_text(config.text_share if row.answers else config.plain_text_share, rng)
        return row

    def _fill(self, row: _Row, config: RetrievalMixConfig, rng: np.random.Generator) -> None:
        """Plan what stands where, then write it from left to right."""
        latest = 1 - config.min_distance / config.row_length
        events: list[_Event] = []
        budget = int(config.density * config.row_length)
        weights = np.array(config.weights()) / sum(config.weights())
        while budget > 0:
            kind = KINDS[1 + int(rng.choice(len(weights), p=weights))]
            planned = self._plan(kind, latest, config, rng)
            budget -= max(sum(len(event.ids) + len(event.answer) for event in planned), 32)
            events += planned
        events.sort(key=lambda event: event.place)
        text = config.row_length - sum(len(event.ids) + len(event.answer) for event in events)
        for event in events:
            row.write_text(int(event.place * max(text, 0)) + row.inserted)
            row.write(event, self._answer_end, rng)

    def _plan(
        self, kind: str, latest: float, config: RetrievalMixConfig, rng: np.random.Generator
    ) -> list[_Event]:
        if kind == "quote":
            return [_Event(place=1 - latest + latest * rng.random(), kind=kind)]
        if kind == "question":
            return self._plan_passage(latest, config, rng)
        makers = {
            "fact": self._facts.fact,
            "chain": self._facts.chain,
            "missing": self._facts.missing,
            "list": self._facts.several_values if rng.random() < 0.5 else self._facts.several_keys,
        }
        fact = makers[kind](rng)
        ask = self._asking(fact.kind, fact.prompt, fact.answer, rng)
        plants = [
            self._plant(statement, value, ask.key)
            for statement, value in zip(fact.statements, fact.values, strict=True)
        ]
        places = np.sort(rng.random(len(plants))) * latest * rng.random() ** 0.5
        for plant, place in zip(plants, places, strict=True):
            plant.place = float(place)
        ask.needs = len(plants)
        after = float(places[-1]) if len(places) else 0.0
        ask.place = after + (1 - after) * rng.random()
        return [*plants, ask]

    def _plant(self, statement: str, value: str, key: int) -> _Event:
        ids = self._codec.encode(f" {statement}")
        offset = len(self._codec.encode(f" {statement[: statement.rfind(value)]}"))
        return _Event(kind="plant", ids=ids, offsets=[min(offset, len(ids) - 1)], key=key)

    def _asking(self, kind: str, prompt: str, answer: str, rng: np.random.Generator) -> _Event:
        return _Event(
            kind=kind,
            ids=self._codec.encode(prompt),
            answer=self._codec.encode_continuation(prompt, answer),
            key=int(rng.integers(2**62)),
        )

    def _plan_passage(
        self, latest: float, config: RetrievalMixConfig, rng: np.random.Generator
    ) -> list[_Event]:
        if not self._passages:
            raise DRTError("the mix asks questions about passages, but no question file was given")
        passage = self._passages[int(rng.integers(len(self._passages)))]
        count = min(len(passage.questions), 1 + int(rng.integers(3)))
        chosen = [passage.questions[i] for i in rng.permutation(len(passage.questions))[:count].tolist()]
        place = latest * rng.random()
        ids = self._codec.encode(f"\n\n{passage.text}\n\n")
        if len(ids) > config.row_length // 3:
            return [_Event(place=1 - latest + latest * rng.random(), kind="quote")]
        events = []
        starts = []
        for question in chosen:
            start = len(self._codec.encode(f"\n\n{passage.text[: question.start]}"))
            prompt = question_prompt(question.question, rng)
            ask = self._asking("question", prompt, answer_after(prompt, question.answers[0]), rng)
            ask.needs = 1
            ask.place = place + (1 - place) * rng.random()
            starts.append((ask.key, min(start, len(ids) - 1)))
            events.append(ask)
        plant = _Event(kind="passage", place=place, ids=ids, keyed_offsets=starts)
        return [plant, *events]

    def _window(self, length: int, rng: np.random.Generator) -> TokenIds:
        if self._corpus.num_tokens < length:
            raise DRTError(
                f"row_length: expected at most the corpus' {self._corpus.num_tokens} tokens, got {length}"
            )
        start = int(rng.integers(self._corpus.num_tokens - length + 1))
        return self._corpus.tokens(start, start + length).astype(np.int32)


@dataclass(kw_only=True)
class _Event:
    """Something to write at a place (0 to 1) of a row.

    A plant has the offsets of its answer's tokens; a question has as many needs as plants that must stand before it.
    """

    place: float = 0.0
    kind: str
    ids: TokenIds = field(default_factory=lambda: np.empty(0, np.int32))
    answer: TokenIds = field(default_factory=lambda: np.empty(0, np.int32))
    key: int = -1
    needs: int = 0
    offsets: list[int] = field(default_factory=list)
    keyed_offsets: list[tuple[int, int]] = field(default_factory=list)


class _Row:
    """Writes a row from left to right.

    Args:
        window: (row_length,) text to fill it with.
        codec: of its tokens.
        config: what it is made of.
    """

    def __init__(self, window: TokenIds, codec: TextCodec, config: RetrievalMixConfig) -> None:
        self.config, self._window = config, window
        self.ids = np.zeros(config.row_length, np.int32)
        self.kinds = np.full(config.row_length, -1, np.int8)  # of each token that is scored
        self.numbers = np.full(config.row_length, -1, np.int32)  # of the answer it belongs to
        self.is_text = np.zeros(config.row_length, np.bool_)
        self.question_ends: list[int] = []
        self.targets: list[tuple[int, int]] = []
        self.length = self.inserted = self.answers = 0
        self._copied = 0
        self._found: dict[int, list[int]] = {}  # key -> columns of what answers it
        self._quote_open, self._quote_close = codec.encode('\n\nQuote: "'), codec.encode('"\n')

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.config.row_length - self.length

    def write_text(self, until: int) -> None:
        """Fill with the window's next tokens up to column ``until``."""
        count = min(until - self.length, self.room, len(self._window) - self._copied)
        if count > 0:
            self.is_text[self.length : self.length + count] = True
            self._put(self._window[self._copied : self._copied + count])
            self._copied += count

    def write(self, event: _Event, answer_end: int, rng: np.random.Generator) -> None:
        """Write an event if it fits and, for a question, if what answers it lies far enough back."""
        if event.kind == "quote":
            self._quote(rng)
        elif event.kind in ("plant", "passage"):
            if len(event.ids) <= self.room:
                for offset in event.offsets:
                    self._found.setdefault(event.key, []).append(self.length + offset)
                for key, offset in event.keyed_offsets:
                    self._found.setdefault(key, []).append(self.length + offset)
                self._insert(event.ids)
        else:
            columns = self._found.get(event.key, [])
            self._push_back(columns, len(event.ids) + len(event.answer) + 1)
            if len(columns) == event.needs and self._reaches(columns):
                self._ask(event.kind, event.ids, np.append(event.answer, np.int32(answer_end)), columns)

    def score_text(self, share: float, rng: np.random.Generator) -> None:
        """Choose the text tokens that are scored."""
        chosen = self.is_text & (rng.random(len(self.ids)) < share)
        chosen[0] = False  # nothing predicts the first token
        self.kinds[chosen] = _NUMBER["text"]

    def _push_back(self, columns: list[int], size: int) -> None:
        """Write text until what answers a question lies far enough back, where there is room for that."""
        if columns:
            until = max(columns) + self.config.min_distance
            if self.length < until <= self.config.row_length - size:
                self.write_text(until)

    def _reaches(self, columns: list[int]) -> bool:
        return not columns or max(columns) + self.config.min_distance <= self.length

    def _ask(self, kind: str, prompt: TokenIds, answer: TokenIds, columns: list[int]) -> None:
        if len(prompt) + len(answer) > self.room:
            return
        self._insert(prompt)
        self.question_ends.append(self.length - 1)
        chosen = columns if len(columns) <= _MOST_TARGETS else columns[:_MOST_TARGETS]
        self.targets += [(self.length - 1, column) for column in chosen]
        self.kinds[self.length : self.length + len(answer)] = _NUMBER[kind]
        self.numbers[self.length : self.length + len(answer)] = self.answers
        self.answers += 1
        self._insert(answer)

    def _quote(self, rng: np.random.Generator) -> None:
        """A few words from earlier in the row, and how they go on there."""
        cue, size = int(rng.integers(6, 17)), int(rng.integers(8, 25))
        latest = self.length - self.config.min_distance - cue - size
        if latest <= 0:
            return
        start = int(rng.integers(latest))
        middle = start + cue
        # The end of a quotation is written too, but not scored: where it ends is chance.
        prompt = np.concatenate([self._quote_open, self.ids[start:middle]])
        continuation = self.ids[middle : middle + size].copy()
        if len(prompt) + size + len(self._quote_close) <= self.room:
            self._ask("quote", prompt, continuation, [middle, middle + size - 1])
            self._insert(self._quote_close)

    def _insert(self, ids: TokenIds) -> None:
        self.inserted += len(ids)
        self._put(ids)

    def _put(self, ids: TokenIds) -> None:
        self.ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)


def _with_answers(passage: Passage) -> Passage:
    """The passage with the questions whose answers stand in it."""
    kept = tuple(question for question in passage.questions if question.answers and question.start >= 0)
    return Passage(passage.text, passage.title, kept)


def _stack(rows: list[_Row], length: int) -> RetrievalBatch:
    ends = np.zeros((len(rows), length), np.bool_)
    scored = [np.flatnonzero(row.kinds >= 0) for row in rows]
    width = max(1, max(map(len, scored)))
    kept = np.full((len(rows), width), length - 1, np.int64)
    labels = np.full((len(rows), width), -100, np.int64)
    kinds = np.zeros((len(rows), width), np.int8)
    answers = np.full((len(rows), width), -1, np.int32)
    for number, (row, columns) in enumerate(zip(rows, scored, strict=True)):
        count = len(columns)
        ends[number, row.question_ends] = True
        kept[number, :count] = columns - 1
        labels[number, :count] = row.ids[columns]
        kinds[number, :count] = row.kinds[columns]
        answers[number, :count] = row.numbers[columns]
    targets = [(number, ask, found) for number, row in enumerate(rows) for ask, found in row.targets]
    return RetrievalBatch(
        input_ids=np.stack([row.ids for row in rows]).astype(np.int64),
        chunk_ends=ends,
        kept=kept,
        labels=labels,
        kinds=kinds,
        answers=answers,
        targets=np.array(targets, np.int64).reshape(-1, 3),
    )
