"""Questions about passages, read from JSON lines in SQuAD's form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drt.data.json_rows import json_rows, text_field_of
from drt.errors import DRTError


@dataclass(frozen=True)
class Question:
    """A question about a passage.

    Attributes:
        question: its words.
        answers: right answers; none where the passage has no answer.
        start: where the first answer stands in the passage, in characters; -1: unknown.
    """

    question: str
    answers: tuple[str, ...]
    start: int = -1


@dataclass(frozen=True)
class Passage:
    """A passage, its title (may be empty) and the questions about it."""

    text: str
    title: str
    questions: tuple[Question, ...]


def read_passages(paths: Iterable[Path | str]) -> list[Passage]:
    """Read question files; questions about the same passage are brought together, in the order of the files.

    Args:
        paths: JSON lines, plain or compressed (.xz, .gz). An object has ``context``, ``question`` and ``answers`` (a
            list of texts), and may have ``answer_start`` (a list of character offsets) and ``title``.

    Raises:
        DRTError: a file cannot be read or holds no question, a line lacks a field; the message names the line.
    """
    found: dict[str, tuple[str, list[Question]]] = {}
    for path in paths:
        count = 0
        for where, row in json_rows(path):
            context, title, question = _parse(row, where)
            found.setdefault(context, (title, []))[1].append(question)
            count += 1
        if not count:
            raise DRTError(f"{path}: expected questions as JSON lines, got an empty file")
    return [Passage(text, title, tuple(questions)) for text, (title, questions) in found.items()]


def _parse(row: dict[str, Any], where: str) -> tuple[str, str, Question]:
    context, question = (text_field_of(row, name, where) for name in ("context", "question"))
    answers, starts = row.get("answers"), row.get("answer_start") or [-1]
    if not context.strip() or not question.strip():
        raise DRTError(f"{where}: expected a context and a question, got an empty text")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DRTError(f"{where}: expected answers, a list of texts, got {answers!r}")
    start = starts[0] if isinstance(starts, list) and type(starts[0]) is int else -1
    if answers and not context.startswith(answers[0], max(start, 0)):
        start = context.find(answers[0])
    return context, str(row.get("title", "")), Question(question.strip(), tuple(answers), start)
