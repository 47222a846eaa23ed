"""`drt ask` and `drt generate --memory`: answers, what is written beside them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from drt.eval.results import RetrievalRecord, read_records
from drt.models.drt import DRTForCausalLM
from drt.terminal import one_line

Run = Callable[..., Any]


@pytest.fixture
def archive(build: Run, book: Path) -> str:
    build(book, "-o", "m", "--dtype", "float32")
    return "m"


@pytest.fixture
def ask(drt: Run, checkpoint: Path, archive: str) -> Callable[..., str]:
    """What `drt ask` writes to stdout; must succeed."""

    def run(*arguments: object) -> str:
        result = drt("ask", archive, "--checkpoint", checkpoint, "--device", "cpu", *arguments)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return result.stdout

    return run


def test_the_answer_is_that_of_a_model_that_has_just_read_the_text(
    ask: Run, checkpoint: Path, book: Path
) -> None:
    model = DRTForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = book.read_text() + "who?"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[0, -5] = True  # a document's last chunk closes at its end
    with torch.no_grad():
        whole = model.generate(ids, chunk_ends=ends, max_new_tokens=12, do_sample=False)
    expected = bytes(token - 3 for token in whole[0, ids.shape[1] :].tolist() if token >= 3)
    assert ask("who?", "--max-new-tokens", 12) == expected.decode(errors="replace") + "\n"


def test_questions_asked_together_have_the_answers_they_have_alone(ask: Run) -> None:
    questions = ["who?", "and why was it that word 7 came first of all?", "x"]
    alone = [json.loads(ask(question, "--json")) for question in questions]
    assert [one["question"] for one in alone] == questions
    assert [json.loads(line) for line in ask(*questions, "--json").splitlines()] == alone
    shown = ask(*questions)
    assert shown == "".join(f"{one['question']}\t{one_line(one['answer'])}\n" for one in alone)


def test_a_question_with_line_breaks_keeps_one_line_an_answer(ask: Run) -> None:
    questions = ["who?\nor what?", "why\t\r\u2028?"]
    lines = ask(*questions, "--max-new-tokens", 20).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["who?␊or what?", "why␉␍␤?"]
    asked = [json.loads(line)["question"] for line in ask(*questions, "--json").splitlines()]
    assert asked == questions


def test_asking_changes_nothing(ask: Run, archive: str) -> None:
    before = {path.name: path.read_bytes() for path in Path(archive).iterdir()}
    ask("who?", "--max-new-tokens", 40)
    assert {path.name: path.read_bytes() for path in Path(archive).iterdir()} == before


def test_generate_goes_on_after_an_archive(ask: Run, drt: Run, checkpoint: Path, archive: str) -> None:
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--max-new-tokens", "5")
    shown = {}
    for memory in ((), ("--memory", archive)):
        result = drt("generate", "who was the first of all these words?", *options, *memory)
        assert result.exit_code == 0, result.output
        shown[memory] = result.stdout.rstrip("\n")
    assert len(set(shown.values())) == 2
    answer = ask("who was the first of all these words?", "--json")
    assert json.loads(answer)["answer"].replace("\ufffd", "") == shown["--memory", archive].replace(
        "\ufffd", ""
    )


def test_generate_searches_an_archive_as_it_is_told(refuses: Run, checkpoint: Path, archive: str) -> None:
    arguments = ("generate", "who?", "--checkpoint", checkpoint, "--search")
    assert "m has no landmark index" in refuses(*arguments, "index", "--memory", archive)
    assert "--search: only with --memory" in refuses(*arguments, "exact")


def test_the_trace_and_the_page_show_the_passages(ask: Run, book: Path) -> None:
    ask("who?", "why?", "--max-new-tokens", 20, "--trace", "out/trace.jsonl", "--html", "out/page.html")
    records = read_records("out/trace.jsonl", RetrievalRecord)
    assert {(record.index, record.question, record.step) for record in records} == {
        (index, question, step) for index, question in enumerate(["who?", "why?"]) for step in (0, 15)
    }
    assert {record.group for record in records} == {0, 1}
    text, page = book.read_bytes(), Path("out/page.html").read_text()
    from_book = [record for record in records if record.document == str(book)]
    assert from_book
    for record in from_book:
        assert record.document_bytes == len(text)
        around = (record.before + record.passage + record.after).encode()
        assert around in text
        if record.passage.isascii():
            assert text[record.start : record.stop] == record.passage.encode()
        assert f"bytes {record.start:,} to {record.stop:,}" in page
    assert sorted(path.name for path in Path("out").iterdir()) == ["page.html", "trace.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", ""], "a question is empty; expected at least one character"),
        (["m", "who?", ""], "a question is empty"),
        (["m", "ab\udcff"], r"the question 'ab\udcff' is not UTF-8 text"),
        (["nowhere", "who?"], "nowhere is not an archive: it has no manifest.json"),
        (["m", "who?", "--html", "dir"], "--html dir: expected a regular file or a new name, got a folder"),
        (
            ["m", "who?", "--trace", "x", "--html", "x"],
            "--html x: expected a file of its own, got that of --trace",
        ),
        (["m", "who?", "--trace", "file/trace"], "--trace file/trace: cannot be written: "),
        (
            ["m", "who?", "--trace", "m/manifest.json"],
            "--trace m/manifest.json: expected a file apart from what is",
        ),
        (
            ["m", "who?", "--html", "x/../m/page"],
            "--html x/../m/page: expected a file apart from what is read",
        ),
        (["m", "who?", "--search", "quick"], "--search: expected auto, exact or index, got 'quick'"),
        (["m", "who?", "--search", "index"], "m has no landmark index; drt memory index makes one"),
        (["m", "who?", "--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_mistakes_are_one_line(
    refuses: Run, checkpoint: Path, archive: str, arguments: list[str], message: str
) -> None:
    Path("file").touch()
    Path("dir").mkdir()
    before = {path: path.read_bytes() for path in Path(archive).iterdir()}
    assert message in refuses("ask", "--checkpoint", checkpoint, *arguments)
    assert {path: path.read_bytes() for path in Path(archive).iterdir()} == before


@pytest.mark.parametrize("command", [("ask", "m", "who?"), ("generate", "a prompt")])
def test_more_tokens_than_anybody_waits_for_are_refused(drt: Run, command: tuple[str, ...]) -> None:
    result = drt(*command, "--max-new-tokens", 10**20)
    assert result.exit_code == 2
    assert "--max-new-tokens" in result.stderr


def test_a_damaged_archive_is_refused(refuses: Run, checkpoint: Path, archive: str) -> None:
    path = Path(archive, "landmarks.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert "landmarks.bin is damaged" in refuses("ask", archive, "who?", "--checkpoint", checkpoint)
