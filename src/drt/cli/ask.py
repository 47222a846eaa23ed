"""`drt ask`: questions asked of an archive, and what was read for the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drt.errors import DRTError
from drt.files import write_text
from drt.machine import MOST_NEW_TOKENS
from drt.terminal import one_line, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drt.eval.retrieval import Answer


def ask(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an archive (drt memory build).")],
    questions: Annotated[
        list[str],
        typer.Argument(metavar="QUESTION...", help="What to continue; several are answered together."),
    ],
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_NEW_TOKENS,
            help="Tokens of an answer at most. The shipped model's answers are five digits.",
        ),
    ] = 5,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write what was retrieved for the answers: JSON lines, one a chunk."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page that shows the answers and the retrieved passages."),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Write each answer as a JSON object with its question, a line each."),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the model that built the archive. Default: the one that ships with drt.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    ] = "auto",
    search: Annotated[
        str,
        typer.Option(
            help="exact: score every chunk. index: those that drt memory index finds near. "
            "auto: by an index of a million chunks or more, else exact."
        ),
    ] = "auto",
) -> None:
    """Ask questions of an archive. It is read only: the questions leave nothing in it.

    What is asked is continued word for word, greedily, as the text that comes next after all documents. The model that
    ships with drt finds needles and does not chat: where a document says `|qx=48213|`, it continues `|qx?` with
    `48213`. It sees the 64 bytes before a question: if the documents end in something unusual, put a line of ordinary
    text before it.

    Several questions are answered in one batch, and shown with their answers after a tab, a line each.

    Examples:

        drt ask books.memory "|qx?"

        drt ask books.memory "|qx?" "|ab?" --json

        drt ask books.memory "|qx?" --html answer.html --trace answer.jsonl
    """
    check_questions(questions)

    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    from drt.cli.shared import check_outputs, load_checkpoint, open_archive
    from drt.eval.questions import ask as ask_archive
    from drt.eval.results import RecordWriter
    from drt.plotting.retrieval import retrieval_page

    check_outputs({"--trace": trace, "--html": html}, [folder])
    loaded = load_checkpoint(checkpoint, device)
    with open_archive(folder, loaded, search) as archive:
        answers = ask_archive(loaded.model, loaded.tokenizer, archive, questions, max_new_tokens)
        about = {
            "memory": str(folder),
            "holds": f"{archive.num_tokens:,} tokens of {len(archive.documents):,} documents",
            "model": archive.description.model_name,
        }
    show_answers(answers, json)
    if trace is not None:
        with RecordWriter(trace) as writer:
            for answer in answers:
                for record in answer.records:
                    writer.write(record)
    if html is not None:
        write_text(html, retrieval_page(answers, about))


def check_questions(questions: Sequence[str]) -> None:
    """Make sure that every question is a text.

    Raises:
        DRTError: an empty one, or one that is not UTF-8.
    """
    for question in questions:
        if not question:
            raise DRTError("a question is empty; expected at least one character")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise DRTError(f"the question {question!a} is not UTF-8 text") from error


def show_answers(answers: Sequence[Answer], json: bool) -> None:
    """Print the answers: the answer alone to a single question, else each after its question, on one line."""
    from json import dumps

    for answer in answers:
        if json:
            say(dumps({"question": answer.question, "answer": answer.text}))
        elif len(answers) == 1:
            say(answer.text)
        else:
            say(f"{one_line(answer.question)}\t{one_line(answer.text)}")
