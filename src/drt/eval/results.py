"""The records that evaluations yield, one a sample, and their file: JSON lines of any mix of them."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from drt.errors import DRTError
from drt.files import open_regular, read_bytes


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What every record says, whatever was evaluated.

    Attributes:
        task: what was evaluated, such as `single` (a needle task), `perplexity` or `summarization`.
        checkpoint: name or folder of the model.
        device: such as `cpu` or `cuda:0`.
        dtype: of the model's weights, such as `float32`.
    """

    task: str
    checkpoint: str
    device: str
    dtype: str

    def check(self) -> None:
        """Make sure that values which came from a file can stand together.

        Raises:
            ValueError: they cannot.
        """


@dataclass(frozen=True, kw_only=True)
class NeedleRecord(EvaluationRecord):
    """One needle question: what was asked, what came back, and what it cost.

    Attributes:
        length: tokens of the prompt, the question included.
        depth: where in the text the answer lies, 0 (start) to 1 (end).
        index: number of the sample among those of its task and length, from 0.
        seed: of the whole evaluation.
        expected: the right answer, decoded.
        generated: as many tokens as the answer has, generated without help, decoded.
        correct: whether every token of the answer is right.
        tokens_per_second: reading speed; in a batch the tokens of all its rows count.
        prefill_seconds: time to read this sample; for a sample of a batch its share, the batch's time / its rows.
        decode_seconds_per_token: time of one step of generation, which gives every row of a batch one token.
        peak_rss_bytes: largest resident memory of the process since it began.
        peak_device_bytes: largest memory in use on the GPU while this sample was answered; None on a CPU.
        batch_size: samples that were read together.
        haystack: names of the texts that the sample was cut from.
        settings: what else defines the task, such as `{"needles": 6}`.
        memory_dtype: how keys and values of chunks were held; None: as the model computes them.
    """

    length: int
    depth: float
    index: int
    seed: int
    expected: str
    generated: str
    correct: bool
    tokens_per_second: float
    prefill_seconds: float
    decode_seconds_per_token: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    batch_size: int
    haystack: list[str]
    settings: dict[str, int]
    memory_dtype: str | None = None

    def check(self) -> None:
        """A text has a length, a needle lies in it, and reading takes time."""
        if not (self.length > 0 and 0 <= self.depth <= 1 and self.prefill_seconds > 0):
            raise ValueError(
                f"expected length > 0, depth in 0..1 and prefill_seconds > 0, "
                f"got {self.length}, {self.depth}, {self.prefill_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class PerplexityRecord(EvaluationRecord):
    """One document: how well every token of it was predicted from all that stands before it.

    The buckets cut the document by position: bucket i holds the tokens at positions `positions[i - 1]` (0 for the
    first) to `positions[i]`, exclusive, position 0 being the document's first token, which nothing predicts.

    Attributes:
        data: the corpus or file.
        document: name of the document.
        index: its number in the data, from 0.
        length: tokens read of it.
        positions: end of each bucket; the last is at least `length`.
        tokens: tokens predicted in each bucket.
        bytes: UTF-8 bytes of those tokens.
        losses: sum of their negative log-likelihoods in each bucket, in nats.
        seconds: time to read this document; of a batch its share, by tokens.
        peak_rss_bytes: largest resident memory of the process since it began.
        peak_device_bytes: largest memory in use on the GPU while it was read; None on a CPU.
        batch_size: documents that were read together.
    """

    data: str
    document: str
    index: int
    length: int
    positions: list[int]
    tokens: list[int]
    bytes: list[int]
    losses: list[float]
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    batch_size: int

    def check(self) -> None:
        """Buckets are as many as their ends, which ascend up to the length, and hold tokens."""
        counts = {len(values) for values in (self.positions, self.tokens, self.bytes, self.losses)}
        ascending = all(first < second for first, second in pairwise([0, *self.positions]))
        if counts != {len(self.positions) or None} or not ascending or self.positions[-1] < self.length:
            raise ValueError(
                "expected buckets that end at ascending positions, the last at the length or beyond"
            )
        if not sum(self.tokens):
            raise ValueError("tokens: expected at least one that was predicted, got none")


@dataclass(frozen=True, kw_only=True)
class AnswerRecord(EvaluationRecord):
    """One question of a benchmark that scores generated text, and its scores.

    Attributes:
        data: the benchmark's data: a file, or the name of what generates it.
        index: number of the question, from 0.
        length: tokens of the prompt; of a generated benchmark such as RULER the length that was asked for.
        expected: the right answers.
        generated: what the model said.
        scores: name of a measure -> 0..1.
    """

    data: str
    index: int
    length: int
    expected: list[str]
    generated: str
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class HarnessRecord(EvaluationRecord):
    """One number that lm-eval gives for one of its tasks, or for a group of them.

    Attributes:
        measure: such as `acc`, with the name of the answers' filter where there is one.
        value: in the measure's own unit.
        standard_error: of the value; None where lm-eval gives none.
        shots: examples before each question; None for a group.
        questions: that were asked; None for a group.
        version: the task's.
    """

    measure: str
    value: float
    standard_error: float | None
    shots: int | None
    questions: int | None
    version: str


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(EvaluationRecord):
    """How a checkpoint came to be; its task is `training`, its device the one that it was trained on.

    Attributes:
        architecture: the configuration's model type, such as `drt`.
        parameters: number of the model's parameters, tied ones counted once.
        seed: of the training run.
        steps: optimizer steps.
        training_tokens: tokens that the steps had room for, the most that was read.
        seconds: wall time of the training.
    """

    architecture: str
    parameters: int
    seed: int
    steps: int
    training_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RetrievalRecord(EvaluationRecord):
    """One chunk that one group retrieved, for the tokens that follow the end of a prompt or of a generated chunk.

    Its task is `retrieval`.

    Attributes:
        index: number of the question among those asked together, from 0.
        question: the text that was continued.
        answer: the whole text generated.
        step: tokens generated when the retrieval took place; 0 is the end of the prompt.
        generated: the text generated until then.
        group: number of the group, from 0; a later group's query has seen what earlier ones read.
        rank: 0 for the group's highest weight.
        chunk: number of the chunk in the memory, from 0.
        weight: share of the group's attention; a group's weights at one step add up to 1.
        document: name of the document that the chunk is a part of.
        document_bytes: of the whole document.
        start: byte of the document at which the chunk begins.
        stop: byte at which it ends (exclusive).
        passage: the chunk's text.
        before: text of the document directly before the passage; may be empty.
        after: text directly after it.
    """

    index: int
    question: str
    answer: str
    step: int
    generated: str
    group: int
    rank: int
    chunk: int
    weight: float
    document: str
    document_bytes: int
    start: int
    stop: int
    passage: str
    before: str
    after: str


RecordT = TypeVar("RecordT", bound=EvaluationRecord)
LARGEST = 2**63  # of any number in a record
KINDS: tuple[type[EvaluationRecord], ...] = (
    NeedleRecord,
    PerplexityRecord,
    AnswerRecord,
    HarnessRecord,
    TrainingRecord,
    RetrievalRecord,
)


def _fields(kind: type[EvaluationRecord]) -> dict[str, str]:
    """Names and annotations of a record's fields."""
    return {field.name: str(field.type) for field in dataclasses.fields(kind)}


def to_line(record: EvaluationRecord) -> str:
    """The record as one line of JSON, without the line's end."""
    return json.dumps(dataclasses.asdict(record))


def from_line(line: str) -> EvaluationRecord:
    """Read what `to_line` wrote; the fields tell which record it is.

    Raises:
        ValueError: not JSON, or not the fields of one of `KINDS` with values of their types that can be: counts are
            not negative, numbers are finite. A field with a default may be missing: a later release added it.
    """
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    kind = max(KINDS, key=lambda kind: len(_fields(kind).keys() & values.keys()))
    fields = _fields(kind)
    optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    missing, unknown = fields.keys() - values.keys() - optional, values.keys() - fields.keys()
    if missing or unknown:
        raise ValueError(
            f"expected the fields of a {kind.__name__}; missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    for name, value in values.items():
        if not _fits(value, fields[name]):
            raise ValueError(f"{name}: expected {fields[name]}, got {value!r}")
    record = kind(**values)
    record.check()
    return record


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value that came from JSON has the type that a field is annotated with."""
    if annotation.startswith("list["):
        return isinstance(value, list) and all(_fits(item, annotation[5:-1]) for item in value)
    if annotation.startswith("dict[str, "):
        return isinstance(value, dict) and all(_fits(item, annotation[10:-1]) for item in value.values())
    if annotation == "bool" or isinstance(value, bool):
        return annotation == "bool" and isinstance(value, bool)
    if annotation.endswith(" | None"):
        return value is None or _fits(value, annotation.removesuffix(" | None"))
    if annotation == "int":
        return isinstance(value, int) and 0 <= value < LARGEST
    if annotation == "float":
        return isinstance(value, (int, float)) and abs(value) < LARGEST  # also not NaN
    return isinstance(value, str)


def read_records(path: Path | str, kind: type[RecordT]) -> list[RecordT]:
    """All records of a file; a last line that a kill cut short (no line end) is left out.

    Args:
        path: JSON lines.
        kind: what they must be; `EvaluationRecord` takes any.

    Raises:
        DRTError: the file cannot be read, or a line is not such a record; names the file and the line.
    """
    try:
        text = read_bytes(path, follow=True).decode()
    except UnicodeDecodeError as error:
        raise DRTError(f"{path}: cannot be read as records: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = from_line(line)
        except ValueError as error:
            raise DRTError(f"{path}, line {number}: not an evaluation record: {error}") from error
        if not isinstance(record, kind):
            raise DRTError(
                f"{path}, line {number}: expected a {kind.__name__}, got a {type(record).__name__} ({record.task})"
            )
        records.append(record)
    return records


class RecordWriter:
    """Writes records to a file line by line, each flushed, so that a killed run leaves whole lines.

    Use as a context manager.

    Args:
        path: the file; its folder exists.
        append: keep the records that the file holds (a last line that a kill cut short is dropped); otherwise the
            file begins empty.

    Raises:
        DRTError: the file cannot be written.
    """

    def __init__(self, path: Path | str, append: bool = False) -> None:
        self._path = path
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | (0 if append else os.O_TRUNC))
        self._file = os.fdopen(
            descriptor, "r+b", buffering=0
        )  # what a full disk refuses must not be left to close()
        self._file.seek(self._file.truncate(self._file.readall().rfind(b"\n") + 1))

    def write(self, record: EvaluationRecord) -> None:
        """Add one line.

        Raises:
            DRTError: it cannot be written.
        """
        line = to_line(record).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise DRTError(f"{self._path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The needle samples of one checkpoint, task and length: counts, means of times and speeds, largest memory."""

    checkpoint: str
    task: str
    length: int
    samples: int
    correct: int
    tokens_per_second: float
    decode_seconds_per_token: float
    prefill_seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None


def summarise(records: list[NeedleRecord]) -> list[Summary]:
    """One summary for each checkpoint, task and length, lengths ascending within a task."""
    groups: dict[tuple[str, str, int], list[NeedleRecord]] = {}
    for record in sorted(records, key=lambda record: record.length):
        groups.setdefault((record.checkpoint, record.task, record.length), []).append(record)
    first = list(
        dict.fromkeys((record.checkpoint, record.task) for record in records)
    )  # in the order they came
    return [
        _summary(groups[checkpoint, task, length])
        for checkpoint, task in first
        for length in dict.fromkeys(key[2] for key in groups if key[:2] == (checkpoint, task))
    ]


def _summary(records: list[NeedleRecord]) -> Summary:
    first, count = records[0], len(records)
    prefill_seconds = sum(record.prefill_seconds for record in records)
    return Summary(
        checkpoint=first.checkpoint,
        task=first.task,
        length=first.length,
        samples=count,
        correct=sum(record.correct for record in records),
        tokens_per_second=first.length * count / prefill_seconds,
        decode_seconds_per_token=sum(record.decode_seconds_per_token for record in records) / count,
        prefill_seconds=prefill_seconds / count,
        peak_rss_bytes=max(record.peak_rss_bytes for record in records),
        peak_device_bytes=max(
            (r.peak_device_bytes for r in records if r.peak_device_bytes is not None), default=None
        ),
    )


def format_length(tokens: int) -> str:
    """A number of tokens in short: 4096 is `4K` (K = 1024), 1048576 is `1M` (M = 1024^2), 1000 is `1000`."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
