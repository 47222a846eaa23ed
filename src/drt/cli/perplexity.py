"""`drt eval perplexity` and `drt eval runs`: how well models predict whole documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from drt.errors import DRTError, Interrupted
from drt.files import atomic_write
from drt.machine import MOST_THREADS
from drt.terminal import say

if TYPE_CHECKING:
    from drt.eval.results import EvaluationRecord
    from drt.report.tables import Table

Data = Annotated[
    Path,
    typer.Option(metavar="CORPUS|FILE", help="A corpus that `drt data prepare` made, or one text file."),
]
Split = Annotated[str, typer.Option(help="Split of the corpus.")]
Lengths = Annotated[str, typer.Option(metavar="N,N,...", help="Where the position buckets of the table end.")]
Shortest = Annotated[str, typer.Option(metavar="N", help="Leave out documents of fewer tokens.")]
Longest = Annotated[
    str | None,
    typer.Option(metavar="N", help="Read so many tokens of a document at most. Default: all of it."),
]
Documents = Annotated[int, typer.Option(min=0, help="Read the first so many documents; 0: all.")]
SegmentSize = Annotated[
    str, typer.Option(metavar="N", help="Tokens read in one pass; more of them take more memory.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents read side by side. Losses are the same.")]
Reference = Annotated[
    str | None, typer.Option(metavar="NAME", help="Model to compare the others with. Default: the best.")
]
Threads = Annotated[
    int, typer.Option(min=0, max=MOST_THREADS, help="CPU threads; 0: as many as there are cores.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: what the checkpoint holds.")]


def perplexity(
    checkpoint: Annotated[
        list[Path], typer.Option(metavar="DIR", help="Folder of a model; may be repeated.")
    ],
    data: Data,
    json: Annotated[Path, typer.Option(metavar="FILE", help="Output JSON Lines file (overwritten).")] = Path(
        "perplexity.jsonl"
    ),
    split: Split = "test",
    lengths: Lengths = "2K,16K,64K,256K",
    shortest: Shortest = "2",
    longest: Longest = None,
    documents: Documents = 0,
    segment_size: SegmentSize = "4K",
    batch_size: BatchSize = 1,
    reference: Reference = None,
    threads: Threads = 0,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Read whole documents with one or several models, and compare how well they predict them.

    Every token is predicted from all that stands before it in its document: the model reads on through its cache, and
    a chunk memory streams along. The table shows perplexity, bits per byte, and bits per byte by position; with several
    models also the paired differences between them, with bootstrap intervals over documents. A record a document is
    written, with sums by position. K is 1024 tokens, M is 1024 x 1024.

    Examples:

        drt eval perplexity --checkpoint runs/lm/drt/final --data data/corpora/books --json drt.jsonl

        drt eval perplexity --checkpoint a --checkpoint b --data book.txt --longest 64K
    """
    settings = _settings(
        data, split, lengths, shortest, longest, documents, segment_size, batch_size, threads, device, dtype
    )
    check_outputs({"--json": json}, [data])
    labels = [
        f"{folder} ({number} of {len(checkpoint)})" for number, folder in enumerate(checkpoint, start=1)
    ]
    pairs = zip(checkpoint, labels, strict=True)
    records = write_records(
        json,
        chain.from_iterable(_evaluate(str(folder), folder, settings, label) for folder, label in pairs),
    )
    show(records, settings, reference)
    say(f"records: {json}")


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Training runs: FOLDER/NAME/final holds a model.")
    ],
    data: Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where records and report go.")
    ],
    only: Annotated[str, typer.Option(metavar="PATTERN", help="Runs to take, such as 'books-*'.")] = "*",
    split: Split = "test",
    lengths: Lengths = "2K,16K,64K,256K",
    shortest: Shortest = "2",
    longest: Longest = None,
    documents: Documents = 0,
    segment_size: SegmentSize = "4K",
    batch_size: BatchSize = 1,
    reference: Reference = None,
    threads: Threads = 0,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Evaluate every finished training run of a folder on the same documents, and write the report.

    Each run's records go to DIR/NAME.jsonl when all of its documents are read. A run that has such a file is not read
    again: after a stop the same command resumes, and new runs join the report. DIR/settings.json says which documents
    were read and how; other ones need another DIR. Runs whose names differ only in an ending such as -s0 or -seed1 are
    seeds of one model.

    Example:

        drt eval runs runs/lm --only 'books-*' --data data/corpora/books -o results/books
    """
    from drt.eval.results import EvaluationRecord, read_records
    from drt.eval.runs import claim_folder, find_runs
    from drt.report.page import build_page, write_page

    settings = _settings(
        data, split, lengths, shortest, longest, documents, segment_size, batch_size, threads, device, dtype
    )
    found = find_runs(folder, only)
    claim_folder(output, settings.what_is_read())
    files = {name: output / f"{name}.jsonl" for name in found}
    waiting = {name: path for name, path in found.items() if not files[name].exists()}
    kept = [name for name in found if name not in waiting]
    if kept:
        say(f"kept, not read again: {', '.join(kept)}", error=True)
    for number, (name, path) in enumerate(waiting.items(), start=1):
        _write_whole(files[name], _evaluate(name, path, settings, f"{name} ({number} of {len(waiting)})"))
    records = [record for path in files.values() for record in read_records(path, EvaluationRecord)]
    show(records, settings, reference)
    blocks = build_page(records, reference=reference, positions=settings.positions)
    pages = write_page(blocks, output)
    say(f"records: {output}, report: {', '.join(map(str, pages))}")


@dataclass(frozen=True)
class _Settings:
    data: Path
    split: str
    positions: tuple[int, ...]
    shortest: int
    longest: int | None
    documents: int | None
    segment_size: int
    batch_size: int
    device: str
    dtype: str | None

    def what_is_read(self) -> dict[str, Any]:
        """What records depend on, in the form of JSON."""
        values = {
            name: value
            for name, value in vars(self).items()
            if name not in ("segment_size", "batch_size", "device")
        }
        return values | {"data": str(self.data.resolve()), "positions": list(self.positions)}


def _settings(
    data: Path,
    split: str,
    lengths: str,
    shortest: str,
    longest: str | None,
    documents: int,
    segment_size: str,
    batch_size: int,
    threads: int,
    device: str,
    dtype: str | None,
) -> _Settings:
    """Options as numbers; sets the number of threads.

    Raises:
        DRTError: an option that cannot be understood.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    return _Settings(
        data=data,
        split=split,
        positions=tuple(sorted(set(parse_lengths("--lengths", lengths)))),
        shortest=parse_length("--shortest", shortest),
        longest=None if longest is None else parse_length("--longest", longest),
        documents=documents or None,
        segment_size=parse_length("--segment-size", segment_size),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )


