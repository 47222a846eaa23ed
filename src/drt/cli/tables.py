"""Tables of a report on the terminal."""

from __future__ import annotations

from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import Console

from drt.report.tables import Table

_WIDEST = 1000  # characters


def print_table(console: Console, table: Table) -> None:
    """The table and its note; no column is left out where the terminal is narrower."""
    shown = rich_table.Table(title=table.title, box=SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        if number:
            shown.add_column(column, justify="right", no_wrap=True)
        else:
            shown.add_column(column, overflow="fold", min_width=12)
    for row in table.rows:
        shown.add_row(*(f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in row))
    needed = console.measure(shown, options=console.options.update(max_width=_WIDEST)).maximum
    Console(width=max(console.width, needed)).print(shown)
    if table.note:
        console.print(f"{table.note}\n", highlight=False, markup=False)
