"""One page from evaluation records: Markdown with pictures beside it, and the same as one HTML file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure

from drt.errors import DRTError
from drt.eval.perplexity import COLUMNS
from drt.eval.results import (
    AnswerRecord,
    EvaluationRecord,
    HarnessRecord,
    NeedleRecord,
    PerplexityRecord,
    TrainingRecord,
)
from drt.files import atomic_write, make_folder
from drt.plotting.cost import plot_cost
from drt.plotting.needle import plot_needles
from drt.plotting.perplexity import plot_loss_by_position
from drt.plotting.style import save_figure
from drt.report import paper
from drt.report.models import group_seeds
from drt.report.tables import (
    Table,
    answer_table,
    best_model,
    best_number,
    difference_table,
    harness_table,
    needle_table,
    perplexity_table,
    seeds_table,
    training_table,
)
from drt.terminal import visible

TITLE = "Evaluation"
MARKDOWN, HTML = "report.md", "report.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 0.75rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr:hover td { background: #f6f8fa; }
section > div { overflow-x: auto; }
img { max-width: 100%; }
p { max-width: 50rem; color: #444; }
"""
_LONGEST_SLUG = 80  # characters of a data set's name in the name of a file
# What Markdown would read as more than text; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
RecordT = TypeVar("RecordT", bound=EvaluationRecord)


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file and what it shows."""

    name: str
    caption: str
    figure: Figure


Block = Table | Picture


def build_page(
    records: Sequence[EvaluationRecord],
    *,
    reference: str | None = None,
    positions: Sequence[int] = COLUMNS,
) -> list[Block]:
    """The tables and figures that the records allow, with the paper's numbers among them.

    Args:
        records: of any kinds.
        reference: model that the others are compared with in language modelling. None: the best one.
        positions: ends of the position buckets in tables.

    Raises:
        DRTError: no records, models that were evaluated on different documents, a reference that is no model.
    """
    if not records:
        raise DRTError("expected at least one record to report, got none")
    blocks: list[Block] = []
    documents = _of_kind(records, PerplexityRecord)
    taken: set[str] = set()
    for data in dict.fromkeys(record.data for record in documents):
        chosen = [record for record in documents if record.data == data]
        blocks += _language_modelling(data, chosen, reference, positions, _picture_name(data, taken))
    if documents:
        blocks.append(paper.LANGUAGE_MODELLING)
    if trainings := _of_kind(records, TrainingRecord):
        blocks.append(training_table(trainings))
    blocks += _needles(_of_kind(records, NeedleRecord))
    answers = _of_kind(records, AnswerRecord)
    for task in dict.fromkeys(record.task for record in answers):
        blocks.append(answer_table(task, group_seeds([record for record in answers if record.task == task])))
    if harness := _of_kind(records, HarnessRecord):
        blocks.append(harness_table(group_seeds(harness)))
    return blocks


def write_page(blocks: Sequence[Block], folder: Path | str) -> tuple[Path, Path]:
    """Write `report.md` with the pictures beside it, and `report.html` with everything in it.

    Args:
        blocks: as `build_page` gives them.
        folder: where the files go; made if it is missing.

    Returns:
        The paths of the two pages.

    Raises:
        DRTError: the folder cannot be written.
    """
    folder = Path(folder)
    pictures = {block.name: _png(block.figure) for block in blocks if isinstance(block, Picture)}
    files = pictures | {
        MARKDOWN: to_markdown(blocks).encode(),
        HTML: to_html(blocks, pictures).encode(),
    }
    make_folder(folder)
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / MARKDOWN, folder / HTML


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub shows it; pictures by their file names."""
    parts = [f"# {TITLE}"]
    for block in blocks:
        if isinstance(block, Picture):
            caption = _markdown(block.caption)
            parts.append(f"![{caption}]({block.name})\n\n{caption}")
            continue
        parts.append(f"## {_markdown(block.title)}")
        lines = [block.columns, ("---", *["---:"] * (len(block.columns) - 1)), *block.rows]
        parts.append("\n".join(map(_markdown_row, lines)))
        if block.note:
            parts.append(_markdown(block.note))
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block], pictures: dict[str, bytes]) -> str:
    """The page in one file: no script, nothing from elsewhere. `pictures`: name -> PNG."""
    parts = []
    for block in blocks:
        if isinstance(block, Picture):
            data = base64.b64encode(pictures[block.name]).decode()
            caption = _html(block.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption><p>{caption}</p></figcaption></figure>")
            continue
        head = "".join(f"<th>{_html(cell)}</th>" for cell in block.columns)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in block.rows)
        table = f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        note = f"<p>{_html(block.note)}</p>" if block.note else ""
        parts.append(f"<section><h2>{_html(block.title)}</h2>{table}{note}</section>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{TITLE}</h1>{''.join(parts)}</body></html>\n"
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell if best_number(cell) else _markdown(cell) for cell in cells)} |"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is: no link, no picture, no HTML, one line."""
    return _MARKUP.sub(r"\\\g<0>", visible(text, line=True))


def _html(text: str) -> str:
    return escape(visible(text, line=True))


def _html_cell(cell: str) -> str:
    best = best_number(cell)
    return f"<td>{_html(cell) if best is None else f'<strong>{best}</strong>'}</td>"


def _picture_name(data: str, taken: set[str]) -> str:
    """The name of a data set's picture, which no other has; adds it to those that are taken."""
    slug = re.sub(r"[^A-Za-z0-9]", "-", data).strip("-")[:_LONGEST_SLUG]
    numbers = ("" if number == 1 else str(number) for number in count(1))
    names = ("-".join(filter(None, ("loss-by-position", slug, number))) for number in numbers)
    name = next(name for name in names if name.lower() not in taken)  # some file systems know no capitals
    taken.add(name.lower())
    return f"{name}.png"


def _language_modelling(
    data: str,
    records: Sequence[PerplexityRecord],
    reference: str | None,
    positions: Sequence[int],
    picture: str,
) -> list[Block]:
    models = group_seeds(records)
    if reference is not None and reference not in models:
        raise DRTError(f"reference: expected one of {', '.join(models)}, got {reference!r}")
    reference = best_model(models) if reference is None else reference
    blocks: list[Block] = [perplexity_table(data, models, positions)]
    if len(models) > 1:
        blocks.append(difference_table(data, models, reference))
    if (seeds := seeds_table(data, models)).rows:
        blocks.append(seeds)
    caption = f"Bits per byte by position in the document: {data}"
    figure = plot_loss_by_position(models, reference)
    return [*blocks, Picture(picture, caption, figure)]


def _needles(records: Sequence[NeedleRecord]) -> list[Block]:
    if not records:
        return []
    blocks: list[Block] = []
    for task in dict.fromkeys(record.task for record in records):
        models = group_seeds([record for record in records if record.task == task])
        table = needle_table(task, models, paper.NEEDLES.get(task))
        note = f"{table.note} {paper.NEEDLE_NOTES.get(task, '')}".strip()
        blocks.append(Table(table.title, table.columns, table.rows, note))
    blocks.append(
        Picture("needles.png", "Needles found, by length of the text and depth in it", plot_needles(records))
    )
    cost = plot_cost(group_seeds(records))
    return [*blocks, Picture("cost.png", "What reading and answering cost, by length of the text", cost)]


def _of_kind(records: Sequence[EvaluationRecord], kind: type[RecordT]) -> list[RecordT]:
    return [record for record in records if isinstance(record, kind)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    save_figure(figure, buffer, "png")
    return buffer.getvalue()
