"""Questions asked of an archive: the passages of their records, and where an answer ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from drt.errors import DRTError
from drt.eval.questions import CONVERSATION, ask
from drt.eval.retrieval import Answer
from drt.memory import Archive, ArchiveWriter
from drt.models.drt import DRTForCausalLM
from drt.models.drt.archive_drt import describe_archive, read_documents

TEXTS = ("one é text of forty-odd bytes, no more of it", "and a second text that is shorter")
QUESTION = "a question of some forty-five bytes, so three chunks?"


@pytest.fixture
def archive(model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Iterator[Archive]:
    paths = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    description = describe_archive(model, tokenizer, model_name="tiny")
    with ArchiveWriter.create(tmp_path / "archive", description) as writer:
        read_documents(model, tokenizer, writer, paths)
    with Archive.open(tmp_path / "archive") as opened:
        yield opened


def test_records_show_passages_of_documents_and_of_the_conversation(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, archive: Archive
) -> None:
    answers = ask(model, tokenizer, archive, [QUESTION, "why?"], 60)
    documents = {document.name: text for document, text in zip(archive.documents, TEXTS, strict=True)}
    seen = set()
    for index, answer in enumerate(answers):
        assert [record.step for record in answer.records] == sorted(record.step for record in answer.records)
        for record in answer.records:
            assert (record.index, record.question, record.answer) == (index, answer.question, answer.text)
            assert record.checkpoint == "tiny"
            assert (record.document == CONVERSATION) == (record.chunk >= archive.num_chunks)
            text = documents.get(record.document, answer.question).encode()
            if record.stop <= len(text):
                seen.add(record.document)
                end = text[record.start : record.stop].decode(errors="replace").removeprefix("\ufffd")
                assert record.passage.removesuffix("\ufffd").endswith(end.removesuffix("\ufffd"))
                around = record.before + record.passage + record.after
                assert around[:40].strip("\ufffd") in text.decode() + answer.text
    assert seen == {*documents, CONVERSATION}
    # A question closes its chunk: chunks of the answer are counted from the question's end.
    size, starts = model.config.chunk_size, set()
    for answer in answers:
        length = len(answer.question.encode())
        first = archive.num_chunks + -(-length // size)
        own = [record for record in answer.records if record.chunk >= first]
        assert all(record.start == length + size * (record.chunk - first) for record in own)
        starts |= {record.start for record in own}
    assert starts
    steps = {record.step for record in answers[0].records}
    assert steps == {0, 15, 30, 45}
    for record in answers[0].records:
        assert record.generated == answers[0].text[: len(record.generated)]
        assert bool(record.generated) == (record.step > 0)


def test_weights_of_a_group_add_up_to_one_and_fall_by_rank(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, archive: Archive
) -> None:
    (answer,) = ask(model, tokenizer, archive, ["why?"], 5)
    for group in (0, 1):
        found = [record for record in answer.records if record.group == group]
        assert [record.rank for record in found] == [0, 1]
        assert found[0].weight >= found[1].weight
        assert found[0].weight + found[1].weight == pytest.approx(1, abs=1e-5)


def test_an_answer_ends_where_the_model_ends_it(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = ["why?", QUESTION]
    whole = ask(model, tokenizer, archive, questions, 40)
    end = next(character for character in whole[0].text[2:] if character.isascii())
    monkeypatch.setattr(model.generation_config, "eos_token_id", ord(end) + 3)
    ended = ask(model, tokenizer, archive, questions, 40)
    assert len(ended[0].text) < len(whole[0].text)
    for before, after in zip(whole, ended, strict=True):
        assert after.text == before.text.partition(end)[0]
    assert {record.step for record in ended[0].records} == {
        step for step in (0, 15, 30) if step <= len(ended[0].text)
    }


def test_empty_questions_are_refused(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, archive: Archive
) -> None:
    for questions in ([], [""], ["a", ""]):
        with pytest.raises(DRTError, match="a question is empty"):
            ask(model, tokenizer, archive, questions, 5)


def test_threads_get_the_answers_and_the_records_they_get_alone(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, archive: Archive
) -> None:
    """They share a model and an archive; each call has a state of its own."""
    asked = [["why?"], ["who was it?", QUESTION, "x"], ["and when was that?", "why?"]]
    alone = [ask(model, tokenizer, archive, questions, 18) for questions in asked]
    begin = Barrier(len(asked))

    def again(questions: list[str]) -> list[list[Answer]]:
        begin.wait()
        return [ask(model, tokenizer, archive, questions, 18) for _ in range(2)]

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(again, asked))
    for expected, answers in zip(alone, found, strict=True):
        assert answers == [expected] * 2


def test_a_long_question_is_read_in_segments(
    model: DRTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the checkpoint's generation configuration says; the answers and records are those of one pass."""
    questions = ["".join(f"line {n}: {n * n % 1009} " for n in range(40)), "why?", "x" * 300]
    whole = ask(model, tokenizer, archive, questions, 20)
    lengths: list[int] = []
    forward = model.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", watched)
    monkeypatch.setattr(model.generation_config, "prefill_chunk_size", None)
    monkeypatch.setattr("drt.eval.questions.PREFILL_CHUNK_SIZE", 120)
    answers = ask(model, tokenizer, archive, questions, 20)
    assert max(lengths) <= 120
    assert len(lengths) > 12
    assert [answer.text for answer in answers] == [answer.text for answer in whole]
    for one, other in zip(answers, whole, strict=True):
        assert len(one.records) == len(other.records) > 0
        for record, expected in zip(one.records, other.records, strict=True):
            assert record.weight == pytest.approx(expected.weight, abs=1e-4)
            assert replace(record, weight=0.0) == replace(expected, weight=0.0)


@pytest.mark.parametrize("closes", [True, False])
def test_chunks_of_a_conversation_are_those_that_the_model_made(
    model: DRTForCausalLM, tokenizer: PreTrainedTokenizerBase, archive: Archive, closes: bool
) -> None:
    """A model that was trained on plain text closes no chunk at the question's end."""
    (answer,) = ask(model, tokenizer, archive, [QUESTION], 40, close_prompt=closes)
    length, size, first = len(QUESTION), model.config.chunk_size, archive.num_chunks
    starts = {record.chunk - first: record.start for record in answer.records if record.chunk >= first}
    assert starts
    for number, start in starts.items():
        own = number - (-(-length // size))
        assert start == (size * number if not closes or own < 0 else length + size * own)
