"""`drt eval ruler` and `drt eval summarization`: benchmarks that score generated text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drt.cli.shared import (
    check_outputs,
    choose_device,
    choose_dtype,
    parse_length,
    parse_lengths,
    reading_progress,
    write_records,
)
from drt.machine import MOST_NEW_TOKENS
from drt.terminal import say

if TYPE_CHECKING:
    from drt.eval.results import AnswerRecord

Checkpoint = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: what the checkpoint holds.")]
Json = Annotated[Path, typer.Option(metavar="FILE", help="Output JSON Lines file (overwritten).")]


def ruler(
    checkpoint: Checkpoint,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK,...",
            help="niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_fwe, ruler_cwe, ruler_qa, or some.",
            show_default="all; ruler_qa if there are questions",
        ),
    ] = "",
    questions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Questions for ruler_qa: JSON lines with question, context and answers, as SQuAD's; may be repeated.",
        ),
    ] = None,
    length: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens of the texts, room for the answer included.")
    ] = "4K",
    samples: Annotated[int, typer.Option(min=1, help="Texts of each task and length.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the texts.")] = 7,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts read together.")] = 1,
    json: Json = Path("ruler.jsonl"),
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Ask the questions of RULER that need no download, through lm-eval.

    Three tasks hide a needle (niah), one follows a chain of variables (vt), two count words (fwe, cwe), and one asks
    about one of many paragraphs (qa). A score is the share of the expected strings that the answer holds; of qa,
    whether it holds any of the right ones. All texts are made before the first question is asked.

    Examples:

        drt eval ruler --checkpoint runs/my-model/final --length 4K,16K --samples 50

        drt eval ruler --checkpoint runs/my-model/final --task ruler_qa --questions squad-dev.jsonl.xz
    """
    from drt.eval.ruler import QA, check_tasks, evaluate_ruler
    from drt.eval.ruler_texts import TASKS, read_questions
    from drt.models.loading import load_model

    lengths = parse_lengths("--length", length)
    tasks = check_tasks(task.split(",")) if task else [name for name in TASKS if questions or name != QA]
    check_outputs({"--json": json}, questions or ())
    asked = read_questions(questions) if questions else []
    model, tokenizer = load_model(checkpoint, choose_dtype(dtype))
    model.to(choose_device(device))  # type: ignore[arg-type]
    records = evaluate_ruler(
        model,
        tokenizer,
        tasks=tasks,
        lengths=lengths,
        samples=samples,
        seed=seed,
        checkpoint=str(checkpoint),
        batch_size=batch_size,
        questions=asked,
    )
    _write_and_show(records, json)


def summarization(
    checkpoint: Checkpoint,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines of documents and summaries: plain, .xz or .gz.")
    ],
    document_field: Annotated[str, typer.Option(help="Field of the document.")] = "document",
    summary_field: Annotated[str, typer.Option(help="Field of the summary.")] = "summary",
    samples: Annotated[int, typer.Option(min=0, help="Take the first so many; 0: all.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_NEW_TOKENS, help="Tokens of the longest summary.")
    ] = 256,
    segment_size: Annotated[str, typer.Option(metavar="N", help="Tokens read in one pass.")] = "4K",
    json: Json = Path("summarization.jsonl"),
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Summarise documents and score the summaries with ROUGE (F1, of stemmed words of the decoded text).

    Example:

        drt eval summarization --checkpoint model --data cnn.jsonl --document-field article --summary-field highlights
    """
    from drt.data.summaries import read_pairs
    from drt.eval.summarization import evaluate_summaries
    from drt.models.loading import load_model

    tokens_a_pass = parse_length("--segment-size", segment_size)
    check_outputs({"--json": json}, [data])
    pairs = read_pairs(data, document_field, summary_field)[: samples or None]
    model, tokenizer = load_model(checkpoint, choose_dtype(dtype))
    model.to(choose_device(device))  # type: ignore[arg-type]
    with reading_progress() as progress:
        bar = progress.add_task(f"{len(pairs)} documents", total=None)
        records = evaluate_summaries(
            model,
            tokenizer,
            pairs,
            checkpoint=str(checkpoint),
            data=data.name,
            max_new_tokens=max_new_tokens,
            segment_size=tokens_a_pass,
            on_progress=lambda tokens: progress.advance(bar, tokens),
        )
        _write_and_show(records, json)


def _write_and_show(records: Iterable[AnswerRecord], path: Path) -> None:
    """Write each record as it comes, then print a table a task."""
    from drt.cli.tables import print_report_table
    from drt.report.models import group_seeds
    from drt.report.tables import answer_table

    written = write_records(path, records)
    for task in dict.fromkeys(record.task for record in written):
        chosen = [record for record in written if record.task == task]
        print_report_table(answer_table(task, group_seeds(chosen)))
    say(f"records: {path}")