def _evaluate(name: str, folder: Path, settings: _Settings, label: str) -> Iterator[EvaluationRecord]:
    """Records of a model: of its training, if it is known, then of each document.

    Raises:
        Interrupted: Ctrl-C.
    """
    from drt.eval.documents import load_documents
    from drt.eval.perplexity import evaluate_perplexity
    from drt.eval.runs import training_record
    from drt.models.loading import load_model

    model, tokenizer = load_model(folder, choose_dtype(settings.dtype))
    documents = load_documents(
        settings.data,
        tokenizer,
        split=settings.split,
        shortest=settings.shortest,
        longest=settings.longest,
        count=settings.documents,
    )
    training = training_record(folder, name)
    if training is not None:
        yield training
    with reading_progress() as progress:
        bar = progress.add_task(label, total=sum(len(document.tokens) for document in documents))
        try:
            yield from evaluate_perplexity(
                model.to(choose_device(settings.device)),  # type: ignore[arg-type]
                tokenizer,
                documents,
                checkpoint=name,
                data=_data_name(settings),
                positions=settings.positions,
                segment_size=settings.segment_size,
                batch_size=settings.batch_size,
                on_progress=lambda tokens: progress.advance(bar, tokens),
            )
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                f"stopped while {name} was read; records of models before it are whole"
            ) from interrupt


def _data_name(settings: _Settings) -> str:
    """Corpus and split, or the file."""
    return f"{settings.data.name} {settings.split}" if settings.data.is_dir() else settings.data.name


def _write_whole(path: Path, records: Iterable[EvaluationRecord]) -> None:
    """Write a model's records; the file is there whole or not at all."""
    from drt.eval.results import to_line

    with atomic_write(path) as file:
        for record in records:
            file.write(to_line(record).encode() + b"\n")


def show(records: Sequence[EvaluationRecord], settings: _Settings, reference: str | None) -> None:
    """Print the tables of perplexity records."""
    from drt.cli.tables import print_report_table
    from drt.eval.results import PerplexityRecord
    from drt.report.models import group_seeds
    from drt.report.tables import difference_table, perplexity_table

    models = group_seeds([record for record in records if isinstance(record, PerplexityRecord)])
    if reference is not None and reference not in models:
        raise DRTError(f"--reference: expected one of {', '.join(models)}, got {reference!r}")
    tables: list[Table] = [perplexity_table(_data_name(settings), models, settings.positions)]
    if len(models) > 1:
        tables.append(difference_table(_data_name(settings), models, reference))
    for table in tables:
        print_report_table(table)
