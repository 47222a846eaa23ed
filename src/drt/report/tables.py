"""Records as tables of text, for the page and for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from drt.eval.compare import compare_bits_per_byte
from drt.eval.perplexity import COLUMNS, score_by_position, total_score
from drt.eval.results import (
    AnswerRecord,
    HarnessRecord,
    NeedleRecord,
    PerplexityRecord,
    TrainingRecord,
    format_length,
)
from drt.report.models import Models

ABSENT = "-"
_BEST = re.compile(r"\*\*([0-9.]+)\*\*")


@dataclass(frozen=True)
class Table:
    """A table of text; all columns but the first are numbers.

    Attributes:
        title: what it shows.
        columns: heads.
        rows: as many cells as there are columns.
        note: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def perplexity_table(data: str, models: Models[PerplexityRecord], ends: Sequence[int] = COLUMNS) -> Table:
    """Perplexity, bits per byte, and bits per byte by position; the best of each column in bold.

    Args:
        data: name of the data, for the title.
        models: name -> records of its checkpoints.
        ends: where position buckets end; those that no document reaches are left out.
    """
    deepest = max(record.length for records in models.values() for record in records)
    reached = [end for end in ends if end < deepest]
    buckets = list(zip([0, *reached], [*reached, None], strict=True))
    rows, numbers = [], []
    for name, records in models.items():
        score, by_position = total_score(records), score_by_position(records, reached)
        found = [by_position.get(bucket) for bucket in buckets]
        numbers.append(
            [score.perplexity, score.bits_per_byte, *(part.bits_per_byte if part else None for part in found)]
        )
        count = len({record.checkpoint for record in records})
        rows.append((name, str(count), str(len(records) // count), format_count(score.tokens // count)))
    cells = _mark_best(numbers, ("{:.3f}", *["{:.4f}"] * (len(buckets) + 1)))
    heads = (f"{format_length(start)}-{format_length(end) if end else ''}" for start, end in buckets)
    return Table(
        f"Language modelling: {data}",
        ("model", "seeds", "texts", "tokens", "ppl", "bits/byte", *heads),
        tuple((*row, *numbers) for row, numbers in zip(rows, cells, strict=True)),
        "Perplexity is of a token, bits per byte are of the text. The last columns give bits per byte by position "
        "in the document; deep positions exist in long documents only, so compare within a column. "
        "Seeds of a model are taken together.",
    )


def best_model(models: Models[PerplexityRecord]) -> str:
    """Name of the model with the fewest bits per byte."""
    return min(models, key=lambda name: total_score(models[name]).bits_per_byte)


def difference_table(data: str, models: Models[PerplexityRecord], reference: str | None = None) -> Table:
    """Paired differences in bits per byte to one model, with 95% intervals.

    Args:
        data: name of the data, for the title.
        models: at least two; all were evaluated on the same documents.
        reference: name of a model. None: the one with the fewest bits per byte.

    Raises:
        DRTError: models that were evaluated on different documents.
    """
    reference = best_model(models) if reference is None else reference
    rows = []
    for name, records in models.items():
        if name != reference:
            found = compare_bits_per_byte(records, models[reference])
            interval = f"{found.low:+.4f} to {found.high:+.4f}"
            rows.append((name, f"{found.difference:+.4f}", interval, str(found.documents)))
    return Table(
        f"Bits per byte minus those of {reference}: {data}",
        ("model", "difference", "95% interval", "documents"),
        tuple(rows),
        f"Above 0: {reference} predicts better. Paired bootstrap over documents (10,000 draws, seed 0); "
        "it says how much the result hangs on which documents were read, not how training seeds vary.",
    )


def seeds_table(data: str, models: Models[PerplexityRecord]) -> Table:
    """Bits per byte of each checkpoint of the models that have several."""
    rows = []
    for name, records in models.items():
        checkpoints = dict.fromkeys(record.checkpoint for record in records)
        for checkpoint in checkpoints if len(checkpoints) > 1 else ():
            score = total_score([record for record in records if record.checkpoint == checkpoint])
            rows.append((name, checkpoint, f"{score.bits_per_byte:.4f}"))
    return Table(f"Bits per byte of each seed: {data}", ("model", "checkpoint", "bits/byte"), tuple(rows))


def training_table(records: Sequence[TrainingRecord]) -> Table:
    """What each checkpoint is and what it took."""
    rows = (
        (
            record.checkpoint,
            record.architecture,
            f"{record.parameters:,}",
            str(record.seed),
            f"{record.steps:,}",
            format_count(record.training_tokens),
            f"{record.seconds / 60:,.1f}",
            record.device,
        )
        for record in records
    )
    columns = ("checkpoint", "architecture", "parameters", "seed", "steps", "tokens", "minutes", "device")
    return Table("Training", columns, tuple(rows))


def needle_table(
    task: str, models: Models[NeedleRecord], paper: dict[str, dict[int, float]] | None = None
) -> Table:
    """Needles found, one column a length, with the paper's models below ours.

    Args:
        task: of the records.
        models: name -> its records of that task.
        paper: name of a model -> length -> percentage, as the paper has it.
    """
    paper = paper or {}
    lengths = sorted(
        {record.length for records in models.values() for record in records}
        | {length for row in paper.values() for length in row}
    )
    rows = []
    for name, records in models.items():
        cells = []
        for length in lengths:
            right = [record.correct for record in records if record.length == length]
            cells.append(f"{100 * sum(right) / len(right):.1f} ({len(right)})" if right else ABSENT)
        rows.append((name, *cells))
    for name, found in paper.items():
        rows.append((name, *(f"{found[length]:.1f}" if length in found else ABSENT for length in lengths)))
    return Table(
        f"Needles found, %: {task}",
        ("model", *map(format_length, lengths)),
        tuple(rows),
        "In brackets: texts asked. An answer counts when every token of it is right, generated without help.",
    )


def answer_table(task: str, models: Models[AnswerRecord]) -> Table:
    """Mean scores of a benchmark: one row a model and length."""
    measures = sorted({name for records in models.values() for record in records for name in record.scores})
    rows = []
    for name, records in models.items():
        for label, chosen in _by_length(task, records):
            scores = (
                [record.scores[name] for record in chosen if name in record.scores] for name in measures
            )
            means = (f"{100 * sum(found) / len(found):.2f}" if found else ABSENT for found in scores)
            rows.append((name, label, str(len(chosen)), *means))
    return Table(task, ("model", "length", "questions", *(f"{name}, %" for name in measures)), tuple(rows))


def harness_table(models: Models[HarnessRecord]) -> Table:
    """What lm-eval gave: one row a task, measure and model, several training seeds in rows of their own."""
    found = [(record, name) for name, records in models.items() for record in records]
    found.sort(key=lambda one: (one[0].task, one[0].measure))  # stable: models stay in their order
    rows = [
        (
            name,
            record.task,
            record.measure,
            f"{record.value:.4g}",
            ABSENT if record.standard_error is None else f"{record.standard_error:.2g}",
            *(ABSENT if count is None else str(count) for count in (record.shots, record.questions)),
        )
        for record, name in found
    ]
    columns = ("model", "task", "measure", "value", "standard error", "shots", "questions")
    return Table("lm-eval", columns, tuple(rows))


def _by_length(task: str, records: Sequence[AnswerRecord]) -> list[tuple[str, list[AnswerRecord]]]:
    """Records of each length; prompts of a real data set have any, and stay together."""
    lengths = sorted({record.length for record in records})
    if len(lengths) > max(len(records) // 2, 2):
        return [(f"{format_length(lengths[0])}-{format_length(lengths[-1])}", list(records))]
    return [(format_length(n), [record for record in records if record.length == n]) for n in lengths]


def format_count(number: int) -> str:
    """A large number in short: 12.3M, 456K, 789."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def best_number(cell: str) -> str | None:
    """The number of a cell that stands out as the best of its column, None for any other cell."""
    found = _BEST.fullmatch(cell)
    return None if found is None else found[1]


def _mark_best(numbers: Sequence[Sequence[float | None]], formats: Sequence[str]) -> list[list[str]]:
    """Cells, the smallest of each column in bold where there are several rows."""
    best = [min((x for x in column if x is not None), default=None) for column in zip(*numbers, strict=True)]

    def show(value: float | None, form: str, smallest: float | None) -> str:
        if value is None:
            return ABSENT
        text = form.format(value)
        return f"**{text}**" if value == smallest and len(numbers) > 1 else text

    return [
        [show(value, form, smallest) for value, form, smallest in zip(row, formats, best, strict=True)]
        for row in numbers
    ]
