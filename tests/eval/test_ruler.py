"""RULER's texts and scores, as lm-eval makes them, and the live model that answers."""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

pytest.importorskip("lm_eval")

from drt.errors import DRTError
from drt.eval import ruler
from drt.eval.ruler_texts import TASKS, Question, answer_room, make_documents, read_questions
from drt.models.drt import DRTForCausalLM

LENGTH = 3072


def test_variables_are_asked_and_answers_scored(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tasks": ["ruler_vt"], "lengths": [LENGTH], "samples": 2, "seed": 3, "checkpoint": "tiny"}
    documents = make_documents("ruler_vt", tokenizer, LENGTH, 2, 3)
    records = list(ruler.evaluate_ruler(model, tokenizer, **options, batch_size=2))
    assert [(r.task, r.data, r.index, r.length) for r in records] == [
        ("ruler_vt", "RULER", 0, LENGTH),
        ("ruler_vt", "RULER", 1, LENGTH),
    ]
    for record, document in zip(records, documents, strict=True):
        assert record.expected == document["outputs"]
        assert record.generated
        assert record.scores == {"recall": 0.0}  # it knows nothing
        prompt = f"{document['input']} {document['gen_prefix']}"
        assert LENGTH / 2 < len(tokenizer.encode(prompt)) <= LENGTH
        assert all(f"VAR {name}" in document["input"] for name in document["outputs"])

    def answer(self: object, requests: list[object], disable_tqdm: bool) -> list[str]:
        return [" ".join(document["outputs"][:3]) for document in documents]

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", answer)
    records = list(ruler.evaluate_ruler(model, tokenizer, **options))
    assert [record.scores["recall"] for record in records] == [3 / 5, 3 / 5]


QUESTIONS = [
    Question(
        f"Who is number {number}?",
        (f"person {number}", "x"),
        f"Number {number} is person {number}. " * 9,
        "a",
    )
    for number in range(40)
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_what_is_asked_for_is_in_the_text_and_a_seed_repeats_it(
    tokenizer: PreTrainedTokenizerBase, task: str
) -> None:
    documents = make_documents(task, tokenizer, LENGTH, 2, 3, QUESTIONS)
    assert documents == make_documents(task, tokenizer, LENGTH, 2, 3, QUESTIONS)
    assert documents != make_documents(task, tokenizer, LENGTH, 2, 4, QUESTIONS)
    room = answer_room(task, tokenizer, QUESTIONS)
    for document in documents:
        assert document["max_length"] == LENGTH
        assert any(value in document["input"] for value in document["outputs"])
        if task != "ruler_qa":
            assert all(value in document["input"] for value in document["outputs"])
        assert LENGTH / 2 < len(tokenizer.encode(document["input"])) + room <= LENGTH


@pytest.mark.slow
def test_words_that_are_asked_for_are_the_most_frequent_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    for task, count in (("ruler_fwe", 3), ("ruler_cwe", 10)):
        for document in make_documents(task, tokenizer, 4096, 2, 0):
            words = Counter(
                re.findall(r"\b[a-z]{4,}\b", document["input"].split("\n")[int(task == "ruler_cwe")])
            )
            for word in ("coded", "text", "frequency", "track", "word", "words", "most", "frequently"):
                del words[word]  # the task's own
            assert {word for word, _ in words.most_common(count)} == set(document["outputs"])


def test_an_answer_of_bytes_has_room_for_all_that_is_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    """Five names of five letters took more than the thirty tokens that were left for them."""
    assert answer_room("ruler_vt", tokenizer) >= len(" ABCDE, ABCDE, ABCDE, ABCDE, ABCDE")
    assert answer_room("ruler_cwe", tokenizer) >= len(" ".join(f"{n}. thoughtful" for n in range(1, 11)))
    long = [*QUESTIONS, Question("q", ("an answer that is long " * 4,), "c")]
    assert answer_room("ruler_qa", tokenizer, long) >= 92
    assert answer_room("niah_multikey_3", tokenizer) == 128  # the benchmark's own is enough


def test_questions_out_of_files(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "context": "c", "answers": ["a", "a", "b"], "title": "t"},
        {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}},
        {"question": "q", "context": "c", "answers": ["a"], "is_impossible": True},
        {"question": "q", "context": "c", "answers": []},
    ]
    path = tmp_path / "squad.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_questions([path]) == [Question("q", ("a", "b"), "c", "t"), Question("q", ("a",), "c")]
    for row, message in (
        ({"question": "q", "context": "c"}, "squad.jsonl:1: .*'answers'"),
        ({"question": None, "context": "c", "answers": ["a"]}, "squad.jsonl:1: .*'question', got null"),
        ({"question": "q", "context": "c", "answers": []}, "expected questions with answers, got none"),
    ):
        (tmp_path / "squad.jsonl").write_text(json.dumps(row))
        with pytest.raises(DRTError, match=message):
            read_questions([tmp_path / "squad.jsonl"])


def test_any_right_answer_to_a_question_counts(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["it is PERSON 3", "nobody"])
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.generate_until", lambda *_, **__: [next(answers) for _ in range(2)]
    )
    asked = [Question("Who?", ("person 3", "no one else"), "Number 3 is person 3.") for _ in range(2)]
    options = {"lengths": [LENGTH], "samples": 2, "seed": 0, "checkpoint": "tiny", "questions": asked}
    records = list(ruler.evaluate_ruler(model, tokenizer, tasks=["qa"], **options))
    assert [(record.task, record.scores["recall"]) for record in records] == [
        ("ruler_qa", 1),
        ("ruler_qa", 0),
    ]


def test_the_global_generators_are_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    make_documents("ruler_vt", tokenizer, LENGTH, 1, 3)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_what_cannot_be_asked(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No question is asked before all lengths are known to be long enough."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", refuse)
    options = {"lengths": [LENGTH, 600], "samples": 1, "seed": 0, "checkpoint": "tiny"}
    with pytest.raises(DRTError, match=r"expected tasks of niah_single_1, .* got essays"):
        list(ruler.evaluate_ruler(model, tokenizer, tasks=["essays"], **options))
    for task in ("ruler_vt", "fwe", "cwe", "niah_multikey_3"):
        with pytest.raises(DRTError, match=rf"{task} at 600 tokens: expected at least [0-9]+ tokens"):
            list(ruler.evaluate_ruler(model, tokenizer, tasks=[task], **options))
    options["lengths"] = [LENGTH, 300]
    for questions, message in ((QUESTIONS, "qa at 300 tokens: expected at least"), ([], "--questions FILE")):
        with pytest.raises(DRTError, match=message):
            list(ruler.evaluate_ruler(model, tokenizer, tasks=["qa"], questions=questions, **options))
    with pytest.raises(DRTError, match="expected 41 questions, got 40"):
        make_documents("ruler_qa", tokenizer, LENGTH, 41, 0, QUESTIONS)
