"""Rows that teach a model to use its memory: what stands where, and what the mix says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from drt.data import facts
from drt.data.facts import NOT_IN_TEXT
from drt.data.haystack import sample_haystack
from drt.data.questions import Passage, Question, read_passages
from drt.data.retrieval_mix import KINDS, RetrievalBatch, RetrievalMix, RetrievalMixConfig
from drt.data.tokens import TextCodec
from drt.errors import DRTError

CODEC = TextCodec(ByT5Tokenizer(extra_ids=0))
END = 1
PASSAGE = Passage(
    "The harbor of Elm was built in 1873 by Ada Quill.", "", (Question("Who built it?", ("Ada Quill",), 38),)
)


class Stream:
    """A corpus of one text."""

    def __init__(self, text: bytes) -> None:
        self.ids = CODEC.encode(text)
        self.num_tokens = len(self.ids)

    def tokens(self, start: int, stop: int) -> Any:
        return self.ids[start:stop]


@pytest.fixture(scope="module")
def mix() -> RetrievalMix:
    return RetrievalMix(Stream(sample_haystack().text[:200_000]), [PASSAGE], CODEC, END)


def settings(**changes: Any) -> RetrievalMixConfig:
    return RetrievalMixConfig(**{"row_length": 2048, "min_distance": 200} | changes)


def answers(batch: RetrievalBatch, kind: str) -> list[tuple[int, list[int]]]:
    """(row, columns of its tokens) of each answer of a kind."""
    found = []
    for row in range(len(batch.input_ids)):
        for number in sorted(set(batch.answers[row][batch.kinds[row] == KINDS.index(kind)].tolist()) - {-1}):
            found.append((row, (batch.kept[row][batch.answers[row] == number] + 1).tolist()))
    return found


@pytest.mark.parametrize("kind", ["fact", "list", "chain", "quote", "question"])
def test_what_answers_a_question_stands_earlier_and_far_enough_back(mix: RetrievalMix, kind: str) -> None:
    weight = {
        "fact": "facts",
        "list": "lists",
        "chain": "chains",
        "quote": "quotes",
        "question": "questions",
    }[kind]
    config = settings(**{"facts": 0.0, weight: 1.0})
    batch = mix.batch(0, 6, config, seed=0)
    found = answers(batch, kind)
    assert found
    targets = {(row, ask): [] for row, ask, _ in batch.targets.tolist()}
    for row, ask, column in batch.targets.tolist():
        targets[row, ask].append(column)
    for row, columns in found:
        ask = columns[0] - 1
        assert batch.chunk_ends[row, ask]
        ids = batch.input_ids[row]
        answer = CODEC.decode(ids[columns]).decode().strip()
        for column in targets[row, ask]:
            assert ask - column >= config.min_distance
        first = CODEC.decode(ids[targets[row, ask][0] :][:4]).decode().strip()
        if kind in ("fact", "quote", "question"):
            assert answer.startswith(first[:2]), (answer, first)
        else:
            assert first[:2] in answer


def test_a_question_about_what_is_not_there_has_no_chunk_to_find(mix: RetrievalMix) -> None:
    batch = mix.batch(0, 2, settings(facts=0.0, missing=1.0), seed=0)
    found = answers(batch, "missing")
    assert found
    assert len(batch.targets) == 0
    for row, columns in found:
        assert CODEC.decode(batch.input_ids[row][columns]).decode().strip() == NOT_IN_TEXT
        assert batch.input_ids[row][columns[-1]] == END


def test_labels_are_the_tokens_behind_the_columns_that_are_kept(mix: RetrievalMix) -> None:
    batch = mix.batch(3, 4, settings(quotes=1.0, questions=1.0), seed=1)
    scored = batch.labels != -100
    rows = np.arange(4)[:, None]
    behind = batch.input_ids[rows, np.minimum(batch.kept + 1, 2047)]
    assert (behind[scored] == batch.labels[scored]).all()
    assert (np.diff(batch.kept, axis=1) >= 0).all()
    assert (batch.answers[batch.kinds == 0] == -1).all()


def test_a_batch_depends_on_its_number_and_the_seed_alone(mix: RetrievalMix) -> None:
    config = settings(lists=1.0, quotes=1.0)
    first, again = (mix.batch(5, 2, config, seed=2) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert not np.array_equal(first.input_ids, mix.batch(6, 2, config, seed=2).input_ids)
    assert not np.array_equal(first.input_ids, mix.batch(5, 2, config, seed=3).input_ids)


def test_plain_rows_hold_text_alone(mix: RetrievalMix) -> None:
    batch = mix.batch(0, 3, settings(plain_share=1.0, plain_text_share=1.0), seed=0)
    assert not batch.chunk_ends.any()
    assert (batch.labels != -100).sum() == 3 * 2047
    assert (batch.kinds == 0).all()


def test_wordings_of_benchmarks_are_not_trained() -> None:
    source = (
        Path(facts.__file__).read_text(encoding="utf-8").split('"""', 2)[2]
    )  # behind the docstring that names them
    assert "magic number" not in source
    assert "mentioned in the provided text" not in source


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"row_length": 10}, "row_length"),
        ({"min_distance": 5000}, "min_distance"),
        ({"density": 1.5}, "density"),
        ({"facts": 0.0}, "facts"),
        ({"quotes": -1.0}, "facts"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings(**changes)


def test_questions_need_passages() -> None:
    mix = RetrievalMix(Stream(sample_haystack().text[:100_000]), [], CODEC, END)
    with pytest.raises(DRTError, match="question file"):
        mix.batch(0, 1, settings(facts=0.0, questions=1.0), seed=0)


def test_a_corpus_without_words_is_refused() -> None:
    with pytest.raises(DRTError, match="words"):
        RetrievalMix(Stream(b"1234 " * 1000), [], CODEC, END)


def test_question_files_are_read_and_grouped(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "context": "A cat sat.",
            "question": "Who sat?",
            "answers": ["A cat"],
            "answer_start": [0],
            "title": "t",
        },
        {"context": "A cat sat.", "question": "Did what?", "answers": ["sat"]},
        {"context": "Nothing.", "question": "Why?", "answers": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    cat, nothing = read_passages([path])
    assert [(question.answers, question.start) for question in cat.questions] == [
        (("A cat",), 0),
        (("sat",), 6),
    ]
    assert nothing.questions[0].answers == ()


@pytest.mark.parametrize(
    "row",
    [
        {"context": "x", "question": "y"},
        {"context": "x", "question": "y", "answers": "z"},
        {"context": " ", "question": "y", "answers": []},
        {"context": "x", "question": None, "answers": []},
    ],
)
def test_a_damaged_question_file_is_named_by_line(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"context": "a", "question": "b", "answers": []}) + "\n" + json.dumps(row))
    with pytest.raises(DRTError, match=r"questions\.jsonl:2"):
        read_passages([path])
