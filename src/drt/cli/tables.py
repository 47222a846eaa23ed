"""Tables of a report on the terminal."""

from __future__ import annotations

from drt.report.tables import Table, best_number
from drt.terminal import print_table


def print_report_table(table: Table) -> None:
    """The table and its note."""
    rows, bold = [], []
    for row, cells in enumerate(table.rows):
        numbers = [best_number(cell) for cell in cells]
        bold += [(row, column) for column, number in enumerate(numbers) if number is not None]
        rows.append([cell if number is None else number for cell, number in zip(cells, numbers, strict=True)])
    note = f"{table.note}\n" if table.note else ""
    print_table(table.columns, rows, title=table.title, note=note, bold=bold)
