"""`drt needle`: hide needles in a long text and see whether a model finds them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from drt.cli.shared import (
    check_outputs,
    load_checkpoint,
    parse_length,
    parse_lengths,
    reading_progress,
)
from drt.errors import DRTError, Interrupted, naming
from drt.files import atomic_write
from drt.machine import MOST_THREADS
from drt.terminal import print_table, say

if TYPE_CHECKING:
    from drt.eval.needle import NeedlePlan, SampleKey
    from drt.eval.results import NeedleRecord

FIGURES = (".png", ".pdf", ".svg")


def needle(
    length: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="Tokens of the texts to read: 64K, or a list such as 4K,64K,1M."
        ),
    ] = "64K",
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK,...", help="What is asked: single, multikey, multihop, or a list of them."
        ),
    ] = "single",
    samples: Annotated[
        int, typer.Option(min=1, max=10**6, help="Texts to read for each task and length.")
    ] = 20,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Of the needles and where they are; a seed repeats a run."),
    ] = 7,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the model. Default: the one that ships with drt."),
    ] = None,
    haystack: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Text to hide needles in; may be repeated. Default: the sample that ships."
        ),
    ] = None,
    needles: Annotated[
        int, typer.Option(min=1, help="multikey: needles in a text, of which one is asked.")
    ] = 6,
    hops: Annotated[
        int, typer.Option(min=1, help="multihop: links of a chain from the question to its end.")
    ] = 2,
    chains: Annotated[
        int, typer.Option(min=1, help="multihop: chains in a text, of which one is asked.")
    ] = 2,
    json: Annotated[Path, typer.Option(metavar="FILE", help="Output JSON Lines file (overwritten).")] = Path(
        "needle.jsonl"
    ),
    plot: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the length x depth picture goes: .png, .pdf or .svg.")
    ] = Path("needle.png"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the records that the --json file holds and do only the rest."),
    ] = False,
    segment_size: Annotated[
        str, typer.Option(metavar="N", help="Tokens read in one pass; more of them take more memory.")
    ] = "4K",
    batch_size: Annotated[
        int,
        typer.Option(min=0, help="Texts read together; 0: as many as fit one pass. Answers are the same."),
    ] = 0,
    memory_dtype: Annotated[
        str | None,
        typer.Option(
            help="How a DRT model's memory holds chunks: float32, bfloat16, float16 or int8. "
            "Default: as they are computed."
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=0, max=MOST_THREADS, help="CPU threads; 0: as many as there are cores.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: what the checkpoint holds.")
    ] = None,
) -> None:
    """Hide needles in real text, let a model read it and answer, and show how many it found.

    A needle is a short sentence with a random name and value. `single` hides one and asks for its value; `multikey`
    hides several; `multihop` hides chains, where a value is the name of the next needle, and asks where one leads.
    An answer counts when every token of it is right. K is 1024 tokens, M is 1024 x 1024.

    The records (a line a text) and the picture are written as well as the table. Ctrl-C keeps the records of what was
    read; `--resume` continues from there. The exit code is 0 whatever the accuracy.

    Examples:

        drt needle --length 1M --samples 3

        drt needle --length 4K,16K,64K --task single,multikey,multihop --samples 100 --json out.jsonl --plot out.png

        drt needle --checkpoint runs/my-model/final --haystack book.txt --haystack another.txt --length 256K
    """
    # Torch and transformers take seconds to import: not before `--help` and mistyped options are dealt with.
    import torch

    from drt.data.needles import load_haystack
    from drt.eval.needle import NeedlePlan, evaluate_needles, finished_keys
    from drt.eval.results import NeedleRecord, read_records
    from drt.plotting.needle import plot_needles
    from drt.plotting.style import save_figure

    lengths, tokens_a_pass = parse_lengths("--length", length), parse_length("--segment-size", segment_size)
    with naming("--task"):
        plan = NeedlePlan(
            tasks=tuple(task.split(",")),
            lengths=lengths,
            samples=samples,
            seed=seed,
            needles=needles,
            hops=hops,
            chains=chains,
        )
    if plot.suffix not in FIGURES:
        raise DRTError(f"--plot {plot}: expected a file name that ends in {', '.join(FIGURES)}")
    check_outputs({"--json": json, "--plot": plot}, haystack or ())
    if threads:
        torch.set_num_threads(threads)
    text = load_haystack(haystack)
    model, tokenizer, name = load_checkpoint(checkpoint, device, dtype)

    records = read_records(json, NeedleRecord) if resume and json.exists() else []
    dtype_name = str(model.dtype).removeprefix("torch.")
    done = finished_keys(
        records,
        plan,
        checkpoint=name,
        dtype=dtype_name,
        haystack=list(text.names),
        memory_dtype=memory_dtype,
    )
    with Watch(plan, done) as watch:
        answers = evaluate_needles(
            model,
            tokenizer,
            text,
            plan,
            checkpoint=name,
            segment_size=tokens_a_pass,
            batch_size=batch_size or None,
            memory_dtype=memory_dtype,
            done=done,
            on_progress=watch.read,
        )
        records += write_all(answers, json, resume, watch)
    with atomic_write(plot) as file:
        save_figure(plot_needles(records), file, plot.suffix.removeprefix("."))
    print_results(records)
    say(f"records: {json}, picture: {plot}")


class Watch:
    """Shows on stderr how far an evaluation is: a bar on a terminal, and a line for each finished task and length.

    Args:
        plan: what is asked.
        done: what was answered earlier.
    """

    def __init__(self, plan: NeedlePlan, done: Collection[SampleKey]) -> None:
        self.waiting = [key for key in plan.sample_keys() if key not in done]
        self.answered = self.found = 0
        self._group: list[NeedleRecord] = []
        self._progress = reading_progress()
        self._task = self._progress.add_task("", total=sum(length for _, length, _ in self.waiting))

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def read(self, tokens: int) -> None:
        """So many more tokens have been read."""
        self._progress.advance(self._task, tokens)

    def answer(self, record: NeedleRecord) -> None:
        """One more sample has been answered."""
        from drt.eval.results import format_length

        self.answered += 1
        self.found += record.correct
        self._group.append(record)
        self._progress.update(self._task, description=f"found {self.found} of {self.answered}")
        following = self.waiting[self.answered : self.answered + 1]
        if not following or following[0][:2] != (record.task, record.length):
            found = sum(member.correct for member in self._group)
            line = f"{record.task}, {format_length(record.length)}: found {found} of {len(self._group)}"
            self._progress.console.print(line, highlight=False)
            self._group = []


def write_all(answers: Iterator[NeedleRecord], path: Path, append: bool, watch: Watch) -> list[NeedleRecord]:
    """Write each record as it comes; returns them all.

    Raises:
        Interrupted: Ctrl-C; the file holds what was answered until then.
    """
    from drt.eval.results import RecordWriter

    records = []
    with RecordWriter(path, append) as writer:
        try:
            for record in answers:
                writer.write(record)
                records.append(record)
                watch.answer(record)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                f"stopped after {watch.answered} of {len(watch.waiting)} texts; their records are in {path}. "
                f"Run the same command with --resume to continue."
            ) from interrupt
    return records


def print_results(records: list[NeedleRecord]) -> None:
    """A table, 80 columns wide: one row for each task and length."""
    from drt.eval.results import format_length, summarise

    columns = ("task", "length", "found", "share", "s a text", "tokens/s", "ms a token", "peak RAM")
    rows = []
    for row in summarise(records):
        memory = f"{row.peak_rss_bytes / 1e6:.0f} MB"
        if row.peak_device_bytes is not None:
            memory += f", GPU {row.peak_device_bytes / 1e6:,.0f} MB"
        cells = (
            row.task,
            format_length(row.length),
            f"{row.correct}/{row.samples}",
            f"{row.correct / row.samples:.1%}",
            f"{row.prefill_seconds:,.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{1e3 * row.decode_seconds_per_token:.1f}",
            memory,
        )
        rows.append(cells)
    print_table(columns, rows, title=f"Needles found by {records[0].checkpoint}")
